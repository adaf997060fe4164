"""Train every part, assemble and measure: both bundled models from nothing.

python -m training.run_all --out training/out --minutes 230

Run the same line again after an interruption: finished parts are kept, the others continue.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from training.common import DEFAULT_OUT, PACKAGE_FOLDER

# Share of the minutes each part gets; drawing latents and measuring come on top.
SHARES = {
    "train_autoencoder": 0.085,
    "train_text": 0.06,
    "finetune_decoder": 0.05,
    "train_judge": 0.105,
    "train_unet": 0.35,
    "train_sd3": 0.35,
}
ORDER = (
    "train_autoencoder",
    "finetune_decoder",
    "train_text",
    "train_judge",
    "make_latents",
    "train_unet",
    "train_sd3",
)


def part_command(part: str, out: Path, minutes: float, device: str, count: int) -> list[str]:
    """The command line of one part."""
    command = [sys.executable, "-m", f"training.{part}", "--out", str(out), "--device", device]
    if part in SHARES:
        return [*command, "--minutes", f"{minutes * SHARES[part]:.2f}"]
    return [*command, "--count", str(count)]


def run_all(out: Path, minutes: float, device: str, count: int, to: Path) -> None:
    """Run the parts in order, each in its own process; stops at the first that fails. The models lie below `to`."""
    for part in ORDER:
        subprocess.run(part_command(part, out, minutes, device, count), check=True)
    for assemble, name in (("assemble", "shapes-sd"), ("assemble_sd3", "shapes-sd3")):
        folder = str(to / name)
        subprocess.run([sys.executable, "-m", f"training.{assemble}", "--out", str(out), "--to", folder], check=True)
        command = [sys.executable, "-m", "training.evaluate", "--model", folder, "--device", device]
        judge = ["--judge", str(to / "shapes-sd" / "judge")]
        subprocess.run([*command, *judge, "--out", str(out / "evaluation" / name)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=230)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--count", type=int, default=24000, help="scenes whose latents are kept")
    parser.add_argument("--to", type=Path, default=PACKAGE_FOLDER.parent, help="where both models are put")
    options = parser.parse_args()
    run_all(options.out, options.minutes, options.device, options.count, options.to)


if __name__ == "__main__":
    main()

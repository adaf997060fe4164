"""Train every part, assemble and measure: the whole model from nothing.

python -m training.run_all --out training/out --minutes 150

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
    "train_autoencoder": 0.13,
    "train_text": 0.09,
    "finetune_decoder": 0.08,
    "train_judge": 0.16,
    "train_unet": 0.54,
}
ORDER = ("train_autoencoder", "finetune_decoder", "train_text", "train_judge", "make_latents", "train_unet")


def part_command(part: str, out: Path, minutes: float, device: str, count: int) -> list[str]:
    """The command line of one part."""
    command = [sys.executable, "-m", f"training.{part}", "--out", str(out), "--device", device]
    if part in SHARES:
        return [*command, "--minutes", f"{minutes * SHARES[part]:.2f}"]
    return [*command, "--count", str(count)]


def run_all(out: Path, minutes: float, device: str, count: int, to: Path) -> None:
    """Run the parts in order, each in its own process; stops at the first that fails."""
    for part in ORDER:
        subprocess.run(part_command(part, out, minutes, device, count), check=True)
    subprocess.run([sys.executable, "-m", "training.assemble", "--out", str(out), "--to", str(to)], check=True)
    command = [sys.executable, "-m", "training.evaluate", "--model", str(to), "--device", device]
    subprocess.run([*command, "--out", str(out / "evaluation")], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--count", type=int, default=24000, help="scenes whose latents are kept")
    parser.add_argument("--to", type=Path, default=PACKAGE_FOLDER)
    options = parser.parse_args()
    run_all(options.out, options.minutes, options.device, options.count, options.to)


if __name__ == "__main__":
    main()

"""Everything of the world's models from nothing: drawings, autoencoder, text encoder, judge, both denoisers.

python -m training.world.run_all --minutes 600
python -m training.world.run_all --minutes 14 --device cuda --count 60000 --workers 16

Run the same line again after an interruption, or one with more minutes: finished parts are kept, the others go on.
The minutes are shared out below; drawing latents and measuring come on top.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from training.common import DEFAULT_OUT

SHARES = {
    "codec": 0.06,
    "train_text": 0.05,
    "train_judge": 0.06,
    "codec --decoder": 0.06,
    "unet": 0.42,
    "sd3": 0.29,
    "distill": 0.06,
}
# Sizes with their shares, and until which part of a denoiser's minutes: 128 px until things are right, which is cheap.
STAGES = (("128", 0.45), ("128:1,256:3", 0.9), ("256:2,512:1", 1.0))
LATENTS = ((128, 1, 1.0), (256, 4, 0.6), (512, 4, 0.1))  # size, objects at most, part of the count
LAST_HOLD = 0.9


@dataclass(frozen=True)
class Order:
    """What was asked for."""

    out: Path
    minutes: float
    device: str
    count: int
    workers: int = 1


def command(order: Order, part: str, *options: str) -> list[str]:
    return [sys.executable, "-m", *f"training.world.{part}".split(), "--out", str(order.out), *options]


def timed(order: Order, part: str, share: float = 1.0) -> list[str]:
    """A trainer's command, until `share` of its part of the minutes is used."""
    minutes = order.minutes * SHARES[part] * share
    return command(order, part, "--minutes", f"{minutes:.2f}", "--device", order.device)


def latent_commands(order: Order) -> list[list[str]]:
    rows = [(str(size), str(most), str(max(1, int(order.count * part)))) for size, most, part in LATENTS]
    rest = ("--device", order.device, "--workers", str(order.workers))
    return [
        command(order, "latents", "--size", size, "--objects", most, "--count", count, *rest)
        for size, most, count in rows
    ]


def stage_commands(order: Order, part: str) -> list[list[str]]:
    """A denoiser's stages; the rate falls only at the end of the last."""
    holds = [1.0] * (len(STAGES) - 1) + [LAST_HOLD]
    return [
        [*timed(order, part, share), "--sizes", sizes, "--hold", str(hold)]
        for (sizes, share), hold in zip(STAGES, holds, strict=True)
    ]


def measure_command(order: Order, folder: Path) -> list[str]:
    own = order.out / "evaluation"
    judge = order.out / "world_judge"
    options = ("--model", str(folder), "--judge", str(judge), "--out", str(own), "--device", order.device)
    return [sys.executable, "-m", "training.world.evaluate", *options]


def commands(order: Order, to: Path) -> list[list[str]]:
    """All command lines, in order."""
    return [
        command(order, "sprites"),
        *(timed(order, part) for part in ("codec", "train_text", "train_judge", "codec --decoder")),
        *latent_commands(order),
        *stage_commands(order, "unet"),
        timed(order, "distill"),
        *stage_commands(order, "sd3"),
        command(order, "assemble", "--to", str(to)),
        *(measure_command(order, to / name) for name in ("emoji-sd", "emoji-sd3")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--count", type=int, default=20000, help="scenes of 128 px whose latents are kept")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes for latents")
    parser.add_argument("--to", type=Path, default=DEFAULT_OUT / "models", help="where the models are put")
    options = parser.parse_args()
    order = Order(options.out, options.minutes, options.device, options.count, options.workers)
    for line in commands(order, options.to):
        subprocess.run(line, check=True)


if __name__ == "__main__":
    main()

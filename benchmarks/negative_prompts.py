"""Do negative prompts at guidance scale 1 work? Normalised attention guidance on the bundled model, read by the judge.

Prompts name a shape and no colour ("a star"), so that the model is free to choose one. For each negative prompt, the share
of objects with that colour, without and with the method, on the same seeds; and whether the shape that was asked for is
still drawn. A negative prompt beside it that names another colour is the control.

    python -m benchmarks.negative_prompts --pictures 64 --steps 10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import diffaccel
from diffaccel import NormalizedAttentionGuidance
from diffaccel.miniatures import load_judge, load_miniature
from diffaccel.miniatures.judge import Judge
from diffaccel.miniatures.scenes import COLOURS, SHAPES

BATCH = 32
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Seen:
    """What the judge saw: share of each colour, of well-formed pictures, and of pictures with the shape asked for."""

    colours: dict[str, float]
    valid: float
    shape: float


def draw(pipe: Any, prompts: Sequence[str], steps: int) -> list[Any]:
    """Pictures at guidance scale 1; picture k has seed k."""
    images: list[Any] = []
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(part))]
        images += pipe(part, num_inference_steps=steps, guidance_scale=1.0, generator=seeds).images
    return images


def look(judge: Judge, images: list[Any], shapes: Sequence[str]) -> Seen:
    """Shares over all objects (colours) and pictures."""
    scenes = [reading.scene for reading in judge.read(images)]
    valid = sum(reading.valid for reading in judge.read(images)) / len(images)
    found = [item.colour for scene in scenes for item in scene.objects]
    right = sum(any(item.shape == shape for item in scene.objects) for scene, shape in zip(scenes, shapes, strict=True))
    return Seen({colour: found.count(colour) / len(found) for colour in COLOURS}, valid, right / len(images))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("shapes-sd", "shapes-sd3"), default="shapes-sd")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=float, default=NormalizedAttentionGuidance().scale)
    parser.add_argument("--alpha", type=float, default=NormalizedAttentionGuidance().alpha)
    parser.add_argument("--stop", type=float, default=1.0, help="stop_fraction")
    parser.add_argument("--colours", nargs="+", choices=COLOURS, help="default: the three the model draws most")
    parser.add_argument("--out", type=Path, help="default: one file per model in benchmarks/results")
    options = parser.parse_args()
    pipe, judge = load_miniature(options.model), load_judge()
    pipe.set_progress_bar_config(disable=True)
    shapes = [SHAPES[k % len(SHAPES)] for k in range(options.pictures)]
    prompts = [f"a {shape}" for shape in shapes]
    plain = look(judge, draw(pipe, prompts, options.steps), shapes)
    colours = options.colours or sorted(COLOURS, key=lambda colour: -plain.colours[colour])[:3]
    seen = {}
    for colour in colours:
        method = NormalizedAttentionGuidance(
            negative_prompt=colour, scale=options.scale, alpha=options.alpha, stop_fraction=options.stop
        )
        seen[colour] = look(judge, draw(diffaccel.wrap(pipe, method), prompts, options.steps), shapes)
    print(
        "| Negative prompt | " + " | ".join(f"{colour} drawn" for colour in colours) + " | shape right | well-formed |"
    )
    print("| --- |" + " --- |" * (len(colours) + 2))
    for name, found in {"none": plain, **seen}.items():
        shares = [found.colours[colour] for colour in colours] + [found.shape, found.valid]
        print(f"| {name} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")
    facts = {
        "model": options.model,
        "pictures": options.pictures,
        "steps": options.steps,
        "scale": options.scale,
        "alpha": options.alpha,
    }
    rows = {"none": vars(plain), **{colour: vars(found) for colour, found in seen.items()}}
    out = options.out or RESULTS / f"negative-prompts-{options.model}.json"
    out.write_text(json.dumps({**facts, "stop": options.stop, "seen": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

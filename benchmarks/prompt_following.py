"""Does sparse cross-attention make the bundled model follow its prompts better? Held-out prompts, read by the judge.

python -m benchmarks.prompt_following --prompts 96 --steps 10 --guidance 1 --scales 0 1 2
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch

import diffaccel
from diffaccel import SparseCrossAttention
from diffaccel.miniatures import load_judge, load_miniature, recommended_guidance
from diffaccel.miniatures.scenes import PromptCase, held_out_prompts

BATCH = 32


def draw(pipe: Any, cases: Sequence[PromptCase], steps: int, guidance: float) -> list[Any]:
    """One picture for each prompt; picture k has seed k."""
    images: list[Any] = []
    for first in range(0, len(cases), BATCH):
        prompts = [case.prompt for case in cases[first : first + BATCH]]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(prompts))]
        images += pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=seeds).images
    return images


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, help="default: the model's recommended scale")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--alpha", type=float, default=1.5)
    options = parser.parse_args()
    pipe, judge = load_miniature("shapes-sd"), load_judge()
    pipe.set_progress_bar_config(disable=True)
    guidance = recommended_guidance() if options.guidance is None else options.guidance
    cases = held_out_prompts("mixed", options.prompts)
    print(f"{len(cases)} prompts, {options.steps} steps, guidance {guidance:g}, alpha {options.alpha:g}\n")
    print("| Scale | shape and colour right | all attributes right | everything right |")
    print("| --- | --- | --- | --- |")
    for scale in options.scales:
        fast = diffaccel.wrap(pipe, SparseCrossAttention(scale=scale, alpha=options.alpha))
        verdict = judge.score(draw(fast, cases, options.steps, guidance), cases)
        shares = [float(x.float().mean()) for x in (verdict.both, verdict.all_attributes, verdict.correct)]
        cells = [f"{100 * p:.0f} % (± {100 * math.sqrt(p * (1 - p) / len(cases)):.0f})" for p in shares]
        print(f"| {scale:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

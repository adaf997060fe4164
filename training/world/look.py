"""A sheet of what the latest UNet makes of captions, with the captions beside it, to look at while it trains.

python -m training.world.look --size 128 --count 32
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline

from training.common import DEFAULT_OUT
from training.evaluate import contact_sheet
from training.world import World
from training.world.assemble import emoji_sd, emoji_sd3

STEPS = {"unet": 25, "sd3": 28}


def held_out_captions(world: World, count: int, size: int, most: int, seed: int = 5) -> list[str]:
    """Captions of scenes that training never sees."""
    rng = numpy.random.default_rng(seed)
    style = (None, "random")
    scenes = [
        world.sample(rng, int(rng.integers(1, most + 1)), size, style[i % 2], held_out=True) for i in range(count)
    ]
    return [world.caption(scene, rng)[0] for scene in scenes]


def latest(out: Path, model: str) -> DiffusionPipeline:
    """The pipeline of the latest checkpoints, with the sampler it is measured with."""
    pipe = emoji_sd(out) if model == "unet" else emoji_sd3(out)
    if isinstance(pipe, StableDiffusionPipeline):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--model", choices=STEPS, default="unet")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--objects", type=int, default=1)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = latest(options.out, options.model)
    prompts = held_out_captions(World.load(options.out), options.count, options.size, options.objects)
    rows = []
    for start in range(0, len(prompts), 8):
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts[start : start + 8]))]
        made = pipe(
            prompts[start : start + 8],
            height=options.size,
            width=options.size,
            num_inference_steps=STEPS[options.model],
            guidance_scale=options.guidance,
            generator=generators,
            output_type="pt",
        )
        rows.append(made.images)
    path = options.out / "look" / f"{options.model}_{options.size}.png"
    contact_sheet(torch.cat(rows), path)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")
    print(path)


if __name__ == "__main__":
    main()

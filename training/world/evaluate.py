"""Measure a model of the world on held-out captions: things, style, relation, drawing; and how much it leaves open.

python -m training.world.evaluate --model training/out/emoji-sd --judge training/out/world_judge --side 256 --count 200

Writes evaluation.json into the model's folder: a sweep over guidance scales on one fixed set of prompts and seeds, then
the figures at the best scale on other prompts with 95 % bootstrap intervals, and a contact sheet of each kind.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from torch import Tensor

from diffaccel.miniatures.world.captions import Kind, WorldCase, held_out_prompts
from diffaccel.miniatures.world.judge import VERDICT_FIELDS, WorldJudge, WorldVerdict
from diffaccel.miniatures.world.nouns import CORE_NAMES, NAMES
from diffaccel.miniatures.world.scenes import STYLES
from training.common import DEFAULT_OUT, write_json
from training.evaluate import contact_sheet, interval, load_pipeline

UNET_STEPS, TRANSFORMER_STEPS = 25, 28
SCALES = (1.5, 2.0, 3.0, 4.5, 6.0)
MEASURED: tuple[Kind, ...] = ("single", "style", "pair")
SWEEP_SEED, FINAL_SEED, OPEN_SEED = 11, 12, 13
SEEDS_PER_PROMPT = 4


@dataclass(frozen=True)
class Plan:
    """How pictures are made: side in pixels, how many at once, the nouns asked for."""

    side: int = 256
    batch: int = 16
    core: bool = False

    def cases(self, kind: Kind, count: int, seed: int) -> list[WorldCase]:
        return held_out_prompts(kind, count, seed, self.side, CORE_NAMES if self.core else NAMES)


def use_measured_sampler(pipe: DiffusionPipeline) -> tuple[int, str]:
    """Steps and name of the sampler a pipeline is measured with; a UNet's is set to DPM++ 2M with Karras' sigmas."""
    if isinstance(pipe, StableDiffusion3Pipeline):
        return TRANSFORMER_STEPS, "flow-matching Euler"
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    return UNET_STEPS, "DPM++ 2M Karras"


class Maker:
    """Makes pictures of many prompts with a pipeline."""

    def __init__(self, pipe: DiffusionPipeline, plan: Plan) -> None:
        self.pipe, self.plan = pipe, plan
        self.steps, self.sampler = use_measured_sampler(pipe)

    def __call__(self, prompts: Sequence[str], scale: float, seed: int = 0) -> Tensor:
        """(n, 3, side, side) in [0, 1]; picture i depends on its prompt and on seed * 100000 + i only."""
        starts = range(0, len(prompts), self.plan.batch)
        return torch.cat([self._batch(prompts[at : at + self.plan.batch], scale, seed * 100_000 + at) for at in starts])

    def _batch(self, prompts: Sequence[str], scale: float, seed: int) -> Tensor:
        one_row = {"max_sequence_length": 1} if isinstance(self.pipe, StableDiffusion3Pipeline) else {}
        images: Tensor = self.pipe(
            list(prompts),
            height=self.plan.side,
            width=self.plan.side,
            num_inference_steps=self.steps,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
            output_type="pt",
            **one_row,
        ).images
        return images.float().cpu()


def prompts_of(cases: Sequence[WorldCase]) -> list[str]:
    return [case.prompt for case in cases]


def sweep(make: Maker, judge: WorldJudge, count: int, scales: Sequence[float]) -> list[dict[str, float]]:
    """Share of pictures right in each respect at each guidance scale, by kind; the same prompts and seeds throughout."""
    rows = []
    for scale in scales:
        row = {"guidance": scale}
        for kind in MEASURED:
            cases = make.plan.cases(kind, count, SWEEP_SEED)
            verdict = judge.score(make(prompts_of(cases), scale), cases)
            for name in ("nouns", "style", "relation", "valid", "correct"):
                row[f"{kind}_{name}"] = round(getattr(verdict, name).float().mean().item(), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def best_scale(rows: Sequence[dict[str, float]]) -> float:
    """That with most pictures right in everything, all kinds counting alike."""
    return max(rows, key=lambda row: sum(row[f"{kind}_correct"] for kind in MEASURED))["guidance"]


def summary(verdict: WorldVerdict) -> dict[str, dict[str, float]]:
    return {name: interval(getattr(verdict, name)) for name in VERDICT_FIELDS}


def by_style(verdict: WorldVerdict, cases: Sequence[WorldCase]) -> dict[str, dict[str, float]]:
    """For each style the shares with the right noun and the right style."""
    found = {}
    for style in STYLES:
        chosen = torch.tensor([case.truth.style == style for case in cases])
        if chosen.any():
            found[style] = {
                "prompts": int(chosen.sum()),
                **{name: round(getattr(verdict, name)[chosen].float().mean().item(), 4) for name in ("nouns", "style")},
            }
    return found


def openness(make: Maker, judge: WorldJudge, count: int, scale: float) -> dict[str, float]:
    """How often two pictures of one prompt show different drawings of the right thing; a fair coin gives 0.5.

    A prompt never says which of a thing's two drawings to show, so this is what guidance and few steps take away first.
    """
    cases = make.plan.cases("single", count, OPEN_SEED)
    rounds = [judge.read(make(prompts_of(cases), scale, OPEN_SEED + turn)) for turn in range(SEEDS_PER_PROMPT)]
    differ = []
    for case, *readings in zip(cases, *rounds, strict=True):
        wanted = case.scene.objects[0].noun
        shown = [seen.artwork for reading in readings for seen in reading.objects[:1] if seen.noun == wanted]
        differ += [a != b for index, a in enumerate(shown) for b in shown[:index]]
    return {"pairs": len(differ), **(interval(torch.tensor(differ)) if differ else {})}


def measure(make: Maker, judge: WorldJudge, count: int, scale: float, out: Path) -> dict[str, Any]:
    """The figures of every kind at one guidance scale, with a contact sheet and its prompts in `out`."""
    report: dict[str, Any] = {}
    for kind in MEASURED:
        cases = make.plan.cases(kind, count, FINAL_SEED)
        images = make(prompts_of(cases), scale)
        verdict = judge.score(images, cases)
        report[kind] = {"prompts": count, **summary(verdict)}
        if kind == "style":
            report["by_style"] = by_style(verdict, cases)
        print(kind, json.dumps(report[kind]), flush=True)
        contact_sheet(images[:48], out / f"{kind}.png")
        (out / f"{kind}.txt").write_text("\n".join(case.prompt for case in cases[:48]) + "\n")
    return report


def evaluate(
    make: Maker, judge: WorldJudge, counts: tuple[int, int], out: Path, scales: Sequence[float]
) -> dict[str, Any]:
    """The whole report; `counts` are prompts of each kind for the sweep and for the figures. One scale: no sweep."""
    begin = time.monotonic()
    rows = sweep(make, judge, counts[0], scales) if len(scales) > 1 else []
    scale = best_scale(rows) if rows else scales[0]
    report: dict[str, Any] = {"recommended_guidance": scale, "steps": make.steps, "sampler": make.sampler}
    report |= {"side": make.plan.side, "nouns": len(CORE_NAMES if make.plan.core else NAMES)}
    report |= {"sweep": rows, "sweep_prompts_per_kind": counts[0] if rows else 0}
    report |= measure(make, judge, counts[1], scale, out)
    report["openness"] = openness(make, judge, max(1, counts[1] // 4), scale)
    report["seconds"] = round(time.monotonic() - begin)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pipeline's folder; evaluation.json is put there")
    parser.add_argument("--judge", type=Path, default=DEFAULT_OUT / "world_judge")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "evaluation", help="for contact sheets")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--core", action="store_true", help="ask for the hundred core nouns only")
    parser.add_argument("--sweep", type=int, default=32, help="prompts of each kind per guidance scale")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind for the figures")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="guidance scales; one: no sweep")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    make = Maker(load_pipeline(options.model, options.device), Plan(options.side, options.batch, options.core))
    judge = WorldJudge.load(options.judge)
    out = options.out / options.model.name
    report = evaluate(make, judge, (options.sweep, options.count), out, options.scales)
    write_json(options.model / "evaluation.json", report)


if __name__ == "__main__":
    main()

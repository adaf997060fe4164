"""Measure a shipped model on prompts about scenes that training never saw.

python -m training.evaluate --singles 512 --pairs 512

Writes evaluation.json into the model's folder: a sweep over guidance scales on one fixed set of prompts and
seeds, then the figures at the best scale on other prompts, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from diffaccel.miniatures import load_folder
from diffaccel.miniatures.judge import Judge, Verdict
from diffaccel.miniatures.scenes import PromptCase, held_out_prompts
from training import model_card
from training.common import DEFAULT_OUT, PACKAGE_FOLDER, write_json
from training.train_sd3 import MOST_EMPTY_ROWS, OneEmptyRow

FIELDS = ("shape", "colour", "texture", "both", "all_attributes", "relation", "correct")
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
# How each kind of pipeline is measured: steps, and the name of its sampler in the report.
SAMPLERS = {"StableDiffusionPipeline": (25, "DDIM"), "StableDiffusion3Pipeline": (28, "flow-matching Euler")}
BATCH = 32
SWEEP_SEED, FINAL_SEED = 11, 12


def load_pipeline(folder: Path, device: str = "cpu") -> DiffusionPipeline:
    """The model in `folder`, computing in float32, without progress bars.

    Stable Diffusion 3 gets an attention that computes its 256 equal rows of zeros as one, with the same outcome:
    pictures are those of a plain call, made several times faster.
    """
    pipe = load_folder(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe, StableDiffusion3Pipeline):
        attention = OneEmptyRow()
        attention.log_count = torch.tensor([math.log(MOST_EMPTY_ROWS)], device=device)
        pipe.transformer.set_attn_processor(attention)
    return pipe


def generate_batch(pipe: DiffusionPipeline, cases: Sequence[PromptCase], scale: float, steps: int, seed: int) -> Tensor:
    """(n, 3, 128, 128) in [0, 1]; picture i depends on its prompt and on seed + i only."""
    one_row = {"max_sequence_length": 1} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    images: Tensor = pipe(
        [case.prompt for case in cases],
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(cases))],
        output_type="pt",
        **one_row,
    ).images
    return images.cpu()


class Generator:
    """Makes pictures of many prompts; on a CPU in several processes of one thread each."""

    def __init__(self, folder: Path, device: str, workers: int) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        self.steps, self.sampler = SAMPLERS[index["_class_name"]]
        self.pool = None
        if device == "cpu" and workers > 1:
            context = torch.multiprocessing.get_context("spawn")
            self.pool = context.Pool(workers, _start_worker, (folder,))
        else:
            self.pipe = load_pipeline(folder, device)

    def __call__(self, cases: Sequence[PromptCase], scale: float, seed: int = 0) -> Tensor:
        """(n, 3, 128, 128) in [0, 1]; picture i depends on its prompt and on seed * 100000 + i only."""
        jobs = [
            (cases[start : start + BATCH], scale, self.steps, seed * 100_000 + start)
            for start in range(0, len(cases), BATCH)
        ]
        if self.pool:
            return torch.cat([torch.from_numpy(rows) for rows in self.pool.starmap(_work, jobs, chunksize=1)])
        return torch.cat([generate_batch(self.pipe, *job) for job in jobs])


_WORKER: dict[str, DiffusionPipeline] = {}


def _start_worker(folder: Path) -> None:
    torch.set_num_threads(1)
    _WORKER["pipe"] = load_pipeline(folder)


def _work(cases: Sequence[PromptCase], scale: float, steps: int, seed: int) -> Any:
    return generate_batch(_WORKER["pipe"], cases, scale, steps, seed).numpy()


def interval(values: Tensor, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Mean of (n,) booleans with a 95 % bootstrap interval, as shares.

    Where all agree a bootstrap sees no doubt; there the far end is the exact (Clopper-Pearson) one.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.float()
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    doubt = 1 - 0.025 ** (1 / len(values))
    low, high = (1 - doubt if low == 1 else low), (doubt if high == 0 else high)
    return {"mean": round(values.mean().item(), 4), "low": round(low, 4), "high": round(high, 4)}


def summary(verdict: Verdict) -> dict[str, dict[str, float]]:
    return {name: interval(getattr(verdict, name)) for name in FIELDS}


def sweep(generate: Generator, judge: Judge, count: int, scales: Sequence[float]) -> list[dict[str, float]]:
    """Share correct of `count` single and `count` pair prompts at each guidance scale, same seeds throughout."""
    singles, pairs = (held_out_prompts(kind, count, SWEEP_SEED) for kind in ("single", "pair"))
    rows = []
    for scale in scales:
        row: dict[str, float] = {"guidance": scale}
        for name, cases in (("single", singles), ("pair", pairs)):
            verdict = judge.score(generate(cases, scale), cases)
            row[f"{name}_attributes"] = round(verdict.all_attributes.float().mean().item(), 4)
            row[f"{name}_correct"] = round(verdict.accuracy, 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def best_scale(rows: Sequence[dict[str, float]]) -> float:
    return max(rows, key=lambda row: row["single_correct"] + row["pair_correct"])["guidance"]


def contact_sheet(images: Tensor, path: Path, columns: int = 8) -> None:
    """Save the first pictures side by side, in whole rows."""
    count = len(images) // columns * columns
    grid = (images[:count] * 255).round().byte().view(-1, columns, 3, *images.shape[-2:])
    rows, _, _, height, width = grid.shape
    plane = grid.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plane.numpy()).save(path)


def evaluate(
    generate: Generator,
    judge: Judge,
    counts: tuple[int, int, int],
    out: Path,
    scales: Sequence[float] = SCALES,
) -> dict[str, Any]:
    """The whole report; `counts` are prompts for the sweep, single and pair prompts for the figures.

    Where `scales` holds one guidance scale there is no sweep.
    """
    begin = time.monotonic()
    rows = sweep(generate, judge, counts[0], scales) if len(scales) > 1 else []
    scale = best_scale(rows) if rows else scales[0]
    report: dict[str, Any] = {"recommended_guidance": scale, "steps": generate.steps, "sampler": generate.sampler}
    report |= {"sweep": rows, "sweep_prompts_per_kind": counts[0]}
    for kind, count in (("single", counts[1]), ("pair", counts[2])):
        cases = held_out_prompts(kind, count, FINAL_SEED)
        images = generate(cases, scale)
        report[kind] = {"prompts": count, **summary(judge.score(images, cases))}
        print(kind, json.dumps(report[kind]), flush=True)
        contact_sheet(images[:64], out / f"{kind}.png")
        (out / f"{kind}.txt").write_text("\n".join(case.prompt for case in cases[:64]) + "\n")
    report["seconds"] = round(time.monotonic() - begin)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PACKAGE_FOLDER)
    parser.add_argument("--judge", type=Path, default=PACKAGE_FOLDER / "judge")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "evaluation")
    parser.add_argument("--sweep", type=int, default=64, help="prompts of each kind per guidance scale")
    parser.add_argument("--singles", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="guidance scales; one: no sweep")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes, on a CPU")
    options = parser.parse_args()
    generate = Generator(options.model, options.device, options.workers)
    judge = Judge.load(options.judge)
    counts = (options.sweep, options.singles, options.pairs)
    report = evaluate(generate, judge, counts, options.out, options.scales)
    write_json(options.model / "evaluation.json", report)
    model_card.write(options.model)


if __name__ == "__main__":
    main()

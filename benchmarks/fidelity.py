"""What recipes cost in quality, on the bundled model with its judge, against the line of "fewer steps" of the same solver.

    python benchmarks/fidelity.py                     # table and frontier plot into benchmarks/results
    python benchmarks/fidelity.py --search            # look for recipes above the line, see search.py

FLOPs are counted and do not depend on how busy the machine is; seconds are measured and do. The reference for PSNR, SSIM
and Frechet distance is the plain run with all steps: same prompts, same seeds, paired.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

from diffusers import StableDiffusionPipeline

from benchmarks.fidelity_table import Page, against_line, target
from benchmarks.recipes import chosen_presets, methods_alone
from diffaccel.bench import machine
from diffaccel.compare import score
from diffaccel.comparison import Row
from diffaccel.contest import PLAIN, Contestant, Runner, Settings, measure, verify_plain
from diffaccel.frontier import save_frontier
from diffaccel.miniatures import miniature_path, recommended_guidance
from diffaccel.miniatures.judge import Judge
from diffaccel.miniatures.scenes import held_out_prompts
from diffaccel.output import write_text
from diffaccel.recipe import Recipe

# Divisors of 1000: for other counts the DDIM of diffusers rounds its stride down and the line would be unfairly low.
LINE = (10, 20, 25)
LONG_LINE = (40,)  # only methods that save little need it


@dataclass(frozen=True)
class Options:
    """The command line."""

    model: Path
    guidance: float | None
    prompts: int
    method_prompts: int
    steps: int
    seed: int
    batch: int
    device: str
    search: bool
    out: Path


def baselines(steps: int, line: Sequence[int]) -> list[Contestant]:
    """The line of fewer steps."""
    return [Contestant(f"{k} steps", "fewer steps", PLAIN, k) for k in line if k < steps]


def entries(recipes: Sequence[Recipe], steps: int) -> list[Contestant]:
    """Recipes with all steps."""
    return [Contestant(recipe.name, "recipe", recipe, steps) for recipe in recipes]


def prepare(options: Options) -> tuple[Runner, list[Any], Any]:
    """Runner with the recommended guidance, held-out prompts (half of them with two objects), and the judge."""
    pipe = StableDiffusionPipeline.from_pretrained(options.model, local_files_only=True)
    pipe.to(options.device).set_progress_bar_config(disable=True)
    cases = held_out_prompts("mixed", options.prompts, options.seed)
    guidance = recommended_guidance("shapes-sd") if options.guidance is None else options.guidance
    settings = Settings(options.steps, guidance, options.seed, options.batch)
    return Runner(pipe, [case.prompt for case in cases], settings), cases, Judge.load(options.model / "judge")


def evaluate(runner: Runner, cases: Sequence[Any], judge: Any, method_prompts: int) -> tuple[list[Row], list[Row]]:
    """Presets and line on all prompts; presets, methods alone and a longer line on the first `method_prompts`."""
    steps, size = runner.settings.steps, runner.settings.batch_size
    plain = Contestant("plain", "plain", PLAIN, steps)
    whole = measure(runner, [plain, *baselines(steps, LINE), *entries(chosen_presets(), steps)], 1, _say_progress)
    calls = max(1, method_prompts // size)
    short = Runner(runner.pipe, runner.prompts[: calls * size], runner.settings)
    alone = measure(short, [*baselines(steps, LONG_LINE), *entries(methods_alone(), steps)], 1, _say_progress)
    for measurement in alone:
        measurement.seconds.clear()  # plain did not run beside them, so their times have no baseline
    both = [measurement.first(calls) for measurement in whole] + alone
    return score(whole, cases, judge), score(both, cases[: calls * size], judge)


def _say_progress(done: int, total: int, name: str) -> None:
    print(f"\r{done + 1} of {total}: {name:<40}", end="", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=miniature_path(), help="folder with model and judge")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the recommended one")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--method-prompts", type=int, default=64, help="prompts for methods alone; whole batches")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--search", action="store_true", help="search for recipes above the line of fewer steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write fidelity.md, fidelity.json and fidelity.png; or search."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runner, cases, judge = prepare(options)
    if options.search:
        from benchmarks.search import search

        search(runner, cases, judge, options.out)
        return
    facts = machine(options.device)
    check = verify_plain(runner)
    rows, methods = evaluate(runner, cases, judge, options.method_prompts)
    write(rows, methods, Page(runner, facts, check), options.out)


def write(rows: Sequence[Row], methods: Sequence[Row], conditions: Page, out: Path) -> None:
    """fidelity.json, fidelity.md, and the two plots."""
    data = conditions.to_dict() | {"target": target(rows)}
    for name, found in (("presets", rows), ("methods", methods)):
        data[name] = {"variants": [row.to_dict() for row in found], "against_fewer_steps": against_line(found)}
        save_frontier(found, out / f"fidelity-{name}.png")
    write_text(out / "fidelity.json", json.dumps(data, indent=2, allow_nan=False) + "\n", overwrite=True)
    text = conditions.render(rows, methods)
    write_text(out / "fidelity.md", text, overwrite=True)
    print(text)


if __name__ == "__main__":
    main()

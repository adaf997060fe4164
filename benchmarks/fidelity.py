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

from benchmarks.fidelity_table import against_line, page, target
from benchmarks.recipes import final_recipes
from diffaccel.bench import machine
from diffaccel.compare import score
from diffaccel.comparison import Comparison, Row
from diffaccel.contest import PLAIN, Contestant, Runner, Settings, measure, verify_plain
from diffaccel.frontier import save_frontier
from diffaccel.miniatures import miniature_path, recommended_guidance
from diffaccel.miniatures.judge import Judge
from diffaccel.miniatures.scenes import held_out_prompts
from diffaccel.output import write_text
from diffaccel.recipe import Recipe

LINE = (8, 11, 15, 20, 25, 33, 42)  # step counts of the "fewer steps" line, for 50 steps


@dataclass(frozen=True)
class Options:
    """The command line."""

    model: Path
    guidance: float | None
    prompts: int
    steps: int
    seed: int
    batch: int
    device: str
    search: bool
    out: Path


def contestants(recipes: Sequence[Recipe], steps: int, line: Sequence[int]) -> list[Contestant]:
    """Plain first, then the line of fewer steps, then the recipes."""
    fewer = [Contestant(f"{k} steps", "fewer steps", PLAIN, k) for k in line if k < steps]
    return [
        Contestant("plain", "plain", PLAIN, steps),
        *fewer,
        *(Contestant(recipe.name, "recipe", recipe, steps) for recipe in recipes),
    ]


def prepare(options: Options) -> tuple[Runner, list[Any], Any]:
    """Runner with the recommended guidance, held-out prompts (half of them with two objects), and the judge."""
    pipe = StableDiffusionPipeline.from_pretrained(options.model, local_files_only=True)
    pipe.to(options.device).set_progress_bar_config(disable=True)
    cases = held_out_prompts("mixed", options.prompts, options.seed)
    guidance = recommended_guidance("shapes-sd") if options.guidance is None else options.guidance
    settings = Settings(options.steps, guidance, options.seed, options.batch)
    return Runner(pipe, [case.prompt for case in cases], settings), cases, Judge.load(options.model / "judge")


def evaluate(runner: Runner, cases: Sequence[Any], judge: Any, recipes: Sequence[Recipe]) -> list[Row]:
    """All recipes and the line on all prompts, scored."""
    runners = contestants(recipes, runner.settings.steps, LINE)
    return score(measure(runner, runners, 1, _say_progress), cases, judge)


def _say_progress(done: int, total: int, name: str) -> None:
    print(f"\r{done + 1} of {total}: {name:<40}", end="", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=miniature_path(), help="folder with model and judge")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the recommended one")
    parser.add_argument("--prompts", type=int, default=256)
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
    rows = evaluate(runner, cases, judge, final_recipes())
    found = Comparison(tuple(rows), tuple(runner.prompts), vars(runner.settings) | {"call": {}}, facts, (check,))
    data = found.to_dict() | {"against_fewer_steps": against_line(rows), "target": target(rows)}
    write_text(options.out / "fidelity.json", json.dumps(data, indent=2, allow_nan=False) + "\n", overwrite=True)
    write_text(options.out / "fidelity.md", page(rows, runner, facts, check), overwrite=True)
    save_frontier(rows, options.out / "fidelity.png")
    print(page(rows, runner, facts, check))


if __name__ == "__main__":
    main()

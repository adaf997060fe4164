"""What recipes cost in quality, on the bundled model with its judge, against the line of "fewer steps" of the same solver.

    python benchmarks/fidelity.py                     # table and frontier plot into benchmarks/results
    python benchmarks/fidelity.py --subject shapes-sd3    # the bundled diffusion transformer
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

from benchmarks.fidelity_table import Page, against_line, target
from benchmarks.recipes import chosen_presets, methods_alone, transformer_methods_alone
from benchmarks.subjects import SUBJECTS, Subject
from diffaccel.files.output import write_text
from diffaccel.measure.compare import score
from diffaccel.measure.frontier import save_frontier
from diffaccel.measure.rows import Row
from diffaccel.measure.runner import PLAIN, Contestant, Runner, Settings, measure, verify_plain
from diffaccel.measure.timing import machine
from diffaccel.miniatures import load_folder, load_judge, miniature_path, recommended_guidance
from diffaccel.miniatures.scenes import held_out_prompts
from diffaccel.recipes.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """The command line."""

    subject: Subject
    model: Path | None
    guidance: float | None
    prompts: int
    method_prompts: int
    steps: int | None
    seed: int
    batch: int
    device: str
    search: bool
    out: Path

    @property
    def folder(self) -> Path:
        """Where the model lies."""
        return self.model or miniature_path(self.subject.name)


def baselines(steps: int, line: Sequence[int]) -> list[Contestant]:
    """The line of fewer steps."""
    return [Contestant(f"{k} steps", "fewer steps", PLAIN, k) for k in line if k < steps]


def entries(recipes: Sequence[Recipe], steps: int) -> list[Contestant]:
    """Recipes with all steps."""
    return [Contestant(recipe.name, "recipe", recipe, steps) for recipe in recipes]


def prepare(options: Options) -> tuple[Runner, list[Any], Any]:
    """Runner with the recommended guidance, held-out prompts (half of them with two objects), and the judge."""
    subject = options.subject
    pipe = load_folder(options.folder)
    pipe.to(options.device).set_progress_bar_config(disable=True)
    cases = held_out_prompts("mixed", options.prompts, options.seed)
    guidance = recommended_guidance(subject.name) if options.guidance is None else options.guidance
    settings = Settings(options.steps or subject.steps, guidance, options.seed, options.batch, subject.call)
    return Runner(pipe, [case.prompt for case in cases], settings), cases, load_judge()


def evaluate(
    runner: Runner, cases: Sequence[Any], judge: Any, subject: Subject, method_prompts: int
) -> tuple[list[Row], list[Row]]:
    """Presets and line on all prompts; presets, methods alone and a longer line on the first `method_prompts`."""
    steps, size = runner.settings.steps, runner.settings.batch_size
    plain = Contestant("plain", "plain", PLAIN, steps)
    whole = measure(
        runner, [plain, *baselines(steps, subject.line), *entries(chosen_presets(), steps)], 1, _say_progress
    )
    calls = max(1, method_prompts // size)
    short = Runner(runner.pipe, runner.prompts[: calls * size], runner.settings)
    methods = methods_alone() if subject.kind == "unet" else transformer_methods_alone()
    alone = measure(short, [*baselines(steps, subject.long_line), *entries(methods, steps)], 1, _say_progress)
    for measurement in alone:
        measurement.seconds.clear()  # plain did not run beside them, so their times have no baseline
    both = [measurement.first(calls) for measurement in whole] + alone
    return score(whole, cases, judge), score(both, cases[: calls * size], judge)


def _say_progress(done: int, total: int, name: str) -> None:
    print(f"\r{done + 1} of {total}: {name:<40}", end="", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="shapes-sd", choices=SUBJECTS, help="bundled model")
    parser.add_argument("--model", type=Path, help="another folder with a model of this kind")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the recommended one")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--method-prompts", type=int, default=64, help="prompts for methods alone; whole batches")
    parser.add_argument("--steps", type=int, help="default: the subject's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--search", action="store_true", help="search for recipes above the line of fewer steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    found = vars(parser.parse_args(arguments))
    return Options(**found | {"subject": SUBJECTS[found["subject"]]})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write a page, its figures as JSON and two plots; or search."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runner, cases, judge = prepare(options)
    if options.search:
        from benchmarks.search import search

        search(runner, cases, judge, options.out)
        return
    facts = machine(options.device)
    check = verify_plain(runner)
    rows, methods = evaluate(runner, cases, judge, options.subject, options.method_prompts)
    write(rows, methods, Page(runner, facts, check, options.subject), options.out)


def write(rows: Sequence[Row], methods: Sequence[Row], conditions: Page, out: Path) -> None:
    """Page, figures and plots; all names begin with the subject's stem."""
    stem = conditions.subject.stem
    data = conditions.to_dict() | {"target": target(rows, conditions.subject.saving)}
    for name, found in (("presets", rows), ("methods", methods)):
        data[name] = {"variants": [row.to_dict() for row in found], "against_fewer_steps": against_line(found)}
        save_frontier(found, out / f"{stem}-{name}.png")
    write_text(out / f"{stem}.json", json.dumps(data, indent=2, allow_nan=False) + "\n", overwrite=True)
    text = conditions.render(rows, methods)
    write_text(out / f"{stem}.md", text, overwrite=True)
    print(text)


if __name__ == "__main__":
    main()

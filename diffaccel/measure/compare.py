"""Plain against recipes against fewer steps: same prompts, same seeds, one run, alternating so that noise hits all alike.

Every picture has its own generator, seeded with seed + position. The plain column is the stock pipeline inside an empty
recipe, which counts evaluations and FLOPs and is checked against the stock pipeline first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.engine.seams import Seams
from diffaccel.measure.comparison import Comparison
from diffaccel.measure.quality import (
    Interval,
    bootstrap,
    enough_for_frechet,
    frechet_distance,
    mean_psnr,
    paired_difference,
    psnr,
    ssim,
)
from diffaccel.measure.rows import Row
from diffaccel.measure.runner import (
    PLAIN,
    CompareError,
    Contestant,
    Equal,
    Measurement,
    Progress,
    Runner,
    Settings,
    broken_notes,
    fewer_steps,
    measure,
    spacing_notes,
    verify_plain,
)
from diffaccel.measure.timing import Clock, machine, ratio, spread
from diffaccel.recipes.recipe import Recipe
from diffaccel.recipes.resolve import resolve_recipe


def compare(
    pipe: Any,
    prompts: Sequence[Any],
    recipes: Sequence[Any],
    *,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    repeats: int = 1,
    equal: Sequence[Equal] = ("time",),
    judge: Any = None,
    reference: str = "plain",
    on_progress: Progress = lambda done, total, name: None,
    clock: Clock = time.perf_counter,
    **call: Any,
) -> Comparison:
    """Measure recipes against the plain pipeline, and against the plain pipeline with fewer steps.

    Args:
        pipe: a stock diffusers pipeline; it is stock again afterwards.
        prompts: texts, or prompt cases (objects with `.prompt`), which a judge needs.
        recipes: anything `wrap` accepts, each.
        steps, guidance, seed, batch_size: as in `Settings`. Equal batch sizes only are timed: a short last one is not.
        repeats: how often each batch is timed.
        equal: for each recipe and each entry, add the plain pipeline with the step count that comes closest to the
            recipe in seconds, denoiser evaluations or FLOPs. Found by measuring; both figures are in the result.
        judge: scores prompt cases; None leaves accuracy and Frechet distance out.
        reference: name of the variant that PSNR, SSIM and Frechet distance refer to.
        on_progress: called as (calls done, calls in total, what comes next) while the rounds run.
        call: further arguments of the pipeline call, such as height and width.
    Returns:
        A `Comparison`: one row per variant; `table()` is a rich table, `save_json` and `save_picture` write it.
    Raises:
        CompareError: no prompts, a judge without prompt cases, or names that are not unique or unknown.
        Unsupported, RecipeError: from `wrap`.
    """
    settings = Settings(steps, guidance, seed, batch_size, call)
    contestants = [Contestant("plain", "plain", PLAIN, steps), *_contestants(recipes, steps)]
    _check(prompts, contestants, settings, judge)
    runner = Runner(pipe, [getattr(item, "prompt", item) for item in prompts], settings, clock)
    facts = machine(runner.device)
    with Seams() as seams:
        _hide_progress_bar(pipe, seams)
        notes = [verify_plain(runner)]
        for contestant in contestants[1:]:
            runner.run(contestant, runner.batches()[0])  # warms up, and counts FLOPs before any clock runs
        contestants += fewer_steps(runner, contestants, equal)
        notes += spacing_notes(pipe.scheduler, contestants)
        if reference not in [contestant.name for contestant in contestants]:
            raise CompareError(f"the reference {reference!r} is none of {', '.join(c.name for c in contestants)}.")
        measurements = measure(runner, contestants, repeats, on_progress)
    notes += broken_notes(measurements)
    rows = score(measurements, prompts, judge, reference)
    return Comparison(tuple(rows), tuple(runner.prompts), _describe(runner, repeats), facts, tuple(notes))


def _contestants(recipes: Sequence[Any], steps: int) -> list[Contestant]:
    resolved = [resolve_recipe(recipe) for recipe in recipes]
    names = [_name(recipe) for recipe in resolved]
    return [Contestant(name, "recipe", recipe, steps) for name, recipe in zip(names, resolved, strict=True)]


def _name(recipe: Recipe) -> str:
    return recipe.describe() if recipe.name == "custom" else recipe.name


def _check(prompts: Sequence[Any], contestants: list[Contestant], settings: Settings, judge: Any) -> None:
    names = [contestant.name for contestant in contestants]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if not prompts:
        raise CompareError("a comparison needs at least one prompt.")
    if doubled:
        raise CompareError(f"two variants are called {doubled[0]!r}; give recipes different names ('plain' is taken).")
    if judge is not None and not all(hasattr(item, "prompt") for item in prompts):
        raise CompareError("a judge needs prompt cases that say what to look for, not plain texts.")
    if settings.batch_size < 1 or settings.steps < 1:
        raise CompareError("steps and batch size must be 1 or more.")


def score(
    measurements: Sequence[Measurement], prompts: Sequence[Any], judge: Any, reference: str = "plain"
) -> list[Row]:
    """Rows of a comparison; the first measurement is the plain one."""
    plain = measurements[0]
    target = next(m for m in measurements if m.contestant.name == reference)
    judged = {m.contestant.name: _judge(judge, m.pictures, prompts) for m in measurements} if judge is not None else {}
    return [_row(m, plain, target, judged) for m in measurements]


@dataclass(frozen=True)
class _Judged:
    correct: Tensor  # (n,) bool
    features: Tensor  # (n, d)


def _judge(judge: Any, pictures: Tensor, prompts: Sequence[Any]) -> _Judged:
    return _Judged(judge.score(pictures, list(prompts)).correct, judge.features(pictures))


def _row(own: Measurement, plain: Measurement, target: Measurement, judged: Mapping[str, _Judged]) -> Row:
    contestant, pictures = own.contestant, own.pictures
    count = len(pictures)
    quality = {} if own is target else _distances(pictures, target.pictures)
    if judged:
        quality |= _judgement(judged[contestant.name], judged["plain"], judged[target.contestant.name], own is target)
    return Row(
        contestant.name,
        contestant.kind,
        contestant.steps,
        contestant.recipe.to_dict(),
        evaluations=sum(r.evaluations for r in own.reports) / len(own.reports),
        rows=sum(r.rows for r in own.reports) / count,
        flops=sum(r.flops for r in own.reports) / count,
        matches=contestant.matches,
        seconds=spread(own.seconds) if own.seconds else None,
        speedup=ratio(own.seconds, plain.seconds) if own.seconds and own is not plain else None,
        images=pictures,
        **quality,
    )


def _distances(pictures: Tensor, reference: Tensor) -> dict[str, Any]:
    return {"psnr": mean_psnr(psnr(pictures, reference)), "ssim": float(ssim(pictures, reference).mean())}


def _judgement(own: _Judged, plain: _Judged, target: _Judged, is_reference: bool) -> dict[str, Interval | float]:
    found: dict[str, Interval | float] = {"accuracy": bootstrap(own.correct)}
    if own is not plain:
        found["accuracy_change"] = paired_difference(own.correct, plain.correct)
    if not is_reference and enough_for_frechet(own.features):
        found["frechet"] = frechet_distance(own.features, target.features)
    return found


def _hide_progress_bar(pipe: Any, seams: Seams) -> None:
    if hasattr(pipe, "progress_bar"):
        seams.replace(pipe, "_progress_bar_config", {"disable": True})


def _describe(runner: Runner, repeats: int) -> dict[str, Any]:
    settings, pipe = runner.settings, runner.pipe
    return {
        "model": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "repeats": repeats,
        "call": {key: value for key, value in settings.call.items() if isinstance(value, (str, int, float, bool))},
    }


def demo(
    out: Path,
    *,
    recipes: Sequence[Any] = ("balanced",),
    prompts: int = 8,
    steps: int = 50,
    seed: int = 0,
    overwrite: bool = False,
    on_progress: Progress = lambda done, total, name: None,
) -> Comparison:
    """Before and after on the bundled model: comparison.png and comparison.json in `out`.

    Plain, the recipes, and for each the plain pipeline with fewer steps that take equally long; `prompts` held-out
    prompts, half with one object and half with two.

    Raises:
        DiffaccelError: the folder cannot be written to, a file is there already and `overwrite` is not set, or an extra is
            missing.
    """
    from diffaccel.files.output import OutputFolder  # noqa: PLC0415
    from diffaccel.miniatures import load_judge, load_miniature, recommended_guidance  # noqa: PLC0415
    from diffaccel.miniatures.scenes import held_out_prompts  # noqa: PLC0415

    folder = OutputFolder(Path(out), overwrite)
    picture, report = folder.claim("comparison.png"), folder.claim("comparison.json")
    found = compare(
        load_miniature("shapes-sd"),
        held_out_prompts("mixed", prompts, seed),
        recipes,
        steps=steps,
        guidance=recommended_guidance("shapes-sd"),
        seed=seed,
        judge=load_judge(),
        on_progress=on_progress,
    )
    found.save_json(report, overwrite=overwrite)
    found.save_picture(picture, overwrite=overwrite)
    return found

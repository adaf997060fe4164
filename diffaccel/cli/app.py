"""The `diffaccel` command. Every command parses, asks another file to do the work, and prints the result.

Exit codes: 0 done, 1 something is wrong (one sentence on stderr; `--debug` shows the traceback), 2 wrong usage.
Heavy imports sit inside the commands, so that `diffaccel --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from diffaccel.cli.batch import batch
from diffaccel.cli.demo import demo
from diffaccel.cli.erase import erase
from diffaccel.cli.support import (
    RECIPE_HELP,
    Debug,
    Equal,
    Guidance,
    Model,
    Negative,
    OneSentence,
    Output,
    Overwrite,
    Placement,
    Precision,
    Prompts,
    Scheduler,
    Seed,
    Size,
    Steps,
    Variant,
    console,
    print_version,
    progress,
    quiet_libraries,
    show,
)

if TYPE_CHECKING:
    from diffaccel.doctor import Check, Diagnosis
    from diffaccel.engine.report import Report
    from diffaccel.measure.comparison import Comparison


app = typer.Typer(
    cls=OneSentence,
    help="Accelerate Hugging Face diffusers pipelines without touching them.",
    no_args_is_help=True,
    add_completion=False,
    epilog='Try: diffaccel showcase, then diffaccel generate "a red circle" --recipe fast',
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    debug: Debug = False,
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True)] = False,
) -> None:
    """Accelerate Hugging Face diffusers pipelines without touching them."""


@app.command(
    epilog='Example: diffaccel generate "a red circle" "a blue star" --recipe fast --steps 25 -n 4 -o pictures'
)
def generate(
    prompts: Prompts,
    model: Model = "shapes-sd",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help=f"{RECIPE_HELP}.")] = "balanced",
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = None,
    negative: Negative = "",
    size: Size = None,
    scheduler: Scheduler = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures per prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures computed together.")] = 4,
    output: Output = Path("out"),
    overwrite: Overwrite = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write pictures without any text in them.")
    ] = False,
    device: Placement = None,
    dtype: Precision = None,
    variant: Variant = None,
    attention: Annotated[
        str, typer.Option(help="Who computes dense attention: sdpa, flash3, sage, natten, flex or xformers.")
    ] = "sdpa",
    debug: Debug = False,
) -> None:
    """Make pictures with a recipe and say what it saved."""
    from diffaccel import generate as work
    from diffaccel.files.output import OutputFolder
    from diffaccel.recipes.resolve import resolve_recipe
    from diffaccel.wrapping import wrap

    chosen = resolve_recipe(recipe)
    jobs = work.plan(prompts, seed, count, OutputFolder(output, overwrite))
    settings = work.Settings(steps, _guidance(guidance, model), negative, size, batch_size, metadata=not no_metadata)
    fast = wrap(_load(model, scheduler, device, dtype, variant), chosen, attention_kernel=attention)
    saved: list[Path] = []
    reports: list[Report] = []
    try:
        made = work.generate(fast, jobs, settings, model=model, overwrite=overwrite, on_saved=saved.append)
        reports.extend(made)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted: {len(saved)} of {len(jobs)} pictures are in {output}.", err=True)
        raise typer.Exit(130) from None
    finally:
        if reports:
            _print_summary(reports, len(saved), chosen.name)
        for path in saved:
            typer.echo(path)


def _guidance(given: float | None, model: str) -> float | None:
    from diffaccel.loading import default_guidance

    return default_guidance(model) if given is None else given


def _load(model: str, scheduler: str | None, device: str | None, dtype: str | None, variant: str | None) -> Any:
    from diffaccel.loading import load_pipeline, set_scheduler

    quiet_libraries()
    pipe = load_pipeline(model, device=device, dtype=dtype, variant=variant)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    return pipe


def _print_summary(reports: list[Report], images: int, recipe: str) -> None:
    table = Table("recipe", "pictures", "seconds", "steps", "evaluations", "rows", "FLOPs", "plain / run")
    flops, plain = sum(r.flops for r in reports), sum(r.flops_plain for r in reports)
    table.add_row(
        escape(recipe),
        str(images),
        f"{sum(r.seconds for r in reports):.2f}",
        str(sum(r.steps for r in reports)),
        str(sum(r.evaluations for r in reports)),
        str(sum(r.rows for r in reports)),
        f"{flops:.3g}" if flops else "",
        f"{plain / flops:.2f}x" if flops else "",
    )
    show(table)
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        typer.echo(f"note: {note}")


@app.command(epilog='Example: diffaccel compare "a red circle" --recipe balanced --recipe mine.json --equal time')
def compare(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT...]", help="What to draw.")] = None,
    held_out: Annotated[int, typer.Option(min=0, help="Use N held-out prompts of a bundled model, and its judge.")] = 0,
    model: Model = "shapes-sd",
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help=f"{RECIPE_HELP}; repeatable; default: balanced and fast.")
    ] = None,
    equal: Annotated[
        list[Equal] | None, typer.Option(help="What fewer steps are made equal to; repeatable; default: time.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance: Guidance = None,
    size: Size = None,
    scheduler: Scheduler = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures computed together.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="How often each batch is timed.")] = 1,
    output: Output = Path("out"),
    overwrite: Overwrite = False,
    device: Placement = None,
    dtype: Precision = None,
    variant: Variant = None,
    debug: Debug = False,
) -> None:
    """Plain against recipes against fewer steps: a table, comparison.png and comparison.json."""
    from diffaccel.files.output import OutputFolder
    from diffaccel.generate import check_steps
    from diffaccel.measure import compare as work
    from diffaccel.recipes.resolve import resolve_recipe

    chosen = [resolve_recipe(name) for name in recipe or ("balanced", "fast")]
    cases, judge = _cases(prompts or [], held_out, model, seed)
    folder = OutputFolder(output, overwrite)
    picture, report = folder.claim("comparison.png"), folder.claim("comparison.json")
    pipe = _load(model, scheduler, device, dtype, variant)
    check_steps(pipe, steps)
    with progress() as on_progress:
        found = work.compare(
            pipe,
            cases,
            chosen,
            steps=steps,
            guidance=_guidance(guidance, model),
            seed=seed,
            batch_size=batch_size,
            repeats=repeats,
            equal=[item.value for item in equal or (Equal.time,)],
            judge=judge,
            on_progress=on_progress,
            **_size_arguments(pipe, size),
        )
    found.save_json(report, overwrite=overwrite)
    found.save_picture(picture, overwrite=overwrite)
    _print_comparison(found, output)


def _cases(prompts: list[str], held_out: int, model: str, seed: int) -> tuple[list[Any], Any]:
    """What to compare on, and the judge if the prompts are ones it can score."""
    from diffaccel.miniatures import NAMES, load_judge

    if bool(prompts) == bool(held_out):
        raise typer.BadParameter("give prompts, or --held-out N for a bundled model.")
    if not held_out:
        return prompts, None
    if model not in NAMES:
        raise typer.BadParameter(f"--held-out needs a bundled model ({', '.join(NAMES)}).")
    from diffaccel.miniatures.scenes import held_out_prompts

    return held_out_prompts("mixed", held_out, seed), load_judge()


def _size_arguments(pipe: Any, size: tuple[int, int] | None) -> dict[str, Any]:
    from diffaccel.generate import check_size

    check_size(pipe, size)
    return {} if size is None else {"width": size[0], "height": size[1]}


def _print_comparison(found: Comparison, output: Path) -> None:
    show(found.table())
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(output / "comparison.png")
    typer.echo(output / "comparison.json")


@app.command(epilog="Example: diffaccel showcase -o out")
def showcase(output: Output = Path("out"), overwrite: Overwrite = False, debug: Debug = False) -> None:
    """Before and after on the bundled model: plain, balanced, and fewer steps that take equally long."""
    from diffaccel.measure import compare as work

    quiet_libraries()
    with progress() as on_progress:
        found = work.demo(output, overwrite=overwrite, on_progress=on_progress)
    _print_comparison(found, output)


@app.command(epilog="Examples: diffaccel recipes fast > mine.json, then diffaccel recipes --check mine.json")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this preset or file as JSON.")] = None,
    check: Annotated[Path | None, typer.Option(help="Check a recipe file: exit code 0 if it is valid.")] = None,
    debug: Debug = False,
) -> None:
    """List the presets, show one recipe as JSON, or check a recipe file."""
    from diffaccel.recipes.presets import presets
    from diffaccel.recipes.recipe import Recipe
    from diffaccel.recipes.resolve import resolve_recipe

    if check is not None and name is not None:
        raise typer.BadParameter("give a recipe to show or --check with a file, not both.")
    if check is not None:
        typer.echo(f"{check} is a valid recipe: {Recipe.load(check).describe()}")
    elif name is not None:
        typer.echo(json.dumps(resolve_recipe(name).to_dict(), indent=2))
    else:
        table = Table("recipe", "methods", "good for")
        for preset in presets().values():
            table.add_row(preset.name, escape(preset.describe()), escape(preset.note))
        show(table)


@app.command(epilog="Example: diffaccel doctor --model ./my-model")
def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also say which methods apply to this model.")
    ] = None,
    variant: Variant = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, optional packages and, for a model, which methods apply and why not."""
    from diffaccel.doctor import diagnose

    pipe = None if model is None else _load(model, None, "cpu", None, variant)
    diagnosis = diagnose(pipe, model or "")
    if as_json:
        typer.echo(diagnosis.to_json())
    else:
        _print_diagnosis(diagnosis)


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    out = console()
    table = Table("optional package", "version", "for")
    for package in diagnosis.optional:
        table.add_row(package.name, package.version or "-", package.purpose)
    show(table)
    if diagnosis.pipeline is not None:
        show(_checks_table("method", diagnosis.pipeline.methods))
        show(_checks_table("preset", diagnosis.pipeline.presets))
    out.print("For a bug report, copy from here:", style="bold")
    typer.echo(diagnosis.to_block())


def _checks_table(title: str, checks: list[Check]) -> Table:
    table = Table(title, "applies", "why not")
    for check in checks:
        table.add_row(check.name, "yes" if check.applies else "no", escape(check.reason))
    return table


app.command(epilog="Example: diffaccel batch rows.csv -o pictures --recipe balanced --dry-run")(batch)
app.command(epilog='Example: diffaccel erase "circle" --anchor "square" --keep "a red star" --prove -o out')(erase)
app.command(epilog="Example: diffaccel demo --allow ./models --open")(demo)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    finally:
        _let_go_of_stdout()


def _let_go_of_stdout() -> None:
    """Where nobody reads on (`diffaccel recipes | head -1`), Python would complain at its exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

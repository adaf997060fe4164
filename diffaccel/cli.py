"""The `diffaccel` command. Every command parses, asks another file to do the work, and prints the result.

Exit codes: 0 done, 1 something is wrong (one sentence on stderr; `--debug` shows the traceback), 2 wrong usage.
Heavy imports sit inside the commands, so that `diffaccel --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import diffaccel
from diffaccel.errors import DiffaccelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diffaccel.comparison import Comparison
    from diffaccel.doctor import Check, Diagnosis
    from diffaccel.report import Report


class Equal(StrEnum):
    """What "fewer steps" is made equal to."""

    time = "time"
    evaluations = "evaluations"
    flops = "flops"


class _OneSentence(typer.core.TyperGroup):
    """Turns exceptions of all commands into one sentence and exit code 1, unless --debug asks for the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (DiffaccelError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
            if ctx.meta.get("debug") or isinstance(error, (typer.Exit, typer.Abort)):
                raise
            Console(stderr=True, soft_wrap=True).print(f"[red]Error:[/red] {escape(_sentence(error))}", highlight=False)
            raise typer.Exit(1) from error


def _sentence(error: Exception) -> str:
    if isinstance(error, DiffaccelError):
        text = " ".join(str(error).split())
        return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text
    lines = str(error).strip().splitlines() or ["no message"]
    return f"unexpected {type(error).__name__}: {lines[0]} (--debug shows where)"


app = typer.Typer(
    cls=_OneSentence,
    help="Accelerate Hugging Face diffusers pipelines without touching them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _set_debug(ctx: typer.Context, value: bool) -> None:
    ctx.meta["debug"] = value or ctx.meta.get("debug", False)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"diffaccel {diffaccel.__version__}")
        raise typer.Exit


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 512x768.")
    return int(match[1]), int(match[2])


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several make several pictures.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Bundled model, folder in diffusers' format, or hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if missing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist already.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")]
Negative = Annotated[str, typer.Option(help="What not to draw.")]
Size = Annotated[Any, typer.Option(parser=_parse_size, metavar="WxH", help="Picture size; default: the model's own.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first picture; picture i gets seed + i.")]
Scheduler = Annotated[str | None, typer.Option(help="ddim, dpm++, euler, euler-a, heun, pndm or unipc.")]
Placement = Annotated[str | None, typer.Option(help="Torch device; default: a GPU if there is one.")]
Precision = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]


@app.callback()
def _root(
    debug: Debug = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Accelerate Hugging Face diffusers pipelines without touching them."""


@app.command()
def generate(
    prompts: Prompts,
    model: Model = "shapes-sd",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Preset name or recipe file.")] = "balanced",
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
    debug: Debug = False,
) -> None:
    """Make pictures with a recipe and say what it saved."""
    from diffaccel import generate as work
    from diffaccel.output import OutputFolder
    from diffaccel.recipe import resolve_recipe

    chosen = resolve_recipe(recipe)
    jobs = work.plan(prompts, seed, count, OutputFolder(output, overwrite))
    settings = work.Settings(steps, _guidance(guidance, model), negative, size, batch_size, metadata=not no_metadata)
    fast = diffaccel.wrap(_load(model, scheduler, device, dtype), chosen)
    reports = list(work.generate(fast, jobs, settings, model=model, overwrite=overwrite))
    _print_summary(reports, len(jobs), chosen.name)
    for job in jobs:
        typer.echo(job.path)


def _guidance(given: float | None, model: str) -> float | None:
    from diffaccel.loading import default_guidance

    return default_guidance(model) if given is None else given


def _load(model: str, scheduler: str | None, device: str | None, dtype: str | None) -> Any:
    from diffaccel.loading import load_pipeline, set_scheduler

    _quiet_libraries()
    pipe = load_pipeline(model, device=device, dtype=dtype)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    return pipe


def _quiet_libraries() -> None:
    """Keep stderr for our own sentences and the bar that counts steps, not for the bars and hints of loading."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Our own warnings are notes of the report, which is printed at the end.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"diffaccel\.")


def _print_summary(reports: list[Report], images: int, recipe: str) -> None:
    table = Table("recipe", "pictures", "seconds", "steps", "evaluations", "rows", "FLOPs", "plain / run")
    flops, plain = sum(r.flops for r in reports), sum(r.flops_plain for r in reports)
    table.add_row(
        recipe,
        str(images),
        f"{sum(r.seconds for r in reports):.2f}",
        str(sum(r.steps for r in reports)),
        str(sum(r.evaluations for r in reports)),
        str(sum(r.rows for r in reports)),
        f"{flops:.3g}",
        f"{plain / flops:.2f}x" if flops else "",
    )
    _console().print(table)
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        typer.echo(f"note: {note}")


@app.command()
def compare(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT...]", help="What to draw.")] = None,
    held_out: Annotated[int, typer.Option(min=0, help="Use N held-out prompts of a bundled model, and its judge.")] = 0,
    model: Model = "shapes-sd",
    recipe: Annotated[list[str], typer.Option("--recipe", "-r", help="Preset or file; repeatable.")] = [
        "balanced",
        "fast",
    ],  # noqa: B006
    equal: Annotated[list[Equal], typer.Option(help="Fewer steps at equal what; repeatable.")] = [Equal.time],  # noqa: B006
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
    debug: Debug = False,
) -> None:
    """Plain against recipes against fewer steps: a table, comparison.png and comparison.json."""
    from diffaccel import compare as work
    from diffaccel.output import OutputFolder
    from diffaccel.recipe import resolve_recipe

    chosen = [resolve_recipe(name) for name in recipe]
    cases, judge = _cases(prompts or [], held_out, model, seed)
    folder = OutputFolder(output, overwrite)
    picture, report = folder.claim("comparison.png"), folder.claim("comparison.json")
    pipe = _load(model, scheduler, device, dtype)
    with _progress() as on_progress:
        found = work.compare(
            pipe,
            cases,
            chosen,
            steps=steps,
            guidance=_guidance(guidance, model),
            seed=seed,
            batch_size=batch_size,
            repeats=repeats,
            equal=[item.value for item in equal],
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


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr that shows what is being measured."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("warming up", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


def _print_comparison(found: Comparison, output: Path) -> None:
    _console().print(found.table())
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(output / "comparison.png")
    typer.echo(output / "comparison.json")


@app.command()
def demo(output: Output = Path("out"), debug: Debug = False) -> None:
    """Before and after on the bundled model: plain, balanced, and fewer steps that take equally long."""
    from diffaccel import compare as work

    _quiet_libraries()
    with _progress() as on_progress:
        found = work.demo(output, on_progress=on_progress)
    _print_comparison(found, output)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this preset or file as JSON.")] = None,
    check: Annotated[Path | None, typer.Option(help="Check a recipe file: exit code 0 if it is valid.")] = None,
    debug: Debug = False,
) -> None:
    """List the presets, show one recipe as JSON, or check a recipe file."""
    from diffaccel.recipe import Recipe, presets, resolve_recipe

    if check is not None:
        typer.echo(f"{check} is a valid recipe: {Recipe.load(check).describe()}")
    elif name is not None:
        typer.echo(json.dumps(resolve_recipe(name).to_dict(), indent=2))
    else:
        table = Table("recipe", "methods", "good for")
        for preset in presets().values():
            table.add_row(preset.name, escape(preset.describe()), escape(preset.note))
        _console().print(table)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also say which methods apply to this model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, optional packages and, for a model, which methods apply and why not."""
    from diffaccel.doctor import diagnose

    pipe = None if model is None else _load(model, None, "cpu", None)
    diagnosis = diagnose(pipe, model or "")
    if as_json:
        typer.echo(diagnosis.to_json())
    else:
        _print_diagnosis(diagnosis)


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    console = _console()
    table = Table("optional package", "version", "for")
    for package in diagnosis.optional:
        table.add_row(package.name, package.version or "-", package.purpose)
    console.print(table)
    if diagnosis.pipeline is not None:
        console.print(_checks_table("method", diagnosis.pipeline.methods))
        console.print(_checks_table("preset", diagnosis.pipeline.presets))
    console.print("For a bug report, copy from here:", style="bold")
    typer.echo(diagnosis.to_block())


def _checks_table(title: str, checks: list[Check]) -> Table:
    table = Table(title, "applies", "why not")
    for check in checks:
        table.add_row(check.name, "yes" if check.applies else "no", escape(check.reason))
    return table


def _console(file: TextIO | None = None) -> Console:
    """A console that does not break tables when the output is a pipe or a file."""
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else 160)


def main() -> None:
    """Entry point of the console script."""
    app()

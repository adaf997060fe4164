"""`diffaccel batch`: a list of rows to a folder of pictures that can be trusted to be complete."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffaccel.cli.support import (
    RECIPE_HELP,
    Debug,
    Guidance,
    Model,
    Negative,
    Placement,
    Precision,
    Scheduler,
    Size,
    Steps,
    Variant,
    quiet_libraries,
    show,
)

if TYPE_CHECKING:
    from diffaccel.batch import BatchPlan, BatchProgress, BatchReport

SHOWN_FILES, SHOWN_FAILURES, SHOWN_GROUPS, SHOWN_PROBLEMS = 5, 20, 30, 50
SECONDS_BETWEEN_LINES = 30  # of progress where there is no terminal to draw a bar on


class Format(StrEnum):
    """Picture formats."""

    png = "png"
    jpeg = "jpeg"
    webp = "webp"


class ManifestKind(StrEnum):
    """Manifest formats."""

    jsonl = "jsonl"
    parquet = "parquet"


class OnChange(StrEnum):
    """What to do with a folder that holds another batch."""

    refuse = "refuse"
    extend = "extend"
    overwrite = "overwrite"


class EngineKind(StrEnum):
    """Who runs the workers."""

    local = "local"
    ray = "ray"


def batch(
    rows: Annotated[
        Path, typer.Argument(metavar="ROWS", help="List: .csv, .tsv, .jsonl, .parquet, or .txt of prompts.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if missing.")],
    model: Model = "shapes-sd",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help=f"{RECIPE_HELP} for rows that name none.")] = "balanced",
    seed: Annotated[int, typer.Option(min=0, max=2**53, help="The first row's seed; row i gets seed + i - 1.")] = 0,
    steps: Steps = 25,
    guidance: Guidance = None,
    negative: Negative = "",
    size: Size = None,
    scheduler: Scheduler = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures computed together.")] = 4,
    picture_format: Annotated[Format, typer.Option("--format", help="Format of the pictures.")] = Format.png,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of JPEG and WebP.")] = 95,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write pictures without any text in them.")
    ] = False,
    shards: Annotated[
        int, typer.Option(min=0, help="Write webdataset tar files of so many pictures; 0: single files.")
    ] = 0,
    manifest: Annotated[ManifestKind, typer.Option(help="Format of the list of all pictures.")] = ManifestKind.jsonl,
    contact_sheet: Annotated[bool, typer.Option("--contact-sheet", help="Also draw contact-sheet.png.")] = False,
    on_change: Annotated[
        OnChange, typer.Option(help="If the folder holds another list's batch: refuse, extend (rows added), overwrite.")
    ] = OnChange.refuse,
    ignore_unknown_columns: Annotated[
        bool, typer.Option("--ignore-unknown-columns", help="Leave out columns the pipeline does not know.")
    ] = False,
    max_failures: Annotated[int, typer.Option(min=1, help="Stop after so many failed rows in a row.")] = 5,
    lease: Annotated[
        float, typer.Option(min=1, help="Seconds after which a silent worker's rows are taken over.")
    ] = 60,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print plan and time, write nothing.")
    ] = False,
    engine: Annotated[EngineKind, typer.Option(help="Run here, or on Ray actors.")] = EngineKind.local,
    actors: Annotated[int, typer.Option(min=1, help="Ray: how many actors.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="Ray: GPUs of each actor.")] = 0,
    device: Placement = None,
    dtype: Precision = None,
    variant: Variant = None,
    debug: Debug = False,
) -> None:
    """Make a picture for every row of a list; start the same command again to continue after any interruption."""
    from diffaccel.batch import BatchSettings, plan_batch
    from diffaccel.loading import default_guidance

    with _problems_as_lines(debug):
        settings = BatchSettings(
            recipe=recipe,
            seed=seed,
            steps=steps,
            size=size,
            guidance_scale=default_guidance(model) if guidance is None else guidance,
            negative_prompt=negative,
            batch_size=batch_size,
            format=picture_format.value,
            quality=quality,
            metadata=not no_metadata,
            shards=shards,
            manifest=manifest.value,
            contact_sheet=contact_sheet,
            on_change=on_change.value,
            ignore_unknown_columns=ignore_unknown_columns,
            max_failures=max_failures,
            lease=lease,
        )
        plan = plan_batch(rows, output, settings)
        load = functools.partial(load_model, model, scheduler, device or own_device(), dtype, variant)
        if dry_run:
            _print_plan(plan, load())
            return
        try:
            report = _run(plan, load, Path(model).name, engine, actors, gpus)
        except KeyboardInterrupt:
            typer.echo("Interrupted. What is recorded is kept; the same command makes the rest.", err=True)
            raise typer.Exit(130) from None
    if _is_first():
        _print_report(report)
    raise typer.Exit(report.exit_code)


def load_model(
    model: str, scheduler: str | None, device: str | None, dtype: str | None, variant: str | None = None
) -> Any:
    """The pipeline of the command line, with its own bars switched off. Ray calls this inside its actors."""
    from diffaccel.loading import load_pipeline, set_scheduler

    quiet_libraries()
    pipe = load_pipeline(model, device=device, dtype=dtype, variant=variant)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_device() -> str | None:
    """Under a launcher of several processes, each takes its own GPU; None leaves the usual choice."""
    if "LOCAL_RANK" not in os.environ:
        return None
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ['LOCAL_RANK']) % count}" if count else None


def _is_first() -> bool:
    """Whether this process speaks for all processes of a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def _run(
    plan: BatchPlan, load: Callable[[], Any], model: str, engine: EngineKind, actors: int, gpus: float
) -> BatchReport:
    with _bar(len(plan.rows)) as on_progress:
        if engine is EngineKind.ray:
            from diffaccel.batch.ray_engine import run_on_ray

            os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # the bar here counts pictures, not blocks
            return run_on_ray(plan, load, actors=actors, gpus=gpus, model=model, on_progress=on_progress)
        from diffaccel.batch import run_batch

        pipe = load()
        with _stopped_by_signals() as should_stop:
            return run_batch(plan, pipe, model=model, on_progress=on_progress, should_stop=should_stop)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl+C and SIGTERM end the run after the pictures that are being made; a second Ctrl+C ends it at once.

    A launcher sends SIGTERM after a Ctrl+C that the workers got as well, so SIGTERM alone never interrupts a call.
    """
    asked: list[int] = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)  # first of all: a second signal may interrupt what follows
        if len(asked) == 1 and _is_first():
            os.write(2, b"Stopping after the pictures that are being made; Ctrl+C again ends at once.\n")
        if asked.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]  # nohup's wish stays
    try:
        for number in mine:
            signal.signal(number, stop)
        yield lambda: bool(asked)
    finally:
        for number in mine:
            signal.signal(number, before[number])


@contextlib.contextmanager
def _problems_as_lines(debug: bool) -> Iterator[None]:
    """The problems of a list on stderr, one a line, or of very many one of each kind; other errors are left to the command."""
    from diffaccel.batch import BatchError
    from diffaccel.batch.settings import summary

    try:
        yield
    except BatchError as error:
        if debug or not error.problems:
            raise
        typer.echo(f"Error: {str(error).splitlines()[0]}", err=True)
        for line in summary(error.problems, SHOWN_PROBLEMS):
            typer.echo(f"  {line}", err=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[BatchProgress], None]]:
    """A bar on stderr with pictures per second and the time left; without a terminal, a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from diffaccel.batch.timing import in_words

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    shown = sys.stderr.isatty() and _is_first()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("pictures", total=total, speed="")
        last = time.monotonic()

        def update(progress: BatchProgress) -> None:
            nonlocal last
            failed = f", {progress.failed} failed" if progress.failed else ""
            left = "" if progress.seconds_left is None else f", {in_words(progress.seconds_left)} left"
            speed = f"{progress.pictures_per_second:.2f} pictures/s{left}{failed}"
            bar.update(task, completed=progress.done, speed=speed)
            if not shown and _is_first() and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                typer.echo(f"{progress.done} of {progress.total} pictures, {speed}", err=True)

        yield update


def _print_plan(plan: BatchPlan, pipe: Any) -> None:
    from diffaccel.batch.engine import known_model
    from diffaccel.batch.timing import estimate, in_words

    plan = known_model(plan, pipe)
    found = estimate(plan, pipe)
    table = Table("group", "size", "steps", "guidance", "recipe", "arguments", "pictures", "batches")
    batches = collections.Counter(batch.group for batch in plan.batches)
    for number, group in enumerate(plan.groups[:SHOWN_GROUPS]):
        size = "the model's" if group.size is None else f"{group.size[0]}x{group.size[1]}"
        guidance = "the pipeline's" if group.guidance_scale is None else f"{group.guidance_scale:g}"
        recipe = plan.recipes[group.recipe].name if group.recipe else "none"
        arguments = ", ".join(f"{name}={value}" for name, value in group.extras if value)
        table.add_row(
            str(number + 1),
            size,
            str(group.steps),
            guidance,
            escape(recipe),
            escape(arguments),
            str(len(group.rows)),
            str(batches[number]),
        )
    show(table)
    if len(plan.groups) > SHOWN_GROUPS:
        typer.echo(f"and {len(plan.groups) - SHOWN_GROUPS} more groups, {len(plan.batches)} batches in all")
    _print_files(plan)
    typer.echo(f"folder: {plan.output} ({plan.change}), {plan.kept} of {len(plan.rows)} pictures are there already")
    typer.echo(f"time on one worker: about {in_words(found.seconds)}, estimated from {found.source}")


def _print_files(plan: BatchPlan) -> None:
    paths = list(dict.fromkeys(plan.shard(row) or plan.path(row) for row in plan.rows))
    for path in paths[:SHOWN_FILES]:
        typer.echo(f"file: {path}")
    if len(paths) > SHOWN_FILES:
        typer.echo(f"file: ... {len(paths)} in all, the last is {paths[-1]}")


def _print_report(report: BatchReport) -> None:
    from diffaccel.batch.timing import in_words

    table = Table("pictures", "made now", "there before", "failed", "time", "pictures/s")
    table.add_row(
        f"{report.done} of {report.total}",
        str(report.made),
        str(report.skipped),
        str(report.failed),
        in_words(report.seconds),
        f"{report.pictures_per_second:.2f}",
    )
    show(table)
    for note in report.notes:
        typer.echo(f"note: {note}")
    for failure in report.failures[:SHOWN_FAILURES]:
        typer.echo(f"failed: row {failure.row}: {failure.sentence}")
    if report.failed > SHOWN_FAILURES:
        typer.echo(f"failed: and {report.failed - SHOWN_FAILURES} more; the manifest lists all")
    if report.stopped:
        typer.echo(f"stopped early: {report.stopped}")
    if report.done < report.total:
        missing = report.total - report.done
        words = "1 picture is" if missing == 1 else f"{missing} pictures are"
        typer.echo(f"{words} missing; the same command tries again")
    typer.echo(report.manifest)

"""A list of rows to pictures: the batch of `diffaccel batch`, inside one visitor's folder and within the page's limits."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.batch import BatchError, BatchPlan, BatchProgress, BatchReport, BatchSettings, plan_batch, run_batch
from diffaccel.batch.arguments import arguments_of
from diffaccel.batch.fields import Row
from diffaccel.batch.rows import Limits, TooLarge
from diffaccel.batch.settings import RowProblem
from diffaccel.demo.engine import Engine, PageError, Watch
from diffaccel.demo.markup import notes, table, tiles
from diffaccel.demo.sessions import Session
from diffaccel.loading import default_guidance
from diffaccel.recipes.recipe import Recipe

KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
MOST_STEPS, LARGEST_SIDE = 200, 2048
LIMITS = Limits(rows=500, bytes=4 * 1024 * 1024)
SHOWN = 24


@dataclass(frozen=True)
class Options:
    """What all rows share unless they say otherwise."""

    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    size: tuple[int, int] | None = None
    negative: str = ""
    format: str = "png"
    metadata: bool = True


@dataclass(frozen=True)
class Batched:
    """What came out.

    Attributes:
        rows: the finished rows, in the order of the list.
        pictures: their files.
        archive: all of them with the manifest, zipped; None if there are none.
    """

    report: BatchReport
    rows: tuple[Row, ...]
    pictures: tuple[Path, ...]
    archive: Path | None
    cancelled: bool

    def gallery(self) -> list[tuple[str, str]]:
        """(file, caption) of the last pictures."""
        found = [(str(path), _caption(row)) for row, path in zip(self.rows, self.pictures, strict=True)]
        return found[-SHOWN:]

    def figures(self) -> str:
        """Figures, failed rows and notes as HTML."""
        report = self.report
        shown = tiles(
            [
                (f"{report.done} of {report.total}", "pictures", "row by row as in the list"),
                (f"{report.pictures_per_second:.2f}", "pictures per second", f"{report.seconds:.1f} s in all"),
                (str(report.failed), "failed", "listed below" if report.failed else "nothing went wrong"),
            ]
        )
        rows = [(f"row {failure.row}", failure.sentence) for failure in report.failures[:50]]
        failed = table(("", "why it failed"), rows, "Failed rows", text=True) if rows else ""
        return shown + failed + notes([*report.notes, *([report.stopped] if report.stopped else [])])


def _caption(row: Row) -> str:
    return f"{row.number}: {_short(row.prompt)}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def check(folder: Path, file: str | None, options: Options) -> BatchPlan:
    """Read the list and check every row.

    Args:
        folder: an empty one that gets a copy of the list, so that rows can name no other file.
    Raises:
        PageError: no list, of an unknown kind, too large, or beyond the limits of the page.
        BatchError: all that is wrong with its rows, by row.
    """
    if not file:
        raise PageError("Upload a list first: CSV, JSONL, Parquet, or text with a prompt a line.")
    path = Path(file)
    if path.suffix.lower() not in KINDS:
        raise PageError(f"A list is one of {', '.join(KINDS)}, not {path.suffix or 'a file without extension'}.")
    source = folder / f"list{path.suffix.lower()}"
    shutil.copyfile(path, source)
    settings = BatchSettings(
        seed=options.seed,
        steps=options.steps,
        guidance_scale=options.guidance,
        size=options.size,
        negative_prompt=options.negative,
        format=options.format,
        metadata=options.metadata,
    )
    try:
        return _within_limits(plan_batch(source, folder / "pictures", settings, limits=LIMITS))
    except BatchError as error:
        if error.problems:
            raise
        said = str(error).replace(str(source), "the list")  # where the server keeps it is its own
        more = " This page takes no more; use diffaccel batch for it." if isinstance(error, TooLarge) else ""
        raise PageError(said + more) from error


def _within_limits(plan: BatchPlan) -> BatchPlan:
    for row in plan.rows:
        if row.steps > MOST_STEPS:
            raise PageError(f"Row {row.number}: {row.steps} steps are more than the {MOST_STEPS} of this page.")
        if row.size is not None and max(row.size) > LARGEST_SIDE:
            raise PageError(f"Row {row.number}: a side of {max(row.size)} pixels is longer than {LARGEST_SIDE}.")
    return plan


def run(
    engine: Engine, session: Session, model: str, file: str | None, recipe: Recipe, options: Options, watch: Watch
) -> Batched:
    """Make the pictures of the list. A cancelled batch keeps what it has finished.

    Raises:
        DiffaccelError: the list, the model or the recipe.
    """
    if options.guidance is None:
        guidance = default_guidance(engine.resolve(model))
        options = Options(**{**vars(options), "guidance": guidance})
    plan = check(session.new_folder(), file, options)
    watch.total = len(plan.rows)
    watch.show(0, watch.total, f"loading {Path(model).name}")

    def on_progress(progress: BatchProgress) -> None:
        left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
        text = f"{progress.pictures_per_second:.2f} pictures per second{left}"
        watch.show(progress.done + progress.failed, progress.total, text)

    with engine.pipeline(model):
        watch.check()
        fast = engine.wrapped(session.with_edit(recipe), str(session.folder))
        name = Path(model).name
        report = run_batch(plan, fast, on_progress=on_progress, should_stop=watch.cancel.is_set, model=name)
    rows = tuple(row for row in plan.rows if plan.path(row).is_file())
    pictures = tuple(map(plan.path, rows))
    return Batched(report, rows, pictures, _archive(plan.output, pictures, report), watch.cancel.is_set())


def _archive(output: Path, pictures: tuple[Path, ...], report: BatchReport) -> Path | None:
    """Everything in one file. Pictures are compressed already, so they are only stored."""
    if not pictures:
        return None
    path = output.with_suffix(".zip")
    extra = [report.manifest] if report.manifest is not None and report.manifest.is_file() else []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for item in (*pictures, *extra):
            archive.write(item, item.name)
    return path


def preview(plan: BatchPlan, pipeline: type | None) -> str:
    """The first rows as they will be drawn.

    Args:
        pipeline: what draws them; None if its class is not known.
    Raises:
        BatchError: a column that is none of a batch and no argument of the pipeline.
    """
    further = {name for row in plan.rows for name, _ in row.extras}
    unsure = sorted(further) if pipeline is None else []
    unknown = [] if pipeline is None else sorted(further - arguments_of(pipeline))
    if unknown:
        said = f"is no column of a batch and no call argument of {getattr(pipeline, '__name__', pipeline)}."
        raise BatchError.of([RowProblem(0, f"The column {name!r} {said}") for name in unknown])
    header = ("row", "prompt", "seed", "steps", "size", "file")
    rows: list[Any] = [
        (
            str(row.number),
            _short(row.prompt),
            str(row.seed),
            str(row.steps),
            "model's own" if row.size is None else f"{row.size[0]} x {row.size[1]}",
            plan.path(row).name,
        )
        for row in plan.rows[:8]
    ]
    count = len(plan.rows)
    valid = "1 row, valid" if count == 1 else f"{count} rows, all valid"
    if unsure:
        valid = f"{count} rows; whether the pipeline takes {', '.join(unsure)} is not known before it is loaded"
    more = f"; the first {len(rows)} of them" if count > len(rows) else ""
    return table(header, rows, valid + more, text=True)

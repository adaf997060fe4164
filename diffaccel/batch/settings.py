"""What a batch is asked for and what it answers: settings, progress, report, errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from diffaccel.errors import DiffaccelError
from diffaccel.recipes.recipe import Recipe
from diffaccel.recipes.resolve import resolve_recipe

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class RowProblem:
    """One thing wrong with the list.

    Attributes:
        row: 1 for the first row of data; 0 for the list as a whole (its columns, its file).
        sentence: what is wrong and what to change.
    """

    row: int
    sentence: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.sentence}" if self.row else self.sentence


class BatchError(DiffaccelError):
    """A batch that cannot start or go on.

    Attributes:
        problems: all problems found in the list, in the order of its rows; empty if the reason is another.
    """

    def __init__(self, message: str, problems: Sequence[RowProblem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Sequence[RowProblem]) -> BatchError:
        """One error for all problems of a list."""
        ordered = sorted(problems, key=lambda problem: problem.row)
        noun = "problem" if len(ordered) == 1 else "problems"
        said = f"{len(ordered)} {noun} in the list, nothing was generated:"
        return cls("\n".join([said, *summary(ordered, SHOWN_PROBLEMS)]), ordered)


def summary(problems: Sequence[RowProblem], most: int) -> list[str]:
    """One line a problem, or if there are more than so many, one for each kind: the first of it, and how many there are."""
    if len(problems) <= most:
        return [str(problem) for problem in problems]
    kinds: dict[str, list[RowProblem]] = {}
    for problem in problems:
        kinds.setdefault(_kind(problem.sentence), []).append(problem)
    lines = [_all_of(found) for found in list(kinds.values())[:most]]
    if len(kinds) > most:
        lines.append(f"and {sum(map(len, list(kinds.values())[most:]))} more of {len(kinds) - most} other kinds")
    return lines


def _kind(sentence: str) -> str:
    """A problem without the values that it names."""
    return re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|-?\d[\d.e+-]*", "…", sentence)


def _all_of(found: Sequence[RowProblem]) -> str:
    if len(found) == 1:
        return str(found[0])
    return f"{found[0]} And so in {len(found) - 1} more, the last is row {found[-1].row}."


class BatchSettings(BaseModel):
    """What all rows share. A row's own columns come first; None leaves the pipeline's own default.

    Attributes:
        recipe: preset name, recipe file, methods or `Recipe`; None: the recipe of the wrapped pipeline, or none at all.
        seed: row i (counted from 0) gets `seed + i` unless it names its own.
        steps: denoising steps.
        size: width and height in pixels.
        guidance_scale: guidance scale.
        negative_prompt: what not to draw.
        batch_size: pictures computed together; no picture depends on it (on a GPU: up to rounding).
        format: file format of the pictures; `quality` is that of JPEG and WebP.
        metadata: whether pictures say how they were made.
        shards: pictures per webdataset tar file; 0 writes single files.
        manifest: format of the list of all pictures.
        contact_sheet: also write `contact-sheet.png`, a sheet of the first 100 pictures.
        on_change: what to do if the folder holds a batch of another list or other settings: "refuse"; "extend" if only rows
            were added at the end; "overwrite" keeps pictures of unchanged rows and replaces or removes the others.
        ignore_unknown_columns: leave out columns that are neither ours nor call arguments of the pipeline.
        max_failures: stop after so many failed rows in a row.
        lease: seconds without a sign of life after which another worker's rows are taken over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    recipe: Any = None
    seed: int = Field(default=0, ge=0, le=2**53)
    steps: int = Field(default=25, ge=1, le=10_000)
    size: tuple[int, int] | None = None
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    negative_prompt: str = ""
    batch_size: int = Field(default=4, ge=1)
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = Field(default=95, ge=1, le=100)
    metadata: bool = True
    shards: int = Field(default=0, ge=0)
    manifest: Literal["jsonl", "parquet"] = "jsonl"
    contact_sheet: bool = False
    on_change: Literal["refuse", "extend", "overwrite"] = "refuse"
    ignore_unknown_columns: bool = False
    max_failures: int = Field(default=5, ge=1)
    lease: float = Field(default=60.0, gt=0, le=86_400 * 30)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "settings"
            raise BatchError(
                f"{where}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})."
            ) from error

    @field_validator("recipe")
    @classmethod
    def _resolve(cls, recipe: Any) -> Recipe | None:
        return None if recipe is None else resolve_recipe(recipe)


@dataclass(frozen=True)
class BatchProgress:
    """Where a batch stands. Rows done by earlier runs and by other workers count as done.

    Attributes:
        pictures_per_second: of this run, all workers together; 0.0 before the first picture.
        seconds_left: at that speed; None before the first picture.
        last_path: the file finished last by this worker; it is complete. None with shards.
    """

    done: int
    failed: int
    total: int
    pictures_per_second: float
    seconds_left: float | None
    last_path: Path | None


@dataclass(frozen=True)
class BatchFailure:
    """A row that could not be made; `row` is 1 for the first."""

    row: int
    sentence: str


@dataclass(frozen=True)
class BatchReport:
    """What a run did.

    Attributes:
        total: rows of the list.
        done: rows whose picture is there, whoever made it.
        made: pictures made by this worker in this run.
        skipped: rows that were done before this run started.
        failed: rows that failed in this run.
        failures: those rows with the reason, in the order of the list.
        seconds: wall time of this run.
        pictures_per_second: `made` over `seconds`.
        notes: sentences worth reading: smaller batches after out-of-memory, rows taken over, columns left out.
        stopped: why the run ended early; empty if it did not.
        manifest: the manifest's path.
    """

    total: int
    done: int
    made: int
    skipped: int
    failed: int
    failures: tuple[BatchFailure, ...]
    seconds: float
    pictures_per_second: float
    notes: tuple[str, ...] = ()
    stopped: str = ""
    manifest: Path | None = None

    @property
    def exit_code(self) -> int:
        """0 only if every row of the list is done."""
        return 0 if self.done == self.total else 1

"""A checked list: groups of equal calls, batches, and where its files go."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from diffaccel.batch.fields import KEY_LENGTH, Row, is_prompt
from diffaccel.batch.settings import BatchSettings, RowProblem
from diffaccel.batch.state import Store
from diffaccel.recipes.recipe import Recipe

Change = Literal["new", "same", "extend", "overwrite"]
EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True)
class Group:
    """Rows that one call of the pipeline can make together: equal size, steps, guidance, recipe and arguments.

    Attributes:
        negative: whether its rows have negative prompts.
        rows: indices, in the order of the list.
    """

    size: tuple[int, int] | None
    steps: int
    guidance_scale: float | None
    recipe: str
    negative: bool
    extras: tuple[tuple[str, str], ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Rows computed together, and the unit of work that workers claim."""

    group: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class BatchPlan:
    """A checked list and where its pictures go. Planning writes nothing.

    Attributes:
        recipes: recipes of the rows by `Row.recipe`.
        output: the folder of the results.
        change: "new" folder, "same" batch as before, or how the folder's batch will be changed.
        kept: how many rows the folder already holds complete, as far as can be said without the model.
        undecided: wrong values by column, of columns that are ignored unless the pipeline turns out to know them.
    """

    rows: tuple[Row, ...]
    recipes: Mapping[str, Recipe]
    settings: BatchSettings
    output: Path
    change: Change
    kept: int = 0
    undecided: tuple[tuple[str, RowProblem], ...] = ()

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups in the order in which the list first needs them."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for row in self.rows:
            extras = tuple((name, "" if is_prompt(name) else value) for name, value in row.extras)
            call = (row.size, row.steps, row.guidance_scale, row.recipe, bool(row.negative_prompt), extras)
            found.setdefault(call, []).append(row.index)
        names = [field.name for field in fields(Group) if field.name != "rows"]
        return tuple(Group(**dict(zip(names, call, strict=True)), rows=tuple(rows)) for call, rows in found.items())

    @functools.cached_property
    def batches(self) -> tuple[Batch, ...]:
        """All groups cut into batches. The cut depends on the list and the batch size alone."""
        size = self.settings.batch_size
        return tuple(
            Batch(number, group.rows[start : start + size])
            for number, group in enumerate(self.groups)
            for start in range(0, len(group.rows), size)
        )

    def without(self, columns: Collection[str]) -> BatchPlan:
        """The plan without these further call arguments; rows keep their keys."""
        rows = tuple(
            replace(row, extras=tuple(extra for extra in row.extras if extra[0] not in columns)) for row in self.rows
        )
        return replace(self, rows=rows, undecided=tuple(item for item in self.undecided if item[0] not in columns))

    def path(self, row: Row) -> Path:
        """Where the row's picture goes; with shards, where it waits for its shard."""
        folder = Store(self.output).staging if self.settings.shards else self.output
        return folder / f"{row.name}{EXTENSIONS[self.settings.format]}"

    def shard(self, row: Row) -> Path | None:
        """The tar file of the row; None without shards."""
        if not self.settings.shards:
            return None
        return self.output / f"shard-{row.index // self.settings.shards:06d}.tar"

    @property
    def manifest(self) -> Path:
        """Where the list of all pictures goes."""
        return self.output / f"manifest.{self.settings.manifest}"

    @property
    def contact_sheet(self) -> Path:
        """Where the sheet of small pictures goes."""
        return self.output / "contact-sheet.png"

    @property
    def layout(self) -> dict[str, Any]:
        """What must stay the same while a folder is filled, besides the rows."""
        return {"format": self.settings.format, "shards": self.settings.shards}

    def digest(self, pipeline: str) -> str:
        """Names this division of the work: workers with the same digest can share it."""
        text = json.dumps([[row.key for row in self.rows], self.settings.batch_size, pipeline])
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def record_key(row: Row, pipeline: str) -> str:
    """Under which a finished row is remembered: the row, its position and the model that made it."""
    return hashlib.sha256(f"{row.key}/{row.index}/{pipeline}".encode()).hexdigest()[:KEY_LENGTH]

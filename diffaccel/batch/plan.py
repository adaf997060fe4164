"""From a list to a plan: every row checked, groups of equal calls, and what the output folder already holds."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from diffaccel.batch.fields import KEY_LENGTH, Row, is_prompt, parse_rows
from diffaccel.batch.names import folded
from diffaccel.batch.rows import Limits, read_rows
from diffaccel.batch.settings import BatchError, BatchSettings, RowProblem
from diffaccel.batch.shelf import Shelf
from diffaccel.batch.state import HOME, Ledger, Saved, Store
from diffaccel.recipe import Recipe

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
    """

    rows: tuple[Row, ...]
    recipes: Mapping[str, Recipe]
    settings: BatchSettings
    output: Path
    change: Change
    kept: int = 0

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


def plan_batch(
    source: Path | str | Sequence[Mapping[str, Any]],
    output: Path | str,
    settings: BatchSettings | None = None,
    *,
    limits: Limits | None = None,
) -> BatchPlan:
    """Check all rows and the output folder. Writes nothing.

    Args:
        source: a .csv, .tsv, .jsonl, .ndjson, .parquet or .txt file, or rows as dictionaries.
        output: the folder of the results; it need not exist.
        limits: how large a file may be; a list from a stranger needs some.
    Raises:
        BatchError: with `problems` for everything wrong with the list, or with the reason why this folder cannot take it.
            Whether the pipeline takes a size or a call argument is known to `run_batch` only, which says so before the
            first picture.
    """
    settings = settings or BatchSettings()
    raw, problems = read_rows(source, limits)
    folder = Path(source).parent if isinstance(source, (str, Path)) else None
    rows, recipes, more = parse_rows(raw, settings, folder, {problem.row for problem in problems})
    if problems or more:
        raise BatchError.of([*problems, *more])
    plan = BatchPlan(tuple(rows), recipes, settings, Path(output), "new")
    try:
        if isinstance(source, (str, Path)) and plan.manifest.exists() and plan.manifest.samefile(source):
            raise BatchError(
                f"{source} is the list itself and would be replaced by the manifest; choose another folder."
            )
        return _against_folder(plan)
    except OSError as error:
        raise BatchError(f"{output} cannot be the output folder: {(error.strerror or str(error)).lower()}.") from error


def _against_folder(plan: BatchPlan) -> BatchPlan:
    """The plan with what it means for the folder as it is."""
    store = Store(plan.output)
    _refuse_unusable(plan.output)
    saved = store.saved()
    if saved is None:
        _refuse_foreign(plan)
        return plan
    change = find_change(plan, saved)
    index, shelf = {record_key(row, saved.pipeline): row.index for row in plan.rows}, Shelf(plan)
    done = [record for record in Ledger(store.journals).refresh() if record.get("status") == "done"]
    known = [(index[record["key"]], record) for record in done if record["key"] in index]
    return replace(plan, change=change, kept=len({row for row, record in known if shelf.holds(row, record)}))


def _refuse_unusable(output: Path) -> None:
    for folder in (output, *output.parents):
        if folder.exists():
            if not folder.is_dir():
                raise BatchError(f"{folder} is a file; the results need a folder.")
            return


def _refuse_foreign(plan: BatchPlan) -> None:
    """A new batch replaces no file that is there already."""
    if plan.settings.on_change == "overwrite" or not plan.output.is_dir():
        return
    there = {folded(path.name) for path in plan.output.iterdir() if path.name != HOME}
    wanted = [(row.number, plan.shard(row) or plan.path(row)) for row in plan.rows] + [(0, plan.manifest)]
    if plan.settings.contact_sheet:
        wanted.append((0, plan.contact_sheet))
    problems = [RowProblem(number, f"{path} exists already.") for number, path in wanted if folded(path.name) in there]
    if problems:
        raise BatchError.of(problems)


def find_change(plan: BatchPlan, saved: Saved) -> Change:
    """How the plan differs from the batch in the folder.

    Raises:
        BatchError: it differs in a way that `on_change` does not allow.
    """
    old, new = saved.rows, tuple(row.key for row in plan.rows)
    same_layout = dict(saved.layout) == plan.layout
    if same_layout and old == new:
        return "same"
    if plan.settings.on_change == "overwrite":
        return "overwrite"
    grown = same_layout and new[: len(old)] == old
    if grown and plan.settings.on_change == "extend":
        return "extend"
    raise BatchError(_difference(plan, saved, grown=grown))


def _difference(plan: BatchPlan, saved: Saved, *, grown: bool) -> str:
    new, old = [row.key for row in plan.rows], saved.rows
    hint = "choose another output folder, or let the change replace pictures (--on-change overwrite)"
    if dict(saved.layout) != plan.layout:
        return f"{plan.output} holds a batch stored as {_stored(saved.layout)}, not as {_stored(plan.layout)}; {hint}."
    if grown:
        return (
            f"The list has {_rows(len(new) - len(old))} more than the batch in {plan.output}; to add them, say so "
            "(--on-change extend)."
        )
    changed = [number for number, (a, b) in enumerate(zip(old, new, strict=False), 1) if a != b]
    if not changed:
        return f"The list has {_rows(len(old) - len(new))} fewer than the batch in {plan.output}; {hint}."
    return (
        f"The list or its settings have changed since the batch in {plan.output} was made: {len(changed)} of {len(old)} "
        f"rows differ, the first is row {changed[0]}; {hint}."
    )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _stored(layout: Mapping[str, Any]) -> str:
    shards = layout.get("shards")
    return f"{layout.get('format')} {f'in shards of {shards}' if shards else 'files'}"

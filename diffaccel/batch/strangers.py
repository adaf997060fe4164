"""Files in the output folder that the batch did not make: none of them is replaced unless the user says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffaccel.batch.names import folded
from diffaccel.batch.plan import BatchPlan
from diffaccel.batch.settings import BatchError, RowProblem
from diffaccel.batch.shards import members_in
from diffaccel.batch.state import HOME, Saved, Store


def refuse_strangers(plan: BatchPlan, saved: Saved | None) -> None:
    """Raise `BatchError` if the plan would replace a file that the folder's batch did not make.

    The files of rows belong to the batch from when it was accepted, so only those of added rows are looked for.

    Args:
        saved: the batch in the folder; None: there is none.
    """
    if plan.settings.on_change == "overwrite" or not plan.output.is_dir():
        return
    problems = [*_rows(plan, 0 if saved is None else len(saved.rows)), *_summaries(plan), *_shards(plan)]
    if problems:
        raise BatchError.of(problems)


def _rows(plan: BatchPlan, known: int) -> Iterator[RowProblem]:
    there = {folded(path.name) for path in plan.output.iterdir() if path.name != HOME}
    old = {plan.shard(row) for row in plan.rows[:known]}
    for row in plan.rows[known:]:
        path = plan.shard(row) or plan.path(row)
        if folded(path.name) in there and path not in old:
            yield RowProblem(row.number, f"{path} exists already.")


def _summaries(plan: BatchPlan) -> Iterator[RowProblem]:
    """Manifest and contact sheet, under whatever case of letters they are there."""
    there = {folded(path.name): path for path in plan.output.iterdir()}
    store = Store(plan.output)
    for path in (plan.manifest, *([plan.contact_sheet] if plan.settings.contact_sheet else [])):
        found = there.get(folded(path.name))
        if found is not None and not store.has_written(found):
            yield RowProblem(0, f"{found} exists already, and this batch did not write it as it is.")


def _shards(plan: BatchPlan) -> Iterator[RowProblem]:
    for path in dict.fromkeys(shard for row in plan.rows if (shard := plan.shard(row)) is not None):
        if foreign := foreign_members(plan, path):
            yield RowProblem(0, f"{path} holds {foreign[0]!r}, which this batch did not put there.")


def foreign_members(plan: BatchPlan, shard: Path) -> list[str]:
    """Names in a shard that none of its rows has; empty if there is no such file.

    Raises:
        BatchError: it is no readable shard.
    """
    if not shard.exists():
        return []
    mine = {row.name for row in plan.rows if plan.shard(row) == shard}
    suffix = plan.path(plan.rows[0]).suffix
    expected = {f"{name}{end}" for name in mine for end in (suffix, ".txt", ".json")}
    return sorted(members_in(shard) - expected)

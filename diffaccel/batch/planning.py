"""A list and a folder to a plan: every row checked, and what the output folder already holds. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel.batch.fields import parse_rows
from diffaccel.batch.plan import BatchPlan, Change, record_key
from diffaccel.batch.rows import Limits, read_rows
from diffaccel.batch.settings import BatchError, BatchSettings
from diffaccel.batch.shelf import Shelf
from diffaccel.batch.state import Ledger, Saved, Store
from diffaccel.batch.strangers import refuse_strangers


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
    parsed = parse_rows(raw, settings, folder, {problem.row for problem in problems})
    if problems or parsed.problems:
        raise BatchError.of([*problems, *parsed.problems])
    plan = BatchPlan(
        tuple(parsed.rows), parsed.recipes, settings, Path(output), "new", undecided=tuple(parsed.undecided)
    )
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
    change: Change = "new" if saved is None else find_change(plan, saved)
    refuse_strangers(plan, saved)
    if saved is None:
        return plan
    index, shelf = {record_key(row, saved.pipeline): row.index for row in plan.rows}, Shelf(plan)
    done = [record for record in Ledger(store.journals).refresh() if record.get("status") == "done"]
    known = [(index[record["key"]], record) for record in done if record["key"] in index]
    return replace(plan, change=change, kept=len({row for row, record in known if shelf.holds(row, record)}))


def _refuse_unusable(output: Path) -> None:
    for folder in (output, *output.parents):
        if folder.exists():
            if not folder.is_dir():
                raise BatchError(f"{folder} is a file; the results need a folder.")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise BatchError(f"{output} cannot be the output folder: {folder} is read-only.")
            return


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

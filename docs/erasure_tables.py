"""The computed table of the erasure guide: what each method erased and spared, by kind of task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tables import RESULTS, table

from benchmarks.erasure_table import MOST_ERASED, MOST_LOST, MOST_WORST, attack_after, name

Row = dict[str, Any]
KINDS = {"shapes": "one shape", "colours": "one colour", "textures": "one texture"}
ORDER = [*KINDS.values(), "2 at once", "4 at once"]
HEADER = (
    "Task",
    "Method",
    "Edits",
    "Still recognised, mean (most)",
    "Kept classes, mean change",
    "Worst kept class, mean (worst)",
    "All three targets",
    "After the closed-form attack",
)


def erasure(subject: str) -> str:
    """Means over the edits of a kind; one row per method and kind."""
    rows = [row for row in json.loads((RESULTS / "erasure.json").read_text())["rows"] if row["subject"] == subject]
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((KINDS.get(row["group"], row["group"]), name(row)), []).append(row)
    methods = [name(row) for row in rows]
    ranked = sorted(kinds, key=lambda kind: (ORDER.index(kind[0]), "(" in kind[1], methods.index(kind[1])))
    cells = [(kind, f"`{method}`", *_cells(kinds[kind, method])) for kind, method in ranked]
    shown = len(HEADER) if any(row[-1] for row in cells) else -1  # the last column is empty where nothing was attacked
    return table(HEADER[:shown], [row[:shown] for row in cells])


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    erased = [100 * row["erased"]["mean"] for row in rows]
    worst = [100 * row["worst"]["change"]["mean"] for row in rows]
    attacked = [after for row in rows if (after := attack_after(row, "closed_form")) is not None]
    return (
        str(len(rows)),
        f"{_mean(erased):.1f} % ({max(erased):.1f} %)",
        f"{_mean([100 * row['kept_change'] for row in rows]):+.1f}",
        f"{_mean(worst):+.0f} ({min(worst):+.0f})",
        f"{sum(map(_met, rows))} of {len(rows)}",
        f"{100 * _mean(attacked):.0f} %" if attacked else "",
    )


def _met(row: Row) -> bool:
    return (
        100 * row["erased"]["mean"] <= MOST_ERASED
        and 100 * row["kept_change"] >= -MOST_LOST
        and 100 * row["worst"]["change"]["mean"] >= -MOST_WORST
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

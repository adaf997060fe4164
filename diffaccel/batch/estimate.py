"""How long a plan will take: from pictures of the same kind that are there already, or from a timed step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.batch.calls import Caller
from diffaccel.batch.fields import Row
from diffaccel.batch.plan import BatchPlan, Group
from diffaccel.batch.state import Ledger, Store

TIMED_STEPS = (1, 3)
RECENT = 200  # pictures of the last run that count


@dataclass(frozen=True)
class Estimate:
    """Time for the rows that are left, on one worker.

    Attributes:
        seconds: of all groups.
        source: where the figure is from, as the end of "estimated from ...".
    """

    seconds: float
    source: str


def estimate(plan: BatchPlan, fast_or_pipe: Any, *, model: str = "") -> Estimate:
    """Estimate the time for the rows that are not done.

    The folder's own journals are asked first. If they do not know every size and number of steps of the plan, each kind of
    call is timed with 1 and 3 steps, without a recipe: an upper bound for rows with one.

    Raises:
        BatchError: rows this pipeline cannot take.
    """
    caller = Caller(plan, fast_or_pipe, model)
    caller.check()
    left = 1 - plan.kept / len(plan.rows)
    records = [record for record in Ledger(Store(plan.output).journals).refresh() if record.get("status") == "done"]
    per_row = _from_records(plan, records)
    if per_row is not None:
        seconds = sum(value * len(group.rows) for value, group in zip(per_row, plan.groups, strict=True))
        return Estimate(left * seconds, "the pictures that the last run made here")
    timing = _Timing(caller, plan)
    seconds = sum(timing.seconds(group) for group in plan.groups)
    return Estimate(left * seconds, "timed steps without a recipe; with one it takes less")


def _from_records(plan: BatchPlan, records: Sequence[dict[str, Any]]) -> list[float] | None:
    """Seconds per picture of each group; None if a kind of picture was never made here."""
    found = []
    for group in plan.groups:
        recipe = plan.recipes[group.recipe].name if group.recipe else None
        seconds = [
            float(record["seconds"])
            for record in records
            if record["steps"] == group.steps
            and (group.size is None or (record["width"], record["height"]) == group.size)
            and recipe in (None, record["recipe"]["name"])
        ]
        if not seconds:
            return None
        found.append(statistics.fmean(seconds[-RECENT:]))
    return found


class _Timing:
    """Times of calls by kind: a line through the times of a short and a longer call."""

    def __init__(self, caller: Caller, plan: BatchPlan) -> None:
        self.caller, self.plan = caller, plan
        self._lines: dict[tuple[Any, ...], tuple[float, float]] = {}

    def seconds(self, group: Group) -> float:
        """Of all rows of a group."""
        together = min(len(group.rows), self.plan.settings.batch_size)
        kind = (group.size, together, group.guidance_scale, group.negative, group.extras)
        if kind not in self._lines:
            self._lines[kind] = self._measure([self.plan.rows[index] for index in group.rows[:together]])
        start, per_step = self._lines[kind]
        return (start + per_step * group.steps) * len(group.rows) / together

    def _measure(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Seconds of a call beside its steps, and of a step."""
        short, longer = TIMED_STEPS
        self._timed(rows, short)  # the first call of a kind also warms up
        first, second = self._timed(rows, short), self._timed(rows, longer)
        per_step = max(0.0, second - first) / (longer - short)
        return max(0.0, first - per_step * short), per_step

    def _timed(self, rows: Sequence[Row], steps: int) -> float:
        arguments = self.caller.arguments(rows) | {"num_inference_steps": steps}
        started = time.perf_counter()
        self.caller.pipe(**arguments)
        return time.perf_counter() - started


def in_words(seconds: float) -> str:
    """A duration as people say it."""
    units: tuple[tuple[float, str], ...] = ((86_400, "days"), (3_600, "hours"), (60, "minutes"))
    for length, name in units:
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"

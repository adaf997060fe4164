"""How long a plan will take: from pictures of the same kind that are there already, or from a timed step."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffaccel.batch.calls import Caller
from diffaccel.batch.fields import Row
from diffaccel.batch.generating import free_memory, out_of_memory, sentence
from diffaccel.batch.plan import BatchPlan, Group
from diffaccel.batch.settings import BatchError, RowProblem
from diffaccel.batch.state import Ledger, Store
from diffaccel.generate import FEW_STEPS, can_do_steps

MORE_STEPS = 2  # of the longer call: with 1 step, or the fewest that the scheduler can do, and so many more
MOST_SIZES = 5  # timed; others by their pixels
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
        BatchError: rows this pipeline cannot take, or a timed call that fails.
    """
    caller = Caller(plan, fast_or_pipe, model)
    caller.check()
    plan = caller.plan
    left = 1 - plan.kept / len(plan.rows)
    records = [record for record in Ledger(Store(plan.output).journals).refresh() if record.get("status") == "done"]
    per_row = _from_records(plan, records)
    if per_row is not None:
        seconds = sum(value * len(group.rows) for value, group in zip(per_row, plan.groups, strict=True))
        return Estimate(left * seconds, "the pictures that the last run made here")
    timing = _Timing(caller, plan)
    seconds = sum(timing.seconds(group) for group in plan.groups)
    part = f", of {MOST_SIZES} of its {len(timing.sizes)} sizes" if len(timing.sizes) > MOST_SIZES else ""
    return Estimate(left * seconds, f"timed steps without a recipe{part}; with one it takes less")


def _from_records(plan: BatchPlan, records: Sequence[dict[str, Any]]) -> list[float] | None:
    """Seconds per picture of each group; None if a kind of picture was never made here."""
    known: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        size, recipe = (record["width"], record["height"]), record["recipe"]["name"]
        for kind in itertools.product((record["steps"],), (size, None), (recipe, None)):  # None stands for any
            known.setdefault(kind, []).append(float(record["seconds"]))
    means = {kind: statistics.fmean(seconds[-RECENT:]) for kind, seconds in known.items()}
    names = {key: recipe.name for key, recipe in plan.recipes.items()}
    found = [means.get((group.steps, group.size, names.get(group.recipe))) for group in plan.groups]
    return None if None in found else [seconds for seconds in found if seconds is not None]


class _Timing:
    """Times of calls by kind: a line through the times of a short and a longer call.

    Values of guidance and of further arguments make no other kind, and of many sizes only some are timed: a list in which
    every row differs would otherwise take as long to estimate as to make.
    """

    def __init__(self, caller: Caller, plan: BatchPlan) -> None:
        self.caller, self.plan = caller, plan
        self.sizes = sorted({group.size for group in plan.groups if group.size is not None}, key=_pixels)
        self._timed_sizes = [self.sizes[at] for at in _spread(len(self.sizes))]
        self._groups: dict[tuple[Any, ...], Group] = {}  # the one of each kind that fills a batch best
        for group in plan.groups:
            kind = self._kind(group)
            if kind not in self._groups or self._together(kind, group) > self._together(kind, self._groups[kind]):
                self._groups[kind] = group
        self._lines: dict[tuple[Any, ...], tuple[float, float]] = {}

    def seconds(self, group: Group) -> float:
        """Of all rows of a group."""
        kind = self._kind(group)
        if kind not in self._lines:
            self._lines[kind] = self._measure(self._groups[kind], kind[0])
        start, per_step = self._lines[kind]
        scale = 1.0 if group.size is None else _pixels(group.size) / _pixels(kind[0])
        return scale * (start + per_step * group.steps) * len(group.rows)

    def _kind(self, group: Group) -> tuple[Any, ...]:
        size = group.size
        if size is not None:
            size = min(self._timed_sizes, key=lambda timed: abs(math.log(_pixels(timed) / _pixels(group.size))))
        guided = group.guidance_scale is None or group.guidance_scale > 1
        return size, guided, group.negative, tuple(name for name, _ in group.extras)

    def _together(self, kind: tuple[Any, ...], group: Group) -> tuple[bool, int]:
        return group.size == kind[0], min(len(group.rows), self.plan.settings.batch_size)

    def _measure(self, group: Group, size: tuple[int, int] | None) -> tuple[float, float]:
        """Seconds per picture of a call beside its steps, and of a step."""
        rows = [replace(self.plan.rows[index], size=size) for index in group.rows[: self.plan.settings.batch_size]]
        while True:
            try:
                return self._line(rows)
            except Exception as error:
                if not out_of_memory(error) or len(rows) == 1:
                    number, reason = rows[0].number, sentence(error).rstrip(".")
                    raise BatchError.of([RowProblem(number, f"a trial call fails: {reason}.")]) from error
                free_memory()
                rows = rows[: len(rows) // 2]

    def _line(self, rows: Sequence[Row]) -> tuple[float, float]:
        short = next((steps for steps in range(1, FEW_STEPS) if can_do_steps(self.caller.pipe, steps)), 1)
        self._timed(rows, short)  # the first call of a kind also warms up
        first, second = self._timed(rows, short), self._timed(rows, short + MORE_STEPS)
        per_step = max(0.0, second - first) / MORE_STEPS
        return max(0.0, first - per_step * short) / len(rows), per_step / len(rows)

    def _timed(self, rows: Sequence[Row], steps: int) -> float:
        arguments = self.caller.arguments(rows) | {"num_inference_steps": steps}
        started = time.perf_counter()
        self.caller.pipe(**arguments)
        return time.perf_counter() - started


def _pixels(size: tuple[int, int] | None) -> int:
    return 1 if size is None else size[0] * size[1]


def _spread(count: int) -> list[int]:
    """At most `MOST_SIZES` of so many places, both ends among them."""
    if count <= MOST_SIZES:
        return list(range(count))
    return [round(place * (count - 1) / (MOST_SIZES - 1)) for place in range(MOST_SIZES)]


def in_words(seconds: float) -> str:
    """A duration as people say it."""
    units: tuple[tuple[float, str], ...] = ((86_400, "days"), (3_600, "hours"), (60, "minutes"))
    for length, name in units:
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"

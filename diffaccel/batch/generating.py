"""One batch of rows to pictures: smaller after out-of-memory, one by one after an error, failures with their reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffaccel.batch.calls import Caller
from diffaccel.batch.fields import Row
from diffaccel.batch.settings import BatchFailure
from diffaccel.engine.report import Report
from diffaccel.errors import DiffaccelError

log = logging.getLogger("diffaccel.batch")


@dataclass(frozen=True)
class Result:
    """Outcome of one call: its pictures and report, or the reason why its single row failed."""

    rows: Sequence[Row]
    images: Sequence[Any] = ()
    report: Report | None = None
    failure: BatchFailure | None = None


@dataclass
class Generator:
    """Calls the pipeline; remembers how many pictures of a group fit into memory.

    Attributes:
        limits: pictures together that fitted, by group, where a group ran out of memory.
        notes: a sentence for each time the size went down.
    """

    caller: Caller
    limits: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def generate(self, rows: Sequence[Row], group: int, should_stop: Callable[[], bool]) -> Iterator[Result]:
        """Results of rows of one group, in order; ends early if asked to stop between two calls."""
        waiting = list(rows)
        alone = 0  # how many of the next rows go one by one, because together they failed
        while waiting and not should_stop():
            size = 1 if alone else min(len(waiting), self.limits.get(group, len(waiting)))
            part = waiting[:size]
            try:
                images, report = self.caller.call(part)
            except Exception as error:  # noqa: BLE001  (whatever a row does to a pipeline is that row's failure)
                if out_of_memory(error):
                    free_memory()
                    if size > 1:
                        self._shrink(group, part)
                        continue
                if size > 1:
                    alone = size
                    continue
                yield Result(part, failure=BatchFailure(part[0].number, sentence(error)))
            else:
                yield Result(part, images, report)
            waiting = waiting[size:]
            alone = max(0, alone - 1)

    def _shrink(self, group: int, part: Sequence[Row]) -> None:
        self.limits[group] = len(part) // 2
        width, height = part[0].size or (None, None)
        of = f" of {width}x{height}" if width else ""
        note = f"Out of memory with {len(part)} pictures{of} together; {len(part) // 2} from here on."
        self.notes.append(note)
        log.warning(note)


def out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may do what this one could not."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or bool(should_reduce_batch_size(error))


def free_memory() -> None:
    """Let go of what the failed call has left on the device."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def sentence(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if isinstance(error, DiffaccelError) else f"{type(error).__name__}: {lines[0]}"

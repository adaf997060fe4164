"""Which rows are settled, whoever settled them, and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffaccel.batch.claims import Member
from diffaccel.batch.plan import BatchPlan, record_key
from diffaccel.batch.settings import BatchFailure, BatchProgress
from diffaccel.batch.shelf import Shelf
from diffaccel.batch.state import Ledger, Store

REFRESH_SECONDS = 2.0


class Tally:
    """Done and failed rows of a plan, from the journals of all workers.

    Attributes:
        done: record of each finished row whose picture is there, by index.
        made: pictures this worker made.
        skipped: rows done before this worker started.
    Args:
        old_failures: count failures of ended runs as well.
    """

    def __init__(
        self, plan: BatchPlan, store: Store, member: Member, pipeline: str, *, old_failures: bool = False
    ) -> None:
        self.plan, self.member, self._old_failures = plan, member, old_failures
        self.done: dict[int, dict[str, Any]] = {}
        self.made = 0
        self.last_path: Path | None = None
        self._index = {record_key(row, pipeline): row.index for row in plan.rows}
        self._ledger, self._shelf = Ledger(store.journals), Shelf(plan)
        self._failed: dict[int, str] = {}
        self._started = self._refreshed = time.perf_counter()
        self.refresh()
        self.skipped = len(self.done)

    def refresh(self) -> None:
        """Read what the workers' journals say since the last time."""
        self._refreshed = time.perf_counter()
        for record in self._ledger.refresh():
            index = self._index.get(record["key"])
            if index is None:
                continue
            if record.get("status") == "done":
                if self._describes(index, record):
                    self.done[index] = record
            elif index in self.done:
                continue
            elif self._counts(str(record.get("worker"))):
                self._failed[index] = str(record.get("error", ""))

    def _describes(self, index: int, record: Mapping[str, Any]) -> bool:
        """Whether a record is that of the row's picture. One that was lost and made again has two, perhaps of one size."""
        known = self.done.get(index)
        if known is None:
            return self._shelf.holds(index, record)
        return known.get("sha256") != record.get("sha256") and self._shelf.digest(index) == record.get("sha256")

    def _counts(self, worker: str) -> bool:
        """Whether a worker's failures belong to this run; rows that failed in an earlier one are tried again."""
        return worker != self.member.name and (self._old_failures or self.member.met(worker))

    def absorb_own(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Count what our own writer has completed."""
        for record in records:
            index = int(record["row"]) - 1
            if record["status"] == "done":
                self.made += 1
                self.done[index] = dict(record)
                if not self.plan.settings.shards:  # a picture that waits for its shard may be gone when someone looks
                    self.last_path = self.plan.path(self.plan.rows[index])
            else:
                self._failed[index] = str(record["error"])

    def fail(self, failure: BatchFailure) -> None:
        """Note a failure at once, before it is stored."""
        self._failed[failure.row - 1] = failure.sentence

    def failures(self) -> dict[int, str]:
        """Rows that failed in this run and were not made since, with the reason."""
        return {index: text for index, text in self._failed.items() if index not in self.done}

    def is_settled(self, index: int) -> bool:
        """Whether nobody needs to work on the row any more in this run."""
        return index in self.done or index in self._failed

    def seconds(self) -> float:
        """Since this worker started."""
        return time.perf_counter() - self._started

    def progress(self) -> BatchProgress:
        """Where the batch stands."""
        if time.perf_counter() - self._refreshed > REFRESH_SECONDS:
            self.refresh()
        done, failed, total = len(self.done), len(self.failures()), len(self.plan.rows)
        new, seconds = done - self.skipped, self.seconds()
        speed = new / seconds if new and seconds else 0.0
        left = (total - done - failed) / speed if speed else None
        return BatchProgress(done, failed, total, speed, left, self.last_path)

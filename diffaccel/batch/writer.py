"""Finished pictures to the disk, beside the computation: encoding, hashing and waiting for the disk in one thread."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.batch.calls import Caller
from diffaccel.batch.fields import Row
from diffaccel.batch.pictures import encode
from diffaccel.batch.plan import BatchPlan, record_key
from diffaccel.batch.settings import BatchFailure
from diffaccel.batch.state import Journal, Store, sync_folder
from diffaccel.engine.report import Report

WAITING = 4  # results held in memory at most


@dataclass(frozen=True)
class Made:
    """Pictures of one call, or rows that failed, on their way to the disk.

    Attributes:
        still_ours: asked just before publishing; False if another worker has taken the rows over.
    """

    rows: Sequence[Row]
    images: Sequence[Any]
    report: Report | None
    failures: Sequence[BatchFailure]
    still_ours: Callable[[], bool]


class Writer:
    """A thread that stores results in order. Errors of the disk come out of `put`, `take` and `close`.

    Encoding errors are failures of their row; a disk that refuses ends the batch.
    """

    def __init__(self, plan: BatchPlan, store: Store, caller: Caller, worker: str, pipeline: str) -> None:
        self.plan, self.store, self.caller, self.worker, self.pipeline = plan, store, caller, worker, pipeline
        self._journal = Journal(store.journals, worker)
        self._queue: queue.Queue[Made | None] = queue.Queue(WAITING)
        self._finished: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="diffaccel-writer", daemon=True)
        self._thread.start()

    def put(self, made: Made) -> None:
        """Hand over a result; waits while too many are waiting already."""
        self._raise()
        self._queue.put(made)

    def take(self) -> list[dict[str, Any]]:
        """Records completed since the last time."""
        self._raise()
        records = []
        while not self._finished.empty():
            records.append(self._finished.get())
        return records

    def drain(self) -> list[dict[str, Any]]:
        """Wait until everything handed over is stored; the records completed since the last time."""
        self._queue.join()
        return self.take()

    def close(self) -> None:
        """End the thread after what was handed over."""
        self._queue.put(None)
        self._thread.join()
        self._journal.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            made = self._queue.get()
            try:
                if made is None:
                    return
                if self._error is None:  # after an error only empty the queue, so that nobody waits for ever
                    self._store(made)
            except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
                self._error = error
            finally:
                self._queue.task_done()

    def _store(self, made: Made) -> None:
        if not made.still_ours():
            return
        records = [self._failed(failure) for failure in made.failures]
        for row, image in zip(made.rows, made.images, strict=True):
            assert made.report is not None
            try:
                content = self._encode(row, image, made.report, len(made.rows))
            except (ValueError, OverflowError) as error:
                records.append(self._failed(BatchFailure(row.number, f"the picture cannot be encoded: {error}")))
                continue
            self.store.publish(self.plan.path(row), content, self.worker)
            records.append(self._done(row, image, made.report, len(made.rows), content))
        for folder in {self.plan.path(row).parent for row in made.rows}:
            sync_folder(folder)
        self._journal.append(records)
        for record in records:
            self._finished.put(record)

    def _encode(self, row: Row, image: Any, report: Report, together: int) -> bytes:
        settings = self.plan.settings
        text = self.caller.describe(row, image, report, together) if settings.metadata else None
        return encode(image, settings.format, settings.quality, text)

    def _failed(self, failure: BatchFailure) -> dict[str, Any]:
        row = self.plan.rows[failure.row - 1]
        return {**self._common(row), "status": "failed", "error": failure.sentence}

    def _common(self, row: Row) -> dict[str, Any]:
        return {"key": record_key(row, self.pipeline), "row": row.number, "worker": self.worker}

    def _done(self, row: Row, image: Any, report: Report, together: int, content: bytes) -> dict[str, Any]:
        shard = self.plan.shard(row)
        return {
            **self._common(row),
            "status": "done",
            "file": self.plan.path(row).name,
            **({} if shard is None else {"shard": shard.name}),
            "prompt": row.prompt,
            "negative_prompt": row.negative_prompt,
            "seed": row.seed,
            "steps": row.steps,
            "width": image.width,
            "height": image.height,
            "guidance_scale": row.guidance_scale,
            "recipe": self.caller.wrapped(row.recipe).recipe.to_dict(),
            "arguments": dict(row.extras),
            "model": self.caller.model,
            "batch": together,
            "seconds": report.seconds / together,
            "evaluations": report.evaluations,
            "flops": report.flops // together,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

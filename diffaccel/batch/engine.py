"""One worker's run of a plan: claim rows, make pictures, store them, until every row of the list is settled.

The same code runs alone, beside other processes on the same folder, and inside Ray actors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel.batch.calls import Caller
from diffaccel.batch.claims import Claims, Member
from diffaccel.batch.finish import Finisher
from diffaccel.batch.folder import check_change, prepare
from diffaccel.batch.generating import Generator
from diffaccel.batch.identity import identity
from diffaccel.batch.manifest import check_manifest
from diffaccel.batch.plan import BatchPlan
from diffaccel.batch.planning import find_change
from diffaccel.batch.settings import BatchError, BatchFailure, BatchProgress, BatchReport
from diffaccel.batch.state import Saved, Store
from diffaccel.batch.tally import Tally
from diffaccel.batch.writer import Made, Writer
from diffaccel.files.output import OutputError

OnProgress = Callable[[BatchProgress], None]


def run_batch(
    plan: BatchPlan,
    fast_or_pipe: Any,
    *,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    model: str = "",
    batches: Sequence[int] | None = None,
) -> BatchReport:
    """Make the pictures of a plan that are not there yet.

    May be called by any number of processes on any number of machines at the same time, with equal plans on one shared
    folder; each makes a part, and each returns when all rows are settled.

    Args:
        fast_or_pipe: a diffusers pipeline, or one wrapped with a recipe for the rows that name none.
        on_progress: called from this thread, at least once after each batch.
        should_stop: asked between calls of the pipeline; True ends the run, and the rows left can be made later.
        model: what pictures and manifest call the model; default: where it was loaded from.
        batches: numbers of the plan's batches to work on; default: all.
    Raises:
        BatchError: before the first picture: rows this pipeline cannot take, or a folder that holds another batch.
        OutputError: a file cannot be written, or the folder was moved or removed. What is complete by then stays and counts.
    """
    caller = Caller(plan, fast_or_pipe, model or _name_of(fast_or_pipe))
    caller.check()
    plan = caller.plan
    check_manifest(plan.settings.manifest)
    pipeline = _pipeline(plan, caller)
    store = Store(plan.output)
    store.create()
    with (
        _disk_errors(store),
        Member(store.workers, plan.settings.lease, plan.digest(pipeline)) as member,
    ):
        prepare(plan, store, member, pipeline)
        worker = Worker(plan, caller, store, member, pipeline)
        try:
            worker.run(batches, on_progress or (lambda progress: None), should_stop or (lambda: False))
        finally:
            worker.close()
        return worker.report()


@contextlib.contextmanager
def _disk_errors(store: Store) -> Iterator[None]:
    """What the disk refuses to journals, claims and signs of life, as a sentence; pictures have their own."""
    try:
        yield
    except (OSError, OutputError) as error:
        if lost := store.lost():
            raise _lost(lost) from error
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"Cannot write to {store.output}: {(error.strerror or str(error)).lower()}.") from error


def _lost(folder: Path) -> OutputError:
    return OutputError(f"{folder} was moved or removed while the batch was running; start the same command again.")


def known_model(plan: BatchPlan, fast_or_pipe: Any) -> BatchPlan:
    """The plan with what it means for the folder now that the model is known: none of another model's pictures are kept.

    Raises:
        BatchError: as `run_batch` before the first picture, except for what only writing can tell.
    """
    caller = Caller(plan, fast_or_pipe, "")
    caller.check()
    plan = caller.plan
    saved = Store(plan.output).saved()
    if saved is None:
        return plan
    wanted = Saved(tuple(row.key for row in plan.rows), plan.layout, _pipeline(plan, caller))
    check_change(plan, saved, wanted)
    return plan if saved.pipeline == wanted.pipeline else replace(plan, change="overwrite", kept=0)


def _pipeline(plan: BatchPlan, caller: Caller) -> str:
    needs_own = any(row.recipe == "" for row in plan.rows)
    return identity(caller.pipe, caller.wrapped("").recipe.to_dict() if needs_own else {})


def finish_batch(plan: BatchPlan, *, on_progress: OnProgress | None = None) -> BatchReport:
    """Pack shards and write manifest and sheet of what the folder holds; for engines whose workers each made a part.

    Raises:
        BatchError: the folder does not hold this plan.
    """
    store = Store(plan.output)
    saved = store.saved()
    if saved is None or find_change(plan, saved) != "same":
        raise BatchError(f"{plan.output} does not hold this batch.")
    with (
        _disk_errors(store),
        Member(store.workers, plan.settings.lease, plan.digest(saved.pipeline)) as member,
    ):
        tally = Tally(plan, store, member, saved.pipeline, old_failures=True)
        claims = Claims(store.claims / plan.digest(saved.pipeline), member)
        finisher = Finisher(plan, store, claims, member, tally)
        finisher.finish(everything=True, should_stop=lambda: False)
        (on_progress or (lambda progress: None))(tally.progress())
        return _report(plan, tally, finisher.manifest)


def _report(
    plan: BatchPlan, tally: Tally, manifest: Path | None, notes: Sequence[str] = (), stopped: str = ""
) -> BatchReport:
    seconds = tally.seconds()
    failures = tuple(BatchFailure(index + 1, text) for index, text in sorted(tally.failures().items()))
    return BatchReport(
        total=len(plan.rows),
        done=len(tally.done),
        made=tally.made,
        skipped=tally.skipped,
        failed=len(failures),
        failures=failures,
        seconds=seconds,
        pictures_per_second=tally.made / seconds if seconds else 0.0,
        notes=tuple(notes),
        stopped=stopped,
        manifest=manifest,
    )


def _name_of(pipe: Any) -> str:
    name = str(pipe.config.get("_name_or_path", "") or "")
    return Path(name).name or type(pipe).__name__


class Worker:
    """The loop over the batches of a plan."""

    def __init__(self, plan: BatchPlan, caller: Caller, store: Store, member: Member, pipeline: str) -> None:
        self.plan, self.caller, self.store, self.member = plan, caller, store, member
        self.claims = Claims(store.claims / plan.digest(pipeline), member)
        self.tally = Tally(plan, store, member, pipeline)
        self.writer = Writer(plan, store, caller, member.name, pipeline)
        self.generator = Generator(caller)
        self.finisher = Finisher(plan, store, self.claims, member, self.tally)
        self.stopped, self.failed_in_a_row, self.taken_over = "", 0, 0

    def run(self, batches: Sequence[int] | None, on_progress: OnProgress, should_stop: Callable[[], bool]) -> None:
        """Work until all given batches are settled, or a reason to stop."""
        self.on_progress, self.should_stop = on_progress, should_stop
        self.finisher.pack_complete()
        count = len(self.plan.batches)  # without ignored columns there may be fewer than those that were handed out
        open_batches = self._unsettled(range(count) if batches is None else [n for n in batches if n < count])
        on_progress(self.tally.progress())
        while open_batches and not self._stops():
            if not self._pass(open_batches):
                self.tally.absorb_own(self.writer.drain())
            self.tally.refresh()
            before, open_batches = open_batches, self._unsettled(open_batches)
            if open_batches:
                self._check_there()
            if open_batches == before:  # others hold what is left
                time.sleep(min(1.0, self.plan.settings.lease / 20))
            on_progress(self.tally.progress())
        self.tally.absorb_own(self.writer.drain())
        self.tally.refresh()
        self.finisher.finish(everything=batches is None, should_stop=self.should_stop)
        on_progress(self.tally.progress())

    def close(self) -> None:
        """Store what was handed over and end the writer's thread."""
        self.writer.close()

    def _unsettled(self, batches: Iterable[int]) -> list[int]:
        rows = self.tally.is_settled
        return [number for number in batches if not all(map(rows, self.plan.batches[number].rows))]

    def _pass(self, batches: Sequence[int]) -> bool:
        """Try every open batch once; whether any of them was ours to do."""
        attempts = self.claims.attempts()
        worked = False
        for number in batches:
            if self._stops():
                break
            self._check_there()
            attempt = self._claim(number, attempts.get(str(number), -1))
            if attempt is not None:
                self._work(number, attempt)
                worked = True
        return worked

    def _claim(self, number: int, last: int) -> int | None:
        """Our attempt at this batch; None if another worker is at it or was faster."""
        unit = str(number)
        if last >= 0:
            if not self.claims.is_free(unit, last):
                return None
            self.tally.refresh()  # its owner may have finished some of it, or all before it ended
            if all(map(self.tally.is_settled, self.plan.batches[number].rows)):
                return None
        try:
            if not self.claims.try_claim(unit, last + 1):
                return None
        except FileNotFoundError:
            self.tally.refresh()
            if not all(map(self.tally.is_settled, self.plan.batches[number].rows)):
                raise
            return None  # another worker has finished and tidied up
        self.taken_over += last >= 0
        return last + 1

    def _check_there(self) -> None:
        """Nothing else would notice a folder that was moved: without claims, all rows look like another worker's."""
        if lost := self.store.lost():
            raise _lost(lost)

    def _work(self, number: int, attempt: int) -> None:
        batch = self.plan.batches[number]
        rows = [self.plan.rows[index] for index in batch.rows if not self.tally.is_settled(index)]
        for result in self.generator.generate(rows, batch.group, self._stops):
            failures = () if result.failure is None else (result.failure,)
            self.failed_in_a_row = self.failed_in_a_row + 1 if failures else 0
            for failure in failures:
                self.tally.fail(failure)
            self.writer.put(
                Made(
                    () if failures else result.rows,
                    result.images,
                    result.report,
                    failures,
                    lambda: self.claims.is_mine(str(number), attempt),
                )
            )
            self.tally.absorb_own(self.writer.take())
            self.on_progress(self.tally.progress())
        self.finisher.pack_complete()

    def _stops(self) -> bool:
        if self.failed_in_a_row >= self.plan.settings.max_failures:
            self.stopped = f"{self.failed_in_a_row} rows in a row failed"
        elif self.should_stop():
            self.stopped = "it was asked to"
        return bool(self.stopped)

    def report(self) -> BatchReport:
        """What this run did."""
        notes = [*self.caller.notes, *self.generator.notes]
        if self.taken_over:
            batches = "1 batch was" if self.taken_over == 1 else f"{self.taken_over} batches were"
            notes.append(f"{batches} taken over from workers or runs that had ended.")
        return _report(self.plan, self.tally, self.finisher.manifest, notes, self.stopped)

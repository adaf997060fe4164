"""The same work inside Ray Data actors: for clusters whose machines come and go. All of them see one output folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffaccel.batch.claims import Member
from diffaccel.batch.engine import OnProgress, finish_batch, run_batch
from diffaccel.batch.plan import BatchPlan
from diffaccel.batch.settings import BatchError, BatchReport, RowProblem
from diffaccel.batch.state import Store
from diffaccel.batch.tally import Tally
from diffaccel.errors import DiffaccelError

CALLS_PER_ACTOR = 8  # the work is cut so that an actor that joins late, or dies, changes little


class RayWorker:
    """An actor: loads the pipeline once, then runs the batches it is handed."""

    def __init__(self, plan: BatchPlan, load: Callable[[], Any], model: str) -> None:
        self.plan, self.model, self.refused = plan, model, ""
        try:
            self.pipe = load()
        except DiffaccelError as error:
            self.refused = _as_text(error)

    def __call__(self, numbers: dict[str, Any]) -> dict[str, list[Any]]:
        """Make the batches of these numbers; what is wrong as text, since blocks hold plain columns and Ray's errors pages."""
        chosen = [int(number) for number in numbers["batch"]]
        made, stopped, notes = 0, "", ""
        if not self.refused:
            try:
                report = run_batch(self.plan, self.pipe, model=self.model, batches=chosen)
                made, stopped, notes = report.made, report.stopped, "\n".join(report.notes)
            except DiffaccelError as error:
                self.refused = _as_text(error)
        return {"made": [made], "stopped": [stopped], "notes": [notes], "refused": [self.refused]}


def _as_text(error: DiffaccelError) -> str:
    problems = getattr(error, "problems", ())
    return json.dumps([str(error), [[problem.row, problem.sentence] for problem in problems]])


def _as_error(text: str) -> BatchError:
    said, problems = json.loads(text)
    return BatchError(said, [RowProblem(row, sentence) for row, sentence in problems])


def run_on_ray(
    plan: BatchPlan,
    load: Callable[[], Any],
    *,
    actors: int = 1,
    gpus: float = 0,
    model: str = "",
    on_progress: OnProgress | None = None,
) -> BatchReport:
    """Make the pictures of a plan on a Ray cluster: the running one (RAY_ADDRESS), or one on this machine.

    Args:
        load: makes the pipeline inside an actor; Ray sends it there.
        actors: how many pipelines.
        gpus: GPUs of each actor.
    Raises:
        BatchError: Ray is not installed, or whatever an actor refuses: the model, rows, the folder, a full disk.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
        import ray
        import ray.data
    except ImportError as error:
        raise BatchError("This engine needs Ray; install diffaccel[ray].") from error
    plan = replace(plan, output=plan.output.resolve())  # actors have working folders of their own
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    started = time.perf_counter()
    numbers = ray.data.from_items([{"batch": number} for number in range(len(plan.batches))])
    results = numbers.map_batches(
        RayWorker,
        fn_constructor_kwargs={"plan": plan, "load": load, "model": model},
        batch_size=max(1, len(plan.batches) // (actors * CALLS_PER_ACTOR)),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
        num_cpus=1,
    )
    made, stopped, notes, tally = 0, "", [], None
    for row in results.iter_rows():
        if row["refused"]:
            raise _as_error(row["refused"])
        made, stopped = made + row["made"], stopped or row["stopped"]
        notes.extend(row["notes"].splitlines())
        if on_progress is not None:
            tally = tally or _tally(plan)
            tally.refresh()
            on_progress(tally.progress())
    report = finish_batch(plan, on_progress=on_progress)
    seconds = time.perf_counter() - started
    return replace(
        report,
        made=made,
        skipped=report.done - made,
        seconds=seconds,
        pictures_per_second=made / seconds,
        stopped=stopped,
        notes=tuple(dict.fromkeys(notes)),
    )


def _tally(plan: BatchPlan) -> Tally:
    """What the actors have done so far, read from their journals; this process only looks on."""
    store = Store(plan.output)
    saved = store.saved()
    return Tally(plan, store, Member(store.workers, plan.settings.lease), saved.pipeline if saved else "")

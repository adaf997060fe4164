"""The same work inside Ray Data actors: for clusters whose machines come and go. All of them see one output folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffaccel.batch.engine import OnProgress, finish_batch, run_batch
from diffaccel.batch.plan import BatchPlan
from diffaccel.batch.settings import BatchError, BatchReport

CALLS_PER_ACTOR = 8  # the work is cut so that an actor that joins late, or dies, changes little


class RayWorker:
    """An actor: loads the pipeline once, then runs the batches it is handed."""

    def __init__(self, plan: BatchPlan, load: Callable[[], Any], model: str) -> None:
        self.plan, self.pipe, self.model = plan, load(), model

    def __call__(self, numbers: dict[str, Any]) -> dict[str, list[Any]]:
        """Make the batches of these numbers; the reasons of failures as text, since blocks hold plain columns."""
        chosen = [int(number) for number in numbers["batch"]]
        report = run_batch(self.plan, self.pipe, model=self.model, batches=chosen)
        return {"made": [report.made], "stopped": [report.stopped], "notes": ["\n".join(report.notes)]}


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
        BatchError: Ray is not installed, or the folder holds another batch.
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
    made, stopped, notes = 0, "", []
    for row in results.iter_rows():
        made, stopped = made + row["made"], stopped or row["stopped"]
        notes.extend(row["notes"].splitlines())
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

"""Batch generation: a list of rows to a folder of pictures, resumable at any moment, one seed per picture.

    plan = plan_batch(Path("rows.csv"), Path("out"), BatchSettings(recipe="balanced", steps=25))
    report = run_batch(plan, pipe)

Names are loaded on first use: planning loads no pipelines.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.batch.engine import run_batch as run_batch
    from diffaccel.batch.plan import BatchPlan as BatchPlan
    from diffaccel.batch.planning import plan_batch as plan_batch
    from diffaccel.batch.settings import BatchError as BatchError
    from diffaccel.batch.settings import BatchFailure as BatchFailure
    from diffaccel.batch.settings import BatchProgress as BatchProgress
    from diffaccel.batch.settings import BatchReport as BatchReport
    from diffaccel.batch.settings import BatchSettings as BatchSettings
    from diffaccel.batch.settings import RowProblem as RowProblem
    from diffaccel.batch.timing import Estimate as Estimate
    from diffaccel.batch.timing import estimate as estimate

_HOME = {
    "BatchSettings": "settings",
    "BatchError": "settings",
    "BatchFailure": "settings",
    "BatchProgress": "settings",
    "BatchReport": "settings",
    "RowProblem": "settings",
    "BatchPlan": "plan",
    "plan_batch": "planning",
    "Estimate": "timing",
    "estimate": "timing",
    "run_batch": "engine",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffaccel.batch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffaccel.batch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

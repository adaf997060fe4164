"""What a run really did: counted, not promised."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from diffaccel.engine.finite import broken_pictures, decoded_pictures, refuse_these
from diffaccel.engine.run import Evaluation, RegionCounts, Run
from diffaccel.errors import Unsupported


@dataclass(frozen=True)
class Report:
    """Counts of one pipeline call.

    Attributes:
        steps: solver steps taken, over all runs of the scheduler.
        evaluations: denoiser forwards really executed (full or partial).
        rows: batch rows really evaluated, summed over the evaluations.
        seconds: wall time of the whole pipeline call, text encoders and decoder included.
        flops: FLOPs of denoiser and ControlNets, counted from the operators that ran (2 per multiply-add); 0 if they
            could not be counted, and a note says why.
        flops_plain: FLOPs of the same call without any method; 0 if they could not be counted.
        completed: False if the call ended by an exception or was interrupted before its last step.
        recipe: the recipe that was asked for.
        methods: per method, what it did.
        notes: sentences worth reading: fallbacks, blocks left alone, settings without effect.
        trace: one entry per executed network call (network, evaluation, sigma, rows, flops, what the methods decided).
        regions: how often each token was computed; None without region sampling.
        operators: per operator of diffaccel/kernels, how many calls took which path ("triton" or "torch").
        images: pictures that were decoded.
        broken: which of them hold NaN or infinite values, from 0; see `refuse_broken`.
    """

    steps: int
    evaluations: int
    rows: int
    seconds: float
    flops: int
    flops_plain: int
    completed: bool
    recipe: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()
    trace: tuple[Evaluation, ...] = field(default=(), repr=False)
    regions: RegionCounts | None = field(default=None, repr=False)
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    images: int = 0
    broken: tuple[int, ...] = ()

    def region_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How often each token was computed: (images, h, w) over the token grid.

        Raises:
            Unsupported: no region sampling took place in this call.
        """
        if self.regions is None:
            raise Unsupported("no region sampling took place in this call, so there is no map of regions.")
        counts: np.ndarray[Any, np.dtype[np.int64]] = self.regions.counts.cpu().numpy()
        return counts

    def region_map(self, image: int = 0, size: int = 512) -> Image.Image:
        """A grey picture of how often each region was computed: white on every evaluation, black never.

        Args:
            image: which of the call's pictures.
            size: longer side in pixels.
        Raises:
            Unsupported: no region sampling took place, or there is no such picture.
        """
        counts = self.region_counts()
        if not 0 <= image < len(counts):
            raise Unsupported(f"this call made {len(counts)} pictures; there is no picture {image}.")
        assert self.regions is not None
        grey = np.rint(counts[image] * (255 / self.regions.evaluations)).astype(np.uint8)
        height, width = grey.shape
        scale = size / max(height, width)
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        return Image.fromarray(grey).resize(shape, Image.Resampling.NEAREST)

    @property
    def flops_ratio(self) -> float:
        """How many times fewer FLOPs than plain; 1.0 if nothing ran, NaN if they could not be counted."""
        if not self.counted:
            return math.nan
        return self.flops_plain / self.flops if self.flops else 1.0

    @property
    def counted(self) -> bool:
        """Whether the FLOPs of every network call could be counted."""
        return all(e.flops is not None for e in self.trace)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; the trace is left out."""
        keys = ("steps", "evaluations", "rows", "seconds", "flops", "flops_plain", "completed", "recipe", "methods")
        return {key: getattr(self, key) for key in keys} | {
            "notes": list(self.notes),
            "operators": self.operators,
        }

    def _flops(self) -> str:
        if not self.counted:
            return "not counted"
        return f"{self.flops:.3e}   (plain {self.flops_plain:.3e}, {self.flops_ratio:.2f}x fewer)"

    def __str__(self) -> str:
        lines = [
            f"recipe        {self.recipe['name']}{'' if self.completed else '   (did not finish)'}",
            f"steps         {self.steps}",
            f"evaluations   {self.evaluations}   ({self.rows} rows)",
            f"seconds       {self.seconds:.2f}",
            f"FLOPs         {self._flops()}",
        ]
        for name, counts in self.methods.items():
            lines.append(f"{name:<22}" + ", ".join(f"{key} {value}" for key, value in counts.items()))
        for name, paths in self.operators.items():
            lines.append(f"operator {name:<22}" + ", ".join(f"{path} {calls}" for path, calls in paths.items()))
        return "\n".join(lines + [f"note: {sentence}" for sentence in self.notes])


def refuse_broken(report: Report | None) -> None:
    """To be asked before a call's pictures are saved or shown.

    Raises:
        BrokenPicture: one of them holds NaN or infinite values.
    """
    if report is not None:
        refuse_these(report.broken, report.images)


def build_report(run: Run, recipe: dict[str, Any], seconds: float, *, completed: bool) -> Report:
    """Sum up a run. `completed` says whether the pipeline returned normally."""
    denoiser = [e for e in run.evaluations if e.network == "denoiser"]
    flops = [e.flops for e in run.evaluations if e.flops is not None]
    counted = len(flops) == len(run.evaluations)
    return Report(
        steps=run.steps,
        evaluations=sum(e.rows > 0 for e in denoiser),
        rows=sum(e.rows for e in denoiser),
        seconds=seconds,
        flops=sum(flops) if counted else 0,
        flops_plain=round(_plain_flops(run.evaluations) * run.plain_ratio) if counted else 0,
        completed=completed and run.complete,
        recipe=recipe,
        methods=run.counters,
        notes=tuple(run.notes),
        trace=tuple(run.evaluations),
        regions=run.regions,
        operators=run.operators,
        images=decoded_pictures(run),
        broken=broken_pictures(run),
    )


def _plain_flops(evaluations: list[Evaluation]) -> float:
    """Rows the pipeline asked for, times what a row costs in a complete call of the same kind in this run.

    The newest such call counts, else the first one after it; a kind that never ran whole costs what its network does.
    """
    total, costs = 0.0, dict[Hashable, float]()
    for e in reversed(evaluations):
        costs |= _dense_costs(e)
    for e in evaluations:
        costs |= _dense_costs(e)
        whole = costs.get(e.kind, costs.get(e.network))
        total += e.stock_rows * (e.flops or 0) / max(e.rows, 1) if whole is None else e.stock_rows * whole
    return total


def _dense_costs(e: Evaluation) -> dict[Hashable, float]:
    return {} if e.dense_flops_per_row is None else dict.fromkeys((e.kind, e.network), e.dense_flops_per_row)

"""Timing that can be trusted on a machine that is not quiet: alternate, repeat, compare within a repetition.

A ratio is always taken between two runs of the same repetition, seconds apart, so that whatever else the machine does
slows both. Its spread over the repetitions is reported with it.
"""

from __future__ import annotations

import functools
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Iterable[float]) -> Spread:
    """Summary of at least one measurement."""
    numbers = sorted(values)
    return Spread(statistics.median(numbers), numbers[0], numbers[-1])


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """How many times faster than the baseline: baseline over seconds, pair by pair of the same repetition."""
    return spread(base / own for own, base in zip(seconds, baseline, strict=True))


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished, so that a clock read after it means something."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def timed(
    function: Callable[[], Any], device: torch.device | str = "cpu", clock: Clock = time.perf_counter
) -> tuple[Any, float]:
    """Result and wall seconds of one call, the device's queue drained before and after."""
    synchronize(device)
    start = clock()
    result = function()
    synchronize(device)
    return result, clock() - start


class PeakMemory:
    """How much memory a stretch of work needed beyond what was in use before it.

        with PeakMemory(device) as memory: ...
        memory.bytes   # on CUDA what torch allocated, on Linux the growth of the resident set, elsewhere None

    Memory that the process holds but no longer uses counts as in use before, so a second run can seem to need less.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu" and _RESET_PEAK.exists():
            _RESET_PEAK.write_text("5")  # proc(5): sets the peak of the resident set to its present size
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            cuda = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
            self.bytes = max(peak - self._before, 0)


_RESET_PEAK = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    """A size from the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """The items starting at number `by`, around the end."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def closest_steps(measure: Callable[[int], float], target: float, most: int) -> int:
    """The number of steps in [1, most] whose measured cost comes closest to `target`.

    Starts where a cost proportional to the steps would put it and walks while it gets closer. Each count is measured
    once.

    Args:
        measure: cost of a run with that many steps (seconds, evaluations or FLOPs), rising with the steps.
    """
    cost = functools.cache(measure)

    def error(steps: int) -> float:
        return abs(cost(steps) - target)

    best = min(max(round(most * target / cost(most)), 1), most)
    direction = -1 if cost(best) > target else 1
    while 1 <= best + direction <= most and error(best + direction) < error(best):
        best += direction
    return best


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader must know about where a figure was measured; no host names, users or paths."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "device": torch.device(device).type,
        "python": platform.python_version(),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts | {name: _version(name) for name in ("torch", "diffusers", "diffaccel")}


def describe_machine(facts: Mapping[str, Any]) -> str:
    """One line for the foot of a table."""
    name = facts.get("gpu") or f"{facts['cpu']} ({facts['cores']} cores, {facts['threads']} threads)"
    versions = ", ".join(f"{key} {facts[key]}" for key in ("torch", "diffusers", "diffaccel"))
    return f"{facts['date']}; {name}; load before the run {facts['load_before']}; Python {facts['python']}, {versions}"


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":  # the metadata of some builds leave out which GPU library they were built for
        return str(torch.__version__)
    if package == "diffaccel":
        from diffaccel.version import __version__  # noqa: PLC0415  (also right when run from a checkout)

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None

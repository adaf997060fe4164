"""Speed of every operator beside plain torch, torch's own attention, and tomesd, at the shapes of real models.

    OMP_NUM_THREADS=1 python benchmarks/operators.py --device cpu --dtype float32   # one core, processor time: 5 minutes
    python benchmarks/operators.py --device cuda --dtype bfloat16                   # Triton kernels: a few minutes

All variants of a case run in one process on the same inputs, in turns; a ratio is taken within a repetition. Ceilings, the
copy bandwidth and the rate of a matrix product, are measured in the same process. On a GPU each variant is timed cold
(caches flushed), hot (three sets of inputs in turns) and inside a CUDA graph (no launch gaps); ratios are those of the hot
runs. A variant that fails is listed with its reason and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

import torch

from benchmarks import peers
from benchmarks.operators_cases import Case, Setting, all_cases
from benchmarks.operators_table import judged, markdown
from benchmarks.timing import say
from diffaccel.bench import machine, ratio, rotated, spread
from diffaccel.kernels.registration import recording
from diffaccel.output import write_text

_FLUSH = 256 * 2**20  # bytes written between cold runs: more than any cache
_LEAST = 0.02  # seconds of one measurement on a CPU


@dataclass
class Timings:
    """Seconds of one call, one entry per repetition."""

    hot: list[float] = field(default_factory=list)
    cold: float | None = None
    graph: float | None = None
    path: str = ""
    failed: str = ""


class Cpu:
    """Processor time of this process, so that other work on the machine does not count."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def hot(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Seconds of one call; short ones are repeated."""
        call = calls[0]
        if id(call) not in self.counts:
            call()
            self.counts[id(call)] = max(1, round(_LEAST / max(_seconds(call), 1e-6)))
        count = self.counts[id(call)]
        start = time.process_time()
        for _ in range(count):
            call()
        return (time.process_time() - start) / count

    def extras(self, calls: Sequence[Callable[[], Any]]) -> tuple[float | None, float | None]:
        """Nothing besides."""
        return None, None


class Cuda:
    """Events on the device."""

    def __init__(self, device: str, count: int = 20) -> None:
        self.device, self.count = device, count
        self.flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)

    def _elapsed(self, work: Callable[[], Any], count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count

    def hot(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Seconds of one call, the sets of inputs in turns."""
        for call in calls:
            call()
        return self._elapsed(lambda: [calls[i % len(calls)]() for i in range(self.count)], self.count)

    def extras(self, calls: Sequence[Callable[[], Any]]) -> tuple[float | None, float | None]:
        """(cold, in a graph)."""
        times = []
        for i in range(self.count):
            self.flush.zero_()
            times.append(self._elapsed(calls[i % len(calls)], 1))
        return statistics.median(times), self._graph(calls)

    def _graph(self, calls: Sequence[Callable[[], Any]]) -> float | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for i in range(self.count):
                    calls[i % len(calls)]()
        except RuntimeError as error:  # random draws on the host and waits for the device cannot be captured
            say(f"    no graph: {str(error).splitlines()[0]}")
            return None
        graph.replay()
        return self._elapsed(graph.replay, self.count)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(case: Case, clock: Cpu | Cuda, repeats: int) -> dict[str, Timings]:
    """All variants of a case, in turns."""
    sets = [case.make(seed) for seed in range(1 if isinstance(clock, Cpu) else 3)]
    found = {name: Timings() for name in sets[0]}
    for repetition in range(repeats):
        for name in rotated(list(found), repetition):
            if not found[name].failed:
                _once(found[name], [calls[name] for calls in sets], clock, first=repetition == 0)
    return found


def _once(timings: Timings, calls: Sequence[Callable[[], Any]], clock: Cpu | Cuda, *, first: bool) -> None:
    try:
        if first:
            with recording({}) as paths:
                calls[0]()
            timings.path = "+".join(sorted({path for operator in paths.values() for path in operator}))
            timings.cold, timings.graph = clock.extras(calls)
        timings.hot.append(clock.hot(calls))
    except Exception as error:  # noqa: BLE001  (whatever a compiler or a driver raises; the table says it)
        timings.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        say(f"    failed: {timings.failed}")


def ceilings(setting: Setting, clock: Cpu | Cuda) -> dict[str, float]:
    """Copy bandwidth in GB/s (bytes read and written) and the rate of a large matrix product in TFLOP/s."""
    size = 2**31 if setting.device == "cuda" else 2**27
    side = 8192 if setting.device == "cuda" else 1024
    if setting.tiny:
        size, side = 2**16, 64
    source = torch.empty(size, dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    left, right = (setting.noise(side, side, seed=seed) for seed in (0, 1))
    copying = min(clock.hot([lambda: target.copy_(source)]) for _ in range(3))
    product = min(clock.hot([lambda: left @ right]) for _ in range(3))
    return {"copy_gb_per_s": 2 * size / copying / 1e9, "gemm_tflop_per_s": 2 * side**3 / product / 1e12}


def row(case: Case, name: str, found: dict[str, Timings], limits: dict[str, float]) -> dict[str, Any]:
    """One variant, JSON-ready."""
    timings = found[name]
    head: dict[str, Any] = {"operator": case.operator, "shape": case.shape, "variant": name, "own": name in case.own}
    head |= {"path": timings.path, "failed": timings.failed, "density": case.density}
    if timings.failed:
        return head
    seconds = spread(timings.hot)
    rivals = {k: v for k, v in found.items() if k not in case.own and not v.failed}
    best = min(rivals, key=lambda k: statistics.median(rivals[k].hot), default=None)
    head |= {"seconds": vars(seconds), "cold_seconds": timings.cold, "graph_seconds": timings.graph}
    if name in case.own and best is not None:
        head |= {"baseline": best, "faster": vars(ratio(timings.hot, rivals[best].hot))}
        head |= {
            "against": {k: vars(ratio(timings.hot, v.hot)) for k, v in found.items() if k != name and not v.failed}
        }
    if case.flops:
        head["of_gemm"] = case.flops / seconds.median / 1e12 / limits["gemm_tflop_per_s"]
    if case.bytes:
        head["of_copy"] = case.bytes / seconds.median / 1e9 / limits["copy_gb_per_s"]
    return head


def benchmark(setting: Setting, repeats: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """All cases; a JSON-ready result."""
    facts = machine(setting.device) | peers.installed(("tomesd", "triton"))
    clock: Cpu | Cuda = Cpu() if setting.device == "cpu" else Cuda(setting.device)
    limits = ceilings(setting, clock)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for case in all_cases(setting):
            if only and case.operator not in only:
                continue
            say(f"{case.operator}, {case.shape}")
            found = measure(case, clock, repeats)
            rows += [row(case, name, found, limits) for name in found]
            if isinstance(clock, Cpu):
                clock.counts.clear()  # callables are gone, and their numbers may be given to others
    return {
        "machine": facts,
        "settings": {"device": setting.device, "dtype": str(setting.dtype).removeprefix("torch."), "repeats": repeats},
        "clock": "processor time" if setting.device == "cpu" else "device events",
        "ceilings": limits,
        "rows": rows,
        "targets": judged(rows, setting.device),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write operators-<device>.md and .json."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="bfloat16" if cuda else "float32", choices=("float32", "float16", "bfloat16")
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; processor time counts all of them")
    parser.add_argument("--only", nargs="+", default=[], help="names of operators")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few tokens, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = benchmark(
        Setting(options.device, getattr(torch, options.dtype), tiny=options.tiny), options.repeats, options.only
    )
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"operators-{options.device}"
    write_text(options.out / f"{name}.json", json.dumps(result, indent=2) + "\n", overwrite=True)
    write_text(options.out / f"{name}.md", markdown(result), overwrite=True)
    print(markdown(result))


if __name__ == "__main__":
    main()

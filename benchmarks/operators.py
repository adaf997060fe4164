"""Speed of every operator beside plain torch, torch's own attention, and tomesd, at the shapes of real models.

    OMP_NUM_THREADS=1 python benchmarks/operators.py --device cpu --dtype float32   # one core, processor time: 5 minutes
    python benchmarks/operators.py --device cuda --dtype bfloat16                   # Triton kernels: a few minutes

All variants of a case run in one process on the same inputs, in turns; a ratio is taken within a repetition. Ceilings, the
copy bandwidth and the rate of a matrix product, are measured in the same process. On a GPU each variant is timed cold
(caches flushed), hot (three sets of inputs in turns) and inside a CUDA graph (no launch gaps); ratios are those of the hot
runs, shares of a ceiling those of the graph where there is one. A variant that fails is listed with its reason and the rest
goes on; the files are written after every case.
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
from diffaccel.files.output import write_text
from diffaccel.kernels.registration import recording
from diffaccel.measure.timing import machine, ratio, rotated, spread

_FLUSH = 2**30  # bytes written between cold runs: more than any cache, and time for the host to launch what follows
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

    def extras(self, calls: Sequence[Callable[[], Any]], *, graph: bool) -> tuple[float | None, float | None]:
        """Nothing besides."""
        return None, None


class Cuda:
    """Events on the device."""

    def __init__(self, device: str, count: int = 20) -> None:
        self.device, self.count = device, count
        self.flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)

    def _turns(self, calls: Sequence[Callable[[], Any]]) -> None:
        """The sets of inputs in turns. Results are dropped at once, so that their memory is used again."""
        for i in range(self.count):
            calls[i % len(calls)]()

    def _elapsed(self, work: Callable[[], Any]) -> float:
        start, end = _events()
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.count

    def hot(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Seconds of one call, the sets of inputs in turns."""
        for call in calls:
            call()
        return self._elapsed(lambda: self._turns(calls))

    def extras(self, calls: Sequence[Callable[[], Any]], *, graph: bool) -> tuple[float | None, float | None]:
        """(cold, in a graph)."""
        return self._cold(calls), self._graph(calls) if graph else None

    def _cold(self, calls: Sequence[Callable[[], Any]]) -> float:
        """While the device still flushes, the host launches the call: no wait between, or the launch would be timed."""
        pairs = [_events() for _ in range(self.count)]
        for i, (start, end) in enumerate(pairs):
            self.flush.zero_()
            start.record()
            calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(float(start.elapsed_time(end)) for start, end in pairs) / 1e3

    def _graph(self, calls: Sequence[Callable[[], Any]]) -> float | None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._turns(calls)
        except RuntimeError as error:  # what waits for the device cannot be captured
            torch.cuda.set_stream(stream)  # a capture that failed leaves its own stream the current one
            torch.cuda.synchronize()
            say(f"    no graph: {str(error).splitlines()[0]}")
            return None
        graph.replay()
        return self._elapsed(graph.replay)


def _events() -> tuple[Any, Any]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


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
                graph = case.graph if repetition == 0 else None
                _once(found[name], [calls[name] for calls in sets], clock, graph)
    return found


def _once(timings: Timings, calls: Sequence[Callable[[], Any]], clock: Cpu | Cuda, graph: bool | None) -> None:
    """One repetition; `graph`: whether the first one also tries a graph, None in later ones."""
    try:
        if graph is not None:
            with recording({}) as paths:
                calls[0]()
            timings.path = "+".join(sorted({path for operator in paths.values() for path in operator}))
            timings.cold, timings.graph = clock.extras(calls, graph=graph)
        timings.hot.append(clock.hot(calls))
    except Exception as error:  # noqa: BLE001  (whatever a compiler or a driver raises; the table says it)
        timings.failed = _reason(error)


def _reason(error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    say(f"    failed: {reason}")
    return reason


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


def rows_of(case: Case, clock: Cpu | Cuda, repeats: int, limits: dict[str, float]) -> list[dict[str, Any]]:
    """All variants of a case; one row that says why, if its inputs cannot be made."""
    try:
        density = None if case.density is None else case.density()
        found = measure(case, clock, repeats)
    except Exception as error:  # noqa: BLE001  (inputs come out of operators as well)
        density, found = None, {"inputs": Timings(failed=_reason(error))}
    return [row(case, name, found, limits, density) for name in found]


def row(
    case: Case, name: str, found: dict[str, Timings], limits: dict[str, float], density: float | None
) -> dict[str, Any]:
    """One variant, JSON-ready."""
    timings = found[name]
    head: dict[str, Any] = {"operator": case.operator, "shape": case.shape, "variant": name, "own": name in case.own}
    head |= {"path": timings.path, "failed": timings.failed, "density": density}
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
    working = timings.graph or seconds.median
    if case.flops:
        head["of_gemm"] = case.flops / working / 1e12 / limits["gemm_tflop_per_s"]
    if case.bytes:
        head["of_copy"] = case.bytes / working / 1e9 / limits["copy_gb_per_s"]
    return head


def benchmark(
    setting: Setting,
    repeats: int,
    only: Sequence[str] = (),
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All cases; a JSON-ready result, of which `keep` gets what there is after every case."""
    facts = machine(setting.device) | peers.installed(("tomesd", "triton"))
    clock: Cpu | Cuda = Cpu() if setting.device == "cpu" else Cuda(setting.device)
    limits = ceilings(setting, clock)
    rows: list[dict[str, Any]] = []
    settings = {"device": setting.device, "dtype": str(setting.dtype).removeprefix("torch."), "repeats": repeats}
    clock_name = "processor time" if setting.device == "cpu" else "device events"
    result = {"machine": facts, "settings": settings, "clock": clock_name, "ceilings": limits}
    with torch.no_grad():
        for case in all_cases(setting):
            if only and case.operator not in only:
                continue
            say(f"{case.operator}, {case.shape}")
            rows += rows_of(case, clock, repeats, limits)
            keep(result | {"rows": rows, "targets": judged(rows, setting.device)})
            if isinstance(clock, Cpu):
                clock.counts.clear()  # callables are gone, and their numbers may be given to others
    return result | {"rows": rows, "targets": judged(rows, setting.device)}


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
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"operators-{options.device}.json"

    def keep(result: dict[str, Any]) -> None:
        write_text(path, json.dumps(result, indent=2) + "\n", overwrite=True)
        write_text(path.with_suffix(".md"), markdown(result), overwrite=True)

    setting = Setting(options.device, getattr(torch, options.dtype), tiny=options.tiny)
    result = benchmark(setting, options.repeats, options.only, keep)
    print(markdown(result))


if __name__ == "__main__":
    main()

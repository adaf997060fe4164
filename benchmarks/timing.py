"""What the speed benchmarks share: variants, repetitions, FLOPs, promises, the command line."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffaccel import Recipe, wrap
from diffaccel.engine.flops import FlopLedger
from diffaccel.measure.timing import Spread, ratio, spread, timed

Opener = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Variant:
    """One thing to time.

    Attributes:
        steps: steps to run.
        asked: steps the user would have asked for; more than `steps` for "fewer steps".
        open: gives the callable pipeline and takes every change back.
        needs: package that must be installed.
    """

    name: str
    steps: int
    open: Opener
    asked: int = 0
    needs: str | None = None
    note: str = ""

    @property
    def per(self) -> int:
        """What the seconds are divided by."""
        return self.asked or self.steps


@dataclass
class Timing:
    """Seconds per asked step of one variant, one entry per repetition, and the FLOPs if they were counted."""

    variant: Variant
    seconds: list[float] = field(default_factory=list)
    flops: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Options:
    """The command line."""

    device: str
    dtype: str
    size: int
    batch: int
    steps: int
    repeats: int
    models: tuple[str, ...]
    only: tuple[str, ...]
    compile: bool
    clock: str
    threads: int
    out: Path

    @property
    def read_clock(self) -> Callable[[], float]:
        """Wall time, or the processor time of this process, which other work on the machine does not lengthen."""
        return {"wall": time.perf_counter, "cpu": time.process_time}[self.clock]


class Ours:
    """Wrapped pipelines, made once. They share one FLOP ledger: same network, same kinds of calls."""

    def __init__(self) -> None:
        self.ledger = FlopLedger()
        self.known: dict[str, Any] = {}

    def open(self, recipe: Recipe) -> Opener:
        """An opener for `pipe` with this recipe."""

        @contextmanager
        def opened(pipe: Any) -> Iterator[Any]:
            if recipe.name not in self.known:
                self.known[recipe.name] = wrap(pipe, recipe)
                self.known[recipe.name]._ledger = self.ledger
            yield self.known[recipe.name]

        return opened


def run_once(
    pipe: Any, variant: Variant, arguments: dict[str, Any], device: str, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float | None]:
    """Seconds and FLOPs (None for other packages) of one call, per asked step."""
    with variant.open(pipe) as callable_pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, seconds = timed(partial(callable_pipe, **arguments, num_inference_steps=variant.steps), device, clock)
        report = getattr(callable_pipe, "report", None)
    return seconds / variant.per, report.flops / variant.per if report else None


def rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The timings, JSON-ready; the first one is the stock pipeline."""
    stock = timings[0]
    plain_flops = next((t.flops for t in timings if t.variant.name == "empty recipe"), None)
    return [
        {
            "name": t.variant.name,
            "note": t.variant.note,
            "steps": t.variant.steps,
            "asked": t.variant.per,
            "seconds_per_step": vars(spread(t.seconds)),
            "faster": vars(ratio(t.seconds, stock.seconds)),
            "flops_per_step": t.flops,
            "fewer_flops": plain_flops / t.flops if t.flops and plain_flops else None,
            "peak_bytes": t.peak_bytes,
        }
        for t in timings
    ]


def judged(timings: Sequence[Timing], promises: Sequence[tuple[str, str, str, float]]) -> list[dict[str, Any]]:
    """Promises about speed (sentence, own variant, rival, least ratio), each within the same repetition."""
    by_name = {t.variant.name: t.seconds for t in timings}
    return [
        {"promise": text, "faster": vars(found), "verdict": verdict(found, least)}
        for text, own, rival, least in promises
        if own in by_name and rival in by_name
        for found in [ratio(by_name[own], by_name[rival])]
    ]


def verdict(found: Spread, least: float) -> str:
    """A promise is kept by the median; where the repetitions lie on both sides of it, they decide nothing."""
    if found.median >= least:
        return "met"
    return "no difference beyond the noise" if found.high >= least else "missed"


def backend() -> str:
    """Which attention kernels torch may choose from here."""
    names = ("flash", "mem_efficient", "cudnn", "math")
    return "SDPA (" + ", ".join(n for n in names if getattr(torch.backends.cuda, f"{n}_sdp_enabled")()) + ")"


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def command_line(description: str | None, models: Sequence[str], size: int) -> argparse.ArgumentParser:
    """The options that all speed benchmarks have."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", default="float16" if cuda else "bfloat16", choices=("float32", "float16", "bfloat16")
    )
    parser.add_argument("--size", type=int, default=size, help="picture side in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures per call")
    parser.add_argument("--steps", type=int, default=10, help="steps of the presets")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=[models[0]], choices=tuple(models))
    parser.add_argument("--only", nargs="+", default=[], help="names of variants; the stock pipeline always runs")
    parser.add_argument("--compile", action="store_true", help="compile repeated blocks with inductor")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time, on a busy machine"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 with --clock cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The command line as fields of `Options`."""
    found = vars(parser.parse_args(arguments))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}

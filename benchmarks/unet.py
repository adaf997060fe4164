"""Speed of whole denoising loops on Stable Diffusion 1.5 and XL at real size, beside tomesd, DeepCache and fewer steps.

    python benchmarks/unet.py                                          # 2 CPU cores: about 10 minutes for sd15
    python benchmarks/unet.py --device cuda --models sd15 sdxl --steps 50 --repeats 5

Weights are random, so this says nothing about pictures; see fidelity.py for those. All variants run in one process, one
after the other within a repetition, and every ratio is taken against the stock pipeline of the same repetition.
A variant runs as few steps as its schedule needs to repeat; seconds are per step that the user asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

import torch

from benchmarks import peers
from benchmarks.models import build_pipeline, call_arguments
from benchmarks.unet_table import markdown
from diffaccel import GuidanceInterval, Recipe, SkipCache, TokenDownsampling, TokenMerging, presets, wrap
from diffaccel.bench import Spread, machine, ratio, rotated, spread, timed
from diffaccel.flops import FlopLedger
from diffaccel.output import write_text

Opener = Callable[[Any], AbstractContextManager[Any]]
RATIO, INTERVAL = 0.5, 3


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


def variants(model: str, options: Options) -> list[Variant]:
    """Everything that is timed on a model; the stock pipeline is first and the baseline."""
    ours, steps = Ours(), options.steps
    level = options.size // 8 // (2 if model == "sdxl" else 1)  # the largest token grid; SDXL has none at full size

    def own(name: str, count: int, *methods: Any) -> Variant:
        return Variant(name, count, ours.open(Recipe(name=name, methods=methods)))

    def preset(name: str) -> Variant:
        return Variant(name, steps, ours.open(presets()[name]), note=presets()[name].describe())

    cycle = 2 * INTERVAL
    cache = SkipCache(interval=INTERVAL, depth=0, order=0, full_last=0, min_evaluations=1)
    return [
        Variant("stock", 2, nullcontext),
        own("empty recipe", 2),
        own("guidance half", 2, GuidanceInterval(stop_fraction=0.5)),
        own(f"SkipCache({INTERVAL})", cycle, cache),
        Variant(f"DeepCache({INTERVAL})", cycle, partial(peers.deepcache, interval=INTERVAL), needs="DeepCache"),
        own(f"TokenMerging({RATIO})", 2, TokenMerging(ratio=RATIO, min_tokens=level**2)),
        Variant(f"tomesd({RATIO})", 2, partial(peers.tomesd, ratio=RATIO), needs="tomesd"),
        own("TokenDownsampling(2)", 2, TokenDownsampling(factor=2, min_tokens=level**2)),
        preset("balanced"),
        preset("fast"),
        Variant("half the steps", 1, nullcontext, asked=2),
    ]


def run_once(
    pipe: Any, variant: Variant, arguments: dict[str, Any], device: str, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float | None]:
    """Seconds and FLOPs (None for other packages) of one call, per asked step."""
    with variant.open(pipe) as callable_pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, seconds = timed(partial(callable_pipe, **arguments, num_inference_steps=variant.steps), device, clock)
        report = getattr(callable_pipe, "report", None)
    return seconds / variant.per, report.flops / variant.per if report else None


def benchmark(model: str, options: Options) -> dict[str, Any]:
    """Time all variants of one model; a JSON-ready result."""
    dtype = getattr(torch, options.dtype)
    pipe = build_pipeline(model, options.device, dtype)
    if options.compile:
        pipe.unet.compile_repeated_blocks(fullgraph=True)
    arguments = call_arguments(model, options.device, dtype, size=options.size, batch=options.batch)
    chosen = [v for v in variants(model, options) if not options.only or v.name in ("stock", *options.only)]
    missing = [v.name for v in chosen if v.needs and peers.installed()[v.needs] is None]
    chosen = [v for v in chosen if v.name not in missing]
    facts = machine(options.device)
    _warm_up(pipe, chosen, arguments, options)
    timings, decode = _repeat(pipe, chosen, arguments, options)
    return {
        "model": model,
        "machine": facts | peers.installed() | {"backend": backend()},
        "settings": vars(options) | {"out": "", "models": [model], "only": list(options.only)},
        "not installed": missing,
        "decode_seconds": vars(spread(decode)),
        "variants": _rows(timings),
        "targets": targets(timings),
    }


def _warm_up(pipe: Any, chosen: Sequence[Variant], arguments: dict[str, Any], options: Options) -> None:
    """On a GPU or with compilation every variant once; on a CPU, where a step takes seconds, what plans or counts.

    FLOPs of a kind of call are counted the first time it happens, which is slower: a cached call needs a second step.
    """
    whole = options.compile or options.device != "cpu"
    for variant in chosen:
        cached = variant.name.startswith("SkipCache")
        if whole or cached or variant.name in ("stock", "empty recipe") or variant.name.startswith("Token"):
            short = variant if whole else Variant(variant.name, 2 if cached else 1, variant.open)
            run_once(pipe, short, arguments, options.device)
            _say(f"warmed up: {variant.name}")


def _repeat(
    pipe: Any, chosen: Sequence[Variant], arguments: dict[str, Any], options: Options
) -> tuple[list[Timing], list[float]]:
    timings = {variant.name: Timing(variant) for variant in chosen}
    decode: list[float] = []
    for repetition in range(options.repeats):
        for variant in rotated(chosen, repetition):
            seconds, flops = run_once(pipe, variant, arguments, options.device, options.read_clock)
            timings[variant.name].seconds.append(seconds)
            timings[variant.name].flops = flops
            _say(f"repetition {repetition + 1} of {options.repeats}: {variant.name} {seconds:.3g} s per step")
        decode.append(_decode(pipe, options))
    return list(timings.values()), decode


@torch.no_grad()
def _decode(pipe: Any, options: Options) -> float:
    """Seconds of the autoencoder; the same for every variant, so it is timed on its own."""
    latents = torch.zeros(options.batch, 4, options.size // 8, options.size // 8)
    latents = latents.to(options.device, getattr(torch, options.dtype))
    return timed(lambda: pipe.vae.decode(latents), options.device, options.read_clock)[1]


def _rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
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
        }
        for t in timings
    ]


def targets(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """What this project promises about speed, each against its rival of the same repetition."""
    promises = [
        ("the empty recipe costs at most 1 %", "empty recipe", "stock", 0.99),
        ("SkipCache is not slower than DeepCache", f"SkipCache({INTERVAL})", f"DeepCache({INTERVAL})", 1.0),
        ("TokenMerging is not slower than tomesd", f"TokenMerging({RATIO})", f"tomesd({RATIO})", 1.0),
    ]
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", default="float16" if cuda else "bfloat16", choices=("float32", "float16", "bfloat16")
    )
    parser.add_argument("--size", type=int, default=512, help="picture side in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures per call")
    parser.add_argument("--steps", type=int, default=10, help="steps of the presets")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["sd15"], choices=("sd15", "sdxl"))
    parser.add_argument("--only", nargs="+", default=[], help="names of variants; the stock pipeline always runs")
    parser.add_argument("--compile", action="store_true", help="compile repeated blocks with inductor")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time, on a busy machine"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 with --clock cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    found = vars(parser.parse_args(arguments))
    return Options(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write unet-<model>-<device>.md and .json."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for model in options.models:
        result = benchmark(model, options)
        name = f"unet-{model}-{torch.device(options.device).type}"
        write_text(options.out / f"{name}.json", json.dumps(result, indent=2, default=str) + "\n", overwrite=True)
        write_text(options.out / f"{name}.md", markdown(result), overwrite=True)
        print(markdown(result))


if __name__ == "__main__":
    main()

"""Speed of whole denoising loops on Stable Diffusion 1.5 and XL at real size, beside tomesd, DeepCache and fewer steps.

    python benchmarks/unet.py                                          # 2 CPU cores: about 10 minutes for sd15
    python benchmarks/unet.py --device cuda --models sd15 sdxl --steps 50 --repeats 5

Weights are random, so this says nothing about pictures; see fidelity.py for those. All variants run in one process, one
after the other within a repetition, and every ratio is taken against the stock pipeline of the same repetition.
A variant runs as few steps as its schedule needs to repeat; seconds are per step that the user asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

import torch

from benchmarks import peers
from benchmarks.models import build_pipeline, call_arguments
from benchmarks.timing import Options, Ours, Timing, Variant, backend, command_line, judged, parsed, rows, run_once, say
from benchmarks.unet_table import markdown
from diffaccel import GuidanceInterval, Recipe, SkipCache, TokenDownsampling, TokenMerging, presets
from diffaccel.files.output import write_text
from diffaccel.measure.timing import machine, rotated, spread, timed

RATIO, INTERVAL = 0.5, 3


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
        "variants": rows(timings),
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
            say(f"warmed up: {variant.name}")


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
            say(f"repetition {repetition + 1} of {options.repeats}: {variant.name} {seconds:.3g} s per step")
        decode.append(_decode(pipe, options))
    return list(timings.values()), decode


@torch.no_grad()
def _decode(pipe: Any, options: Options) -> float:
    """Seconds of the autoencoder; the same for every variant, so it is timed on its own."""
    latents = torch.zeros(options.batch, 4, options.size // 8, options.size // 8)
    latents = latents.to(options.device, getattr(torch, options.dtype))
    return timed(lambda: pipe.vae.decode(latents), options.device, options.read_clock)[1]


def targets(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """What this project promises about speed, each against its rival of the same repetition."""
    promises = [
        ("the empty recipe costs at most 1 %", "empty recipe", "stock", 0.99),
        ("SkipCache is not slower than DeepCache", f"SkipCache({INTERVAL})", f"DeepCache({INTERVAL})", 1.0),
        ("TokenMerging is not slower than tomesd", f"TokenMerging({RATIO})", f"tomesd({RATIO})", 1.0),
    ]
    return judged(timings, promises)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    return Options(**parsed(command_line(__doc__, ("sd15", "sdxl"), 512), arguments))


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

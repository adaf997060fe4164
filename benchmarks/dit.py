"""Speed of whole denoising loops on diffusion transformers at real width, beside diffusers' caches, cache-dit and fewer steps.

    python benchmarks/dit.py --depth 4 --threads 1 --clock cpu         # SD3-medium, 4 of its 24 blocks
    python benchmarks/dit.py --device cuda --dtype bfloat16 --models sd3-medium flux-dev pixart-alpha hunyuan-dit

Weights are random, so this says nothing about pictures. All variants run in one process, one after the other within a
repetition, and every ratio is taken against the stock pipeline of the same repetition. A variant runs as few steps as its
schedule needs to repeat; seconds are per step that the user asked for. Caches that decide by content are set to hit
whenever they may, so that all have one full step in three: what is measured is what a hit saves, not how often one comes.
(Not named after the package `transformers`, which a file of that name beside the scripts would hide.)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

import torch

from benchmarks import peers
from benchmarks.dit_models import GUIDED, NAMES, build_pipeline, call_arguments
from benchmarks.timing import Options, Ours, Timing, Variant, backend, command_line, judged, parsed, rows, run_once, say
from diffaccel import Recipe, Unsupported
from diffaccel.engine.method import Method
from diffaccel.files.output import write_text
from diffaccel.measure.timing import PeakMemory, describe_machine, machine, rotated
from diffaccel.methods import registry
from diffaccel.models.model_map import describe

INTERVAL = 3
RATIOS = (0.5, 0.25)
ALWAYS = 1e9  # threshold of caches that shall hit whenever they may


@dataclass(frozen=True)
class DitOptions(Options):
    """The command line of this benchmark."""

    depth: int | None = None


def methods(model: str) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Own variants by name: method, steps to run, settings."""
    cache = {"interval": INTERVAL, "full_last": 0, "min_evaluations": 1}
    block = {"full_first": 1, "full_last": 0, "min_evaluations": 1, "max_hits": INTERVAL - 1}
    found: dict[str, tuple[str, int, dict[str, Any]]] = {
        **{
            f"RegionSampling({ratio})": (
                "region_sampling",
                3,  # a dense step and two region steps, the last one too
                {"ratio": ratio, "start": 1, "end": 1000, "resets": 1000, "min_evaluations": 1},
            )
            for ratio in RATIOS
        },
        "TokenMerging(0.5)": ("token_merging", 2, {"ratio": 0.5, "min_tokens": 1}),
        **{
            f"SparseAttention({keep})": (
                "sparse_attention",
                5,  # a dense step, and four that share their lists
                {"keep": keep, "start": 1, "reuse": 4, "min_tokens": 1},
            )
            for keep in RATIOS
        },
        f"SkipCache({INTERVAL})": ("skip_cache", INTERVAL, {**cache, "order": 0}),
        f"ResidualCache({INTERVAL})": ("residual_cache", INTERVAL, {**cache, "order": 0}),
        f"Forecast({INTERVAL})": ("forecast", INTERVAL, {**cache, "full_first": 1}),
        "BlockCache(first_block)": ("block_cache", INTERVAL, {**block, "kind": "first_block", "threshold": ALWAYS}),
        "BlockCache(dual_block)": (
            "block_cache",
            INTERVAL,
            {**block, "kind": "dual_block", "threshold": ALWAYS, "first_blocks": 1},
        ),
        "BlockCache(pyramid)": ("block_cache", 4, {**block, "kind": "pyramid"}),
        "StepReuse": (
            "step_reuse",
            4,  # three steps, one reused
            {"threshold": ALWAYS, "max_skips": 1, "full_first": 3, "full_last": 0, "min_evaluations": 1},
        ),
    }
    if model in GUIDED:
        found = {"guidance half": ("guidance_interval", 2, {"stop_fraction": 0.5}), **found}
    return found


def variants(pipe: Any, model: str, options: DitOptions) -> tuple[list[Variant], dict[str, str]]:
    """Everything that is timed on a model, the stock pipeline first, and what this model refuses, with the reason."""
    ours, known = Ours(), registry()
    found = [
        Variant("stock", 2, nullcontext),
        Variant("empty recipe", 2, ours.open(Recipe(name="empty recipe"))),
    ]
    refused: dict[str, str] = {}
    for name, (method, steps, settings) in methods(model).items():
        if _wanted(name, options):
            try:
                made = _checked(known[method], settings, pipe)
            except Unsupported as error:
                refused[name] = str(error)
            else:
                found.append(Variant(name, steps, ours.open(Recipe(name=name, methods=(made,)))))
    found += _peers(pipe)
    few = 2 if model == "pixart-alpha" else 1  # its pipeline takes one step for a distilled model
    found.append(Variant("half the steps", few, nullcontext, asked=2 * few))
    return [v for v in found if v.name == "stock" or _wanted(v.name, options)], refused


def _wanted(name: str, options: DitOptions) -> bool:
    return not options.only or name in options.only


def _checked(cls: type[Method], settings: dict[str, Any], pipe: Any) -> Method:
    method = cls(**settings)
    method.check(describe(pipe))
    return method


def _peers(pipe: Any) -> list[Variant]:
    """Caches of others with one full step in INTERVAL."""
    from diffusers import FirstBlockCacheConfig

    dit = Variant(f"cache-dit({INTERVAL})", INTERVAL, partial(peers.cache_dit, hits=INTERVAL - 1), needs="cache-dit")
    if not hasattr(pipe.transformer, "enable_cache"):
        return [dit]
    config = FirstBlockCacheConfig(threshold=ALWAYS)
    own = Variant("diffusers FirstBlockCache", INTERVAL, partial(peers.diffusers_cache, config=config))
    return [own, dit]


def benchmark(model: str, options: DitOptions) -> dict[str, Any]:
    """Time all variants of one model; a JSON-ready result."""
    dtype = getattr(torch, options.dtype)
    pipe = build_pipeline(model, options.device, dtype, options.depth)
    if options.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    arguments = call_arguments(
        model, options.device, dtype, size=options.size, batch=options.batch, config=pipe.transformer.config
    )
    chosen, refused = variants(pipe, model, options)
    versions = peers.installed(peers.TRANSFORMER_PACKAGES)
    missing = [v.name for v in chosen if v.needs and versions[v.needs] is None]
    chosen = [v for v in chosen if v.name not in missing]
    facts = machine(options.device)
    for variant in chosen:
        # FLOPs of a kind of call are counted the first time it happens, which is slower; on a CPU, where a step takes
        # seconds, nothing else needs a warm-up
        if options.device != "cpu" or variant.name == "empty recipe" or variant.name in methods(model):
            run_once(pipe, variant, arguments, options.device)
            say(f"warmed up: {variant.name}")
    timings = _repeat(pipe, chosen, arguments, options)
    return {
        "model": model,
        "machine": facts | versions | {"backend": backend()},
        "settings": vars(options) | {"out": "", "models": [model], "only": list(options.only)},
        "not installed": missing,
        "refused": refused,
        "variants": rows(timings),
        "targets": targets(timings),
    }


def _repeat(pipe: Any, chosen: Sequence[Variant], arguments: dict[str, Any], options: DitOptions) -> list[Timing]:
    timings = {variant.name: Timing(variant) for variant in chosen}
    for repetition in range(options.repeats):
        for variant in rotated(chosen, repetition):
            timing = timings[variant.name]
            with PeakMemory(options.device) as memory:
                seconds, flops = run_once(pipe, variant, arguments, options.device, options.read_clock)
            timing.seconds.append(seconds)
            timing.flops = flops
            if memory.bytes is not None:
                timing.peak_bytes = max(timing.peak_bytes or 0, memory.bytes)
            say(f"repetition {repetition + 1} of {options.repeats}: {variant.name} {seconds:.3g} s per step")
    return list(timings.values())


def targets(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """What this project promises about speed on transformers."""
    return region_bounds(timings) + judged(
        timings,
        [
            ("the empty recipe costs at most 1 %", "empty recipe", "stock", 0.99),
            (
                "BlockCache is not slower than the bare cache of diffusers",
                "BlockCache(first_block)",
                "diffusers FirstBlockCache",
                1.0,
            ),
        ],
    )


def region_bounds(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Seconds of region sampling against the seconds that its FLOPs would allow: at least 1 / 1.1 as fast."""
    by_name = {t.variant.name: t for t in timings}
    plain = by_name.get("empty recipe")
    names = [f"RegionSampling({ratio})" for ratio in RATIOS]
    if plain is None or not plain.flops:
        return []
    bounds = {
        name: [seconds * by_name[name].flops / plain.flops for seconds in plain.seconds]
        for name in names
        if name in by_name and by_name[name].flops
    }
    found = []
    for name, bound in bounds.items():
        ideal = Timing(Variant("bound", 1, nullcontext), bound)
        promise = [(f"{name} takes at most 10 % longer than its FLOPs", name, "bound", 1 / 1.1)]
        found += judged([by_name[name], ideal], promise)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    settings, facts = result["settings"], result["machine"]
    depth = "all blocks" if settings["depth"] is None else f"{settings['depth']} blocks"
    clock = {"wall": "Wall seconds", "cpu": "Processor seconds of this process"}[settings["clock"]]
    others = "".join(f", {name} {facts[name]}" for name in peers.TRANSFORMER_PACKAGES if facts.get(name))
    ways = "alternating; medians, range in brackets. Random weights; no text encoder, no decoder."
    side = settings["size"]
    memory = all(row["peak_bytes"] is not None for row in result["variants"])
    compiled = ", repeated blocks compiled by inductor" if settings.get("compile") else ""
    lines = [
        f"## {result['model']}, {depth}, {side} x {side}, batch {settings['batch']}, {settings['dtype']}{compiled}",
        "",
        f"{describe_machine(facts)}{others}. Attention: {facts['backend']}. {clock}, {settings['repeats']} repetitions, {ways}",
        "",
        f"| variant | steps | s/step | faster than stock | fewer FLOPs |{' GiB beyond the weights |' if memory else ''}",
        f"| --- | --- | --- | --- | --- |{' --- |' if memory else ''}",
        *(_row(row, memory=memory) for row in result["variants"]),
        "",
        *(_verdict(target) for target in result["targets"]),
        *(f"- {name} does not apply: {reason}" for name, reason in result["refused"].items()),
    ]
    if result["not installed"]:
        lines.append(f"- not installed, so not measured: {', '.join(result['not installed'])}")
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any], *, memory: bool) -> str:
    faster, flops = row["faster"], row["fewer_flops"]
    cells = [
        row["name"],
        str(row["steps"]),
        f"{row['seconds_per_step']['median']:.3g}",
        f"{faster['median']:.3f}x ({faster['low']:.3f}-{faster['high']:.3f})",
        f"{flops:.2f}x" if flops else "",
    ]
    if memory:
        cells.append(f"{row['peak_bytes'] / 2**30:.2f}")
    return f"| {' | '.join(cells)} |"


def _verdict(target: dict[str, Any]) -> str:
    faster, word = target["faster"], target["verdict"]
    word = word if word == "met" else f"**{word}**"
    return f"- {target['promise']}: {word}, {faster['median']:.3f}x as fast ({faster['low']:.3f}-{faster['high']:.3f})"


def parse(arguments: Sequence[str] | None = None) -> DitOptions:
    """The command line."""
    parser = command_line(__doc__, NAMES, 1024)
    parser.add_argument("--depth", type=int, default=None, help="number of blocks; without it the real one")
    return DitOptions(**parsed(parser, arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write dit-<model>-<device>.md and .json."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for model in options.models:
        result = benchmark(model, options)
        name = f"dit-{model}-{torch.device(options.device).type}"
        write_text(options.out / f"{name}.json", json.dumps(result, indent=2, default=str) + "\n", overwrite=True)
        write_text(options.out / f"{name}.md", markdown(result), overwrite=True)
        print(markdown(result))


if __name__ == "__main__":
    main()

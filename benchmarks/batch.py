"""What `run_batch` costs beside a bare loop over the same wrapped pipeline.

Bare: the pipeline called batch by batch with one generator per picture; pictures are dropped. Batch: the same calls with
everything around them: claims, metadata, PNG encoding, hashing, waiting for the disk, journal, manifest. Bare runs twice in
each repetition, so that the noise stands beside the figure. The target is 97 % of the bare loop's pictures per second.

    python benchmarks/batch.py                       # the bundled model on this machine's CPU
    python benchmarks/batch.py --device cuda --rows 256 --batch-size 16
    python benchmarks/batch.py --clock cpu           # processor time, on a machine that does other work as well
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import diffaccel
from diffaccel.batch import BatchSettings, plan_batch, run_batch
from diffaccel.loading import default_guidance, load_pipeline
from diffaccel.measure.timing import Spread, describe_machine, machine, ratio, rotated, spread, timed

RESULTS = Path(__file__).parent / "results"
TARGET = 0.97
CLOCK_WORDS = {"wall": "Seconds on the clock", "cpu": "Processor seconds of this process, writing included"}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def prompts(count: int) -> list[str]:
    """Prompts of the bundled model."""
    return [f"a {('red', 'blue', 'green')[i % 3]} {('circle', 'square', 'star')[i // 3 % 3]}" for i in range(count)]


def bare(fast: Any, options: argparse.Namespace) -> None:
    """The loop that people write."""
    texts = prompts(options.rows)
    for start in range(0, len(texts), options.batch_size):
        part = texts[start : start + options.batch_size]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))]
        fast(part, num_inference_steps=options.steps, guidance_scale=options.guidance, generator=generators)


def batch(fast: Any, options: argparse.Namespace, contact_sheet: bool = False) -> None:
    """The same with `run_batch`, into an empty folder."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = BatchSettings(
            steps=options.steps,
            guidance_scale=options.guidance,
            batch_size=options.batch_size,
            contact_sheet=contact_sheet,
        )
        rows = [{"prompt": text} for text in prompts(options.rows)]
        report = run_batch(plan_batch(rows, folder, settings), fast)
    assert report.exit_code == 0


def measure(fast: Any, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each variant, one entry per repetition; every repetition starts with another one."""
    variants = {"bare": bare, "bare again": bare, "run_batch": batch}
    warm = argparse.Namespace(**{**vars(options), "rows": options.batch_size})
    bare(fast, warm), batch(fast, warm)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(options.repeats):
        for name, variant in rotated(list(variants.items()), repetition):
            _, elapsed = timed(partial(variant, fast, options), options.device, CLOCKS[options.clock])
            seconds[name].append(elapsed)
            print(f"{repetition + 1}/{options.repeats} {name:<11} {elapsed:.2f} s", flush=True)
    return seconds


def table(facts: dict[str, Any], seconds: dict[str, list[float]], options: argparse.Namespace) -> str:
    """The Markdown table."""
    lines = [
        f"## {options.model}, recipe {options.recipe}, {options.rows} pictures in batches of {options.batch_size}",
        "",
        f"{describe_machine(facts)}. {CLOCK_WORDS[options.clock]}, {options.steps} steps, {options.repeats} repetitions, "
        + "alternating; medians, range in brackets. Ratios are taken within a repetition.",
        "",
        "| variant | seconds | pictures/s | share of the bare loop |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in seconds.items():
        share = ratio(values, seconds["bare"])
        lines.append(
            f"| {name} | {spread(values).median:.2f} | {options.rows / spread(values).median:.2f} | {percent(share)} |"
        )
    met = ratio(seconds["run_batch"], seconds["bare"]).median >= TARGET
    lines += ["", f"- at least {TARGET:.0%} of the bare loop: {'met' if met else 'missed'}"]
    return "\n".join(lines) + "\n"


def percent(share: Spread) -> str:
    """A ratio with its range."""
    return f"{100 * share.median:.1f} % ({100 * share.low:.1f}-{100 * share.high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-sd")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=None, help="Where the pictures go, and are removed from.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.guidance = default_guidance(options.model)
    facts = machine(options.device)
    fast = diffaccel.wrap(load_pipeline(options.model, device=options.device), options.recipe)
    fast.set_progress_bar_config(disable=True)
    seconds = measure(fast, options)
    text = table(facts, seconds, options)
    print(text)
    target = options.output / f"batch-{torch.device(options.device).type}"
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("output", "folder")}
    target.with_suffix(".json").write_text(
        json.dumps({"machine": facts, "settings": settings, "seconds": seconds}) + "\n"
    )
    target.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()

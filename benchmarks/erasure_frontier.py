"""What is kept at which strength of erasing: each closed form with its strength swept, on the same prompts and seeds.

    python benchmarks/erasure_frontier.py                                            # four shapes at once
    python benchmarks/erasure_frontier.py --tasks red+green+yellow+blue --pictures 256 --erased-pictures 24

A single setting per method compares strengths, not methods: here the erased share is on one axis, the kept change on the
other, and methods are compared where they erase alike. "phrases" are the rows that UCE and SPEED are published with, the
last token of short phrases; "prompts" are all rows of whole prompts, for either side. Results are written after every edit;
what is in the file is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

import torch

from benchmarks.erasure_measure import Bench, measure
from benchmarks.erasure_table import change, share, table
from benchmarks.erasure_tasks import SIBLING, Task, concepts, keep_list, world_prompts
from diffaccel.erasure.proof.attacks import Budget
from diffaccel.erasure.proof.recording import Drawing
from diffaccel.errors import DiffaccelError
from diffaccel.files.output import write_text
from diffaccel.measure.rows import json_value
from diffaccel.measure.timing import describe_machine, machine
from diffaccel.miniatures import load_judge, load_miniature, recommended_guidance

NULL = {"prior_filter": False, "augment": 0}  # the preserved rows as they are, as in the paper's run with 100 people
PHRASES = {"general": False}  # everyday words are outside this world: they break into letters
PROMPTS = {"general": False, "tokens": "all", "keep_tokens": "all", "paddings": 8}

# family, method, settings that stay, setting that is swept, its values
SWEEPS: tuple[tuple[str, str, Mapping[str, Any], str, tuple[float, ...]], ...] = (
    ("UCE, phrases", "uce", PHRASES, "erase_weight", (1.0, 0.2, 8.0, 0.05)),
    ("UCE as published, phrases", "uce", {}, "erase_weight", (1.0,)),
    (
        "SPEED without filter, phrases",
        "speed",
        {**PHRASES, **NULL, "threshold": 1e-4},
        "ridge",
        (0.05, 10.0, 50.0, 3.0),
    ),
    ("SPEED as published, phrases", "speed", {}, "ridge", (1.0,)),
    ("UCE, prompts", "context", {"general": False}, "erase_weight", (0.03, 0.01, 0.25, 0.1, 0.5)),
    ("SPEED, prompts", "speed", {**PROMPTS, **NULL, "threshold": 1.0}, "ridge", (1000.0, 30.0, 4000.0, 100.0, 300.0)),
    ("UCE of values, phrases", "uce", {**PHRASES, "projections": "values"}, "erase_weight", (1.0,)),
    ("UCE of values, prompts", "context", {"general": False, "projections": "values"}, "erase_weight", (0.03, 0.01)),
)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was measured before."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def point(bench: Bench, task: Task, sweep: tuple[Any, ...], value: float, prompts: int) -> dict[str, Any]:
    """One edit, measured."""
    from diffaccel.erasure.solve import erase

    family, method, fixed, name, _ = sweep
    whole = family.endswith("prompts")
    keep = keep_list(task, "prompts" if whole else "words")
    edit = erase(
        bench.pipe,
        concepts(task, True, SIBLING),
        keep=keep,
        prompts=world_prompts()[:prompts] if whole else (),
        method=method,
        **{**fixed, name: value},
    )
    return {**measure(bench, edit, task, keep, []), "diagnostics": dict(edit.diagnostics["sequence"])}


def page(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    parts = ["# Erasing against keeping", __doc__ or "", describe_machine(facts)]
    for name in dict.fromkeys(row["task"] for row in rows):
        own = sorted((row for row in rows if row["task"] == name), key=lambda r: (r["family"], -r["erased"]["mean"]))
        conditions = ", ".join(f"{key} {value:g}" for key, value in own[0]["conditions"].items())
        parts += [f"## {name}", conditions, table(_columns(own))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        "form, rows": [row["family"] for row in rows],
        "setting": [f"{row['setting']} {row['value']:g}" for row in rows],
        "erased %": [share(row["erased"]) for row in rows],
        "kept, classes": [f"{100 * row['kept_change']:+.1f}" for row in rows],
        "kept, prompts": [change(row["kept_all"]) for row in rows],
        "correct": [change(row["correct_change"]) for row in rows],
        "worst class": [f"{row['worst']['concept']} {change(row['worst']['change'])}" for row in rows],
        "kept pictures, rms": [f"{row['pixels']:.4f}" for row in rows],
        "null %": ["" if row["null_drift"] is None else f"{100 * row['null_drift']:.2f}" for row in rows],
        "null directions": [str(row["diagnostics"].get("null_directions", "")) for row in rows],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["circle+star+heart+square"])
    parser.add_argument("--families", nargs="+", help="beginnings of the names of the forms; default: all")
    parser.add_argument(
        "--pictures", type=int, default=192, help="prompts about everything; those without the concepts"
    )
    parser.add_argument("--erased-pictures", type=int, default=12, help="prompts per erased concept")
    parser.add_argument("--prompts", type=int, default=400, help="whole prompts that edits are solved from")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path, facts = options.out / "erasure-frontier.json", machine("cpu")
    rows = rows_of(path)
    names = ("pictures", "erased_pictures", "prompts", "steps", "seed")
    conditions = {name: getattr(options, name) for name in names}
    bench = None
    for task in map(Task, options.tasks):
        for sweep in SWEEPS:
            if options.families and not sweep[0].startswith(tuple(options.families)):
                continue
            for value in sweep[-1]:
                key = [task.name, sweep[0], value, conditions]
                if any(row["key"] == key for row in rows):
                    continue
                bench = bench or _bench(options)
                started = time.perf_counter()
                try:
                    found = point(bench, task, sweep, value, options.prompts)
                except DiffaccelError as error:
                    print(f"{task.name}, {sweep[0]}, {value:g} refused: {error}", flush=True)
                    continue
                row = {"key": key, "task": task.name, "family": sweep[0], "setting": sweep[3], "value": value, **found}
                rows.append(json_value({**row, "conditions": conditions}))
                text = json.dumps({"machine": facts, "rows": rows}, indent=1, allow_nan=False) + "\n"
                write_text(path, text, overwrite=True)
                seconds = time.perf_counter() - started
                cells = {title: cells[0] for title, cells in _columns(rows[-1:]).items()}
                print(f"{task.name} ({seconds:.0f} s): {cells}", flush=True)
    write_text(path.with_suffix(".md"), page(rows, facts), overwrite=True)


def _bench(options: argparse.Namespace) -> Bench:
    pipe: Any = load_miniature("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    drawing = Drawing(options.steps, recommended_guidance("shapes-sd"), options.seed, 16)
    return Bench(pipe, load_judge(), drawing, Budget(), options.pictures, options.erased_pictures, 0)


if __name__ == "__main__":
    main()

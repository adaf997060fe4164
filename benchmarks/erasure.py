"""What erasure removes, spares and withstands, on a bundled model with its judge: every method, the same prompts and seeds.

    python benchmarks/erasure.py                                       # everything (hours on a CPU, minutes on a GPU)
    python benchmarks/erasure.py --concepts circle red joint --methods uce speed --pictures 128 --steps 15
    python benchmarks/erasure.py --subject shapes-sd3 --device cuda --batch 64
    python benchmarks/erasure.py --set speed.rho=0.05 --label "rho 0.05"     # a setting of one method, as another row

Results are written after every edit, and what is in the file already is not measured again, so several processes may share
one file (`--share 0/2` and `--share 1/2`). `--merge` adds the rows of other files; `--render` only writes the page again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

import torch
from torch import Tensor

from benchmarks.erasure_measure import Bench, measure
from benchmarks.erasure_table import line, page
from benchmarks.erasure_tasks import SIBLING, Keep, Task, concepts, keep_list, tasks, world_prompts
from benchmarks.subjects import SUBJECTS
from diffaccel.erasure.proof.attacks import ATTACKS, Budget
from diffaccel.erasure.proof.recording import Drawing
from diffaccel.errors import DiffaccelError
from diffaccel.files.output import write_text
from diffaccel.measure.rows import json_value
from diffaccel.measure.timing import machine
from diffaccel.miniatures import load_folder, load_judge, load_miniature, recommended_guidance

METHODS = ("uce", "rece", "speed", "mace", "context")


@dataclass(frozen=True)
class Options:
    """The command line."""

    subject: str
    methods: list[str]
    concepts: list[str]
    keep: Keep
    synonyms: str
    anchor: str
    set: list[str]
    label: str
    pictures: int
    erased_pictures: int
    attacks: list[str]
    attack_pictures: int
    attack_iterations: int
    attack_radius: float
    attack_regulariser: float
    attack_length: float
    steps: int
    guidance: float | None
    seed: int
    batch: int
    device: str
    threads: int
    without: list[str]
    out: Path
    stem: str
    merge: list[Path]
    render: bool
    restart: bool
    share: str

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be equal for two rows to be comparable."""
        names = [name for name in vars(self) if name.startswith("attack_")]
        names += ["pictures", "erased_pictures", "steps", "seed"]
        return {name: getattr(self, name) for name in names} | {"guidance": self.scale}

    @property
    def scale(self) -> float:
        """Guidance scale."""
        return recommended_guidance(self.subject) if self.guidance is None else self.guidance

    def parameters(self, method: str) -> dict[str, Any]:
        """Settings of one method from `--set method.name=value`, values as JSON or else text."""
        found = {}
        for item in self.set:
            name, value = item.split("=", 1)
            owner, key = name.split(".", 1)
            if owner in (method, "all"):
                found[key] = _json_or_text(value)
        return found

    def key(self, method: str, task: Task) -> list[Any]:
        """What tells rows apart."""
        keep, parameters = self.keep_of(method), self.parameters(method)
        return [self.subject, method, task.name, keep, self.synonyms, self.anchor, parameters]

    def keep_of(self, method: str) -> Keep:
        """What is preserved; "context" reads it from prompts."""
        return "prompts" if method == "context" else self.keep


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class Results:
    """The rows measured so far, in one JSON file that is rewritten after each."""

    def __init__(self, path: Path, facts: Mapping[str, Any], *, restart: bool) -> None:
        self.path, self.facts = path, dict(facts)
        self.refused: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = [] if restart or not path.exists() else read_rows(path)

    def has(self, key: Sequence[Any], conditions: Mapping[str, Any], attacks: Sequence[str]) -> bool:
        """Whether this was measured under these conditions, with these attacks at least."""
        return any(
            row["key"] == list(key) and row["conditions"] == dict(conditions) and set(attacks) <= set(row["attacks"])
            for row in self.rows
        )

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows, the newest of each key and conditions; a process that writes the same file at the same time loses nothing."""
        others = read_rows(self.path) if self.path.exists() and self.rows else []
        merged = {
            json.dumps([row["key"], row["conditions"]]): row for row in (*self.rows, *others, *map(json_value, rows))
        }
        self.rows = list(merged.values())
        text = (
            json.dumps({"machine": self.facts, "refused": self.refused, "rows": self.rows}, indent=1, allow_nan=False)
            + "\n"
        )
        write_text(self.path, text, overwrite=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that this script wrote."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def load(options: Options, folder: Path | None = None) -> Any:
    """The subject, or another model of its kind."""
    pipe: Any = load_miniature(options.subject) if folder is None else load_folder(folder)
    pipe.to(options.device).set_progress_bar_config(disable=True)
    return pipe


def prepare(options: Options) -> Bench:
    """Everything that all edits share; draws the unedited pool."""
    drawing = Drawing(options.steps, options.scale, options.seed, options.batch, SUBJECTS[options.subject].call)
    budget = Budget(
        regulariser=options.attack_regulariser,
        length=options.attack_length,
        radius=options.attack_radius,
        iterations=options.attack_iterations,
    )
    replacements = {name: load(options, Path(path)) for name, path in (item.split("=", 1) for item in options.without)}
    return Bench(
        load(options),
        load_judge(),
        drawing,
        budget,
        options.pictures,
        options.erased_pictures,
        options.attack_pictures,
        replacements,
    )


def run(options: Options, results: Results) -> None:
    """Measure what is missing, one edit after the other."""
    first, processes = (int(part) for part in options.share.split("/"))
    pairs = [(method, task) for task in tasks(options.concepts) for method in options.methods]
    wanted = [
        (method, task)
        for method, task in pairs[first::processes]
        if not results.has(options.key(method, task), options.conditions, options.attacks)
    ]
    if not wanted:
        return
    bench = prepare(options)
    for done, (method, task) in enumerate(wanted):
        started = time.perf_counter()
        try:
            row = one(bench, options, method, task)
        except DiffaccelError as error:  # a method may refuse a task; the others still count
            results.refused[f"{options.subject}, {task.name}, {method}"] = str(error)
            print(f"{done + 1} of {len(wanted)}: {task.name}, {method} refused: {error}", flush=True)
            continue
        results.add([row])
        print(
            f"{done + 1} of {len(wanted)} ({time.perf_counter() - started:.0f} s): {line(json_value(row))}", flush=True
        )


def one(bench: Bench, options: Options, method: str, task: Task) -> dict[str, Any]:
    """Erase, measure and undo."""
    edit, seconds = make_edit(bench.pipe, options, method, task)
    kept = keep_list(task, options.keep_of(method))
    row = measure(bench, edit, task, kept, options.attacks)
    return {
        "key": options.key(method, task),
        "subject": options.subject,
        "method": method,
        "label": options.label,
        "task": task.name,
        "group": task.group,
        "conditions": options.conditions,
        "seconds": seconds,
        "digest": edit.digest,
        "parameters": _plain(dict(edit.parameters)),
        "diagnostics": _plain(dict(edit.diagnostics)),
        **row,
    }


def make_edit(pipe: Any, options: Options, method: str, task: Task) -> tuple[Any, float]:
    """The edit and the seconds it took."""
    from diffaccel.erasure.solve import erase

    keep = options.keep_of(method)
    # Everyday words are outside this world: they break into letters and would be preserved instead of its own words.
    settings: dict[str, Any] = {"general": False, "prompts": world_prompts()} if keep == "prompts" else {}
    started = time.perf_counter()
    edit = erase(
        pipe,
        concepts(task, options.synonyms == "listed", options.anchor),
        keep=keep_list(task, keep),
        method=method,
        **settings | options.parameters(method),
    )
    return edit, time.perf_counter() - started


def _plain(value: Any) -> Any:
    """JSON form of what a method says about itself; tensors as lists, whatever else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="shapes-sd", choices=SUBJECTS, help="bundled model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--concepts",
        nargs="+",
        default=["shapes", "colours", "textures", "joint"],
        help="shapes, colours, textures, joint, single words, or words joined with + that are erased together",
    )
    parser.add_argument("--keep", default="words", choices=get_args(Keep))
    parser.add_argument("--synonyms", default="listed", choices=("listed", "none"), help="whether erase is told them")
    parser.add_argument(
        "--anchor",
        default=SIBLING,
        help='what concepts are replaced by; "" is the empty prompt; default: the next word of the same kind',
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD.NAME=VALUE", help="settings; METHOD may be all")
    parser.add_argument("--label", default="", help="name of these settings in the table")
    parser.add_argument(
        "--pictures", type=int, default=320, help="prompts about everything; more than 192 kept for Frechet"
    )
    parser.add_argument("--erased-pictures", type=int, default=64, help="prompts per erased concept, synonyms included")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--attack-pictures", type=int, default=24, help="attacked prompts per edit")
    parser.add_argument("--attack-iterations", type=int, default=40)
    # captions of shapes-sd that differ in the shape lie 0.7 of their norm apart, those that differ in a synonym 0.04
    parser.add_argument(
        "--attack-radius", type=float, default=0.3, help="of the gradient attack, in norms of the prompt"
    )
    parser.add_argument("--attack-regulariser", type=float, default=1e-3, help="of the closed form, relative")
    parser.add_argument("--attack-length", type=float, default=1.5, help="of its rows, in longest rows of real prompts")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, help="default: the recommended one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: its own choice")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="CONCEPT=FOLDER", help="models trained without it: the floor"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--stem", default="erasure", help="of the two files written")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="files with further rows")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="measure every Nth edit only, from the Ith")
    parser.add_argument("--restart", action="store_true", help="forget what was measured before")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page and its figures."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.stem}.json"
    results = Results(path, machine(options.device), restart=options.restart)
    if options.merge:
        results.add([row for other in options.merge for row in read_rows(other)])
    try:
        if not options.render:
            run(options, results)
    finally:
        text = page(results.rows, results.facts, results.refused)
        write_text(path.with_suffix(".md"), text, overwrite=True)
        print(text)


if __name__ == "__main__":
    main()

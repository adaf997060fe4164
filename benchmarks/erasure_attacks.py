"""How far an attacker has to go: success of attacks against their radius, for edits with and without hardening.

    python benchmarks/erasure_attacks.py                                      # circle and red
    python benchmarks/erasure_attacks.py --inversion circle --iterations 150   # also learn a new word

An attack without limits brings everything back, since every edit of this kind is an invertible map of the text; it says
nothing about which edit is better. Here the changed embedding must stay within a ball around the prompt's own, of
`radius` times its norm. "near" is the best such embedding for the text projections in closed form; "gradient" descends on
the denoiser's predictions. "Mean" is the success averaged over the radii, the normalised area under the curve. Results
are written after every attack; what is in the file is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a checkout that is not installed

import torch

from benchmarks.erasure_frontier import rows_of
from benchmarks.erasure_table import share, table
from benchmarks.erasure_tasks import SIBLING, Task, concepts, keep_list, world_prompts
from diffaccel.erasure.proof import attacks
from diffaccel.erasure.proof.attacks import Budget
from diffaccel.erasure.proof.probes import attributes, world_cases
from diffaccel.erasure.proof.recognition import seen
from diffaccel.erasure.proof.recording import SEQUENCE, Drawing, draw
from diffaccel.erasure.proof.scores import binomial
from diffaccel.files.output import write_text
from diffaccel.measure.rows import json_value
from diffaccel.measure.timing import describe_machine, machine
from diffaccel.miniatures import load_judge, load_miniature, recommended_guidance

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "uce": ("uce", {}),
    "rece, 1 round": ("rece", {}),
    "rece, 3 rounds": ("rece", {"rounds": 3}),
    "context": ("context", {}),
    "context, 3 rounds": ("context", {"rounds": 3}),
}
RADII = (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15)
GRADIENT_RADII = (0.03, 0.1)
SEED = 100_000


class Attacker:
    """One concept: prompts, what the unedited model does with them, and how often an edit's attack shows it."""

    def __init__(self, pipe: Any, judge: Any, concept: str, options: argparse.Namespace) -> None:
        self.pipe, self.judge, self.concept, self.options = pipe, judge, concept, options
        self.drawing = Drawing(options.steps, recommended_guidance("shapes-sd"), options.seed, options.prompts)
        self.budget = Budget(iterations=options.iterations)
        prompts = [case.prompt for case in world_cases(concept, options.prompts, seed=options.seed)]
        seeds = range(options.seed + SEED, options.seed + SEED + len(prompts))
        named = [concept] * len(prompts)
        self.material = attacks.prepare(pipe, prompts, named, list(seeds), self.drawing, self.budget)

    def success(self, name: str, radius: float) -> dict[str, Any]:
        """Share of pictures that show the concept under an attack; radius 0 is no attack."""
        budget, encoding = replace(self.budget, radius=radius), attacks.join(self.material.encodings)
        losses: tuple[float, ...] = ()
        if radius or name == "inversion":
            found = attacks.BY_NAME[name](self.pipe, self.material, budget, self.drawing)
            moved = _distance(encoding, found.encoding)
            encoding, losses = found.encoding, found.losses
        else:
            moved = 0.0
        pictures = draw(self.pipe, encoding, self.drawing, seeds=self.material.seeds)
        hits = [seen(reading, attributes(self.concept)) for reading in self.judge.read(pictures)]
        return {"after": binomial(hits), "moved": moved, "losses": list(losses)}


def _distance(before: Any, after: Any) -> float:
    """Mean distance of the embeddings, in norms of the prompt's own."""
    old, new = (found.tensors[SEQUENCE].flatten(1) for found in (before, after))
    return float(((new - old).norm(dim=1) / old.norm(dim=1)).mean())


def make_edit(pipe: Any, concept: str, form: str, prompts: int) -> Any:
    """The edit of one form."""
    from diffaccel.erasure.solve import erase

    method, settings = FORMS[form]
    whole = form.startswith("context")
    return erase(
        pipe,
        concepts(Task(concept), True, SIBLING),
        keep=keep_list(Task(concept), "prompts" if whole else "words"),
        prompts=world_prompts()[:prompts] if whole else (),
        method=method,
        **settings | ({"general": False} if whole else {}),
    )


def attacks_of(options: argparse.Namespace, concept: str) -> list[tuple[str, float]]:
    """Name and radius of each attack."""
    found = [("closed_form_near", radius) for radius in options.radii]
    found += [("gradient", radius) for radius in options.gradient]
    return [*found, ("inversion", 0.0)] if concept in options.inversion else found


def page(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    parts = ["# Attacks within a radius", __doc__ or "", describe_machine(facts)]
    conditions = {json.dumps(row["conditions"]): row["conditions"] for row in rows}
    parts += [", ".join(f"{key} {value:g}" for key, value in c.items()) for c in conditions.values()]
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        parts += [f"## {attack.replace('_', ' ')}", table(_columns(own))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    pairs = list(dict.fromkeys((row["concept"], row["form"]) for row in rows))
    radii = sorted({row["radius"] for row in rows})
    place = {(row["concept"], row["form"], row["radius"]): row for row in rows}
    columns = {"concept": [concept for concept, _ in pairs], "edit": [form for _, form in pairs]}
    for radius in radii:
        cells = [place.get((*pair, radius)) for pair in pairs]
        columns[f"radius {radius:g}"] = ["" if cell is None else share(cell["after"]) for cell in cells]
    if len(radii) > 1:
        whole = [[place.get((*pair, radius)) for radius in radii if radius] for pair in pairs]
        columns["mean"] = [_mean(cells) for cells in whole]
    if rows[0]["attack"] == "inversion":
        columns["loss"] = [" to ".join(f"{x:.3g}" for x in place[(*pair, radii[0])]["losses"]) for pair in pairs]
    return columns


def _mean(cells: Sequence[Mapping[str, Any] | None]) -> str:
    known = [100 * cell["after"]["mean"] for cell in cells if cell is not None]
    return f"{sum(known) / len(known):.1f}" if len(known) == len(cells) else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page and its figures."""
    from diffaccel.edits.apply import apply_edit, remove_edit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["circle", "red"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=[*FORMS, "none"])
    parser.add_argument("--radii", nargs="*", type=float, default=list(RADII), help="of the closed form")
    parser.add_argument("--gradient", nargs="*", type=float, default=list(GRADIENT_RADII), help="radii of the descent")
    parser.add_argument("--inversion", nargs="*", default=[], help="concepts for which a new word is learned too")
    parser.add_argument("--prompts", type=int, default=12, help="attacked prompts")
    parser.add_argument("--contexts", type=int, default=400, help="whole prompts that edits are solved from")
    parser.add_argument("--iterations", type=int, default=20, help="of the gradient attack and of the inversion")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path, facts = options.out / "erasure-attacks.json", machine("cpu")
    rows = rows_of(path)
    conditions = {name: getattr(options, name) for name in ("prompts", "contexts", "steps", "seed")}
    pipe: Any = load_miniature("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge()
    for concept in options.concepts:
        attacker: Attacker | None = None
        for form in options.forms:
            missing = []
            for name, radius in attacks_of(options, concept):
                turns = options.iterations if name in ("gradient", "inversion") else 0
                key = [concept, form, name, radius, turns, conditions]
                if not any(row["key"] == key for row in rows):
                    missing.append((key, name, radius))
            if not missing:
                continue
            attacker = attacker or Attacker(pipe, judge, concept, options)
            edit = None if form == "none" else make_edit(pipe, concept, form, options.contexts)
            if edit is not None:
                apply_edit(pipe, edit)
            try:
                for key, name, radius in missing:
                    started = time.perf_counter()
                    row = {"concept": concept, "form": form, "attack": name, "radius": radius}
                    found = {"key": key, **row, **attacker.success(name, radius), "conditions": conditions}
                    rows.append(json_value(found))
                    text = json.dumps({"machine": facts, "rows": rows}, indent=1, allow_nan=False) + "\n"
                    write_text(path, text, overwrite=True)
                    seconds = time.perf_counter() - started
                    print(
                        f"{concept}, {form}, {name} {radius:g}: {share(rows[-1]['after'])} ({seconds:.0f} s)",
                        flush=True,
                    )
            finally:
                if edit is not None:
                    remove_edit(pipe, edit)
    write_text(path.with_suffix(".md"), page(rows, facts), overwrite=True)


if __name__ == "__main__":
    main()

"""prove(pipe, edit): what an edit removed, what it spared, and how far attacks bring the concept back.

The same prompts and seeds are drawn before and after the edit. Who decides what a picture shows is the judge on the
bundled models, else the user's classifier, else nobody: then the proof is pictures and says so. A proof is about the
prompts and attacks it names; it does not show that the knowledge is gone from the weights.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.erasure.proof import attacks as attacking
from diffaccel.erasure.proof.attacks import ATTACKS, Attacked, Budget, Material
from diffaccel.erasure.proof.figures import AttackResult
from diffaccel.erasure.proof.null_drift import drift, null_states, predict
from diffaccel.erasure.proof.probes import (
    TEMPLATES,
    Probe,
    attributes,
    siblings,
    template_probes,
    world_probes,
)
from diffaccel.erasure.proof.recognition import (
    Classifier,
    JudgeRecogniser,
    ProofError,
    Recogniser,
    find_recogniser,
)
from diffaccel.erasure.proof.recording import Drawing, draw
from diffaccel.erasure.proof.result import Proof
from diffaccel.erasure.proof.rows import Features, Means, check_reference, frechet, score_rows
from diffaccel.erasure.proof.scope import untouched, without_edit
from diffaccel.erasure.proof.scores import binomial
from diffaccel.errors import Unsupported
from diffaccel.measure.timing import machine
from diffaccel.pipelines.find import find_convention

Progress = Callable[[int, int, str], None]
MOST_KEPT = 12  # kept phrases that are drawn if nobody chooses; an edit may list a thousand


@dataclass(frozen=True)
class _Drawn:
    """Everything that was drawn with or without the edit."""

    pictures: Tensor
    null: list[Tensor]  # predictions for the empty prompt


def prove(
    pipe: Any,
    edit: Any,
    *,
    prompts: int = 8,
    kept: Sequence[str] | None = None,
    neighbours: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    judge: Any = "auto",
    classifier: Classifier | None = None,
    features: Features | None = None,
    reference: str | Path | None = None,
    clip: Any = None,
    attacks: Sequence[str] = ATTACKS,
    attack_prompts: int = 8,
    budget: Budget | None = None,
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    form: str = "weights",
    on_progress: Progress = lambda done, total, name: None,
    **call: Any,
) -> Proof:
    """Draw before and after the edit, attack it, and put the pipeline back as it was.

    Args:
        pipe: the pipeline; the edit may be applied to it already or not.
        edit: what `erase` returned or `load_edit` read.
        prompts: how many per concept, synonym, kept concept and neighbour.
        kept: phrases that were to stay; default: some of the edit's own.
        neighbours: phrases near the erased ones that nobody listed; default on bundled models: the other classes.
        templates: for models without a judge, texts with {} for the phrase.
        judge: "auto" uses the bundled judge for bundled models; a `Judge`, or None.
        classifier: (pictures (n, 3, h, w) in [0, 1], concept) -> n booleans or numbers from 0 to 1.
        features: pictures -> (n, d), for distances between sets of pictures; default: the judge's.
        reference: folder with a folder of real pictures per phrase (named as `safe_name` does, e.g. "a-red-heart").
        clip: (CLIPModel, CLIPProcessor), or a callable (pictures, texts) -> n scores.
        attacks: some of "closed_form", "closed_form_near", "gradient", "inversion".
        attack_prompts: how many prompts are attacked.
        budget: how hard the attacks try.
        steps, guidance, seed, batch_size: of the drawing; picture i gets seed + i.
        form: how the edit is applied, "weights" or "map".
        call: further arguments of the pipeline call.
    Raises:
        ProofError: settings that make no proof.
        Unsupported: from `apply_edit`.
    """
    attacks = (attacks,) if isinstance(attacks, str) else attacks
    unknown = [name for name in attacks if name not in attacking.BY_NAME]
    if unknown or prompts < 1 or attack_prompts < 1 or steps < 1 or batch_size < 1:
        problem = f"There is no attack {unknown[0]!r}; choose {', '.join(attacking.BY_NAME)}." if unknown else None
        raise ProofError(problem or "Prompts, steps and batch size must be 1 or more.")
    _check_call(pipe, call)
    drawing, budget = Drawing(steps, guidance, seed, batch_size, call), budget or Budget()
    recogniser = find_recogniser(pipe, judge, classifier, features)
    means = Means(recogniser, features, clip, None if reference is None else Path(reference))
    probes, notes = _probes(edit, recogniser, prompts, kept, neighbours, templates, seed)
    check_reference(means, probes)
    chosen = [i for i, probe in enumerate(probes) if probe.role == "erased"]
    chosen = chosen[:: max(1, len(chosen) // attack_prompts)][:attack_prompts]
    with untouched(pipe), without_edit(pipe, edit, form) as applied:
        on_progress(0, 3, "before")
        states = null_states(pipe, drawing, notes)
        before = _Drawn(draw(pipe, [p.prompt for p in probes], drawing), [m.prediction for m in states[0]])
        material = _material(pipe, probes, chosen, drawing, budget, notes) if attacks else None
        with applied():
            on_progress(1, 3, "after")
            after = _Drawn(draw(pipe, [p.prompt for p in probes], drawing), predict(pipe, *states))
            on_progress(2, 3, "attacks")
            found = [] if material is None else _attack_all(pipe, attacks, material, budget, drawing, notes)
    rows = score_rows(probes, before.pictures, after.pictures, means)
    results = [_judge_attack(a, [probes[i] for i in chosen], chosen, before, after, recogniser) for a in found]
    distance = frechet(probes, before.pictures, after.pictures, means, notes)
    return Proof(
        edit=_describe(edit),
        rows=tuple(rows),
        attacks=tuple(results),
        null_drift=drift(before.null, after.null),
        frechet=distance,
        settings=_settings(pipe, drawing, form, prompts, budget),
        machine=machine(pipe.device),
        notes=(recogniser.source if recogniser else NOBODY, *notes),
        probes=tuple(probes),
        before=before.pictures,
        after=after.pictures,
    )


def _check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Pipelines swallow arguments that they do not know, so a misspelt option of `prove` would go unnoticed."""
    from diffaccel.wrapping import AcceleratedPipeline  # noqa: PLC0415  (it imports this package)

    if isinstance(pipe, AcceleratedPipeline):
        raise ProofError("A proof is about a model and an edit alone: prove on the pipeline inside, fast.pipe.")
    find_convention(pipe)  # or says what is supported
    known = {
        name
        for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }
    for name in call:
        if name in _OWN:
            raise ProofError(f"A proof sets {name} itself{_OWN[name]}.")
        if name not in known:
            raise ProofError(f"There is no option {name!r}, of a proof or of a call of {type(pipe).__name__}.")


_OWN = {
    "self": "",
    "prompt": "; its phrases are in templates, kept and neighbours",
    "num_inference_steps": "; give steps",
    "guidance_scale": "; give guidance",
    "generator": "; give seed",
    "output_type": "",
}

NOBODY = "Nobody decided what the pictures show: no judge fits this model and no classifier was given, so look at the pictures."


def _probes(
    edit: Any,
    recogniser: Recogniser | None,
    count: int,
    kept: Sequence[str] | None,
    neighbours: Sequence[str] | None,
    templates: Sequence[str],
    seed: int,
) -> tuple[list[Probe], list[str]]:
    """What is drawn, and sentences about what is not."""
    notes: list[str] = []
    targets = {concept.target: [text for text, _ in concept.synonyms] for concept in edit.concepts}
    world = isinstance(recogniser, JudgeRecogniser)
    listed = list(edit.keep)
    if kept is None:
        drawable = [text for text in listed if not world or attributes(text)]
        kept = drawable[:: max(1, -(-len(drawable) // MOST_KEPT))] if drawable else []
        if len(kept) < len(listed):
            notes.append(f"{len(kept)} of {len(listed)} kept phrases were drawn; choose others with kept=[...].")
    if neighbours is None:
        neighbours = _unlisted(list(targets), listed) if world else []
    if not world:
        if not neighbours:
            notes.append("No unlisted neighbours were drawn; name some with neighbours=[...].")
        return template_probes(targets, kept, neighbours, count=count, templates=templates), notes
    alien = [text for text in (*targets, *kept, *neighbours) if not attributes(text)]
    if alien:
        raise ProofError(f"The judge of the bundled models cannot recognise {alien[0]!r}.")
    return world_probes(targets, kept, neighbours, count=count, seed=seed), notes


def _unlisted(targets: Sequence[str], listed: Sequence[str]) -> list[str]:
    """The other classes of the targets' kinds that are neither erased nor named in a kept phrase."""
    known = {item for text in (*targets, *listed) for item in attributes(text)}
    names = [name for target in targets for name in siblings(target)]
    return [name for name in dict.fromkeys(names) if not known & set(attributes(name))]


def _material(
    pipe: Any, probes: Sequence[Probe], chosen: Sequence[int], drawing: Drawing, budget: Budget, notes: list[str]
) -> Material | None:
    """What the attacks aim at: the chosen probes, with the seeds they are drawn from."""
    prompts, concepts = [probes[i].prompt for i in chosen], [probes[i].concept for i in chosen]
    try:
        return attacking.prepare(pipe, prompts, concepts, [drawing.seed + i for i in chosen], drawing, budget)
    except Unsupported as error:
        notes.append(f"No attacks were run: {error}")
        return None


@dataclass(frozen=True)
class _Attack:
    name: str
    attacked: Attacked
    pictures: Tensor
    seconds: float


def _attack_all(
    pipe: Any, names: Sequence[str], material: Material, budget: Budget, drawing: Drawing, notes: list[str]
) -> list[_Attack]:
    found = []
    for name in names:
        try:
            found.append(_attack(pipe, name, material, budget, drawing))
        except (ProofError, Unsupported) as error:
            notes.append(f"The attack {name} was left out: {error}")
    return found


def _attack(pipe: Any, name: str, material: Material, budget: Budget, drawing: Drawing) -> _Attack:
    started = time.perf_counter()
    attacked = attacking.BY_NAME[name](pipe, material, budget, drawing)
    return _Attack(
        name, attacked, draw(pipe, attacked.encoding, drawing, seeds=material.seeds), time.perf_counter() - started
    )


def _judge_attack(
    attack: _Attack,
    probes: Sequence[Probe],
    chosen: Sequence[int],
    before: _Drawn,
    after: _Drawn,
    recogniser: Recogniser | None,
) -> AttackResult:
    wanted = [probe.looked_for for probe in probes]
    sets = {"original": before.pictures[list(chosen)], "before": after.pictures[list(chosen)], "after": attack.pictures}
    shares = {n: binomial(recogniser.recognise(p, wanted)) for n, p in sets.items()} if recogniser else {}
    found = attack.attacked
    return AttackResult(
        attack.name,
        tuple(probe.prompt for probe in probes),
        found.lengths,
        found.losses,
        attack.seconds,
        pictures=torch.stack(list(sets.values()), 1),
        **shares,
    )


def _describe(edit: Any) -> dict[str, Any]:
    return {
        "method": edit.method,
        "concepts": [
            {"target": c.target, "synonyms": [list(s) for s in c.synonyms], "anchor": c.anchor} for c in edit.concepts
        ],
        "keep": list(edit.keep),
        "parameters": dict(edit.parameters),
        "leaks": list(edit.leaks),
        "digest": edit.digest,
    }


def _settings(pipe: Any, drawing: Drawing, form: str, prompts: int, budget: Budget) -> Mapping[str, Any]:
    call = {key: value for key, value in drawing.call.items() if isinstance(value, (str, int, float, bool))}
    return {
        "model": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        **{key: value for key, value in vars(drawing).items() if key != "call"},
        "call": call,
        "form": form,
        "prompts_per_concept": prompts,
        "budget": vars(budget),
    }

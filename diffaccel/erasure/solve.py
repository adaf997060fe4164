"""erase(pipe, concepts): compute an edit. The pipeline stays as it is; `apply_edit` changes it, `remove_edit` undoes that.

Per route of text: collect rows, scale them, solve a closed form in float64, round the map to float32 once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffaccel.edits.concepts import (
    Concept,
    ConceptList,
    ErasureError,
    ErasureWarning,
    LostKeep,
    WeakErasure,
    listed,
    mentions,
    settle,
)
from diffaccel.edits.edit import Edit
from diffaccel.edits.effect import Effect, way
from diffaccel.edits.parts import EditedModule, TextMap
from diffaccel.edits.routes import Projection, Route, find_routes, leaks, require_encoders
from diffaccel.erasure import closed_forms as forms
from diffaccel.erasure.closed_forms import Columns, LowRank
from diffaccel.erasure.collect import Collected, Protected, collect
from diffaccel.erasure.general import GENERAL
from diffaccel.erasure.kinds import siblings, stand_in
from diffaccel.erasure.look import look_at
from diffaccel.erasure.problem import Problem, Scale, base_of
from diffaccel.erasure.prompts import sort_prompts
from diffaccel.erasure.settings import Context, Settings, settings_of
from diffaccel.erasure.solvers import SOLVERS
from diffaccel.errors import Unsupported
from diffaccel.version import __version__

WEAK, WILD = 0.5, 2.0  # strengths at which an edit has little visible effect, and the wrong one
LOST = 0.35  # a keep whose rows move more than this share of the concepts' way looks different


def erase(
    pipe: Any,
    concepts: str | Concept | ConceptList | Sequence[str | Concept],
    *,
    keep: Sequence[str] = (),
    anchor: str | None = None,
    prompts: Sequence[str] = (),
    method: str | Settings | None = None,
    check: bool = True,
    **settings: Any,
) -> Edit:
    """Compute the edit that makes a pipeline forget concepts; nothing is changed yet.

    Args:
        pipe: a diffusers pipeline with its text encoders.
        concepts: texts, `Concept` objects (with synonyms and anchors) or a `ConceptList`; erased jointly, in any order. A
            text with commas names several, with `\\,` for a comma of a name; so does a keep.
        keep: texts to preserve, beside the bundled everyday words and before them.
        anchor: what to draw instead, for concepts without an anchor of their own. None leaves the choice to the method:
            "context" takes another thing of the concept's kind, or nothing if it knows none, the others nothing. "" is
            nothing in particular: the sentence without the concept ("context"), the empty prompt (the others).
        prompts: texts of the kind that the model gets. Those that name a concept take the place of the method's templates,
            those that name none are preserved.
        method: "uce", "rece", "speed", "mace" or "context", or a settings object of `diffaccel.erasure`. None is "context".
        check: predict a few times without and with the edit (`Edit.effect`); costs about as much as a picture in ten steps.
        **settings: of the method, see `diffaccel.erasure.UCE`, `RECE`, `SPEED`, `MACE` and `Context`.

    Raises:
        ErasureError: contradictory or unusable concepts or settings; a null space that is empty.
        Unsupported: this pipeline has no route that a closed form covers, or lacks its text encoders.

    Warns:
        WeakErasure: the edit will hardly be seen.
        LostKeep: a keep will look different; the sentence names it.
    """
    if isinstance(concepts, ConceptList):
        keep, anchor = [*listed(keep, "keep"), *concepts.keep], concepts.anchor if anchor is None else anchor
        concepts = concepts.concepts
    from diffaccel.wrapping import AcceleratedPipeline  # noqa: PLC0415  (it imports this package)

    pipe = pipe.pipe if isinstance(pipe, AcceleratedPipeline) else pipe  # an edit is of the model, whatever runs it
    settled, kept = settle(concepts, keep, anchor)
    chosen = settings_of(suited_method(settled) if method is None else method, settings)
    sorted_prompts = sort_prompts(prompts, settled)
    chosen = _with_templates(chosen, sorted_prompts.templates, settled)
    routes = find_routes(pipe)
    for route in routes:
        require_encoders(pipe, route)
    _refuse_needless_choice(chosen, routes)
    settled, stand_ins = _with_anchors(pipe, routes, settled, chosen)
    protected = _protected(settled, kept, sorted_prompts.others, chosen)
    maps: list[TextMap] = []
    diagnostics: dict[str, Any] = {"prompts": sorted_prompts.counts()} if prompts else {}
    diagnostics |= {"stand_ins": stand_ins} if stand_ins else {}
    with _plain_arithmetic(pipe):
        for route in routes:
            if route.name == "pooled" and not chosen.pooled:
                continue
            solved = _solve_route(pipe, route, settled, protected, chosen)
            maps.append(solved.map)
            diagnostics[route.name] = solved.diagnostics
        edit = _edit(pipe, routes, chosen, settled, kept, maps, diagnostics)
        seen = look_at(pipe, edit) if check else None
    _warn(edit, seen)
    return edit if seen is None else replace(edit, diagnostics={**edit.diagnostics, "effect": seen.to_dict()})


def _edit(
    pipe: Any,
    routes: tuple[Route, ...],
    chosen: Settings,
    settled: tuple[Concept, ...],
    kept: tuple[str, ...],
    maps: Sequence[TextMap],
    diagnostics: dict[str, Any],
) -> Edit:
    return Edit(
        method=chosen.method,
        concepts=settled,
        keep=kept,
        parameters=chosen.model_dump(mode="json"),
        diagnostics=diagnostics,
        leaks=(*_unedited(chosen, routes, settled), *leaks(pipe, routes)),
        pipeline=type(pipe).__name__,
        versions=_versions(),
        maps=tuple(maps),
    )


@contextmanager
def _plain_arithmetic(pipe: Any) -> Iterator[None]:
    """The same edit inside of the caller's `autocast`, `inference_mode` (maps meet gradients later) and default device."""
    device = pipe._execution_device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False), torch.device("cpu"):
        yield


def suited_method(concepts: Sequence[Concept]) -> str:
    """The method that erased and spared most on the bundled models (docs/erasure.md), by name."""
    return Context.method


def _with_anchors(
    pipe: Any, routes: Sequence[Route], concepts: Sequence[Concept], chosen: Settings
) -> tuple[tuple[Concept, ...], dict[str, str]]:
    """Concepts with an anchor each, and those that nobody had named."""
    names = [name for concept in concepts for name, _ in concept.names]
    tokenizers = {source.tokenizer for route in routes for source in route.sources}

    def tokens(text: str) -> int:
        return sum(len(getattr(pipe, name)(text).input_ids) for name in tokenizers)

    found, chosen_ones = list[Concept](), dict[str, str]()
    for concept in concepts:
        if concept.anchor is None:
            text = stand_in(concept.target, names, tokens) if isinstance(chosen, Context) else ""
            chosen_ones |= {concept.target: text} if text else {}
            concept = concept.model_copy(update={"anchor": text})
        found.append(concept)
    return tuple(found), chosen_ones


def _refuse_needless_choice(chosen: Settings, routes: tuple[Route, ...]) -> None:
    choice = any(projection.reader.role != "both" for route in routes for projection in route.projections)
    if not choice and "projections" in chosen.model_fields_set:
        raise Unsupported("this denoiser reads its text by one projection, so there is no choice of keys or values.")


def _with_templates(chosen: Settings, templates: tuple[str, ...], concepts: Sequence[Concept]) -> Settings:
    """The settings with contexts from prompts, or without those of the method's own that name a concept."""
    names = [text for concept in concepts for text in (*dict(concept.names), concept.anchor) if text]

    def fitting(name: str) -> dict[str, tuple[str, ...]]:
        texts = getattr(chosen, name)
        fit = tuple(text for text in texts if not any(mentions(text.replace("{}", " "), word) for word in names))
        return {} if name in chosen.model_fields_set else {name: fit}

    fits = fitting("named_templates")
    if not templates:
        return chosen.model_copy(update=fitting("templates") | fits)
    chosen = chosen.model_copy(update=fits)
    if "templates" in chosen.model_fields_set:
        raise ErasureError("give templates, or prompts that name the concepts, but not both.")
    return chosen.model_copy(update={"templates": tuple(sorted(templates))})


def _protected(concepts: Sequence[Concept], kept: Sequence[str], others: Sequence[str], chosen: Settings) -> Protected:
    names = [name for concept in concepts for name, _ in concept.names]
    general = [text for text in GENERAL if not any(mentions(text, name) for name in names)] if chosen.general else []
    near = [text for concept in concepts for text in siblings(concept.target)] if isinstance(chosen, Context) else []
    own = [text for text in near if chosen.general and not any(mentions(text, name) for name in names)]
    mine = {*kept, ""}
    return Protected(
        tuple(sorted({*kept} - {""})), tuple(sorted({*own} - mine)), tuple(sorted({*others, *general} - mine))
    )


def _unedited(chosen: Settings, routes: tuple[Route, ...], concepts: Sequence[Concept]) -> list[str]:
    found = []
    nothing = [repr(concept.target) for concept in concepts if not concept.anchor]
    if nothing:
        found.append(
            f"Nothing in particular takes the place of {', '.join(nothing[:3])}{' and others' if len(nothing) > 3 else ''}: where "
            "the model draws it unasked, it comes back; an anchor says what to draw instead."
        )
    if not chosen.pooled and any(route.name == "pooled" for route in routes):
        found.append("The pooled text vector still carries the concept: this edit was asked to leave it alone.")
    if chosen.tokens == "context":
        found.append("The words of the concept itself are not edited, only what surrounds them.")
    return found


def _versions() -> dict[str, str]:
    import diffusers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    modules = {"diffusers": diffusers, "transformers": transformers, "torch": torch}
    return {"diffaccel": __version__} | {name: str(module.__version__) for name, module in modules.items()}


# --- one route ---


@dataclass(frozen=True)
class _Solved:
    map: TextMap
    diagnostics: dict[str, Any]


def _solve_route(
    pipe: Any, route: Route, concepts: Sequence[Concept], protected: Protected, chosen: Settings
) -> _Solved:
    projections = _edited(route, chosen)
    collected = collect(pipe, route, concepts, protected, chosen)
    scale = Scale.of(collected.columns, collected.blocks if chosen.balance else ())
    columns = scale.shrink(collected.columns)
    names = tuple(concept.target for concept in concepts)
    problem = Problem(pipe, columns, scale.shrink(collected.attacked), projections, scale, route.name, names)
    edit, found = SOLVERS[type(chosen)](problem, chosen)
    grown = forms.compress(scale.grow(edit, route.width))
    if not bool(torch.isfinite(grown.left).all() and torch.isfinite(grown.right).all()):
        raise ErasureError("the solve gave numbers that are not finite; raise the ridge.")
    text_map = TextMap(
        route=route.name,
        left=grown.left.float().contiguous(),
        right=grown.right.float().contiguous(),
        modules=tuple(EditedModule.of(p.name, base_of(pipe, p), p.reader.columns) for p in projections),
    )
    rounded = LowRank(text_map.left.double(), text_map.right.double())
    diagnostics = {**_effects(collected.columns, rounded, concepts), **_named(collected, rounded), **found}
    return _Solved(text_map, diagnostics)


def _edited(route: Route, chosen: Settings) -> tuple[Projection, ...]:
    wanted = {"keys": ("key",), "values": ("value",), "keys and values": ("key", "value")}[chosen.projections]
    return tuple(p for p in route.projections if p.reader.role in (*wanted, "both"))


def _effects(columns: Columns, edit: LowRank, concepts: Sequence[Concept]) -> dict[str, Any]:
    """What the map does, as numbers in plain Python."""
    names = [concept.target for concept in concepts]
    moved = forms.relative_change(columns.keep, edit)
    found: dict[str, Any] = {
        "targets": columns.target.shape[1],
        "kept": columns.keep.shape[1],
        "rank": edit.left.shape[1],
        "strength": dict(zip(names, forms.strengths(columns, edit).tolist(), strict=True)),
        "residual": dict(zip(names, forms.residuals(columns, edit).tolist(), strict=True)),
        "empty_prompt_change": float(forms.relative_change(columns.invariants, edit).max()),
    }
    if moved.numel():
        found |= {"kept_change_max": float(moved.max()), "kept_change_95": float(moved.quantile(0.95))}
    return found


def _named(collected: Collected, edit: LowRank) -> dict[str, Any]:
    """How far the rows of each text that the user keeps move, against the way of the concepts, in the mean."""
    asked = (collected.columns.anchor - collected.columns.target).norm(dim=0)
    way_of_concepts = float(asked.square().mean().sqrt())
    if not collected.named or way_of_concepts == 0:
        return {}
    moved = {text: edit.change(rows).norm(dim=0).square().mean().sqrt() for text, rows in collected.named.items()}
    return {"named_change": {text: float(found) / way_of_concepts for text, found in moved.items()}}


# --- what will not be as asked ---


def _warn(edit: Edit, seen: Effect | None) -> None:
    said = set[str]()
    for route, found in edit.routes.items():
        for name, share in found["strength"].items():
            if not WEAK <= share <= WILD:
                said.add(name)
                _say(WeakErasure, _weak_text(name, share, route))
        for name, share in found.get("named_change", {}).items():
            if share > LOST and name not in said:
                said.add(name)
                _say(LostKeep, _lost(name, share))
    for name in () if seen is None else seen.weak:
        if name not in said:
            _say(WeakErasure, _weak_picture(edit, name, seen.moved[name]))  # type: ignore[union-attr]
    for name in () if seen is None else seen.lost:
        if name not in said:
            _say(LostKeep, _lost(name, seen.kept[name]))  # type: ignore[union-attr]


def _weak_text(name: str, share: float, route: str) -> str:
    moves = f"moves only {share:.0%} of the way to its anchor" if 0.005 <= share < WEAK else way(share)
    return f"{name!r} {moves} in the {route} text; raise the threshold, lower the ridge, ask for a strength, or preserve less."


def _weak_picture(edit: Edit, name: str, share: float) -> str:
    instead = next(concept.anchor for concept in edit.concepts if concept.target == name)
    advice = "another anchor" if instead else "something to draw instead (anchor)"
    return f"{name!r} will hardly look erased: what the denoiser predicts for it {way(share)}; name {advice}, or give prompts."


def _lost(name: str, share: float) -> str:
    return (
        f"{name!r} could not be kept: it moves {share:.0%} as far as what is erased; raise named_weight, or erase less."
    )


def _say(kind: type[ErasureWarning], sentence: str) -> None:
    warnings.warn(sentence, kind, stacklevel=4)  # the line that calls erase

"""erase(pipe, concepts): compute an edit. The pipeline stays as it is; `apply_edit` changes it, `remove_edit` undoes that.

Per route of text: collect rows, scale them, solve a closed form in float64, round the map to float32 once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffaccel.erasure import closed_forms as forms
from diffaccel.erasure.closed_forms import Columns, LowRank
from diffaccel.erasure.collect import collect
from diffaccel.erasure.concepts import Concept, ConceptList, ErasureError, listed, mentions, settle
from diffaccel.erasure.edit import Edit, EditedModule, TextMap
from diffaccel.erasure.general import GENERAL
from diffaccel.erasure.problem import Problem, Scale, base_of
from diffaccel.erasure.prompts import sort_prompts
from diffaccel.erasure.routes import Projection, Route, find_routes, leaks, require_encoders
from diffaccel.erasure.settings import Context, Settings, settings_of
from diffaccel.erasure.solvers import SOLVERS
from diffaccel.errors import Unsupported
from diffaccel.version import __version__

WEAK = 0.5  # below this strength an edit has little visible effect


class WeakErasure(UserWarning):
    """The edit moves a concept less than half of the way to its anchor."""


def erase(
    pipe: Any,
    concepts: str | Concept | ConceptList | Sequence[str | Concept],
    *,
    keep: Sequence[str] = (),
    anchor: str | None = None,
    prompts: Sequence[str] = (),
    method: str | Settings | None = None,
    **settings: Any,
) -> Edit:
    """Compute the edit that makes a pipeline forget concepts; nothing is changed yet.

    Args:
        pipe: a diffusers pipeline with its text encoders.
        concepts: texts, `Concept` objects (with synonyms and anchors) or a `ConceptList`; erased jointly, in any order.
        keep: texts to preserve, beside the bundled everyday words.
        anchor: what to draw instead, for concepts without an anchor of their own; None or "" is the empty prompt.
        prompts: texts of the kind that the model gets. Those that name a concept take the place of the method's templates,
            those that name none are preserved.
        method: "uce", "rece", "speed", "mace" or "context", or a settings object of `diffaccel.erasure`. None is "context"
            if every concept has an anchor, which it needs, and else "uce"; `Edit.method` says which it was.
        **settings: of the method, see `diffaccel.erasure.UCE`, `RECE`, `SPEED`, `MACE` and `Context`.

    Raises:
        ErasureError: contradictory or unusable concepts or settings; a null space that is empty.
        Unsupported: this pipeline has no route that a closed form covers, or lacks its text encoders.

    Warns:
        WeakErasure: a null space leaves so little of a concept that the edit will hardly be seen.
    """
    if isinstance(concepts, ConceptList):
        keep, anchor = [*listed(keep, "keep"), *concepts.keep], concepts.anchor if anchor is None else anchor
        concepts = concepts.concepts
    from diffaccel.wrapping import AcceleratedPipeline  # noqa: PLC0415  (it imports this package)

    pipe = pipe.pipe if isinstance(pipe, AcceleratedPipeline) else pipe  # an edit is of the model, whatever runs it
    settled, kept = settle(concepts, keep, anchor)
    chosen = settings_of(suited_method(settled) if method is None else method, settings)
    _refuse_nothing_instead(chosen, settled)
    sorted_prompts = sort_prompts(prompts, settled)
    chosen = _with_templates(chosen, sorted_prompts.templates)
    routes = find_routes(pipe)
    for route in routes:
        require_encoders(pipe, route)
    _refuse_needless_choice(chosen, routes)
    protected = _protected(settled, (*kept, *sorted_prompts.others), chosen)
    maps: list[TextMap] = []
    diagnostics: dict[str, Any] = {"prompts": sorted_prompts.counts()} if prompts else {}
    with _plain_arithmetic(pipe):
        for route in routes:
            if route.name == "pooled" and not chosen.pooled:
                continue
            solved = _solve_route(pipe, route, settled, protected, chosen)
            maps.append(solved.map)
            diagnostics[route.name] = solved.diagnostics
    return Edit(
        method=chosen.method,
        concepts=settled,
        keep=kept,
        parameters=chosen.model_dump(mode="json"),
        diagnostics=diagnostics,
        leaks=(*_unedited(chosen, routes), *leaks(pipe, routes)),
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
    return "context" if all(concept.anchor for concept in concepts) else "uce"


def _refuse_needless_choice(chosen: Settings, routes: tuple[Route, ...]) -> None:
    choice = any(projection.reader.role != "both" for route in routes for projection in route.projections)
    if not choice and "projections" in chosen.model_fields_set:
        raise Unsupported("this denoiser reads its text by one projection, so there is no choice of keys or values.")


def _refuse_nothing_instead(chosen: Settings, concepts: Sequence[Concept]) -> None:
    """The counterpart of a whole sentence would be the empty prompt, and all that it says would go with the concept."""
    for concept in concepts:
        if isinstance(chosen, Context) and not concept.anchor:
            raise ErasureError(f"context needs an anchor, something to draw instead of {concept.target!r}; name one.")


def _with_templates(chosen: Settings, templates: tuple[str, ...]) -> Settings:
    if not templates:
        return chosen
    if "templates" in chosen.model_fields_set:
        raise ErasureError("give templates, or prompts that name the concepts, but not both.")
    return chosen.model_copy(update={"templates": tuple(sorted(templates))})


def _protected(concepts: Sequence[Concept], kept: Sequence[str], chosen: Settings) -> tuple[str, ...]:
    names = [name for concept in concepts for name, _ in concept.names]
    general = [text for text in GENERAL if not any(mentions(text, name) for name in names)] if chosen.general else []
    return tuple(sorted({*kept, *general} - {""}))


def _unedited(chosen: Settings, routes: tuple[Route, ...]) -> list[str]:
    found = []
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
    pipe: Any, route: Route, concepts: Sequence[Concept], protected: Sequence[str], chosen: Settings
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
    diagnostics = {**_effects(collected.columns, rounded, concepts), **found}
    _warn_if_weak(diagnostics["strength"], route.name)
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


def _warn_if_weak(strength: dict[str, float], route: str) -> None:
    for name, value in strength.items():
        if value < WEAK:
            warnings.warn(
                f"{name!r} moves only {value:.0%} of the way to its anchor in the {route} text; raise the threshold, "
                "lower the ridge, ask for a strength, or preserve less.",
                WeakErasure,
                stacklevel=4,  # the line that calls erase
            )

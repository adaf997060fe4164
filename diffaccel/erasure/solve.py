"""erase(pipe, concepts): compute an edit. The pipeline stays as it is; `apply_edit` changes it, `remove_edit` undoes that.

Per route of text: collect rows, scale them, solve a closed form in float64, round the map to float32 once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffaccel.erasure import closed_forms as forms
from diffaccel.erasure.applied import Applied
from diffaccel.erasure.closed_forms import Columns, LowRank
from diffaccel.erasure.columns import POOLED_SECTION, Key, Policy, RowReader, chosen_rows, pair_rows
from diffaccel.erasure.concepts import Concept, ConceptList, ErasureError, mentions, settle
from diffaccel.erasure.edit import Edit, EditedModule, TextMap
from diffaccel.erasure.general import GENERAL
from diffaccel.erasure.live import stored_weight, unwrapped
from diffaccel.erasure.routes import Projection, Route, find_routes, leaks, require_encoders
from diffaccel.erasure.settings import MACE, RECE, SPEED, UCE, Settings, settings_of
from diffaccel.errors import Unsupported

WEAK = 0.5  # below this strength an edit has little visible effect


class WeakErasure(UserWarning):
    """The edit moves a concept less than half of the way to its anchor."""


def erase(
    pipe: Any,
    concepts: str | Concept | ConceptList | Sequence[str | Concept],
    *,
    keep: Sequence[str] = (),
    anchor: str | None = None,
    method: str | Settings = "speed",
    **settings: Any,
) -> Edit:
    """Compute the edit that makes a pipeline forget concepts; nothing is changed yet.

    Args:
        pipe: a diffusers pipeline with its text encoders.
        concepts: texts, `Concept` objects (with synonyms and anchors) or a `ConceptList`; erased jointly, in any order.
        keep: texts to preserve, beside the bundled everyday words.
        anchor: what to draw instead, for concepts without an anchor of their own; None or "" is the empty prompt.
        method: "uce", "rece", "speed" or "mace", or a settings object of `diffaccel.erasure`.
        **settings: of the method, see `diffaccel.erasure.UCE`, `RECE`, `SPEED` and `MACE`.

    Raises:
        ErasureError: contradictory or unusable concepts or settings; a null space that is empty.
        Unsupported: this pipeline has no route that a closed form covers, or lacks its text encoders.

    Warns:
        WeakErasure: a null space leaves so little of a concept that the edit will hardly be seen.
    """
    chosen = settings_of(method, settings)
    if isinstance(concepts, ConceptList):
        keep, anchor = [*keep, *concepts.keep], concepts.anchor if anchor is None else anchor
        concepts = concepts.concepts
    settled, kept = settle(concepts, keep, anchor)
    routes = find_routes(pipe)
    for route in routes:
        require_encoders(pipe, route)
    _refuse_needless_choice(chosen, routes)
    protected = _protected(settled, kept, chosen)
    maps: list[TextMap] = []
    diagnostics: dict[str, Any] = {}
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


def _refuse_needless_choice(chosen: Settings, routes: tuple[Route, ...]) -> None:
    choice = any(projection.reader.role != "both" for route in routes for projection in route.projections)
    if not choice and "projections" in chosen.model_fields_set:
        raise Unsupported("this denoiser reads its text by one projection, so there is no choice of keys or values.")


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

    import diffaccel  # noqa: PLC0415

    modules = {"diffaccel": diffaccel, "diffusers": diffusers, "transformers": transformers, "torch": torch}
    return {name: str(module.__version__) for name, module in modules.items()}


# --- one route ---


@dataclass(frozen=True)
class _Solved:
    map: TextMap
    diagnostics: dict[str, Any]


def _solve_route(
    pipe: Any, route: Route, concepts: Sequence[Concept], protected: Sequence[str], chosen: Settings
) -> _Solved:
    projections = _edited(route, chosen)
    collected = _collect(pipe, route, concepts, protected, chosen)
    scale = _Scale.of(collected.columns, collected.blocks if chosen.balance else ())
    columns = scale.shrink(collected.columns)
    problem = _Problem(pipe, columns, scale.shrink(collected.attacked), projections, scale, route.name)
    edit, found = _SOLVERS[type(chosen)](problem, chosen)
    grown = forms.compress(scale.grow(edit, route.width))
    if not bool(torch.isfinite(grown.left).all() and torch.isfinite(grown.right).all()):
        raise ErasureError("the solve gave numbers that are not finite; raise the ridge.")
    text_map = TextMap(
        route=route.name,
        left=grown.left.float().contiguous(),
        right=grown.right.float().contiguous(),
        modules=tuple(EditedModule.of(p.name, _weight(pipe, p), p.reader.columns) for p in projections),
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
                stacklevel=5,
            )


# --- rows ---


@dataclass(frozen=True)
class _Collected:
    columns: Columns
    attacked: Columns | None
    blocks: tuple[tuple[int, int], ...]  # of columns that different encoders write side by side


@dataclass(frozen=True)
class _Pairs:
    """Keys of rows to erase and of what they become, with weights and the number of their concept."""

    target: list[Key]
    anchor: list[Key]
    weights: list[float]
    owner: list[int]


def _collect(
    pipe: Any, route: Route, concepts: Sequence[Concept], protected: Sequence[str], chosen: Settings
) -> _Collected:
    reader = RowReader(pipe, route, t5_tokens=chosen.t5_tokens, paddings=chosen.paddings)
    pairs = _pairs(reader, concepts, chosen.templates, chosen.tokens)
    attacked = None
    if isinstance(chosen, RECE) and chosen.rounds:
        attacked = _pairs(reader, concepts, ("{}",), chosen.attack_tokens)
    keep = _kept(reader, protected, chosen)
    empty = _empty_rows(reader)
    every = [*pairs.target, *pairs.anchor, *keep, *(key for keys in empty for key in keys)]
    if attacked:
        every += [*attacked.target, *attacked.anchor]
    matrix, place = reader.values(every)

    def pick(keys: Sequence[Key]) -> Tensor:
        return matrix[:, [place[key] for key in keys]]

    invariants = _invariants([pick(keys) for keys in empty], getattr(chosen, "centres", 3))
    columns = _columns(pairs, pick, pick(keep), invariants)
    against = _columns(attacked, pick, pick(keep), invariants) if attacked else None
    return _Collected(columns, against, reader.blocks)


def _columns(pairs: _Pairs, pick: Callable[[Sequence[Key]], Tensor], keep: Tensor, invariants: Tensor) -> Columns:
    return Columns(
        target=pick(pairs.target),
        anchor=pick(pairs.anchor),
        weights=torch.tensor(pairs.weights, dtype=torch.float64),
        owner=torch.tensor(pairs.owner),
        keep=keep,
        invariants=invariants,
    )


def _pairs(reader: RowReader, concepts: Sequence[Concept], templates: Sequence[str], policy: Policy) -> _Pairs:
    """Every name of every concept in every template, in every section."""
    found = _Pairs([], [], [], [])
    for number, concept in enumerate(concepts):
        for name, weight in concept.names:
            for template in templates:
                for section in reader.sections:
                    rows = _paired(reader, template, (name, concept.anchor or ""), section, policy)
                    found.target.extend(target for target, _, _ in rows)
                    found.anchor.extend(anchor for _, anchor, _ in rows)
                    found.weights.extend(weight * share / len(templates) for _, _, share in rows)
                    found.owner.extend([number] * len(rows))
    return found


def _paired(
    reader: RowReader, template: str, phrases: tuple[str, str], section: int, policy: Policy
) -> list[tuple[Key, Key, float]]:
    """Keys of a target's row and of its counterpart, and how many rows the first stands for."""
    target, anchor = reader.spans(template, phrases, section)
    first, second = (reader.text(template, phrase) for phrase in phrases)
    used: Policy = "last" if section == POOLED_SECTION else policy
    return [
        ((section, first, a), (section, second, b), target.stands_for if a >= target.end else 1.0)
        for a, b in pair_rows(used, target, anchor)
    ]


def _kept(reader: RowReader, protected: Sequence[str], chosen: Settings) -> list[Key]:
    found: set[Key] = set()
    for template in chosen.keep_templates:
        for section in reader.sections:
            policy: Policy = "last" if section == POOLED_SECTION else chosen.keep_tokens
            for text, span in zip(protected, reader.spans(template, protected, section), strict=True):
                filled = reader.text(template, text)
                found |= {(section, filled, row) for row in chosen_rows(policy, span)}
    return sorted(found)


def _empty_rows(reader: RowReader) -> list[list[Key]]:
    """Rows of the empty prompt, a list per section; a start token comes as a list of its own."""
    found = []
    for section in reader.sections:
        if section == POOLED_SECTION:
            return [[(section, "", 0)]]
        span = reader.empty_span(section)
        starts, rest = range(span.head), range(span.head, span.total)
        found += [[(section, "", row) for row in rows] for rows in (starts, rest) if len(rows)]
    return found


def _invariants(groups: Sequence[Tensor], count: int) -> Tensor:
    return torch.cat([forms.centres(group, count) for group in groups], 1)


# --- scaling ---


@dataclass(frozen=True)
class _Scale:
    """Coordinates in which an edit is solved: those that any text uses at all, each divided by `factor`."""

    used: Tensor  # (d,) mask
    factor: Tensor  # (used,)

    @classmethod
    def of(cls, columns: Columns, blocks: Sequence[tuple[int, int]]) -> _Scale:
        every = torch.cat([columns.target, columns.anchor, columns.keep, columns.invariants], 1)
        power = every.square().mean(1)
        factor = torch.ones_like(power)
        for first, past in blocks:
            factor[first:past] = power[first:past].mean().sqrt().clamp(min=1e-300)
        used = power > 0
        if not blocks:
            return cls(used, factor[used])
        mean = (power[used] / factor[used].square()).sum() / power[used].sum()
        return cls(used, factor[used] * mean.sqrt())  # the mean square of a row stays as it was

    def shrink(self, columns: Columns | None) -> Any:
        if columns is None:
            return None
        parts = ("target", "anchor", "keep", "invariants")
        return replace(columns, **{name: self.rows(getattr(columns, name)) for name in parts})

    def rows(self, columns: Tensor) -> Tensor:
        """Columns (d, n) in these coordinates (used, n)."""
        return columns[self.used] / self.factor[:, None]

    def gram(self, gram: Tensor) -> Tensor:
        """The same quadratic form in these coordinates."""
        return gram[self.used][:, self.used] * self.factor[:, None] * self.factor

    def grow(self, edit: LowRank, width: int) -> LowRank:
        """The map in the coordinates of the model."""
        left = torch.zeros(width, edit.left.shape[1], dtype=torch.float64)
        right = torch.zeros(edit.right.shape[0], width, dtype=torch.float64)
        left[self.used] = edit.left * self.factor[:, None]
        right[:, self.used] = edit.right / self.factor
        return LowRank(left, right)


# --- methods ---


@dataclass(frozen=True)
class _Problem:
    """What a method solves: scaled columns, rows to attack (RECE), and the projections behind them."""

    pipe: Any
    columns: Columns
    attacked: Columns | None
    projections: tuple[Projection, ...]
    scale: _Scale
    route: str

    def gram(self) -> Tensor:
        """S = sum of W^T W over the edited projections; (d, d)."""
        total = None
        for projection in self.projections:
            first, past = projection.reader.columns
            weight = _weight(self.pipe, projection)[:, first:past].double()
            product = weight.T @ weight
            total = product if total is None else total + product
        assert total is not None
        return self.scale.gram(total)


def _weight(pipe: Any, projection: Projection) -> Tensor:
    """The weight (d_out, d_in) without any applied edit, on the CPU.

    Raises:
        Unsupported: there is none in fp32, fp16 or bf16, or something else changed it since an edit was applied.
    """
    home, path = projection.name.split(".", 1)
    network = getattr(pipe, home)
    applied = Applied.of(network)
    if applied is not None:
        return applied.base_now(network, path)[0]
    weight = stored_weight(unwrapped(projection.module))
    if weight is None:
        raise Unsupported(
            f"{projection.name} has no weight in fp32, fp16 or bf16 (quantised, or not loaded); compute the edit on the "
            "plain model, and apply it here with form='map'."
        )
    return weight.to("cpu")


def _uce(problem: _Problem, chosen: Any) -> tuple[LowRank, dict[str, Any]]:
    columns = _weighted(problem.columns, chosen)
    ridge = _ridge(columns, chosen)
    return _ridge_solve(columns, ridge, chosen), {"ridge": ridge}


def _rece(problem: _Problem, chosen: Any) -> tuple[LowRank, dict[str, Any]]:
    columns = _weighted(problem.columns, chosen)
    ridge = _ridge(columns, chosen)
    if not chosen.rounds or problem.attacked is None:
        return _ridge_solve(columns, ridge, chosen), {"ridge": ridge, "attack_columns": 0}
    attacked = _weighted(problem.attacked, chosen)
    every = torch.cat([columns.target, columns.anchor, columns.keep, attacked.target], 1)
    done = forms.harden(
        columns,
        lambda found: _ridge_solve(found, ridge, chosen),
        problem.gram(),
        attacked,
        rounds=chosen.rounds,
        ridge=chosen.attack_ridge,
        largest_norm=chosen.norm_budget * float(every.norm(dim=0).max()),
        joint=chosen.joint,
    )
    return done.map, {
        "ridge": ridge,
        "attack_columns": done.added,
        "attack_norm_ratio": list(done.ratios),
        "attack_error": list(done.errors),
    }


def _weighted(columns: Columns, chosen: UCE) -> Columns:
    keep = torch.cat([columns.keep, columns.invariants], 1) if chosen.keep_empty else columns.keep
    return replace(columns, weights=columns.weights * chosen.erase_weight, keep=keep)


def _ridge(columns: Columns, chosen: UCE) -> float:
    scale = forms.mean_square(columns, chosen.keep_weight) if chosen.ridge_relative else 1.0
    return chosen.ridge * scale


def _ridge_solve(columns: Columns, ridge: float, chosen: UCE) -> LowRank:
    try:
        return forms.ridge(columns, ridge, chosen.keep_weight)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ErasureError(f"a ridge of {ridge:.3g} is too small for these embeddings; raise it.") from None


def _speed(problem: _Problem, chosen: Any) -> tuple[LowRank, dict[str, Any]]:
    columns = problem.columns
    refined = _refine(problem, chosen)
    space = forms.null_space(
        refined,
        columns.invariants,
        threshold=chosen.threshold,
        relative=chosen.threshold_relative,
        directions=chosen.directions,
    )
    if space.free == 0:
        raise ErasureError(
            f"what is preserved fills all {columns.target.shape[0]} dimensions of the {problem.route} text, so nothing "
            "can be erased; raise the threshold, ask for a number of directions, or preserve less."
        )
    ridge = chosen.ridge
    if chosen.strength is not None:
        wanted = forms.ridge_for_strength(columns, space, chosen.strength)
        if wanted is None:
            raise ErasureError(
                f"no ridge erases every concept by {chosen.strength:g} inside a null space of {space.free} directions of "
                f"the {problem.route} text; raise the threshold or preserve less."
            )
        ridge = wanted
    found = {"null_directions": space.free, "refined": refined.shape[1], "largest_eigenvalue": space.largest}
    return forms.null_edit(columns, space, ridge), {**found, "ridge": ridge}


def _refine(problem: _Problem, chosen: SPEED) -> Tensor:
    """What is preserved after SPEED's prior filter and augmentation; (d, m)."""
    columns = problem.columns
    keep = columns.keep
    if not (chosen.prior_filter or chosen.augment) or keep.shape[1] == 0:
        return keep
    gram = problem.gram()
    if chosen.prior_filter:
        keep = keep[:, forms.influential(columns, gram, keep)]
    if not chosen.augment:
        return keep
    generator = torch.Generator().manual_seed(chosen.seed)
    near = forms.augment(keep, gram, chosen.augment, chosen.augment_directions, generator)
    if chosen.prior_filter:
        near = near[:, forms.influential(columns, gram, near)]
    return torch.cat([keep, near], 1)


_SOLVERS: dict[type[Settings], Callable[[_Problem, Any], tuple[LowRank, dict[str, Any]]]] = {
    UCE: _uce,
    RECE: _rece,
    SPEED: _speed,
    MACE: _uce,
}

"""The methods as solvers: a problem and the method's settings in, a map and what was found on the way out.

Each takes its steps from `closed_forms`; a new method is a class of settings and an entry in `SOLVERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffaccel.edits.concepts import ErasureError
from diffaccel.erasure import closed_forms as forms
from diffaccel.erasure.closed_forms import Columns, LowRank
from diffaccel.erasure.problem import Problem
from diffaccel.erasure.settings import MACE, RECE, SPEED, UCE, Context, Settings


def _uce(problem: Problem, chosen: Any) -> tuple[LowRank, dict[str, Any]]:
    columns = _weighted(problem.columns, chosen)
    ridge = _ridge(columns, chosen)
    return _ridge_solve(columns, ridge, chosen), {"ridge": ridge}


def _context(problem: Problem, chosen: Any) -> tuple[LowRank, dict[str, Any]]:
    """UCE, or RECE, with the total weights of both sides in a given ratio, however many rows each has."""
    columns, attacked, kept = problem.columns, problem.attacked, problem.columns.keep.shape[1]
    balance = chosen.keep_weight * kept / float(columns.weights.sum()) if kept else 1.0
    if attacked is not None:
        attacked = replace(attacked, weights=attacked.weights * balance)
    balanced = replace(problem, columns=replace(columns, weights=columns.weights * balance), attacked=attacked)
    edit, found = (_rece if chosen.rounds else _uce)(balanced, chosen)
    return edit, found | {"row_weight": chosen.erase_weight * balance}


def _rece(problem: Problem, chosen: Any) -> tuple[LowRank, dict[str, Any]]:
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
    found = replace(columns, weights=columns.weights * chosen.erase_weight)
    if not chosen.keep_empty:
        return found
    ones = torch.ones(columns.invariants.shape[1], dtype=torch.float64)
    weights = None if columns.keep_weights is None else torch.cat([columns.keep_weights, ones])
    return replace(found, keep=torch.cat([columns.keep, columns.invariants], 1), keep_weights=weights)


def _ridge(columns: Columns, chosen: UCE) -> float:
    scale = forms.mean_square(columns, chosen.keep_weight) if chosen.ridge_relative else 1.0
    return chosen.ridge * scale


def _ridge_solve(columns: Columns, ridge: float, chosen: UCE) -> LowRank:
    try:
        return forms.ridge(columns, ridge, chosen.keep_weight)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ErasureError(f"a ridge of {ridge:.3g} is too small for these embeddings; raise it.") from None


def _speed(problem: Problem, chosen: Any) -> tuple[LowRank, dict[str, Any]]:
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
    for concept in forms.hidden(columns, space):
        raise ErasureError(
            f"{problem.concepts[concept]!r} lies within what is preserved of the {problem.route} text, so it cannot be "
            "erased inside the null space; raise the threshold or preserve less."
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


def _refine(problem: Problem, chosen: SPEED) -> Tensor:
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


Solver = Callable[[Problem, Any], tuple[LowRank, dict[str, Any]]]

SOLVERS: dict[type[Settings], Solver] = {
    UCE: _uce,
    RECE: _rece,
    SPEED: _speed,
    MACE: _uce,
    Context: _context,
}

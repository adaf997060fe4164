"""The rows of text that an edit is solved on: every name of every concept in its contexts, what stays, the empty prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.erasure import closed_forms as forms
from diffaccel.erasure.closed_forms import Columns
from diffaccel.erasure.columns import POOLED_SECTION, Key, Policy, RowReader, chosen_rows, pair_rows
from diffaccel.erasure.concepts import Concept
from diffaccel.erasure.routes import Route
from diffaccel.erasure.settings import RECE, Settings


@dataclass(frozen=True)
class Collected:
    """Rows of one route, as columns (d, n).

    Attributes:
        columns: what is erased, what it becomes, and what is preserved.
        attacked: the same with the rows that an attack wants back (RECE).
        blocks: [first, past) rows of `columns` that different encoders write side by side.
    """

    columns: Columns
    attacked: Columns | None
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Pairs:
    """Keys of rows to erase and of what they become, with weights and the number of their concept."""

    target: list[Key]
    anchor: list[Key]
    weights: list[float]
    owner: list[int]


def collect(
    pipe: Any, route: Route, concepts: Sequence[Concept], protected: Sequence[str], chosen: Settings
) -> Collected:
    """Encode what a method wants to see of the concepts, of `protected` texts, and of the empty prompt."""
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
    return Collected(columns, against, reader.blocks)


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

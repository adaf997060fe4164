"""The rows of text that an edit is solved on: every name of every concept in its contexts, what stays, the empty prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffaccel.edits.concepts import Concept
from diffaccel.edits.routes import Route
from diffaccel.erasure import closed_forms as forms
from diffaccel.erasure.closed_forms import Columns
from diffaccel.erasure.columns import POOLED_SECTION, Key, Policy, RowReader, chosen_rows, pair_rows
from diffaccel.erasure.settings import RECE, Context, Settings

MOST_NAMED, LONGEST_PHRASE = 100, 3  # keeps that stand in further sentences; a thousand would cost minutes


@dataclass(frozen=True)
class Collected:
    """Rows of one route, as columns (d, n).

    Attributes:
        columns: what is erased, what it becomes, and what is preserved.
        attacked: the same with the rows that an attack wants back (RECE).
        blocks: [first, past) rows of `columns` that different encoders write side by side.
        named: rows (d, m) of each text that the user wants to keep.
    """

    columns: Columns
    attacked: Columns | None
    blocks: tuple[tuple[int, int], ...]
    named: Mapping[str, Tensor]


@dataclass(frozen=True)
class Protected:
    """Texts to preserve.

    Attributes:
        named: by the user.
        near: other things of the concepts' kinds, which would suffer first.
        others: everyday words, prompts that name no concept.
    """

    named: tuple[str, ...]
    near: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All, sorted."""
        return tuple(sorted({*self.named, *self.near, *self.others}))


@dataclass(frozen=True)
class _Pairs:
    """Keys of rows to erase and of what they become, with weights and the number of their concept."""

    target: list[Key]
    anchor: list[Key]
    weights: list[float]
    owner: list[int]


def collect(pipe: Any, route: Route, concepts: Sequence[Concept], protected: Protected, chosen: Settings) -> Collected:
    """Encode what a method wants to see of the concepts, of `protected` texts, and of the empty prompt."""
    gaps = isinstance(chosen, Context)
    reader = RowReader(pipe, route, t5_tokens=chosen.t5_tokens, paddings=chosen.paddings, gaps=gaps)
    pairs = _pairs(reader, concepts, chosen.templates, chosen.tokens)
    attacked = None
    if isinstance(chosen, RECE) and chosen.rounds:
        attacked = _pairs(reader, concepts, ("{}",), chosen.attack_tokens)
    named = _in_sentences(reader, protected.named, chosen)
    near = _in_sentences(reader, protected.near, chosen)
    keep = sorted(
        {
            *_kept(reader, protected.texts, chosen.keep_templates, chosen),
            *(k for keys in (*named.values(), *near.values()) for k in keys),
        }
    )
    empty = _empty_rows(reader)
    every = [*pairs.target, *pairs.anchor, *keep, *(key for keys in empty for key in keys)]
    if attacked:
        every += [*attacked.target, *attacked.anchor]
    matrix, place = reader.values(every)

    def pick(keys: Sequence[Key]) -> Tensor:
        return matrix[:, [place[key] for key in keys]]

    invariants = _invariants([pick(keys) for keys in empty], getattr(chosen, "centres", 3))
    columns = _columns(pairs, pick, pick(keep), invariants)
    columns = replace(columns, keep_weights=_keep_weights(keep, named, chosen))
    against = _columns(attacked, pick, pick(keep), invariants) if attacked else None
    return Collected(columns, against, reader.blocks, {text: pick(sorted(keys)) for text, keys in named.items()})


def _keep_weights(keep: Sequence[Key], named: Mapping[str, set[Key]], chosen: Settings) -> Tensor | None:
    """(m,) for `keep`, or None where every row weighs the same."""
    mine = {key for keys in named.values() for key in keys}
    share = getattr(chosen, "named_weight", 0.0) * (len(keep) - len(mine)) / max(len(mine), 1)
    if share <= 1 or not mine:
        return None
    return torch.tensor([share if key in mine else 1.0 for key in keep], dtype=torch.float64)


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


def _in_sentences(reader: RowReader, named: Sequence[str], chosen: Settings) -> dict[str, set[Key]]:
    """Rows of each text; phrases stand in more sentences than whole prompts."""
    more = chosen.named_templates if len(named) <= MOST_NAMED else ()
    phrases = {text: len(text.split()) <= LONGEST_PHRASE for text in named}
    templates = {text: sorted({*chosen.keep_templates, *(more if phrases[text] else ())}) for text in named}
    return {text: set(_kept(reader, [text], templates[text], chosen)) for text in named}


def _kept(reader: RowReader, protected: Sequence[str], templates: Sequence[str], chosen: Settings) -> list[Key]:
    found: set[Key] = set()
    for template in templates:
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

"""A look at what an edit does to the denoiser: a few recorded predictions, without the edit and with it.

For each concept a sentence that no method is solved on. The network predicts for it, for the same sentence with the anchor,
and for it again under the edit; the share of the way from the first to the second says whether the edit acts, before
anybody draws. It is no proof: see `diffaccel.erasure.proof`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.erasure.concepts import Concept
from diffaccel.erasure.edit import Edit
from diffaccel.erasure.null_drift import predict
from diffaccel.erasure.recording import Drawing, encode, record
from diffaccel.erasure.scope import untouched, without_edit

SENTENCE = "a picture of one {}"
MOST_CONCEPTS, MOST_KEEPS, STEPS = 3, 2, 2
WEAK, LOST = 0.5, 0.5
_ALIKE = 1e-3  # predictions that differ by less of their length are the same


@dataclass(frozen=True)
class Effect:
    """What was seen.

    Attributes:
        moved: of each looked-at concept, how far its prediction goes towards the anchor's: 0 not at all, 1 all the way.
        changed: of the same, by which share of its length the prediction changes at all.
        kept: of looked-at keeps, how far their prediction goes, against the way of the concepts.
        note: why nothing could be seen; "" otherwise.
    """

    moved: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def weak(self) -> tuple[str, ...]:
        """Concepts that will hardly look erased."""
        return tuple(name for name, share in self.moved.items() if share < WEAK)

    @property
    def lost(self) -> tuple[str, ...]:
        """Keeps that will hardly look kept."""
        return tuple(name for name, share in self.kept.items() if share > LOST)

    def __str__(self) -> str:
        if self.note:
            return f"The effect was not checked: {self.note}"
        said = [f"{name!r} {way(share)}" for name, share in self.moved.items()]
        said += [f"{name!r} (kept) {share:.0%} as far" for name, share in self.kept.items()]
        return f"Checked on {STEPS} predictions of the denoiser: {', '.join(said)}."

    @classmethod
    def of(cls, found: Any) -> Effect | None:
        """From what a file holds; None if it holds none of it."""
        parts = ("moved", "changed", "kept")
        if not isinstance(found, Mapping) or not all(isinstance(found.get(name), Mapping) for name in parts):
            return None
        return cls(found["moved"], found["changed"], found["kept"], str(found.get("note", "")))

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it."""
        return {"moved": dict(self.moved), "changed": dict(self.changed), "kept": dict(self.kept), "note": self.note}


def way(share: float) -> str:
    """How far, in words that make sense whatever the number."""
    if share > 2:
        return "goes far past its anchor"
    if abs(share) < 0.005:
        return "does not move"
    return "moves away from its anchor" if share < 0 else f"goes {share:.0%} of the way to its anchor"


def look_at(pipe: Any, edit: Edit) -> Effect:
    """Predict without and with the edit; the pipeline ends as it was.

    Looks at the concepts that the edit moves least and at the keeps that it moves most, as far as its solve told. Costs
    about three evaluations of the denoiser for each step and text.
    """
    found = edit.routes.values()
    strength = {
        c.target: min((one["strength"].get(c.target, 0.0) for one in found), default=0.0) for c in edit.concepts
    }
    change = {
        text: max((one.get("named_change", {}).get(text, 0.0) for one in found), default=0.0) for text in edit.keep
    }
    concepts = sorted(edit.concepts, key=lambda concept: strength[concept.target])[:MOST_CONCEPTS]
    keeps = sorted((text for text in change if text), key=lambda text: -change[text])[:MOST_KEEPS]
    return _look(pipe, edit, concepts, keeps)


def _look(pipe: Any, edit: Edit, shown: Sequence[Concept], kept: Sequence[str]) -> Effect:
    texts = [*(_sentence(concept.target) for concept in shown), *kept]
    instead = [*(_sentence(concept.anchor or "") for concept in shown), *kept]
    try:
        before, wanted, after = _predictions(pipe, edit, texts, instead)
    except Exception as error:  # noqa: BLE001  (other people's pipelines: the edit is sound even if one needs more than texts)
        return Effect(note=f"{type(error).__name__}: {_printable(str(error))}")
    return _effect(before, wanted, after, [concept.target for concept in shown], kept)


def _printable(text: str) -> str:
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:200]


def _sentence(name: str) -> str:
    return " ".join(SENTENCE.replace("{}", name).split())


def _predictions(pipe: Any, edit: Edit, texts: Sequence[str], instead: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """For every text one row (n, ...) of all recorded moments: as it was, as the other text has it, under the edit."""
    drawing = Drawing(steps=STEPS, batch_size=len(texts))
    with untouched(pipe), without_edit(pipe, edit, "map") as applied, torch.no_grad():
        own, other = encode(pipe, texts, drawing), encode(pipe, instead, drawing)
        states = record(pipe, own, drawing, moments=STEPS)
        before, wanted = [state.prediction for state in states], predict(pipe, states, other)
        with applied():
            after = predict(pipe, states, own)
    return _rows(before), _rows(wanted), _rows(after)


def _rows(predictions: Sequence[Tensor]) -> Tensor:
    return torch.cat([prediction.flatten(1).double().cpu() for prediction in predictions], 1)


def _effect(before: Tensor, wanted: Tensor, after: Tensor, names: Sequence[str], kept: Sequence[str]) -> Effect:
    count = len(names)
    asked, done = (wanted - before)[:count], after - before
    length, far = before.norm(dim=1), asked.norm(dim=1)
    if not bool(torch.isfinite(done).all()):
        return Effect(note="the network predicts numbers that are not finite.")
    alike = [name for name, one, of in zip(names, far, length, strict=False) if one <= _ALIKE * of]
    if alike:
        return Effect(note=f"the model predicts the same for {alike[0]!r} and for its anchor.")
    moved = (asked * done[:count]).sum(1) / far.square()
    spread = done[count:].norm(dim=1) / far.mean()
    return Effect(_named(names, moved), _named(names, done.norm(dim=1) / length), _named(kept, spread))


def _named(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=False))

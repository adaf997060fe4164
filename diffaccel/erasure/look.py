"""A look at what an edit does to the denoiser: a few recorded predictions, without the edit and with it.

For each concept a sentence that no method is solved on. The network predicts for it, for the same sentence with the anchor,
and for it again under the edit; the share of the way from the first to the second says whether the edit acts, before
anybody draws. It is no proof: see `diffaccel.erasure.proof.proving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.edits.concepts import Concept
from diffaccel.edits.edit import Edit
from diffaccel.edits.effect import STEPS, Effect
from diffaccel.erasure.proof.null_drift import predict
from diffaccel.erasure.proof.recording import Drawing, encode, record
from diffaccel.erasure.proof.scope import untouched, without_edit

SENTENCE = "a picture of one {}"
MOST_CONCEPTS, MOST_KEEPS = 3, 2
_ALIKE = 1e-3  # predictions that differ by less of their length are the same


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

"""How far the prediction for the empty prompt moves: it is in every guided picture, so if it moves, all of them do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.erasure.proof.recording import Drawing, Moment, denoiser_of, encode, record, replay
from diffaccel.errors import Unsupported


def null_states(pipe: Any, drawing: Drawing, notes: list[str]) -> tuple[list[Moment], Any]:
    """Recorded calls for the empty prompt, and its embedding."""
    try:
        with torch.no_grad():
            encoding = encode(pipe, [""], drawing)
        return record(pipe, encoding, drawing, moments=6), encoding
    except Unsupported as error:
        notes.append(f"The drift of the empty prompt was not measured: {error}")
        return [], None


@torch.no_grad()
def predict(pipe: Any, states: Sequence[Moment], encoding: Any) -> list[Tensor]:
    """What the denoiser predicts now in the recorded calls."""
    _, network = denoiser_of(pipe)
    return [replay(network, state, encoding) for state in states]


def drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """Relative change of the predictions for the empty prompt, averaged over denoising steps."""
    if not before:
        return None
    pairs = zip(before, after, strict=True)
    return float(torch.tensor([(b - a).float().norm() / a.float().norm() for a, b in pairs]).mean())

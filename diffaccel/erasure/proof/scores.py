"""Figures of a proof: shares with binomial intervals, distances between sets of pictures, agreement with a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.measure.quality import Interval, QualityError

Z95 = 1.959963984540054


def binomial(hits: Tensor | Sequence[bool]) -> Interval:
    """Share of True in (n,) with its 95 % Wilson interval, which stays sensible at 0 and 1.

    Raises:
        QualityError: nothing was counted.
    """
    values = torch.as_tensor(hits).double()
    count = values.numel()
    if not count:
        raise QualityError("a share needs at least one picture.")
    share = float(values.mean())
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Kernel inception distance's estimator on any features: unbiased squared MMD under (x.y / d + 1)^3.

    Unlike a Frechet distance it may be taken over few pictures; it is 0 on average for independent draws of one
    distribution and may be slightly negative. Features are measured in root mean squares of the reference's.

    Args:
        features, reference: (n, d) and (m, d) with n, m >= 2; computed in float64.
    Raises:
        QualityError: shapes do not fit, or a set has fewer than two rows.
    """
    if features.dim() != 2 or reference.dim() != 2 or features.shape[1] != reference.shape[1]:
        raise QualityError("features must be two tables of equal width.")
    if min(len(features), len(reference)) < 2:
        raise QualityError("a kernel distance needs two pictures or more on either side.")
    scale = reference.double().square().mean().sqrt().clamp(min=1e-12)  # figures do not depend on the features' unit
    x, y = features.double() / scale, reference.double() / scale
    return float(_within(x) + _within(y) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor) -> Tensor:
    kernel, count = _kernel(x, x), len(x)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))


def picture_distance(pictures: Tensor, reference: Tensor) -> float:
    """Root mean square difference of pixels (0 to 1), averaged over pictures (n, 3, h, w) of the same prompt and seed."""
    return float((pictures - reference).square().mean((1, 2, 3)).sqrt().mean())


def clip_scores(clip: Any, pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """Cosine of picture and text times 100, (n,).

    Args:
        clip: a callable (pictures (n, 3, h, w) in [0, 1], texts) -> n numbers, or a pair (CLIPModel, CLIPProcessor) of
            transformers.
    Raises:
        QualityError: it is neither, or gives another number of scores.
    """
    scores = (
        _clip_pair(*clip, pictures, texts)
        if isinstance(clip, tuple) and len(clip) == 2
        else _call(clip, pictures, texts)
    )
    scores = torch.as_tensor(scores).detach().float().cpu().flatten()
    if len(scores) != len(texts):
        raise QualityError(f"the CLIP gave {len(scores)} scores for {len(texts)} pictures.")
    return scores


def _call(clip: Any, pictures: Tensor, texts: Sequence[str]) -> Any:
    if not callable(clip):
        raise QualityError("clip must be a callable (pictures, texts) -> scores, or (CLIPModel, CLIPProcessor).")
    return clip(pictures, list(texts))


@torch.no_grad()
def _clip_pair(model: Any, processor: Any, pictures: Tensor, texts: Sequence[str]) -> Tensor:
    arrays = [(picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for picture in pictures]
    inputs = processor(text=list(texts), images=arrays, return_tensors="pt", padding=True, truncation=True)
    output = model(**inputs.to(model.device))
    return 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds, dim=-1)

"""How far accelerated pictures are from plain ones, and how sure we may be: PSNR, SSIM, Frechet distance, bootstrap.

Pictures are float tensors (n, 3, h, w) in [0, 1]. Scores are per picture, so that comparisons can be paired: same prompt
and seed, plain against recipe. Every random draw comes from an own generator with a fixed seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffaccelError

IDENTICAL_DB = 100.0  # what an identical picture counts in a mean over pictures that are not all identical


class QualityError(DiffaccelError, ValueError):
    """Pictures or features that cannot be scored; the message gives the reason."""


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture in dB, (n,) fp32; `inf` where the pictures are identical.

    Args:
        images, reference: (n, 3, h, w) float in [0, 1]; picture i is compared with picture i.
    Raises:
        QualityError: shapes differ, values are not pictures, or torchmetrics is missing.
    """
    images, reference = _checked(images, reference)
    score = _torchmetrics().peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return torch.as_tensor(score)


def mean_psnr(values: Tensor) -> float:
    """Mean of per-picture PSNR in dB. `inf` if all pictures are identical; a few identical ones count as 100 dB."""
    return math.inf if bool(values.isinf().all()) else float(values.double().clamp(max=IDENTICAL_DB).mean())


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per picture (11 x 11 Gaussian window, sigma 1.5, mirrored edges), (n,) fp32; 1 where identical.

    Args:
        images, reference: (n, 3, h, w) float in [0, 1].
    Raises:
        QualityError: as `psnr`; pictures smaller than the window.
    """
    images, reference = _checked(images, reference)
    if min(images.shape[-2:]) < 11:
        raise QualityError(f"SSIM needs pictures of 11 x 11 pixels or more, got {_size(images)}.")
    score = _torchmetrics().structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    return torch.as_tensor(score).reshape(len(images))  # torchmetrics drops the dimension for one picture


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two feature sets, each seen as a Gaussian: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Args:
        features, reference: (n, d) and (m, d), any real dtype; computed in float64.
    Returns:
        A distance >= 0, in squared feature units. It falls with the number of samples: compare equal counts only.
    Raises:
        QualityError: shapes do not fit, values are not finite, or a set has d samples or fewer.
    """
    first, second = _moments(features), _moments(reference)
    if len(first[0]) != len(second[0]):
        raise QualityError(f"features of width {len(first[0])} and {len(second[0])} cannot be compared.")
    shift = (first[0] - second[0]).square().sum()
    # tr (C1 C2)^(1/2) = tr (A C2 A)^(1/2) with A = C1^(1/2): symmetric, so eigh gives real roots
    root = _matrix_root(first[1])
    cross = torch.linalg.eigvalsh(root @ second[1] @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(shift + first[1].trace() + second[1].trace() - 2 * cross))


def enough_for_frechet(features: Tensor) -> bool:
    """Whether there are more samples than feature dimensions, as `frechet_distance` asks for."""
    return features.shape[0] > features.shape[1]


def bootstrap(values: Any, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a mean.

    Args:
        values: (n,) numbers or booleans, one per prompt.
        level: confidence level in (0, 1).
    Raises:
        QualityError: no values, or values that are not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise QualityError("an interval needs a non-empty list of finite numbers.")
    draws = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_difference(values: Any, plain: Any, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean difference `values - plain`; entry i of both belongs to the same prompt and seed.

    Pairing removes the spread between prompts, which is most of the noise. Raises `QualityError` on unequal lengths.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(plain, dtype=np.float64)
    if first.shape != second.shape:
        raise QualityError(f"pairs need equal lengths, got {first.shape} and {second.shape}.")
    return bootstrap(first - second, level=level, seed=seed)


def _torchmetrics() -> Any:
    try:
        import torchmetrics.functional.image  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise QualityError(
            "PSNR and SSIM need torchmetrics; install it with: pip install 'diffaccel[metrics]'"
        ) from error
    return torchmetrics.functional.image


def _checked(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != reference.shape:
        raise QualityError(f"pictures of {tuple(images.shape)} cannot be compared with {tuple(reference.shape)}.")
    if images.dim() != 4 or not len(images):
        raise QualityError(f"pictures must be (n, channels, height, width) with n > 0, got {tuple(images.shape)}.")
    return _pixels(images), _pixels(reference)


def _pixels(images: Tensor) -> Tensor:
    images = images.float()
    if not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
        raise QualityError("picture values must be finite and between 0 and 1.")
    return images


def _size(images: Tensor) -> str:
    return " x ".join(str(side) for side in images.shape[-2:])


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) in float64."""
    if features.dim() != 2:
        raise QualityError(f"features must be (samples, width), got {tuple(features.shape)}.")
    if not enough_for_frechet(features):
        count, width = features.shape
        raise QualityError(f"a Frechet distance over {width} features needs more than {width} pictures, got {count}.")
    if not features.isfinite().all():
        raise QualityError("features must be finite.")
    rows = features.double()
    return rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])


def _matrix_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix; rounding may have made tiny eigenvalues negative."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root

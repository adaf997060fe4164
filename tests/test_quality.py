"""Scores against slow formulas written again from their definitions, and their refusals."""

from __future__ import annotations

import builtins
import math
import random
import statistics

import pytest
import torch

from diffaccel.measure.quality import (
    QualityError,
    bootstrap,
    frechet_distance,
    mean_psnr,
    paired_difference,
    psnr,
    ssim,
)


def pictures(count: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_ten_log_of_one_over_mean_squared_error() -> None:
    first, second = pictures(seed=1), pictures(seed=2)
    for score, a, b in zip(psnr(first, second), first.double(), second.double(), strict=True):
        error = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()
        assert float(score) == pytest.approx(10 * math.log10(1 / error), abs=1e-4)


def test_psnr_of_a_known_offset_and_of_identical_pictures() -> None:
    grey = torch.full((2, 3, 12, 12), 0.5)
    other = grey.clone()
    other[1] += 0.1
    scores = psnr(other, grey)
    assert scores[0] == math.inf
    assert float(scores[1]) == pytest.approx(20.0, abs=1e-4)
    assert mean_psnr(scores) == pytest.approx(60.0, abs=1e-4)  # identical counts as 100 dB beside others
    assert mean_psnr(psnr(grey, grey)) == math.inf


def slow_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Wang et al. 2004, one window at a time, around every pixel of the mirrored picture."""
    a, b = (torch.nn.functional.pad(t, (5, 5, 5, 5), mode="reflect") for t in (a, b))
    half = [math.exp(-(((i - 5) / 1.5) ** 2) / 2) for i in range(11)]
    weight = torch.tensor(half, dtype=torch.float64)
    weight = torch.outer(weight, weight)
    weight /= weight.sum()
    scores = []
    for channel in range(a.shape[0]):
        for top in range(a.shape[1] - 10):
            for left in range(a.shape[2] - 10):
                x, y = (t[channel, top : top + 11, left : left + 11].double() for t in (a, b))
                mx, my = float((weight * x).sum()), float((weight * y).sum())
                vx, vy = float((weight * x * x).sum()) - mx**2, float((weight * y * y).sum()) - my**2
                vxy = float((weight * x * y).sum()) - mx * my
                scores.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return statistics.fmean(scores)


def test_ssim_equals_the_definition() -> None:
    first = pictures(2, 16, seed=3)
    second = (first + 0.1 * pictures(2, 16, seed=4)).clamp(0, 1)
    for score, a, b in zip(ssim(second, first), second, first, strict=True):
        assert float(score) == pytest.approx(slow_ssim(a, b), abs=2e-4)
    assert ssim(first[:1], first[:1]).tolist() == pytest.approx([1.0])


def test_more_noise_lowers_both_scores() -> None:
    clean = pictures(4, 32) * 0.5 + 0.25
    noise = pictures(4, 32, seed=9) - 0.5
    levels = [(clean + strength * noise).clamp(0, 1) for strength in (0.02, 0.1, 0.4)]
    for score in (psnr, ssim):
        means = [float(score(level, clean).mean()) for level in levels]
        assert means == sorted(means, reverse=True)
        assert len(set(means)) == 3


def gaussian(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count: int, width: int, seed: int) -> torch.Tensor:
    """Samples whose mean is exactly 0 and whose covariance is exactly the identity."""
    rows = gaussian(count, width, seed)
    rows = rows - rows.mean(0)
    factor = torch.linalg.cholesky(torch.cov(rows.T))
    return torch.linalg.solve_triangular(factor, rows.T, upper=False).T


def test_frechet_on_diagonal_covariances_has_a_closed_form() -> None:
    spread_a, spread_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    a, b = whitened(50, 3, 1) * spread_a + mean_a, whitened(70, 3, 2) * spread_b + mean_b
    expected = float(((mean_a - mean_b) ** 2).sum() + ((spread_a - spread_b) ** 2).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


def test_frechet_on_full_covariances_equals_the_roots_of_the_product() -> None:
    a, b = gaussian(60, 5, 3) @ gaussian(5, 5, 4), gaussian(60, 5, 5) @ gaussian(5, 5, 6) + 0.3
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T))  # no symmetric form, no shared code
    shift = float((a.mean(0) - b.mean(0)).square().sum())
    expected = shift + float(torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product.sqrt().real.sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_is_zero_on_itself_symmetric_and_safe_on_singular_covariances() -> None:
    a, b = gaussian(40, 4, 7), gaussian(40, 4, 8) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    flat = a.clone()
    flat[:, 1] = flat[:, 0]
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a[:, :1], a[:, :1] + 2) == pytest.approx(4)


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (torch.zeros(8, 8), torch.zeros(20, 8), "needs more than 8 pictures, got 8"),
        (torch.zeros(20, 3), torch.zeros(20, 4), "width 3 and 4"),
        (torch.zeros(20), torch.zeros(20), "must be .samples, width"),
        (torch.full((20, 3), math.nan), torch.zeros(20, 3), "finite"),
    ],
)
def test_frechet_refusals(first: torch.Tensor, second: torch.Tensor, sentence: str) -> None:
    with pytest.raises(QualityError, match=sentence):
        frechet_distance(first, second)


def test_bootstrap_is_the_percentile_interval_and_repeats() -> None:
    values = [float(v) for v in range(10)]
    interval = bootstrap(values, resamples=4000)
    rng = random.Random(5)
    means = sorted(statistics.fmean(rng.choices(values, k=10)) for _ in range(20000))
    assert interval.mean == 4.5
    assert interval.low == pytest.approx(means[500], abs=0.15)
    assert interval.high == pytest.approx(means[19500], abs=0.15)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, level=0.5).low > interval.low
    assert bootstrap([True] * 7) == bootstrap([1.0] * 7)
    assert bootstrap([1.0]).low == bootstrap([1.0]).high == 1.0


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for trial in range(200):
        interval = bootstrap([rng.random() < 0.8 for _ in range(100)], resamples=300, seed=trial)
        hits += interval.low <= 0.8 <= interval.high
    assert 178 <= hits <= 199


def test_pairing_narrows_the_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(100, generator=generator) * 5
    recipe = plain - 0.2 + 0.1 * torch.randn(100, generator=generator)
    paired = paired_difference(recipe, plain)
    assert paired.low < -0.15 > paired.high
    assert paired.high - paired.low < 0.1 * (bootstrap(recipe).high - bootstrap(recipe).low)


def test_scores_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    bootstrap([0.0, 1.0])
    psnr(pictures(), pictures(seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (pictures(2), pictures(3), "cannot be compared"),
        (pictures(2)[0], pictures(2)[0], "channels, height, width"),
        (pictures(2) * 2, pictures(2), "between 0 and 1"),
        (pictures(0), pictures(0), "n > 0"),
    ],
)
def test_picture_refusals(first: torch.Tensor, second: torch.Tensor, sentence: str) -> None:
    with pytest.raises(QualityError, match=sentence):
        psnr(first, second)


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(QualityError, match="11 x 11 pixels or more, got 8 x 8"):
        ssim(pictures(1, 8), pictures(1, 8))


@pytest.mark.parametrize("values", [[], [math.nan], [[1.0, 2.0]]])
def test_bootstrap_refusals(values: list[float]) -> None:
    with pytest.raises(QualityError, match="finite numbers"):
        bootstrap(values)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(QualityError, match="equal lengths"):
        paired_difference([1.0], [1.0, 2.0])


def test_missing_torchmetrics_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("torchmetrics"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(QualityError, match=r"pip install 'diffaccel\[metrics\]'"):
        psnr(pictures(), pictures())

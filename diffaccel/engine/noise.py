"""Noise level of a scheduler's current evaluation, always as EDM sigma.

Bounds of all methods are given in EDM sigma (noise standard deviation over signal scale), so that one number means the
same for every scheduler. Variance-preserving models: sigma = sqrt((1 - abar) / abar). Flow models: sigma = s / (1 - s).
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from diffaccel.errors import Unsupported

# Their `sigmas` list does not line up with `timesteps`: every other evaluation happens at an interpolated noise level.
_MISALIGNED_SIGMAS = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")

# Schedulers that draw noise on every step; others do so for some settings only (see `adds_noise`).
_NOISY = (
    *("Ancestral", "SDE", "Sde", "DDPM", "LCM", "TCD", "SASolver", "RePaint", "UnCLIP", "Cosine", "CogVideoXDPM"),
    "ConsistencyModels",
)


def is_flow(scheduler: Any) -> bool:
    """True if the scheduler's `sigmas` are flow times s in [0, 1] and not EDM sigmas."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas", False))


def adds_noise(scheduler: Any, eta: float = 0.0) -> bool:
    """Whether a diffusers scheduler draws noise in `step`; `eta` is the pipeline's argument for those that take it."""
    config = scheduler.config
    if any(word in type(scheduler).__name__ for word in _NOISY) or config.get("stochastic_sampling", False):
        return True
    if any("sde" in str(config.get(name, "")) for name in ("algorithm_type", "solver_type")):
        return True
    return eta > 0 and "eta" in inspect.signature(scheduler.step).parameters


def edm_sigma(scheduler: Any, timestep: float, index: int | None) -> float:
    """EDM sigma of the evaluation at `timestep`, which is entry `index` of the scheduler's lists.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`.
        timestep: the value the pipeline loop uses for this evaluation; may be fractional.
        index: position in the scheduler's lists; None if the scheduler keeps none.
    Returns:
        sigma >= 0; `inf` where the signal is exactly zero (flow time 1, zero-terminal-SNR).
    Raises:
        Unsupported: the scheduler keeps neither sigmas nor alphas.
    """
    if type(scheduler).__name__ == "IPNDMScheduler" and index is not None:  # a cosine schedule in lists of its own
        noise, signal = float(scheduler.betas[index]), float(scheduler.alphas[index])
        return math.inf if signal == 0 else noise / signal
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or index is None or type(scheduler).__name__ in _MISALIGNED_SIGMAS:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise Unsupported(f"{type(scheduler).__name__} keeps no noise levels that diffaccel can read.")
        return vp_sigma(scheduler.alphas_cumprod, timestep)
    value = float(sigmas[index])
    return flow_to_edm(value) if is_flow(scheduler) else value


def flow_to_edm(s: float) -> float:
    """sigma = s / (1 - s) of a rectified-flow time s in [0, 1]; s = 1 gives `inf`."""
    return math.inf if s >= 1.0 else s / (1.0 - s)


def vp_sigma(alphas_cumprod: torch.Tensor, timestep: float) -> float:
    """EDM sigma of a variance-preserving model at a possibly fractional timestep.

    Between table entries log sigma is linear in t: schedulers that visit fractional timesteps (KDPM2) place them so.
    """
    last = len(alphas_cumprod) - 1
    low = min(max(math.floor(timestep), 0), last)
    weight = min(max(timestep - low, 0.0), 1.0)
    below = _table_sigma(alphas_cumprod, low)
    if weight == 0.0 or low == last:
        return below
    return math.pow(below, 1 - weight) * math.pow(_table_sigma(alphas_cumprod, low + 1), weight)


def _table_sigma(alphas_cumprod: torch.Tensor, t: int) -> float:
    abar = float(alphas_cumprod[t])
    return math.inf if abar == 0.0 else math.sqrt((1.0 - abar) / abar)


def predicted_x0(
    sample: torch.Tensor, output: torch.Tensor, sigma: float, scheduler: Any, sign: int = 1
) -> torch.Tensor:
    """The clean picture implied by a prediction, up to a positive factor per call, in fp32.

    Args:
        sample: what the denoiser received: (rows, channels, h, w), (rows, tokens, channels) or video.
        output: its prediction. What only one of the two has is ignored: inpainting and control channels of the input,
            reference tokens, learned variances of the output.
        sigma: EDM sigma of the call.
        sign: -1 if the pipeline negates the prediction.
    Returns:
        The common shape, fp32. VP inputs are x = (x0 + sigma eps) / sqrt(1 + sigma^2); flow inputs (1-s) x0 + s eps.
    """
    common = tuple(slice(min(sizes)) for sizes in zip(sample.shape, output.shape, strict=True))
    x, y = sample[common].float(), sign * output[common].float()
    kind = "flow" if is_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")
    signal, noise = 1 / math.sqrt(1 + sigma**2), (sigma / math.sqrt(1 + sigma**2) if math.isfinite(sigma) else 1.0)
    if kind == "epsilon":
        return x - noise * y
    if kind == "v_prediction":
        return signal * x - noise * y
    if kind == "flow":
        return x - (sigma / (1 + sigma) if math.isfinite(sigma) else 1.0) * y
    return y

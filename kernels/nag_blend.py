"""Blend of normalised attention guidance: pushes attention outputs away from those of a negative text, within bounds.

Chen et al., "Normalized Attention Guidance" (arXiv 2505.21179). For each token, over the channels of all heads together:

    g = scale p - (scale - 1) n,  r = |g| / |p|,  out = alpha g min(r, tau) / r + (1 - alpha) p

with p and n the outputs for the positive and the negative text and |.| the sum of absolute values (order 1) or the Euclidean
norm (order 2). Written with min(1, tau |p| / |g|), nothing is divided by |p|: a token with p = 0 gets guided part 0, the
limit, and one with g = 0 keeps it. The norm crosses heads, so this cannot be part of an attention kernel of one head.

Layout: (batch, tokens, channels), last stride 1. Everything is computed in fp32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import Tile, capability, power_of_two, tiles, tl, triton

MOST_CHANNELS = 8192  # of the kernel, which holds a token in registers
_TOKENS = 2**18  # numbers of one part on a processor, so that intermediate results stay in its cache


def nag_blend_oracle(
    positive: Tensor, negative: Tensor, *, scale: float, tau: float, alpha: float, order: int = 1
) -> Tensor:
    """Token by token in float64, as the formula is written in the paper."""
    out = torch.empty_like(positive, dtype=torch.float64)
    for b in range(positive.shape[0]):
        for t in range(positive.shape[1]):
            p, n = positive[b, t].double(), negative[b, t].double()
            guided = scale * p - (scale - 1) * n
            own, length = (float(torch.linalg.vector_norm(x, ord=order)) for x in (p, guided))
            if own == 0:
                guided = torch.zeros_like(guided)
            elif length > 0:
                ratio = length / own
                guided = guided * min(ratio, tau) / ratio
            out[b, t] = alpha * guided + (1 - alpha) * p
    return out


def _nag_blend_torch(
    positive: Tensor, negative: Tensor, *, scale: float, tau: float, alpha: float, order: int
) -> Tensor:
    out = torch.empty_like(positive, memory_format=torch.contiguous_format)
    tokens = positive.shape[1]
    if positive.device.type == "cpu":
        tokens = max(1, _TOKENS // max(1, positive.shape[0] * positive.shape[2]))
    for start in range(0, positive.shape[1], max(tokens, 1)):
        p, n = positive[:, start : start + tokens].float(), negative[:, start : start + tokens].float()
        guided = p * scale - n * (scale - 1)
        own = torch.linalg.vector_norm(p, ord=order, dim=-1, keepdim=True)
        length = torch.linalg.vector_norm(guided, ord=order, dim=-1, keepdim=True)
        factor = torch.where(length > 0, (tau * own / length).clamp(max=1), 1.0)
        out[:, start : start + tokens] = guided * factor * alpha + p * (1 - alpha)
    return out


# --- Triton ---

_TILES = {  # by channels: one token for each program
    ((8, 0), 1024): Tile(1, 1024, warps=4, stages=1),
    ((8, 0), MOST_CHANNELS): Tile(1, MOST_CHANNELS, warps=8, stages=1),
}


@triton.jit
def _nag_blend_kernel(
    positive, negative, out, tokens, scale, tau, alpha,
    stride_pb, stride_pt, stride_nb, stride_nt, stride_ob, stride_ot,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One token."""
    b = (tl.program_id(0) // tokens).to(tl.int64)
    t = (tl.program_id(0) % tokens).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    p = tl.load(positive + b * stride_pb + t * stride_pt + channel, mask=inside, other=0.0).to(tl.float32)
    n = tl.load(negative + b * stride_nb + t * stride_nt + channel, mask=inside, other=0.0).to(tl.float32)
    guided = p * scale - n * (scale - 1.0)
    if ORDER == 1:
        own, length = tl.sum(tl.abs(p), 0), tl.sum(tl.abs(guided), 0)
    else:
        own, length = tl.sqrt(tl.sum(p * p, 0)), tl.sqrt(tl.sum(guided * guided, 0))
    factor = tl.where(length > 0.0, tl.minimum(tau * own / tl.where(length > 0.0, length, 1.0), 1.0), 1.0)
    result = guided * (factor * alpha) + p * (1.0 - alpha)
    tl.store(out + b * stride_ob + t * stride_ot + channel, result.to(out.dtype.element_ty), mask=inside)


def _nag_blend_triton(
    positive: Tensor, negative: Tensor, *, scale: float, tau: float, alpha: float, order: int
) -> Tensor:
    out = torch.empty_like(positive, memory_format=torch.contiguous_format)
    batch, tokens, channels = positive.shape
    if out.numel() == 0:
        return out
    tile = tiles(_TILES, channels, capability(positive))
    strides = [tensor.stride(d) for tensor in (positive, negative, out) for d in range(2)]
    _nag_blend_kernel[(batch * tokens,)](
        positive, negative, out, tokens, scale, tau, alpha, *strides,
        CHANNELS=channels, BLOCK=power_of_two(channels), ORDER=order, **tile.launch,
    )  # fmt: skip
    return out


def _supported(positive: Tensor, negative: Tensor, **settings: float) -> bool:
    return positive.shape[2] <= MOST_CHANNELS and positive.stride(2) == 1 and negative.stride(2) == 1


def _fake(positive: Tensor, negative: Tensor, **settings: float) -> Tensor:
    return torch.empty_like(positive, memory_format=torch.contiguous_format)


def blend_flops(numbers: int) -> int:
    """Of `numbers` outputs: three for g, two for each norm, four for the blend."""
    return 11 * numbers


def _flops(positive: tuple[int, ...], negative: tuple[int, ...], out_shape: object = None, **settings: float) -> int:
    batch, tokens, channels = positive
    return blend_flops(batch * tokens * channels)


_operator = register(
    "nag_blend",
    _nag_blend_torch,
    fake=_fake,
    triton_path=_nag_blend_triton,
    supported=_supported,
    flops=_flops,
)


def nag_blend(
    positive: Tensor, negative: Tensor, *, scale: float, tau: float = 2.5, alpha: float = 0.25, order: int = 1
) -> Tensor:
    """Attention outputs for the positive text, guided away from those for the negative one, contiguous.

    Args:
        positive, negative: (batch, tokens, channels of all heads), same shape and dtype.
        scale: 1 is no guidance.
        tau: how many times longer than before a token's output may become.
        alpha: share of the guided output; 0 is no guidance and returns `positive` itself.
        order: of the norm, 1 or 2.
    Raises:
        ValueError: another order.
    """
    if order not in (1, 2):
        raise ValueError(f"the order of the norm is 1 or 2, not {order}")
    if alpha == 0:
        return positive
    out: Tensor = _operator(positive, negative, scale=scale, tau=tau, alpha=alpha, order=order)
    return out

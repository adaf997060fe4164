"""One door to dense attention kernels: torch's own by default, others by name where they are installed.

Torch chooses among cuDNN, flash and memory-efficient kernels itself, and is hard to beat with its own choice. The others
are worth a name on some GPUs: FlashAttention-3 (arXiv 2407.08608) on Hopper, SageAttention's int8 (arXiv 2411.10958),
NATTEN's kernels for Hopper and Blackwell, flex_attention's generated ones, xformers. Nothing is imported before it is
asked for, nothing falls back to another kernel, and what ran is recorded for the run's report.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from diffaccel.errors import Unsupported
from diffaccel.kernels.attention_body import attention_flops
from diffaccel.kernels.registration import record


@dataclass(frozen=True)
class DenseKernel:
    """A kernel by name.

    Attributes:
        module: what is imported; "" for torch's own.
        distribution: what is installed.
        masks: whether it takes an additive mask.
        heads: largest head size it takes.
        run: (module, query, key, value, mask, scale) to the output; all (batch, heads, tokens, d).
    """

    module: str
    distribution: str
    masks: bool
    heads: int
    run: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]

    def takes(self, query: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether it computes attention with such queries and such a mask."""
        return query.shape[-1] <= self.heads and (mask is None or (self.masks and mask.is_floating_point()))


def _sdpa(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _flash3(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    out = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)
    return _heads_first(out[0] if isinstance(out, tuple) else out)  # older releases return the sums as well


def _sage(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    out: torch.Tensor = module.sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)
    return out


def _natten(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    return _heads_first(module.attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale))


def _xformers(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    if mask is not None:  # it does not broadcast a mask
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    parts = (x.transpose(1, 2) for x in (q, k, v))
    return _heads_first(module.memory_efficient_attention(*parts, attn_bias=mask, scale=scale))


@functools.cache
def _compiled_flex(module: Any) -> Any:
    return torch.compile(module.flex_attention, dynamic=False)  # uncompiled it would make the matrix of all scores


def _flex(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    out: torch.Tensor = _compiled_flex(module)(q, k, v, scale=scale)
    return out


def _heads_first(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2)


KERNELS = {
    "sdpa": DenseKernel("", "torch", True, 2**31, _sdpa),
    "flash3": DenseKernel("flash_attn_interface", "flash_attn_3", False, 256, _flash3),
    "sage": DenseKernel("sageattention", "sageattention", False, 128, _sage),
    "natten": DenseKernel("natten", "natten", False, 256, _natten),
    "flex": DenseKernel("torch.nn.attention.flex_attention", "torch", False, 256, _flex),
    "xformers": DenseKernel("xformers.ops", "xformers", True, 256, _xformers),
}


def available() -> dict[str, str | None]:
    """Version of the package behind each kernel, None where it is not installed. Imports nothing."""
    return {name: _version(kernel) for name, kernel in KERNELS.items()}


def _version(kernel: DenseKernel) -> str | None:
    if kernel.module and importlib.util.find_spec(kernel.module.split(".")[0]) is None:
        return None
    try:
        return importlib.metadata.version(kernel.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def choose(name: str) -> DenseKernel:
    """The kernel of this name.

    Raises:
        Unsupported: there is no such kernel, or its package is not installed.
    """
    if name not in KERNELS:
        raise Unsupported(f"there is no attention kernel {name!r}; the names are {', '.join(KERNELS)}.")
    if available()[name] is None:
        raise Unsupported(
            f"the attention kernel {name!r} needs the package {KERNELS[name].distribution}, which is not installed."
        )
    return KERNELS[name]


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kernel: str = "sdpa",
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + mask) v by the kernel of this name, and a record that it ran.

    Args:
        query, key, value: (batch, heads, tokens, d).
        mask: additive, in the queries' dtype, broadcastable to (batch, heads, N, M).
        scale: None is 1 / sqrt(d).
    Returns:
        (batch, heads, tokens, d), stored as (batch, tokens, heads, d), so that merging the heads copies nothing.
    Raises:
        Unsupported: the kernel is not installed, does not take a mask or this head size, or fails on this device.
    """
    chosen = choose(kernel)
    if mask is not None and not chosen.masks:
        raise Unsupported(f"the attention kernel {kernel!r} takes no mask.")
    if query.shape[-1] > chosen.heads:
        raise Unsupported(f"the attention kernel {kernel!r} takes heads up to {chosen.heads}, not {query.shape[-1]}.")
    record("dense_attention", kernel)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = torch.ops.diffaccel.dense_attention(query, key, value, mask, scale, kernel)
    return out


@torch.library.custom_op("diffaccel::dense_attention", mutates_args=())
def _dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, kernel: str
) -> torch.Tensor:
    """One operator for all kernels, so that FLOPs are counted whoever computes."""
    chosen = KERNELS[kernel]
    module = importlib.import_module(chosen.module) if chosen.module else None
    try:
        out = chosen.run(module, query, key, value, mask, scale)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise Unsupported(
            f"the attention kernel {kernel!r} does not run here ({query.device.type}, {query.dtype}): {reason}."
        ) from error
    return _heads_first(out.transpose(1, 2).contiguous())  # kernels differ; compiled code relies on what the fake says


@_dense_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float, kernel: str) -> Any:
    batch, heads, tokens, _ = query.shape
    return _heads_first(query.new_empty(batch, tokens, heads, value.shape[3]))


@register_flop_formula(torch.ops.diffaccel.dense_attention)
def _dense_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return attention_flops(query[0], query[1], query[2], key[2], query[3])

"""What operators.py compares with: the same results from plain torch, as public code writes them, and tomesd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def eager_match(tokens: Tensor, sources: Tensor, destinations: Tensor) -> Any:
    """Normalise, gather, one batched product, row maximum."""
    unit = F.normalize(tokens, dim=-1)
    left, right = unit[:, sources[0].long()], unit[:, destinations[0].long()]
    return (left @ right.transpose(1, 2)).max(dim=-1)


def eager_map(
    best: Tensor, index: Tensor, sources: Tensor, destinations: Tensor, removed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Full sort of the scores; slots, sizes and members by scatter and another sort."""
    order = best.argsort(dim=1, descending=True)
    merged, alone = order[:, :removed], order[:, removed:]
    slot = torch.empty(best.shape[0], best.shape[1] + destinations.shape[1], dtype=torch.long, device=best.device)
    count = destinations.shape[1]
    slot.scatter_(1, destinations.long(), torch.arange(count, device=best.device)[None])
    slot.scatter_(1, sources.long().gather(1, alone), torch.arange(alone.shape[1], device=best.device)[None] + count)
    slot.scatter_(1, sources.long().gather(1, merged), index.long().gather(1, merged))
    size = torch.zeros(best.shape[0], slot.shape[1] - removed, dtype=torch.long, device=best.device)
    return slot, size.scatter_add_(1, slot, torch.ones_like(slot)), slot.argsort(dim=1, stable=True)


def eager_merge(x: Tensor, slot: Tensor, kept: int) -> dict[str, Callable[[], Tensor]]:
    """With an expanded index as in public code, and with `index_add_`."""
    rows, _, channels = x.shape
    wide = slot.long().expand(rows, -1)[..., None].expand(-1, -1, channels)

    def expanded() -> Tensor:
        return x.new_zeros(rows, kept, channels).scatter_reduce(1, wide, x, "mean", include_self=False)

    return {"scatter_reduce": expanded, "index_add": partial(eager_mean(slot, rows, kept), x)}


def eager_mean(slot: Tensor, rows: int, kept: int) -> Callable[[Tensor], Tensor]:
    """Merging by `index_add_`; what depends on the map alone, which serves many calls, is made here."""
    flat = (slot.long() + kept * torch.arange(rows, device=slot.device)[:, None]).flatten()
    size = torch.bincount(flat, minlength=rows * kept)[:, None]

    def added(x: Tensor) -> Tensor:
        total = x.new_zeros(rows * kept, x.shape[2], dtype=torch.float32)
        total.index_add_(0, flat, x.reshape(-1, x.shape[2]).float())
        return (total / size).to(x.dtype).view(rows, kept, x.shape[2])

    return added


def eager_unmerge(y: Tensor, slot: Tensor) -> dict[str, Callable[[], Tensor]]:
    """With an expanded index, and with `index_select`."""
    rows, kept, channels = y.shape
    wide = slot.long().expand(rows, -1)[..., None].expand(-1, -1, channels)
    flat = (slot.long() + kept * torch.arange(rows, device=y.device)[:, None]).flatten()
    select = lambda: y.reshape(-1, channels).index_select(0, flat).view(rows, -1, channels)
    return {"gather": lambda: y.gather(1, wide), "index_select": select}


def tomesd_block(x: Tensor, side: int, layers: int) -> None:
    """tomesd's matching, merge and unmerge; it matches anew in every block."""
    from tomesd.merge import bipartite_soft_matching_random2d

    generator = torch.Generator(x.device).manual_seed(0)
    for _ in range(layers):
        merge, unmerge = bipartite_soft_matching_random2d(x, side, side, 2, 2, side * side // 2, generator=generator)
        unmerge(merge(x))


def eager_cache_write(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    cosine: Tensor,
    sine: Tensor,
    weight: Tensor,
) -> None:
    """RMSNorm, rotation by gathered tables, two indexed copies."""
    normed = F.rms_norm(key, key.shape[-1:], weight, eps=1e-6).float()
    cos, sin = (table[index.long()][:, None] for table in (cosine, sine))
    first, second = normed.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    keys.index_copy_(1, index.long(), (normed * cos + turned * sin).to(key.dtype))
    values.index_copy_(1, index.long(), value)


def eager_pladis(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax and entmax with alpha 1.5 by sorting, extrapolated with weight 2."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    half = scores / 2
    ordered = half.sort(dim=-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    mean, square = ordered.cumsum(-1) / count, ordered.square().cumsum(-1) / count
    tau = mean - ((1 - count * (square - mean.square())) / count).clamp(min=0).sqrt()
    support = (tau <= ordered).sum(-1, keepdim=True)
    sparse = (half - tau.gather(-1, support - 1)).clamp(min=0).square()
    dense = scores.softmax(-1)
    return (dense + 2 * (sparse - dense)).to(value.dtype) @ value


def eager_blend(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """The blend of normalised guidance as its paper writes it."""
    guided = positive * scale - negative * (scale - 1)
    own = positive.abs().sum(-1, keepdim=True)
    ratio = guided.abs().sum(-1, keepdim=True) / own
    guided = guided * ratio.clamp(max=tau) / ratio
    return guided * alpha + positive * (1 - alpha)

"""Write keys and values of some tokens into stored ones by index; norm and rotary positions of the keys on the way.

For token j of row b, with i = index[b, j]:

    keys[b, i] = rotate(norm(key[b, j]), i),  values[b, i] = value[b, j]

Between dense steps of region sampling (Liu et al., arXiv 2502.10389) only a part of the tokens is projected, and attention
reads the stored keys and values of all. norm is RMSNorm over the channels of a head, statistics in fp32. rotate turns pairs
of channels by the angles in the tables' row i, which is read inside: no gathered copy of the tables. Pairs are neighbours
(2k, 2k + 1) or, with `half`, channels k and k + size / 2. One rounding at the end.

Layout: key and value (batch, active, heads, size), keys and values (batch, tokens, heads, size), last stride 1; index
(active) or (batch, active) int32, each token at most once; cosine and sine (tokens, size) or (batch, tokens, size) fp32,
every angle at both channels of its pair. Only rows that the index names are touched. key with keys, or value with values,
may be left out: where a model makes its values before it has normed its keys, each is written when it is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import Tile, capability, power_of_two, tiles, tl, triton

MOST_NUMBERS = 16384  # of one token on the kernel: heads and channels, each rounded up to a power of two


def cache_write_oracle(
    key: Tensor | None,
    value: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    half: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Channel by channel in float64; returns the new keys and values and changes nothing."""
    new_keys = None if keys is None else keys.double().clone()
    new_values = None if values is None else values.double().clone()
    given = key if key is not None else value
    assert given is not None
    for b in range(given.shape[0]):
        for j, i in enumerate((index if index.dim() == 1 else index[b]).tolist()):
            if value is not None and new_values is not None:
                new_values[b, i] = value[b, j].double()
            if key is None or new_keys is None:
                continue
            vector = key[b, j].double()
            if weight is not None:
                vector = vector / (vector.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()
            if cosine is not None and sine is not None:
                c, s = ((table if table.dim() == 2 else table[b])[i].double() for table in (cosine, sine))
                turned = torch.empty_like(vector)
                size = vector.shape[-1]
                for k in range(size // 2):
                    first, second = (k, k + size // 2) if half else (2 * k, 2 * k + 1)
                    turned[:, first] = vector[:, first] * c[first] - vector[:, second] * s[first]
                    turned[:, second] = vector[:, second] * c[second] + vector[:, first] * s[second]
                vector = turned
            new_keys[b, i] = vector
    return new_keys, new_values


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, half: bool) -> Tensor:
    """Pairs of channels turned, in fp32: x cos + (-second, first) sin."""
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x.float() * cosine + turned.float() * sine


def _positions(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table for the indexed tokens: (batch or 1, active, 1, size)."""
    if table.dim() == 2:
        rows = table[index].unsqueeze(-2)
        return rows.unsqueeze(0) if index.dim() == 1 else rows
    rows = index.expand(table.shape[0], -1)
    return torch.gather(table, 1, rows[..., None].expand(-1, -1, table.shape[2])).unsqueeze(2)


def _cache_write_torch(
    key: Tensor | None,
    value: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    weight: Tensor | None,
    *,
    eps: float,
    half: bool,
) -> None:
    index = index.long()
    if key is not None and keys is not None:
        made = key
        if weight is not None:
            made = made.float()
            made = made * torch.rsqrt(made.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()
        if cosine is not None and sine is not None:
            made = _rotate(made, _positions(cosine, index), _positions(sine, index), half=half)
        _put(keys, index, made.to(keys.dtype))
    if value is not None and values is not None:
        _put(values, index, value)


def _put(stored: Tensor, index: Tensor, rows: Tensor) -> None:
    """stored[b, index[b, j]] = rows[b, j]."""
    if index.dim() == 1:
        stored.index_copy_(1, index, rows)
    elif stored.is_contiguous():  # one copy for the whole batch
        starts = torch.arange(len(index), device=index.device)[:, None] * stored.shape[1]
        flat = (starts + index).flatten()
        stored.view(-1, *stored.shape[2:]).index_copy_(0, flat, rows.reshape(-1, *rows.shape[2:]))
    else:
        for b in range(len(index)):
            stored[b].index_copy_(0, index[b], rows[b])


# --- Triton ---

_TILES = {  # by numbers of a token: one token for each program
    ((8, 0), 2048): Tile(1, 2048, warps=4, stages=1),
    ((8, 0), MOST_NUMBERS): Tile(1, MOST_NUMBERS, warps=8, stages=1),
}


@triton.jit
def _cache_write_kernel(
    key, value, keys, values, index, cosine, sine, weight, active, eps,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    stride_ib, stride_cb, stride_ct, stride_sb, stride_st,
    HEADS: tl.constexpr, SIZE: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_SIZE: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token: (heads, size) numbers of its key and its value."""
    b = (tl.program_id(0) // active).to(tl.int64)
    j = (tl.program_id(0) % active).to(tl.int64)
    i = tl.load(index + b * stride_ib + j).to(tl.int64)
    head, channel = tl.arange(0, ALL_HEADS).to(tl.int64)[:, None], tl.arange(0, ALL_SIZE)[None, :]
    inside = (head < HEADS) & (channel < SIZE)
    if VALUES:
        v = tl.load(value + b * stride_vb + j * stride_vt + head * stride_vh + channel, mask=inside, other=0.0)
        tl.store(values + b * stride_yb + i * stride_yt + head * stride_yh + channel, v, mask=inside)
    if KEYS:
        start = key + b * stride_kb + j * stride_kt + head * stride_kh
        x = tl.load(start + channel, mask=inside, other=0.0)
        target = keys + b * stride_xb + i * stride_xt + head * stride_xh + channel
        if NORM or ROTARY:
            x = x.to(tl.float32)
            if NORM:
                length = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / SIZE + eps)
                gain = tl.load(weight + channel, mask=channel < SIZE, other=0.0).to(tl.float32)
                x = x * length[:, None] * gain
            if ROTARY:
                if HALF:
                    other, lower = (channel + SIZE // 2) % SIZE, channel < SIZE // 2
                else:
                    other, lower = channel ^ 1, channel % 2 == 0
                partner = tl.load(start + other, mask=inside, other=0.0).to(tl.float32)
                if NORM:
                    gain = tl.load(weight + other, mask=channel < SIZE, other=0.0).to(tl.float32)
                    partner = partner * length[:, None] * gain
                c = tl.load(cosine + b * stride_cb + i * stride_ct + channel, mask=channel < SIZE, other=0.0)
                s = tl.load(sine + b * stride_sb + i * stride_st + channel, mask=channel < SIZE, other=0.0)
                x = x * c + tl.where(lower, -partner, partner) * s
            tl.store(target, x.to(keys.dtype.element_ty), mask=inside)
        else:
            tl.store(target, x, mask=inside)


def constants(heads: int, size: int) -> dict[str, int]:
    """Compile-time sizes of the kernel."""
    return {"HEADS": heads, "SIZE": size, "ALL_HEADS": power_of_two(heads), "ALL_SIZE": power_of_two(size)}


def _cache_write_triton(
    key: Tensor | None,
    value: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    weight: Tensor | None,
    *,
    eps: float,
    half: bool,
) -> None:
    given = key if key is not None else value
    assert given is not None
    batch, active, heads, size = given.shape
    if given.numel() == 0:
        return
    sizes = constants(heads, size)
    tile = tiles(_TILES, sizes["ALL_HEADS"] * sizes["ALL_SIZE"], capability(given))
    pointers = [given if tensor is None else tensor for tensor in (key, value, keys, values)]
    tables = [given if tensor is None else tensor for tensor in (cosine, sine, weight)]
    strides = [tensor.stride(d) for tensor in pointers for d in range(3)]
    strides.append(0 if index.dim() == 1 else index.stride(0))
    for table in tables[:2]:
        strides += [table.stride(0) if table.dim() == 3 else 0, table.stride(-2)]
    _cache_write_kernel[(batch * active,)](
        *pointers, index, *tables, active, eps, *strides, **sizes,
        KEYS=key is not None, VALUES=value is not None, NORM=weight is not None, ROTARY=cosine is not None, HALF=half,
        **tile.launch,
    )  # fmt: skip


def _supported(
    key: Tensor | None, value: Tensor | None, keys: Tensor | None, values: Tensor | None, index: Tensor, *tables: Any,
    **settings: Any,
) -> bool:  # fmt: skip
    given = [tensor for tensor in (key, value, keys, values) if tensor is not None]
    sizes = constants(*given[0].shape[2:])
    plain = all(tensor.stride(3) == 1 for tensor in given) and index.stride(-1) == 1
    plain = plain and all(table is None or table.stride(-1) == 1 for table in tables)
    return plain and sizes["ALL_HEADS"] * sizes["ALL_SIZE"] <= MOST_NUMBERS


def _fake(*args: Any, **settings: Any) -> None:
    return None


_operator = register(
    "cache_write",
    _cache_write_torch,
    fake=_fake,
    triton_path=_cache_write_triton,
    supported=_supported,
    mutates=("keys", "values"),
)


def cache_write(
    key: Tensor | None,
    value: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    half: bool = False,
) -> None:
    """Write into `keys` and `values`, in place.

    Args:
        key, value: (batch, active, heads, size), what was made; None leaves that one out.
        keys, values: (batch, tokens, heads, size), where it goes; same dtype.
        index: (active) or (batch, active) int32, no token twice in a row (two writers of one row would race).
        cosine, sine: (tokens, size) or (batch, tokens, size) fp32; None for no rotation.
        weight: (size), scale of the RMSNorm over a head's channels; None for no norm.
        eps: of that norm.
        half: pairs are half a head apart instead of neighbours.
    Raises:
        ValueError: nothing to write, or only one of a pair that belongs together.
    """
    if (key is None) != (keys is None) or (value is None) != (values is None) or (cosine is None) != (sine is None):
        raise ValueError("key goes with keys, value with values, and cosine with sine; one of such a pair is missing")
    if key is None and value is None:
        raise ValueError("there is neither a key nor a value to write")
    _operator(key, value, keys, values, index, cosine, sine, weight, eps=eps, half=half)

"""Attention extrapolated from dense to sparse: out = (softmax(z) + weight (entmax(z) - softmax(z))) v, z = scale q k^T + bias.

PLADIS, Kim and Sim, "Pushing the Limits of Attention in Diffusion Models at Inference Time by Leveraging Sparsity"
(arXiv 2503.07677), uses it in cross-attention with weight 2. entmax with alpha 2 is sparsemax, p = max(z - tau, 0); with
alpha 1.5 it is p = max(z / 2 - tau, 0)^2 (Peters et al., arXiv 1905.05702). Newton steps find the threshold tau of a row:
the sum to be brought to 1 is convex and falling in tau, so from a start left of the root they rise monotonically to it,
without sorting or bisection. Rows of the weights sum to 1; single weights may be negative.

Layout: query (batch, heads, queries, size), key and value (batch, heads, keys, size), any strides with last stride 1.
bias (batch, keys) fp32 is added to the scores of a key; padding gets a large negative number or -inf. A query that sees no
key gives 0, as torch's own attention does. One program holds all keys of a tile of queries, so the kernel ends at 512 keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_flop_count

from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import (
    INTERPRETED,
    Tile,
    capability,
    interpreted_upcast,
    power_of_two,
    rows_contiguous,
    tiles,
    tl,
    triton,
)

MOST_KEYS = 512  # of the kernel
_STEPS, _STEPS_LONG = 10, 12  # Newton steps; random rows of 512 keys need 9 to reach 1e-6, rows of 4096 need 10
_HIDDEN = -1e30  # stands for -inf, so that differences stay numbers
_SCORES = 2**17  # entries of the score matrix that the torch path keeps in cache at a time


def sparse_softmax_oracle(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, scale: float, weight: float, alpha: float
) -> Tensor:
    """float64, with the thresholds that sorting gives: sorted values enter the support as long as they exceed theirs."""
    query, key, value = query.double(), key.double(), value.double()
    scores = scale * query @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.double()[:, None, None, :]
    dense = scores.softmax(dim=-1)
    seen = torch.isfinite(scores).any(dim=-1, keepdim=True)
    scores = torch.maximum(scores, scores.amax(dim=-1, keepdim=True) - 1000).nan_to_num(neginf=0.0)  # weight 0 as well
    scores = scores / 2 if alpha == 1.5 else scores
    ordered = scores.sort(dim=-1, descending=True).values
    count = torch.arange(1, ordered.shape[-1] + 1, dtype=torch.float64, device=query.device)
    mean = ordered.cumsum(dim=-1) / count
    if alpha == 1.5:
        spread = count * ((ordered**2).cumsum(dim=-1) / count - mean**2)
        thresholds = mean - ((1 - spread).clamp(min=0) / count).sqrt()
    else:
        thresholds = mean - 1 / count
    support = (thresholds <= ordered).sum(dim=-1, keepdim=True)
    power = 2 if alpha == 1.5 else 1
    sparse = (scores - thresholds.gather(-1, support - 1)).clamp(min=0) ** power
    weights = dense + weight * (sparse - dense)
    return torch.where(seen, weights, 0.0) @ value


def _sparse_weights(scores: Tensor, alpha: float) -> Tensor:
    """entmax of rows whose largest entry is 0."""
    steps = _STEPS if scores.shape[-1] <= MOST_KEYS else _STEPS_LONG
    if alpha == 1.5:
        scores = scores / 2
    threshold = scores.new_full((*scores.shape[:-1], 1), -1.0)
    for _ in range(steps):
        rest = (scores - threshold).relu_()
        if alpha == 1.5:
            threshold += ((rest * rest).sum(-1, keepdim=True) - 1) / (2 * rest.sum(-1, keepdim=True))
        else:
            threshold += (rest.sum(-1, keepdim=True) - 1) / rest.sign().sum(-1, keepdim=True)
    rest = (scores - threshold).relu_()
    return rest.mul_(rest) if alpha == 1.5 else rest


def _sparse_softmax_torch(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float, weight: float, alpha: float
) -> Tensor:
    """As many rows of the batch, heads and queries at a time as stay in a processor's cache; all of them on other devices."""
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, heads, queries, value.shape[3])
    limit = _SCORES if query.device.type == "cpu" else query.numel() * key.shape[2]
    for b, h, n in _parts(batch, heads, queries, max(1, limit // key.shape[2])):
        scores = query[b, h, n].float() @ (key[b, h].float() * scale).mT
        added = None if bias is None else bias[b, None, None, :].float().clamp(min=_HIDDEN)
        if added is not None:
            scores += added
        largest = scores.amax(dim=-1, keepdim=True)
        scores -= largest
        weights = scores.softmax(dim=-1).lerp_(_sparse_weights(scores, alpha), weight)
        if added is not None:
            weights.masked_fill_(largest <= _HIDDEN / 2, 0.0)
        out[b, h, n] = weights @ value[b, h].float()
    return out


def _parts(batch: int, heads: int, queries: int, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of batch, heads and queries with at most `rows` queries together (or one)."""
    if queries == 0:
        return
    some_heads = max(1, min(heads, rows // queries))
    some_rows = max(1, rows // (queries * heads))
    for b in range(0, batch, some_rows):
        for h in range(0, heads, some_heads):
            for n in range(0, queries, rows):
                yield slice(b, b + some_rows), slice(h, h + some_heads), slice(n, n + rows)


# --- Triton ---

_TILES = {  # by keys, rounded up to a power of two: all of them, times the rows, sit in registers
    ((8, 0), 128): Tile(64, 128, warps=4, stages=1),
    ((8, 0), 256): Tile(32, 256, warps=8, stages=1),
    ((8, 0), 512): Tile(16, 512, warps=8, stages=1),  # 4 warps, or 64 rows, spill
}
_MOST_BYTES = (
    2**16
)  # of all keys over the first piece of their channels, so that they fit the shared memory of every GPU


@triton.jit
def _scores(
    query, key, base_q, base_k, rows, columns, queries, keys, stride_qn, stride_kn, first,
    SIZE: tl.constexpr, WIDE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """q k^T over channels first to first + WIDE of a head."""
    channel = first + tl.arange(0, WIDE)
    inside = channel < SIZE
    q = tl.load(
        query + base_q + rows.to(tl.int64)[:, None] * stride_qn + channel[None, :],
        mask=(rows < queries)[:, None] & inside[None, :],
        other=0.0,
    )
    k = tl.load(
        key + base_k + columns.to(tl.int64)[None, :] * stride_kn + channel[:, None],
        mask=(columns < keys)[None, :] & inside[:, None],
        other=0.0,
    )
    if UP:
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, k, input_precision="ieee")


@triton.jit
def _write(
    weights, value, out, base_v, base_o, rows, columns, queries, keys, stride_vn, stride_on, first,
    SIZE: tl.constexpr, WIDE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Channels first to first + WIDE of weights v."""
    channel = first + tl.arange(0, WIDE)
    inside = channel < SIZE
    v = tl.load(
        value + base_v + columns.to(tl.int64)[:, None] * stride_vn + channel[None, :],
        mask=(columns < keys)[:, None] & inside[None, :],
        other=0.0,
    )
    if UP:
        v = v.to(tl.float32)
    result = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    tl.store(
        out + base_o + rows.to(tl.int64)[:, None] * stride_on + channel[None, :],
        result.to(out.dtype.element_ty),
        mask=(rows < queries)[:, None] & inside[None, :],
    )


@triton.jit
def _sparse_softmax_kernel(
    query, key, value, bias, out, heads, queries, keys, scale, weight,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_ob, stride_oh, stride_on,
    SIZE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEPS: tl.constexpr, SQUARED: tl.constexpr, BIASED: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys; the head's channels in pieces FIRST and SECOND."""
    parts = (queries + ROWS - 1) // ROWS
    head = tl.program_id(0) // parts
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    rows = (tl.program_id(0) % parts) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    base_q, base_k = b * stride_qb + h * stride_qh, b * stride_kb + h * stride_kh
    z = _scores(
        query, key, base_q, base_k, rows, columns, queries, keys, stride_qn, stride_kn, 0, SIZE, FIRST, UP
    )  # fmt: skip
    if SECOND > 0:
        z += _scores(
            query, key, base_q, base_k, rows, columns, queries, keys, stride_qn, stride_kn, FIRST, SIZE, SECOND, UP
        )  # fmt: skip
    z *= scale
    if BIASED:
        added = tl.load(bias + b * stride_bb + columns, mask=columns < keys, other=-1e30)
        z += tl.maximum(added, -1e30)[None, :]
    z = tl.where((columns < keys)[None, :], z, -3e30)  # below hidden keys: they still share a row among themselves
    largest = tl.max(z, 1)
    z -= largest[:, None]
    dense = tl.exp(z)
    dense = dense / tl.sum(dense, 1)[:, None]
    if SQUARED:
        z *= 0.5
    threshold = tl.full([ROWS], -1.0, tl.float32)
    for _ in range(STEPS):
        rest = tl.maximum(z - threshold[:, None], 0.0)
        if SQUARED:
            threshold += (tl.sum(rest * rest, 1) - 1.0) / (2.0 * tl.sum(rest, 1))
        else:
            threshold += (tl.sum(rest, 1) - 1.0) / tl.sum((rest > 0.0).to(tl.float32), 1)
    rest = tl.maximum(z - threshold[:, None], 0.0)
    if SQUARED:
        rest *= rest
    weights = dense + weight * (rest - dense)
    if BIASED:
        weights = tl.where((largest > -5e29)[:, None], weights, 0.0)
    base_v, base_o = b * stride_vb + h * stride_vh, b * stride_ob + h * stride_oh
    _write(
        weights, value, out, base_v, base_o, rows, columns, queries, keys, stride_vn, stride_on, 0, SIZE, FIRST, UP
    )  # fmt: skip
    if SECOND > 0:
        _write(
            weights, value, out, base_v, base_o, rows, columns, queries, keys, stride_vn, stride_on, FIRST, SIZE, SECOND, UP
        )  # fmt: skip


def pieces(size: int) -> tuple[int, int]:
    """A head's channels as powers of two, at least 16 for tensor cores: 40 is 32 + 16, 64 is 64 + 0."""
    first = max(16, power_of_two(size + 1) // 2)
    return first, 0 if size <= first else max(16, power_of_two(size - first))


def constants(size: int, keys: int, alpha: float, *, biased: bool, at: tuple[int, int]) -> tuple[dict[str, Any], Tile]:
    """Compile-time arguments of the kernel and its tile, for a compute capability."""
    tile = tiles(_TILES, keys, at)
    first, second = pieces(size)
    return {
        "SIZE": size,
        "FIRST": first,
        "SECOND": second,
        "ROWS": tile.rows,
        "COLUMNS": max(16, power_of_two(keys)),
        "STEPS": _STEPS,
        "SQUARED": alpha == 1.5,
        "BIASED": biased,
        "UP": interpreted_upcast(),
    }, tile


def _sparse_softmax_triton(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float, weight: float, alpha: float
) -> Tensor:
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    settings, tile = constants(size, keys, alpha, biased=bias is not None, at=capability(query))
    grid = (triton.cdiv(queries, tile.rows) * batch * heads,)
    strides = [tensor.stride(d) for tensor in (query, key, value) for d in range(3)]
    bias = None if bias is None else rows_contiguous(bias)
    strides += [0 if bias is None else bias.stride(0), *out.stride()[:3]]
    added = query if bias is None else bias
    _sparse_softmax_kernel[grid](
        query, key, value, added, out, heads, queries, keys, scale, weight, *strides, **settings, **tile.launch
    )  # fmt: skip
    return out


def _supported(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **settings: Any) -> bool:
    """float32 has no tensor cores of full precision: threads spill kilobytes, and two tiles outgrow a GPU's shared memory."""
    keys, size = key.shape[2:]
    if query.dtype not in (torch.float16, torch.bfloat16, *((torch.float32,) if INTERPRETED else ())):
        return False
    if not 1 <= keys <= MOST_KEYS or not size == value.shape[3] <= 256:
        return False
    fits = power_of_two(keys) * pieces(size)[0] * key.element_size() <= _MOST_BYTES
    return fits and all(tensor.stride(3) == 1 for tensor in (query, key, value))


def _fake(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def extra_flops(scores: int) -> int:
    """What `scores` entries of a score matrix cost on top of dense attention, counted from the torch path's operations."""
    return scores * (5 * _STEPS + 7)


def _flops(query: Any, key: Any, value: Any, bias: Any = None, out_shape: Any = None, **settings: Any) -> int:
    batch, heads, queries, _ = query
    return int(sdpa_flop_count(query, key, value)) + extra_flops(batch * heads * queries * key[2])


_operator = register(
    "sparse_softmax",
    _sparse_softmax_torch,
    fake=_fake,
    triton_path=_sparse_softmax_triton,
    supported=_supported,
    flops=_flops,
)


def sparse_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    weight: float = 2.0,
    alpha: float = 1.5,
) -> Tensor:
    """(softmax + weight (entmax - softmax)) of the scores, times the values: (batch, heads, queries, size), contiguous.

    Args:
        query, key, value: (batch, heads, tokens, size), same dtype.
        bias: (batch, keys) fp32, added to scores; None for none.
        scale: of the scores; None is 1 / sqrt(size).
        weight: 0 is dense attention and takes torch's own path, bit for bit; 1 is sparse attention; 2 extrapolates.
        alpha: 1.5 (entmax) or 2.0 (sparsemax).
    Raises:
        ValueError: another alpha.
    """
    if alpha not in (1.5, 2.0):
        raise ValueError(f"alpha is 1.5 or 2.0, not {alpha}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if weight == 0:
        mask = None if bias is None else bias[:, None, None, :].to(query.dtype)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    out: Tensor = _operator(query, key, value, bias, scale=scale, weight=weight, alpha=alpha)
    return out

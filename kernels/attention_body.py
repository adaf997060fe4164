"""Attention with what SDPA cannot see: a bias per key, head sizes that are no power of two, lists of key blocks.

    out = softmax(scale * q k^T + bias) v        q (batch, heads, N, d), k and v (batch, heads, M, d), d <= 256 in eights

The softmax runs online over key blocks (Milakov and Gimelshein 2018; FlashAttention-2, arXiv 2307.08691). A head size is
cut into powers of two (80 = 64 + 16) instead of padded. Block-sparse attention reads which key blocks each query block
visits (SpargeAttn, arXiv 2502.18137); which token stands in which block is a table, so blocks may follow any token order
and need not straddle picture and text. A query that sees no key gets 0.

Dense attention without bias belongs to `torch.nn.functional.scaled_dot_product_attention`, which is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffaccel.errors import Unsupported
from diffaccel.kernels.key_lists import KeyLists, attend_listed, listed_sums, sdpa_mask
from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import INTERPRETED, Tile, TileTable, capability, tiles, tl, triton

LOG2_E = math.log2(math.e)
MAX_HEAD = 256
UNIT = 8  # elements; strides of the kernel's inputs are multiples of it

# (compute capability, head size) -> queries, keys, warps, stages. Chosen by what compiles without a spilled register.
DENSE_TILES: TileTable = {
    ((8, 0), 64): Tile(128, 64, 8, 3),
    ((8, 0), 80): Tile(128, 64, 8, 2),
    ((8, 0), 128): Tile(128, 32, 8, 3),
    ((8, 0), 160): Tile(64, 64, 8, 2),
    ((8, 0), 256): Tile(64, 32, 8, 2),
    ((8, 9), 64): Tile(128, 64, 8, 3),
    ((8, 9), 80): Tile(128, 64, 8, 2),
    ((8, 9), 128): Tile(128, 32, 8, 3),
    ((8, 9), 160): Tile(128, 32, 8, 2),
    ((8, 9), 256): Tile(64, 32, 8, 2),
    ((9, 0), 80): Tile(128, 128, 8, 2),
    ((9, 0), 128): Tile(128, 64, 8, 3),
    ((9, 0), 160): Tile(128, 64, 8, 2),
    ((9, 0), 256): Tile(128, 32, 8, 2),
    # consumer GPUs of 12.0 have the shared memory and the kind of matrix instructions of 8.9, not those of 9.0
    ((12, 0), 128): Tile(128, 32, 8, 3),
    ((12, 0), 160): Tile(128, 32, 8, 2),
    ((12, 0), 256): Tile(64, 32, 8, 2),
}
# The lists fix the blocks (128 queries, 64 keys everywhere, so that a picture does not depend on the GPU); from here come
# warps and stages. Larger heads would spill.
LIST_TILES: TileTable = {
    ((8, 0), 64): Tile(128, 64, 8, 3),
    ((8, 0), 128): Tile(128, 64, 8, 2),
    ((9, 0), 128): Tile(128, 64, 8, 3),
}


def attention_body(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    lists: KeyLists | None = None,
    skip: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + bias) v over the listed key blocks.

    Args:
        query: (batch, heads, N, d); any strides that are multiples of 8, the last one 1; others cost a copy. Pass `x.transpose(1, 2)` of (batch, N, heads, d).
        key, value: (batch, heads, M, d).
        bias: (batch, M) fp32, added to the scaled scores of each key; -inf hides a key. log(n) counts a key n times.
        scale: None is 1 / sqrt(d).
        lists: key blocks per query block; None lets every query see every key.
        skip: permits the kernel to leave out a key block whose scores all lie this far (in log2 units) below the running
            maximum: relative error up to block size * 2^-skip per block. The torch path leaves out nothing.
    Returns:
        (batch, heads, N, d), stored as (batch, N, heads, d), so that merging the heads copies nothing.
    Raises:
        Unsupported: shapes or dtypes that do not fit together.
    """
    return _call(query, key, value, bias, scale, lists, skip, with_lse=False)[0]


def attention_body_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    lists: KeyLists | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_body` and the natural logarithm of each query's sum of exponentials, (batch, heads, N) fp32."""
    return _call(query, key, value, bias, scale, lists, None, with_lse=True)


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float | None,
    lists: KeyLists | None,
    skip: float | None,
    *,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(query, key, value, bias, lists)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.numel() == 0:
        return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    parts = (None,) * 4 if lists is None else (lists.queries, lists.keys, lists.blocks, lists.counts)
    out, lse = _OPERATOR(query, key, value, bias, *parts, scale, skip, with_lse)
    return out, lse


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, lists: KeyLists | None
) -> None:
    batch, heads, _, size = query.shape
    if key.shape != value.shape or key.shape[:2] != (batch, heads) or key.shape[3] != size:
        raise Unsupported(
            f"attention_body: queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} do "
            "not fit together."
        )
    if size % 8 or not 8 <= size <= MAX_HEAD:
        raise Unsupported(f"attention_body: head size {size} is not a multiple of 8 up to {MAX_HEAD}.")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise Unsupported("attention_body: queries, keys and values must share one floating point dtype.")
    if bias is not None and (bias.shape != (batch, key.shape[2]) or bias.dtype != torch.float32):
        raise Unsupported(
            f"attention_body: the bias must be float32 of shape {(batch, key.shape[2])}, not {bias.dtype} of "
            f"{tuple(bias.shape)}."
        )
    if lists is not None and lists.counts.shape != (batch, heads, lists.queries.shape[0]):
        raise Unsupported(
            f"attention_body: the lists are for {tuple(lists.counts.shape)} (batch, heads, query blocks), the queries "
            f"need {(batch, heads, lists.queries.shape[0])}."
        )


# --- oracle ---


def attention_body_oracle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logarithmic sums in float64; `visible` (batch, heads, N, M) bool hides keys from queries."""
    scores = query.double() @ key.double().transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()[:, None, None, :]
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[..., None].isinf(), 0.0, scores - lse[..., None]).exp()
    weights = torch.where(scores.isinf(), 0.0, weights)
    return weights @ value.double(), lse


# --- torch path ---


def _torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    query_table: torch.Tensor | None,
    key_table: torch.Tensor | None,
    blocks: torch.Tensor | None,
    counts: torch.Tensor | None,
    scale: float,
    skip: float | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _empty(query, with_lse)
    if blocks is None or query_table is None or key_table is None or counts is None:
        mask = None if bias is None else sdpa_mask(bias[:, None, None, :], query)
        out.copy_(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale))
        if with_lse:
            _dense_lse(query, key, bias, scale, lse)
        return out, lse
    lists = KeyLists(query_table, key_table, blocks, counts)
    for b in range(query.shape[0]):
        row_bias = None if bias is None else bias[b]
        for h in range(query.shape[1]):
            attend_listed(query[b, h], key[b, h], value[b, h], row_bias, lists, (b, h), scale, out[b, h])
        if with_lse:
            listed_sums(query[b], key[b], row_bias, lists, b, scale, lse[b])
    return out, lse


def _dense_lse(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, scale: float, lse: torch.Tensor
) -> None:
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            scores = query[b, h].float() @ key[b, h].float().T * scale
            lse[b, h] = (scores if bias is None else scores + bias[b]).logsumexp(-1)


def _empty(query: torch.Tensor, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, size = query.shape
    out = torch.empty((batch, tokens, heads, size), dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty((batch, heads, tokens) if with_lse else (0,), dtype=torch.float32, device=query.device)
    return out, lse


# --- Triton path ---


@triton.jit
def _load(ptr, rows_at, mask, START: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, UP: tl.constexpr):
    """(rows, WIDTH) columns of a head from START on; columns behind the head are 0."""
    d = START + tl.arange(0, WIDTH)
    if START + WIDTH <= SIZE:
        x = tl.load(ptr + rows_at[:, None] + d[None, :], mask=mask[:, None], other=0.0)
    else:
        x = tl.load(ptr + rows_at[:, None] + d[None, :], mask=mask[:, None] & (d < SIZE)[None, :], other=0.0)
    if UP:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(ptr, x, rows_at, mask, START: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    d = START + tl.arange(0, WIDTH)
    tl.store(ptr + rows_at[:, None] + d[None, :], x, mask=mask[:, None] & (d < SIZE)[None, :])


@triton.jit
def _offsets(rows, stride, UNIT: tl.constexpr, FAR: tl.constexpr):
    """Element offsets of rows inside a head; 64 bits where 32 do not reach."""
    if FAR:
        rows = rows.to(tl.int64)
    return rows * stride * UNIT


@triton.jit
def attention_body_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bias_ptr,
    query_table_ptr,
    key_table_ptr,
    blocks_ptr,
    counts_ptr,
    scale_log2,
    skip,
    heads,
    queries,
    keys,
    most,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    bias_batch,
    UNIT: tl.constexpr,
    FAR: tl.constexpr,
    SIZE: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LISTED: tl.constexpr,
    BIASED: tl.constexpr,
    SKIPS: tl.constexpr,
    LSE: tl.constexpr,
    UP: tl.constexpr,
):
    tile = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    # strides come in units: a head of 40 starts at a multiple of 8, which the compiler has to know to copy 16 bytes
    q_ptr += (b * q_batch + h * q_head) * UNIT
    k_ptr += (b * k_batch + h * k_head) * UNIT
    v_ptr += (b * v_batch + h * v_head) * UNIT
    out_ptr += (b * out_batch + h * out_head) * UNIT
    places = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    if LISTED:
        rows = tl.load(query_table_ptr + tile * BM + places)
        listed = (b * heads + h) * tl.num_programs(0) + tile
        blocks_ptr += listed * most
        steps = tl.load(counts_ptr + listed)
    else:
        rows = tile * BM + places
        rows = tl.where(rows < queries, rows, -1)
        steps = tl.cdiv(keys, BN)
    row_mask = rows >= 0
    rows_at = _offsets(rows, q_row, UNIT, FAR)
    q0 = _load(q_ptr, rows_at, row_mask, 0, D0, SIZE, UP)
    acc0 = tl.zeros((BM, D0), tl.float32)
    q1, acc1 = q0, acc0
    if D1 > 0:
        q1 = _load(q_ptr, rows_at, row_mask, D0, D1, SIZE, UP)
        acc1 = tl.zeros((BM, D1), tl.float32)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for step in range(steps):
        if LISTED:
            block = tl.load(blocks_ptr + step)
            tokens = tl.load(key_table_ptr + block * BN + columns)
            mask = tokens >= 0
        else:
            tokens = step * BN + columns
            mask = tokens < keys
        k_at = _offsets(tokens, k_row, UNIT, FAR)
        v_at = _offsets(tokens, v_row, UNIT, FAR)
        scores = tl.dot(q0, tl.trans(_load(k_ptr, k_at, mask, 0, D0, SIZE, UP)), input_precision="ieee")
        if D1 > 0:
            k1 = _load(k_ptr, k_at, mask, D0, D1, SIZE, UP)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
        scores *= scale_log2
        if BIASED:
            scores += tl.load(bias_ptr + b * bias_batch + tokens, mask=mask, other=0.0)[None, :] * 1.4426950408889634
        scores = tl.where(mask[None, :], scores, float("-inf"))
        peak = tl.max(scores, 1)
        risen = tl.maximum(highest, peak)
        matters = True
        if SKIPS:
            matters = tl.max(tl.where(row_mask & (peak > float("-inf")), peak - risen, float("-inf")), 0) > -skip
        if matters:
            # a query that has seen no key yet would subtract -inf from -inf
            base = tl.where(risen == float("-inf"), 0.0, risen)
            p = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(p, 1)
            v0 = _load(v_ptr, v_at, mask, 0, D0, SIZE, UP)
            acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * shrink[:, None], input_precision="ieee")
            if D1 > 0:
                v1 = _load(v_ptr, v_at, mask, D0, D1, SIZE, UP)
                acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision="ieee")
            highest = risen
    seen = total > 0.0
    factor = 1.0 / tl.where(seen, total, 1.0)
    out_at = _offsets(rows, out_row, UNIT, FAR)
    _store(out_ptr, acc0 * factor[:, None], out_at, row_mask, 0, D0, SIZE)
    if D1 > 0:
        _store(out_ptr, acc1 * factor[:, None], out_at, row_mask, D0, D1, SIZE)
    if LSE:
        lse = (highest + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453
        tl.store(lse_ptr + (b * heads + h) * queries + rows, tl.where(seen, lse, float("-inf")), mask=row_mask)


def head_pieces(size: int) -> tuple[int, int]:
    """Powers of two, at least 16, that hold a head: (64, 0) for 64, (64, 16) for 80, (32, 16) for 40."""
    first = 1 << (size.bit_length() - 1)
    if first == size or size < 32:
        return max(16, 1 << (size - 1).bit_length()), 0
    rest = max(16, 1 << (size - first - 1).bit_length())
    return (first, rest) if first + rest < 2 * first else (2 * first, 0)


def _triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    query_table: torch.Tensor | None,
    key_table: torch.Tensor | None,
    blocks: torch.Tensor | None,
    counts: torch.Tensor | None,
    scale: float,
    skip: float | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, rows, size = query.shape
    out, lse = _empty(query, with_lse)
    query, key, value = (_aligned(x) for x in (query, key, value))
    tile = tiles(DENSE_TILES if blocks is None else LIST_TILES, size, capability(query))
    block_rows, block_columns, row_blocks = tile.rows, tile.columns, -(-rows // tile.rows)
    tables = [None if x is None else x.contiguous() for x in (query_table, key_table, blocks, counts)]
    if tables[0] is not None and tables[1] is not None:
        (row_blocks, block_rows), block_columns = tables[0].shape, tables[1].shape[1]
    first, second = head_pieces(size)
    attention_body_kernel[row_blocks, batch * heads](
        query,
        key,
        value,
        out,
        lse,
        None if bias is None else bias.contiguous(),
        *tables,
        scale * LOG2_E,
        0.0 if skip is None else skip,
        heads,
        rows,
        key.shape[2],
        0 if blocks is None else blocks.shape[3],
        *(stride // UNIT for x in (query, key, value, out) for stride in x.stride()[:3]),
        key.shape[2],
        UNIT=UNIT,
        FAR=any(x.shape[2] * x.stride(2) >= 2**31 for x in (query, key, value, out)),
        SIZE=size,
        D0=first,
        D1=second,
        BM=block_rows,
        BN=block_columns,
        LISTED=blocks is not None,
        BIASED=bias is not None,
        SKIPS=skip is not None,
        LSE=with_lse,
        UP=INTERPRETED,
        **tile.launch,
    )
    return out, lse


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Rows that start at multiples of 16 bytes; else the kernel could not copy them asynchronously."""
    fits = x.stride(-1) == 1 and all(stride % UNIT == 0 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def _supported(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> bool:
    """16-bit dtypes; float32 has no fast matrix instructions of full precision. The grid's second axis is short."""
    dtypes = (torch.float16, torch.bfloat16, *((torch.float32,) if INTERPRETED else ()))
    if query.dtype not in dtypes or query.shape[0] * query.shape[1] > 65_535:
        return False
    table = DENSE_TILES if len(rest) < 4 or rest[3] is None else LIST_TILES
    at = capability(query)
    return any(low <= at and query.shape[-1] <= most for low, most in table)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    query_table: torch.Tensor | None,
    key_table: torch.Tensor | None,
    blocks: torch.Tensor | None,
    counts: torch.Tensor | None,
    scale: float,
    skip: float | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(query, with_lse)


def attention_flops(batch: int, heads: int, queries: int, keys: int, size: int) -> int:
    """Two products per query and key: 4 batch heads N M d."""
    return 4 * batch * heads * queries * keys * size


def _flops(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    bias: Sequence[int] | None,
    query_table: Sequence[int] | None,
    key_table: Sequence[int] | None,
    blocks: Sequence[int] | None,
    *rest: object,
    out_shape: object,
) -> int:
    """With lists: as many blocks as a list can hold. What shorter lists leave out is not known from the shapes."""
    batch, heads, queries, size = query
    if blocks is None or query_table is None or key_table is None:
        return attention_flops(batch, heads, queries, key[2], size)
    return attention_flops(batch, heads, queries, blocks[3] * key_table[1], size)


_OPERATOR = register("attention_body", _torch, fake=_fake, triton_path=_triton, supported=_supported, flops=_flops)

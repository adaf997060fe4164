"""Matching: for each source token the most similar destination token, by cosine, without the similarity matrix.

    best[b, i] = max over j of <x[b, s_i], x[b, d_j]> / (|x[b, s_i]| |x[b, d_j]|),  index[b, i] = the lowest such j

The step of token merging (Bolya and Hoffman, arXiv 2303.17604) that grows with the square of the tokens. Source lengths do
not change who wins, so only destination lengths enter the loop. A token of length zero is similar to nothing: cosine 0.
Tokens must not hold NaN.

Layout: tokens (batch, tokens, channels), last stride 1; sources and destinations (batch, count) int32 token numbers, any
batch stride, so that one list can be expanded over the batch. Output: best (batch, sources) fp32 and index (batch,
sources) int32, a position in `destinations`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import Tile, capability, interpreted_upcast, rows_contiguous, tiles, tl, triton

_SIMILARITIES = 2**26  # entries of one similarity matrix on the torch path; more sources than that are done in parts
_SMALL = 2**14  # entries below which all rows of the batch (tiles of a picture) are one batched product


def match_tokens_oracle(tokens: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token in float64."""
    batch, count = tokens.shape[0], sources.shape[1]
    best = torch.empty(batch, count, dtype=torch.float64, device=tokens.device)
    index = torch.empty(batch, count, dtype=torch.int32, device=tokens.device)
    for b in range(batch):
        x = tokens[b].double()
        length = x.norm(dim=1)
        for i, source in enumerate(sources[b].tolist()):
            targets = destinations[b].long()
            product = length[source] * length[targets]
            cosine = torch.where(product > 0, (x[targets] @ x[source]) / product, torch.zeros_like(product))
            best[b, i] = cosine.max()
            index[b, i] = (cosine == cosine.max()).nonzero()[0, 0]
    return best, index


def inverse_norms(tokens: Tensor) -> Tensor:
    """1 / |token| in fp32, 0 for tokens of length zero: (..., channels) to (...)."""
    length = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)
    return torch.where(length > 0, length.reciprocal(), 0.0)


def _match_tokens_torch(tokens: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """One product per row of the batch: shorter pieces of it were slower than the memory they save."""
    batch, count = tokens.shape[0], sources.shape[1]
    if count * destinations.shape[1] <= _SMALL:
        return _match_batched(tokens, sources, destinations)
    best = torch.empty(batch, count, dtype=torch.float32, device=tokens.device)
    index = torch.empty(batch, count, dtype=torch.int32, device=tokens.device)
    rows = max(1, _SIMILARITIES // destinations.shape[1])
    for b in range(batch):
        targets = tokens[b].index_select(0, destinations[b])
        targets = (targets * inverse_norms(targets)[:, None]).to(tokens.dtype).T
        for start in range(0, count, rows):
            part = tokens[b].index_select(0, sources[b, start : start + rows])
            value, position = (part @ targets).max(dim=1)
            best[b, start : start + rows] = value * inverse_norms(part)
            index[b, start : start + rows] = position
    return best, index


def _match_batched(tokens: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    part, targets = _rows(tokens, sources), _rows(tokens, destinations)
    targets = (targets * inverse_norms(targets)[..., None]).to(tokens.dtype)
    value, position = (part @ targets.transpose(1, 2)).max(dim=2)
    return value * inverse_norms(part), position.to(torch.int32)


def _rows(tokens: Tensor, numbers: Tensor) -> Tensor:
    """tokens[b, numbers[b]] as one flat `index_select`, which is far faster than `gather` with an expanded index."""
    batch, count, channels = tokens.shape
    flat = numbers + count * torch.arange(batch, dtype=torch.int32, device=tokens.device)[:, None]
    return tokens.reshape(-1, channels).index_select(0, flat.flatten()).view(batch, -1, channels)


# Size is bytes per number; the loop over channels makes one tile fit all widths. Larger ones spill registers.
TILES = {
    ((8, 0), 2): Tile(rows=128, columns=64, depth=64, warps=8, stages=3),
    ((8, 0), 4): Tile(rows=64, columns=64, depth=32, warps=8, stages=2),
    ((9, 0), 2): Tile(rows=128, columns=128, depth=64, warps=8, stages=3),
    ((9, 0), 4): Tile(rows=64, columns=64, depth=32, warps=8, stages=2),
    ((12, 0), 2): Tile(rows=128, columns=64, depth=64, warps=8, stages=3),
}
_PROGRAMS = 132  # programs that fill the largest GPU in the table; destinations are split until there are so many
_NORM_ROWS, _NORM_COLUMNS = 4, 512


@triton.jit
def inverse_norms_kernel(
    x_ptr,
    out_ptr,
    count,
    x_batch,
    x_row,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """1 / |x[b, n]| in fp32, 0 where that is not finite."""
    batch = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < count
    base = x_ptr + batch.to(tl.int64) * x_batch + rows.to(tl.int64)[:, None] * x_row
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, channels, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(base + column[None, :], mask=row_ok[:, None] & (column < channels)[None, :], other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x * x, axis=1)
    inverse = tl.where(total > 0.0, 1.0 / tl.sqrt(tl.where(total > 0.0, total, 1.0)), 0.0)
    tl.store(out_ptr + batch.to(tl.int64) * count + rows, inverse, mask=row_ok)


@triton.jit
def match_tokens_kernel(
    x_ptr,
    inverse_ptr,
    source_ptr,
    destination_ptr,
    best_ptr,
    index_ptr,
    tokens,
    sources,
    destinations,
    part,
    x_batch,
    x_row,
    source_batch,
    destination_batch,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """Best destination of ROWS sources among destinations [part * z, part * (z + 1)), z being the third grid axis."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < sources
    x_base = x_ptr + batch * x_batch
    source = tl.load(source_ptr + batch * source_batch + row, mask=row_ok, other=0)
    source_base = x_base + source.to(tl.int64)[:, None] * x_row
    best = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    index = tl.zeros((ROWS,), dtype=tl.int32)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, destinations)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_ok = column < last
        target = tl.load(destination_ptr + batch * destination_batch + column, mask=column_ok, other=0)
        target_base = x_base + target.to(tl.int64)[:, None] * x_row
        dots = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for begin in range(0, channels, DEPTH):
            channel = begin + tl.arange(0, DEPTH)
            channel_ok = (channel < channels)[None, :]
            a = tl.load(source_base + channel[None, :], mask=row_ok[:, None] & channel_ok, other=0.0)
            d = tl.load(target_base + channel[None, :], mask=column_ok[:, None] & channel_ok, other=0.0)
            if UP:
                a = a.to(tl.float32)
                d = d.to(tl.float32)
            dots = tl.dot(a, tl.trans(d), dots, input_precision=PRECISION)
        inverse = tl.load(inverse_ptr + batch * tokens + target, mask=column_ok, other=0.0)
        cosine = tl.where(column_ok[None, :], dots * inverse[None, :], float("-inf"))
        value, position = tl.max(cosine, axis=1, return_indices=True)
        better = value > best  # strict: the lowest position keeps a tie
        index = tl.where(better, start + position.to(tl.int32), index)
        best = tl.where(better, value, best)
    own = tl.load(inverse_ptr + batch * tokens + source, mask=row_ok, other=0.0)
    out = (tl.program_id(2) * tl.num_programs(1) + batch) * sources + row
    tl.store(best_ptr + out, best * own, mask=row_ok)
    tl.store(index_ptr + out, index, mask=row_ok)


def launch_inverse_norms(tokens: Tensor) -> Tensor:
    """`inverse_norms` of (batch, tokens, channels) in one launch."""
    batch, count, channels = tokens.shape
    out = torch.empty(batch, count, dtype=torch.float32, device=tokens.device)
    inverse_norms_kernel[(triton.cdiv(count, _NORM_ROWS), batch)](
        tokens,
        out,
        count,
        tokens.stride(0),
        tokens.stride(1),
        channels=channels,
        ROWS=_NORM_ROWS,
        COLUMNS=min(_NORM_COLUMNS, triton.next_power_of_2(channels)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _match_tokens_triton(tokens: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    tile = tiles(TILES, tokens.element_size(), capability(tokens))
    tokens, sources, destinations = (rows_contiguous(x) for x in (tokens, sources, destinations))
    batch, count, channels = tokens.shape
    found, row_programs = destinations.shape[1], triton.cdiv(sources.shape[1], tile.rows)
    splits = min(triton.cdiv(_PROGRAMS, max(row_programs * batch, 1)), triton.cdiv(found, tile.columns), 4)
    part = triton.cdiv(triton.cdiv(found, splits), tile.columns) * tile.columns
    splits = triton.cdiv(found, part)
    shape = (splits, batch, sources.shape[1])
    best = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    index = torch.empty(shape, dtype=torch.int32, device=tokens.device)
    if sources.shape[1]:
        match_tokens_kernel[(row_programs, batch, splits)](
            tokens,
            launch_inverse_norms(tokens),
            sources,
            destinations,
            best,
            index,
            count,
            sources.shape[1],
            found,
            part,
            tokens.stride(0),
            tokens.stride(1),
            sources.stride(0),
            destinations.stride(0),
            channels=channels,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            PRECISION="ieee",
            UP=interpreted_upcast(),
            **tile.launch,
        )
    if splits == 1:
        return best[0], index[0]
    value, winner = best.max(dim=0)  # of equal ones the first part, so the lowest position
    return value, index.gather(0, winner[None])[0]


def _supported(tokens: Tensor, *lists: Tensor) -> bool:
    """Floats that the tiles know; the batch lies on a short axis of the grid."""
    return tokens.dtype in (torch.float16, torch.bfloat16, torch.float32) and tokens.shape[0] <= 65_535


def _match_tokens_fake(tokens: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    shape = (tokens.shape[0], sources.shape[1])
    return tokens.new_empty(shape, dtype=torch.float32), tokens.new_empty(shape, dtype=torch.int32)


def _match_tokens_flops(tokens: Any, sources: Any, destinations: Any, **_: Any) -> int:
    return int(2 * tokens[0] * sources[1] * destinations[1] * tokens[2])


match_tokens: Any = register(
    "match_tokens",
    _match_tokens_torch,
    fake=_match_tokens_fake,
    triton_path=_match_tokens_triton,
    supported=_supported,
    flops=_match_tokens_flops,
)

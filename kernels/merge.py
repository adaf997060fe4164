"""Merge and unmerge: the mean of the tokens of each compact row, and the copy back to all positions.

    merge     y[b, m] = sum over members n of w[n] f(x[b, n]) / sum of w[n],    f the identity or LayerNorm with scale and shift
    unmerge   out[b, n] = residual[b, n] + gate[b] * y[b, slot[n]]

One slot map may serve several batch rows (all guidance branches of an image): row b uses map b modulo the number of maps.
Sums are fp32 in the order of the member lists (kernels/slot_map.py), without atomics, so every run gives the same bits.
Bolya and Hoffman, arXiv 2303.17604; LayerNorm is not linear, so merging normalised tokens reads each token once instead of
writing a normalised copy first.

Layout: x, y, residual and out (batch, tokens or rows, channels) with last stride 1; weight (maps, tokens) fp32; scale and shift
(1 or batch, channels); gate (batch, channels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import Tile, capability, rows_contiguous, tiles, tl, triton


def merge_tokens_oracle(
    x: Tensor,
    start: Tensor,
    members: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Row by row in float64."""
    batch, rows, maps = x.shape[0], start.shape[1] - 1, start.shape[0]
    values = x.double()
    if eps is not None:
        centred = values - values.mean(-1, keepdim=True)
        values = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    values = values if scale is None else values * scale.double()[:, None]
    values = values if shift is None else values + shift.double()[:, None]
    out = torch.empty(batch, rows, x.shape[2], dtype=torch.float64)
    for b in range(batch):
        weights = torch.ones(x.shape[1]) if weight is None else weight[b % maps]
        for m in range(rows):
            own = members[b % maps, start[b % maps, m] : start[b % maps, m + 1]].long()
            share = weights[own].double()[:, None]
            out[b, m] = (values[b, own] * share).sum(0) / share.sum()
    return out


def unmerge_tokens_oracle(
    y: Tensor, slot: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """Token by token in float64."""
    out = torch.stack([y[b].double()[slot[b % slot.shape[0]].long()] for b in range(y.shape[0])])
    out = out if gate is None else out * gate.double()[:, None]
    return out if residual is None else residual.double() + out


def _merge_tokens_torch(
    x: Tensor,
    start: Tensor,
    members: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """On the CPU: `embedding_bag` is torch's segmented sum, half the time of `index_add_` and always in the same order."""
    batch, tokens, channels = x.shape
    values = x.float()
    if eps is not None:
        values = F.layer_norm(values, (channels,), eps=eps)
    first = _flat(start[:, :-1], tokens, batch)
    flat = _flat(members, tokens, batch)
    if weight is None:
        share, mass = None, start.diff().float()
    else:
        share = weight.gather(1, members.long())
        lists = (_flat(x, tokens, len(weight)) for x in (members, start[:, :-1]))
        mass = _sums(weight.reshape(-1, 1), *lists).view(len(weight), -1)
        share = share.repeat(batch // len(weight), 1).flatten()
    total = _sums(values.reshape(-1, channels), flat, first, share)
    inverse = mass.reciprocal().repeat(batch // start.shape[0], 1)
    mean = total.view(batch, -1, channels).mul_(inverse[..., None])
    if scale is not None:
        mean.mul_(scale[:, None])
    if shift is not None:
        mean.add_(shift[:, None])
    return mean.to(x.dtype)


def _sums(values: Tensor, members: Tensor, first: Tensor, share: Tensor | None = None) -> Tensor:
    """Sum over each list, which begins at `first`: one pass in the order of the lists."""
    return F.embedding_bag(members, values, first, mode="sum", per_sample_weights=share)


def _flat(numbers: Tensor, tokens: int, batch: int) -> Tensor:
    """Numbers within each map's row to numbers within all rows of the batch joined, `tokens` apart."""
    rows = numbers.repeat(batch // numbers.shape[0], 1)
    return (rows + tokens * torch.arange(batch, dtype=torch.int32, device=rows.device)[:, None]).flatten()


def _unmerge_tokens_torch(
    y: Tensor, slot: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    batch, kept, channels = y.shape
    copied = y.reshape(-1, channels).index_select(0, _flat(slot, kept, batch)).view(batch, -1, channels)
    if gate is None and residual is None:
        return copied
    wide = copied.float()  # fresh either way, so that it can be changed in place
    if gate is not None:
        wide.mul_(gate[:, None])
    if residual is not None:
        wide.add_(residual)
    return wide.to(y.dtype)


# Size is the number of channels one program owns: all of them where it must know a whole token (LayerNorm), else 512.
MERGE_TILES = {((8, 0), 1024): Tile(rows=4, columns=1024, warps=4, stages=1)} | {
    ((8, 0), size): Tile(rows=1, columns=size, warps=8, stages=1) for size in (2048, 4096, 8192)
}
UNMERGE_TILES = {((8, 0), 2**31): Tile(rows=8, columns=512, warps=4, stages=1)}
_MERGE_COLUMNS = 512


@triton.jit
def merge_tokens_kernel(
    x_ptr,
    start_ptr,
    member_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    kept,
    maps,
    x_batch,
    x_row,
    start_batch,
    member_batch,
    weight_batch,
    scale_batch,
    shift_batch,
    eps,
    channels: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean of the members of ROWS compact rows over COLUMNS channels, in the order of the lists."""
    batch = tl.program_id(1).to(tl.int64)
    owner = batch % maps
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < kept
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < channels
    begin = tl.load(start_ptr + owner * start_batch + row, mask=row_ok, other=0)
    end = tl.load(start_ptr + owner * start_batch + row + 1, mask=row_ok, other=0)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    mass = tl.zeros((ROWS,), dtype=tl.float32)
    for step in range(tl.max(end - begin, axis=0)):
        live = begin + step < end
        member = tl.load(member_ptr + owner * member_batch + begin + step, mask=live, other=0)
        place = x_ptr + batch * x_batch + member.to(tl.int64)[:, None] * x_row + column[None, :]
        ok = live[:, None] & column_ok[None, :]
        x = tl.load(place, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            x = tl.where(ok, x - tl.sum(x, axis=1)[:, None] / channels, 0.0)
            variance = tl.sum(x * x, axis=1) / channels
            x = x / tl.sqrt(variance + eps)[:, None]
        if WEIGHTED:
            share = tl.load(weight_ptr + owner * weight_batch + member, mask=live, other=0.0)
        else:
            share = live.to(tl.float32)
        total += x * share[:, None]
        mass += share
    mean = total / tl.where(row_ok, mass, 1.0)[:, None]
    if SCALED:
        scale = tl.load(scale_ptr + batch * scale_batch + column, mask=column_ok, other=0.0).to(tl.float32)
        mean = mean * scale[None, :]
    if SHIFTED:
        shift = tl.load(shift_ptr + batch * shift_batch + column, mask=column_ok, other=0.0).to(tl.float32)
        mean = mean + shift[None, :]
    out = out_ptr + (batch * kept + row.to(tl.int64))[:, None] * channels + column[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def unmerge_tokens_kernel(
    y_ptr,
    slot_ptr,
    residual_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    maps,
    y_batch,
    y_row,
    slot_batch,
    residual_batch,
    residual_row,
    gate_batch,
    channels: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy compact rows to ROWS tokens, COLUMNS channels of each."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_ok = token < tokens
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    ok = token_ok[:, None] & (column < channels)[None, :]
    slot = tl.load(slot_ptr + (batch % maps) * slot_batch + token, mask=token_ok, other=0)
    y = tl.load(y_ptr + batch * y_batch + slot.to(tl.int64)[:, None] * y_row + column[None, :], mask=ok, other=0.0)
    if GATED:
        gate = tl.load(gate_ptr + batch * gate_batch + column, mask=column < channels, other=0.0).to(tl.float32)
        y = y.to(tl.float32) * gate[None, :]
    if RESIDUAL:
        place = residual_ptr + batch * residual_batch + token.to(tl.int64)[:, None] * residual_row + column[None, :]
        y = tl.load(place, mask=ok, other=0.0).to(tl.float32) + y.to(tl.float32)
    out = out_ptr + (batch * tokens + token.to(tl.int64))[:, None] * channels + column[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=ok)


def _merge_tokens_triton(
    x: Tensor,
    start: Tensor,
    members: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    x, start, members = (rows_contiguous(tensor) for tensor in (x, start, members))
    weight, scale, shift = (None if t is None else rows_contiguous(t) for t in (weight, scale, shift))
    batch, _, channels = x.shape
    kept = start.shape[1] - 1
    width = channels if eps is not None else min(channels, _MERGE_COLUMNS)
    tile = tiles(MERGE_TILES, width, capability(x))
    columns = triton.next_power_of_2(width)
    out = x.new_empty(batch, kept, channels)
    merge_tokens_kernel[(triton.cdiv(kept, tile.rows), batch, triton.cdiv(channels, columns))](
        x,
        start,
        members,
        x if weight is None else weight,
        x if scale is None else scale,
        x if shift is None else shift,
        out,
        kept,
        start.shape[0],
        x.stride(0),
        x.stride(1),
        start.stride(0),
        members.stride(0),
        0 if weight is None else weight.stride(0),
        _row_stride(scale),
        _row_stride(shift),
        0.0 if eps is None else eps,
        channels=channels,
        WEIGHTED=weight is not None,
        NORM=eps is not None,
        SCALED=scale is not None,
        SHIFTED=shift is not None,
        ROWS=tile.rows,
        COLUMNS=columns,
        **tile.launch,
    )
    return out


def _row_stride(vector: Tensor | None) -> int:
    """Batch stride of a (1 or batch, channels) tensor; one row serves all."""
    return 0 if vector is None or vector.shape[0] == 1 else vector.stride(0)


def _unmerge_tokens_triton(
    y: Tensor, slot: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    y, slot = rows_contiguous(y), rows_contiguous(slot)
    residual, gate = (None if t is None else rows_contiguous(t) for t in (residual, gate))
    batch, tokens, channels = y.shape[0], slot.shape[1], y.shape[2]
    tile = tiles(UNMERGE_TILES, channels, capability(y))
    columns = min(tile.columns, triton.next_power_of_2(channels))
    out = y.new_empty(batch, tokens, channels)
    unmerge_tokens_kernel[(triton.cdiv(tokens, tile.rows), batch, triton.cdiv(channels, columns))](
        y,
        slot,
        y if residual is None else residual,
        y if gate is None else gate,
        out,
        tokens,
        slot.shape[0],
        y.stride(0),
        y.stride(1),
        slot.stride(0),
        0 if residual is None else residual.stride(0),
        0 if residual is None else residual.stride(1),
        0 if gate is None else gate.stride(0),
        channels=channels,
        RESIDUAL=residual is not None,
        GATED=gate is not None,
        ROWS=tile.rows,
        COLUMNS=columns,
        **tile.launch,
    )
    return out


def _merge_tokens_fake(
    x: Tensor,
    start: Tensor,
    members: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], start.shape[1] - 1, x.shape[2])


def _unmerge_tokens_fake(y: Tensor, slot: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    return y.new_empty(y.shape[0], slot.shape[1], y.shape[2])


merge_tokens: Any = register(
    "merge_tokens", _merge_tokens_torch, fake=_merge_tokens_fake, triton_path=_merge_tokens_triton
)
unmerge_tokens: Any = register(
    "unmerge_tokens", _unmerge_tokens_torch, fake=_unmerge_tokens_fake, triton_path=_unmerge_tokens_triton
)

"""Slot map: which compact row each token belongs to, and which tokens each compact row stands for.

Token merging keeps the destinations and the sources that match worst; they own the compact rows, in raster order. Each of
the `removed` best-matching sources belongs to the row of its destination. Everything is decided without a full sort and
in one way only: equal scores are merged lowest position first, members are listed in raster order. So the same input
gives the same bits on every run, and merging needs no atomic additions.

    slot (batch, tokens) int32 in [0, kept)      row of each token
    kept (batch, kept) int32                     the token that owns each row, ascending
    start (batch, kept + 1) int32, members (batch, tokens) int32    tokens of row m: members[start[m] : start[m + 1]]

Selection takes the r-th largest of order-preserving integers by fixing its bits from the highest down: 32 counts instead of a
sort.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import Tile, rows_contiguous, tl, triton

_FAVOURED = 1 << 31  # cosines, as ordered integers moved above 0, lie below this


def slot_map_oracle(
    best: Tensor, index: Tensor, sources: Tensor, destinations: Tensor, removed: int, favoured: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Source by source with Python's sort."""
    batch, count = best.shape
    tokens = count + destinations.shape[1]
    slot = torch.empty(batch, tokens, dtype=torch.int32)
    kept = torch.empty(batch, tokens - removed, dtype=torch.int32)
    for b in range(batch):
        first = [False] * count if favoured is None else favoured[b].tolist()
        score = best[b].tolist()
        merged = sorted(range(count), key=lambda i: (not first[i], -score[i], i))[:removed]
        target = {int(sources[b, i]): int(destinations[b, index[b, i]]) for i in merged}
        owners = [token for token in range(tokens) if token not in target]
        row = {token: position for position, token in enumerate(owners)}
        slot[b] = torch.tensor([row[target.get(token, token)] for token in range(tokens)], dtype=torch.int32)
        kept[b] = torch.tensor(owners, dtype=torch.int32)
    return slot, kept


def member_lists_oracle(slot: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Row by row."""
    start = torch.zeros(slot.shape[0], kept + 1, dtype=torch.int32)
    members = torch.empty_like(slot, device="cpu")
    for b, row in enumerate(slot.tolist()):
        lists = [[n for n, owner in enumerate(row) if owner == m] for m in range(kept)]
        members[b] = torch.tensor([n for group in lists for n in group], dtype=torch.int32)
        start[b, 1:] = torch.tensor([len(group) for group in lists], dtype=torch.int32).cumsum(0)
    return start, members


def select_best(score: Tensor, count: int, favoured: Tensor | None = None) -> Tensor:
    """Mask of the `count` largest scores of each row, favoured ones before all others, equal ones lowest position first.

    Args:
        score: (batch, n) fp32 in (-2, 2).
        favoured: (batch, n) bool.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    bits = (score + 0.0).view(torch.int32)  # adding zero turns -0.0 into 0.0
    key = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits).long()
    if favoured is not None:
        key = key + _FAVOURED * favoured
    least = _nth_largest(key, count) if key.device.type == "cpu" else _nth_largest_sorted(key, count)
    above, equal = key > least, key == least
    room = count - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= room))


def _nth_largest(key: Tensor, count: int) -> Tensor:
    """Of each row, (batch, 1)."""
    return key.kthvalue(key.shape[1] - count + 1, dim=1, keepdim=True).values


def _nth_largest_sorted(key: Tensor, count: int) -> Tensor:
    """The same where `kthvalue` is missing (MPS) or refused in deterministic mode (CUDA)."""
    return key.sort(dim=1, descending=True).values[:, count - 1 : count]


def _require_sources(best: Tensor, removed: int) -> None:
    if not 0 <= removed <= best.shape[1]:
        raise ValueError(f"cannot merge {removed} of {best.shape[1]} source tokens")


def _slot_map_torch(
    best: Tensor, index: Tensor, sources: Tensor, destinations: Tensor, removed: int, favoured: Tensor | None
) -> tuple[Tensor, Tensor]:
    _require_sources(best, removed)
    batch, tokens = best.shape[0], best.shape[1] + destinations.shape[1]
    merged = select_best(best, removed, favoured)
    owns = torch.ones(batch, tokens, dtype=torch.bool, device=best.device).scatter_(1, sources.long(), ~merged)
    slot = owns.cumsum(dim=1, dtype=torch.int32) - 1
    own, targets = slot.gather(1, sources.long()), slot.gather(1, destinations.long())
    slot = slot.scatter(1, sources.long(), torch.where(merged, targets.gather(1, index.long()), own))
    kept = owns.nonzero()[:, 1].to(torch.int32).view(batch, tokens - removed)
    return slot, kept


def _member_lists_torch(slot: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    batch = slot.shape[0]
    size = torch.zeros(batch, kept, dtype=torch.int32, device=slot.device)
    size.scatter_add_(1, slot.long(), torch.ones_like(slot))
    start = torch.zeros(batch, kept + 1, dtype=torch.int32, device=slot.device)
    torch.cumsum(size, dim=1, dtype=torch.int32, out=start[:, 1:])
    return start, slot.argsort(dim=1, stable=True).to(torch.int32)


SLOT_TILE = Tile(rows=1, columns=2048, warps=8, stages=1)  # one program owns the whole row of the batch
LIST_TILE = Tile(rows=16, columns=256, warps=4, stages=1)


@triton.jit
def _keys(best_ptr, favoured_ptr, position, ok, FAVOURED: tl.constexpr):
    """Order-preserving integers of the scores, favoured ones above all others; -2**40 where there is no score.

    Scores below -2 and NaN, which features that overflowed give, count as -2: with keys under the range of the search
    fewer tokens than `removed` would be found, and rows written behind the end of `kept`.
    """
    score = tl.load(best_ptr + position, mask=ok, other=0.0) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64)
    key = tl.maximum(key, -1073741824)
    if FAVOURED:
        first = tl.load(favoured_ptr + position, mask=ok, other=0)
        key = tl.where(first != 0, key + 2147483648, key)
    return tl.where(ok, key, -1099511627776)


@triton.jit
def slot_map_kernel(
    best_ptr,
    index_ptr,
    source_ptr,
    destination_ptr,
    favoured_ptr,
    slot_ptr,
    kept_ptr,
    merged_ptr,
    sources,
    tokens,
    removed,
    best_batch,
    index_batch,
    source_batch,
    destination_batch,
    favoured_batch,
    FAVOURED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Select, number the kept tokens, and point the merged ones at their destination's row; one program per row."""
    batch = tl.program_id(0).to(tl.int64)
    best_ptr += batch * best_batch
    index_ptr += batch * index_batch
    source_ptr += batch * source_batch
    destination_ptr += batch * destination_batch
    favoured_ptr += batch * favoured_batch
    slot_ptr += batch * tokens
    merged_ptr += batch * tokens
    kept_ptr += batch * (tokens - removed)
    lane = tl.arange(0, COLUMNS)

    # The r-th largest key: keys lie in [-2**30, 2**31 + 2**30), so 33 bits above an offset fix it.
    least = tl.full((), 0, dtype=tl.int64)
    for step in range(33):
        candidate = least + (tl.full((), 1, dtype=tl.int64) << (32 - step))
        count = 0
        for start in range(0, sources, COLUMNS):
            ok = start + lane < sources
            key = _keys(best_ptr, favoured_ptr, start + lane, ok, FAVOURED) + 1073741824
            count += tl.sum((key >= candidate).to(tl.int32), axis=0)
        least = tl.where(count >= removed, candidate, least)
    above = 0
    for start in range(0, sources, COLUMNS):
        ok = start + lane < sources
        key = _keys(best_ptr, favoured_ptr, start + lane, ok, FAVOURED) + 1073741824
        above += tl.sum((key > least).to(tl.int32), axis=0)

    for start in range(0, tokens, COLUMNS):
        tl.store(merged_ptr + start + lane, tl.zeros((COLUMNS,), dtype=tl.int8), mask=start + lane < tokens)
    tl.debug_barrier()
    seen = 0
    for start in range(0, sources, COLUMNS):
        ok = start + lane < sources
        key = _keys(best_ptr, favoured_ptr, start + lane, ok, FAVOURED) + 1073741824
        equal = (ok & (key == least)).to(tl.int32)
        room = seen + tl.cumsum(equal, axis=0) <= removed - above
        merged = (key > least) | ((equal > 0) & room)
        source = tl.load(source_ptr + start + lane, mask=ok, other=0)
        tl.store(merged_ptr + source, (ok & merged).to(tl.int8), mask=ok)
        seen += tl.sum(equal, axis=0)
    tl.debug_barrier()
    row = 0
    for start in range(0, tokens, COLUMNS):
        ok = start + lane < tokens
        owns = (tl.load(merged_ptr + start + lane, mask=ok, other=1) == 0).to(tl.int32)
        slot = row + tl.cumsum(owns, axis=0) - 1
        tl.store(slot_ptr + start + lane, slot, mask=owns > 0)
        tl.store(kept_ptr + slot, start + lane, mask=owns > 0)
        row += tl.sum(owns, axis=0)
    tl.debug_barrier()
    for start in range(0, sources, COLUMNS):
        ok = start + lane < sources
        source = tl.load(source_ptr + start + lane, mask=ok, other=0)
        gone = ok & (tl.load(merged_ptr + source, mask=ok, other=0) != 0)
        target = tl.load(index_ptr + start + lane, mask=gone, other=0)
        target = tl.load(destination_ptr + target, mask=gone, other=0)
        tl.store(slot_ptr + source, tl.load(slot_ptr + target, mask=gone, other=0), mask=gone)


@triton.jit
def member_lists_kernel(
    slot_ptr, start_ptr, member_ptr, tokens, kept, slot_batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Members of ROWS compact rows: one pass counts, one pass writes each token behind those before it."""
    batch = tl.program_id(1).to(tl.int64)
    slot_ptr += batch * slot_batch
    member_ptr += batch * tokens
    start_ptr += batch * (kept + 1)
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    before = 0
    size = tl.zeros((ROWS,), dtype=tl.int32)
    for begin in range(0, tokens, COLUMNS):
        slot = tl.load(slot_ptr + begin + lane, mask=begin + lane < tokens, other=2147483647)
        before += tl.sum((slot < first).to(tl.int32), axis=0)
        size += tl.sum((slot[None, :] == row[:, None]).to(tl.int32), axis=1)
    end = before + tl.cumsum(size, axis=0)
    tl.store(start_ptr + 1 + row, end, mask=row < kept)
    if first == 0:
        tl.store(start_ptr, 0)
    place = end - size
    for begin in range(0, tokens, COLUMNS):
        slot = tl.load(slot_ptr + begin + lane, mask=begin + lane < tokens, other=2147483647)
        mine = slot[None, :] == row[:, None]
        rank = tl.cumsum(mine.to(tl.int32), axis=1)
        token = (begin + lane)[None, :] + tl.zeros((ROWS, 1), dtype=tl.int32)
        tl.store(member_ptr + place[:, None] + rank - 1, token, mask=mine)
        place += tl.sum(mine.to(tl.int32), axis=1)


def _slot_map_triton(
    best: Tensor, index: Tensor, sources: Tensor, destinations: Tensor, removed: int, favoured: Tensor | None
) -> tuple[Tensor, Tensor]:
    _require_sources(best, removed)
    best, index, sources, destinations = (rows_contiguous(x) for x in (best, index, sources, destinations))
    batch, count = best.shape
    tokens = count + destinations.shape[1]
    slot = torch.empty(batch, tokens, dtype=torch.int32, device=best.device)
    kept = torch.empty(batch, tokens - removed, dtype=torch.int32, device=best.device)
    merged = torch.empty(batch, tokens, dtype=torch.int8, device=best.device)
    first = best if favoured is None else rows_contiguous(favoured.to(torch.int8))
    slot_map_kernel[(batch,)](
        best,
        index,
        sources,
        destinations,
        first,
        slot,
        kept,
        merged,
        count,
        tokens,
        removed,
        best.stride(0),
        index.stride(0),
        sources.stride(0),
        destinations.stride(0),
        first.stride(0),
        FAVOURED=favoured is not None,
        COLUMNS=SLOT_TILE.columns,
        **SLOT_TILE.launch,
    )
    return slot, kept


def _member_lists_triton(slot: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    slot = rows_contiguous(slot)
    batch, tokens = slot.shape
    start = torch.empty(batch, kept + 1, dtype=torch.int32, device=slot.device)
    members = torch.empty(batch, tokens, dtype=torch.int32, device=slot.device)
    member_lists_kernel[(triton.cdiv(kept, LIST_TILE.rows), batch)](
        slot,
        start,
        members,
        tokens,
        kept,
        slot.stride(0),
        ROWS=LIST_TILE.rows,
        COLUMNS=LIST_TILE.columns,
        **LIST_TILE.launch,
    )
    return start, members


def _slot_map_fake(
    best: Tensor, index: Tensor, sources: Tensor, destinations: Tensor, removed: int, favoured: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens = best.shape[0], best.shape[1] + destinations.shape[1]
    return index.new_empty(batch, tokens), index.new_empty(batch, tokens - removed)


def _member_lists_fake(slot: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    return slot.new_empty(slot.shape[0], kept + 1), slot.new_empty(slot.shape)


slot_map: Any = register("slot_map", _slot_map_torch, fake=_slot_map_fake, triton_path=_slot_map_triton)
member_lists: Any = register(
    "member_lists", _member_lists_torch, fake=_member_lists_fake, triton_path=_member_lists_triton
)

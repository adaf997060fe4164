"""Which key blocks each query block visits, and attention over them in plain torch.

Short lists gather their keys and attend to those; lists of nearly all blocks attend to all keys under a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Share of the key blocks up to which gathered keys beat a mask over all: measured on a CPU, with 4429 tokens.
GATHER_BELOW = 0.9


@dataclass(frozen=True)
class KeyLists:
    """Which key blocks each query block visits.

    Attributes:
        queries: (query blocks, block size) int32, the query standing at each place; -1 leaves a place empty. Every query
            stands in exactly one place.
        keys: (key blocks, block size) int32, likewise. Keys that stand nowhere are never seen.
        blocks: (batch, heads, query blocks, most) int32 key blocks; behind the first `counts` entries anything in range.
        counts: (batch, heads, query blocks) int32.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    blocks: torch.Tensor
    counts: torch.Tensor


def visible_of(lists: KeyLists, queries: int, keys: int) -> torch.Tensor:
    """What `lists` let be seen, entry by entry: (batch, heads, N, M) bool. Slow; for tests."""
    batch, heads, blocks = lists.counts.shape
    visible = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for t in range(blocks):
                rows = [int(i) for i in lists.queries[t] if i >= 0]
                for number in lists.blocks[b, h, t, : int(lists.counts[b, h, t])].tolist():
                    columns = [int(i) for i in lists.keys[number] if i >= 0]
                    visible[b, h, torch.tensor(rows)[:, None], torch.tensor(columns)[None, :]] = True
    return visible


def sdpa_mask(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Float32 masks go with any dtype on a CPU; elsewhere the mask has to have the queries' dtype."""
    return mask if query.device.type == "cpu" else mask.to(query.dtype)


def attend_listed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    lists: KeyLists,
    place: tuple[int, int],
    scale: float,
    out: torch.Tensor,
) -> None:
    """One head, (N, d) queries and (M, d) keys: short lists on gathered keys, long ones on all keys with a mask."""
    short = lists.counts[place] <= GATHER_BELOW * lists.keys.shape[0]
    mask = _dense_mask(lists, place, key.shape[0], bias)
    for group in (short.nonzero()[:, 0], (~short).nonzero()[:, 0]):
        if not len(group):
            continue
        table = lists.queries[group]
        placed = table >= 0
        rows = table.clamp_min(0)
        queries = query.index_select(0, rows.flatten())
        if bool(short[group[0]]):
            seen = lists.blocks[place][group, : int(lists.counts[place][group].max())]
            columns = lists.keys[seen.long()].flatten(1)
            masks = _gathered_mask(lists, place, group, columns, bias)[:, None]
            columns = columns.clamp_min(0)
            keys, values = (x.index_select(0, columns.flatten()).view(*columns.shape, -1) for x in (key, value))
            result = _attend(queries.view(*rows.shape, -1), keys, values, masks, scale)
        else:
            hides = bool(mask[group].any())  # neither hidden keys nor a bias: no mask at all
            whole = mask[group].repeat_interleave(rows.shape[1], 0)[None] if hides else None
            result = _attend(queries[None], key[None], value[None], whole, scale)
        out[rows[placed].long()] = result.reshape(*rows.shape, -1)[placed]


def _gathered_mask(
    lists: KeyLists, place: tuple[int, int], group: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(blocks, gathered keys) fp32: 0 or the bias, -inf behind the end of a list and where a block has no token."""
    number = torch.arange(columns.shape[1], device=columns.device) // lists.keys.shape[1]
    seen = (columns >= 0) & (number < lists.counts[place][group, None])
    return torch.where(seen, 0.0 if bias is None else bias[columns.clamp_min(0)], -math.inf)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """SDPA of several groups with one head: (groups, N, d)."""
    query, key, value = (x[:, None] for x in (query, key, value))
    mask = None if mask is None else sdpa_mask(mask[:, None], query)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[:, 0]


def _dense_mask(lists: KeyLists, place: tuple[int, int], keys: int, bias: torch.Tensor | None) -> torch.Tensor:
    """(query blocks, M) fp32: 0 or the bias where the lists let a query block see a key, else -inf."""
    blocks, counts, most = lists.blocks[place], lists.counts[place], lists.keys.shape[0]
    listed = torch.arange(blocks.shape[1], device=blocks.device) < counts[:, None]
    allowed = torch.zeros(blocks.shape[0], most + 1, dtype=torch.bool, device=blocks.device)
    allowed.scatter_(1, torch.where(listed, blocks, most).long(), True)
    allowed[:, -1] = False  # where the entries behind the counts went, and where keys without a block look
    return torch.where(allowed[:, block_of(lists.keys, keys)], 0.0 if bias is None else bias, -math.inf)


def block_of(table: torch.Tensor, tokens: int) -> torch.Tensor:
    """The block each token stands in, (tokens,) int64; -1 for tokens that stand nowhere."""
    found = torch.full((tokens + 1,), -1, dtype=torch.int64, device=table.device)
    numbers = torch.arange(table.shape[0], device=table.device)[:, None].expand_as(table)
    found.scatter_(0, torch.where(table >= 0, table, tokens).flatten().long(), numbers.flatten())
    return found[:-1]


def listed_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    lists: KeyLists,
    row: int,
    scale: float,
    lse: torch.Tensor,
) -> None:
    for h in range(query.shape[0]):
        mask = _dense_mask(lists, (row, h), key.shape[1], bias)[block_of(lists.queries, query.shape[1])]
        lse[h] = (query[h].float() @ key[h].float().T * scale + mask).logsumexp(-1)

"""Which key blocks matter to which query blocks: the first stage of SpargeAttn (arXiv 2502.18137), with text kept whole.

Tokens of the picture are ordered by patches, so that a block is a compact region and one mean speaks for it. Blocks of
queries and keys are pooled, the pooled scores are normalised over the key blocks, and each query block keeps its best
ones: a fixed share ("topk") or as many as hold a share of the weight ("mass"). Blocks whose tokens differ too much for a
mean to speak for them can be kept always. Text queries see everything, and everything sees the text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffaccel.errors import Unsupported
from diffaccel.kernels.key_lists import KeyLists
from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import power_of_two, tl, triton

Mode = Literal["topk", "mass"]
QUERY_BLOCK, KEY_BLOCK = 128, 64
PATCH = (8, 16)  # token rows and columns of a query block


@dataclass(frozen=True)
class TokenBlocks:
    """Where the tokens of a sequence stand.

    Attributes:
        queries: (query blocks, block size) int32 tokens, -1 where a place is empty.
        keys: (key blocks, block size) int32.
        picture_queries, picture_keys: how many of them hold picture tokens; they come first, those of the text behind.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    picture_queries: int
    picture_keys: int

    @property
    def text_keys(self) -> int:
        """Key blocks of the text."""
        return self.keys.shape[0] - self.picture_keys

    def to(self, device: torch.device) -> TokenBlocks:
        """The same tables on a device."""
        return replace(self, queries=self.queries.to(device), keys=self.keys.to(device))


def patch_order(height: int, width: int, patch: tuple[int, int] = PATCH) -> torch.Tensor:
    """Tokens of a (height, width) grid patch by patch, (height * width,) int64; patches at the far edges are smaller."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    patches = (rows // patch[0]) * -(-width // patch[1]) + columns // patch[1]
    inside = (rows % patch[0]) * patch[1] + columns % patch[1]
    return (patches * patch[0] * patch[1] + inside).flatten().argsort()


@functools.lru_cache(maxsize=32)
def token_blocks(
    grid: tuple[int, int],
    picture: int,
    before: int = 0,
    after: int = 0,
    block: tuple[int, int] = (QUERY_BLOCK, KEY_BLOCK),
    patch: tuple[int, int] = PATCH,
) -> TokenBlocks:
    """Blocks of a sequence of `before` text tokens, `picture` picture tokens and `after` text tokens.

    Args:
        grid: token rows and columns of the picture. Picture tokens behind the grid (reference pictures) keep their order.
        block: tokens of a query block and of a key block.
    Raises:
        Unsupported: the grid has more tokens than the picture.
    """
    cells = grid[0] * grid[1]
    if cells > picture:
        raise Unsupported(f"block selection: a grid of {grid[0]} x {grid[1]} tokens does not fit {picture} tokens.")
    order = torch.cat([patch_order(*grid, patch), torch.arange(cells, picture)]) + before
    text = torch.cat([torch.arange(before), torch.arange(before + picture, before + picture + after)])
    queries, keys = (torch.cat([_chunks(order, size), _chunks(text, size)]) for size in block)
    return TokenBlocks(queries, keys, -(-picture // block[0]), -(-picture // block[1]))


def _chunks(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks, size) int32, the last block filled up with -1."""
    filled = torch.full((-(-len(tokens) // size) * size,), -1, dtype=torch.int32)
    filled[: len(tokens)] = tokens.int()
    return filled.view(-1, size)


# --- pooling ---


def pool_blocks(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and self-similarity of each block.

    Args:
        x: (batch, heads, N, d), last stride 1.
        table: (blocks, block size) int32 tokens, -1 where a place is empty.
    Returns:
        means (batch, heads, blocks, d) fp32, and the mean cosine over all pairs of a block's tokens, (batch, heads,
        blocks) fp32. A token of length 0 has cosine 0 to all.
    """
    means, similarity = _POOL(x, table)
    return means, similarity


def pool_blocks_oracle(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, block by block, with the matrix of cosines."""
    means, similarities = [], []
    for block in table:
        tokens = x.double()[:, :, block[block >= 0].long()]
        means.append(tokens.mean(2))
        unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        similarities.append((unit @ unit.transpose(2, 3)).mean((2, 3)))
    return torch.stack(means, 2), torch.stack(similarities, 2)


def _pool_torch(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    placed = (table >= 0).flatten()
    tokens = x.index_select(2, table.clamp_min(0).flatten()).float() * placed[:, None]
    # the mean cosine of all pairs is the squared length of the mean unit vector
    unit = tokens * tokens.norm(dim=-1, keepdim=True).clamp_min(1e-30).reciprocal()
    count = placed.view(table.shape).sum(1)[:, None]
    means, directions = (part.unflatten(2, table.shape).sum(3) / count for part in (tokens, unit))
    return means, directions.square().sum(-1)


@triton.jit
def pool_blocks_kernel(
    x_ptr,
    table_ptr,
    mean_ptr,
    similarity_ptr,
    heads,
    x_batch,
    x_head,
    x_row,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    tokens = tl.load(table_ptr + block * BLOCK + tl.arange(0, BLOCK))
    placed = tokens >= 0
    d = tl.arange(0, WIDTH)
    x = tl.load(
        x_ptr + b * x_batch + h * x_head + tokens.to(tl.int64)[:, None] * x_row + d[None, :],
        mask=placed[:, None] & (d < SIZE)[None, :],
        other=0.0,
    ).to(tl.float32)
    count = tl.sum(placed.to(tl.float32), 0)
    length = tl.sqrt(tl.sum(x * x, 1))
    inverse = tl.where(length > 0.0, 1.0 / tl.where(length > 0.0, length, 1.0), 0.0)
    direction = tl.sum(x * inverse[:, None], 0) / count
    row = (b * heads + h) * tl.num_programs(0) + block
    tl.store(mean_ptr + row * SIZE + d, tl.sum(x, 0) / count, mask=d < SIZE)
    tl.store(similarity_ptr + row, tl.sum(direction * direction, 0))


def _pool_triton(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    means, similarity = _pool_fake(x, table)
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, size = x.shape
    pool_blocks_kernel[table.shape[0], batch * heads](
        x,
        table.contiguous(),
        means,
        similarity,
        heads,
        *x.stride()[:3],
        SIZE=size,
        WIDTH=power_of_two(size),
        BLOCK=table.shape[1],
        num_warps=4,
        enable_fp_fusion=True,
    )
    return means, similarity


def _pool_fake(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:2], table.shape[0])
    return x.new_empty((*shape, x.shape[3]), dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _pool_supported(x: torch.Tensor, table: torch.Tensor) -> bool:
    known = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return known and x.shape[3] <= 256 and x.shape[0] * x.shape[1] <= 65_535


_POOL = register("pool_blocks", _pool_torch, fake=_pool_fake, triton_path=_pool_triton, supported=_pool_supported)


# --- selection ---


def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    blocks: TokenBlocks,
    keep: float,
    mode: Mode = "topk",
    *,
    similarity: float | None = None,
    scale: float | None = None,
) -> KeyLists:
    """Key blocks of each query block, without waiting for the device.

    Args:
        query, key: (batch, heads, N, d) of the same sequence.
        blocks: where its tokens stand.
        keep: share of the picture's key blocks that each picture query block keeps ("topk"), or share of the pooled
            weight that they hold ("mass"); in (0, 1]. At least one block is kept.
        similarity: blocks with a mean cosine not above it are kept always, as queries and as keys; None keeps none so.
        scale: of the scores; None is 1 / sqrt(d).
    """
    means, query_similarity = pool_blocks(query, blocks.queries[: blocks.picture_queries])
    key_means, key_similarity = pool_blocks(key, blocks.keys[: blocks.picture_keys])
    scores = means @ key_means.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    tokens = (blocks.keys[: blocks.picture_keys] >= 0).sum(1)  # a block that is not full weighs less
    scores = scores + tokens.log()
    unlike = None if similarity is None else ~(key_similarity > similarity)
    kept = _keep(scores, keep, mode, unlike)
    if similarity is not None:
        kept |= ~(query_similarity > similarity)[..., None]
    return lists_of(_with_text(kept, blocks), blocks)


def kept_blocks(share: float, blocks: int) -> int:
    """How many of `blocks` a share keeps: rounded up, at least one."""
    return max(1, math.ceil(share * blocks - 1e-9))


def _keep(scores: torch.Tensor, keep: float, mode: Mode, unlike: torch.Tensor | None) -> torch.Tensor:
    """(..., query blocks, key blocks) bool; key blocks in `unlike` (batch, heads, key blocks) are kept besides."""
    if unlike is not None:
        # far below all others, not -inf: a row in which nothing else is left must still have an order
        scores = scores.masked_fill(unlike[:, :, None], torch.finfo(scores.dtype).min)
    if mode == "topk":
        best = scores.topk(kept_blocks(keep, scores.shape[-1]), dim=-1, sorted=False).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    else:
        weights, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        reached = weights.cumsum(-1) - weights  # weight of the better ones
        enough = reached < keep if keep < 1 else torch.ones_like(reached, dtype=torch.bool)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, enough)
    return kept if unlike is None else kept | unlike[:, :, None]


def _with_text(kept: torch.Tensor, blocks: TokenBlocks) -> torch.Tensor:
    """All key blocks for text queries, and the text's key blocks for all queries."""
    whole = kept.new_ones((*kept.shape[:2], blocks.queries.shape[0], blocks.keys.shape[0]))
    whole[:, :, : blocks.picture_queries, : blocks.picture_keys] = kept
    return whole


def lists_of(kept: torch.Tensor, blocks: TokenBlocks) -> KeyLists:
    """Lists from (batch, heads, query blocks, key blocks) bool, block numbers ascending."""
    order = (~kept).to(torch.int8).argsort(dim=-1, stable=True)
    return KeyLists(blocks.queries, blocks.keys, order.int(), kept.sum(-1, dtype=torch.int32))


def attended_pairs(lists: KeyLists) -> torch.Tensor:
    """Query-key pairs that the lists visit, over all heads and rows; an int64 scalar on the lists' device."""
    sizes = (lists.keys >= 0).sum(1)[lists.blocks.long()]
    listed = torch.arange(lists.blocks.shape[3], device=sizes.device) < lists.counts[..., None]
    return ((sizes * listed).sum(-1) * (lists.queries >= 0).sum(1)).sum()


def select_blocks_oracle(
    query: torch.Tensor, key: torch.Tensor, blocks: TokenBlocks, keep: float, mode: Mode, similarity: float | None
) -> list[list[list[set[int]]]]:
    """The kept key blocks, [batch][head][query block], from float64 pooling with plain loops."""
    means, query_similarity = pool_blocks_oracle(query, blocks.queries)
    key_means, key_similarity = pool_blocks_oracle(key, blocks.keys)
    chosen = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            rows = [
                _row_oracle(means[b, h, t], key_means[b, h], key_similarity[b, h], blocks, keep, mode, similarity)
                if t < blocks.picture_queries and (similarity is None or query_similarity[b, h, t] > similarity)
                else set(range(blocks.keys.shape[0]))
                for t in range(blocks.queries.shape[0])
            ]
            heads.append(rows)
        chosen.append(heads)
    return chosen


def _row_oracle(
    mean: torch.Tensor,
    key_means: torch.Tensor,
    key_similarity: torch.Tensor,
    blocks: TokenBlocks,
    keep: float,
    mode: Mode,
    similarity: float | None,
) -> set[int]:
    picture = range(blocks.picture_keys)
    always = {j for j in picture if similarity is not None and not float(key_similarity[j]) > similarity}
    sizes = (blocks.keys >= 0).sum(1).tolist()
    scores = {j: float(mean @ key_means[j]) / len(mean) ** 0.5 + math.log(sizes[j]) for j in picture if j not in always}
    best = sorted(scores, key=lambda j: -scores[j])
    total = math.fsum(math.exp(score) for score in scores.values())
    kept: set[int] = set()
    for j in best:
        mass = math.fsum(math.exp(scores[i]) for i in kept) / total
        if len(kept) >= kept_blocks(keep, blocks.picture_keys) if mode == "topk" else mass >= keep:
            break
        kept.add(j)
    return kept | always | set(range(blocks.picture_keys, blocks.keys.shape[0]))


def pooled_flops(shape: Sequence[int], blocks: TokenBlocks) -> int:
    """FLOPs of the pooled scores of a (batch, heads, N, d) sequence."""
    batch, heads, _, size = shape
    return 2 * batch * heads * blocks.picture_queries * blocks.picture_keys * size

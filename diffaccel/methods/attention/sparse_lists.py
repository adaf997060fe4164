"""What sparse attention keeps and catches: the shape of an attention, its lists, and the call of torch it makes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from diffaccel.errors import Unsupported
from diffaccel.kernels.attention_body import attention_flops
from diffaccel.kernels.block_selection import KEY_BLOCK, TokenBlocks, pooled_flops, token_blocks
from diffaccel.kernels.key_lists import KeyLists
from diffaccel.models.attention_sites import ImageAttention


@dataclass(frozen=True)
class Shape:
    """One kind of attention: heads, their size, tokens of the picture and of the text before and after it."""

    heads: int
    size: int
    grid: tuple[int, int]
    picture: int
    before: int
    after: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.picture + self.before + self.after

    def blocks(self) -> TokenBlocks:
        """Where its tokens stand."""
        return _blocks(self.grid, self.picture, self.before, self.after, self.device)

    def dense_flops(self, rows: int) -> int:
        """FLOPs of this attention over all pairs."""
        return attention_flops(rows, self.heads, self.tokens, self.tokens, self.size)

    def listed_flops(self, rows: int) -> int:
        """FLOPs that the operator's formula counts for lists with room for all blocks."""
        keys = self.blocks().keys.shape[0] * KEY_BLOCK
        return attention_flops(rows, self.heads, self.tokens, keys, self.size)

    def saved_flops(self, rows: int, *, make: bool) -> int:
        """FLOPs that a dense attention needs on top of what is counted here; `make`: with new lists."""
        made = pooled_flops((rows, self.heads, self.tokens, self.size), self.blocks()) if make else 0
        return self.dense_flops(rows) - self.listed_flops(rows) - made


@functools.lru_cache(maxsize=32)
def _blocks(grid: tuple[int, int], picture: int, before: int, after: int, device: torch.device) -> TokenBlocks:
    return token_blocks(grid, picture, before, after).to(device)


@dataclass
class Verdict:
    """Seconds of one attention, dense and sparse with its share of making the lists; None where sizes decide.

    `choice`: whether there are key blocks to leave out.
    """

    wanted: bool
    choice: bool = True
    dense: float | None = None
    sparse: float | None = None


@dataclass(frozen=True)
class Made:
    """Lists, the solver step they were made in, and the query-key pairs they visit (a scalar on the device)."""

    step: int
    lists: KeyLists
    pairs: torch.Tensor


@dataclass
class Lane:
    """Lists of one stream of calls, per site."""

    lists: dict[int, Made] = field(default_factory=dict)

    def due(self, site: int, rows: int, step: int, reuse: int) -> bool:
        """Whether a site needs new lists: it has none, they are old, or rows were dropped."""
        made = self.lists.get(site)
        return made is None or step - made.step >= reuse or made.lists.counts.shape[0] != rows


def shape_of(query: torch.Tensor, site: ImageAttention, picture: int, grid: tuple[int, int]) -> Shape:
    heads, tokens, size = query.shape[1:]
    text = tokens - picture
    if text < 0 or (text > 0 and site.text == "none"):
        raise Unsupported(f"sparse_attention: an attention has {tokens} tokens where {picture} make the picture.")
    before, after = (text, 0) if site.text == "before" else (0, text)
    return Shape(heads, size, grid, picture, before, after, query.dtype, query.device)

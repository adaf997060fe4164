"""Slot maps: which compact row each token belongs to, as the operators of kernels/ make and use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffaccel.kernels.matching import match_tokens
from diffaccel.kernels.merge import merge_tokens, unmerge_tokens
from diffaccel.kernels.slot_map import member_lists, slot_map


@dataclass(frozen=True)
class SlotMap:
    """A map for each image; all guidance branches of an image use the same one, rows being ordered branch by branch.

    Attributes:
        slot: (images, tokens) int32, compact row of each token.
        owner: (images, kept) int32, the token that a compact row stems from, ascending.
        start, members: (images, kept + 1) and (images, tokens) int32, tokens of row m: members[start[m] : start[m + 1]].
    """

    slot: torch.Tensor
    owner: torch.Tensor
    start: torch.Tensor
    members: torch.Tensor

    @classmethod
    def of(cls, slot: torch.Tensor, owner: torch.Tensor) -> SlotMap:
        """With the member lists made from `slot`."""
        return cls(slot, owner, *member_lists(slot, owner.shape[1]))

    @classmethod
    def from_owners(cls, owners: torch.Tensor, kept: int) -> SlotMap:
        """From (images, tokens): the token that each token's row stems from, `kept` different ones per image."""
        images, tokens = owners.shape
        owns = owners == torch.arange(tokens, device=owners.device)
        row = owns.cumsum(dim=1, dtype=torch.int32) - 1
        owner = owns.nonzero()[:, 1].to(torch.int32).view(images, kept)
        return cls.of(row.gather(1, owners.long()), owner)

    @property
    def images(self) -> int:
        """Number of maps."""
        return self.slot.shape[0]

    @property
    def kept(self) -> int:
        """Compact rows of an image."""
        return self.owner.shape[1]

    def merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean of the tokens of each row: (branches * images, tokens, channels) to (branches * images, kept, channels)."""
        compact: torch.Tensor = merge_tokens(tokens, self.start, self.members)
        return compact

    def unmerge(self, compact: torch.Tensor) -> torch.Tensor:
        """Copy each row to its tokens: the shapes of `merge`, the other way."""
        tokens: torch.Tensor = unmerge_tokens(compact, self.slot)
        return tokens

    def log_size(self, text: int = 0, *, first: bool = True) -> torch.Tensor:
        """Log of the number of tokens a row stands for, (images, text + kept) fp32; text tokens stand for themselves.

        Args:
            text: text tokens in the same sequence, before the image tokens or (`first` false) after them.
        """
        size = self.start.diff().float().log()
        return torch.nn.functional.pad(size, (text, 0) if first else (0, text))


def matched_map(
    metric: torch.Tensor,
    kept: torch.Tensor,
    rest: torch.Tensor,
    removed: int,
    favoured: torch.Tensor | None = None,
) -> SlotMap:
    """Assign the `removed` best-matching tokens of `rest` to their most similar destination by cosine similarity.

    Args:
        metric: (images, tokens, channels).
        kept, rest: token numbers (images or 1, count); together they are all tokens.
        removed: number of tokens to merge, at most the length of `rest`.
        favoured: mask over `rest`; tokens in it are merged before all others.
    """
    images = metric.shape[0]
    targets, sources = (t.to(metric.device, torch.int32).expand(images, -1) for t in (kept, rest))
    best, index = match_tokens(metric, sources, targets)
    return SlotMap.of(*slot_map(best, index, sources, targets, removed, favoured))

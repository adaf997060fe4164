"""Which tokens a region step computes: pure functions on tensors.

Selection follows RAS (arXiv 2502.10389) with another rule against starvation. Tokens are ranked by a score; the frozen
ones are taken from both ends of the ranking, so the active ones lie around a centre c of the ranks. A token of rank r,
dropped D times in a row, has the priority

    p = |r - c| / tokens - starvation * D        (smallest first)

D can only raise the chance of being active, whichever end a token is frozen from, and the rule does not depend on the
scale or dtype of the scores.

No token is dropped more than ceil(1 / starvation) + floor((tokens - 1) / active) times in a row. Proof: |r - c| < tokens,
so token U comes before token T only if D_T - D_U < 1 / starvation. Once D_T >= 1 / starvation, a U that is chosen before T
starts again at 0 and falls behind by at least 1 / starvation as long as T waits: each other token comes before T at most
once, `active` of them per step.
"""

from __future__ import annotations

import math

import torch

from diffaccel.models.call import Call


def split_cells(output: torch.Tensor, patch: int, cells: int) -> torch.Tensor:
    """A prediction as (images, tokens, channels, cells of a token), tokens row by row over the grid.

    Args:
        output: (images, channels, h, w), or packed (images, tokens, channels * cells).
        patch: side of a token in latent cells, for unpacked latents.
        cells: cells in a token, for packed latents.
    """
    if output.dim() == 3:
        return output.reshape(*output.shape[:2], -1, cells)
    images, channels, height, width = output.shape
    tiles = output.reshape(images, channels, height // patch, patch, width // patch, patch)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)


def spread(cells: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the channels, averaged over a token's cells, in fp32: (images, tokens)."""
    return cells.float().std(dim=2).mean(dim=-1)


def length(cells: torch.Tensor) -> torch.Tensor:
    """Euclidean norm over the channels, averaged over a token's cells, in fp32: (images, tokens)."""
    norm: torch.Tensor = torch.linalg.vector_norm(cells.float(), dim=2)
    return norm.mean(dim=-1)


def active_count(tokens: int, ratio: float) -> int:
    """Tokens of a region step: ratio * tokens rounded up; at least 2, as some models squeeze a sequence of one."""
    return min(tokens, max(2, math.ceil(ratio * tokens)))


def longest_wait(tokens: int, active: int, starvation: float) -> int:
    """How many steps in a row a token can be dropped at most."""
    return math.ceil(1 / starvation) + (tokens - 1) // active


def select(
    score: torch.Tensor, dropped: torch.Tensor, active: int, *, high_share: float, starvation: float
) -> torch.Tensor:
    """The active tokens of every image.

    Args:
        score: (images, tokens) fp32.
        dropped: (images, tokens), steps since each token was computed.
        active: tokens to choose.
        high_share: share of the frozen tokens that is taken from the high end of the score.
        starvation: what one dropped step weighs, in units of the whole ranking.
    Returns:
        (images, active) int64, ascending.
    """
    tokens = score.shape[1]
    frozen = tokens - active
    lowest = frozen - int(frozen * high_share)  # rank of the first active token if none was dropped before
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)
    distance = (rank - (lowest + (active - 1) / 2)).abs().float() / tokens
    priority = distance - starvation * dropped.float()
    return priority.argsort(dim=1, stable=True)[:, :active].sort(dim=1).values


def flat_index(index: torch.Tensor, tokens: int, before: int = 0) -> torch.Tensor:
    """Per-row token numbers as row numbers of the flattened (rows * (before + tokens), ...) tensor.

    Args:
        index: (rows, active).
        tokens: image tokens per row.
        before: text tokens in front of the image tokens; all of them are taken.
    """
    rows = torch.arange(index.shape[0], device=index.device)[:, None] * (before + tokens)
    if before:
        text = torch.arange(before, device=index.device).expand(index.shape[0], before)
        index = torch.cat([text, before + index], dim=1)
    return (rows + index).reshape(-1)


def gather_rows(values: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Rows of (rows, tokens, ...) by flat number: (rows, active, ...)."""
    return values.flatten(0, 1).index_select(0, flat).view(values.shape[0], -1, *values.shape[2:])


def rows_of_branches(index: torch.Tensor, call: Call) -> torch.Tensor:
    """(images, active) for the rows of a call, which stack the images once per guidance branch."""
    return index.repeat(len(call.branches), 1)

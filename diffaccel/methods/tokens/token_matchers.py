"""Matchers: which tokens of a grid are merged into which. Each is a function of one `Grid`; `MATCHERS` names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from diffaccel.kernels.matching import inverse_norms, match_tokens
from diffaccel.kernels.slot_map import slot_map
from diffaccel.methods.tokens.token_maps import SlotMap, matched_map

_POOL = 1.4  # importance: destinations are drawn from this multiple of the kept tokens (the paper's value for SD)
_TILE, _SMALL_TILE = 8, 4  # sides of the tiles of `tile` and `agglomerative`, in tokens


@dataclass(frozen=True)
class Grid:
    """What a matcher gets.

    Attributes:
        metric: (images, height * width, channels), what tokens are compared by.
        ratio: share of the tokens to merge away.
        generator: of this evaluation, on the CPU.
        importance: (images, h, w) of the latents; None where no guidance difference is known.
    """

    metric: torch.Tensor
    height: int
    width: int
    ratio: float
    generator: torch.Generator
    importance: torch.Tensor | None = None

    @property
    def removed(self) -> int:
        """Number of tokens to merge away."""
        return int(self.height * self.width * self.ratio)


def window(grid: Grid) -> SlotMap:
    """One random destination per 2 x 2 window, candidates everywhere (Bolya and Hoffman, arXiv 2303.17604)."""
    kept, rest = window_destinations(grid.height, grid.width, grid.generator)
    removed = min(grid.removed, rest.shape[1])  # grids of one row have a destination in every pair of tokens
    return matched_map(grid.metric, kept, rest, removed)


def important(grid: Grid) -> SlotMap:
    """Destinations from the tokens that guidance changes most (Wu et al., arXiv 2411.16720); `window` without a map."""
    if grid.importance is None or grid.importance.shape[0] != grid.metric.shape[0]:
        return window(grid)
    size = (grid.height, grid.width)
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid.importance[:, None].float(), size).flatten(1)
    kept, rest, favoured = important_destinations(pooled, grid.removed, grid.generator)
    return matched_map(grid.metric, kept, rest, grid.removed, favoured)


def tile(grid: Grid) -> SlotMap:
    """As `window`, with candidates only inside the token's tile of 8 x 8: linear in the tokens, groups stay close.

    The best matches of the whole picture are merged, wherever they are.
    """
    images, tokens, _ = grid.metric.shape
    kept, rest = window_destinations(grid.height, grid.width, grid.generator)
    drawn = torch.zeros(tokens, dtype=torch.bool).index_fill_(0, kept[0], True)
    place = torch.zeros(tokens, dtype=torch.int32).index_copy_(
        0, kept[0], torch.arange(kept.shape[1], dtype=torch.int32)
    )
    device, parts = grid.metric.device, []
    for ids in tiles(grid.height, grid.width, _TILE):
        count, order = int(drawn[ids[0]].sum()), drawn[ids].int().argsort(dim=1, descending=True, stable=True)
        targets, sources = order[:, :count], order[:, count:]
        local = [t.to(device, torch.int32).repeat(images, 1) for t in (sources, targets)]
        best, index = match_tokens(_tile_tokens(grid.metric, ids), *local)
        number = place[ids.gather(1, targets)].to(device).repeat(images, 1).gather(1, index.long())
        parts.append([t.view(images, -1) for t in (best, number, ids.gather(1, sources).to(device).repeat(images, 1))])
    best, index, sources = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    targets = kept.to(device, torch.int32).expand(images, -1)
    removed = min(grid.removed, rest.shape[1])
    return SlotMap.of(*slot_map(best, index, sources.to(torch.int32), targets, removed, None))


def agglomerative(grid: Grid) -> SlotMap:
    """Bottom-up clustering with average linkage (Haurum et al., arXiv 2409.11923), inside tiles of 4 x 4 tokens.

    The share of tokens is merged away in every tile, rounded down there. There is nothing random in it.
    """
    images, tokens, _ = grid.metric.shape
    owners = torch.empty(images, tokens, dtype=torch.long, device=grid.metric.device)
    kept = 0
    for ids in tiles(grid.height, grid.width, _SMALL_TILE):
        removed = int(ids.shape[1] * grid.ratio)
        kept += ids.shape[0] * (ids.shape[1] - removed)
        values = _tile_tokens(grid.metric, ids).float()
        unit = values * inverse_norms(values)[..., None]
        labels = cluster(unit @ unit.transpose(1, 2), removed).view(images, *ids.shape)
        ids = ids.to(owners.device)
        owners[:, ids.flatten()] = ids.expand(images, -1, -1).gather(2, labels).flatten(1)
    return SlotMap.from_owners(owners, kept)


Matcher = Callable[[Grid], SlotMap]
MATCHERS: dict[str, Matcher] = {
    "window": window,
    "importance": important,
    "tile": tile,
    "agglomerative": agglomerative,
}


def window_destinations(height: int, width: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One random cell of each whole 2 x 2 window, and all other cells, as (1, count) token indices.

    Windows of a grid of one row or column are one token thin.
    """
    tall, wide = min(height, 2), min(width, 2)
    rows, columns = height // tall, width // wide
    choice = torch.randint(tall * wide, (rows, columns), generator=generator)
    y = tall * torch.arange(rows)[:, None] + choice // wide
    x = wide * torch.arange(columns)[None, :] + choice % wide
    kept = (y * width + x).flatten()
    mask = torch.ones(height * width, dtype=torch.bool)
    mask[kept] = False
    return kept[None], mask.nonzero().flatten()[None]


def important_destinations(
    importance: torch.Tensor, removed: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Destinations drawn from the most important tokens, per image.

    Args:
        importance: (images, tokens).
        removed: tokens that will be merged away.
    Returns:
        destinations (images, d) with d = tokens // 4, all other tokens (images, n - d), and a mask over the latter that
        is True for unimportant tokens, which are merged before any important one.
    """
    images, tokens = importance.shape
    count = max(tokens // 4, 1)
    pool = max(min(tokens, math.ceil((tokens - removed) * _POOL)), count)
    order = importance.argsort(dim=1, descending=True)
    draw = torch.randperm(pool, generator=generator)[:count].to(importance.device)  # the same ranks for every image
    kept = order[:, draw]
    unimportant = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, pool:], True)
    rest_mask = torch.ones_like(unimportant).scatter_(1, kept, False)
    rest = rest_mask.nonzero()[:, 1].view(images, tokens - count)
    return kept, rest, unimportant.gather(1, rest)


def tiles(height: int, width: int, side: int) -> Iterator[torch.Tensor]:
    """Token numbers of all tiles, (tiles, tokens of a tile) for each shape of tile; a strip of one joins its neighbour."""
    rows, columns = _spans(height, side), _spans(width, side)
    for tall in sorted({stop - start for start, stop in rows}):
        for wide in sorted({stop - start for start, stop in columns}):
            y = torch.tensor([start for start, stop in rows if stop - start == tall])
            x = torch.tensor([start for start, stop in columns if stop - start == wide])
            corner = (y[:, None] * width + x).flatten()
            inside = (torch.arange(tall)[:, None] * width + torch.arange(wide)).flatten()
            yield corner[:, None] + inside


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    starts = list(range(0, length, side))
    if len(starts) > 1 and length - starts[-1] < 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], length], strict=True))


def _tile_tokens(metric: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(images, tokens, channels) to (images * tiles, tokens of a tile, channels)."""
    picked = metric.index_select(1, ids.flatten().to(metric.device))
    return picked.view(-1, ids.shape[1], metric.shape[2])


def cluster(similarity: torch.Tensor, removed: int) -> torch.Tensor:
    """Join the two clusters with the largest mean similarity, `removed` times: (tiles, n, n) to labels (tiles, n).

    A label is the lowest member of the cluster; of equally similar pairs the lowest are joined.
    """
    count, n, _ = similarity.shape
    tile_index = torch.arange(count, device=similarity.device)
    total, size = similarity.clone(), similarity.new_ones(count, n)
    labels = torch.arange(n, device=similarity.device).repeat(count, 1)
    upper = torch.ones(n, n, dtype=torch.bool, device=similarity.device).triu(1)
    for _ in range(removed):
        alive = size > 0
        usable = upper & alive[:, :, None] & alive[:, None, :]
        mean = torch.where(usable, total / (size[:, :, None] * size[:, None, :]), -torch.inf)
        pair = mean.flatten(1).argmax(dim=1)
        low, high = pair // n, pair % n
        total[tile_index, low] += total[tile_index, high]
        total[tile_index, :, low] += total[tile_index, :, high]
        size[tile_index, low] += size[tile_index, high]
        size[tile_index, high] = 0
        labels = torch.where(labels == high[:, None], low[:, None], labels)
    return labels


def guidance_importance(output: torch.Tensor) -> torch.Tensor:
    """Mean over channels of |cond - uncond|: (2 * images, channels, h, w) to (images, h, w)."""
    uncond, cond = output.chunk(2)
    return (cond - uncond).abs().float().mean(1)

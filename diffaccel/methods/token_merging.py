"""Token merging: average each redundant token into its most similar kept one before self-attention, copy back after it.

Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604): one destination per 2 x 2 window, the
share `ratio` of tokens that match best is merged. With importance (Wu et al., "Importance-Based Token Merging", arXiv
2411.16720) destinations come from the tokens where the guidance difference |c - u| of the previous step is largest, and
unimportant tokens are merged first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from diffaccel.errors import Unsupported
from diffaccel.method import Method, register
from diffaccel.methods.tokens import MinTokens, TokenSites
from diffaccel.model_map import ModelMap
from diffaccel.run import Call, Layer, Proceed, Run, prediction
from diffaccel.seams import Seams

_POOL = 1.4  # importance: destinations are drawn from this multiple of the kept tokens (the paper's value for SD)


@register
class TokenMerging(Method):
    """Merge tokens around self-attention.

    Attributes:
        ratio: share of tokens merged away, 0 to 0.75 (one of each 2 x 2 window stays). Off: 0.
        importance: rank tokens by the guidance difference of the previous evaluation; the first one of a run has none
            and uses one random destination per window.
        min_tokens: shorten self-attentions on at least so many tokens, or "measured": those where a timing on this
            machine says it pays.
        start_fraction, stop_fraction: shares of the run between which tokens are merged.
        seed: seed of the destination draws. Pictures never depend on their batch mates, and the draws never touch the
            global random state.
    Conditional and unconditional rows of an image share one slot map.
    """

    name: ClassVar[str] = "token_merging"
    layer: ClassVar[Layer] = Layer.TOKENS

    ratio: float = Field(default=0.5, ge=0, le=0.75)
    importance: bool = False
    min_tokens: MinTokens = Field(default="measured")
    start_fraction: float = Field(default=0.0, ge=0, le=1)
    stop_fraction: float = Field(default=1.0, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> TokenMerging:
        if self.start_fraction > self.stop_fraction:
            raise ValueError("start_fraction must not be above stop_fraction")
        return self

    @property
    def is_off(self) -> bool:
        return self.ratio == 0.0

    def check(self, model: ModelMap) -> None:
        if not model.unet(self.name).attention:
            raise Unsupported("token_merging: this denoiser has no self-attention to shorten.")

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        state = _State(self, run)
        sites = TokenSites(
            self.name, model, run, lambda: _Merger(state), (self.ratio, self.importance), self.min_tokens
        )
        sites.attach(seams)

        def around(call: Call, proceed: Proceed) -> Any:
            output = sites.around(call, proceed, enabled=self.start_fraction <= run.clock.fraction < self.stop_fraction)
            if self.importance and len(call.branches) == 2:
                state.update(guidance_importance(prediction(output)))
            return output

        run.around("denoiser", Layer.TOKENS, around)


@dataclass
class _State:
    """What all grids of a run share: settings, step, and the importance map of the previous evaluation."""

    config: TokenMerging
    run: Run
    importance: torch.Tensor | None = None  # (images, h, w) of the latents

    def update(self, importance: torch.Tensor) -> None:
        """Take a new map; images without guidance keep their old one, whatever their batch mates do."""
        latched = self.run.latched
        if latched is not None and self.importance is not None and self.importance.shape == importance.shape:
            importance = torch.where(latched[:, None, None], self.importance, importance)
        self.importance = importance

    def generator(self) -> torch.Generator:
        """One generator per evaluation: repeated calls and other batch sizes draw the same positions."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.run.clock.evaluation)


class _Merger:
    """Slot map of one token grid in one denoiser call, shared by all spatial transformers on that grid."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.slots: SlotMap | None = None

    def prepare(self, features: torch.Tensor, branches: int) -> None:
        """Match once per call and grid; (rows, channels, h, w) in, rows ordered branch by branch."""
        if self.slots is not None and self.slots.rows == features.shape[0]:
            return
        images = features.shape[0] // branches
        metric = features.view(branches, images, *features.shape[1:]).sum(0).flatten(2).transpose(1, 2)
        self.slots = self._match(metric, features.shape[-2], features.shape[-1]).repeat(branches)

    def _match(self, metric: torch.Tensor, height: int, width: int) -> SlotMap:
        removed = int(height * width * self.state.config.ratio)
        generator, importance = self.state.generator(), self.state.importance
        if importance is None or importance.shape[0] != metric.shape[0]:
            kept, rest = window_destinations(height, width, generator)
            removed = min(removed, rest.shape[1])  # grids of one row have a destination in every pair of tokens
            return match_tokens(metric, kept.to(metric.device), rest.to(metric.device), removed)
        pooled = torch.nn.functional.adaptive_avg_pool2d(importance[:, None].float(), (height, width)).flatten(1)
        kept, rest, favoured = important_destinations(pooled, removed, generator)
        return match_tokens(metric, kept, rest, removed, favoured)

    def attend(self, original: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Self-attention on the merged tokens, copied back to all positions."""
        assert self.slots is not None
        output: torch.Tensor = original(self.slots.merge(hidden), **kwargs)
        return self.slots.unmerge(output)


@dataclass(frozen=True)
class SlotMap:
    """Which compact row each token belongs to.

    Attributes:
        slot: (rows * tokens,) positions in the flattened (rows * kept) compact tensor.
        inverse_size: (rows * kept, 1) fp32, one over the number of tokens in each compact row.
        rows, kept: shape of the compact tensor.
    """

    slot: torch.Tensor
    inverse_size: torch.Tensor
    rows: int
    kept: int

    @classmethod
    def from_rows(cls, slot: torch.Tensor, kept: int) -> SlotMap:
        """From `slot` (rows, tokens) with values in [0, kept)."""
        rows = slot.shape[0]
        flat = (slot + kept * torch.arange(rows, device=slot.device)[:, None]).flatten()
        size = torch.bincount(flat, minlength=rows * kept)
        return cls(flat, size.reciprocal()[:, None], rows, kept)

    def repeat(self, times: int) -> SlotMap:
        """The same map for `times` stacked branches."""
        if times == 1:
            return self
        slot = self.slot.view(self.rows, -1) - self.kept * torch.arange(self.rows, device=self.slot.device)[:, None]
        return SlotMap.from_rows(slot.repeat(times, 1), self.kept)

    def merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean of the tokens in each slot: (rows, tokens, channels) to (rows, kept, channels)."""
        rows, _, channels = tokens.shape
        summed = tokens.new_zeros(rows * self.kept, channels, dtype=torch.float32)
        flat = tokens.reshape(-1, channels).float()
        if tokens.device.type == "cpu":
            summed.index_add_(0, self.slot, flat)
        else:  # index_add_ is not deterministic on GPUs, index_put_ with accumulate is
            summed.index_put_((self.slot,), flat, accumulate=True)
        return (summed * self.inverse_size).to(tokens.dtype).view(rows, self.kept, channels)

    def unmerge(self, compact: torch.Tensor) -> torch.Tensor:
        """Copy each slot to its tokens: (rows, kept, channels) to (rows, tokens, channels)."""
        rows, _, channels = compact.shape
        return compact.reshape(-1, channels).index_select(0, self.slot).view(rows, -1, channels)


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


def match_tokens(
    metric: torch.Tensor, kept: torch.Tensor, rest: torch.Tensor, removed: int, favoured: torch.Tensor | None = None
) -> SlotMap:
    """Assign the `removed` best-matching tokens of `rest` to their most similar destination by cosine similarity.

    Args:
        metric: (images, tokens, channels).
        kept, rest: token indices (images or 1, count); together they are all tokens.
        removed: number of tokens to merge, at most the length of `rest`.
        favoured: mask over `rest`; tokens in it are merged before all others.
    """
    images, tokens, _ = metric.shape
    kept, rest = kept.expand(images, -1), rest.expand(images, -1)
    unit = torch.nn.functional.normalize(metric.float(), dim=-1).to(metric.dtype)
    best, target = (_rows(unit, rest) @ _rows(unit, kept).transpose(1, 2)).max(dim=-1)
    rank = best.float() if favoured is None else best.float() + 4.0 * favoured  # cosines lie in [-1, 1]
    merged = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, rank.topk(removed, dim=1).indices, True)
    own = kept.shape[1] + (~merged).cumsum(1) - 1  # tokens left alone get the slots after the destinations
    slot = torch.empty(images, tokens, dtype=torch.long, device=metric.device)
    slot.scatter_(1, kept, torch.arange(kept.shape[1], device=metric.device).expand(images, -1))
    slot.scatter_(1, rest, torch.where(merged, target, own))
    return SlotMap.from_rows(slot, tokens - removed)


def _rows(metric: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """metric[b, index[b]] as one flat index_select, which is far faster than gather with an expanded index."""
    images, tokens, channels = metric.shape
    flat = (index + tokens * torch.arange(images, device=index.device)[:, None]).flatten()
    return metric.reshape(-1, channels).index_select(0, flat).view(images, -1, channels)


def guidance_importance(output: torch.Tensor) -> torch.Tensor:
    """Mean over channels of |cond - uncond|: (2 * images, channels, h, w) to (images, h, w)."""
    uncond, cond = output.chunk(2)
    return (cond - uncond).abs().float().mean(1)

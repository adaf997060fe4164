"""Token merging: average each redundant token into its most similar kept one before self-attention, copy back after it.

Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604): one destination per 2 x 2 window, the
share `ratio` of tokens that match best is merged. With importance (Wu et al., "Importance-Based Token Merging", arXiv
2411.16720) destinations come from the tokens where the guidance difference |c - u| of the previous step is largest, and
unimportant tokens are merged first. Other matchers: token_matchers.py. Diffusion transformers: token_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.kernels.matching import match_tokens
from diffaccel.methods.tokens.sites import MinTokens, TokenSites
from diffaccel.methods.tokens.token_blocks import BlockSites
from diffaccel.methods.tokens.token_maps import SlotMap
from diffaccel.methods.tokens.token_matchers import MATCHERS, Grid, guidance_importance
from diffaccel.models.call import Call, prediction
from diffaccel.models.merging import MergeFacts, merge_facts
from diffaccel.models.model_map import ModelMap
from diffaccel.models.unet import UNetLayout


@register
class TokenMerging(Method):
    """Merge tokens around self-attention of UNets and of SD3, FLUX and PixArt; text tokens are never merged.

    Attributes:
        ratio: share of tokens merged away, 0 to 0.75 (one of each 2 x 2 window stays). Off: 0.
        matcher: "window", one random destination per 2 x 2 window and candidates everywhere; "importance", the same as the
            setting of that name; "tile", candidates only in the same 8 x 8 tokens; "agglomerative", clustering with
            average linkage in tiles of 4 x 4 tokens.
        importance: rank tokens by the guidance difference of the previous evaluation; the first one of a run has none
            and uses one random destination per window.
        reuse: evaluations that share a slot map; one map serves all layers of a grid.
        proportional: a key that stands for several tokens weighs as much as they did: log(size) is added to its scores.
        dense_blocks: main blocks of a transformer that keep all tokens, at its start and at its end; UNets have no use
            for it.
        min_tokens: shorten self-attentions on at least so many tokens, or "measured": those where a timing on this
            machine says it pays.
        start_fraction, stop_fraction: shares of the run between which tokens are merged.
        seed: seed of the destination draws. Pictures never depend on their batch mates, and the draws never touch the
            global random state.
    Conditional and unconditional rows of an image share one slot map.

    Papers: Bolya and Hoffman (ToMe), arXiv 2303.17604; `importance`: Wu et al., arXiv 2411.16720; "agglomerative": Haurum et
    al., arXiv 2409.11923.
    """

    name: ClassVar[str] = "token_merging"
    layer: ClassVar[Layer] = Layer.TOKENS
    by_token: ClassVar[bool] = True

    ratio: float = Field(default=0.5, ge=0, le=0.75)
    matcher: Literal["window", "importance", "tile", "agglomerative"] = "window"
    importance: bool = False
    reuse: int = Field(default=1, ge=1)
    proportional: bool = False
    dense_blocks: tuple[int, int] = (1, 1)
    min_tokens: MinTokens = Field(default="measured")
    start_fraction: float = Field(default=0.0, ge=0, le=1)
    stop_fraction: float = Field(default=1.0, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> TokenMerging:
        if self.start_fraction > self.stop_fraction:
            raise ValueError("start_fraction must not be above stop_fraction")
        if self.importance and self.matcher not in ("window", "importance"):
            raise ValueError(f"importance is a matcher of its own and cannot run with matcher {self.matcher!r}")
        if min(self.dense_blocks) < 0:
            raise ValueError("dense_blocks must not be negative")
        return self

    @property
    def is_off(self) -> bool:
        return self.ratio == 0.0

    @property
    def chosen(self) -> str:
        """The matcher that runs."""
        return "importance" if self.importance else self.matcher

    @property
    def plan_settings(self) -> tuple[Any, ...]:
        """What the cost of a shortened attention depends on."""
        return (self.ratio, self.chosen, self.proportional, self.reuse, self.dense_blocks)

    def check(self, model: ModelMap) -> None:
        if isinstance(model.layout, UNetLayout):
            if not model.layout.attention:
                raise Unsupported("token_merging: this denoiser has no self-attention to shorten.")
            return
        facts = merge_facts(self.name, model.denoiser)
        first, last = self.dense_blocks
        if first + last >= facts.blocks:
            raise Unsupported(
                f"token_merging: dense_blocks {self.dense_blocks} leave none of the {facts.blocks} blocks to shorten."
            )
        if self.chosen == "importance" and (model.convention.calls == "separate" or facts.packed):
            raise Unsupported(
                "token_merging: importance compares guidance branches of one call, and this pipeline makes no such calls."
            )

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        self.check(model)  # processors and blocks may have changed since wrap()
        state = _State(self, run)
        sites = self._sites(model, run, state)
        sites.attach(seams)

        def around(call: Call, proceed: Proceed) -> Any:
            enabled = self.start_fraction <= run.clock.fraction < self.stop_fraction
            state.look_at(call)
            output = sites.around(call, proceed, enabled=enabled)
            if self.chosen == "importance" and len(call.branches) == 2:
                channels = call.sample.shape[1]  # behind them, some models predict variances
                state.update(guidance_importance(prediction(output)[:, :channels]))
            return output

        run.around("denoiser", Layer.TOKENS, around)

    def _sites(self, model: ModelMap, run: Run, state: _State) -> TokenSites | BlockSites:
        if isinstance(model.layout, UNetLayout):
            return TokenSites(
                self.name, model, run, lambda: _Merger(state), self.plan_settings, self.min_tokens, self.reuse
            )
        facts: MergeFacts = merge_facts(self.name, model.denoiser)
        return BlockSites(self, facts, run, state.match)


@dataclass
class _State:
    """What all grids of a run share: settings, step, and the importance map of the previous evaluation."""

    config: TokenMerging
    run: Run
    tile: int = 0
    maps: dict[int, torch.Tensor] = field(default_factory=dict)  # (images, h, w) of the latents, for each tile of them

    @property
    def importance(self) -> torch.Tensor | None:
        """The map of what the current call sees."""
        return self.maps.get(self.tile)

    def look_at(self, call: Call) -> None:
        """A call begins; a tile that has moved has no map."""
        self.tile = self.run.tile(call)
        if not self.run.same_place(call):
            self.maps.pop(self.tile, None)

    def update(self, importance: torch.Tensor) -> None:
        """Take a new map; images without guidance keep their old one, whatever their batch mates do."""
        latched = self.run.latched
        if latched is not None and self.importance is not None and self.importance.shape == importance.shape:
            importance = torch.where(latched[:, None, None], self.importance, importance)
        self.maps[self.tile] = importance

    def generator(self) -> torch.Generator:
        """One generator per evaluation: repeated calls and other batch sizes draw the same positions."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.run.clock.evaluation)

    def match(self, metric: torch.Tensor, height: int, width: int) -> SlotMap:
        """The slot map of (images, height * width, channels)."""
        self.run.counters.setdefault(self.config.name, {})["operators"] = match_tokens.path(metric)
        grid = Grid(metric, height, width, self.config.ratio, self.generator(), self.importance)
        return MATCHERS[self.config.chosen](grid)


class _Merger:
    """Slot map of one token grid, shared by all spatial transformers on that grid and by `reuse` evaluations."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.slots: SlotMap | None = None
        self.bias: torch.Tensor | None = None

    def prepare(self, features: torch.Tensor, branches: int) -> None:
        """Match once per grid; (rows, channels, h, w) in, rows ordered branch by branch."""
        images = features.shape[0] // branches
        if self.slots is None or self.slots.images != images:
            metric = features.view(branches, images, *features.shape[1:]).sum(0).flatten(2).transpose(1, 2)
            self.slots = self.state.match(metric.contiguous(), features.shape[-2], features.shape[-1])
        if self.state.config.proportional:
            bias = self.slots.log_size().repeat(branches, 1)[:, None]
            self.bias = bias if features.device.type == "cpu" else bias.to(features.dtype)

    def attend(self, original: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Self-attention on the merged tokens, copied back to all positions."""
        assert self.slots is not None
        if kwargs.get("attention_mask") is not None:
            raise Unsupported("token_merging: this call masks image tokens one by one, and merged tokens have no mask.")
        if self.bias is not None:
            kwargs = kwargs | {"attention_mask": self.bias}
        output: torch.Tensor = original(self.slots.merge(hidden), **kwargs)
        return self.slots.unmerge(output)

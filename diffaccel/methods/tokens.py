"""Shared parts of the token methods: attention sites of one run, planning by measurement, the current grid.

A plan is made before the network runs, once per latent shape: which self-attentions are shortened. `min_tokens` decides
by size; "measured" times the dense and the shortened form of each level once per (shape, dtype, device) and leaves alone
what loses. Spatial transformers tell their group the grid and the features before their attentions run, so nothing
is decided inside compiled blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import nn

from diffaccel.flops import count_flops
from diffaccel.model_map import ModelMap
from diffaccel.models.unet import AttentionSite
from diffaccel.run import Call, Proceed, Run
from diffaccel.seams import Seams

MinTokens = Literal["measured"] | Annotated[int, Field(ge=1)]


class Shortener(Protocol):
    """What a token method does to one self-attention. One instance per token grid and run."""

    def prepare(self, features: torch.Tensor, branches: int) -> None:
        """See a spatial transformer's input (rows, channels, h, w) before its attentions run."""

    def attend(self, original: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Self-attention on (rows, tokens, channels), same shape out."""


@dataclass
class Verdict:
    """What was measured for one level: seconds of one self-attention, FLOPs saved in all of them together."""

    tokens: int
    channels: int
    dense_seconds: float
    short_seconds: float
    saved_flops: int

    @property
    def pays(self) -> bool:
        """Whether the shortened form is faster, its share of the preparation included."""
        return self.short_seconds < self.dense_seconds


@dataclass
class TokenSites:
    """The token method's view of one run: patches every spatial transformer and self-attention, active or not."""

    name: str
    model: ModelMap
    run: Run
    make: Callable[[], Shortener]
    settings: Any
    min_tokens: MinTokens
    active_levels: frozenset[int] = frozenset()
    branches: int = 1
    shorteners: dict[int, Shortener] = field(default_factory=dict)
    _planned: dict[Any, tuple[frozenset[int], int]] = field(default_factory=dict)

    def attach(self, seams: Seams) -> None:
        """Patch all attention sites; whether they act is decided by the plan of the current call."""
        for site in self.model.unet(self.name).attention:
            seams.replace_forward(site.transformer, lambda f, s=site: TransformerPatch(self, s, f).forward)  # type: ignore[misc]
            for attention in site.self_attentions:
                seams.replace_forward(attention, lambda f, s=site: AttentionPatch(self, s.level, f).forward)  # type: ignore[misc]

    def around(self, call: Call, proceed: Proceed, *, enabled: bool) -> Any:
        """Run one denoiser call with the plan for its shape, or dense if not `enabled`."""
        if not enabled:
            self.active_levels = frozenset()
            return proceed(call)
        self.active_levels, saved = self.plan(call)
        self.branches = max(len(call.branches), 1)
        self.shorteners = {level: self.make() for level in self.active_levels}
        self.run.count(self.name, **{"shortened evaluations": int(bool(self.active_levels))})
        try:
            return proceed(call.tagged((self.name, self.settings, self.active_levels), saved_flops=saved))
        finally:
            self.active_levels = frozenset()

    def plan(self, call: Call) -> tuple[frozenset[int], int]:
        """Levels to shorten for calls of this shape, and the FLOPs this saves in a complete call."""
        key = (
            self.name,
            self.settings,
            self.min_tokens,
            tuple(call.sample.shape),
            call.sample.dtype,
            len(call.branches),
        )
        if key not in self._planned:
            verdicts = {level: self._verdict(level, call, key) for level in self._levels()}
            levels = frozenset(level for level, v in verdicts.items() if self._wanted(v))
            self._describe(verdicts, levels)
            self._planned[key] = (
                levels,
                sum(verdicts[level].saved_flops for level in levels),
            )
        return self._planned[key]

    def _levels(self) -> list[int]:
        return sorted({site.level for site in self.model.unet(self.name).attention})

    def _sites(self, levels: frozenset[int]) -> list[AttentionSite]:
        return [site for site in self.model.unet(self.name).attention if site.level in levels]

    def _wanted(self, verdict: Verdict) -> bool:
        return verdict.pays if self.min_tokens == "measured" else verdict.tokens >= self.min_tokens

    def _verdict(self, level: int, call: Call, key: Any) -> Verdict:
        known = self.run.measured
        if (key, level) not in known:
            known[key, level] = self._measure(level, call)
        verdict: Verdict = known[key, level]
        return verdict

    def _measure(self, level: int, call: Call) -> Verdict:
        attentions = [a for site in self._sites(frozenset({level})) for a in site.self_attentions]
        height, width = grid(call.sample.shape[-2:], level)
        features, hidden = _random_inputs(attentions[0], call, height, width)
        branches = max(len(call.branches), 1)

        def prepared() -> Shortener:
            shortener = self.make()
            shortener.prepare(features, branches)
            return shortener

        def dense() -> Any:
            return attentions[0](hidden)

        def short() -> Any:
            return shortener.attend(attentions[0].forward, hidden, {})

        with torch.no_grad():
            shortener, preparing = count_flops(prepared)
            saved = (count_flops(dense)[1] - count_flops(short)[1]) * len(attentions) - preparing
            times = (0.0, 0.0)
            if self.min_tokens == "measured":  # one preparation serves all attentions on this grid
                share = median_seconds(prepared, hidden.device) / len(attentions)
                times = median_seconds(short, hidden.device) + share, median_seconds(dense, hidden.device)
            return Verdict(height * width, hidden.shape[-1], times[1], times[0], saved)

    def _describe(self, verdicts: dict[int, Verdict], levels: frozenset[int]) -> None:
        counter = self.run.counters.setdefault(self.name, {})
        counter["tokens shortened"] = str([verdicts[level].tokens for level in sorted(levels)])
        for level in sorted(set(verdicts) - levels):
            v = verdicts[level]
            why = f"fewer than {self.min_tokens} tokens"
            if self.min_tokens == "measured":
                why = f"{1e3 * v.short_seconds:.2f} ms shortened, {1e3 * v.dense_seconds:.2f} ms dense"
            self.run.note(f"{self.name}: self-attentions on {v.tokens} tokens are left alone ({why}).")


class TransformerPatch:
    """Shows a spatial transformer's input to the shortener of its level."""

    def __init__(self, sites: TokenSites, site: AttentionSite, original: Callable[..., Any]) -> None:
        self.sites, self.level, self.original = sites, site.level, original

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The transformer's own forward."""
        if self.level in self.sites.active_levels:
            self.sites.shorteners[self.level].prepare(hidden_states, self.sites.branches)
        return self.original(hidden_states, *args, **kwargs)


class AttentionPatch:
    """One self-attention. All instances share one forward function, so compiled blocks share their graphs."""

    def __init__(self, sites: TokenSites, level: int, original: Callable[..., Any]) -> None:
        self.sites, self.level, self.original = sites, level, original

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Self-attention, shortened if the plan says so."""
        if encoder_hidden_states is not None or self.level not in self.sites.active_levels:
            return self.original(hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
        return self.sites.shorteners[self.level].attend(self.original, hidden_states, kwargs)


def grid(latent: Any, level: int) -> tuple[int, int]:
    """Token grid (h, w) after `level` stride-2 convolutions: each halves a side, rounding up."""
    height, width = latent
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _random_inputs(attention: nn.Module, call: Call, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    channels = int(attention.query_dim)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(call.rows, channels, height, width, generator=generator).to(call.sample)
    return features, features.flatten(2).transpose(1, 2).contiguous()


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of `function` after one warm-up call."""
    function()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        accelerator: Any = torch.get_device_module(device)
        accelerator.synchronize()

"""Shared parts of the token methods: attention sites of one run, planning by measurement, the current grid.

A plan is made before the network runs, once per latent shape: which self-attentions are shortened. `min_tokens` decides
by size; "measured" times the dense and the shortened form of each level once per (shape, dtype, device) and leaves alone
what loses. Spatial transformers tell their group the grid and the features before their attentions run, so nothing
is decided inside compiled blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import nn

from diffaccel.engine.flops import count_flops
from diffaccel.engine.run import Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.models.call import Call
from diffaccel.models.model_map import ModelMap
from diffaccel.models.unet import AttentionSite

T = TypeVar("T")
MinTokens = Literal["measured"] | Annotated[int, Field(ge=1)]


class Shortener(Protocol):
    """What a token method does to one self-attention. One instance per token grid and run."""

    def prepare(self, features: torch.Tensor, branches: int) -> None:
        """See a spatial transformer's input (rows, channels, h, w) before its attentions run."""

    def attend(self, original: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Self-attention on (rows, tokens, channels), same shape out."""


@dataclass
class Verdict:
    """What was measured for one level: seconds of one self-attention, FLOPs saved in all of them together.

    Attributes:
        preparing_flops: of what all of them share, on evaluations where that is made anew.
    """

    tokens: int
    channels: int
    dense_seconds: float
    short_seconds: float
    saved_flops: int
    preparing_flops: int = 0

    @property
    def pays(self) -> bool:
        """Whether the shortened form is faster, its share of the preparation included."""
        return self.short_seconds < self.dense_seconds


@dataclass(frozen=True)
class Plan:
    """What is shortened in calls of one shape, and what that saves."""

    active: frozenset[Any]
    saved: int
    preparing: int

    @classmethod
    def of(cls, active: frozenset[Any], verdicts: Sequence[Verdict]) -> Plan:
        """From the verdicts on what is active."""
        return cls(active, sum(v.saved_flops for v in verdicts), sum(v.preparing_flops for v in verdicts))

    def saved_flops(self, *, fresh: bool) -> int:
        """FLOPs that a complete call saves; `fresh` ones prepare first."""
        return self.saved - self.preparing * fresh


@dataclass
class Kept(Generic[T]):
    """What is prepared for one evaluation and kept over `reuse` of them; a call for other pictures gets its own.

    The second guidance branch of an evaluation, where it is a call of its own, meets what the first one made: what
    differed between them would be multiplied by the guidance scale.
    """

    key: Any = None
    evaluation: int = 0
    value: T | None = None

    def get(self, call: Call, run: Run, settings: tuple[int, Any], make: Callable[[], T]) -> tuple[bool, T]:
        """(whether it is new, the prepared thing) for this call; `settings`: evaluations to keep it, what it is for."""
        whole = run.images is not None and call.rows == run.images * len(call.branches)
        if not whole or not run.same_place(call):  # some of the pictures only, or another part of them
            return True, make()
        key, now = (
            (call.lane[0], run.tile(call), tuple(call.sample.shape[1:]), run.images, settings),
            run.clock.evaluation,
        )
        if self.value is None or key != self.key or now - self.evaluation >= settings[0]:
            self.key, self.evaluation, self.value = key, now, make()
            return True, self.value
        return False, self.value


@dataclass
class TokenSites:
    """The token method's view of one run: patches every spatial transformer and self-attention, active or not.

    Attributes:
        reuse: evaluations that share what a shortener prepared.
    """

    name: str
    model: ModelMap
    run: Run
    make: Callable[[], Shortener]
    settings: Any
    min_tokens: MinTokens
    reuse: int = 1
    active_levels: frozenset[int] = frozenset()
    branches: int = 1
    shorteners: dict[int, Shortener] = field(default_factory=dict)
    _planned: dict[Any, Plan] = field(default_factory=dict)
    _kept: Kept[dict[int, Shortener]] = field(default_factory=lambda: Kept())

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
        plan = self.plan(call)
        self.active_levels = plan.active
        self.branches = max(len(call.branches), 1)
        fresh, self.shorteners = self._kept.get(
            call, self.run, (self.reuse, plan.active), lambda: {level: self.make() for level in self.active_levels}
        )
        self.run.count(self.name, **{"shortened evaluations": int(bool(self.active_levels))})
        tags = (self.name, self.settings, self.active_levels, fresh)
        try:
            return proceed(call.tagged(tags, saved_flops=plan.saved_flops(fresh=fresh)))
        finally:
            self.active_levels = frozenset()

    def plan(self, call: Call) -> Plan:
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
            self._planned[key] = Plan.of(levels, [verdicts[level] for level in levels])
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
        device = measuring_device(self.name, attentions[0], call, timed=self.min_tokens == "measured")
        features, hidden = _random_inputs(attentions[0], call, (height, width), device)
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
            saved = (count_flops(dense)[1] - count_flops(short)[1]) * len(attentions)
            times = (0.0, 0.0)
            if self.min_tokens == "measured":  # one preparation serves all attentions on this grid
                share = median_seconds(prepared, hidden.device) / (len(attentions) * self.reuse)
                times = median_seconds(short, hidden.device) + share, median_seconds(dense, hidden.device)
            return Verdict(height * width, hidden.shape[-1], times[1], times[0], saved, preparing)

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


def measuring_device(name: str, attention: nn.Module, call: Call, *, timed: bool) -> torch.device:
    """Where an attention can be tried before the network runs: with its weights, which offloading keeps elsewhere.

    Weights on the meta device are brought by hooks of the attention itself (sequential offloading).

    Raises:
        Unsupported: it shall be timed, and its weights are not where the network will run.
    """
    weights = next((p.device for p in attention.parameters()), call.sample.device)
    if weights.type == "meta" or weights == call.sample.device:
        return call.sample.device
    if timed:
        raise Unsupported(
            f'{name}: min_tokens="measured" cannot time this network, because offloading keeps its weights on '
            f"{weights.type} until it runs; give min_tokens a number, for example 1024."
        )
    return weights


def _random_inputs(
    attention: nn.Module, call: Call, size: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    channels = int(attention.query_dim)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(call.rows, channels, *size, generator=generator).to(device, call.sample.dtype)
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
        torch.accelerator.synchronize(device)  # this one, which need not be the current one

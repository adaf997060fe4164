"""Token merging inside a diffusion transformer: the attentions of one run, their plan, and the shortened attention.

Only image tokens are merged. They are merged where they enter an attention and copied back where they leave it, so every
block sees the full picture and text tokens never change. Rotary tables follow the token that a row stems from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from diffaccel.engine.flops import count_flops
from diffaccel.engine.run import Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.kernels.attention_body import attention_body
from diffaccel.methods.tokens.sites import Kept, MinTokens, Plan, Verdict, measuring_device, median_seconds
from diffaccel.methods.tokens.token_maps import SlotMap
from diffaccel.models.call import Call
from diffaccel.models.merging import MergeFacts, MergeSite

Match = Callable[[torch.Tensor, int, int], SlotMap]  # (images, tokens, channels), height, width


class MergingSettings(Protocol):
    """What the attentions of a transformer must know of `TokenMerging`."""

    name: ClassVar[str]

    @property
    def reuse(self) -> int: ...
    @property
    def proportional(self) -> bool: ...
    @property
    def dense_blocks(self) -> tuple[int, int]: ...
    @property
    def min_tokens(self) -> MinTokens: ...
    @property
    def plan_settings(self) -> tuple[Any, ...]: ...


@dataclass
class MergedTokens:
    """The slot map of one evaluation, made from the tokens of the first attention that is shortened."""

    match: Match
    height: int
    width: int
    branches: int
    slots: SlotMap | None = None
    _tables: tuple[Any, list[Any]] | None = None

    @property
    def tokens(self) -> int:
        """Image tokens of a row."""
        return self.height * self.width

    def map_of(self, image: torch.Tensor) -> SlotMap:
        """The map, matched on the sum of the guidance branches: (rows, tokens, channels), rows branch by branch."""
        if self.slots is None:
            metric = torch.stack(image.chunk(self.branches)).sum(0)
            self.slots = self.match(metric, self.height, self.width)
        return self.slots

    def rotary(self, table: Any, text: int) -> list[Any]:
        """One table (text tokens, kept image tokens) per image; the blocks of an evaluation share them."""
        assert self.slots is not None
        if self._tables is None or self._tables[0] is not table:
            rows = [
                torch.cat([torch.arange(text, device=owner.device), owner + text])
                for owner in self.slots.owner.unbind()
            ]
            self._tables = table, [tuple(part.index_select(0, r.to(part.device)) for part in table) for r in rows]
        return self._tables[1]


@dataclass
class BlockSites:
    """Patches every image attention of a transformer; whether they act is decided by the plan of the current call."""

    config: MergingSettings
    facts: MergeFacts
    run: Run
    match: Match
    active: frozenset[str] = frozenset()
    merged: MergedTokens | None = None
    _planned: dict[Any, tuple[Plan, tuple[int, int]]] = field(default_factory=dict)
    _kept: Kept[MergedTokens] = field(default_factory=lambda: Kept())

    def attach(self, seams: Seams) -> None:
        """Patch all sites that may be shortened."""
        for site in self.sites:
            seams.replace_forward(site.attention, lambda f, s=site: BlockPatch(self, s, f).forward)  # type: ignore[misc]

    @property
    def sites(self) -> list[MergeSite]:
        """Sites between the dense blocks."""
        first, last = self.config.dense_blocks
        return [site for site in self.facts.sites if first <= site.block < self.facts.blocks - last]

    def around(self, call: Call, proceed: Proceed, *, enabled: bool) -> Any:
        """Run one denoiser call with the plan for its shape, or dense if not `enabled`."""
        if not enabled:
            return proceed(call)
        plan, (height, width) = self.plan(call)
        branches = max(len(call.branches), 1)
        fresh, self.merged = self._kept.get(
            call, self.run, (self.config.reuse, plan.active), lambda: MergedTokens(self.match, height, width, branches)
        )
        self.merged.branches, self.active = branches, plan.active
        self.run.count(self.config.name, **{"shortened evaluations": int(bool(plan.active))})
        tags = (self.config.name, self.config.plan_settings, plan.active, fresh)
        try:
            return proceed(call.tagged(tags, saved_flops=plan.saved_flops(fresh=fresh)))
        finally:
            self.active = frozenset()
            self.merged._tables = None

    def plan(self, call: Call) -> tuple[Plan, tuple[int, int]]:
        """Kinds of sites to shorten for calls of this shape, and the token grid."""
        key = (tuple(call.sample.shape), call.sample.dtype, len(call.branches), call.lane[0])
        if key not in self._planned:
            size = self.facts.grid(call)
            kinds = list(dict.fromkeys(site.kind for site in self.sites))
            verdicts = {kind: self._verdict(kind, call, size) for kind in kinds}
            active = frozenset(kind for kind, verdict in verdicts.items() if self._wanted(verdict))
            self._describe(verdicts, active, size)
            saved = sum(verdicts[kind].saved_flops for kind in active)
            preparing = max((verdicts[kind].preparing_flops for kind in active), default=0)
            self._planned[key] = Plan(active, saved, preparing), size
        return self._planned[key]

    def _wanted(self, verdict: Verdict) -> bool:
        return verdict.pays if self.config.min_tokens == "measured" else verdict.tokens >= self.config.min_tokens

    def _verdict(self, kind: str, call: Call, size: tuple[int, int]) -> Verdict:
        text = _text_length(call)
        key = (
            self.config.name,
            self.config.plan_settings,
            self.config.min_tokens,
            kind,
            tuple(call.sample.shape),
            call.sample.dtype,
            text,
        )
        known = self.run.measured
        if key not in known:
            known[key] = self._measure(kind, call, size, text)
        verdict: Verdict = known[key]
        return verdict

    def _measure(self, kind: str, call: Call, size: tuple[int, int], text: int) -> Verdict:
        sites = [site for site in self.sites if site.kind == kind]
        site, branches = sites[0], max(len(call.branches), 1)
        timed = self.config.min_tokens == "measured"
        device = measuring_device(self.config.name, site.attention, call, timed=timed)
        arguments = _random_arguments(site, self.facts, call, (*size, text), device)
        hidden = arguments["hidden_states"]
        image = hidden[:, text:] if site.joint else hidden

        def prepared() -> MergedTokens:
            merged = MergedTokens(self.match, *size, branches)
            merged.map_of(image)
            return merged

        def dense() -> Any:
            return site.attention(**arguments)

        def short() -> Any:
            return self.attend(site, merged, site.attention.forward, arguments)

        with torch.no_grad():
            merged, preparing = count_flops(prepared)
            saved = (count_flops(dense)[1] - count_flops(short)[1]) * len(sites)
            times = (0.0, 0.0)
            if timed:  # one preparation serves all attentions of `reuse` evaluations
                share = median_seconds(prepared, hidden.device) / (len(self.sites) * self.config.reuse)
                times = median_seconds(short, hidden.device) + share, median_seconds(dense, hidden.device)
            return Verdict(size[0] * size[1], hidden.shape[-1], times[1], times[0], saved, preparing)

    def _describe(self, verdicts: dict[str, Verdict], active: frozenset[str], size: tuple[int, int]) -> None:
        counter = self.run.counters.setdefault(self.config.name, {})
        counter["tokens shortened"] = str([size[0] * size[1]] if active else [])
        counter["attentions shortened"] = sum(site.kind in active for site in self.sites)
        for kind in sorted(set(verdicts) - active):
            verdict = verdicts[kind]
            why = f"fewer than {self.config.min_tokens} tokens"
            if self.config.min_tokens == "measured":
                why = f"{1e3 * verdict.short_seconds:.2f} ms shortened, {1e3 * verdict.dense_seconds:.2f} ms dense"
            self.run.note(f"{self.config.name}: {kind} on {verdict.tokens} tokens is left alone ({why}).")

    def attend(
        self, site: MergeSite, merged: MergedTokens, original: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        """One attention on the merged image tokens, with what it returns copied back to all positions."""
        if arguments.get("attention_mask") is not None:
            raise Unsupported(
                f"{self.config.name}: this call masks image tokens one by one, and merged tokens have no mask."
            )
        hidden = arguments["hidden_states"]
        text = hidden.shape[1] - merged.tokens if site.joint else 0
        slots = merged.map_of(hidden[:, text:])
        short = slots.merge(hidden[:, text:])
        arguments = {**arguments, "hidden_states": torch.cat([hidden[:, :text], short], 1) if site.joint else short}
        if self.config.proportional and self.facts.bias == "none":
            original = functools.partial(biased_joint_attention, site.attention)
        try:
            output = self._call(merged, slots, original, arguments, text)
        except (ValueError, NotImplementedError) as error:
            if not self.config.proportional or "attn_mask" not in str(error):
                raise
            raise Unsupported(
                f"{self.config.name}: proportional needs an attention that takes masks, and the backend set on this "
                f"transformer does not ({error}); set another one or proportional=False."
            ) from error
        image = output[0] if isinstance(output, tuple) else output
        full = slots.unmerge(image[:, text:])
        full = torch.cat([image[:, :text], full], dim=1) if site.joint else full
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _call(
        self, merged: MergedTokens, slots: SlotMap, original: Callable[..., Any], arguments: dict[str, Any], text: int
    ) -> Any:
        """The attention itself; with rotary tables, image by image, because each keeps other tokens."""
        beside = arguments.get("encoder_hidden_states")
        ahead = text if beside is None else beside.shape[1]
        if self.config.proportional:
            bias = slots.log_size(ahead, first=self.facts.rotary is not None)
            arguments = arguments | {"attention_mask": self._bias(bias, arguments["hidden_states"])}
        name = self.facts.rotary
        if name is None:
            return original(**arguments)
        tables = merged.rotary(arguments[name], ahead)
        if len(tables) == 1:
            return original(**{**arguments, name: tables[0]})
        rows = len(arguments["hidden_states"])
        parts = [
            original(**{**{k: _every(v, rows, i, len(tables)) for k, v in arguments.items()}, name: table})
            for i, table in enumerate(tables)
        ]
        return _interleaved(parts)

    def _bias(self, log_size: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """For all rows, in the shape that the attention takes; fp32 on CPUs, elsewhere kernels want the dtype of queries."""
        rows = log_size.repeat(hidden.shape[0] // log_size.shape[0], 1)
        if self.facts.bias == "none":
            return rows
        rows = rows if hidden.device.type == "cpu" else rows.to(hidden.dtype)
        return rows[:, None] if self.facts.bias == "rows" else rows[:, None, None]


class BlockPatch:
    """One attention."""

    def __init__(self, sites: BlockSites, site: MergeSite, original: Callable[..., Any]) -> None:
        self.sites, self.site, self.original = sites, site, original

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The attention, shortened if the plan says so."""
        sites, given = self.sites, {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if self.site.kind not in sites.active:
            return self.original(hidden_states, **kwargs)
        assert sites.merged is not None
        return sites.attend(self.site, sites.merged, self.original, {"hidden_states": hidden_states, **kwargs})


def biased_joint_attention(
    attention: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
) -> Any:
    """SD3's attention over image and text tokens with a number added to each key's scores, which stock does not take.

    Args:
        attention_mask: (rows, keys) fp32, image tokens first.
    """
    if type(attention.processor).__name__ != "JointAttnProcessor2_0":
        raise Unsupported("token_merging: proportional attention needs the stock attention processors on this model.")

    def heads(x: torch.Tensor, norm: Any) -> torch.Tensor:
        x = x.view(*x.shape[:2], attention.heads, -1).transpose(1, 2)
        return x if norm is None else norm(x)

    image = [
        heads(attention.to_q(hidden_states), attention.norm_q),
        heads(attention.to_k(hidden_states), attention.norm_k),
    ]
    image.append(heads(attention.to_v(hidden_states), None))
    if encoder_hidden_states is not None:
        text = [
            heads(attention.add_q_proj(encoder_hidden_states), attention.norm_added_q),
            heads(attention.add_k_proj(encoder_hidden_states), attention.norm_added_k),
            heads(attention.add_v_proj(encoder_hidden_states), None),
        ]
        image = [torch.cat(pair, dim=2) for pair in zip(image, text, strict=True)]
    mixed = attention_body(*image, bias=attention_mask).transpose(1, 2).flatten(2)
    output = attention.to_out[1](attention.to_out[0](mixed[:, : hidden_states.shape[1]]))
    if encoder_hidden_states is None:
        return output
    rest = mixed[:, hidden_states.shape[1] :]
    return output, rest if attention.context_pre_only else attention.to_add_out(rest)


def _every(value: Any, rows: int, start: int, step: int) -> Any:
    """Rows start, start + step, ... of a tensor with `rows` rows; anything else as it is."""
    return value[start::step] if isinstance(value, torch.Tensor) and value.shape[0] == rows else value


def _interleaved(parts: list[Any]) -> Any:
    """The inverse of `_every` for tensors or tuples of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(_interleaved(list(column)) for column in zip(*parts, strict=True))
    return torch.stack(parts, dim=1).flatten(0, 1)


def _text_length(call: Call) -> int:
    return int(call.arguments["encoder_hidden_states"].shape[1])


def _random_arguments(
    site: MergeSite, facts: MergeFacts, call: Call, size: tuple[int, int, int], device: torch.device
) -> dict[str, Any]:
    """Arguments of one attention in this call's shapes (height, width and text tokens), for timing."""
    generator, tokens, attention = torch.Generator().manual_seed(0), size[0] * size[1], site.attention
    text = size[2]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, call.sample.dtype)

    arguments: dict[str, Any] = {
        "hidden_states": noise(call.rows, tokens + text * site.joint, int(attention.query_dim))
    }
    if getattr(attention, "added_kv_proj_dim", None):
        arguments["encoder_hidden_states"] = noise(call.rows, text, int(attention.added_kv_proj_dim))
    if facts.rotary is not None:
        table = torch.ones(text + tokens, int(attention.head_dim), device=device)
        arguments[facts.rotary] = (table, torch.zeros_like(table))
    return arguments

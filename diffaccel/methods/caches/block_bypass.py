"""Bypassing consecutive main blocks of a diffusion transformer: its own forward runs, bypassed blocks return at once.

A bypassed block returns its inputs, so shapes, and whatever the forward does between blocks (ControlNet residuals, text
and image joined to one sequence), stay as they are. What the part stands for enters at its end:
- `bypass_part`: the last block of the part returns h + (stored outcome - stored input), with h the fresh input of the part;
- `bypass_to_norm`: the first module after all blocks reads the stored tensor instead of its input.
Residuals that the forward adds inside the part are cached with it; those it adds behind it stay fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.caches.bypass import Feature
from diffaccel.models.transformers import TransformerLayout

Forward = Callable[..., Any]
Streams = dict[str, torch.Tensor]


class _Switch:
    """The network call that is running: which lane, whether cached, where in noise."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.cached = False
        self.lane: Hashable = None
        self.position: float | None = None
        self.fresh = True

    @contextmanager
    def active(
        self, lane: Hashable, *, cached: bool, position: float | None = None, fresh: bool = True
    ) -> Iterator[None]:
        """For one network call: bypass (`cached`) or run and store. `fresh` forgets what was stored before."""
        self.lane, self.cached, self.position, self.fresh = lane, cached, position, fresh
        try:
            yield
        finally:
            self.lane, self.cached = None, False

    def step_over(self, outputs: tuple[str, ...], original: Forward, args: Any, kwargs: Any) -> Any:
        """A bypassed block: its inputs are its outputs."""
        return pack(outputs, read_streams(outputs, args, kwargs)) if self.cached else original(*args, **kwargs)


class FeatureStore(_Switch):
    """Per lane the image tokens behind the last block."""

    def __init__(self, order: int) -> None:
        super().__init__(order)
        self.features: dict[Hashable, Feature] = {}

    def holds(self, lane: Hashable) -> bool:
        """Whether a feature is stored for this lane."""
        return lane in self.features

    def keep_rows(self, lane: Hashable, start: int, stop: int) -> None:
        """Cut what is stored for a lane to some of its batch rows."""
        if lane in self.features:
            self.features[lane].keep_rows(start, stop)

    def read(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """The first module behind the blocks: its first input is what is stored."""
        if self.lane is None:
            return original(*args, **kwargs)
        tokens, *others = args
        if self.cached:
            return original(self.features[self.lane].at(self.position), *others, **kwargs)
        feature = self.features.setdefault(self.lane, Feature(self.order))
        feature.store(tokens, self.position, keep_previous=not self.fresh)
        return original(*args, **kwargs)


class ResidualStore(_Switch):
    """Per lane and stream what entered the part and what came out.

    Both are kept instead of their difference: outcome + (h - input) is the outcome bit for bit where h has not changed,
    which input + difference is not in floating point.
    """

    def __init__(self, order: int) -> None:
        super().__init__(order)
        self.pairs: dict[Hashable, dict[str, tuple[Feature, Feature]]] = {}
        self.entry: Streams = {}

    @contextmanager
    def active(
        self, lane: Hashable, *, cached: bool, position: float | None = None, fresh: bool = True
    ) -> Iterator[None]:
        """As above; what enters the part is known for the time of one call."""
        with super().active(lane, cached=cached, position=position, fresh=fresh):
            try:
                yield
            finally:
                self.entry = {}

    def holds(self, lane: Hashable) -> bool:
        """Whether the part's outcome is stored for this lane."""
        return lane in self.pairs

    def keep_rows(self, lane: Hashable, start: int, stop: int) -> None:
        """Cut what is stored for a lane to some of its batch rows."""
        for pair in self.pairs.get(lane, {}).values():
            for feature in pair:
                feature.keep_rows(start, stop)

    def step_over(self, outputs: tuple[str, ...], original: Forward, args: Any, kwargs: Any) -> Any:
        """A block inside the part; the first one that runs sees what enters."""
        if not self.entry and self.lane is not None:
            self._enter(read_streams(outputs, args, kwargs))
        return super().step_over(outputs, original, args, kwargs)

    def _enter(self, streams: Streams) -> None:
        # a copy, as blocks may write to their inputs in place
        self.entry = streams if self.cached else {name: value.detach().clone() for name, value in streams.items()}

    def leave(self, outputs: tuple[str, ...], kept: tuple[str, ...], original: Forward, args: Any, kwargs: Any) -> Any:
        """The last block of the part; `kept` are its outputs that somebody reads."""
        if self.lane is None:
            return original(*args, **kwargs)
        streams = read_streams(outputs, args, kwargs)
        if not self.entry:  # it is the only block
            self._enter(streams)
        entry = convert(self.entry, outputs)
        if self.cached:
            return pack(outputs, streams | {name: self._outcome(name, entry[name]) for name in kept})
        result = original(*args, **kwargs)
        for name, value in zip(outputs, result if len(outputs) > 1 else (result,), strict=True):
            if name in kept:
                self._store(name, entry[name], value)
        return result

    def _store(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        pairs = self.pairs.setdefault(self.lane, {})
        pair = pairs.setdefault(name, (Feature(self.order), Feature(self.order)))
        for feature, value in zip(pair, (before, after), strict=True):
            feature.store(value, self.position, keep_previous=not self.fresh)

    def _outcome(self, name: str, fresh: torch.Tensor) -> torch.Tensor:
        before, after = self.pairs[self.lane][name]
        outcome = after.wide_at(self.position) + (fresh - before.wide_at(self.position))
        return outcome.to(after.stored[0][0].dtype)


def read_streams(outputs: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
    """The inputs of a block by stream: diffusers' blocks take the image (or the joint sequence) first, then the text."""
    first = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if len(outputs) == 1:
        return {outputs[0]: first}
    second = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    return {"image": first, "text": second}


def pack(outputs: tuple[str, ...], streams: Streams) -> Any:
    """Streams as a block returns them."""
    return streams[outputs[0]] if len(outputs) == 1 else tuple(streams[name] for name in outputs)


def convert(streams: Streams, outputs: tuple[str, ...]) -> Streams:
    """What entered the part, in the form in which it leaves: two streams joined are text tokens, then image tokens."""
    if outputs == ("joint",) and "joint" not in streams:
        return {"joint": torch.cat([streams["text"], streams["image"]], dim=1)}
    return streams


def bypass_to_norm(layout: TransformerLayout, store: FeatureStore, seams: Seams) -> None:
    """Bypass all main blocks; what reads their result reads the stored tensor."""
    for stack in layout.stacks:
        for block in stack.blocks:
            _step_over(block, stack.outputs, store, seams)
    for module in _readers(layout):
        seams.replace_call(module, lambda original: lambda *a, **k: store.read(original, a, k))


def bypass_part(layout: TransformerLayout, first: int, last: int, store: ResidualStore, seams: Seams) -> None:
    """Bypass the main blocks number `first` to `last`, both included, counted over all stacks."""
    listed = [(block, stack.outputs) for stack in layout.stacks for block in stack.blocks]
    for block, outputs in listed[first:last]:
        _step_over(block, outputs, store, seams)
    block, outputs = listed[last]
    # behind the last main block only the image is read
    kept = ("image",) if last == len(listed) - 1 and "image" in outputs else outputs
    seams.replace_call(block, lambda original: lambda *a, **k: store.leave(outputs, kept, original, a, k))


def check_part(name: str, layout: TransformerLayout, keep_first: int, keep_last: int) -> None:
    """Raise `Unsupported` if the blocks between the first and last ones cannot be bypassed as one part."""
    blocks = len(layout.blocks)
    if keep_first + keep_last >= blocks:
        raise Unsupported(
            f"{name}: keep_first {keep_first} and keep_last {keep_last} leave nothing to cache; this transformer has "
            f"{blocks} blocks."
        )
    for source, target in layout.long_skips:
        if source >= keep_first and target >= blocks - keep_last:
            raise Unsupported(
                f"{name}: block {target} reads a long skip of block {source}, which would not run; keep_last must not be "
                f"above keep_first on this transformer."
            )


def _step_over(block: nn.Module, outputs: tuple[str, ...], store: _Switch, seams: Seams) -> None:
    seams.replace_call(block, lambda original: lambda *a, **k: store.step_over(outputs, original, a, k))


def _readers(layout: TransformerLayout) -> list[nn.Module]:
    end = layout.head if layout.norm is None else layout.norm
    return list(end.values()) if isinstance(end, nn.ModuleDict) else [end]

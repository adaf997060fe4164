"""Bypassing what lies between the outer long skips of a transformer: its own forward runs, inner blocks return at once.

With `depth` k pairs kept, blocks 0..k-1 and L-k..L-1 run on every evaluation. The blocks between them are bypassed: each
returns the stored F, all streams that entered block L-k before its fuse. What the network's own code does with the
outputs of bypassed blocks is read by nobody, except that the last one hands F on. Skips of bypassed pairs are still pushed
and popped, so ControlNet residuals, one per skip and consumed from the end, meet the skips they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.bypass import Bypass, Feature
from diffaccel.models.transformers import ControlLayout, TransformerLayout

Forward = Callable[..., Any]


class BlockBypass(Bypass):
    """State shared by the bypassed blocks of one run: one feature per lane and stream."""

    def __init__(self, order: int = 0) -> None:
        super().__init__(order)
        self.streams: dict[Hashable, tuple[Feature, ...]] = {}

    def holds(self, lane: Hashable) -> bool:
        """Whether F is stored for this lane."""
        return lane in self.streams

    def keep_rows(self, lane: Hashable, start: int, stop: int) -> None:
        """Cut what is stored for a lane to some of its batch rows."""
        for feature in self.streams.get(lane, ()):
            feature.keep_rows(start, stop)

    def inner(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """A bypassed block whose output nothing reads; F has the shapes that the network's code expects."""
        if not self.cached:
            return original(*args, **kwargs)
        return _as_output(tuple(feature.stored[0][0] for feature in self.streams[self.lane]))

    def last(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """The block whose output is F."""
        if self.cached:
            return _as_output(tuple(feature.at(self.position) for feature in self.streams[self.lane]))
        output = original(*args, **kwargs)
        if self.lane is not None:
            values = output if isinstance(output, tuple) else (output,)
            features = self.streams.setdefault(self.lane, tuple(Feature(self.order) for _ in values))
            for feature, value in zip(features, values, strict=True):
                feature.store(value, self.position, keep_previous=not self.fresh)
        return output

    def through(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """A bypassed module whose output nothing reads and that keeps the shape of its first input."""
        if not self.cached:
            return original(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]


def usable_pairs(layout: TransformerLayout) -> int:
    """How many long skips, counted from the outside, can be kept with at least one block left to bypass."""
    blocks = len(layout.blocks)
    nested = [pair == (i, blocks - 1 - i) for i, pair in enumerate(layout.long_skips)]
    return min([*nested, False].index(False), (blocks - 1) // 2)


def bypass_blocks(layout: TransformerLayout, depth: int, bypass: BlockBypass, seams: Seams) -> None:
    """Bypass the blocks between the `depth` outermost long skips."""
    *inner, last = layout.blocks[depth : len(layout.blocks) - depth]
    for block in inner:
        seams.replace_call(block, lambda original: lambda *a, **k: bypass.inner(original, a, k))
    seams.replace_call(last, lambda original: lambda *a, **k: bypass.last(original, a, k))
    for fuse in layout.fuses[depth:]:
        _step_over(fuse, bypass, seams)


def bypass_control(layout: ControlLayout, depth: int, bypass: BlockBypass, seams: Seams) -> None:
    """Bypass everything in a transformer's ControlNet that the residuals of the `depth` outermost skips do not need."""
    for module in (*layout.blocks[depth:], *layout.outputs[depth:]):
        _step_over(module, bypass, seams)


def _step_over(module: nn.Module, bypass: BlockBypass, seams: Seams) -> None:
    seams.replace_call(module, lambda original: lambda *a, **k: bypass.through(original, a, k))


def _as_output(values: tuple[torch.Tensor, ...]) -> Any:
    """Streams as a block returns them: a block with one stream returns a tensor."""
    return values[0] if len(values) == 1 else values

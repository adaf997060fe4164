"""Bypassing the deep part of a UNet or ControlNet encoder: the networks' own forwards run, inner modules return at once.

On a full evaluation every bypassed module runs and the shapes of its outputs are noted. On a cached one it returns
blank tensors of those shapes, which nothing reads: the last bypassed module before decoder layer `depth` returns the
stored feature F instead. Blank tensors have the real shapes because ControlNet and T2I-Adapter residuals are still
added to them by the network's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffaccel.engine.seams import Seams
from diffaccel.models.unet import UNetLayout, layer_count, layer_modules


class Feature:
    """The stored tensor F of one lane, with up to `order` predecessors for extrapolation."""

    def __init__(self, order: int = 0) -> None:
        self.order = order
        self.stored: list[tuple[torch.Tensor, float | None]] = []  # newest first

    def store(self, value: torch.Tensor, position: float | None, *, keep_previous: bool) -> None:
        """Keep a copy: networks may write to the tensor in place later (FreeU, T2I-Adapter)."""
        if not keep_previous:
            self.stored.clear()
        # two-stage solvers evaluate twice at one noise level: the later value replaces the earlier one
        self.stored = [entry for entry in self.stored if entry[1] != position]
        self.stored = [(value.detach().clone(), position), *self.stored][: self.order + 1]

    def keep_rows(self, start: int, stop: int) -> None:
        """Cut all stored values to some of their batch rows."""
        self.stored = [(value[start:stop], position) for value, position in self.stored]

    def at(self, position: float | None) -> torch.Tensor:
        """F at `position` by Newton's polynomial through the stored values, always a new tensor of their type.

        Divided differences vanish exactly where the stored values are equal, so unchanged features come back bit for bit.
        """
        return self.wide_at(position).to(self.stored[0][0].dtype)

    def wide_at(self, position: float | None) -> torch.Tensor:
        """The same before it is rounded to half precision; at least fp32."""
        value = _widened(self.stored[0][0]).clone()
        if position is None or self.stored[0][1] is None:
            return value
        # a value from an infinite noise level has no place on the axis; the others still have
        known = [place for _, place in self.stored if place is not None]
        weight, differences = 1.0, [_widened(tensor) for tensor, place in self.stored if place is not None]
        for k in range(1, len(known)):
            differences = [
                (differences[i] - differences[i + 1]) / (known[i] - known[i + k]) for i in range(len(differences) - 1)
            ]
            weight *= position - known[k - 1]
            value += weight * differences[0]
        return value


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Bypass:
    """State shared by all bypassed modules of one run; a lane is one network call per evaluation."""

    def __init__(self, order: int = 0) -> None:
        self.order = order
        self.cached = False
        self.lane: Hashable = None
        self.position: float | None = None
        self.fresh = True
        self.features: dict[Hashable, Feature] = {}
        self.blanks: dict[tuple[Hashable, int], Any] = {}

    def holds(self, lane: Hashable) -> bool:
        """Whether a feature is stored for this lane."""
        return lane in self.features

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

    def keep_rows(self, lane: Hashable, start: int, stop: int) -> None:
        """Cut what is stored for a lane to some of its batch rows."""
        if lane in self.features:
            self.features[lane].keep_rows(start, stop)
        for key in [key for key in self.blanks if key[0] == lane]:
            self.blanks[key] = _zeros_like(_cut(self.blanks[key], start, stop))

    def blank(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Output of a bypassed module that nothing reads."""
        key = (self.lane, id(module))
        if self.cached:
            return self.blanks[key]
        output = original(*args, **kwargs)
        if key not in self.blanks or _shapes(self.blanks[key]) != _shapes(output):
            self.blanks[key] = _zeros_like(output)
        return output

    def feature(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Output of the module whose output is F."""
        if self.cached:
            stored = self.features[self.lane].at(self.position)
            return (stored,) if kwargs.get("return_dict") is False else stored
        output = original(*args, **kwargs)
        value = output[0] if isinstance(output, tuple) else output
        feature = self.features.setdefault(self.lane, Feature(self.order))
        feature.store(value, self.position, keep_previous=not self.fresh)
        return output


def bypass_unet(layout: UNetLayout, depth: int, bypass: Bypass, seams: Seams) -> None:
    """Bypass everything deeper than skip `depth` in a UNet."""
    _bypass_encoder(layout, depth, bypass, seams)
    site = layout.decoder[depth]
    whole = [] if layout.mid_block is None else [layout.mid_block]
    whole += list(layout.up_blocks[: site.block])
    inside = [m for p in range(site.position) for m in layer_modules(layout.up_blocks[site.block], p)]
    *blanks, source = whole + inside
    for module in blanks:
        _install_blank(module, bypass, seams)
    seams.replace_forward(source, lambda original: lambda *a, **k: bypass.feature(original, a, k))


def bypass_controlnet(net: Any, layout: UNetLayout, depth: int, bypass: Bypass, seams: Seams) -> None:
    """Bypass everything in a ControlNet that no residual up to `depth` needs."""
    _bypass_encoder(layout, depth, bypass, seams)
    if depth == layout.depths - 1:
        return  # at full depth the UNet still adds the fresh residual of the mid block
    deeper = [layout.mid_block, net.controlnet_mid_block, *net.controlnet_down_blocks[depth + 1 :]]
    for module in deeper:
        if module is not None:
            _install_blank(module, bypass, seams)


def _bypass_encoder(layout: UNetLayout, depth: int, bypass: Bypass, seams: Seams) -> None:
    site = layout.encoder[depth]
    if site.block >= 0:
        block = layout.down_blocks[site.block]
        for position in range(site.position + 1, layer_count(block)):
            for module in layer_modules(block, position):
                _install_blank(module, bypass, seams)
    for block in layout.down_blocks[site.block + 1 :]:
        _install_blank(block, bypass, seams)


def _install_blank(module: nn.Module, bypass: Bypass, seams: Seams) -> None:
    seams.replace_forward(module, lambda original: lambda *a, **k: bypass.blank(module, original, a, k))


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype, value.device)
    return tuple(_shapes(item) for item in value)


def _cut(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[start:stop]
    return tuple(_cut(item, start, stop) for item in value)


def _zeros_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return tuple(_zeros_like(item) for item in value)

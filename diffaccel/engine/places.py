"""Which part of the latents a network call sees: pipelines that work in tiles call the network once for each of them.

Calls of an evaluation are told apart by their order. What is stored for one of them is good for the next evaluation's only
if that sees the same part, which is not so where tiles move (DemoFusion). A part is found by its values in the latents that
the scheduler returned.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch

Origin = tuple[int, ...]


class Places:
    """The latents of a run, and where in them each stream of calls was last."""

    def __init__(self) -> None:
        self.latents: torch.Tensor | None = None  # (images, ...), of the current evaluation
        self._scaling: tuple[torch.Tensor, torch.Tensor] | None = None
        self._parts: dict[Hashable, torch.Tensor] = {}  # of the current evaluation
        self._origins: dict[Hashable, Origin | None] = {}

    def begin(self, latents: torch.Tensor) -> None:
        """The pipeline has latents."""
        self.latents, self._scaling = latents, None
        self._parts.clear()

    def scaled(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """The scheduler scaled the latents, or a part of them."""
        self._scaling = before, after

    def see(self, lane: Hashable, sample: torch.Tensor) -> None:
        """A network is called with `sample`, (rows, ...)."""
        before, after = self._scaling or (sample, sample)
        self._parts[lane] = before if before.shape == sample.shape and after is not before else sample

    def is_part(self, lane: Hashable) -> bool:
        """Whether this call sees less than the latents."""
        part, whole = self._parts.get(lane), self.latents
        if part is None or whole is None or part.dim() != whole.dim():
            return False
        return any(mine < all_ for mine, all_ in zip(part.shape[1:], whole.shape[1:], strict=True))

    def same(self, lane: Hashable) -> bool:
        """Whether this call sees what the last one of its lane saw."""
        return not self.is_part(lane) or self._is_at(lane, self._origins.get(lane))

    def met(self, lane: Hashable) -> bool:
        """Whether an earlier evaluation had this lane, with a part of the latents."""
        return lane in self._origins

    def finish(self, latents: torch.Tensor) -> None:
        """The scheduler steps: these are the latents that the calls of this evaluation saw."""
        self.latents = latents
        for lane in [lane for lane in self._parts if self.is_part(lane)]:
            if not self._is_at(lane, self._origins.get(lane)):
                self._origins[lane] = next((at for at in self._candidates(lane) if self._is_at(lane, at)), None)

    def _source(self, part: torch.Tensor) -> torch.Tensor:
        """What the part was cut from: the latents, or their scaled form."""
        assert self.latents is not None
        if self._scaling is None or self._scaling[0].shape[1:] != self.latents.shape[1:]:
            return self.latents
        return self._scaling[1][: len(self.latents)]

    def _candidates(self, lane: Hashable) -> Iterator[Origin]:
        """Where the first value of the part stands; in latents that is one place, but for those that are all alike."""
        part = self._parts[lane]
        found = (self._source(part)[0] == part[0].flatten()[0]).nonzero()
        yield from (tuple(int(index) for index in place) for place in found[:8])

    def _is_at(self, lane: Hashable, origin: Origin | None) -> bool:
        if origin is None:
            return False
        part = self._parts[lane]
        source = self._source(part)
        sides = zip(origin, part.shape[1:], strict=True)
        cut = source[(slice(None), *(slice(start, start + size) for start, size in sides))]
        if cut.shape[1:] != part.shape[1:] or len(part) % len(cut):
            return False
        return all(torch.equal(rows, cut) for rows in torch.split(part, len(cut)))


def stepped(result: Any) -> Any:
    """The latents in what `scheduler.step` returns."""
    return result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)

"""What a method is given to solve: columns in coordinates that suit a solve, and the projections that will read the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffaccel.edits.applied import base_weight
from diffaccel.edits.routes import Projection
from diffaccel.erasure.closed_forms import Columns, LowRank


@dataclass(frozen=True)
class Scale:
    """Coordinates in which an edit is solved: those that any text uses at all, each divided by `factor`."""

    used: Tensor  # (d,) mask
    factor: Tensor  # (used,)

    @classmethod
    def of(cls, columns: Columns, blocks: Sequence[tuple[int, int]]) -> Scale:
        every = torch.cat([columns.target, columns.anchor, columns.keep, columns.invariants], 1)
        power = every.square().mean(1)
        factor = torch.ones_like(power)
        for first, past in blocks:
            mean = power[first:past].mean()
            factor[first:past] = mean.sqrt() if mean > 0 else 1.0
        used = power > 0
        if not blocks:
            return cls(used, factor[used])
        mean = (power[used] / factor[used].square()).sum() / power[used].sum()
        return cls(used, factor[used] * mean.sqrt())  # the mean square of a row stays as it was

    def shrink(self, columns: Columns | None) -> Any:
        if columns is None:
            return None
        parts = ("target", "anchor", "keep", "invariants")
        return replace(columns, **{name: self.rows(getattr(columns, name)) for name in parts})

    def rows(self, columns: Tensor) -> Tensor:
        """Columns (d, n) in these coordinates (used, n)."""
        return columns[self.used] / self.factor[:, None]

    def gram(self, gram: Tensor) -> Tensor:
        """The same quadratic form in these coordinates."""
        return gram[self.used][:, self.used] * self.factor[:, None] * self.factor

    def grow(self, edit: LowRank, width: int) -> LowRank:
        """The map in the coordinates of the model."""
        left = torch.zeros(width, edit.left.shape[1], dtype=torch.float64)
        right = torch.zeros(edit.right.shape[0], width, dtype=torch.float64)
        left[self.used] = edit.left * self.factor[:, None]
        right[:, self.used] = edit.right / self.factor
        return LowRank(left, right)


@dataclass(frozen=True)
class Problem:
    """What a method solves: scaled columns, rows to attack (RECE), and the projections behind them."""

    pipe: Any
    columns: Columns
    attacked: Columns | None
    projections: tuple[Projection, ...]
    scale: Scale
    route: str
    concepts: tuple[str, ...]  # names by the number of the columns' owner

    def gram(self) -> Tensor:
        """S = sum of W^T W over the edited projections; (d, d)."""
        total = None
        for projection in self.projections:
            first, past = projection.reader.columns
            weight = base_of(self.pipe, projection)[:, first:past].double()
            product = weight.T @ weight
            total = product if total is None else total + product
        assert total is not None
        return self.scale.gram(total)


def base_of(pipe: Any, projection: Projection) -> Tensor:
    """A projection's weight (d_out, d_in) without any applied edit, on the CPU.

    Raises:
        Unsupported: see `base_weight`.
    """
    home, path = projection.name.split(".", 1)
    return base_weight(getattr(pipe, home), path)

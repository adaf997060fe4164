"""What a token that is not computed gets: its last evaluation, or a line through its last two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class _Kept:
    """The last two evaluations of every token.

    Attributes:
        newest, older: (rows, tokens, width), as they left the head of the transformer.
        now, before: (rows, tokens) fp32, where they were on the noise axis; NaN where that is unknown.
    """

    newest: torch.Tensor
    older: torch.Tensor
    now: torch.Tensor
    before: torch.Tensor


class History:
    """A lane's last two evaluations, token by token."""

    def __init__(self) -> None:
        self._stored: _Kept | None = None

    @property
    def _kept(self) -> _Kept:
        assert self._stored is not None, "a region step follows a dense one"
        return self._stored

    @property
    def tokens(self) -> int:
        """Image tokens of a row."""
        return int(self._kept.newest.shape[1])

    def store(self, output: torch.Tensor, place: float) -> None:
        """All tokens were computed. A second evaluation at the same place replaces the first.

        Args:
            output: (rows, tokens, width); copied.
            place: position on the noise axis.
        """
        now = torch.full(output.shape[:2], place, dtype=torch.float32, device=output.device)
        kept = self._stored
        if kept is None or kept.newest.shape != output.shape:
            self._stored = _Kept(output.clone(), output.clone(), now, torch.full_like(now, math.nan))
            return
        same = kept.now == now
        older = torch.where(same[..., None], kept.older, kept.newest)
        self._stored = _Kept(output.clone(), older, now, torch.where(same, kept.before, kept.now))

    def fill(self, output: torch.Tensor, flat: torch.Tensor, place: float, *, forecast: bool) -> torch.Tensor:
        """Some tokens were computed: the output of all, the others reused or extrapolated to `place`.

        Args:
            output: (rows, active, width).
            flat: (rows * active,), their numbers among all rows * tokens.
        """
        whole = self.forecast(place) if forecast else self._kept.newest.clone()
        whole.flatten(0, 1).index_copy_(0, flat, output.flatten(0, 1))
        self._update(output, flat, place)
        return whole

    def forecast(self, place: float) -> torch.Tensor:
        """Every token on the line through its last two evaluations; its last one where there is only one."""
        kept = self._kept
        weight = (place - kept.now) / (kept.now - kept.before)
        weight = torch.where(weight.isfinite(), weight, 0.0)[..., None]
        newest = kept.newest.float()
        return (newest + weight * (newest - kept.older.float())).to(kept.newest.dtype)

    def keep_rows(self, start: int, stop: int) -> None:
        """Cut to some batch rows."""
        kept = self._kept
        self._stored = _Kept(*(part[start:stop] for part in (kept.newest, kept.older, kept.now, kept.before)))

    def _update(self, output: torch.Tensor, flat: torch.Tensor, place: float) -> None:
        newest, older, now, before = (
            part.flatten(0, 1) for part in (self._kept.newest, self._kept.older, self._kept.now, self._kept.before)
        )
        same = now[flat] == place
        older.index_copy_(0, flat, torch.where(same[:, None], older[flat], newest[flat]))
        before.index_copy_(0, flat, torch.where(same, before[flat], now[flat]))
        newest.index_copy_(0, flat, output.flatten(0, 1))
        now.index_fill_(0, flat, place)

"""What tokens are ranked by in region sampling: a score of every token from the guided prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from diffaccel.methods.regions.select import length, split_cells, spread
from diffaccel.models.regions import RegionFacts

Metric = Literal["std", "norm", "change"]


class Scores:
    """The scores of one run, from one evaluation to the next; fp32, because half precision ties and underflows."""

    def __init__(self, metric: Metric, patch: int, facts: RegionFacts) -> None:
        self.metric, self.patch, self.facts = metric, patch, facts
        self.score: torch.Tensor | None = None  # (images, tokens of the picture)
        self.cells: torch.Tensor | None = None  # (images, tokens, channels, cells) of each token's last evaluation
        self.place: torch.Tensor | None = None  # (images, tokens), where that was on the noise axis

    def update(self, guided: torch.Tensor, computed: torch.Tensor, place: float | None) -> None:
        """Score a guided prediction.

        Args:
            guided: as the scheduler gets it, one row per image.
            computed: (images, tokens) bool, tokens that are not a forecast.
            place: position of the evaluation on the noise axis.
        """
        cells = split_cells(guided, self.patch, self.facts.cells)
        if self.metric == "change":
            self._update_change(cells.float(), computed[:, : cells.shape[1]], place)
        else:
            self.score = spread(cells) if self.metric == "std" else length(cells)

    def _update_change(self, cells: torch.Tensor, computed: torch.Tensor, place: float | None) -> None:
        now = torch.full(computed.shape, float("nan") if place is None else place, device=cells.device)
        if self.score is None or self.cells is None or self.place is None or self.cells.shape != cells.shape:
            self.score, self.cells, self.place = torch.zeros_like(now), cells, now
            return
        change = length(cells - self.cells) / (now - self.place).abs()
        self.score = torch.where(computed & change.isfinite(), change, self.score)
        self.cells = torch.where(computed[..., None, None], cells, self.cells)
        self.place = torch.where(computed, now, self.place)

    def of_all(self, tokens: int) -> torch.Tensor:
        """(images, tokens); tokens behind those of the picture (reference pictures) count as the calmest ones."""
        assert self.score is not None
        return torch.nn.functional.pad(self.score, (0, tokens - self.score.shape[1]))

    def grid(self, guided: torch.Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the picture in tokens."""
        if guided.dim() == 4:
            return guided.shape[2] // self.patch, guided.shape[3] // self.patch
        assert self.facts.grid is not None
        return self.facts.grid(arguments, guided.shape[1])

"""Where a run is: evaluations, solver steps and noise levels, from what the scheduler does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from diffaccel.engine.noise import edm_sigma
from diffaccel.errors import Unsupported


@dataclass
class Clock:
    """Where the run is. Counts `scheduler.step` calls; never looks a timestep up to find the step.

    Attributes:
        planned: how many timesteps the pipeline says it will visit; it may stop before the end of the scheduler's list.
        scheduler_time: whether networks get their timestep in the scheduler's units.
        lowest: timesteps below this one are in the scheduler's list and will not be visited.
        evaluation: scheduler.step calls finished so far.
        step: solver steps begun so far minus one; two-stage solvers (Heun, KDPM2) have two evaluations per step.
        total: evaluations this run will have; known from the first evaluation on.
        recorded_sigma: like `sigma`, for reports: NaN where that is not known.
    """

    scheduler: Any
    planned: Callable[[], int | None] = lambda: None
    scheduler_time: bool = True
    lowest: float = -math.inf
    evaluation: int = 0
    step: int = -1
    total: int = 0
    timestep: float | None = None
    recorded_sigma: float = float("nan")
    _step_sigma: float = float("nan")
    _unknown: Unsupported | None = None
    _entered: int = -1

    def restart(self) -> None:
        """A run of the scheduler begins."""
        self.evaluation, self.step, self.total, self._entered, self.timestep = 0, -1, 0, -1, None

    def starts_over(self, timestep: float | None) -> bool:
        """Whether a call at `timestep` is the first of another run through the same timesteps."""
        return 0 < self.total <= self.evaluation and edm_sigma(self.scheduler, *self._place(timestep)) > self.sigma

    def enter(self, timestep: float | None) -> bool:
        """A network is about to be called with `timestep`. Returns True at the first call of an evaluation."""
        if self._entered == self.evaluation:
            return False
        self._entered = self.evaluation
        timestep, index = self._place(timestep)
        self.total = self.total or self.evaluation + self._remaining(timestep)
        self._read_noise(timestep, index)
        if bool(getattr(self.scheduler, "state_in_first_order", True)) or self.step < 0:
            self.step += 1
            self._step_sigma = self.recorded_sigma
        return True

    def _read_noise(self, timestep: float, index: int | None) -> None:
        try:
            self.recorded_sigma, self._unknown = edm_sigma(self.scheduler, timestep, index), None
        except Unsupported as error:  # raised again for methods that ask; no method asks without a recipe
            self.recorded_sigma, self._unknown = float("nan"), error

    @property
    def sigma(self) -> float:
        """EDM sigma of the current evaluation.

        Raises:
            Unsupported: the scheduler keeps no noise levels that can be read.
        """
        if self._unknown is not None:
            raise self._unknown
        return self.recorded_sigma

    @property
    def step_sigma(self) -> float:
        """EDM sigma at the start of the current solver step; decisions that must not change inside a step use it.

        Raises:
            Unsupported: the scheduler keeps no noise levels that can be read.
        """
        if self._unknown is not None:
            raise self._unknown
        return self._step_sigma

    def advance(self) -> None:
        """`scheduler.step` has finished."""
        self.evaluation += 1
        self.timestep = None

    @property
    def fraction(self) -> float:
        """Share of the run's evaluations that are done, in [0, 1)."""
        return self.evaluation / self.total

    def _place(self, timestep: float | None) -> tuple[float, int | None]:
        """The scheduler's timestep of this evaluation and its index, whatever the network gets."""
        if self.timestep is not None:
            timestep = self.timestep
        elif not self.scheduler_time or timestep is None:
            timestep = self._listed_timestep()
        return timestep, self._index(timestep)

    def _listed_timestep(self) -> float:
        """The scheduler's timestep of this evaluation, for networks that get it in other units or not at all."""
        index = next((i for i in self._pointers() if i is not None), 0)
        if getattr(self.scheduler, "step_index", None) is None:  # it keeps no pointer, or has not started
            index += self.evaluation
        return float(self.scheduler.timesteps[index])

    def _pointers(self) -> Iterator[int | None]:
        for name in ("step_index", "begin_index"):  # step_index is None before the first step of some schedulers
            index = getattr(self.scheduler, name, None)
            yield None if index is None else int(index)

    def _index(self, timestep: float) -> int | None:
        index = next((i for i in self._pointers() if i is not None), None)
        return self._position(timestep) if index is None else index

    def _remaining(self, timestep: float) -> int:
        ahead = torch.as_tensor(self.scheduler.timesteps)[self._position(timestep) :]
        listed = int((ahead >= self.lowest).sum())
        planned = self.planned()
        return listed if planned is None else min(listed, planned)

    def _position(self, timestep: float) -> int:
        """First position of the run's first timestep: img2img pipelines start inside the list."""
        timesteps = torch.as_tensor(self.scheduler.timesteps)
        return int((timesteps - timestep).abs().argmin())

"""Guidance only where it helps: outside a noise interval the unconditional rows are not evaluated.

Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models" (arXiv 2404.07724). prediction = u + g(sigma) (c - u) with g(sigma) = g for low < sigma <= high, else 1; where
g(sigma) = 1 only the conditional rows run and are returned for both branches, so the pipeline's own formula yields c.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from diffaccel.engine.clock import Clock
from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.models.call import Call, map_output
from diffaccel.models.model_map import ModelMap


@register
class GuidanceInterval(Method):
    """Guide only while low < sigma <= high, or while start_fraction <= progress < stop_fraction.

    Attributes:
        high: upper bound in EDM sigma, inclusive; inf guides from the start.
        low: lower bound in EDM sigma, exclusive; 0 guides to the end.
        start_fraction, stop_fraction: the same as shares of the run's steps, in [0, 1]. Both conditions must hold.
    The decision is made once per solver step, from its first evaluation. Off: all defaults.

    Paper: Kynkaanniemi et al., arXiv 2404.07724.
    """

    name: ClassVar[str] = "guidance_interval"
    layer: ClassVar[Layer] = Layer.GUIDANCE
    inside: ClassVar[bool] = False

    high: float = Field(default=math.inf, gt=0)
    low: float = Field(default=0.0, ge=0)
    start_fraction: float = Field(default=0.0, ge=0, le=1)
    stop_fraction: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceInterval:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.start_fraction > self.stop_fraction:
            raise ValueError("start_fraction must not be above stop_fraction")
        return self

    @property
    def is_off(self) -> bool:
        return (self.high, self.low, self.start_fraction, self.stop_fraction) == (math.inf, 0.0, 0.0, 1.0)

    def contains(self, sigma: float, fraction: float) -> bool:
        """Whether a step that starts at EDM noise `sigma` after `fraction` of the run is guided."""
        return self.low < sigma <= self.high and self.start_fraction <= fraction < self.stop_fraction

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        gate = _Gate(self, run)
        run.before_evaluation(Layer.GUIDANCE, gate.decide)
        attach_dropping(run, self.name, gate.drops)


class _Gate:
    """The decision of the current solver step."""

    def __init__(self, interval: GuidanceInterval, run: Run) -> None:
        self.interval, self.run = interval, run
        self._step, self._guided = -1, True

    def decide(self) -> None:
        clock: Clock = self.run.clock
        if clock.step != self._step:
            self._step = clock.step
            self._guided = self.interval.contains(clock.step_sigma, clock.fraction)
        self.run.guided = self.run.guided and (self._guided or not self.run.has_guidance)

    def drops(self) -> bool:
        return not self._guided


def attach_dropping(run: Run, name: str, drops: Callable[[], bool]) -> None:
    """Drop the unconditional rows or calls of denoiser and ControlNets whenever `drops()` says so."""
    dropper = _Dropper(run, name, drops)
    run.before_evaluation(Layer.GUIDANCE, dropper.begin)
    if run.calls == "separate":
        run.around("denoiser", Layer.GUIDANCE, dropper.around_separate)
        return
    run.around("denoiser", Layer.GUIDANCE, dropper.around_stacked)
    run.around("controlnet", Layer.GUIDANCE, dropper.around_controlnet)


class _Dropper:
    """Answers for the unconditional branch with the conditional prediction, so that the pipeline's formula yields it."""

    def __init__(self, run: Run, name: str, drops: Callable[[], bool]) -> None:
        self.run, self.name, self.drops = run, name, drops
        self.conditional: Any = None
        self.has_guidance = True

    def begin(self) -> None:
        """Another evaluation: what the last one predicted is of no use any more."""
        if self.run.calls == "separate" and self.run.clock.evaluation == 1 and not self.has_guidance:
            self._note_unguided()
        self.conditional, self.has_guidance = None, False

    def around_stacked(self, call: Call, proceed: Proceed) -> Any:
        """One call with both branches along the rows."""
        if not is_doubled(call, self.run, self.name):
            if self._guided() and call.lane[1] == 0:  # else another guidance method has dropped the rows already
                self._note_unguided()
            return proceed(call)
        self._count()
        if not self.drops():
            return proceed(call)
        output = proceed(call.only("cond"))
        return map_output(output, lambda tensor: torch.cat([tensor] * len(call.branches)))

    def around_separate(self, call: Call, proceed: Proceed) -> Any:
        """One call per branch, conditional first."""
        if not call.branches:
            raise Unsupported(
                f"{self.name} cannot tell the guidance branches apart: the network got {call.rows} rows in call "
                f"{call.lane[1] + 1} of a step for {self.run.images or 'an unknown number of'} images."
            )
        if call.branches == ("cond",):
            output = proceed(call)
            self.conditional = output
            return output
        self.has_guidance = True
        self._count()
        if not self.drops():
            return proceed(call)
        self.run.skip("denoiser", call, self.name)
        return self.conditional

    def around_controlnet(self, call: Call, proceed: Proceed) -> Any:
        """ControlNets beside a stacked denoiser get the rows it gets."""
        drops = self.drops() and is_doubled(call, self.run, self.name)
        return proceed(call.only("cond") if drops else call)

    def _guided(self) -> bool:
        return self.run.guided and not self.run.all_latched

    def _count(self) -> None:
        guided = self._guided()  # what runs in the end, whichever method decides it
        self.run.count(self.name, guided=int(guided), unguided=int(not guided))

    def _note_unguided(self) -> None:
        self.run.note(f"{self.name}: this call runs without classifier-free guidance, there is nothing to drop.")


def is_doubled(call: Call, run: Run, name: str) -> bool:
    """Whether the call carries one row per branch and image.

    Raises:
        Unsupported: the rows are neither one nor two per image, or the number of images is unknown.
    """
    if not call.branches:
        raise Unsupported(
            f"{name} cannot tell the guidance branches apart: the network got {call.rows} rows for "
            f"{'an unknown number of' if run.images is None else run.images} images."
        )
    return len(call.branches) > 1

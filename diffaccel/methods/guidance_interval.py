"""Guidance only where it helps: outside a noise interval the unconditional rows are not evaluated.

Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models" (arXiv 2404.07724). prediction = u + g(sigma) (c - u) with g(sigma) = g for low < sigma <= high, else 1; where
g(sigma) = 1 only the conditional rows run and are returned for both branches, so the pipeline's own formula yields c.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from diffaccel.errors import Unsupported
from diffaccel.method import Method, register
from diffaccel.model_map import ModelMap
from diffaccel.run import Call, Clock, Layer, Proceed, Run, map_output
from diffaccel.seams import Seams


@register
class GuidanceInterval(Method):
    """Guide only while low < sigma <= high, or while start_fraction <= progress < stop_fraction.

    Attributes:
        high: upper bound in EDM sigma, inclusive; inf guides from the start.
        low: lower bound in EDM sigma, exclusive; 0 guides to the end.
        start_fraction, stop_fraction: the same as shares of the run's steps, in [0, 1]. Both conditions must hold.
    The decision is made once per solver step, from its first evaluation. Off: all defaults.
    """

    name: ClassVar[str] = "guidance_interval"
    layer: ClassVar[Layer] = Layer.GUIDANCE

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
        self.run.guided = self.run.guided and self._guided

    def drops(self) -> bool:
        return not self._guided


def attach_dropping(run: Run, name: str, drops: Any) -> None:
    """Drop the unconditional rows of denoiser and ControlNets whenever `drops()` says so."""

    def around_denoiser(call: Call, proceed: Proceed) -> Any:
        if not is_doubled(call, run, name):
            if run.guided and not run.all_latched:  # else another guidance method has dropped the rows already
                run.note(f"{name}: this call runs without classifier-free guidance, there is nothing to drop.")
            return proceed(call)
        guided = run.guided and not run.all_latched  # what runs in the end, whichever method decides it
        run.count(name, guided=int(guided), unguided=int(not guided))
        if not drops():
            return proceed(call)
        output = proceed(call.only("cond"))
        return map_output(output, lambda tensor: torch.cat([tensor] * len(call.branches)))

    def around_controlnet(call: Call, proceed: Proceed) -> Any:
        return proceed(call.only("cond") if drops() and is_doubled(call, run, name) else call)

    run.around("denoiser", Layer.GUIDANCE, around_denoiser)
    run.around("controlnet", Layer.GUIDANCE, around_controlnet)


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

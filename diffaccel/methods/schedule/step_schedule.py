"""Fewer steps as a method: the baseline that every cache has to beat, and a part of recipes in its own right.

Published timestep lists: "Align Your Steps" (Sabour et al., arXiv 2404.14507) as shipped by diffusers; other step counts
by log-linear interpolation of the noise levels, as its authors recommend.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from diffaccel.engine.method import Method, register
from diffaccel.engine.noise import vp_sigma
from diffaccel.engine.run import Layer, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.schedule.plain_count import PlainCount
from diffaccel.models.model_map import ModelMap


@register
class StepSchedule(Method):
    """Run with fewer steps, or with another spacing of the steps.

    Attributes:
        fraction: share of the requested steps to run, in (0, 1]; rounded to the nearest whole number, at least 1.
        steps: an absolute number of steps instead.
        spacing: "leading", "trailing" or "linspace" as in diffusers, or "ays" for the published list of this family.
    img2img and inpainting apply their strength to the reduced number, as they do to any number. Off: fraction 1.

    Paper of "ays": Sabour et al. (Align Your Steps), arXiv 2404.14507.
    """

    name: ClassVar[str] = "step_schedule"
    layer: ClassVar[Layer] = Layer.SCHEDULE
    inside: ClassVar[bool] = False

    fraction: float = Field(default=1.0, gt=0, le=1)
    steps: int | None = Field(default=None, ge=1)
    spacing: Literal["leading", "trailing", "linspace", "ays"] | None = None

    @model_validator(mode="after")
    def _one_count(self) -> StepSchedule:
        if self.steps is not None and self.fraction != 1.0:
            raise ValueError("give fraction or steps, not both")
        return self

    @property
    def is_off(self) -> bool:
        return self.fraction == 1.0 and self.steps is None and self.spacing is None

    def check(self, model: ModelMap) -> None:
        if self.spacing == "ays" and model.convention.schedule is None:
            raise Unsupported(f"step_schedule: no published timestep list is known for {type(model.pipe).__name__}.")

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        """Nothing to install: the work is done on the call's arguments."""

    def prepare_call(self, pipe: Any, arguments: dict[str, Any], run: Run, seams: Seams) -> dict[str, Any]:
        if arguments.get("timesteps") is not None or arguments.get("sigmas") is not None:
            raise Unsupported("step_schedule cannot be combined with timesteps or sigmas given in the call.")
        asked = _argument(pipe, arguments, "num_inference_steps")
        if not isinstance(asked, int):
            raise Unsupported(
                f"step_schedule: {type(pipe).__name__} does not say how many steps it takes by default; give "
                "num_inference_steps in the call."
            )
        count = self.steps or max(1, round(asked * self.fraction))
        PlainCount(pipe, run, asked, count, listed=self.spacing == "ays").attach(seams)
        if self.spacing is not None and self.spacing != "ays":
            replace_spacing(pipe.scheduler, self.spacing, seams)
        run.counters[self.name] = {"steps asked": asked, "steps run": count}
        if self.spacing == "ays":
            return arguments | {"timesteps": published_timesteps(pipe, count)}
        return arguments | {"num_inference_steps": count}


def _argument(pipe: Any, arguments: dict[str, Any], name: str) -> Any:
    """A call argument or its default; None if the pipeline has no such argument."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    return arguments.get(name, parameter.default if parameter else None)


def replace_spacing(scheduler: Any, spacing: str, seams: Seams) -> None:
    """Let the scheduler space its timesteps differently for one run.

    Raises:
        Unsupported: the scheduler has no such setting.
    """
    if "timestep_spacing" not in scheduler.config:
        raise Unsupported(f"step_schedule: {type(scheduler).__name__} has no timestep_spacing to change.")
    config = dict(scheduler.config) | {"timestep_spacing": spacing}
    seams.replace(scheduler, "_internal_dict", type(scheduler.config)(config))


def published_timesteps(pipe: Any, count: int) -> list[int]:
    """The published timestep list of the pipeline's family, interpolated to `count` steps.

    Raises:
        Unsupported: pipeline or scheduler do not accept a list of timesteps.
    """
    from diffusers.schedulers import AysSchedules  # noqa: PLC0415  (this import is slow)

    from diffaccel.pipelines.find import find_convention  # noqa: PLC0415

    for owner, function in ((pipe, type(pipe).__call__), (pipe.scheduler, pipe.scheduler.set_timesteps)):
        if "timesteps" not in inspect.signature(function).parameters:
            raise Unsupported(f"step_schedule: {type(owner).__name__} does not accept a list of timesteps.")
    key = find_convention(pipe).schedule
    if key is None:
        raise Unsupported(f"step_schedule: no published timestep list is known for {type(pipe).__name__}.")
    listed = list(AysSchedules[key])
    return listed if len(listed) == count else interpolate_timesteps(listed, count, pipe.scheduler.alphas_cumprod)


def interpolate_timesteps(listed: list[int], count: int, alphas_cumprod: torch.Tensor) -> list[int]:
    """`count` timesteps whose log noise levels lie evenly on the piecewise line through the listed ones."""
    logs = [math.log(vp_sigma(alphas_cumprod, t)) for t in listed]
    table = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt().log()
    chosen = []
    for k in range(count):
        position = k * (len(listed) - 1) / max(count - 1, 1)
        low = min(int(position), len(listed) - 2)
        wanted = logs[low] + (position - low) * (logs[low + 1] - logs[low])
        chosen.append(int((table - wanted).abs().argmin()))
    return chosen

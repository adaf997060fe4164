"""The ModelMap a method asks: where things are in this denoiser, and how this pipeline calls it.

Model facts live in `diffaccel/models`, calling conventions in `pipelines/`. Methods never test class names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.unet import UNetLayout, describe_controlnet, describe_unet
from diffaccel.pipelines.conventions import Convention, find_convention


@dataclass(frozen=True)
class ModelMap:
    """Everything a method may know about a pipeline.

    Attributes:
        pipe: the diffusers pipeline.
        convention: how the pipeline calls its networks (pipelines/).
        denoiser: the network that predicts, e.g. `pipe.unet`.
        layout: stages, skips and attention sites of the denoiser.
        controlnets: networks beside it, each with the layout of its encoder.
    """

    pipe: Any
    convention: Convention
    denoiser: nn.Module
    layout: UNetLayout
    controlnets: tuple[tuple[nn.Module, UNetLayout | None], ...]


def describe(pipe: Any) -> ModelMap:
    """Map a diffusers pipeline.

    Raises:
        Unsupported: the pipeline or its denoiser is not known, with the reason.
    """
    convention = find_convention(pipe)
    denoiser = getattr(pipe, convention.denoiser)
    if type(denoiser).__name__ == "OptimizedModule":
        raise Unsupported(
            f"pipe.{convention.denoiser} is compiled as a whole; compile its repeated blocks instead "
            f"(pipe.{convention.denoiser}.compile_repeated_blocks())."
        )
    nets = _controlnets(getattr(pipe, "controlnet", None))
    return ModelMap(
        pipe, convention, denoiser, describe_unet(denoiser), tuple((n, describe_controlnet(n)) for n in nets)
    )


def _controlnets(controlnet: Any) -> list[nn.Module]:
    if controlnet is None:
        return []
    return list(dict.fromkeys(getattr(controlnet, "nets", [controlnet])))  # one network may be listed twice

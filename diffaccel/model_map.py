"""The ModelMap a method asks: where things are in this denoiser, and how this pipeline calls it.

Model facts live in `diffaccel/models`, calling conventions in `pipelines/`. Methods never test class names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.transformers import TransformerLayout, describe_transformer
from diffaccel.models.unet import UNetLayout, describe_controlnet, describe_unet
from diffaccel.pipelines.conventions import Convention
from diffaccel.pipelines.find import find_convention

Layout = UNetLayout | TransformerLayout


@dataclass(frozen=True)
class ModelMap:
    """Everything a method may know about a pipeline.

    Attributes:
        pipe: the diffusers pipeline.
        convention: how the pipeline calls its networks (pipelines/).
        denoisers: the networks that predict, with their layouts; more than one if they take turns (Wan 2.2).
        controlnets: networks beside them, each with the layout of its encoder if that is known.
        group: the module that calls them one after the other, if there are several.
    """

    pipe: Any
    convention: Convention
    denoisers: tuple[tuple[nn.Module, Layout], ...]
    controlnets: tuple[tuple[nn.Module, UNetLayout | None], ...]
    group: nn.Module | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The first network that predicts, e.g. `pipe.unet`."""
        return self.denoisers[0][0]

    @property
    def layout(self) -> Layout:
        """Where things are in `denoiser`."""
        return self.denoisers[0][1]

    def unet(self, method: str) -> UNetLayout:
        """The layout, for methods that work on UNets only.

        Raises:
            Unsupported: the denoiser is a transformer.
        """
        if not isinstance(self.layout, UNetLayout):
            raise Unsupported(f"{method} works on UNets; {type(self.denoiser).__name__} is a diffusion transformer.")
        return self.layout

    def transformer(self, method: str) -> TransformerLayout:
        """The layout, for methods that work on diffusion transformers only.

        Raises:
            Unsupported: the denoiser is a UNet.
        """
        if not isinstance(self.layout, TransformerLayout):
            raise Unsupported(f"{method} works on diffusion transformers; {type(self.denoiser).__name__} is a UNet.")
        return self.layout


def describe(pipe: Any) -> ModelMap:
    """Map a diffusers pipeline.

    Raises:
        Unsupported: the pipeline or its denoiser is not known, with the reason.
    """
    convention = find_convention(pipe)
    found = [(name, getattr(pipe, name, None)) for name in (convention.denoiser, *convention.others)]
    for name, network in found:
        if type(network).__name__ == "OptimizedModule":
            raise Unsupported(
                f"pipe.{name} is compiled as a whole; compile its repeated blocks instead "
                f"(pipe.{name}.compile_repeated_blocks())."
            )
    denoisers = tuple((network, _describe_denoiser(network)) for _, network in found if network is not None)
    if not denoisers:
        raise Unsupported(f"this {type(pipe).__name__} has no {convention.denoiser}.")
    controlnet = getattr(pipe, "controlnet", None)
    nets = tuple((net, describe_controlnet(net)) for net in _controlnets(controlnet))
    return ModelMap(pipe, convention, denoisers, nets, controlnet if hasattr(controlnet, "nets") else None)


def _describe_denoiser(network: nn.Module) -> Layout:
    return describe_transformer(network) or describe_unet(network)


def _controlnets(controlnet: Any) -> list[nn.Module]:
    if controlnet is None:
        return []
    return list(dict.fromkeys(getattr(controlnet, "nets", [controlnet])))  # one network may be listed twice

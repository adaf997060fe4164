"""The ModelMap a method asks: where things are in this denoiser, and how this pipeline calls it.

Model facts live in `diffaccel/models`, calling conventions in `pipelines/`. Methods never test class names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.compiled import is_compiled
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
        seats: by id of a network, the module that the pipeline calls in its place (`torch.compile(network)`).
    """

    pipe: Any
    convention: Convention
    denoisers: tuple[tuple[nn.Module, Layout], ...]
    controlnets: tuple[tuple[nn.Module, UNetLayout | None], ...]
    group: nn.Module | None = None
    seats: Mapping[int, nn.Module] = field(default_factory=dict)

    def seat(self, network: nn.Module) -> nn.Module:
        """The module that the pipeline calls: the network itself, or what stands around it."""
        return self.seats.get(id(network), network)

    def refuse_compiled(self, name: str) -> None:
        """Raise `Unsupported` if a network is compiled as a whole: what acts inside would be traced into its graph."""
        for network, layout in (*self.denoisers, *self.controlnets):
            if is_compiled(network) or is_compiled(self.seat(network)):
                raise Unsupported(
                    f"{name} acts inside {type(network).__name__}, which is compiled as a whole; "
                    f"{_advice(self, network, layout)}"
                )

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
    called = [getattr(pipe, name, None) for name in (convention.denoiser, *convention.others)]
    seated = [_unwrapped(network) for network in called if network is not None]
    if not seated:
        raise Unsupported(f"this {type(pipe).__name__} has no {convention.denoiser}.")
    controlnet = getattr(pipe, "controlnet", None)
    beside = [_unwrapped(net) for net in _controlnets(controlnet)]
    return ModelMap(
        pipe,
        convention,
        tuple((network, _describe_denoiser(network)) for network, _ in seated),
        tuple((net, describe_controlnet(net)) for net, _ in beside),
        controlnet if hasattr(controlnet, "nets") else None,
        {id(network): seat for network, seat in (*seated, *beside)},
    )


def is_spread(network: Any) -> bool:
    """Whether this network's tokens are divided between processes (context parallelism of diffusers)."""
    return getattr(getattr(network, "_parallel_config", None), "context_parallel_config", None) is not None


def _unwrapped(network: Any) -> tuple[nn.Module, nn.Module]:
    """A network without what others put around it, and the module at which to stand around its calls.

    PEFT and distributed training call the network inside them as a module; only a compiled one has to be left whole.
    """
    kinds = [cls.__name__ for cls in type(network).__mro__]
    if "DataParallel" in kinds:
        raise Unsupported(
            f"this {type(network.module).__name__} is inside a DataParallel, which copies it for every call; put the "
            "network itself into the pipeline."
        )
    if "OptimizedModule" in kinds:
        return _unwrapped(network._orig_mod)[0], network
    if "PeftModel" in kinds:
        return _unwrapped(network.get_base_model())
    if "DistributedDataParallel" in kinds:
        return _unwrapped(network.module)
    return network, network


def _advice(model: ModelMap, network: nn.Module, layout: Any) -> str:
    """How this network's blocks are compiled one by one."""
    names = (model.convention.denoiser, *model.convention.others, "controlnet")
    held = ((name, getattr(model.pipe, name, None)) for name in names)
    place = next((f"pipe.{name}" for name, one in held if one in (network, model.seat(network))), "network")
    if getattr(network, "_repeated_blocks", None) or not isinstance(layout, TransformerLayout):
        return f"compile its repeated blocks instead ({place}.compile_repeated_blocks())."
    lists = " + ".join(f"list({place}.{stack.name})" for stack in layout.stacks)
    return f"compile its blocks one by one instead (for block in {lists}: block.compile())."


def _describe_denoiser(network: nn.Module) -> Layout:
    return describe_transformer(network) or describe_unet(network)


def _controlnets(controlnet: Any) -> list[nn.Module]:
    if controlnet is None:
        return []
    return list(dict.fromkeys(getattr(controlnet, "nets", [controlnet])))  # one network may be listed twice

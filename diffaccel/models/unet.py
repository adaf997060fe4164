"""Where things are in diffusers' conditional UNets (SD 1.x, SD 2.x, SDXL) and in the encoders of their ControlNets.

Skips are numbered in encoder order: s_0 is the output of `conv_in`, then one per resnet (with its attention) and one per
downsampler. There are exactly as many decoder layers; decoder layer k, counted from the output backwards, consumes s_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import Unsupported


@dataclass(frozen=True)
class Site:
    """One position in an encoder or decoder: block number and position inside the block (-1, -1 is `conv_in`)."""

    block: int
    position: int


@dataclass(frozen=True)
class AttentionSite:
    """One spatial transformer and the self-attentions in it.

    Attributes:
        name: dotted name inside the denoiser.
        level: how many downsamplers lie before it; the token grid is the latent grid halved (rounded up) that often.
        transformer: the module called with (rows, channels, h, w).
        self_attentions: its self-attention modules, called with (rows, h * w, channels).
    """

    name: str
    level: int
    transformer: nn.Module
    self_attentions: tuple[nn.Module, ...]


@dataclass(frozen=True)
class UNetLayout:
    """Encoder and decoder layers in skip order, the blocks they belong to, and the attention sites."""

    down_blocks: tuple[nn.Module, ...]
    mid_block: nn.Module | None
    up_blocks: tuple[nn.Module, ...]
    encoder: tuple[Site, ...]
    decoder: tuple[Site, ...]
    attention: tuple[AttentionSite, ...]

    @property
    def depths(self) -> int:
        """Number of skips, and so of depths a skip cache can use."""
        return len(self.encoder)


_PLAIN_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_PLAIN_UP = ("UpBlock2D", "CrossAttnUpBlock2D")


def describe_unet(unet: nn.Module) -> UNetLayout:
    """Layout of a `UNet2DConditionModel`.

    Raises:
        Unsupported: another class, or blocks whose skips are not the plain kind.
    """
    if type(unet).__name__ != "UNet2DConditionModel":
        raise Unsupported(f"the denoiser {type(unet).__name__} is not supported; UNet2DConditionModel is.")
    down, up = tuple(unet.down_blocks), tuple(unet.up_blocks)  # type: ignore[arg-type]
    _require_known(down, _PLAIN_DOWN)
    _require_known(up, _PLAIN_UP)
    encoder, decoder = _encoder_sites(down), _decoder_sites(up)
    if len(encoder) != len(decoder):
        raise Unsupported(f"this UNet has {len(encoder)} encoder skips but {len(decoder)} decoder layers.")
    mid: Any = unet.mid_block
    return UNetLayout(down, mid, up, encoder, decoder, _attention_sites(unet))


def describe_controlnet(net: nn.Module) -> UNetLayout | None:
    """Encoder layout of a ControlNet; None for classes whose encoder is not the plain kind (they always run whole)."""
    if type(net).__name__ != "ControlNetModel":
        return None
    down: Any = tuple(net.down_blocks)  # type: ignore[arg-type]
    if any(type(block).__name__ not in _PLAIN_DOWN for block in down):
        return None
    mid: Any = net.mid_block
    return UNetLayout(down, mid, (), _encoder_sites(down), (), ())


def _require_known(blocks: tuple[nn.Module, ...], known: tuple[str, ...]) -> None:
    for block in blocks:
        if type(block).__name__ == "OptimizedModule":
            raise Unsupported(
                "a block of this UNet was replaced by torch.compile(block), which hides it; compile blocks in place instead "
                "(block.compile(), or pipe.unet.compile_repeated_blocks())."
            )
        if type(block).__name__ not in known:
            raise Unsupported(f"UNets with {type(block).__name__} are not supported; its skips are not the plain kind.")


def _encoder_sites(down: tuple[nn.Module, ...]) -> tuple[Site, ...]:
    sites = [Site(-1, -1)]
    for number, block in enumerate(down):
        layers = len(block.resnets) + len(block.downsamplers or ())  # type: ignore[arg-type]
        sites += [Site(number, position) for position in range(layers)]
    return tuple(sites)


def _decoder_sites(up: tuple[nn.Module, ...]) -> tuple[Site, ...]:
    sites = [Site(number, position) for number, block in enumerate(up) for position in range(len(block.resnets))]  # type: ignore[arg-type]
    return tuple(reversed(sites))


def layer_modules(block: nn.Module, position: int) -> list[nn.Module]:
    """The modules of one layer of a block in call order: resnet and attention, or one down- or upsampler."""
    resnets: Any = block.resnets
    if position >= len(resnets):
        samplers: Any = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
        return [samplers[position - len(resnets)]]
    attentions: Any = getattr(block, "attentions", None)
    return [resnets[position]] + ([attentions[position]] if attentions else [])


def layer_count(block: nn.Module) -> int:
    """Layers of a down block that produce a skip."""
    return len(block.resnets) + len(getattr(block, "downsamplers", None) or ())  # type: ignore[arg-type]


def _attention_sites(unet: nn.Module) -> tuple[AttentionSite, ...]:
    levels = {f"down_blocks.{i}.": i for i in range(len(unet.down_blocks))}  # type: ignore[arg-type]
    last = len(unet.down_blocks) - 1  # type: ignore[arg-type]
    levels |= {f"up_blocks.{i}.": last - i for i in range(len(unet.up_blocks))}  # type: ignore[arg-type]
    levels |= {"mid_block.": last}
    sites = []
    for name, module in unet.named_modules():
        level = next((value for prefix, value in levels.items() if name.startswith(prefix)), None)
        blocks = getattr(module, "transformer_blocks", None)
        if level is not None and blocks is not None:
            found = tuple(b.attn1 for b in blocks if not getattr(b, "only_cross_attention", False))
            if found:
                sites.append(AttentionSite(name, level, module, found))
    return tuple(sites)

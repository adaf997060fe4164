"""Where text and image meet: separate cross-attentions, joint attentions, and what a pipeline calls its negative text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.call import Call
from diffaccel.models.facts import NegativeText, TextAttention
from diffaccel.models.families import unet
from diffaccel.models.known import KNOWN, family_of
from diffaccel.models.transformers import TransformerLayout
from diffaccel.models.unet import UNetLayout


@dataclass(frozen=True)
class CrossSite:
    """One attention from image tokens to text tokens.

    Attributes:
        attention: the module, called with (rows, image tokens, channels) and `encoder_hidden_states`.
        scale_down: image tokens along an axis are this many times fewer than latent cells, rounded up.
    """

    attention: Any
    scale_down: int

    def queries(self, call: Call) -> int:
        """Image tokens of a row."""
        return math.prod(-(-side // self.scale_down) for side in call.sample.shape[-2:])


@dataclass(frozen=True)
class JointSite:
    """One attention over text and image tokens together.

    Attributes:
        attention: the module.
        text_first: its merged output is one sequence with the text in front and has no projection of its own (FLUX's
            single blocks); False where image tokens leave through `to_out`.
    """

    attention: Any
    text_first: bool


def cross_sites(method: str, network: nn.Module, layout: UNetLayout | TransformerLayout) -> tuple[CrossSite, ...]:
    """All separate cross-attentions of a denoiser.

    Raises:
        Unsupported: there are none, or their text is not only text.
    """
    sites = _unet_sites(network, layout) if isinstance(layout, UNetLayout) else _transformer_sites(network, layout)
    if not sites:
        raise Unsupported(f"{method} does not work on {type(network).__name__}: {_why(network, layout)}.")
    _refuse_adapters(method, network)
    return sites


def joint_sites(method: str, network: nn.Module) -> tuple[JointSite, ...]:
    """All attentions over text and image tokens; () if this denoiser has separate cross-attentions.

    Raises:
        Unsupported: an IP-Adapter is loaded.
    """
    entry = family_of(network).text
    if not isinstance(entry, TextAttention) or entry.kind != "joint":
        return ()
    _refuse_adapters(method, network)
    return tuple(
        JointSite(attention, text_first=bool(getattr(attention, "pre_only", None)))
        for blocks, name in entry.blocks
        for block in _list(network, blocks)
        if (attention := getattr(block, name)) is not None
    )


def negative_text(method: str, network: nn.Module, layout: UNetLayout | TransformerLayout) -> NegativeText:
    """How to get negative text for this denoiser.

    Raises:
        Unsupported: unknown, the text reaches more than the cross-attentions, or an IP-Adapter is loaded.
    """
    _refuse_adapters(method, network)
    if isinstance(layout, UNetLayout):
        config: Any = network.config
        if config.addition_embed_type not in (None, "text_time") or config.encoder_hid_dim_type not in (
            None,
            "text_proj",
        ):
            raise Unsupported(f"{method}: the text of this UNet reaches more than its cross-attentions.")
        return unet.NEGATIVE
    entry = family_of(network).text
    if not isinstance(entry, TextAttention) or entry.negative is None:
        known = ", ".join(name for name, family in KNOWN.items() if getattr(family.text, "negative", None))
        raise Unsupported(
            f"{method} does not work on {type(network).__name__}; it works on UNet2DConditionModel, {known}."
        )
    return entry.negative


def text_tokens(call: Call) -> int:
    """Text tokens that cross-attentions see in a call; HunyuanDiT puts those of its two encoders one after the other."""
    texts = [call.arguments.get(name) for name in ("encoder_hidden_states", "encoder_hidden_states_t5")]
    return sum(text.shape[1] for text in texts if text is not None)


def caption_flops(network: nn.Module) -> int:
    """FLOPs of the layers that a text token passes on its way to the cross-attentions."""
    entries = [getattr(network, name, None) for name in ("caption_projection", "encoder_hid_proj")]
    layers = [layer for entry in entries if entry is not None for layer in entry.modules()]
    return sum(2 * layer.in_features * layer.out_features for layer in layers if isinstance(layer, nn.Linear))


def _unet_sites(network: nn.Module, layout: UNetLayout) -> tuple[CrossSite, ...]:
    return tuple(
        CrossSite(block.attn2, 2**site.level)
        for site in layout.attention
        for block in _list(site.transformer, "transformer_blocks")
        if getattr(block, "attn2", None) is not None and block.attn2.is_cross_attention
    )


def _transformer_sites(network: nn.Module, layout: TransformerLayout) -> tuple[CrossSite, ...]:
    entry = family_of(network).text
    if not isinstance(entry, TextAttention) or entry.kind != "cross":
        return ()
    return tuple(
        CrossSite(getattr(block, name), layout.patch)
        for blocks, name in entry.blocks
        for block in _list(network, blocks)
    )


def _list(owner: Any, name: str) -> list[Any]:
    return list(getattr(owner, name))


def _why(network: nn.Module, layout: UNetLayout | TransformerLayout) -> str:
    if isinstance(reason := family_of(network).text, str):
        return reason
    if isinstance(layout, TransformerLayout) and layout.stacks[0].outputs != ("image",):
        return "text and image share one softmax there; only separate cross-attention to text can be made sparse"
    return (
        "its cross-attention is not covered" if isinstance(layout, TransformerLayout) else "it has no cross-attention"
    )


def _refuse_adapters(method: str, network: nn.Module) -> None:
    for module in network.modules():
        if hasattr(getattr(module, "processor", None), "to_k_ip"):
            raise Unsupported(
                f"{method} does not work beside an IP-Adapter, whose picture tokens enter the same attentions; unload it."
            )

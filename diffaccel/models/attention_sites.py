"""Where a diffusion transformer's image tokens attend to each other, and where the text stands in that sequence.

Everything here was read in diffusers 0.42. A site is an attention module whose processor makes one call of
`scaled_dot_product_attention` over a sequence that holds all image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.compiled import is_compiled

Text = Literal["none", "before", "after"]
Grid = Callable[[Any, Mapping[str, Any]], tuple[int, int]]


@dataclass(frozen=True)
class ImageAttention:
    """One attention among image tokens. `text`: where text tokens stand in its sequence of queries and keys."""

    attention: nn.Module
    text: Text


@dataclass(frozen=True)
class ImageAttentions:
    """All of a transformer.

    Attributes:
        sites: in call order.
        grid: token rows and columns of the picture, from the transformer and the arguments of a call; reference pictures
            may follow those tokens.
    """

    sites: tuple[ImageAttention, ...]
    grid: Grid


def _latent_grid(network: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Unpacked latents (rows, channels, h, w), cut into patches."""
    height, width = arguments["hidden_states"].shape[-2:]
    patch = int(network.config.patch_size)
    return height // patch, width // patch


def _position_grid(network: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Packed latents with positions (tokens, 3): number of the picture, row, column."""
    positions: torch.Tensor = arguments["img_ids"]
    positions = positions.reshape(-1, positions.shape[-1])
    first = positions[positions[:, 0] == positions[0, 0]]
    height, width = (int(last) + 1 for last in first[:, 1:].amax(0))
    return (height, width) if height * width <= len(first) else (1, len(first))


_FLUX = ((("transformer_blocks", "attn", "before"), ("single_transformer_blocks", "attn", "before")), _position_grid)
_ENTRIES: dict[str, tuple[tuple[tuple[str, str, Text], ...], Grid]] = {
    "SD3Transformer2DModel": (
        (("transformer_blocks", "attn", "after"), ("transformer_blocks", "attn2", "none")),
        _latent_grid,
    ),
    "FluxTransformer2DModel": _FLUX,  # type: ignore[dict-item]
    "PixArtTransformer2DModel": ((("transformer_blocks", "attn1", "none"),), _latent_grid),
    "DiTTransformer2DModel": ((("transformer_blocks", "attn1", "none"),), _latent_grid),
    "HunyuanDiT2DModel": ((("blocks", "attn1", "none"),), _latent_grid),
    "AuraFlowTransformer2DModel": (
        (("joint_transformer_blocks", "attn", "before"), ("single_transformer_blocks", "attn", "before")),
        _latent_grid,
    ),
}

_MASKED = "its attention masks the padding of the text row by row, which lists of blocks would have to follow."
_VIDEO = "its tokens have a third axis, for which no order of blocks has been worked out."
_REFUSALS = {
    "SanaTransformer2DModel": "its attention is linear: there are no pairs of tokens to leave out.",
    "LuminaNextDiT2DModel": _MASKED,
    "Lumina2Transformer2DModel": _MASKED,
    "ZImageTransformer2DModel": _MASKED,
    "QwenImageTransformer2DModel": _MASKED,
    "CogView4Transformer2DModel": _MASKED,
    "Flux2Transformer2DModel": "its attention has not been worked out.",
    "WanTransformer3DModel": _VIDEO,
    "CogVideoXTransformer3DModel": _VIDEO,
}


def image_attentions(method: str, network: nn.Module) -> ImageAttentions:
    """Where image tokens attend to each other in this transformer.

    Raises:
        Unsupported: it is not known, with the reason, or its blocks are compiled.
    """
    name = type(network).__name__
    if name not in _ENTRIES:
        raise Unsupported(f"{method} does not work on {name}: {_REFUSALS.get(name, 'it is not known.')}")
    if any(is_compiled(module) for module in network.modules()):
        raise Unsupported(
            f"{method} cannot run on this {name}: its blocks are compiled, and its lists would be traced into their graphs."
        )
    places, grid = _ENTRIES[name]
    sites = tuple(
        ImageAttention(attention, text)
        for blocks, attribute, text in places
        for block in getattr(network, blocks)
        if (attention := getattr(block, attribute)) is not None
    )
    return ImageAttentions(sites, grid)

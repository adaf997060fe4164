"""Where a diffusion transformer's image tokens attend to each other, and where the text stands in that sequence.

A site is an attention module whose processor makes one call of
`scaled_dot_product_attention` over a sequence that holds all image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models import facts
from diffaccel.models.compiled import is_compiled
from diffaccel.models.known import family_of


@dataclass(frozen=True)
class ImageAttention:
    """One attention among image tokens. `text`: where text tokens stand in its sequence of queries and keys."""

    attention: nn.Module
    text: facts.Text


@dataclass(frozen=True)
class ImageAttentions:
    """All of a transformer.

    Attributes:
        sites: in call order.
        grid: token rows and columns of the picture, from the transformer and the arguments of a call; reference pictures
            may follow those tokens.
    """

    sites: tuple[ImageAttention, ...]
    grid: facts.Grid


def image_attentions(method: str, network: nn.Module) -> ImageAttentions:
    """Where image tokens attend to each other in this transformer.

    Raises:
        Unsupported: it is not known, with the reason, or its blocks are compiled.
    """
    name = type(network).__name__
    entry = family_of(network).image_attention
    if not isinstance(entry, facts.ImageAttention):
        raise Unsupported(f"{method} does not work on {name}: {entry or 'it is not known.'}")
    if any(is_compiled(module) for module in network.modules()):
        raise Unsupported(
            f"{method} cannot run on this {name}: its blocks are compiled, and its lists would be traced into their graphs."
        )
    sites = tuple(
        ImageAttention(attention, text)
        for blocks, attribute, text in entry.places
        for block in getattr(network, blocks)
        if (attention := getattr(block, attribute)) is not None
    )
    return ImageAttentions(sites, entry.grid)

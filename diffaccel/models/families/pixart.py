"""PixArt-alpha and -sigma: self-attention among image tokens, cross-attention to the text of a T5."""

from __future__ import annotations

from typing import Any

from diffaccel.models.facts import (
    IMAGE,
    Blocks,
    Family,
    ImageAttention,
    Merging,
    NegativeText,
    Reader,
    Regions,
    Source,
    TextAttention,
    TextRoute,
    latent_grid,
)

T5 = Source("text_encoder", "tokenizer", "t5", "last", masked=True)


def routes(transformer: Any) -> tuple[TextRoute, ...]:
    width = transformer.caption_projection.linear_1.in_features
    return (TextRoute("sequence", width, (Reader("caption_projection.linear_1", (0, width)),), (T5,)),)


FAMILY = Family(
    network="PixArtTransformer2DModel",
    blocks=Blocks((("transformer_blocks", IMAGE),), "pos_embed"),
    image_attention=ImageAttention((("transformer_blocks", "attn1", "none"),), latent_grid),
    merging=Merging((("transformer_blocks", "attn1", False),), bias="rows"),
    regions=Regions((("transformer_blocks", "attn1", False),)),
    text=TextAttention("cross", (("transformer_blocks", "attn2"),), NegativeText(2, 3)),
    routes=routes,
)

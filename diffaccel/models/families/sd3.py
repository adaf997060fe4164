"""Stable Diffusion 3 and 3.5: joint attention of text and image, unpacked latents, positions in the tokens."""

from __future__ import annotations

from typing import Any

from diffaccel.models.facts import (
    TEXT_IMAGE,
    Blocks,
    Family,
    ImageAttention,
    Merging,
    NegativeText,
    Regions,
    Source,
    TextAttention,
    TextRoute,
    embedded_routes,
    latent_grid,
)

SEQUENCE = (
    Source("text_encoder", "tokenizer", "clip", "penultimate"),
    Source("text_encoder_2", "tokenizer_2", "clip", "penultimate"),
    Source("text_encoder_3", "tokenizer_3", "t5", "last", section=1, optional=True),
)
POOLED = (
    Source("text_encoder", "tokenizer", "clip", "projected"),
    Source("text_encoder_2", "tokenizer_2", "clip", "projected"),
)


def routes(transformer: Any) -> tuple[TextRoute, ...]:
    return embedded_routes(transformer, "context_embedder", SEQUENCE, "text_embedder", POOLED)


FAMILY = Family(
    network="SD3Transformer2DModel",
    blocks=Blocks((("transformer_blocks", TEXT_IMAGE),), "pos_embed"),
    image_attention=ImageAttention(
        (("transformer_blocks", "attn", "after"), ("transformer_blocks", "attn2", "none")), latent_grid
    ),
    merging=Merging((("transformer_blocks", "attn", False), ("transformer_blocks", "attn2", False)), bias="none"),
    regions=Regions(
        (("transformer_blocks", "attn", False), ("transformer_blocks", "attn2", False)),
        heads_first=True,
        residuals=("block_controlnet_hidden_states",),
    ),
    text=TextAttention("joint", (("transformer_blocks", "attn"),), NegativeText(1)),
    routes=routes,
)

"""FLUX.1: packed latents with positions, joint attention in two kinds of blocks, rotary tables for text and image together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffaccel.models.facts import (
    TEXT_IMAGE,
    Blocks,
    Family,
    ImageAttention,
    Merging,
    NegativeText,
    Regions,
    Source,
    Table,
    TextAttention,
    TextRoute,
    embedded_routes,
    packed,
    rotate_pairs,
)


def picture_grid(network: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the picture that is drawn; positions are (tokens, 3): number of the picture, row, column."""
    positions: torch.Tensor = arguments["img_ids"]
    positions = positions.reshape(-1, positions.shape[-1])
    first = positions[positions[:, 0] == positions[0, 0]]
    height, width = (int(last) + 1 for last in first[:, 1:].amax(0))
    return (height, width) if height * width <= len(first) else (1, len(first))


def token_grid(arguments: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    """All image tokens as one grid, those of reference pictures included."""
    positions: torch.Tensor = arguments["img_ids"]
    height = int(positions.reshape(-1, positions.shape[-1])[:tokens, 1].max()) + 1
    return height, tokens // height


def split_joined(table: Any, tokens: int) -> tuple[Table, Table]:
    """(cos, sin) of text tokens followed by image tokens."""
    return tuple(part[:-tokens] for part in table), tuple(part[-tokens:] for part in table)


def refuse_adapters(network: Any) -> str | None:
    if any(hasattr(module, "to_k_ip") for module in network.modules()):
        return "an IP-Adapter is loaded, whose processors use queries before they are rotated; unload it."
    return None


T5 = Source("text_encoder_2", "tokenizer_2", "t5", "last")
POOLED = Source("text_encoder", "tokenizer", "clip", "pooled")


def routes(transformer: Any) -> tuple[TextRoute, ...]:
    return embedded_routes(transformer, "context_embedder", (T5,), "text_embedder", (POOLED,))


FAMILY = Family(
    network="FluxTransformer2DModel",
    blocks=Blocks(
        (("transformer_blocks", TEXT_IMAGE), ("single_transformer_blocks", TEXT_IMAGE)), "x_embedder", patch=packed
    ),
    image_attention=ImageAttention(
        (("transformer_blocks", "attn", "before"), ("single_transformer_blocks", "attn", "before")), picture_grid
    ),
    merging=Merging(
        (("transformer_blocks", "attn", False), ("single_transformer_blocks", "attn", True)),
        bias="heads",
        rotary="image_rotary_emb",
        grid=token_grid,
    ),
    regions=Regions(
        (("transformer_blocks", "attn", False), ("single_transformer_blocks", "attn", True)),
        rotary=(split_joined, rotate_pairs),
        residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
        cells=4,
        grid=token_grid,
        refuses=refuse_adapters,
    ),
    text=TextAttention(
        "joint", (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")), NegativeText(None)
    ),
    routes=routes,
)

"""Qwen-Image: packed latents, joint attention with complex rotary tables for each stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffaccel.models.facts import LANGUAGE_MODEL, MASKED, TEXT_IMAGE, Blocks, Family, Regions, Table, packed


def shapes_grid(arguments: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    """Rows and columns of the picture that is drawn, which comes first in `img_shapes`."""
    first: Any = arguments["img_shapes"][0]
    _, height, width = first[0] if isinstance(first, list) else first
    return int(height), int(width)


def rotate_complex(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Rotate neighbouring pairs, read as complex numbers, by unit complex numbers, in fp32."""
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * table[0]).flatten(-2).to(x.dtype)


def split_streams(table: Any, tokens: int) -> tuple[Table, Table]:
    """Separate complex tables, image first."""
    return (table[1],), (table[0],)


def mask_of_all_tokens(arguments: Mapping[str, Any], tokens: int, active: int, table: Table | None) -> dict[str, Any]:
    """The processor adds one entry per query to the mask of the text; there are more keys than queries."""
    mask = arguments.get("encoder_hidden_states_mask")
    if mask is None:
        return dict(arguments)
    rest = mask.new_ones((mask.shape[0], tokens - active))
    return {**arguments, "encoder_hidden_states_mask": torch.cat([mask, rest], dim=1)}


def refuse_second_time(network: Any) -> str | None:
    if getattr(network, "zero_cond_t", False):
        return "this checkpoint modulates the tokens of its reference pictures by another time, token by token."
    return None


FAMILY = Family(
    network="QwenImageTransformer2DModel",
    blocks=Blocks((("transformer_blocks", TEXT_IMAGE),), "img_in", patch=packed),
    image_attention=MASKED,
    merging="its attention takes the masks and the rotary tables of text and image apart.",
    regions=Regions(
        (("transformer_blocks", "attn", False),),
        rotary=(split_streams, rotate_complex),
        adapt=mask_of_all_tokens,
        residuals=("controlnet_block_samples",),
        cells=4,
        grid=shapes_grid,
        refuses=refuse_second_time,
    ),
    routes=LANGUAGE_MODEL,
)

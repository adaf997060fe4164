"""HunyuanDiT: long skips between its blocks, rotary positions, two text encoders."""

from __future__ import annotations

from diffaccel.models.facts import (
    IMAGE,
    OWN_TABLES,
    Blocks,
    Control,
    Family,
    ImageAttention,
    TextAttention,
    latent_grid,
)


def long_skips(blocks: int) -> tuple[tuple[int, int], ...]:
    """Blocks after the middle one read the outputs of the first ones; the two innermost blocks are unpaired."""
    return tuple((i, blocks - 1 - i) for i in range(blocks // 2 - 1))


FAMILY = Family(
    network="HunyuanDiT2DModel",
    blocks=Blocks((("blocks", IMAGE),), "pos_embed", long_skips=long_skips),
    image_attention=ImageAttention((("blocks", "attn1", "none"),), latent_grid),
    merging=OWN_TABLES,
    regions=(
        "its attention rotates queries and keys by one table that its blocks hand on, and its long skips join tokens of "
        "the full grid; this has not been worked out."
    ),
    text=TextAttention("cross", (("blocks", "attn2"),)),
    routes="its two text encoders meet behind a non-linear projection, which is not covered yet",
    control=Control("HunyuanDiT2DControlNetModel", "blocks", "controlnet_blocks"),
)

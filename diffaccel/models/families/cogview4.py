"""CogView4: attention that projects text and image together."""

from __future__ import annotations

from diffaccel.models.facts import IMAGE_TEXT, MASKED, PROJECTED_TOGETHER, Blocks, Family

FAMILY = Family(
    network="CogView4Transformer2DModel",
    blocks=Blocks((("transformer_blocks", IMAGE_TEXT),), "patch_embed"),
    image_attention=MASKED,
    merging=PROJECTED_TOGETHER,
    regions=PROJECTED_TOGETHER,
)

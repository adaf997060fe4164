"""CogVideoX: video, joint attention of text and video tokens."""

from __future__ import annotations

from diffaccel.models.facts import IMAGE_TEXT, MERGED_OVER_TIME, NEIGHBOURS_IN_TIME, THIRD_AXIS, Blocks, Family

FAMILY = Family(
    network="CogVideoXTransformer3DModel",
    blocks=Blocks((("transformer_blocks", IMAGE_TEXT),), "patch_embed", norm="norm_final"),
    image_attention=THIRD_AXIS,
    merging=MERGED_OVER_TIME,
    regions=NEIGHBOURS_IN_TIME,
)

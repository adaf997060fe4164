"""Wan 2.1 and 2.2: video, cross-attention to the text."""

from __future__ import annotations

from typing import Any

from diffaccel.models.facts import IMAGE, MERGED_OVER_TIME, NEIGHBOURS_IN_TIME, THIRD_AXIS, Blocks, Family


def _last(config: Any) -> int:
    return int(config.patch_size[-1])


FAMILY = Family(
    network="WanTransformer3DModel",
    blocks=Blocks((("blocks", IMAGE),), "patch_embedding", patch=_last),
    image_attention=THIRD_AXIS,
    merging=MERGED_OVER_TIME,
    regions=NEIGHBOURS_IN_TIME,
)

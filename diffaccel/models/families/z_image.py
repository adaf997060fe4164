"""Z-Image: lists of latents, refiner blocks, one sequence of image and text per row."""

from __future__ import annotations

from typing import Any

from diffaccel.models.facts import JOINT, LANGUAGE_MODEL, MASKED, OWN_TABLES, Blocks, Family


def _first_listed(config: Any) -> int:
    return int(config.all_patch_size[0])


FAMILY = Family(
    network="ZImageTransformer2DModel",
    blocks=Blocks((("layers", JOINT),), "all_x_embedder", norm=None, head="all_final_layer", patch=_first_listed),
    image_attention=MASKED,
    merging=OWN_TABLES,
    regions="its refiner blocks and its joint sequence of image and text depend on the padding of each row.",
    routes=LANGUAGE_MODEL,
)

"""Lumina-Image 2: refiner blocks before the main ones, one sequence of text and image."""

from __future__ import annotations

from diffaccel.models.facts import JOINT, LANGUAGE_MODEL, MASKED, OWN_TABLES, Blocks, Family

FAMILY = Family(
    network="Lumina2Transformer2DModel",
    blocks=Blocks((("layers", JOINT),), "x_embedder", head="norm_out"),
    image_attention=MASKED,
    merging=OWN_TABLES,
    regions="its refiner blocks and its joint sequence of text and image depend on the caption length of each row.",
    routes=LANGUAGE_MODEL,
)

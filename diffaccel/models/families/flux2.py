"""FLUX.2: packed latents; its single blocks make queries, keys, values and the MLP in one projection."""

from __future__ import annotations

from diffaccel.models.facts import JOINT, LANGUAGE_MODEL, TEXT_IMAGE, Blocks, Family, packed

_ONE_PROJECTION = "its single blocks make queries, keys, values and the MLP in one projection."

FAMILY = Family(
    network="Flux2Transformer2DModel",
    blocks=Blocks(
        (("transformer_blocks", TEXT_IMAGE), ("single_transformer_blocks", JOINT)), "x_embedder", patch=packed
    ),
    image_attention="its attention has not been worked out.",
    merging=_ONE_PROJECTION,
    regions=_ONE_PROJECTION,
    routes=LANGUAGE_MODEL,
)

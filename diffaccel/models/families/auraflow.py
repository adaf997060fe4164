"""AuraFlow: joint blocks, then single blocks over one sequence of text and image."""

from __future__ import annotations

from diffaccel.models.facts import JOINT, TEXT_IMAGE, Blocks, Family, ImageAttention, Regions, latent_grid

FAMILY = Family(
    network="AuraFlowTransformer2DModel",
    blocks=Blocks((("joint_transformer_blocks", TEXT_IMAGE), ("single_transformer_blocks", JOINT)), "pos_embed"),
    image_attention=ImageAttention(
        (("joint_transformer_blocks", "attn", "before"), ("single_transformer_blocks", "attn", "before")), latent_grid
    ),
    regions=Regions((("joint_transformer_blocks", "attn", False), ("single_transformer_blocks", "attn", True))),
)

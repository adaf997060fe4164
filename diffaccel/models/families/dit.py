"""DiT: classes instead of text."""

from __future__ import annotations

from diffaccel.models.facts import IMAGE, Blocks, Family, ImageAttention, Regions, latent_grid

_NO_TEXT = "it draws class numbers and reads no text"

FAMILY = Family(
    network="DiTTransformer2DModel",
    blocks=Blocks((("transformer_blocks", IMAGE),), "pos_embed", head="proj_out_2"),
    image_attention=ImageAttention((("transformer_blocks", "attn1", "none"),), latent_grid),
    regions=Regions((("transformer_blocks", "attn1", False),)),
    text=_NO_TEXT,
    routes=_NO_TEXT,
)

"""Sana: linear self-attention, convolutions in the feed-forward part, cross-attention to the text."""

from __future__ import annotations

from diffaccel.models.facts import IMAGE, Blocks, Family, TextAttention

FAMILY = Family(
    network="SanaTransformer2DModel",
    blocks=Blocks((("transformer_blocks", IMAGE),), "patch_embed"),
    image_attention="its attention is linear: there are no pairs of tokens to leave out.",
    merging="its self-attention is linear in the tokens already, so there is next to nothing to save.",
    regions=(
        "its linear attention keeps one sum over all tokens and its feed-forward part convolves the token grid, so tokens "
        "cannot be computed on their own."
    ),
    text=TextAttention("cross", (("transformer_blocks", "attn2"),)),
    routes="a normalisation follows its caption projection, and its text model is not covered yet",
)

"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL: where its text enters. Its blocks are read in `models/unet.py`."""

from __future__ import annotations

from typing import Any

from diffaccel.errors import Unsupported
from diffaccel.models.facts import Family, NegativeText, Reader, Source, TextRoute

SD = (Source("text_encoder", "tokenizer", "clip", "last"),)
SDXL = (
    Source("text_encoder", "tokenizer", "clip", "penultimate", optional=True),  # the refiner has only the second
    Source("text_encoder_2", "tokenizer_2", "clip", "penultimate"),
)
POOLED = Source("text_encoder_2", "tokenizer_2", "clip", "projected")


def routes(unet: Any) -> tuple[TextRoute, ...]:
    config = unet.config
    if config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        raise Unsupported(f"this UNet mixes its text with an encoder_hid_proj of type {config.encoder_hid_dim_type!r}.")
    found: list[Reader] = []
    widths = set()
    for name, module in unet.named_modules():
        if name.endswith("attn2") and hasattr(module, "to_k"):
            width = int(module.to_k.in_features)
            widths.add(width)
            found += [Reader(f"{name}.to_k", (0, width), "key"), Reader(f"{name}.to_v", (0, width), "value")]
    if len(widths) != 1:
        raise Unsupported("this UNet has no cross-attention of one width that reads text.")
    two = config.addition_embed_type == "text_time"
    sequence = TextRoute("sequence", widths.pop(), tuple(found), SDXL if two else SD)
    if not two:
        if config.addition_embed_type is not None:
            raise Unsupported(f"this UNet has an additional embedding of type {config.addition_embed_type!r}.")
        return (sequence,)
    pooled = int(config.projection_class_embeddings_input_dim) - _time_ids(config)
    reader = Reader("add_embedding.linear_1", (0, pooled))
    return sequence, TextRoute("pooled", pooled, (reader,), (POOLED,))


def _time_ids(config: Any) -> int:
    """Columns of the sizes behind the pooled text: six numbers for SDXL, five for its refiner."""
    sizes = 5 if config.cross_attention_dim == 1280 and config.projection_class_embeddings_input_dim == 2560 else 6
    return sizes * int(config.addition_time_embed_dim)


NEGATIVE = NegativeText(1)

FAMILY = Family(network="UNet2DConditionModel", routes=routes)

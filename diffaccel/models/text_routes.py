"""Where text enters a denoiser: the projections that read it, and which text encoder fills which columns of their input.

A route is one such place. "sequence" carries one row per token, "pooled" one vector per prompt. Every projection of a
route reads the same rows, so one map on these rows serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from diffaccel.errors import Unsupported

RouteName = Literal["sequence", "pooled"]
Role = Literal["key", "value", "both"]
Output = Literal["last", "penultimate", "pooled", "projected"]


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads text.

    Attributes:
        name: dotted name inside the denoiser.
        columns: [first, past) columns of its weight that meet the text; the others meet something else.
        role: makes keys, makes values, or everything ("both").
    """

    name: str
    columns: tuple[int, int]
    role: Role = "both"


@dataclass(frozen=True)
class Source:
    """A text encoder's share of a route.

    Attributes:
        encoder, tokenizer: attributes of the pipeline.
        family: "clip" (causal, begins with a start token) or "t5" (every token sees every other).
        output: which output the denoiser is given.
        section: sources of one section fill the same rows side by side, in the order listed; sections follow each
            other along the sequence (SD3: T5's rows after CLIP's).
        masked: whether paddings are hidden from the encoder and from the denoiser.
        optional: whether pipelines run without it, giving zeros instead.
    """

    encoder: str
    tokenizer: str
    family: Literal["clip", "t5"]
    output: Output
    section: int = 0
    masked: bool = False
    optional: bool = False


@dataclass(frozen=True)
class TextRoute:
    """One place where text enters: its name, the width of a row, who reads it and who writes it."""

    name: RouteName
    width: int
    readers: tuple[Reader, ...]
    sources: tuple[Source, ...]


def describe_text_routes(denoiser: nn.Module) -> tuple[TextRoute, ...]:
    """The routes of a denoiser, "sequence" first.

    Raises:
        Unsupported: no closed form applies to this class, with the reason.
    """
    kind = type(denoiser).__name__
    if kind in _NO_CLOSED_FORM:
        raise Unsupported(f"concepts cannot be erased from {kind} in closed form: {_NO_CLOSED_FORM[kind]}.")
    if kind not in _FAMILIES:
        raise Unsupported(f"concept erasure does not know where text enters {kind}; it knows {', '.join(_FAMILIES)}.")
    return _FAMILIES[kind](denoiser)


def _unet(unet: Any) -> tuple[TextRoute, ...]:
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
    sequence = TextRoute("sequence", widths.pop(), tuple(found), _SDXL_SEQUENCE if two else _SD_SEQUENCE)
    if not two:
        if config.addition_embed_type is not None:
            raise Unsupported(f"this UNet has an additional embedding of type {config.addition_embed_type!r}.")
        return (sequence,)
    pooled = int(config.projection_class_embeddings_input_dim) - _time_ids(config)
    reader = Reader("add_embedding.linear_1", (0, pooled))
    return sequence, TextRoute("pooled", pooled, (reader,), (_POOLED_2,))


def _time_ids(config: Any) -> int:
    """Columns of the sizes behind the pooled text: six numbers for SDXL, five for its refiner."""
    sizes = 5 if config.cross_attention_dim == 1280 and config.projection_class_embeddings_input_dim == 2560 else 6
    return sizes * int(config.addition_time_embed_dim)


def _sd3(transformer: Any) -> tuple[TextRoute, ...]:
    return _transformer(transformer, "context_embedder", _SD3_SEQUENCE, "text_embedder", (_PROJECTED_1, _POOLED_2))


def _flux(transformer: Any) -> tuple[TextRoute, ...]:
    return _transformer(transformer, "context_embedder", (_FLUX_T5,), "text_embedder", (_POOLED_CLIP,))


def _transformer(
    transformer: Any, entry: str, sources: tuple[Source, ...], pooled: str, pooled_sources: tuple[Source, ...]
) -> tuple[TextRoute, ...]:
    first = transformer.get_submodule(entry).in_features
    second = f"time_text_embed.{pooled}.linear_1"
    width = transformer.get_submodule(second).in_features
    return (
        TextRoute("sequence", first, (Reader(entry, (0, first)),), sources),
        TextRoute("pooled", width, (Reader(second, (0, width)),), pooled_sources),
    )


def _pixart(transformer: Any) -> tuple[TextRoute, ...]:
    width = transformer.caption_projection.linear_1.in_features
    return (TextRoute("sequence", width, (Reader("caption_projection.linear_1", (0, width)),), (_PIXART_T5,)),)


_SD_SEQUENCE = (Source("text_encoder", "tokenizer", "clip", "last"),)
_SDXL_SEQUENCE = (
    Source("text_encoder", "tokenizer", "clip", "penultimate", optional=True),  # the refiner has only the second
    Source("text_encoder_2", "tokenizer_2", "clip", "penultimate"),
)
_POOLED_2 = Source("text_encoder_2", "tokenizer_2", "clip", "projected")
_PROJECTED_1 = Source("text_encoder", "tokenizer", "clip", "projected")
_SD3_SEQUENCE = (
    Source("text_encoder", "tokenizer", "clip", "penultimate"),
    Source("text_encoder_2", "tokenizer_2", "clip", "penultimate"),
    Source("text_encoder_3", "tokenizer_3", "t5", "last", section=1, optional=True),
)
_FLUX_T5 = Source("text_encoder_2", "tokenizer_2", "t5", "last")
_POOLED_CLIP = Source("text_encoder", "tokenizer", "clip", "pooled")
_PIXART_T5 = Source("text_encoder", "tokenizer", "t5", "last", masked=True)

_FAMILIES: dict[str, Callable[[Any], tuple[TextRoute, ...]]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
}

_LANGUAGE = "its text comes from a language model whose chat template surrounds every prompt; this is not covered yet"
_NO_CLOSED_FORM = {
    "DiTTransformer2DModel": "it draws class numbers and reads no text",
    "Flux2Transformer2DModel": _LANGUAGE,
    "QwenImageTransformer2DModel": _LANGUAGE,
    "ZImageTransformer2DModel": _LANGUAGE,
    "Lumina2Transformer2DModel": _LANGUAGE,
    "LuminaNextDiT2DModel": "its text comes from a language model, which is not covered yet",
    "SanaTransformer2DModel": "a normalisation follows its caption projection, and its text model is not covered yet",
    "HunyuanDiT2DModel": "its two text encoders meet behind a non-linear projection, which is not covered yet",
}

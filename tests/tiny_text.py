"""Tiny pipelines with text encoders of random weights: the shapes world's CLIP tokenizer and a T5 tokenizer of a few words."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny import tiny_pipeline as tiny_unet_pipeline
from tiny_transformers import tiny_pipeline as tiny_transformer_pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffaccel.miniatures import miniature_path

KINDS = ("sd", "sdxl", "sd3", "sd3-no-t5", "flux", "pixart")
LIMIT = 32  # tokens of a CLIP prompt

_WORDS = (
    "a photo of picture the an image with in it circle square star red blue heart large disc shape tree dog and left"
)
_PIECES = "c i r l e s q u a t k n o p d m g h w y z b v x j f".split()


@cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(miniature_path() / "tokenizer", pad_token=pad)


@cache
def t5_tokenizer() -> T5TokenizerFast:
    """Words are one token, unknown ones fall into letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"\u2581{word}", -2.0) for word in dict.fromkeys(_WORDS.split())]
    letters = [("\u2581", -6.0), *((piece, -5.0) for piece in dict.fromkeys(_PIECES))]
    known = dict([*special, *letters, *words])  # "a" with and without a space are different
    return T5TokenizerFast(vocab=list(known.items()), extra_ids=0)


def clip(width: int, seed: int, *, projection: int | None = None) -> Any:
    """A causal text encoder; with a projection of its pooled output if a width is given."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=710,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        projection_dim=projection or width,
        bos_token_id=708,
        eos_token_id=709,
        pad_token_id=709,
        hidden_act="gelu",
    )
    model: Any = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return _spread(model, seed)


def t5(width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return _spread(T5EncoderModel(config), seed)


def _spread(model: Any, seed: int) -> Any:
    """Weights large enough for prompts to differ."""
    maker = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 1.0 if "embed" in name or "shared" in name else weight.shape[1] ** -0.5
                weight.copy_(scale * torch.randn(weight.shape, generator=maker))
    return model.eval()


def tiny_text_pipeline(kind: str) -> Any:
    """A tiny pipeline by kind with everything `encode_prompt` needs; see KINDS."""
    tokenizer = clip_tokenizer()
    if kind == "sd":
        pipe = tiny_unet_pipeline("sd")
        pipe.register_modules(text_encoder=clip(16, 1), tokenizer=tokenizer)
    elif kind == "sdxl":
        pipe = tiny_unet_pipeline("sdxl")
        pipe.register_modules(
            text_encoder=clip(4, 1),
            tokenizer=tokenizer,
            text_encoder_2=clip(12, 2, projection=16),
            tokenizer_2=clip_tokenizer("!"),
        )
    elif kind.startswith("sd3"):
        pipe = tiny_transformer_pipeline("sd3")
        pipe.register_modules(
            text_encoder=clip(4, 1, projection=6),
            tokenizer=tokenizer,
            text_encoder_2=clip(8, 2, projection=10),
            tokenizer_2=tokenizer,
        )
        pipe.tokenizer_max_length = LIMIT
        if kind == "sd3":
            pipe.register_modules(text_encoder_3=t5(16, 3), tokenizer_3=t5_tokenizer())
    elif kind == "flux":
        pipe = tiny_transformer_pipeline("flux-dev")
        pipe.register_modules(
            text_encoder=clip(16, 1), tokenizer=tokenizer, text_encoder_2=t5(16, 3), tokenizer_2=t5_tokenizer()
        )
        pipe.tokenizer_max_length = LIMIT
    elif kind == "pixart":
        pipe = tiny_transformer_pipeline("pixart-sigma")
        pipe.register_modules(text_encoder=t5(16, 3), tokenizer=t5_tokenizer())
    else:
        raise ValueError(kind)
    return pipe


@torch.no_grad()
def encode(pipe: Any, kind: str, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows of the sequence (tokens, width), pooled (width,) or None), as the pipeline itself makes them."""
    if kind == "sd":
        return pipe.encode_prompt(text, "cpu", 1, False)[0][0], None
    if kind == "sdxl":
        found = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
        return found[0][0], found[2][0]
    if kind.startswith("sd3"):
        found = pipe.encode_prompt(text, None, None, device="cpu", do_classifier_free_guidance=False)
        return found[0][0], found[2][0]
    if kind == "flux":
        found = pipe.encode_prompt(text, None, device="cpu")
        return found[0][0], found[1][0]
    found = pipe.encode_prompt(text, do_classifier_free_guidance=False, device="cpu", clean_caption=False)
    return found[0][0][found[1][0].bool()], None


def tiny_sd_with_wider_text() -> Any:
    """A pipeline whose text encoder does not fit its UNet."""
    pipe = tiny_text_pipeline("sd")
    pipe.register_modules(text_encoder=clip(24, 1))
    return pipe

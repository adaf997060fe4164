"""Diffusion transformers at real width, built from their public configurations with random weights; no download.

Depth can be cut: every block of a model costs the same (two kinds in FLUX.1), so ratios barely depend on it, apart from
blocks that a cache keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.models import _random

SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
FLUX_DEV: dict[str, Any] = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
PIXART_ALPHA: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 28,
    "caption_channels": 4096,
    "use_additional_conditions": True,
}
HUNYUAN_DIT: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 40,
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1408,
    "mlp_ratio": 4.3637,
    "pooled_projection_dim": 1024,
    "activation_fn": "gelu-approximate",
}
# class of the transformer, its configuration, class of the pipeline, text encoders that are left out
_MODELS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "sd3-medium": ("SD3Transformer2DModel", SD3_MEDIUM, "StableDiffusion3Pipeline", 3),
    "flux-dev": ("FluxTransformer2DModel", FLUX_DEV, "FluxPipeline", 2),
    "pixart-alpha": ("PixArtTransformer2DModel", PIXART_ALPHA, "PixArtAlphaPipeline", 1),
    "hunyuan-dit": ("HunyuanDiT2DModel", HUNYUAN_DIT, "HunyuanDiTPipeline", 2),
}
NAMES = tuple(_MODELS)
GUIDED = ("sd3-medium", "pixart-alpha", "hunyuan-dit")  # two guidance branches


def configuration(name: str, depth: int | None) -> dict[str, Any]:
    """The configuration, with `depth` blocks instead of the real number (FLUX.1 keeps one third of them double)."""
    config = dict(_MODELS[name][1])
    if depth is None:
        return config
    if "num_single_layers" in config:
        double = max(1, round(depth / 3))
        return config | {"num_layers": double, "num_single_layers": max(1, depth - double)}
    return config | {"num_layers": depth}


def build_pipeline(name: str, device: str, dtype: torch.dtype, depth: int | None = None) -> Any:
    """A pipeline without text encoders and autoencoder, and without progress bar."""
    import diffusers

    cls, _, pipeline, encoders = _MODELS[name]
    config = configuration(name, depth)

    def make(**more: Any) -> nn.Module:
        module: nn.Module = getattr(diffusers, cls)(**config | more)
        return module

    network = _random(make, device, dtype)
    _fill_buffers(network, lambda: make(num_layers=2))
    left_out = [f"{part}{number}" for number in ("", "_2", "_3")[:encoders] for part in ("text_encoder", "tokenizer")]
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, pipeline)(
        transformer=network,
        vae=None,
        scheduler=_scheduler(name),
        **dict.fromkeys(left_out),
        **(more if name == "hunyuan-dit" else {}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _fill_buffers(network: nn.Module, small: Callable[[], nn.Module]) -> None:
    """Position tables, which random weights leave empty: they do not depend on the depth."""
    tables = dict(small().named_buffers())
    for name, buffer in network.named_buffers():
        buffer.copy_(tables[name])


def _scheduler(name: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if name in ("sd3-medium", "flux-dev"):
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    prediction = "v_prediction" if name == "hunyuan-dit" else "epsilon"
    return DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type=prediction
    )


def call_arguments(name: str, device: str, dtype: torch.dtype, *, size: int, batch: int, config: Any) -> dict[str, Any]:
    """Prompt embeddings of the right shape for a transformer's `config`, and a seeded generator per picture."""
    maker = torch.Generator().manual_seed(0)

    def prompts(kind: str, tokens: int, width: int) -> dict[str, Any]:
        shape = (batch, tokens, width) if tokens else (batch, width)
        return {
            f"{sign}{kind}": torch.randn(*shape, generator=maker).to(device, dtype)
            for sign in ("", "negative_")
            if name in GUIDED or not sign
        }

    def masks(kind: str, tokens: int) -> dict[str, Any]:
        mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
        return {f"{sign}{kind}": mask for sign in ("", "negative_")}

    arguments: dict[str, Any] = {"height": size, "width": size, "guidance_scale": 4.5, "output_type": "latent"}
    arguments["generator"] = [torch.Generator("cpu").manual_seed(i) for i in range(batch)]
    if name == "sd3-medium":
        arguments |= prompts("prompt_embeds", 333, config.joint_attention_dim)
        return arguments | prompts("pooled_prompt_embeds", 0, config.pooled_projection_dim)
    if name == "flux-dev":
        arguments |= prompts("prompt_embeds", 512, config.joint_attention_dim)
        return arguments | prompts("pooled_prompt_embeds", 0, config.pooled_projection_dim)
    arguments["use_resolution_binning"] = False
    if name == "pixart-alpha":
        arguments |= prompts("prompt_embeds", 120, config.caption_channels) | masks("prompt_attention_mask", 120)
        return arguments | {"negative_prompt": None}
    arguments |= prompts("prompt_embeds", config.text_len, config.cross_attention_dim)
    arguments |= masks("prompt_attention_mask", config.text_len)
    arguments |= prompts("prompt_embeds_2", config.text_len_t5, config.cross_attention_dim_t5)
    return arguments | masks("prompt_attention_mask_2", config.text_len_t5)

"""Stable Diffusion 1.5 and XL at real size, built from their public configurations with random weights; no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TOKENS = 77


def build_pipeline(name: str, device: str, dtype: torch.dtype) -> Any:
    """ "sd15" or "sdxl" without text encoders (prompt embeddings are given in the call) and without progress bar."""
    pipe = {"sd15": _sd15, "sdxl": _sdxl}[name](device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd15(device: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=_random(lambda: AutoencoderKL(**VAE), device, dtype),
        text_encoder=None,
        tokenizer=None,
        unet=_random(lambda: UNet2DConditionModel(**SD15_UNET), device, dtype),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(device: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    return StableDiffusionXLPipeline(
        vae=_random(lambda: AutoencoderKL(**VAE, scaling_factor=0.13025, force_upcast=False), device, dtype),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=_random(lambda: UNet2DConditionModel(**SDXL_UNET), device, dtype),
        scheduler=EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
    )


def _random(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """The module with weights of ordinary size, drawn in its own precision: no fp32 copy of 2.6 billion parameters."""
    with torch.device("meta"):
        module = make()
    module = _cast(module, dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.dim() > 1:  # variance 1 / inputs keeps activations at the same size from layer to layer
            weight.normal_(0, (weight.shape[0] / weight.numel()) ** 0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module.to(dtype)` of plain torch: the one of diffusers warns about parts that stay in fp32, of which there are none."""
    return nn.Module.to(module, dtype)


def call_arguments(name: str, device: str, dtype: torch.dtype, *, size: int, batch: int) -> dict[str, Any]:
    """Prompt embeddings of the right shape and a seeded generator per picture."""
    maker = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=maker).to(device, dtype)

    width = {"sd15": 768, "sdxl": 2048}[name]
    arguments: dict[str, Any] = {
        "prompt_embeds": noise(batch, TOKENS, width),
        "negative_prompt_embeds": noise(batch, TOKENS, width),
        "height": size,
        "width": size,
        "guidance_scale": 7.5,
        "output_type": "latent",
    }
    if name == "sdxl":
        arguments |= {"pooled_prompt_embeds": noise(batch, 1280), "negative_pooled_prompt_embeds": noise(batch, 1280)}
    return arguments | {"generator": [torch.Generator("cpu").manual_seed(i) for i in range(batch)]}

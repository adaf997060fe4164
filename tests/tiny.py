"""Tiny random-weight pipelines of every supported kind, built from config in well under a second each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)

WIDTH = 16  # of the text embeddings
DDIM: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


def tiny_unet(seed: int = 0, *, sdxl: bool = False, in_channels: int = 4, layers: int = 2) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": in_channels,
        "out_channels": 4,
        "layers_per_block": layers,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
    }
    if sdxl:
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 2, 2),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + WIDTH,
            **common,
        )
    else:
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            **common,
        )
    return unet.eval()


def tiny_vae(seed: int = 1) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    ).eval()


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 2) -> ControlNetModel:
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:  # zero at start would hide everything
        torch.nn.init.normal_(block.weight, std=0.2)
    # the tiny autoencoder shrinks by 2, stock condition embeddings by 8
    for conv in net.controlnet_cond_embedding.blocks:
        if conv.stride == (2, 2) and net.controlnet_cond_embedding.blocks[1] is not conv:
            conv.stride = (1, 1)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.2)
    return net.eval()


def _sd(cls: Any, **parts: Any) -> Any:
    parts = {"unet": tiny_unet(), **parts}
    pipe = cls(
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=DDIMScheduler(**DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sdxl(cls: Any, **parts: Any) -> Any:
    parts = {"unet": tiny_unet(sdxl=True), **parts}
    pipe = cls(
        vae=tiny_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd() -> StableDiffusionPipeline:
    return _sd(StableDiffusionPipeline)


def tiny_lcm(cls: Any, **parts: Any) -> Any:
    """A latent consistency pipeline: its UNet takes the guidance scale, its scheduler a share of a longer run."""
    config = {name: value for name, value in tiny_unet().config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    pipe = _sd(cls, unet=UNet2DConditionModel(**config | {"time_cond_proj_dim": 8}).eval(), **parts)
    pipe.scheduler = LCMScheduler(**DDIM)
    return pipe


def tiny_sdxl() -> StableDiffusionXLPipeline:
    return _sdxl(StableDiffusionXLPipeline)


def tiny_pipeline(kind: str) -> Any:
    """A pipeline by kind; see KINDS."""
    if kind in ("sd", "sdxl"):
        return {"sd": tiny_sd, "sdxl": tiny_sdxl}[kind]()
    if kind == "sd-img2img":
        return _sd(StableDiffusionImg2ImgPipeline)
    if kind == "sd-inpaint":
        return _sd(StableDiffusionInpaintPipeline, unet=tiny_unet(in_channels=9))
    if kind == "sdxl-img2img":
        return _sdxl(StableDiffusionXLImg2ImgPipeline)
    if kind in ("controlnet", "controlnet-guess"):
        unet = tiny_unet()
        return _sd(StableDiffusionControlNetPipeline, unet=unet, controlnet=tiny_controlnet(unet))
    if kind == "multi-controlnet":
        unet = tiny_unet()
        nets = [tiny_controlnet(unet, 2), tiny_controlnet(unet, 3)]
        return _sd(StableDiffusionControlNetPipeline, unet=unet, controlnet=nets)
    if kind == "sdxl-controlnet":
        unet = tiny_unet(sdxl=True)
        return _sdxl(StableDiffusionXLControlNetPipeline, unet=unet, controlnet=tiny_controlnet(unet))
    if kind == "t2i-adapter":
        torch.manual_seed(4)
        adapter = T2IAdapter(in_channels=3, channels=[8, 16, 16], num_res_blocks=1, downscale_factor=2)
        return _sd(StableDiffusionAdapterPipeline, adapter=adapter.eval())
    raise ValueError(kind)


KINDS = (
    "sd",
    "sd-img2img",
    "sd-inpaint",
    "controlnet",
    "controlnet-guess",
    "multi-controlnet",
    "t2i-adapter",
    "sdxl",
    "sdxl-img2img",
    "sdxl-controlnet",
)


def tiny_inputs(
    kind: str, *, images: int = 1, size: tuple[int, int] = (32, 32), steps: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Call arguments for `tiny_pipeline(kind)`: every image has its own generator and its own prompt."""
    maker = torch.Generator().manual_seed(100)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=maker)

    height, width = size
    inputs: dict[str, Any] = {
        "prompt_embeds": torch.cat([noise(1, 5, WIDTH) for _ in range(images)]),
        "negative_prompt_embeds": torch.cat([noise(1, 5, WIDTH)] * images),
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(images)],
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "output_type": "pt",
    }
    picture = torch.rand(1, 3, height, width, generator=maker)
    if kind.startswith("sdxl"):
        inputs["pooled_prompt_embeds"] = noise(images, WIDTH)
        inputs["negative_pooled_prompt_embeds"] = noise(1, WIDTH).expand(images, -1)
    if "img2img" in kind:
        inputs |= {"image": picture.expand(images, -1, -1, -1), "strength": 0.95}
    elif kind == "sd-inpaint":
        mask = torch.zeros(1, 1, height, width)
        mask[..., : height // 2, :] = 1
        inputs |= {"image": picture.expand(images, -1, -1, -1), "mask_image": mask.expand(images, -1, -1, -1)}
        inputs |= {"height": height, "width": width}
    elif "controlnet" in kind:
        inputs |= {
            "image": [picture, 1 - picture] if kind.startswith("multi") else picture,
            "height": height,
            "width": width,
        }
        inputs |= {"controlnet_conditioning_scale": [0.7, 0.4] if kind.startswith("multi") else 0.7}
        inputs["guess_mode"] = kind.endswith("guess")
    elif kind == "t2i-adapter":
        inputs |= {"image": [picture] * images, "height": height, "width": width}
    else:
        inputs |= {"height": height, "width": width}
    return inputs


def run(pipe: Any, kind: str, **options: Any) -> torch.Tensor:
    """Pictures (n, 3, h, w) of one call."""
    images = pipe(**tiny_inputs(kind, **options)).images
    return torch.as_tensor(images).float()


def load_lora(pipe: Any) -> None:
    """A LoRA with large weights on the text projections of a UNet."""
    from peft import LoraConfig

    torch.manual_seed(7)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_v"]))
    for name, weight in pipe.unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.5)

"""Tiny random-weight pipelines around every supported diffusion transformer, built from config without any download.

Prompts are embeddings, so no text encoder is needed. Sizes are given in latent cells; every pipeline here makes 8 pixels
of one cell, Sana 32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    CogVideoXDDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

TEXT = 16  # width of the text embeddings
TOKENS = 5  # of a prompt; a negative prompt has as many
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _randomise(network: nn.Module, seed: int) -> Any:
    """Weights that let every part act: those that start at zero or one, and the modulations, get random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() < 2:
                weight.copy_(weight + 0.1 * noise if bool((weight == 1).all()) else 0.1 * noise)
            elif name.endswith("scale_shift_table"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return network.eval()


def _network(cls: str, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # FluxControlNetModel uses an old name of its position embedding
        return _randomise(getattr(diffusers, cls)(**config), seed + 10)


def tiny_vae(channels: int = 4, seed: int = 1) -> AutoencoderKL:
    """8 pixels per latent cell."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=64,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    with torch.no_grad():  # next to no spread, so that an encoded picture does not depend on its batch
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -30
    return vae.eval()


def _flux2_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(1)
    return AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=64,
    ).eval()


# --- networks ---

_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
_FLUX: dict[str, Any] = {
    **_HEADS,
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 3,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "axes_dims_rope": (2, 2, 4),
}
_SD3: dict[str, Any] = {
    **_HEADS,
    "sample_size": 8,
    "in_channels": 4,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 16,
    "pooled_projection_dim": TEXT,
    "out_channels": 4,
    "pos_embed_max_size": 12,
}
_HUNYUAN: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 16,
    "mlp_ratio": 2.0,
    "cross_attention_dim": TEXT,
    "cross_attention_dim_t5": TEXT,
    "pooled_projection_dim": 16,
    "text_len": TOKENS,
    "text_len_t5": TOKENS,
}
_WAN: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
_SANA: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": TEXT,
    "sample_size": 8,
}


def _sd3(**more: Any) -> Any:
    return _network("SD3Transformer2DModel", **{"num_layers": 4, **_SD3, **more})


def _flux(*, guidance: bool) -> Any:
    return _network("FluxTransformer2DModel", guidance_embeds=guidance, **_FLUX)


def _flux2() -> Any:
    shape = {**_FLUX, "axes_dims_rope": (2, 2, 2, 2)}
    shape.pop("pooled_projection_dim")
    return _network("Flux2Transformer2DModel", timestep_guidance_channels=16, **shape)


def _pixart(**more: Any) -> Any:
    return _network(
        "PixArtTransformer2DModel",
        **{
            "num_attention_heads": 3,  # resolution and aspect ratio take a third of the width each
            "attention_head_dim": 8,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "caption_channels": TEXT,
            "sample_size": 8,
            "norm_num_groups": 4,
            **more,
        },
    )


def _hunyuan() -> Any:
    return _network("HunyuanDiT2DModel", num_layers=6, **_HUNYUAN)


def _wan(seed: int = 0) -> Any:
    return _network("WanTransformer3DModel", seed, **_WAN)


def _lumina_next() -> Any:
    return _network(
        "LuminaNextDiT2DModel",
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT,
    )


def _lumina2() -> Any:
    return _network(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=TEXT,
    )


def _auraflow() -> Any:
    return _network(
        "AuraFlowTransformer2DModel",
        **_HEADS,
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )


def _dit() -> Any:
    return _network("DiTTransformer2DModel", **_HEADS, sample_size=8, out_channels=8, num_layers=4, norm_num_groups=4)


def _qwen() -> Any:
    return _network(
        "QwenImageTransformer2DModel",
        **_HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )


def _z_image() -> Any:
    return _network(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 64, 64],
    )


def _cogview4() -> Any:
    return _network(
        "CogView4Transformer2DModel",
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )


def _cogvideox() -> Any:
    return _network(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )


# --- pipelines ---


def _flow() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _shifting_flow() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _dpm() -> Any:
    return DPMSolverMultistepScheduler(**BETAS)


def _flow_dpm() -> Any:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _flow_unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _ddpm() -> Any:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


def _cog_ddim() -> Any:
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0)


_ONE = ("text_encoder", "tokenizer")
_TWO = (*_ONE, "text_encoder_2", "tokenizer_2")
_THREE = (*_TWO, "text_encoder_3", "tokenizer_3")
_SAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _sd3_control() -> Any:
    return _network("SD3ControlNetModel", 2, num_layers=2, **_SD3)


def _flux_control() -> Any:
    return _network("FluxControlNetModel", 2, **{**_FLUX, "num_layers": 1, "num_single_layers": 1})


def _hunyuan_control() -> Any:
    return _network("HunyuanDiT2DControlNetModel", 2, transformer_num_layers=6, **_HUNYUAN)


def _sana_control() -> Any:
    return _network("SanaControlNetModel", 2, **{**_SANA, "num_layers": 2})


# kind: pipeline class, names of the encoders that are left out, scheduler, components
_PIPELINES: dict[str, tuple[str, tuple[str, ...], Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "sd3": ("StableDiffusion3Pipeline", _THREE, _flow, lambda: {"transformer": _sd3()}),
    "sd3-img2img": (
        "StableDiffusion3Img2ImgPipeline",
        _THREE,
        _flow,
        lambda: {"transformer": _sd3(), "vae": tiny_vae()},
    ),
    "sd3-inpaint": (
        "StableDiffusion3InpaintPipeline",
        _THREE,
        _flow,
        lambda: {"transformer": _sd3(in_channels=16, out_channels=16), "vae": tiny_vae(16)},  # it insists on 16
    ),
    "sd3-controlnet": (
        "StableDiffusion3ControlNetPipeline",
        _THREE,
        _flow,
        lambda: {"transformer": _sd3(), "vae": tiny_vae(), "controlnet": _sd3_control()},
    ),
    "sd3.5-medium": (
        "StableDiffusion3Pipeline",
        _THREE,
        _flow,
        lambda: {"transformer": _sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")},
    ),
    "sd3.5-large": ("StableDiffusion3Pipeline", _THREE, _flow, lambda: {"transformer": _sd3(qk_norm="rms_norm")}),
    "flux-dev": ("FluxPipeline", _TWO, _shifting_flow, lambda: {"transformer": _flux(guidance=True)}),
    "flux-schnell": ("FluxPipeline", _TWO, _flow, lambda: {"transformer": _flux(guidance=False)}),
    "flux-cfg": ("FluxPipeline", _TWO, _shifting_flow, lambda: {"transformer": _flux(guidance=True)}),
    "flux-img2img": (
        "FluxImg2ImgPipeline",
        _TWO,
        _shifting_flow,
        lambda: {"transformer": _flux(guidance=True), "vae": tiny_vae()},
    ),
    "flux-controlnet": (
        "FluxControlNetPipeline",
        _TWO,
        _shifting_flow,
        lambda: {"transformer": _flux(guidance=True), "vae": tiny_vae(), "controlnet": _flux_control()},
    ),
    "flux2": ("Flux2Pipeline", _ONE, _shifting_flow, lambda: {"transformer": _flux2(), "vae": _flux2_vae()}),
    "flux2-klein": (
        "Flux2KleinPipeline",
        _ONE,
        _shifting_flow,
        lambda: {"transformer": _flux2(), "vae": _flux2_vae()},
    ),
    "pixart-alpha": (
        "PixArtAlphaPipeline",
        _ONE,
        _dpm,
        lambda: {"transformer": _pixart(use_additional_conditions=True, sample_size=128)},
    ),
    "pixart-sigma": ("PixArtSigmaPipeline", _ONE, _dpm, lambda: {"transformer": _pixart()}),
    "hunyuan": ("HunyuanDiTPipeline", _TWO, _ddpm, lambda: {"transformer": _hunyuan(), **_SAFE}),
    "hunyuan-controlnet": (
        "HunyuanDiTControlNetPipeline",
        _TWO,
        _ddpm,
        lambda: {"transformer": _hunyuan(), "vae": tiny_vae(), "controlnet": _hunyuan_control(), **_SAFE},
    ),
    "lumina-next": ("LuminaPipeline", _ONE, _flow, lambda: {"transformer": _lumina_next()}),
    "lumina2": ("Lumina2Pipeline", _ONE, _flow, lambda: {"transformer": _lumina2()}),
    "auraflow": ("AuraFlowPipeline", _ONE, _flow, lambda: {"transformer": _auraflow()}),
    "sana": ("SanaPipeline", _ONE, _flow_dpm, lambda: {"transformer": _network("SanaTransformer2DModel", **_SANA)}),
    "dit": ("DiTPipeline", (), _dpm, lambda: {"transformer": _dit(), "vae": tiny_vae()}),
    "qwen-image": ("QwenImagePipeline", _ONE, _shifting_flow, lambda: {"transformer": _qwen()}),
    "z-image": ("ZImagePipeline", _ONE, _flow, lambda: {"transformer": _z_image()}),
    "cogview4": ("CogView4Pipeline", _ONE, _shifting_flow, lambda: {"transformer": _cogview4()}),
    "wan": ("WanPipeline", _ONE, _flow_unipc, lambda: {"transformer": _wan()}),
    "wan-2.2": (
        "WanPipeline",
        _ONE,
        _flow_unipc,
        lambda: {"transformer": _wan(), "transformer_2": _wan(1), "boundary_ratio": 0.7},
    ),
    "cogvideox": ("CogVideoXPipeline", _ONE, _cog_ddim, lambda: {"transformer": _cogvideox()}),
}

KINDS = tuple(_PIPELINES)
UNGUIDED = ("flux-dev", "flux-schnell", "flux2")  # guidance is distilled into them: one branch only
SEPARATE = (
    "flux-cfg",
    "flux-img2img",
    "flux-controlnet",
    "flux2-klein",
    "lumina2",
    "qwen-image",
    "cogview4",
    "wan",
    "wan-2.2",
)
# Pipelines without callback_on_step_end, and pipelines that never look whether they were interrupted.
NO_INTERRUPT = ("pixart-alpha", "pixart-sigma", "dit", "lumina-next", "lumina2", "auraflow")
SQUARE_ONLY = ("dit",)


def guided(kind: str) -> bool:
    """Whether the pipeline of this kind runs two guidance branches in a default `run`."""
    return kind not in UNGUIDED


def tiny_pipeline(kind: str, scheduler: Any = None) -> Any:
    """A pipeline by kind, with another scheduler if one is given; see KINDS."""
    name, encoders, make_scheduler, components = _PIPELINES[kind]
    parts: dict[str, Any] = {"vae": None, **dict.fromkeys(encoders), **components()}
    pipe = getattr(diffusers, name)(scheduler=scheduler or make_scheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- calls ---


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rows(batch: int, first: int, seed: int, *shape: int) -> torch.Tensor:
    """One row per image; image k gets the same row in every batch."""
    return torch.stack([_noise(seed + 50 * (first + k), *shape) for k in range(batch)])


def _prompts(batch: int, first: int) -> dict[str, Any]:
    return {
        "prompt_embeds": 2 * _rows(batch, first, 100, TOKENS, TEXT),
        "negative_prompt_embeds": 2 * _rows(1, 0, 101, TOKENS, TEXT).expand(batch, -1, -1).clone(),
    }


def _pooled(batch: int, first: int) -> dict[str, Any]:
    return {
        "pooled_prompt_embeds": _rows(batch, first, 102, TEXT),
        "negative_pooled_prompt_embeds": _rows(1, 0, 103, TEXT).expand(batch, -1).clone(),
    }


def _masks(batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The last token is padding, in the negative prompts the last two."""
    mask = torch.ones(batch, TOKENS, dtype=dtype)
    mask[:, -1] = 0
    negative = mask.clone()
    negative[:, -2] = 0
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": negative}


def _picture(batch: int, first: int, height: int, width: int) -> torch.Tensor:
    return _rows(batch, first, 104, 3, height, width).sigmoid()


def tiny_inputs(
    kind: str,
    *,
    batch: int = 1,
    first: int = 0,
    size: tuple[int, int] = (8, 8),
    steps: int = 8,
    seed: int = 0,
    guidance: float = 4.0,
) -> dict[str, Any]:
    """Call arguments: images `first` to `first + batch - 1`, each with its own prompt and generator.

    Args:
        size: latent rows and columns.
        guidance: scale of classifier-free guidance; 1 runs without it.
    """
    cell = 32 if kind == "sana" else 8
    height, width = size[0] * cell, size[1] * cell
    if kind == "z-image" and guidance <= 1:
        guidance = 0.0  # it guides with any scale above 0
    common: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(seed + first + k) for k in range(batch)],
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    if kind == "dit":
        return {**common, "class_labels": [3 + first + k for k in range(batch)], "output_type": "pt"}
    common |= {"height": height, "width": width, "output_type": "latent"}
    inputs = {**common, **_prompts(batch, first)}
    if kind.startswith("sd3"):
        inputs |= _pooled(batch, first)
    elif kind.startswith("flux2"):
        if kind == "flux2":
            del inputs["negative_prompt_embeds"]
    elif kind.startswith("flux"):
        inputs |= _pooled(batch, first) | {"guidance_scale": 3.5, "true_cfg_scale": guidance}
        if kind in UNGUIDED:
            for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds", "true_cfg_scale"):
                del inputs[name]
    elif kind.startswith("pixart") or kind == "sana":
        inputs |= _masks(batch) | {"use_resolution_binning": False, "negative_prompt": None}
    elif kind.startswith("hunyuan"):
        inputs |= _masks(batch) | {"use_resolution_binning": False}
        inputs |= {name + "_2": value for name, value in {**_prompts(batch, first + 9), **_masks(batch)}.items()}
    elif kind in ("lumina-next", "lumina2", "auraflow"):
        inputs |= _masks(batch, torch.long)
    elif kind == "qwen-image":
        del inputs["guidance_scale"]
        mask = torch.ones(batch, TOKENS, dtype=torch.long)
        inputs |= {"true_cfg_scale": guidance, "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    elif kind == "z-image":
        inputs |= {name: list(inputs[name]) for name in ("prompt_embeds", "negative_prompt_embeds")}
    elif kind.startswith("wan") or kind == "cogvideox":
        inputs["num_frames"] = 5
    return inputs | _pictures(kind, batch, first, height, width)


def _pictures(kind: str, batch: int, first: int, height: int, width: int) -> dict[str, Any]:
    picture = _picture(batch, first, height, width)
    if kind.endswith("img2img"):
        return {"image": picture, "strength": 0.8}
    if kind.endswith("inpaint"):
        mask = torch.zeros(batch, 1, height, width)
        mask[..., : height // 2, :] = 1
        return {"image": picture, "mask_image": mask, "strength": 0.8}
    if kind.endswith("controlnet"):
        return {"control_image": picture, "controlnet_conditioning_scale": 0.7}
    return {}


def call(pipe: Any, kind: str, *, changes: dict[str, Any] | None = None, **options: Any) -> torch.Tensor:
    """One call with `tiny_inputs(kind, **options)` and pipeline arguments `changes` on top."""
    torch.manual_seed(0)  # ControlNet pipelines draw the encoded picture from the global generator
    output = pipe(**{**tiny_inputs(kind, **options), **(changes or {})})
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images).float()


_OPTIONS = ("batch", "first", "size", "steps", "seed", "guidance")


def run(pipe: Any, kind: str, **changes: Any) -> torch.Tensor:
    """Latents of one call (DiT: pictures). `changes` are options of `tiny_inputs` or arguments of the pipeline."""
    options = {name: changes.pop(name) for name in _OPTIONS if name in changes}
    return call(pipe, kind, changes=changes, **options)

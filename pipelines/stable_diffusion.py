"""Stable Diffusion 1.x, 2.x and XL: how their pipelines call the UNet and the networks beside it."""

from __future__ import annotations

from diffaccel.pipelines.conventions import Convention

# `timestep` is a scalar in these pipelines; scalars and tensors of other sizes are left alone.
_UNET_ARGUMENTS = frozenset(
    {
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "encoder_attention_mask",
        "added_cond_kwargs",
        "cross_attention_kwargs.gligen",
        "controlnet_cond",
        "control_type",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    }
)

_SD = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionAdapterPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
_SDXL = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLAdapterPipeline",
)

GENERIC_UNET = Convention("unet", "unet", batched=_UNET_ARGUMENTS)
CONVENTIONS = (
    Convention(
        "stable-diffusion",
        "unet",
        batched=_UNET_ARGUMENTS,
        pipelines=_SD,
        schedule="StableDiffusionTimesteps",
    ),
    # SDXL's outer layers are cheap (depth 2 costs 7 % of a step) and refresh the 64 x 64 text layers.
    Convention(
        "stable-diffusion-xl",
        "unet",
        batched=_UNET_ARGUMENTS,
        pipelines=_SDXL,
        schedule="StableDiffusionXLTimesteps",
        default_depth=2,
    ),
    Convention(
        "latent-diffusion",
        "unet",
        batched=_UNET_ARGUMENTS,
        pipelines=("LDMTextToImagePipeline",),
        images=lambda call: 1 if isinstance(call["prompt"], str) else len(call["prompt"]),
    ),
    # Depth, normals and intrinsics from a picture: no guidance, and one run of the scheduler for each batch of pictures.
    Convention(
        "marigold",
        "unet",
        batched=_UNET_ARGUMENTS,
        row_order=("cond",),
        pipelines=("MarigoldDepthPipeline", "MarigoldNormalsPipeline", "MarigoldIntrinsicsPipeline"),
    ),
    Convention(
        "instruct-pix2pix",
        "unet",
        pipelines=("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
        refusal="it stacks three guidance branches (text and image, image, none), which no method here knows how to drop.",
    ),
    Convention(
        "perturbed-attention",
        "unet",
        mixins=("PAGMixin",),
        refusal="it adds a third, perturbed branch whose attention processors would be cached with the others.",
    ),
    Convention(
        "self-attention-guidance",
        "unet",
        pipelines=("StableDiffusionSAGPipeline",),
        refusal="it calls the UNet again inside each step and reads its attention maps.",
    ),
    Convention(
        "attention-editing",
        "unet",
        pipelines=(
            "StableDiffusionAttendAndExcitePipeline",
            "LEditsPPPipelineStableDiffusion",
            "LEditsPPPipelineStableDiffusionXL",
            "SemanticStableDiffusionPipeline",
            "StableDiffusionDiffEditPipeline",
            "StableDiffusionPanoramaPipeline",
            "StableDiffusionControlNetXSPipeline",
            "StableDiffusionXLControlNetXSPipeline",
        ),
        refusal="it calls its UNet several times per step or optimises through it.",
    ),
)

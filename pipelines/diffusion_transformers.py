"""Diffusion transformers: how their pipelines call them.

Row orders, separate calls and units of time were read in diffusers 0.42; the shared battery checks each entry.
"""

from __future__ import annotations

from diffaccel.pipelines.conventions import Convention

# Of named arguments, scalars and tensors of other sizes are left alone. Position tables (img_ids, txt_ids,
# image_rotary_emb) have no batch dimension and are not named, because their length may equal the rows by chance.
_ARGUMENTS = frozenset(
    {
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "pooled_projections",
        "guidance",
        "attention_mask",
        "encoder_attention_mask",
        "encoder_hidden_states_mask",
        "encoder_mask",
        "added_cond_kwargs",
        "joint_attention_kwargs.ip_adapter_image_embeds",
        "text_embedding_mask",
        "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
        "image_meta_size",
        "style",
        "class_labels",
        "original_size",
        "target_size",
        "crop_coords",
        "timestep_cond",
        "ofs",
        "encoder_hidden_states_image",
        "controlnet_cond",
        "controlnet_mode",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "block_controlnet_hidden_states",
    }
)


def _family(name: str, *pipelines: str, **facts: object) -> Convention:
    settings = {"sample": "hidden_states", "batched": _ARGUMENTS, "scheduler_time": False, **facts}
    return Convention(name, "transformer", pipelines=pipelines, **settings)  # type: ignore[arg-type]


CONVENTIONS = (
    _family(
        "stable-diffusion-3",
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    ),
    _family(
        "flux",
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        calls="separate",
    ),
    _family(
        "flux2-klein-kv",
        "Flux2KleinKVPipeline",
        refusal="it keeps keys and values of its reference pictures between steps, which no method here knows.",
    ),
    _family("flux2", "Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", calls="separate"),
    _family("pixart", "PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    _family("hunyuan-dit", "HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", default_depth=1),
    _family("lumina-next", "LuminaPipeline", row_order=("cond", "uncond"), prediction_sign=-1),
    _family(
        "lumina2",
        "Lumina2Pipeline",
        calls="separate",
        prediction_sign=-1,
        lengths=frozenset({"encoder_attention_mask"}),  # padding of prompts is cut off inside the network
    ),
    _family("auraflow", "AuraFlowPipeline"),
    _family(
        "sana-sprint",
        "SanaSprintPipeline",
        "SanaSprintImg2ImgPipeline",
        refusal="it is distilled to one to four steps of a solver of its own: there is nothing left to save.",
    ),
    _family("sana", "SanaPipeline", "SanaControlNetPipeline"),
    _family("dit", "DiTPipeline", row_order=("cond", "uncond"), images=lambda call: len(call["class_labels"])),
    _family(
        "qwen-image",
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        calls="separate",
        listed=frozenset({"img_shapes"}),
    ),
    _family(
        "z-image",
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        row_order=("cond", "uncond"),
        sample="x",
        batched=frozenset({"x", "t", "cap_feats"}),
        listed=frozenset({"x", "cap_feats"}),
        prediction_sign=-1,
    ),
    _family("cogview4", "CogView4Pipeline", calls="separate"),
    _family("wan", "WanPipeline", "WanImageToVideoPipeline", calls="separate", others=("transformer_2",)),
    _family("cogvideox", "CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
)

"""A ControlNet beside the UNet: cached steps save in both. The ControlNet here is untrained and adds nothing yet."""

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import diffaccel

base = diffaccel.load_miniature("shapes-sd")
pipe = StableDiffusionControlNetPipeline(
    **base.components, controlnet=ControlNetModel.from_unet(base.unet), requires_safety_checker=False
)
pipe.set_progress_bar_config(disable=True)
outline = torch.zeros(1, 3, 128, 128)
outline[:, :, 40:88, 40:88] = 1

fast = diffaccel.wrap(pipe, "balanced")
fast("a red square", image=outline, num_inference_steps=20, generator=torch.Generator().manual_seed(0))
networks = {entry.network for entry in fast.report.trace}
print(networks, f"{fast.report.flops_ratio:.2f} times fewer FLOPs, ControlNet included")

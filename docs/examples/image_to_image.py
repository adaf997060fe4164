"""Image-to-image on the parts of a text-to-image pipeline: its own pipeline class is wrapped as it is."""

import torch
from diffusers import StableDiffusionImg2ImgPipeline

import diffaccel

base = diffaccel.load_miniature("shapes-sd")
base.set_progress_bar_config(disable=True)
drawing = base("a red square", num_inference_steps=10, generator=torch.Generator().manual_seed(3)).images[0]

pipe = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
pipe.set_progress_bar_config(disable=True)
fast = diffaccel.wrap(pipe, "balanced")
image = fast(
    "a blue square",
    image=drawing,
    strength=0.8,
    num_inference_steps=30,
    generator=torch.Generator().manual_seed(3),
).images[0]
image.save("blue.png")
print(fast.report)  # 24 of the 30 steps are left by the strength; most of them are cached

"""Wrap a pipeline, make a picture, read what ran, and see that the pipeline is stock again."""

import torch

import diffaccel

PROMPT, STEPS = "a red square above a blue circle", 30


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


pipe = diffaccel.load_miniature("shapes-sd")
pipe.set_progress_bar_config(disable=True)
plain = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=2.5, generator=seeded()).images[0]

fast = diffaccel.wrap(pipe, "balanced")
image = fast(PROMPT, num_inference_steps=STEPS, guidance_scale=2.5, generator=seeded()).images[0]
image.save("balanced.png")

report = fast.report
print(report)
print(f"{report.evaluations} evaluations, {report.flops_ratio:.2f} times fewer FLOPs than plain")

again = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=2.5, generator=seeded()).images[0]
assert again.tobytes() == plain.tobytes()  # outside a wrapped call nothing has changed

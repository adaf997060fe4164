"""Another pipeline: a sampling loop of your own around a transformer that diffaccel knows."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffaccel
from diffaccel.pipelines import diffusion_transformers
from diffaccel.pipelines.conventions import Convention


class TwoPromptPipeline(DiffusionPipeline):
    """Stable Diffusion 3 whose picture is guided away from a second prompt. Both prompts are rows of one call."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def prepare_latents(self, images: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(images, 4, 16, 16, generator=generator)

    @torch.no_grad()
    def __call__(self, toward: Any, away: Any, num_inference_steps: int = 20, scale: float = 3.0) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.prepare_latents(1, torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            both = self.transformer(
                hidden_states=torch.cat([latents] * 2),
                timestep=t.expand(2),
                encoder_hidden_states=torch.cat([away[0], toward[0]]),
                pooled_projections=torch.cat([away[1], toward[1]]),
                return_dict=False,
            )[0]
            bad, good = both.chunk(2)
            latents = self.scheduler.step(bad + scale * (good - bad), t, latents, return_dict=False)[0]
        return latents


parent = diffaccel.load_miniature("shapes-sd3")
pipe = TwoPromptPipeline(parent.transformer, parent.scheduler)
try:
    diffaccel.wrap(pipe, "balanced")
except diffaccel.Unsupported as error:
    print(error)  # nobody has told how it calls its network

entry = Convention(
    "two-prompts",
    "transformer",
    sample="hidden_states",
    row_order=("uncond", "cond"),  # the order in which the branches are stacked
    batched=frozenset({"hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"}),
    scheduler_time=False,
    pipelines=("TwoPromptPipeline",),
)
diffusion_transformers.CONVENTIONS += (entry,)  # in a checkout: a line in pipelines/diffusion_transformers.py


def read(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, pooled, _ = parent.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    return rows, pooled


toward, away = read("a red square"), read("a blue circle")
plain = pipe(toward, away)
nothing = diffaccel.wrap(pipe, "off")
assert torch.equal(nothing(toward, away), plain)  # the first thing to check

fast = diffaccel.wrap(pipe, [diffaccel.Forecast(interval=3), diffaccel.GuidanceInterval(stop_fraction=0.5)])
latents = fast(toward, away)
print(fast.report)
assert torch.equal(pipe(toward, away), plain)  # and it is stock again

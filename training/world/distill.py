"""A few-step variant of emoji-sd: a LoRA that answers in 4 to 8 steps without guidance.

Consistency distillation (Song et al. 2023) in the form of LCM-LoRA (Luo et al. 2023): the student's answer at a noisy
step agrees with its own answer at the step the guided teacher's DDIM solver leads to. For `LCMScheduler`.

python -m training.world.distill --minutes 40 --sizes 128:1,256:2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel

from training.train_unet import Noising, build_scheduler
from training.world.denoise import Batch, Pool, parse_shares
from training.world.learner import Learner, Plan, add_options, load_averaged, plan_of, train
from training.world.train_text import load_text
from training.world.unet import load_unet, use_plain_attention

RANK = 32
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
GUIDANCE = 3.0
SOLVER_STEPS = 50
BATCH = 32
RATE, AVERAGE = 5e-4, 0.99
# How LCMScheduler weighs what goes in against what the network says.
DATA_SPREAD, STEP_SCALING = 0.5, 10.0


def add_lora(unet: UNet2DConditionModel) -> None:
    """Freeze `unet` and give it a LoRA that begins without effect."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(TARGETS)))


def column(table: Tensor, steps: Tensor) -> Tensor:
    """Values of a table at each row's step, to multiply (n, c, h, w) with."""
    return table.to(steps.device)[steps].view(-1, 1, 1, 1)


class ConsistencyLoss:
    """How far the student's answer at a step is from its answer one solver step earlier, from the step's number."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel, pool: Pool, device: str) -> None:
        self.unet, self.text, self.pool, self.device = unet, text.to(device), pool, device
        self.noising = Noising.of(build_scheduler())
        self.stride = len(self.noising.signal) // SOLVER_STEPS
        self.empty = next(iter(pool.captions.values())).empty

    def clean(self, noised: Tensor, velocity: Tensor, steps: Tensor) -> Tensor:
        return column(self.noising.signal, steps) * noised - column(self.noising.noise, steps) * velocity

    def velocity(self, noised: Tensor, steps: Tensor, words: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            output: Tensor = self.unet(noised, steps, words).sample
        return output.float()

    def consistent(self, noised: Tensor, steps: Tensor, words: Tensor) -> Tensor:
        """The student's answer; at step 0 it is what went in."""
        scaled = (steps * STEP_SCALING).view(-1, 1, 1, 1)
        keep = DATA_SPREAD**2 / (scaled**2 + DATA_SPREAD**2)
        answer = self.clean(noised, self.velocity(noised, steps, words), steps)
        return keep * noised + scaled / (scaled**2 + DATA_SPREAD**2).sqrt() * answer

    @torch.no_grad()
    def earlier(self, noised: Tensor, steps: Tensor, before: Tensor, words: Tensor, empty: Tensor) -> Tensor:
        """One DDIM step of the guided teacher, from `steps` to `before`."""
        self.unet.disable_adapters()
        pair = self.velocity(torch.cat([noised] * 2), torch.cat([steps] * 2), torch.cat([words, empty]))
        self.unet.enable_adapters()
        with_words, without = pair.chunk(2)
        velocity = without + GUIDANCE * (with_words - without)
        clean = self.clean(noised, velocity, steps)
        noise = column(self.noising.noise, steps) * noised + column(self.noising.signal, steps) * velocity
        return column(self.noising.signal, before) * clean + column(self.noising.noise, before) * noise

    @torch.no_grad()
    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Text rows of the batch's captions, and of the empty caption as often."""
        ids = torch.cat([batch.ids, self.empty.expand_as(batch.ids)]).to(self.device)
        words, empty = self.text(ids).last_hidden_state.chunk(2)
        return words, empty

    def __call__(self, step: int) -> Tensor:
        batch = self.pool.draw(step)
        later = ((batch.places * SOLVER_STEPS).long().clamp(max=SOLVER_STEPS - 1) + 1) * self.stride - 1
        steps, before = later.to(self.device), (later - self.stride).clamp(min=0).to(self.device)
        words, empty = self.states(batch)
        noised = self.noising.mix(batch.clean, batch.noise, later)[0].to(self.device)
        less_noised = self.earlier(noised, steps, before, words, empty)
        with torch.no_grad():
            target = self.consistent(less_noised, before, words)
        return nn.functional.huber_loss(self.consistent(noised, steps, words), target, delta=0.1)


def train_lora(out: Path, plan: Plan, shares: dict[int, float], device: str = "cpu", seed: int = 9) -> None:
    """Train or continue the LoRA on the averaged UNet of `out`; kept in `out/few_steps.pt`."""
    torch.manual_seed(seed)
    tokenizer, text = load_text(out)
    unet = load_unet(out).to(device)
    use_plain_attention(unet, device)
    add_lora(unet)
    pool = Pool(out, tokenizer, shares, BATCH, seed)
    train(Learner(unet, out / "few_steps.pt", plan), ConsistencyLoss(unet, text, pool, device), "few steps")


def save_lora(out: Path, to: Path) -> None:
    """Write the averaged LoRA of `out` into `to`, as `load_lora_weights` reads it."""
    weights = load_averaged(out / "few_steps.pt", "training.world.distill")
    unet = load_unet(out)
    add_lora(unet)
    unet.load_state_dict(weights)
    layers = {name: value.half().contiguous() for name, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(to, unet_lora_layers=layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, minutes=40, rate=RATE, average=AVERAGE)
    parser.add_argument("--sizes", type=parse_shares, default={128: 1.0, 256: 2.0}, help="pixels and shares")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_lora(options.out, plan_of(options), options.sizes, options.device)


if __name__ == "__main__":
    main()

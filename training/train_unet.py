"""Train the denoiser on cached latents with the frozen text encoder.

python -m training.train_unet --out training/out --minutes 75
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffaccel.miniatures.scenes import Scene, caption
from training import make_latents
from training.common import (
    DEFAULT_OUT,
    Average,
    Clock,
    learning_rate,
    load_checkpoint,
    save_atomically,
    seeded,
    set_rate,
)
from training.train_text import LENGTH, WIDTH, build_text_encoder, tokenize

CHANNELS, HEADS = (48, 96, 160), (2, 3, 5)
BATCH = 48
PEAK_RATE = 1e-3
HOLD = 0.35
EMPTY_SHARE = 0.1
NOISE_MEAN, NOISE_SPREAD = 0.1, 1.2
SAVE_SECONDS = 120.0


def build_unet() -> UNet2DConditionModel:
    """A denoiser of 5.7 M parameters; self- and cross-attention at 16 x 16, 8 x 8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM with v-prediction; the noise grows further than Stable Diffusion's, to a signal of 1.5 %.

    With Stable Diffusion's own end (6.8 %) the mean brightness of so small a latent leaks into the last step.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def load_text(out: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the averaged text encoder of `out`."""
    saved = load_checkpoint(out / "text.pt")
    if saved is None:
        raise FileNotFoundError(f"no {out / 'text.pt'}: run training.train_text first")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    for parameter, value in zip(encoder.parameters(), saved["average"], strict=False):
        parameter.data.copy_(value)
    return tokenizer, encoder.eval()


class Captions:
    """Token ids of several phrasings per scene, drawn once: a batch then costs one lookup."""

    def __init__(
        self, scenes: Sequence[Scene], tokenizer: CLIPTokenizer, phrasings: int, rng: random.Random
    ) -> None:
        self.phrasings = phrasings
        texts = [caption(scene, rng) for scene in scenes for _ in range(phrasings)]
        rows = [
            tokenize(tokenizer, texts[start : start + 4096]).short() for start in range(0, len(texts), 4096)
        ]
        self.ids = torch.cat(rows).view(len(scenes), phrasings, LENGTH)
        self.empty = tokenize(tokenizer, [""])[0]

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """(n, 32) ids: a random phrasing of each scene, or the empty caption."""
        which = torch.randint(self.phrasings, (len(index),), generator=generator)
        ids = self.ids[index, which].long()
        empty = torch.rand(len(index), generator=generator) < EMPTY_SHARE
        return torch.where(empty[:, None], self.empty, ids)


@dataclass
class Noising:
    """Tables of the forward process: x_t = signal[t] x_0 + noise[t] e, v = signal[t] e - noise[t] x_0."""

    signal: Tensor
    noise: Tensor

    @classmethod
    def of(cls, scheduler: DDIMScheduler) -> Noising:
        return cls(scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt())

    def steps(self, count: int, generator: torch.Generator) -> Tensor:
        """Training steps by a logit-normal law leaning to the noisy side, stratified over the batch."""
        place = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        normal = math.sqrt(2) * torch.erfinv((2 * place - 1).clamp(-0.9999, 0.9999))
        share = torch.sigmoid(NOISE_MEAN + NOISE_SPREAD * normal)
        return (share * len(self.signal)).long().clamp(max=len(self.signal) - 1)

    def mix(self, clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Noised latents and the v target, each like `clean`."""
        a, b = (table[steps].view(-1, 1, 1, 1).to(clean.device) for table in (self.signal, self.noise))
        return a * clean + b * noise, a * noise - b * clean


class Trainer:
    """Model, optimiser, average and data of one run; `train` below is the loop."""

    def __init__(self, out: Path, minutes: float, device: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.path, self.device = out / "unet.pt", device
        self.unet = build_unet().to(device)
        if device == "cpu":  # twice as fast as the fused attention, whose bf16 backward is slow on CPUs
            self.unet.set_attn_processor(AttnProcessor())
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
        )
        self.average = Average(self.unet, 0.9985)
        self.step, spent = 0, 0.0
        saved = load_checkpoint(self.path)
        if saved:
            spent = self._restore(saved)
        self.clock = Clock(minutes, spent)
        rng, self.generator = seeded(seed * 100_000 + self.step)
        self.latents, scenes = make_latents.load(sorted(out.glob("latents_*.pt")))
        self.scale = saved["scale"] if saved else 1 / self.latents.std().item()
        self.latents *= self.scale
        tokenizer, self.text = load_text(out)
        self.text.to(device)
        self.captions = Captions(scenes, tokenizer, 8, rng)
        self.noising = Noising.of(build_scheduler())
        self.order, self.cursor = torch.empty(0, dtype=torch.long), 0

    def _restore(self, saved: dict[str, Any]) -> float:
        self.unet.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.values = [value.to(self.device) for value in saved["average"]]
        self.step = self.average.count = saved["step"]
        return float(saved["seconds"])

    def save(self) -> None:
        state = {
            "model": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "step": self.step,
            "seconds": self.clock.seconds,
            "scale": self.scale,
        }
        save_atomically(state, self.path)

    def next_index(self) -> Tensor:
        """The next BATCH rows of a shuffled pass over the data."""
        if self.cursor + BATCH > len(self.order):
            self.order, self.cursor = torch.randperm(len(self.latents), generator=self.generator), 0
        self.cursor += BATCH
        return self.order[self.cursor - BATCH : self.cursor]

    def loss(self) -> Tensor:
        index = self.next_index()
        ids = self.captions.batch(index, self.generator).to(self.device)
        clean = self.latents[index].to(self.device)
        noise = torch.randn(clean.shape, generator=self.generator).to(self.device)
        steps = self.noising.steps(BATCH, self.generator)
        noised, target = self.noising.mix(clean, noise, steps)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            with torch.no_grad():
                words = self.text(ids).last_hidden_state
            output = self.unet(noised, steps.to(self.device), words).sample
        return nn.functional.mse_loss(output.float(), target)

    def advance(self) -> float:
        """One optimiser step; returns the loss."""
        set_rate(self.optimizer, learning_rate(PEAK_RATE, self.clock.progress, self.step, 200, HOLD))
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.unet)
        self.step += 1
        return loss.item()


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 4) -> UNet2DConditionModel:
    """Train or continue until `minutes` in total are used; returns the averaged model, kept in `out/unet.pt`."""
    trainer = Trainer(out, minutes, device, seed)
    losses: list[float] = []
    saved_at = trainer.clock.seconds
    while trainer.clock.progress < 1:
        losses.append(trainer.advance())
        if len(losses) == 100:
            rate = trainer.step * BATCH / trainer.clock.seconds
            text = (
                f"unet {trainer.step} {trainer.clock.seconds:.0f} s loss {sum(losses) / 100:.4f} {rate:.0f}/s"
            )
            print(text, flush=True)
            losses = []
        if trainer.clock.seconds - saved_at > SAVE_SECONDS:
            trainer.save()
            saved_at = trainer.clock.seconds
    trainer.save()
    trainer.average.copy_to(trainer.unet)
    return trainer.unet.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    train(options.out, options.minutes, options.device)


if __name__ == "__main__":
    main()

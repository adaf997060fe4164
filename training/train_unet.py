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
    Clock,
    learning_rate,
    load_checkpoint,
    save_atomically,
    seeded,
)
from training.train_text import END, LENGTH, START, WIDTH, build_text_encoder, tokenize, vocabulary_words

CHANNELS, HEADS = (48, 96, 160), (2, 3, 5)
BATCH = 32
PEAK_RATE = 1e-3
HOLD = 0.35
EMPTY_SHARE = 0.1
BETAS, WEIGHT_DECAY, AVERAGE_DECAY = (0.9, 0.98), 0.01, 0.9985
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


def word_ids(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Token of each caption word: every one is a single token, so a lookup does the tokenizer's work."""
    names = vocabulary_words()
    ids = [tokenizer.convert_tokens_to_ids(name + "</w>") for name in names]
    return {**dict(zip(names, ids, strict=True)), START: tokenizer.bos_token_id, END: tokenizer.eos_token_id}


class Captions:
    """Token ids of several phrasings per scene, drawn once: a batch then costs one lookup."""

    def __init__(self, scenes: Sequence[Scene], tokenizer: CLIPTokenizer, phrasings: int, rng: random.Random) -> None:
        self.phrasings = phrasings
        texts = [caption(scene, rng) for scene in scenes for _ in range(phrasings)]
        rows = [tokenize(tokenizer, texts[start : start + 4096]).short() for start in range(0, len(texts), 4096)]
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


class Weights:
    """Parameters, Adam moments and their average in shared memory, so that two workers may train them at once.

    Each worker computes gradients on its own thread and applies them under a lock, without waiting for the other:
    on a shared machine this keeps going where two threads in step would stand still for one another.
    """

    def __init__(self, device: str) -> None:
        self.unet = build_unet().to(device)
        if device == "cpu":  # twice as fast as the fused attention, whose bf16 backward is slow on CPUs
            self.unet.set_attn_processor(AttnProcessor())
        parameters = list(self.unet.parameters())
        self.moments = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(2)]
        self.average = [parameter.detach().clone() for parameter in parameters]
        self.step = torch.zeros((), dtype=torch.long)

    def tensors(self) -> list[Tensor]:
        return [*self.unet.parameters(), *self.moments[0], *self.moments[1], *self.average, self.step]

    def share(self) -> None:
        """Move everything to shared memory, in place."""
        self.unet.share_memory()
        for tensor in self.tensors():
            tensor.detach().share_memory_()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.unet.state_dict(),
            "moments": self.moments,
            "average": self.average,
            "step": int(self.step),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.unet.load_state_dict(saved["model"])
        kept = [*saved["moments"][0], *saved["moments"][1], *saved["average"]]
        for tensor, value in zip([*self.moments[0], *self.moments[1], *self.average], kept, strict=True):
            tensor.copy_(value)
        self.step.fill_(saved["step"])

    @torch.no_grad()
    def apply(self, rate: float) -> None:
        """One AdamW step with the gradients at hand, and one of the average."""
        parameters = [parameter for parameter in self.unet.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        self.step += 1
        count = int(self.step)
        torch._foreach_lerp_(self.moments[0], gradients, 1 - BETAS[0])
        torch._foreach_mul_(self.moments[1], BETAS[1])
        torch._foreach_addcmul_(self.moments[1], gradients, gradients, 1 - BETAS[1])
        scale = torch._foreach_div(self.moments[1], 1 - BETAS[1] ** count)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_mul_(parameters, 1 - rate * WEIGHT_DECAY)
        torch._foreach_addcdiv_(parameters, self.moments[0], scale, -rate / (1 - BETAS[0] ** count))
        decay = min(AVERAGE_DECAY, (1 + count) / (10 + count))
        torch._foreach_lerp_(self.average, parameters, 1 - decay)


class Data:
    """Scaled latents with their captions, in an endless shuffled order."""

    def __init__(self, out: Path, scale: float | None, seed: int) -> None:
        rng, self.generator = seeded(seed)
        self.latents, scenes = make_latents.load(sorted(out.glob("latents_*.pt")))
        self.scale = 1 / self.latents.std().item() if scale is None else scale
        self.latents *= self.scale
        tokenizer, self.text = load_text(out)
        self.captions = Captions(scenes, tokenizer, 8, rng)
        self.noising = Noising.of(build_scheduler())
        self.order, self.cursor = torch.empty(0, dtype=torch.long), 0

    def next_index(self) -> Tensor:
        """The next BATCH rows of a shuffled pass over the data."""
        if self.cursor + BATCH > len(self.order):
            self.order, self.cursor = torch.randperm(len(self.latents), generator=self.generator), 0
        self.cursor += BATCH
        return self.order[self.cursor - BATCH : self.cursor]

    def loss(self, unet: UNet2DConditionModel, device: str) -> Tensor:
        """Squared error of v on the next batch."""
        index = self.next_index()
        ids = self.captions.batch(index, self.generator).to(device)
        clean = self.latents[index].to(device)
        noise = torch.randn(clean.shape, generator=self.generator).to(device)
        steps = self.noising.steps(BATCH, self.generator)
        noised, target = self.noising.mix(clean, noise, steps)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            with torch.no_grad():
                words = self.text(ids).last_hidden_state
            output = unet(noised, steps.to(device), words).sample
        return nn.functional.mse_loss(output.float(), target)


@dataclass
class Run:
    """What a worker is told: where, how long in all, how much of it is spent, on what, and its number."""

    out: Path
    minutes: float
    spent: float
    device: str
    seed: int
    scale: float | None


def work(number: int, weights: Weights, lock: Any, run: Run) -> None:
    """Train until the time is up. Worker 0 also reports and saves."""
    if run.device == "cpu":
        torch.set_num_threads(1)
    clock = Clock(run.minutes, run.spent)
    data = Data(run.out, run.scale, run.seed * 100_000 + 2 * int(weights.step) + number)
    data.text.to(run.device)
    unet, losses, saved_at = weights.unet, [], clock.seconds

    def save() -> None:
        with lock:
            state = {**weights.state(), "seconds": clock.seconds, "scale": data.scale}
            save_atomically(state, run.out / "unet.pt")

    while clock.progress < 1:
        loss = data.loss(unet, run.device)
        unet.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        with lock:
            weights.apply(learning_rate(PEAK_RATE, clock.progress, int(weights.step), 200, HOLD))
        losses.append(loss.item())
        if number == 0 and len(losses) == 20:
            step = int(weights.step)
            text = f"unet {step} {clock.seconds:.0f} s loss {sum(losses) / len(losses):.4f} {step * BATCH / clock.seconds:.0f}/s"
            print(text, flush=True)
            losses = []
        if number == 0 and clock.seconds - saved_at > SAVE_SECONDS:
            save()
            saved_at = clock.seconds
    if number == 0:
        save()


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 4, workers: int = 2) -> None:
    """Train or continue until `minutes` in total are used; the model is kept in `out/unet.pt`."""
    torch.manual_seed(seed)
    weights, saved = Weights(device), load_checkpoint(out / "unet.pt")
    if saved:
        weights.restore(saved)
    run = Run(out, minutes, saved["seconds"] if saved else 0.0, device, seed, saved["scale"] if saved else None)
    context = torch.multiprocessing.get_context("spawn")
    lock = context.Lock()
    if device != "cpu" or workers == 1:
        work(0, weights, lock, run)
        return
    weights.share()
    others = [context.Process(target=work, args=(number, weights, lock, run)) for number in range(1, workers)]
    for process in others:
        process.start()
    work(0, weights, lock, run)
    for process in others:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each, on a CPU")
    options = parser.parse_args()
    train(options.out, options.minutes, options.device, workers=options.workers)


if __name__ == "__main__":
    main()

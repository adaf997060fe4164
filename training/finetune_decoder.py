"""Train the decoder further with the encoder frozen: sharper pictures, and latents that stay as they are.

python -m training.finetune_decoder --out training/out --minutes 10

The result is kept beside `out/autoencoder.pt` and used by `training.assemble` when it is there.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffaccel.miniatures.scenes import training_scene
from training.common import Trainee, load_checkpoint, run_script, seeded
from training.make_latents import encode, load_autoencoder
from training.scenes_render import render
from training.train_autoencoder import reconstruction_loss

BATCH = 16
CROP_CELLS = 8
PEAK_RATE = 1e-3
LATENT_NOISE = 0.06  # relative to the latents' spread: the denoiser's output is never exact


def decoder_parts(vae: AutoencoderKL) -> nn.ModuleList:
    """What turns latents into pictures."""
    return nn.ModuleList([vae.post_quant_conv, vae.decoder])


def crop_pairs(vae: AutoencoderKL, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latent crops (n, 4, 8, 8) and the pictures (n, 3, 64, 64) in [-1, 1] they stand for, two from each scene."""
    pictures = render([training_scene(rng) for _ in range(BATCH // 2)], generator).to(vae.device)
    latents = encode(vae, pictures)
    cells, pixels = [], []
    for row in [row for row in range(len(pictures)) for _ in range(2)]:
        top, left = (max(0, min(16 - CROP_CELLS, round(rng.gauss(4, 2.7)))) for _ in range(2))
        cells.append(latents[row, :, top : top + CROP_CELLS, left : left + CROP_CELLS])
        pixels.append(pictures[row, :, 8 * top : 8 * top + 64, 8 * left : 8 * left + 64])
    return torch.stack(cells), torch.stack(pixels) * 2 - 1


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 6) -> None:
    """Train or continue; the averaged decoder is kept in `out/decoder.pt`."""
    torch.manual_seed(seed)
    vae = load_autoencoder(out).to(device)
    parts = decoder_parts(vae)
    trainee = Trainee(parts, out / "decoder.pt", minutes, rate=PEAK_RATE, decay=0.998, weight_decay=1e-3)
    rng, generator = seeded(seed * 1000 + trainee.step)
    for step in trainee:
        latents, target = crop_pairs(vae, rng, generator)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            output = vae.decode(latents + LATENT_NOISE * latents.std() * noise).sample
        loss = reconstruction_loss(output.float(), target)
        trainee.learn(loss)
        if step % 50 == 0:
            decibel = 10 * torch.log10(4 / (output.detach().float() - target).square().mean()).item()
            seconds = trainee.clock.seconds
            print(f"decoder {step} {seconds:.0f} s loss {loss.item():.4f} psnr {decibel:.1f} dB", flush=True)
        if trainee.step % 250 == 0:
            trainee.save()
    trainee.finish()


def apply_finetuned(vae: AutoencoderKL, out: Path) -> None:
    """Put the further trained decoder of `out`, if there is one, into `vae`."""
    saved = load_checkpoint(out / "decoder.pt")
    if saved:
        for parameter, value in zip(decoder_parts(vae).parameters(), saved["average"], strict=True):
            parameter.data.copy_(value)


if __name__ == "__main__":
    run_script(__doc__, 10, train)

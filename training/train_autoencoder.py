"""Train the autoencoder (8x down, 128 x 128 x 3 to 16 x 16 x 4) on crops of freshly drawn scenes.

python -m training.train_autoencoder --out training/out --minutes 10
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffaccel.miniatures.scenes import training_scene
from training.common import Trainee, run_script, seeded
from training.scenes_render import SIDE, render

CHANNELS = (16, 32, 64, 96)
CROP = 64
BATCH = 24
KL_WEIGHT = 4e-4
PEAK_RATE = 2e-3


def build_autoencoder() -> AutoencoderKL:
    """An AutoencoderKL of 1.6 M parameters with an uncertain start (small latent variance)."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0
    return vae


def crops(rng: random.Random, generator: torch.Generator, count: int = BATCH) -> Tensor:
    """(count, 3, 64, 64) in [-1, 1], two crops from each picture, near the middle where objects lie."""
    pictures = render([training_scene(rng) for _ in range(count // 2)], generator)
    out = []
    for picture in pictures.repeat_interleave(2, dim=0):
        # multiples of 8 are not required: the convolutions see every phase
        top, left = (max(0, min(SIDE - CROP, round(rng.gauss(32, 22)))) for _ in range(2))
        crop = picture[:, top : top + CROP, left : left + CROP]
        out.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return torch.stack(out) * 2 - 1


def _slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    return image[..., 1:, :] - image[..., :-1, :], image[..., 1:] - image[..., :-1]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on values and slopes keeps edges; the squared term keeps large areas right."""
    edges = sum((a - b).abs().mean() for a, b in zip(_slopes(output), _slopes(target), strict=True))
    error = output - target
    return error.abs().mean() + 0.4 * edges + 3 * error.square().mean()


def step_loss(vae: AutoencoderKL, batch: Tensor) -> tuple[Tensor, float]:
    """The loss to minimise and the reconstruction's mean squared error in [-1, 1] units."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        latent = vae.encode(batch).latent_dist
        output = vae.decode(latent.sample()).sample
    loss = reconstruction_loss(output.float(), batch)
    kl = latent.kl().float().mean() / latent.mean[0].numel()
    return loss + KL_WEIGHT * kl, float((output.detach().float() - batch).square().mean())


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 1) -> AutoencoderKL:
    """Train or continue; returns the averaged model and leaves it in `out/autoencoder.pt`."""
    torch.manual_seed(seed)
    vae = build_autoencoder().to(device)
    trainee = Trainee(vae, out / "autoencoder.pt", minutes, rate=PEAK_RATE, decay=0.998, weight_decay=1e-3)
    rng, generator = seeded(seed * 1000 + trainee.step)
    for step in trainee:
        loss, error = step_loss(vae, crops(rng, generator).to(device))
        trainee.learn(loss)
        if step % 50 == 0:
            decibel = 10 * torch.log10(torch.tensor(4 / error)).item()
            seconds = trainee.clock.seconds
            print(f"autoencoder {step} {seconds:.0f} s loss {loss:.4f} psnr {decibel:.1f} dB", flush=True)
        if trainee.step % 250 == 0:
            trainee.save()
    trainee.finish()
    return vae.eval()


if __name__ == "__main__":
    run_script(__doc__, 10, train)

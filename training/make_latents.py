"""Draw training scenes and keep their latents: what the UNet learns from.

python -m training.make_latents --out training/out --count 24000
"""

from __future__ import annotations

import argparse
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffaccel.miniatures.scenes import Scene, SceneObject, training_scene
from training.common import DEFAULT_OUT, load_checkpoint, save_atomically, seeded
from training.scenes_render import render
from training.train_autoencoder import build_autoencoder

CHUNK = 50


def load_autoencoder(out: Path) -> AutoencoderKL:
    """The averaged autoencoder of `out`; raises FileNotFoundError before it has been trained."""
    saved = load_checkpoint(out / "autoencoder.pt")
    if saved is None:
        raise FileNotFoundError(f"no {out / 'autoencoder.pt'}: run training.train_autoencoder first")
    vae = build_autoencoder()
    for parameter, value in zip(vae.parameters(), saved["average"], strict=True):
        parameter.data.copy_(value)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Mean latents (n, 4, 16, 16), unscaled, of pictures (n, 3, 128, 128) in [0, 1]."""
    with torch.autocast(pictures.device.type, torch.bfloat16):
        latent: Tensor = vae.encode(pictures * 2 - 1).latent_dist.mean
    return latent.float()


def pack(scene: Scene) -> tuple[Any, ...]:
    """A scene as plain tuples, which a weights-only checkpoint may hold."""
    return astuple(scene)


def unpack(row: tuple[Any, ...]) -> Scene:
    objects, relation, background = row
    return Scene(tuple(SceneObject(*item) for item in objects), relation, background)


def make(out: Path, count: int, device: str = "cpu", seed: int = 3) -> Path:
    """Write `out/latents_SEED.pt` with `count` latents and their scenes, unless it is there already."""
    path = out / f"latents_{seed}.pt"
    if path.exists():
        return path
    vae = load_autoencoder(out).to(device)
    rng, generator = seeded(seed)
    scenes = [training_scene(rng) for _ in range(count)]
    latents = torch.empty(count, 4, 16, 16, dtype=torch.float16)
    for start in range(0, count, CHUNK):
        pictures = render(scenes[start : start + CHUNK], generator)
        latents[start : start + CHUNK] = encode(vae, pictures.to(device)).cpu().half()
        if start % 5000 == 0:
            print(f"latents {start} of {count}", flush=True)
    save_atomically({"latents": latents, "scenes": [pack(scene) for scene in scenes]}, path)
    return path


def load(paths: list[Path]) -> tuple[Tensor, list[Scene]]:
    """All latents (n, 4, 16, 16) as float32, unscaled, and their scenes."""
    parts = [torch.load(path, weights_only=True) for path in paths]
    latents = torch.cat([part["latents"] for part in parts]).float()
    return latents, [unpack(row) for part in parts for row in part["scenes"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=3, help="names the file too: several sets add up")
    options = parser.parse_args()
    make(options.out, options.count, options.device, options.seed)


if __name__ == "__main__":
    main()

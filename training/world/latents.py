"""Draw scenes, keep their latents and eight captions of each: what the denoisers learn from.

python -m training.world.latents --size 128 --count 12000 --seed 1
python -m training.world.latents --size 256 --objects 4 --count 8000 --seed 2

Each call writes one file, `out/latents_SIZE_SEED.pt`; several of one size add up.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.common import DEFAULT_OUT, load_checkpoint, save_atomically
from training.world import World
from training.world.codec import draw_scene, load_codec, to_tensor

CHUNK = 16
PHRASINGS = 8


@dataclass(frozen=True)
class Drawn:
    """What to draw: pictures of `size` pixels with one to `objects` objects each."""

    size: int
    objects: int
    count: int
    seed: int


@dataclass
class Latents:
    """Latents (n, 16, s, s) in float16 and `PHRASINGS` captions of each."""

    values: Tensor
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)


@torch.no_grad()
def encode(codec: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents (n, 16, h/8, w/8) of pictures in [-1, 1]."""
    with torch.autocast(pictures.device.type, torch.bfloat16):
        latent: Tensor = codec.encode(pictures).latent_dist.mean
    return latent.float()


def latents_path(out: Path, size: int, seed: int) -> Path:
    return out / f"latents_{size}_{seed}.pt"


def draw_chunk(job: tuple[Path, Drawn, int]) -> tuple[NDArray[numpy.uint8], list[list[str]]]:
    """Pictures (n, size, size, 3) and their captions from row `start` on, the same whoever draws them."""
    out, drawn, start = job
    world, rng = _world(out), numpy.random.default_rng([drawn.seed, drawn.size, start])
    count = min(CHUNK, drawn.count - start)
    scenes = [draw_scene(world, rng, drawn.size, drawn.objects) for _ in range(count)]
    captions = [[world.caption(scene, rng)[0] for _ in range(PHRASINGS)] for scene in scenes]
    return numpy.stack([world.draw(scene, drawn.size) for scene in scenes]), captions


@cache
def _world(out: Path) -> World:
    return World.load(out)


@contextmanager
def drawing(jobs: Sequence[tuple[Path, Drawn, int]], workers: int) -> Iterator[Iterator[Any]]:
    """The chunks of `jobs` in order, drawn here or by several processes."""
    if workers == 1:
        yield map(draw_chunk, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap(draw_chunk, jobs)


def make(out: Path, drawn: Drawn, device: str = "cpu", workers: int = 1) -> Path:
    """Write the file of `drawn`, unless it is there already."""
    path = latents_path(out, drawn.size, drawn.seed)
    if path.exists():
        return path
    codec = load_codec(out).to(device)
    values, captions = [], []
    jobs = [(out, drawn, start) for start in range(0, drawn.count, CHUNK)]
    with drawing(jobs, workers) as chunks:
        for pictures, texts in chunks:
            values.append(encode(codec, to_tensor(pictures).to(device)).cpu().half())
            captions += texts
            if len(values) % 100 == 0:
                print(f"latents {drawn.size} px {len(captions)} of {drawn.count}", flush=True)
    save_atomically({"latents": torch.cat(values), "captions": captions}, path)
    return path


def load(out: Path, size: int) -> Latents:
    """All latents of that size in `out`; raises FileNotFoundError if there are none."""
    files = [load_checkpoint(path) for path in sorted(out.glob(f"latents_{size}_*.pt"))]
    parts = [part for part in files if part is not None]
    if not parts:
        raise FileNotFoundError(f"no latents of {size} px in {out}: run training.world.latents first")
    return Latents(torch.cat([part["latents"] for part in parts]), [row for part in parts for row in part["captions"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--objects", type=int, default=1, help="at most this many in a scene")
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    drawn = Drawn(options.size, options.objects, options.count, options.seed)
    make(options.out, drawn, options.device, options.workers)


if __name__ == "__main__":
    main()

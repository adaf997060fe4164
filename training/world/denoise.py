"""What both denoisers' trainers share: batches of latents with captions, drawn from the step's number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from training.world import latents

EMPTY_SHARE = 0.1
SMALLEST = 128


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """(n, length) token ids, padded as the pipelines pad."""
    length = tokenizer.model_max_length
    ids = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return torch.as_tensor(ids.input_ids)


class Captions:
    """Token ids of every phrasing of every scene, so that a batch costs one lookup."""

    def __init__(self, captions: Sequence[Sequence[str]], tokenizer: CLIPTokenizer) -> None:
        texts = [text for row in captions for text in row]
        parts = [tokenize(tokenizer, texts[start : start + 4096]).short() for start in range(0, len(texts), 4096)]
        self.ids = torch.cat(parts).view(len(captions), len(captions[0]), -1)
        self.empty = tokenize(tokenizer, [""])[0]

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """(n, length) ids: a random phrasing of each scene, or the empty caption."""
        which = torch.randint(self.ids.shape[1], (len(index),), generator=generator)
        empty = torch.rand(len(index), generator=generator) < EMPTY_SHARE
        return torch.where(empty[:, None], self.empty, self.ids[index, which].long())


@dataclass
class Batch:
    """Clean latents, noise, token ids and one stratified place in (0, 1) per row for the noise level's law."""

    clean: Tensor
    noise: Tensor
    ids: Tensor
    places: Tensor

    def normal(self) -> Tensor:
        """The places as quantiles of the standard normal law."""
        return math.sqrt(2) * torch.erfinv((2 * self.places - 1).clamp(-0.9999, 0.9999))


class Pool:
    """Latents of several sizes. A step's batch depends on the seed and the step's number alone.

    `shares` says how often each size is drawn. Larger pictures come in smaller batches, of equally many positions.
    """

    def __init__(self, out: Path, tokenizer: CLIPTokenizer, shares: dict[int, float], batch: int, seed: int) -> None:
        self.data = {size: latents.load(out, size) for size in shares}
        self.captions = {size: Captions(rows.captions, tokenizer) for size, rows in self.data.items()}
        self.shares, self.batch, self.seed = shares, batch, seed

    def rows(self, size: int) -> int:
        return max(1, round(self.batch * (SMALLEST / size) ** 2))

    def draw(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        sizes = list(self.shares)
        size = random.Random(f"{self.seed} {step}").choices(sizes, [self.shares[name] for name in sizes])[0]
        count = self.rows(size)
        index = torch.randint(len(self.data[size]), (count,), generator=generator)
        clean = self.data[size].values[index].float()
        return Batch(
            clean,
            torch.randn(clean.shape, generator=generator),
            self.captions[size].batch(index, generator),
            (torch.arange(count) + torch.rand(count, generator=generator)) / count,
        )


def parse_shares(text: str) -> dict[int, float]:
    """ "128:3,256:1" as {128: 3.0, 256: 1.0}; a size without a share counts 1."""
    pairs = [part.partition(":") for part in text.split(",")]
    return {int(size): float(share or 1) for size, _, share in pairs}

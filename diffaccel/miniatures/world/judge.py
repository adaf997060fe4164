"""A small network that reads pictures of the world: what lies where, how large, in which style, on what ground.

It is fully convolutional. Each cell of 16 px says whether a thing's centre lies in it, which thing, which of its drawings
and how large; style, ground and `validity` are read from the whole picture. It was trained on drawn scenes and, for
validity, on damaged ones; judge.json holds how often it is right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.miniatures.world.captions import Truth, WorldCase
from diffaccel.miniatures.world.nouns import NAMES
from diffaccel.miniatures.world.scenes import (
    ARTWORKS,
    GROUND_COLOURS,
    GROUNDS,
    MAX_OBJECTS,
    STYLES,
    WIDE_FACTOR,
    WIDE_SIDE,
    Scene,
    SceneObject,
)

if TYPE_CHECKING:
    from PIL import Image

    Images = Tensor | Sequence[Image.Image]

CELL = 16
SIDES = (128, 256)  # pictures are resampled to the nearer of these: between them and above, things keep their grain
BATCH = 32
THRESHOLD = 0.5
BULK_MIDDLE = 0.48  # of the sizes of single things in pictures of 256 px
CHANNELS = (48, 96, 160)
WHOLE: tuple[tuple[str, int], ...] = (
    ("style", len(STYLES) + 1),  # class 0: none
    ("ground_colour", len(GROUND_COLOURS)),
    ("ground_kind", len(GROUNDS)),
)


@dataclass(frozen=True)
class Seen:
    """One thing the judge sees; place and size in fractions of the side, `confidence` that a thing is there."""

    noun: str
    artwork: int
    x: float
    y: float
    size: float
    confidence: float

    @property
    def place(self) -> str:
        return SceneObject(self.noun, self.artwork, self.x, self.y, self.size).place


@dataclass(frozen=True)
class WorldReading:
    """What the judge sees in a picture of `side` pixels.

    `validity` is the probability that these things are all there is, and well drawn.
    """

    objects: tuple[Seen, ...]
    style: str | None
    ground_colour: str
    ground_kind: str
    validity: float
    side: int = SIDES[1]

    @property
    def valid(self) -> bool:
        return self.validity >= 0.5

    @property
    def layout(self) -> str:
        """As `Scene.layout`; "empty" or "crowded" where there is no such scene."""
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            return "empty" if not self.objects else "crowded"
        return Scene(tuple(SceneObject(s.noun, s.artwork, s.x, s.y, s.size) for s in self.objects)).layout


@dataclass(frozen=True)
class WorldVerdict:
    """One boolean per picture, each (n,); what a caption leaves out is always right.

    count: as many things as asked for. nouns: and they are those. relation: and they lie as told.
    style: that asked for, or none. size, ground: as told. valid: well drawn. correct: all of these.
    """

    count: Tensor
    nouns: Tensor
    relation: Tensor
    style: Tensor
    size: Tensor
    ground: Tensor
    valid: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pictures that show all the prompt says."""
        return float(self.correct.float().mean())


VERDICT_FIELDS = tuple(WorldVerdict.__dataclass_fields__)


class _Block(nn.Module):
    """A residual pair of 3 x 3 convolutions, the first with the given stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or stride > 1 else nn.Identity()
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.norms[0](self.first(x)))
        return nn.functional.relu(self.norms[1](self.second(y)) + self.skip(self.pool(x)))


class WorldJudgeNetwork(nn.Module):
    """Pictures (n, 3, h, w) in [0, 1], sides a multiple of 16, to logits by cell and of the whole; 1.6 M parameters."""

    def __init__(self, channels: Sequence[int] = CHANNELS, depth: int = 2) -> None:
        super().__init__()
        low, middle, high = channels
        self.stem = nn.Conv2d(3, low, 6, 4, 1)
        self.blocks = nn.Sequential(
            _Block(low, low),
            _Block(low, middle, 2),
            _Block(middle, high, 2),
            *[_Block(high, high) for _ in range(depth)],
        )
        self.cells = nn.Conv2d(high, 1 + len(NAMES) + ARTWORKS + 3, 1)
        self.whole = nn.Linear(2 * high, sum(count for _, count in WHOLE))
        self.validity = nn.Sequential(nn.Linear(2 * high, high), nn.ReLU(), nn.Linear(high, 1))

    def trunk(self, images: Tensor) -> Tensor:
        """Feature maps (n, channels, h / 16, w / 16)."""
        maps: Tensor = self.blocks(nn.functional.relu(self.stem(images * 2 - 1)))
        return maps

    @staticmethod
    def pooled(maps: Tensor) -> Tensor:
        """(n, 2 channels): mean and maximum over the picture."""
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """heat (n, 1), noun (n, nouns), artwork (n, 2), box (n, 3: shift and log size), each x rows x columns; the whole."""
        maps = self.trunk(images)
        parts = self.cells(maps).split([1, len(NAMES), ARTWORKS, 3], 1)
        found = dict(zip(("heat", "noun", "artwork", "box"), parts, strict=True))
        whole = self.pooled(maps)
        logits = self.whole(whole).split([count for _, count in WHOLE], 1)
        found |= {name: part for (name, _), part in zip(WHOLE, logits, strict=True)}
        return found | {"validity": self.validity(whole)[:, 0]}


class WorldJudge:
    """Reads pictures of the world and compares them with what was asked for."""

    def __init__(self, network: WorldJudgeNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path) -> WorldJudge:
        """From judge.safetensors and judge.json in `folder`.

        Raises FileNotFoundError if either is missing, ValueError if it was trained for another list of nouns.
        """
        from safetensors.torch import load_file

        config: dict[str, Any] = json.loads((folder / "judge.json").read_text())
        if config["nouns"] != len(NAMES):
            raise ValueError(f"this judge knows {config['nouns']} nouns, the world has {len(NAMES)}")
        network = WorldJudgeNetwork(config["channels"], config["depth"])
        state = load_file(folder / "judge.safetensors")
        network.load_state_dict({name: value.float() for name, value in state.items()})
        return cls(network)

    def read(self, images: Images) -> list[WorldReading]:
        """What each picture shows. `images`: PIL pictures or a float tensor (n, 3, h, w) in [0, 1]."""
        side = _side(images)
        return [reading for batch in _batches(images) for reading in readings(self._forward(batch), side)]

    def score(self, images: Images, cases: Sequence[WorldCase]) -> WorldVerdict:
        """Compare pictures with the prompts they were made from, in the same order.

        Raises ValueError if their numbers differ.
        """
        found = self.read(images)
        if len(found) != len(cases):
            raise ValueError(f"{len(found)} pictures but {len(cases)} prompts")
        rows = [compare(reading, case.truth) for reading, case in zip(found, cases, strict=True)]
        return WorldVerdict(*torch.tensor(rows, dtype=torch.bool).reshape(-1, len(VERDICT_FIELDS)).unbind(1))

    @torch.no_grad()
    def features(self, images: Images) -> Tensor:
        """(n, 320) float features for a Frechet distance."""
        return torch.cat([self.network.pooled(self.network.trunk(batch)) for batch in _batches(images)])

    @torch.no_grad()
    def _forward(self, batch: Tensor) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = self.network(batch)
        return logits


def _batches(images: Images) -> list[Tensor]:
    pictures = as_tensor(images)
    return [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]


def _side(images: Images) -> int:
    """The longer side of the first picture; 0 if there is none."""
    if not len(images):
        return 0
    return max(images.shape[-2:]) if isinstance(images, Tensor) else max(images[0].size)


def as_tensor(images: Images) -> Tensor:
    """(n, 3, s, s) floats in [0, 1], s one of `SIDES`; larger pictures are read at 256. Raises ValueError for other shapes."""
    if not isinstance(images, Tensor):
        images = torch.stack([_pixels(image) for image in images]) if len(images) else torch.zeros(0, 3, *SIDES[:1] * 2)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected pictures of shape (n, 3, h, w), got {tuple(images.shape)}")
    pictures = images.detach().float().cpu()
    side = SIDES[0] if max(pictures.shape[-2:]) <= math.sqrt(SIDES[0] * SIDES[1]) else SIDES[1]
    if len(pictures) and pictures.shape[-2:] != (side, side):
        pictures = nn.functional.interpolate(pictures, (side, side), mode="bilinear", antialias=True)
    return pictures


def _pixels(image: Image.Image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def readings(logits: dict[str, Tensor], side: int = SIDES[1]) -> list[WorldReading]:
    """One per picture of a network's outputs; `side` is what the pictures had before they were resampled."""
    validity = logits["validity"].sigmoid().tolist()
    whole = {name: logits[name].argmax(1).tolist() for name, _ in WHOLE}
    found = []
    for row, objects in enumerate(_objects(logits)):
        style = whole["style"][row]
        ground = GROUND_COLOURS[whole["ground_colour"][row]], GROUNDS[whole["ground_kind"][row]]
        found.append(WorldReading(objects, STYLES[style - 1] if style else None, *ground, validity[row], side))
    return found


def _objects(logits: dict[str, Tensor]) -> Iterable[tuple[Seen, ...]]:
    """The cells surer than all their neighbours, best first, without what lies too near a better one."""
    heat = logits["heat"].sigmoid()
    peaks = (heat == nn.functional.max_pool2d(heat, 3, 1, 1)) & (heat >= THRESHOLD)
    # the neighbours vote: each cell's opinion counts as much as it is sure of a thing
    weights = nn.functional.avg_pool2d(heat, 3, 1, 1)
    votes = nn.functional.avg_pool2d(logits["noun"].softmax(1) * heat, 3, 1, 1) / weights
    for row in range(len(heat)):
        sure = heat[row, 0]
        spots = sorted(peaks[row, 0].nonzero().tolist(), key=lambda at, sure=sure: -float(sure[at[0], at[1]]))  # type: ignore[misc]
        kept: list[Seen] = []
        for down, across in spots:
            seen = _seen(logits, votes, heat, (row, down, across))
            if all(math.hypot(seen.x - other.x, seen.y - other.y) > 0.4 * other.size for other in kept):
                kept.append(seen)
        yield tuple(kept)


def _seen(logits: dict[str, Tensor], votes: Tensor, heat: Tensor, at: tuple[int, int, int]) -> Seen:
    row, down, across = at
    shift_x, shift_y, log_size = logits["box"][row, :, down, across].tolist()
    rows, columns = heat.shape[-2:]
    noun = NAMES[int(votes[row, :, down, across].argmax())]
    artwork = int(logits["artwork"][row, :, down, across].argmax())
    x, y = (across + 0.5 + shift_x) / columns, (down + 0.5 + shift_y) / rows
    return Seen(noun, artwork, x, y, math.exp(log_size) / columns, heat[row, 0, down, across].item())


def in_order(objects: Sequence[Seen], layout: str) -> list[Seen]:
    """Left to right, top to bottom, or in reading order: the order of a scene's objects in that layout."""
    if layout in ("vertical", "column"):
        return sorted(objects, key=lambda item: item.y)
    if layout == "grid":
        rows = sorted(objects, key=lambda item: item.y)
        return [*sorted(rows[:2], key=lambda item: item.x), *sorted(rows[2:], key=lambda item: item.x)]
    return sorted(objects, key=lambda item: item.x)


def compare(reading: WorldReading, truth: Truth) -> tuple[bool, ...]:
    """The booleans of `WorldVerdict`, in its order."""
    seen = in_order(reading.objects, truth.layout)
    count = len(seen) == len(truth.mentions)
    nouns = count and any(_fulfilled(order, truth) for order in permutations(seen))
    relation = nouns and reading.layout == truth.layout and _fulfilled(seen, truth) and _places_right(seen, truth)
    style = reading.style == truth.style
    size = count and all(
        mention.bulk is None or _bulk_right(item, mention.bulk, reading.side) for item, mention in _pairs(seen, truth)
    )
    ground = truth.ground_colour in (None, reading.ground_colour) and truth.ground_kind in (None, reading.ground_kind)
    told = (count, nouns, relation, style, size, ground, reading.valid)
    return *told, all(told)


def _pairs(seen: Sequence[Seen], truth: Truth) -> Iterable[tuple[Seen, Any]]:
    return zip(seen, truth.mentions, strict=True)


def _fulfilled(seen: Sequence[Seen], truth: Truth) -> bool:
    return all(item.noun in mention.names for item, mention in _pairs(seen, truth))


def _places_right(seen: Sequence[Seen], truth: Truth) -> bool:
    """Of single things the told place; of several the layout says it all."""
    return truth.layout != "single" or truth.mentions[0].place in (None, seen[0].place)


def _bulk_right(item: Seen, bulk: str, side: int) -> bool:
    """Large is above the middle of the sizes that a single thing is drawn at, small below."""
    middle = BULK_MIDDLE * (WIDE_FACTOR if side >= WIDE_SIDE else 1.0)
    return (item.size > middle) == (bulk == "large")

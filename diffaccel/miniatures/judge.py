"""A small network that reads generated pictures, so that "did the prompt come true" is a number.

It is fully convolutional: each attribute is read from pooled features, per place of the picture. It was trained
on rendered scenes and, for `validity`, on damaged ones; see shapes-sd/README.md for how often it is right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.miniatures.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    PromptCase,
    Scene,
    SceneObject,
    canonical_slots,
)

if TYPE_CHECKING:
    from PIL import Image

    Images = Tensor | Sequence[Image.Image]

SIDE = 128
BATCH = 64
LAYOUTS = ("single", "horizontal", "vertical")
FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shape", SHAPES),
    ("colour", COLOURS),
    ("texture", TEXTURES),
    ("size", SIZES),
)
# Slot 0 is the only, left or upper object, slot 1 the right or lower one.
SLOT_PLACES = {"single": ("centre",), "horizontal": ("left", "right"), "vertical": ("top", "bottom")}
FIRST_RELATION = {"horizontal": "left of", "vertical": "above"}


@dataclass(frozen=True)
class Reading:
    """What the judge sees: a scene whose first object is the left or upper one, and whether to believe it.

    `validity` is the probability that the picture holds exactly these well-formed objects and nothing else.
    """

    scene: Scene
    validity: float

    @property
    def valid(self) -> bool:
        return self.validity >= 0.5


@dataclass(frozen=True)
class Verdict:
    """One boolean per picture, each (n,). False throughout for a picture with the wrong number of objects.

    shape, colour, texture: right for every object (texture only where the prompt states it).
    both: shape and colour. relation: the objects lie as stated (right number of objects, if there is one).
    all_attributes: both, and every stated texture and size. correct: all_attributes, relation, a well-formed
    picture and, where stated, the background.
    """

    shape: Tensor
    colour: Tensor
    texture: Tensor
    both: Tensor
    all_attributes: Tensor
    relation: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pictures that show all the prompt says."""
        return float(self.correct.float().mean())


class _Block(nn.Module):
    """A residual pair of 3 x 3 convolutions, the first with the given stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.norms[0](self.first(x)))
        return nn.functional.silu(self.norms[1](self.second(y)) + self.skip(self.pool(x)))


class JudgeNetwork(nn.Module):
    """Pictures (n, 3, 128, 128) in [0, 1] to a dictionary of logits; about 0.37 M parameters."""

    def __init__(self, channels: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 4, 2, 1)
        widths = list(zip(channels, channels[1:], strict=False))
        self.blocks = nn.Sequential(*[_Block(a, b, 2) for a, b in widths])
        width = channels[-1]
        self.last = nn.Conv2d(width, width, 1)
        self.attention = nn.Conv2d(width, 2, 3, 1, 1)
        # where an object was found tells the two slots apart
        self.places = nn.Parameter(torch.zeros(1, width, SIDE // 16, SIDE // 16))
        self.slots = nn.Linear(width, sum(len(values) for _, values in FIELDS))
        self.layout = nn.Linear(2 * width, len(LAYOUTS))
        self.background = nn.Linear(2 * width, len(BACKGROUNDS))
        self.validity = nn.Linear(4 * width, 1)

    def trunk(self, images: Tensor) -> Tensor:
        """Feature maps (n, width, 8, 8)."""
        maps = self.blocks(self.stem(images * 2 - 1))
        return nn.functional.silu(self.last(maps)) + self.places

    def pooled(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the two slots (n, 2, width), and mean with maximum over the picture (n, 2 width)."""
        weights = self.attention(maps).flatten(2).softmax(-1)  # (n, 2, 64)
        slots = weights @ maps.flatten(2).transpose(1, 2)
        return slots, torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        slots, whole = self.pooled(self.trunk(images))
        fields = self.slots(slots).split_with_sizes([len(values) for _, values in FIELDS], -1)
        logits = {name: part for (name, _), part in zip(FIELDS, fields, strict=True)}  # each (n, 2, values)
        logits["layout"], logits["background"] = self.layout(whole), self.background(whole)
        logits["validity"] = self.validity(torch.cat([slots.flatten(1), whole], 1))[:, 0]
        return logits


class Judge:
    """Reads pictures and compares them with what was asked for."""

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """From judge.safetensors and judge.json in `folder`; raises FileNotFoundError if either is missing."""
        from safetensors.torch import load_file

        config: dict[str, Any] = json.loads((folder / "judge.json").read_text())
        network = JudgeNetwork(config["channels"])
        state = load_file(folder / "judge.safetensors")
        network.load_state_dict({name: value.float() for name, value in state.items()})
        return cls(network)

    def read(self, images: Images) -> list[Reading]:
        """What each picture shows. `images`: PIL pictures or a float tensor (n, 3, h, w) in [0, 1]."""
        return [reading for batch in _batches(images) for reading in _readings(self._forward(batch))]

    def score(self, images: Images, cases: Sequence[PromptCase]) -> Verdict:
        """Compare pictures with the prompts they were made from, in the same order.

        Raises ValueError if their numbers differ.
        """
        readings = self.read(images)
        if len(readings) != len(cases):
            raise ValueError(f"{len(readings)} pictures but {len(cases)} prompts")
        rows = [_compare(reading, case) for reading, case in zip(readings, cases, strict=True)]
        return Verdict(*torch.tensor(rows, dtype=torch.bool).reshape(-1, 7).unbind(1))

    @torch.no_grad()
    def features(self, images: Images) -> Tensor:
        """(n, 192) float features, the mean and maximum of the last maps, for a Frechet distance."""
        rows = [self.network.pooled(self.network.trunk(batch))[1] for batch in _batches(images)]
        return torch.cat(rows)

    @torch.no_grad()
    def _forward(self, batch: Tensor) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = self.network(batch)
        return logits


def _batches(images: Images) -> list[Tensor]:
    pictures = as_tensor(images)
    return [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]


def as_tensor(images: Images) -> Tensor:
    """(n, 3, 128, 128) floats in [0, 1]; other sizes are resampled. Raises ValueError for other shapes."""
    if not isinstance(images, Tensor):
        images = torch.stack([_pixels(image) for image in images]) if len(images) else torch.zeros(0, 3, SIDE, SIDE)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected pictures of shape (n, 3, h, w), got {tuple(images.shape)}")
    pictures = images.detach().float().cpu()
    if len(pictures) and pictures.shape[-2:] != (SIDE, SIDE):
        pictures = nn.functional.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=True)
    return pictures


def _pixels(image: Image.Image) -> Tensor:
    import numpy

    array = numpy.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _readings(logits: dict[str, Tensor]) -> list[Reading]:
    validity = logits["validity"].sigmoid().tolist()
    classes = {name: value.argmax(-1).tolist() for name, value in logits.items() if name != "validity"}
    return [Reading(_scene(classes, row), validity[row]) for row in range(len(validity))]


def _scene(classes: dict[str, list[Any]], row: int) -> Scene:
    layout = LAYOUTS[classes["layout"][row]]
    objects = [
        SceneObject(**{name: values[classes[name][row][slot]] for name, values in FIELDS})
        for slot in range(len(SLOT_PLACES[layout]))
    ]
    return Scene(tuple(objects), FIRST_RELATION.get(layout), BACKGROUNDS[classes["background"][row]])


def _compare(reading: Reading, case: PromptCase) -> tuple[bool, ...]:
    """The seven booleans of `Verdict`, in its order."""
    wanted, seen = canonical_slots(case.scene), canonical_slots(reading.scene)
    if len(wanted) != len(seen):
        return (False,) * 7
    relation = wanted.keys() == seen.keys()
    stated = dict(zip(wanted, zip(case.stated.textures, case.stated.sizes, strict=True), strict=True))
    # by place if the arrangement is right, otherwise in the order of mention
    pairs = [
        (wanted[place], other, *stated[place])
        for place, other in zip(sorted_places(wanted), seen.values(), strict=True)
    ]
    shape = all(a.shape == b.shape for a, b, _, _ in pairs)
    colour = all(a.colour == b.colour for a, b, _, _ in pairs)
    texture = all(a.texture == b.texture for a, b, told, _ in pairs if told)
    size = all(a.size == b.size for a, b, _, told in pairs if told)
    background = not case.stated.background or case.scene.background == reading.scene.background
    everything = shape and colour and texture and size
    correct = everything and relation and background and reading.valid
    return shape, colour, texture, shape and colour, everything, relation, correct


def sorted_places(slots: dict[str, SceneObject]) -> list[str]:
    """Places with the left or upper one first."""
    order = ("centre", "left", "top", "right", "bottom")
    return sorted(slots, key=order.index)

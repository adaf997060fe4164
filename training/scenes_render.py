"""Draw scenes as pictures: signed distance functions, all pictures of a batch at once.

Distances are in units of the object's radius until `_object_layers` turns them into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.miniatures.scenes import SHAPES, Scene, canonical_slots

SIDE = 128
COLOUR_RGB = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.13, 0.65, 0.22),
    "blue": (0.14, 0.33, 0.93),
    "yellow": (0.98, 0.86, 0.12),
    "orange": (0.98, 0.50, 0.06),
    "purple": (0.55, 0.18, 0.75),
    "cyan": (0.10, 0.85, 0.90),
    "white": (0.96, 0.96, 0.96),
}
BACKGROUND_RGB = {
    "grey": (0.50, 0.51, 0.53),
    "dark": (0.15, 0.15, 0.16),
    "navy": (0.11, 0.13, 0.31),
    "brown": (0.36, 0.26, 0.18),
    "pink": (0.84, 0.66, 0.72),
    "teal": (0.12, 0.34, 0.35),
}
# Pixels: radius by number of objects and size, place of each slot relative to the middle.
RADIUS = {(1, "small"): 28.0, (1, "large"): 42.0, (2, "small"): 20.5, (2, "large"): 27.5}
PLACES = {
    "centre": (0.0, 0.0),
    "left": (-31.0, 0.0),
    "right": (31.0, 0.0),
    "top": (0.0, -31.0),
    "bottom": (0.0, 31.0),
}
JITTER_SINGLE = 7.0
JITTER_ALONG, JITTER_ACROSS = 2.5, 5.0
MAX_TILT = 0.12
COLOUR_JITTER = 0.03
NOISE = 0.008


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.84


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.72, 0.894 * x.abs() - 0.447 * y - 0.447)


def _star(x: Tensor, y: Tensor) -> Tensor:
    fifth = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2
    length = torch.hypot(x, y)
    along, across = length * angle.cos(), length * angle.sin().abs()
    tip, inner = (1.06, 0.0), (0.48 * math.cos(fifth / 2), 0.48 * math.sin(fifth / 2))
    edge = (inner[0] - tip[0], inner[1] - tip[1])
    side = (edge[0] * (across - tip[1]) - edge[1] * (along - tip[0])) / -math.hypot(*edge)
    return torch.maximum(side, length - 1.06)  # the lines alone would trail far beyond the tips


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.33, torch.maximum(x, y) - 0.97)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.70).abs() - 0.27


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + 0.70 * y.abs() - 0.70) / 1.22


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs() * 0.6, 0.52 - y * 0.6
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * (x + y).clamp(min=0)
    tail = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - fold, y - fold)) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, tail) / 0.6


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "heart": _heart,
}


@dataclass
class _Batch:
    """The numbers of one object layer, one row per object; `picture` says which picture it belongs to."""

    picture: Tensor
    shape: Tensor
    texture: list[str]
    colour: Tensor
    centre: Tensor
    radius: Tensor


def _uniform(count: int, width: int, spread: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, width, generator=generator) * 2 - 1) * spread


def _layout(scenes: Sequence[Scene], generator: torch.Generator) -> _Batch:
    rows = [
        (picture, len(scene.objects), place, item)
        for picture, scene in enumerate(scenes)
        for place, item in canonical_slots(scene).items()
    ]
    spread = torch.tensor(
        [
            (JITTER_SINGLE, JITTER_SINGLE)
            if place == "centre"
            else ((JITTER_ALONG, JITTER_ACROSS) if place in ("left", "right") else (JITTER_ACROSS, JITTER_ALONG))
            for _, _, place, _ in rows
        ]
    )
    centre = torch.tensor([PLACES[place] for _, _, place, _ in rows])
    colour = torch.tensor([COLOUR_RGB[item.colour] for *_, item in rows])
    radius = torch.tensor([RADIUS[count, item.size] for _, count, _, item in rows])
    return _Batch(
        picture=torch.tensor([row[0] for row in rows]),
        shape=torch.tensor([SHAPES.index(item.shape) for *_, item in rows]),
        texture=[item.texture for *_, item in rows],
        colour=(colour + _uniform(len(rows), 3, COLOUR_JITTER, generator)).clamp(0, 1),
        centre=centre + _uniform(len(rows), 2, 1.0, generator) * spread,
        radius=radius * (1 + _uniform(len(rows), 1, 0.04, generator)[:, 0]),
    )


def _backgrounds(scenes: Sequence[Scene], grid: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 3, side, side): a vertical gradient, lighter at the top, with a little grain."""
    base = torch.tensor([BACKGROUND_RGB[scene.background] for scene in scenes])
    base = base + _uniform(len(scenes), 3, COLOUR_JITTER, generator)
    slope = 0.22 + _uniform(len(scenes), 1, 0.06, generator)
    shade = 1 - slope * (grid / SIDE)  # (n, side)
    plane = base[:, :, None, None] * shade[:, None, :, None]
    return plane + NOISE * torch.randn(len(scenes), 1, SIDE, SIDE, generator=generator)


def _object_layers(batch: _Batch, grid: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Signed distance in pixels and the two object coordinates in pixels, each (objects, side, side)."""
    angle = _uniform(len(batch.picture), 1, MAX_TILT, generator)[:, :, None]
    x = grid[None, None, :] - batch.centre[:, 0, None, None]
    y = grid[None, :, None] - batch.centre[:, 1, None, None]
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    distance = torch.empty_like(along)
    for index, name in enumerate(SHAPES):
        rows = (batch.shape == index).nonzero()[:, 0]
        if len(rows):
            radius = batch.radius[rows, None, None]
            distance[rows] = DISTANCES[name](along[rows] / radius, across[rows] / radius) * radius
    return distance, along, across


def _ink(batch: _Batch, distance: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """How much of the dark second tone covers each pixel, (objects, side, side) in [0, 1]."""
    ink = torch.zeros_like(distance)
    for name in set(batch.texture) - {"plain"}:
        rows = torch.tensor([index for index, texture in enumerate(batch.texture) if texture == name])
        ink[rows] = _TEXTURES[name](distance[rows], along[rows], across[rows])
    return ink


def _stripes(distance: Tensor, along: Tensor, across: Tensor) -> Tensor:
    return (0.5 + 1.6 * torch.sin((along + across) * (2 * math.pi / 16.0))).clamp(0, 1)


def _dots(distance: Tensor, along: Tensor, across: Tensor) -> Tensor:
    pitch = 13.0
    near_x = torch.remainder(along + pitch / 2, pitch) - pitch / 2
    near_y = torch.remainder(across + pitch / 2, pitch) - pitch / 2
    return (3.9 - torch.hypot(near_x, near_y)).clamp(0, 1)


def _outline(distance: Tensor, along: Tensor, across: Tensor) -> Tensor:
    return (2.6 - (distance + 4.6).abs()).clamp(0, 1)


_TEXTURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "striped": _stripes,
    "dotted": _dots,
    "outlined": _outline,
}


def _paint(canvas: Tensor, batch: _Batch, rows: Tensor, layers: tuple[Tensor, Tensor, Tensor]) -> None:
    """Lay one object per picture, with its shadow, over `canvas` in place."""
    picture = batch.picture[rows]
    distance, along, across = (layer[rows] for layer in layers)
    shadow = torch.zeros_like(distance)
    shadow[:, 5:, 4:] = torch.sigmoid((1 - distance[:, :-5, :-4]) / 2.0) * 0.4
    part = _Batch(picture, batch.shape[rows], [batch.texture[i] for i in rows.tolist()], *([Tensor()] * 3))
    ink = _ink(part, distance, along, across) * 0.72
    light = (1 - 0.004 * across).clamp(0.85, 1.12) * (1 - ink)
    colour = batch.colour[rows][:, :, None, None] * light[:, None]
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    below = canvas[picture] * (1 - shadow[:, None])
    canvas[picture] = below + cover * (colour - below)


@torch.no_grad()
def render(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Draw `scenes` as (n, 3, 128, 128) floats in [0, 1]; jitter of place, tilt and colour from `generator`."""
    grid = torch.arange(SIDE, dtype=torch.float32) - (SIDE - 1) / 2
    canvas = _backgrounds(scenes, grid, generator)
    batch = _layout(scenes, generator)
    layers = _object_layers(batch, grid, generator)
    first = torch.ones(len(batch.picture), dtype=torch.bool)
    first[1:] = batch.picture[1:] != batch.picture[:-1]
    for chosen in (first, ~first):
        if chosen.any():
            _paint(canvas, batch, chosen.nonzero()[:, 0], layers)
    return canvas.clamp(0, 1)

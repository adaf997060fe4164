"""Draw scenes of the world: a ground, things pasted on it, a style over all. A scene fixes every pixel."""

from __future__ import annotations

import math

import numpy
from numpy.typing import NDArray
from PIL import Image

from diffaccel.miniatures.world.nouns import NOUN_INDEX
from diffaccel.miniatures.world.scenes import Ground, Scene, SceneObject
from training.world import styles
from training.world.styles import Floats, Pixels


def draw(scene: Scene, side: int, sprites: NDArray[numpy.uint8]) -> Pixels:
    """(side, side, 3) pixels; `sprites` (nouns, artworks, s, s, 4) in the order of the world's names."""
    canvas = Image.fromarray(ground_pixels(scene.ground, side))
    for item in scene.objects:
        _paste(canvas, item, sprites[NOUN_INDEX[item.noun], item.artwork])
    return styles.apply(numpy.asarray(canvas), scene.style)


def _paste(canvas: Image.Image, item: SceneObject, sprite: NDArray[numpy.uint8]) -> None:
    edge = max(2, round(item.size * canvas.width))
    turned = Image.fromarray(sprite).resize((edge, edge), Image.Resampling.BICUBIC, reducing_gap=2.0)
    turned = turned.rotate(item.turn, Image.Resampling.BICUBIC, expand=True)
    corner = [round(at * canvas.width - size / 2) for at, size in zip((item.x, item.y), turned.size, strict=True)]
    canvas.paste(turned, (corner[0], corner[1]), turned)


def ground_pixels(ground: Ground, side: int) -> Pixels:
    """(side, side, 3): the first tone where the pattern is 0, the second where it is 1."""
    mix = _pattern(ground, side)[..., None]
    first, second = (numpy.array(tone, numpy.float32) for tone in ground.tones)
    return (first + mix * (second - first) + 0.5).astype(numpy.uint8)


def _axes(ground: Ground, side: int) -> tuple[Floats, Floats]:
    """Coordinates along and across the ground's direction, the middle being 0, in fractions of the side."""
    line = (numpy.arange(side, dtype=numpy.float32) + 0.5) / side - 0.5
    cosine, sine = math.cos(math.radians(ground.angle)), math.sin(math.radians(ground.angle))
    along = line[None, :] * cosine + line[:, None] * sine
    return along, line[:, None] * cosine - line[None, :] * sine


def _pattern(ground: Ground, side: int) -> Floats:
    """(side, side) in [0, 1], with edges one pixel soft."""
    if ground.kind == "cloudy":
        return _clouds(ground.seed, side)
    along, across = _axes(ground, side)
    if ground.kind in ("plain", "gradient"):
        return numpy.clip(along / 1.2 + 0.5, 0, 1)
    pitch, sharp = ground.pitch, ground.pitch * side / math.pi
    wave = numpy.sin(along * (2 * math.pi / pitch))
    if ground.kind == "striped":
        return numpy.clip(wave * sharp + 0.5, 0, 1)
    other = numpy.sin(across * (2 * math.pi / pitch))
    field = wave * other if ground.kind == "checkered" else wave + other - 1.1
    return numpy.clip(field * sharp + 0.5, 0, 1)


def _clouds(seed: int, side: int) -> Floats:
    """Smooth blots: two layers of random values, enlarged."""
    rng = numpy.random.default_rng(seed)
    field = numpy.zeros((side, side), numpy.float32)
    for cells, weight in ((5, 0.65), (11, 0.35)):
        grid = Image.fromarray(rng.random((cells, cells), dtype=numpy.float32))
        field += weight * numpy.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
    return numpy.clip((field - 0.5) * 1.9 + 0.5, 0, 1)

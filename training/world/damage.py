"""Ways in which a picture can be badly drawn, and the small faults that a good generator is forgiven.

Pictures are float tensors (3, side, side) in [0, 1]. Lengths are fractions of the side or of the thing that is hit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from numpy.random import Generator
from torch import Tensor, nn

from diffaccel.miniatures.world.scenes import Scene, SceneObject, between, pick
from training.world import World, styles
from training.world.draw import ground_pixels


def as_tensor(pixels: styles.Pixels) -> Tensor:
    """(3, side, side) floats in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


@dataclass
class Drawn:
    """A scene with its picture, the world it is from and the generator all damage draws from."""

    world: World
    scene: Scene
    picture: Tensor
    rng: Generator

    @property
    def side(self) -> int:
        return self.picture.shape[-1]

    @classmethod
    def of(cls, world: World, scene: Scene, side: int, rng: Generator) -> Drawn:
        return cls(world, scene, as_tensor(world.draw(scene, side)), rng)

    def ground(self) -> Tensor:
        """The same picture without its things."""
        return as_tensor(styles.apply(ground_pixels(self.scene.ground, self.side), self.scene.style))

    def with_other_nouns(self) -> Tensor:
        """The same picture of other things."""
        names = self.world.names
        others = [pick(self.rng, [name for name in names if name != item.noun]) for item in self.scene.objects]
        objects = tuple(replace(item, noun=name) for item, name in zip(self.scene.objects, others, strict=True))
        return as_tensor(self.world.draw(replace(self.scene, objects=objects), self.side))

    def box(self) -> tuple[SceneObject, int, int, int]:
        """One of the things, its upper left corner and its edge in pixels, inside the picture."""
        item = pick(self.rng, self.scene.objects)
        edge = max(4, round(item.size * self.side))
        top, left = (min(max(0, round(at * self.side - edge / 2)), self.side - edge) for at in (item.y, item.x))
        return item, top, left, edge


def blend(drawn: Drawn) -> Tensor:
    """Two things in one place, half transparent."""
    return torch.lerp(drawn.picture, drawn.with_other_nouns(), between(drawn.rng, 0.35, 0.65))


def chimera(drawn: Drawn) -> Tensor:
    """Half of one thing and half of another."""
    other, out = drawn.with_other_nouns(), drawn.picture.clone()
    _, top, left, edge = drawn.box()
    cut = round(edge * between(drawn.rng, 0.4, 0.6))
    rows, columns = slice(top, top + edge), slice(left, left + edge)
    if drawn.rng.random() < 0.5:
        rows = slice(top, top + cut)
    else:
        columns = slice(left, left + cut)
    out[:, rows, columns] = other[:, rows, columns]
    return out


def smear(drawn: Drawn) -> Tensor:
    """Too blurred to be told: cells of 10 to 16 pixels."""
    cells = max(4, round(drawn.side / between(drawn.rng, 10, 16)))
    small = nn.functional.adaptive_avg_pool2d(drawn.picture[None], cells)
    return nn.functional.interpolate(small, (drawn.side, drawn.side), mode="bicubic")[0].clamp(0, 1)


def bend(picture: Tensor, pixels: float, rng: Generator) -> Tensor:
    """Each point moved by about so many pixels, neighbours alike within 25."""
    side = picture.shape[-1]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    cells = max(4, round(side / 25))
    field = torch.randn(1, 2, cells, cells, generator=generator) * pixels * 2 / side
    shift = nn.functional.interpolate(field, (side, side), mode="bicubic")[0].permute(1, 2, 0)
    line = torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + shift
    return nn.functional.grid_sample(picture[None], grid[None], padding_mode="border", align_corners=True)[0]


def warp(drawn: Drawn) -> Tensor:
    """Bent out of shape."""
    return bend(drawn.picture, between(drawn.rng, 6, 10), drawn.rng)


def bite(drawn: Drawn) -> Tensor:
    """A third to a half of a thing's width and height missing from its middle or side."""
    out, ground = drawn.picture.clone(), drawn.ground()
    _, top, left, edge = drawn.box()
    size = round(edge * between(drawn.rng, 0.4, 0.6))
    top, left = (start + int(drawn.rng.integers(edge // 8, edge - size - edge // 8 + 1)) for start in (top, left))
    out[:, top : top + size, left : left + size] = ground[:, top : top + size, left : left + size]
    return out


def fade(drawn: Drawn) -> Tensor:
    """Things that are hardly there."""
    return torch.lerp(drawn.ground(), drawn.picture, between(drawn.rng, 0.12, 0.3))


def speckle(drawn: Drawn) -> Tensor:
    """Noise that was not removed."""
    generator = torch.Generator().manual_seed(int(drawn.rng.integers(2**31)))
    noise = torch.randn(drawn.picture.shape, generator=generator) * between(drawn.rng, 0.15, 0.35)
    return (drawn.picture + noise).clamp(0, 1)


def empty(drawn: Drawn) -> Tensor:
    """Nothing but ground."""
    return drawn.ground()


DAMAGES: tuple[Callable[[Drawn], Tensor], ...] = (blend, chimera, smear, warp, bite, fade, speckle, empty)


def soften(drawn: Drawn) -> Tensor:
    """What a good generator may do to a sound picture: a little bending, blur, noise and tint."""
    picture, rng = drawn.picture, drawn.rng
    if rng.random() < 0.4:
        picture = bend(picture, between(rng, 0.1, 1.0), rng)
    if rng.random() < 0.25:  # more, and pixel art could not be told from a blurred picture
        small = nn.functional.interpolate(picture[None], scale_factor=between(rng, 0.65, 0.9), mode="bilinear")
        picture = nn.functional.interpolate(small, (drawn.side, drawn.side), mode="bilinear")[0]
    return (picture * between(rng, 0.92, 1.08) + between(rng, -0.03, 0.03)).clamp(0, 1)

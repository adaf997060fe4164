"""Scenes of the world: which things lie where, how large, on what ground, in which style; and how they are drawn at random.

A scene is geometry only: lengths are fractions of the picture's side, so one scene can be drawn at any size.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeVar

from diffaccel.miniatures.world.nouns import NAMES

if TYPE_CHECKING:
    from numpy.random import Generator

Item = TypeVar("Item")
Bulk = Literal["small", "medium", "large"]
Rgb = tuple[int, int, int]

STYLES = ("pixel art", "pencil drawing", "neon sign", "old photo", "mosaic", "paper cut")
COLOURLESS_STYLES = ("pencil drawing", "neon sign", "old photo")  # the ground's colour cannot be seen
OUTLINE_STYLES = ("pencil drawing", "neon sign")  # a pattern behind would be all one sees: the ground is plain
COARSE_STYLES = ("mosaic",)  # too coarse for the small things of crowded scenes
PLACES = ("centre", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
BULKS: tuple[Bulk, ...] = ("small", "medium", "large")
GROUNDS = ("plain", "gradient", "striped", "checkered", "dotted", "cloudy")
GROUND_RGB: dict[str, Rgb] = {
    "grey": (196, 198, 202),
    "white": (240, 240, 236),
    "black": (38, 38, 44),
    "blue": (116, 164, 222),
    "green": (134, 190, 134),
    "yellow": (240, 218, 128),
    "pink": (238, 176, 196),
    "brown": (156, 122, 94),
}
GROUND_COLOURS = tuple(GROUND_RGB)
MAX_OBJECTS = 4
ARTWORKS = 2

CLOSE_SIDE = 128  # a picture of this side or less is filled by one object
# Fractions of the side, for pictures of 256 px: 90 to 160 px alone, 64 to 118 px in company.
CLOSE = (0.72, 0.906)
ALONE: dict[Bulk, tuple[float, float]] = {"small": (0.35, 0.42), "medium": (0.44, 0.52), "large": (0.54, 0.625)}
TOGETHER = {2: (0.32, 0.46), 3: (0.25, 0.31), 4: (0.27, 0.40)}
WIDE_SIDE, WIDE_FACTOR = 512, 0.75  # larger pictures show a little more ground, not only larger things
SPREAD = {2: 0.235, 3: 0.325, 4: 0.235}  # from the middle to the outer objects
MAX_TURN = 12.0
MIDDLE = 0.095  # an object's centre lies in the middle of an axis if it is no further from it


@dataclass(frozen=True)
class SceneObject:
    """One thing: `artwork` says which of its drawings; centre and size in fractions of the side, turn in degrees."""

    noun: str
    artwork: int
    x: float
    y: float
    size: float
    turn: float = 0.0
    bulk: Bulk = "medium"

    @property
    def place(self) -> str:
        """Which of the nine `PLACES` its centre lies in."""
        across = "" if abs(self.x - 0.5) <= MIDDLE else ("left" if self.x < 0.5 else "right")
        along = "" if abs(self.y - 0.5) <= MIDDLE else ("top" if self.y < 0.5 else "bottom")
        return f"{along} {across}".strip() or "centre"


@dataclass(frozen=True)
class Ground:
    """What lies behind: a pattern of two tones, its direction in degrees and pitch in fractions of the side.

    `seed` fixes the blots of a cloudy one.
    """

    kind: str = "plain"
    colour: str = "grey"
    tones: tuple[Rgb, Rgb] = (GROUND_RGB["grey"], (176, 178, 182))
    angle: float = 90.0
    pitch: float = 0.125
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows. `style` None is the drawing as it is."""

    objects: tuple[SceneObject, ...]
    ground: Ground = Ground()
    style: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, got {len(self.objects)}")
        if self.style is not None and self.style not in STYLES:
            raise ValueError(f"unknown style {self.style!r}: choose {', '.join(STYLES)}")

    @property
    def layout(self) -> str:
        """single, horizontal or vertical (two), row or column (three), grid (four)."""
        if len(self.objects) in (1, 4):
            return "single" if len(self.objects) == 1 else "grid"
        wide = max(item.x for item in self.objects) - min(item.x for item in self.objects)
        high = max(item.y for item in self.objects) - min(item.y for item in self.objects)
        names = ("horizontal", "vertical") if len(self.objects) == 2 else ("row", "column")
        return names[0] if wide >= high else names[1]


def _hash(*parts: str) -> int:
    return zlib.crc32("|".join(parts).encode())


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees such a scene.

    Held out are a tenth of the noun-style pairs, an eighth of the unordered noun pairs whatever their places, and an
    eighth of the combinations of noun and ground.
    """
    nouns = sorted(item.noun for item in scene.objects)
    if scene.style and any(_hash(name, scene.style) % 10 == 3 for name in nouns):
        return True
    if any(_hash(*pair) % 8 == 3 for pair in combinations(nouns, 2)):
        return True
    ground = scene.ground
    return len(nouns) == 1 and _hash(nouns[0], ground.kind, ground.colour) % 8 == 3


def pick(rng: Generator, items: Sequence[Item]) -> Item:
    """One of `items`, all equally likely."""
    return items[int(rng.integers(len(items)))]


def between(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def random_scene(
    rng: Generator,
    objects: int | None = 1,
    side: int = 128,
    style: str | None = None,
    names: Sequence[str] = NAMES,
) -> Scene:
    """Any scene, held out or not.

    Args:
        objects: how many, 1 to 4; None draws the number, mostly 1 or 2.
        side: of the picture it is meant for, in pixels: one object fills 128, larger pictures hold ground too.
        style: one of `STYLES`, None for none, "random" for one of those that suit the number of objects.
        names: the nouns to draw from.
    """
    count = (1, 1, 1, 2, 2, 2, 3, 4)[int(rng.integers(8))] if objects is None else objects
    chosen = [names[int(index)] for index in rng.choice(len(names), count, replace=False)]
    style = pick(rng, suited_styles(count)) if style == "random" else style
    return Scene(tuple(_placed(rng, chosen, side)), random_ground(rng, style in OUTLINE_STYLES), style)


def suited_styles(objects: int) -> tuple[str, ...]:
    """The styles in which that many things can still be told."""
    return STYLES if objects <= 2 else tuple(name for name in STYLES if name not in COARSE_STYLES)


def training_scene(
    rng: Generator,
    objects: int | None = 1,
    side: int = 128,
    style: str | None = None,
    names: Sequence[str] = NAMES,
) -> Scene:
    """`random_scene`, but never one that is held out."""
    scene = random_scene(rng, objects, side, style, names)
    while is_held_out(scene):
        scene = random_scene(rng, objects, side, style, names)
    return scene


def _placed(rng: Generator, names: Sequence[str], side: int) -> list[SceneObject]:
    factor = WIDE_FACTOR if side >= WIDE_SIDE else 1.0
    if len(names) == 1:
        return [_single(rng, names[0], side <= CLOSE_SIDE, factor)]
    spread = SPREAD[len(names)]
    slots = _slots(rng, len(names))
    low, high = TOGETHER[len(names)]
    jitter = 0.03
    return [
        _object(
            rng,
            name,
            0.5 + column * spread + between(rng, -jitter, jitter),
            0.5 + row * spread + between(rng, -jitter, jitter),
            between(rng, low, high) * factor,
        )
        for name, (column, row) in zip(names, slots, strict=True)
    ]


def _slots(rng: Generator, count: int) -> list[tuple[float, float]]:
    """Columns and rows from -1 to 1, in reading order, which is the order of the scene's objects."""
    if count == 4:
        return [(-1, -1), (1, -1), (-1, 1), (1, 1)]
    line: list[tuple[float, float]] = [(-1, 0), (1, 0)] if count == 2 else [(-1, 0), (0, 0), (1, 0)]
    return line if rng.random() < 0.5 else [(row, column) for column, row in line]


def _single(rng: Generator, name: str, close: bool, factor: float) -> SceneObject:
    if close:
        size = between(rng, *CLOSE)
        room = (1 - size) / 2  # 0.65 of it is less than MIDDLE
        x, y = 0.5 + between(rng, -room, room) * 0.65, 0.5 + between(rng, -room, room) * 0.65
        return _object(rng, name, x, y, size)
    bulk = pick(rng, BULKS)
    size = between(rng, *ALONE[bulk]) * factor
    place = "centre" if rng.random() < 0.5 else pick(rng, PLACES[1:])
    x, y = (_offset(rng, place, low, high, size) for low, high in (("left", "right"), ("top", "bottom")))
    return _object(rng, name, x, y, size, bulk)


def _offset(rng: Generator, place: str, low: str, high: str, size: float) -> float:
    """The coordinate along one axis: about the middle, or so far out that the object nearly touches the border."""
    if low not in place.split() and high not in place.split():
        return 0.5 + between(rng, -0.04, 0.04)
    room = 0.5 - size / 2 - between(rng, 0.02, 0.06)
    return 0.5 - room if low in place.split() else 0.5 + room


def _object(rng: Generator, name: str, x: float, y: float, size: float, bulk: Bulk = "medium") -> SceneObject:
    turn = between(rng, -MAX_TURN, MAX_TURN)
    return SceneObject(
        name, int(rng.integers(ARTWORKS)), round(x, 4), round(y, 4), round(size, 4), round(turn, 2), bulk
    )


def random_ground(rng: Generator, plain: bool = False) -> Ground:
    """Plain and grey more often than anything else, because that is what a caption leaves out."""
    colour = "grey" if rng.random() < 0.3 else pick(rng, GROUND_COLOURS)
    kind = "plain" if plain or rng.random() < 0.4 else pick(rng, GROUNDS)
    base = [int(value + between(rng, -9, 9)) for value in GROUND_RGB[colour]]
    step = {"plain": 10, "gradient": 62, "cloudy": 44}.get(kind, 34)
    sign = 1 if sum(base) < 300 else -1
    tones = [_rgb(base), _rgb([value + sign * step for value in base])]
    angle = between(rng, 60, 120) if kind in ("plain", "gradient") else between(rng, 0, 180)
    return Ground(
        kind,
        colour,
        (tones[0], tones[1]),
        round(angle, 1),
        round(between(rng, 0.09, 0.17), 4),
        int(rng.integers(2**31)),
    )


def _rgb(values: Sequence[int]) -> Rgb:
    red, green, blue = (min(255, max(0, value)) for value in values)
    return red, green, blue

"""The world of real things, drawn: what the models of `emoji-sd` and `emoji-sd3` learn from.

world = World.load(Path("training/out"))
scene = world.sample(rng, objects=None, size=256, style="random")
picture, (text, truth) = world.draw(scene, 256), world.caption(scene, rng)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy.random import Generator
from numpy.typing import NDArray

from diffaccel.miniatures.world.captions import Truth, caption
from diffaccel.miniatures.world.nouns import CORE_NAMES, NAMES
from diffaccel.miniatures.world.scenes import Scene, random_scene, training_scene
from training.world.draw import draw
from training.world.sprites import build
from training.world.styles import Pixels


class World:
    """Scenes, their pictures and their captions; all chance comes from the generator handed in."""

    def __init__(self, sprites: NDArray[numpy.uint8], names: Sequence[str] = NAMES) -> None:
        self.sprites, self.names = sprites, tuple(names)

    @classmethod
    def load(cls, cache: Path, core: bool = False) -> World:
        """With the drawings kept in `cache`, made there if missing; `core` keeps a hundred of the nouns."""
        return cls(build(cache), CORE_NAMES if core else NAMES)

    def sample(
        self,
        rng: Generator,
        objects: int | None = 1,
        size: int = 128,
        style: str | None = None,
        held_out: bool = False,
    ) -> Scene:
        """A scene to be drawn at `size` px. `objects` None draws 1 to 4; `style` "random" one of them all.

        Scenes kept for evaluation appear only if `held_out`.
        """
        pick = random_scene if held_out else training_scene
        return pick(rng, objects, size, style, self.names)

    def draw(self, scene: Scene, size: int) -> Pixels:
        """(size, size, 3) uint8, the same for the same scene."""
        return draw(scene, size, self.sprites)

    def caption(self, scene: Scene, rng: Generator) -> tuple[str, Truth]:
        """One of many phrasings and what it says."""
        return caption(scene, rng)

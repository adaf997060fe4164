"""A world of real things: what its pictures can show, how they are described, and how they are read.

Nothing here draws: the drawings are needed for training alone.
"""

from __future__ import annotations

from diffaccel.miniatures.world.captions import Mention, Truth, WorldCase, caption, held_out_prompts
from diffaccel.miniatures.world.nouns import CORE_NAMES, NAMES, NOUNS, PARENTS, Noun, children_of, names_of, parents_of
from diffaccel.miniatures.world.scenes import (
    GROUND_COLOURS,
    GROUNDS,
    PLACES,
    STYLES,
    Ground,
    Scene,
    SceneObject,
    is_held_out,
    random_scene,
    training_scene,
)

__all__ = [
    "CORE_NAMES",
    "GROUNDS",
    "GROUND_COLOURS",
    "NAMES",
    "NOUNS",
    "PARENTS",
    "PLACES",
    "STYLES",
    "Ground",
    "Mention",
    "Noun",
    "Scene",
    "SceneObject",
    "Truth",
    "WorldCase",
    "caption",
    "children_of",
    "held_out_prompts",
    "is_held_out",
    "names_of",
    "parents_of",
    "random_scene",
    "training_scene",
]

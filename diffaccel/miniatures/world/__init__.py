"""A world of real things: what its pictures can show, how they are described, and how they are read.

Nothing here draws: the drawings are needed for training alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from diffaccel.miniatures.world.judge import WorldJudge

JUDGE_FOLDER = Path(__file__).parent.parent / "emoji-judge"


def load_judge() -> WorldJudge:
    """The network that reads pictures of this world, on the CPU: things, places, sizes, style, ground, and whether well drawn.

    `judge.score(images, cases)` says which pictures show what their prompt asks for. It knows no other pictures; how
    often it is right stands in judge.json.

    Raises:
        DiffaccelError: this version comes without it; training/README.md says how it is trained.
    """
    from diffaccel.errors import DiffaccelError
    from diffaccel.miniatures.world.judge import WorldJudge

    if not (JUDGE_FOLDER / "judge.json").is_file():
        raise DiffaccelError("the judge of the world is still in training and does not come with this version.")
    return WorldJudge.load(JUDGE_FOLDER)


__all__ = [
    "CORE_NAMES",
    "GROUNDS",
    "GROUND_COLOURS",
    "JUDGE_FOLDER",
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
    "load_judge",
    "names_of",
    "parents_of",
    "random_scene",
    "training_scene",
]

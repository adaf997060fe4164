"""What erasure.py erases and draws: tasks, keep lists, and prompts that are the same for every method."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffaccel.erasure.proof.probes import WORDS, Attributes, attributes, other_names, shows, siblings, world_cases
from diffaccel.miniatures import scenes
from diffaccel.miniatures.scenes import COLOURS, SHAPES, TEXTURES, PromptCase, Scene, SceneObject, Statement

Keep = Literal["words", "captions", "both", "half", "none", "prompts"]
SIBLING = "sibling"  # the anchor is the next word of its kind that is not erased
PROMPTS = 1200  # of the keep list "prompts"
JOINT = ("circle+star", "circle+star+heart+square")
GROUPS: dict[str, tuple[str, ...]] = {"shapes": SHAPES, "colours": COLOURS, "textures": TEXTURES, "joint": JOINT}
CAPTIONS = 200  # of the keep list "captions"


@dataclass(frozen=True)
class Task:
    """Concepts that are erased together; its name joins them with "+"."""

    name: str

    @property
    def targets(self) -> tuple[str, ...]:
        """The erased words."""
        return tuple(self.name.split("+"))

    @property
    def group(self) -> str:
        """The heading under which it is summed up."""
        if len(self.targets) > 1:
            return f"{len(self.targets)} at once"
        return next((group for group, names in GROUPS.items() if self.name in names), "others")


def tasks(chosen: Sequence[str]) -> list[Task]:
    """Tasks from names of groups, of single concepts, or of several joined with "+".

    Raises:
        ValueError: a word that names no shape, colour, texture or size.
    """
    names = [name for item in chosen for name in GROUPS.get(item, (item,))]
    for word in (word for name in names for word in name.split("+")):
        if not attributes(word):
            raise ValueError(f"{word!r} names nothing that the bundled models draw")
    return [Task(name) for name in dict.fromkeys(names)]


def concepts(task: Task, synonyms: bool, anchor: str) -> list[Any]:
    """What `erase` is asked for: the words, with the world's synonyms at full weight or without them."""
    from diffaccel.edits.concepts import Concept

    return [
        Concept(
            target=word,
            synonyms=tuple((name, 1.0) for name in other_names(word)) if synonyms else (),
            anchor=_sibling(word, task) if anchor == SIBLING else anchor,
        )
        for word in task.targets
    ]


def _sibling(word: str, task: Task) -> str:
    erased = {item for target in task.targets for item in attributes(target)}
    return next(name for name in siblings(word) if not set(attributes(name)) & erased)


def world_prompts() -> list[str]:
    """Prompts of the kind that the model gets: captions of training scenes, the same for every task."""
    rng = random.Random(6)
    return [scenes.caption(scene, rng) for scene in (scenes.training_scene(rng) for _ in range(PROMPTS))]


def keep_list(task: Task, keep: Keep) -> list[str]:
    """Texts to preserve.

    words: every other word of the world; half: the same, without every second sibling of what is erased (those remain
    unlisted neighbours); captions: 200 training captions about other things; both: words and captions; prompts: nothing,
    since `world_prompts` say what to preserve.
    """
    erased = {item for word in task.targets for item in attributes(word)}
    unlisted = {name for word in task.targets for name in siblings(word)[::2]} if keep == "half" else set()
    words = [
        word
        for field, names in WORDS.items()
        for name, synonyms in names.items()
        if (field, name) not in erased and name not in unlisted
        for word in synonyms
    ]
    found = [*words, *scenes.BACKGROUNDS] if keep in ("words", "half", "both") else []
    return [*found, *_captions(task)] if keep in ("captions", "both") else found


def _captions(task: Task) -> list[str]:
    rng, erased = random.Random(5), [attributes(word) for word in task.targets]
    found: dict[str, None] = {}
    while len(found) < CAPTIONS:
        scene = scenes.training_scene(rng)
        if not shown(scene, erased):
            found[scenes.caption(scene, rng)] = None
    return list(found)


def shown(scene: Scene, wanted: Sequence[Attributes]) -> bool:
    """Whether some object of the scene has all attributes of some phrase."""
    return any(shows(item, phrase) for item in scene.objects for phrase in wanted)


def pool(count: int, seed: int = 0) -> list[PromptCase]:
    """Prompts about everything, each shape, colour and texture equally often in the first object; half have a second one.

    Textures are always named, so that each can be asked for.
    """
    rng, found = random.Random(f"pool-{seed}"), []
    for i in range(count):
        shape, colour = SHAPES[i % len(SHAPES)], COLOURS[(i + i // len(SHAPES)) % len(COLOURS)]
        texture = TEXTURES[(i + i // len(SHAPES) + i // 64) % len(TEXTURES)]
        first = SceneObject(shape, colour, texture, rng.choice(("small", "large", "large")))
        scene = _scene(first, rng, pair=(i // len(SHAPES)) % 2 == 1)
        drawn = scenes.random_statement(scene, rng)
        stated = Statement((True,) * len(scene.objects), drawn.sizes, drawn.background)
        found.append(PromptCase(scenes.caption(scene, rng, stated), scene, stated))
    return found


def _scene(first: SceneObject, rng: random.Random, *, pair: bool) -> Scene:
    background = rng.choice(scenes.BACKGROUNDS)
    if not pair:
        return Scene((first,), None, background)
    second = scenes.random_object(rng)
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = scenes.random_object(rng)
    return Scene((first, second), rng.choice(scenes.RELATIONS), background)


def named(case: PromptCase) -> set[tuple[str, str]]:
    """The shapes, colours and textures that a prompt names, as (field, class)."""
    found = set()
    for item, texture in zip(case.scene.objects, case.stated.textures, strict=True):
        found |= {("shape", item.shape), ("colour", item.colour)}
        found |= {("texture", item.texture)} if texture else set()
    return found


def erased_cases(word: str, count: int, seed: int) -> dict[str, list[PromptCase]]:
    """`count` prompts that name a concept, shared among its words: word -> prompts."""
    names = (word, *other_names(word))
    shares = [count // len(names) + (i < count % len(names)) for i in range(len(names))]
    return {name: world_cases(name, share, seed=seed) for name, share in zip(names, shares, strict=True)}

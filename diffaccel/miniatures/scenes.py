"""The little world the miniature models know: scenes, their captions and held-out prompts.

Pure Python on purpose: nothing here imports torch, so listing prompts costs milliseconds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
TEXTURES = ("plain", "striped", "dotted", "outlined")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("grey", "dark", "navy", "brown", "pink", "teal")

# Every synonym is seen in training: a held-out caption is about its combination, not its vocabulary.
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "pyramid"),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "heart": ("heart",),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "orange": ("orange",),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "white": ("white", "snowy"),
}
TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "outlined": ("outlined", "framed"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "and"),  # "and" reads from left to right
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {name: (name,) for name in BACKGROUNDS}

# Never drawn nor captioned in training: 8 colour-shape pairs, and pairs of objects by this rule.
HELD_OUT_SINGLE = frozenset(zip(COLOURS, SHAPES[3:] + SHAPES[:3], strict=True))

Kind = Literal["single", "pair", "mixed"]


@dataclass(frozen=True)
class SceneObject:
    """One object; every field is a member of the vocabulary of its name."""

    shape: str
    colour: str
    texture: str = "plain"
    size: str = "large"


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; `relation` says where the first lies relative to the second."""

    objects: tuple[SceneObject, ...]
    relation: str | None = None
    background: str = "grey"

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has 1 or 2 objects, got {len(self.objects)}")
        if (self.relation is not None) != (len(self.objects) == 2):
            raise ValueError("a relation is given for two objects and only for two")


@dataclass(frozen=True)
class Statement:
    """Which optional attributes a caption mentions; shape, colour and relation are always mentioned."""

    textures: tuple[bool, ...]
    sizes: tuple[bool, ...]
    background: bool = False


@dataclass(frozen=True)
class PromptCase:
    """A prompt, the scene it describes, and what of that scene it says aloud."""

    prompt: str
    scene: Scene
    stated: Statement


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this scene: a held-out colour-shape pair, or a held-out pair of objects."""
    if any((item.colour, item.shape) in HELD_OUT_SINGLE for item in scene.objects):
        return True
    return len(scene.objects) == 2 and _pair_is_held_out(scene.objects)


def _pair_is_held_out(objects: Sequence[SceneObject]) -> bool:
    """One in eight unordered pairs of shapes-with-colours, whatever their arrangement."""
    codes = [SHAPES.index(item.shape) * len(COLOURS) + COLOURS.index(item.colour) for item in objects]
    return (sum(codes) + 5 * max(codes)) % 8 == 3


def canonical_slots(scene: Scene) -> dict[str, SceneObject]:
    """The scene by place: {"centre": object} or two of "left", "right", "top", "bottom"."""
    if scene.relation is None:
        return {"centre": scene.objects[0]}
    places = {
        "left of": ("left", "right"),
        "right of": ("right", "left"),
        "above": ("top", "bottom"),
        "below": ("bottom", "top"),
    }[scene.relation]
    return dict(zip(places, scene.objects, strict=True))


def random_object(rng: random.Random) -> SceneObject:
    """Shape and colour uniform; plain and large are as likely as their alternatives together."""
    texture = rng.choice(TEXTURES) if rng.random() < 0.65 else "plain"
    return SceneObject(rng.choice(SHAPES), rng.choice(COLOURS), texture, rng.choice(SIZES))


def random_scene(rng: random.Random, kind: Kind = "mixed") -> Scene:
    """Any scene of the world, held out or not; two objects never share both shape and colour."""
    pair = kind == "pair" or (kind == "mixed" and rng.random() < 0.5)
    first = random_object(rng)
    background = rng.choice(BACKGROUNDS) if rng.random() < 0.6 else "grey"
    if not pair:
        return Scene((first,), None, background)
    second = random_object(rng)
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = random_object(rng)
    return Scene((first, second), rng.choice(RELATIONS), background)


def training_scene(rng: random.Random, kind: Kind = "mixed") -> Scene:
    """A scene that is not held out."""
    scene = random_scene(rng, kind)
    while is_held_out(scene):
        scene = random_scene(rng, kind)
    return scene


def random_statement(scene: Scene, rng: random.Random) -> Statement:
    """What to mention: plain, large and grey go without saying more often than their alternatives."""
    textures = tuple(rng.random() < (0.25 if item.texture == "plain" else 0.96) for item in scene.objects)
    sizes = tuple(rng.random() < (0.3 if item.size == "large" else 0.9) for item in scene.objects)
    return Statement(textures, sizes, rng.random() < (0.2 if scene.background == "grey" else 0.85))


def caption(scene: Scene, rng: random.Random, stated: Statement | None = None) -> str:
    """One of many phrasings of `scene`; `stated` fixes what is mentioned, otherwise it is drawn too."""
    stated = random_statement(scene, rng) if stated is None else stated
    phrases = [
        _object_phrase(item, rng, texture, size)
        for item, texture, size in zip(scene.objects, stated.textures, stated.sizes, strict=True)
    ]
    if scene.relation is None:
        article, phrase = _article(phrases[0]), phrases[0]
        text = rng.choice((f"{article} {phrase}", f"one {phrase}", f"a picture of {article} {phrase}", phrase))
    else:
        text = _pair_text(phrases, scene.relation, rng)
    if stated.background:
        text += f" on {_article(scene.background)} {rng.choice(BACKGROUND_WORDS[scene.background])} background"
    return text


def _object_phrase(item: SceneObject, rng: random.Random, texture: bool, size: bool) -> str:
    words = [rng.choice(SIZE_WORDS[item.size])] if size else []
    words += [rng.choice(TEXTURE_WORDS[item.texture])] if texture else []
    return " ".join([*words, rng.choice(COLOUR_WORDS[item.colour]), rng.choice(SHAPE_WORDS[item.shape])])


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def _pair_text(phrases: Sequence[str], relation: str, rng: random.Random) -> str:
    first, second = (f"{_article(phrase)} {phrase}" for phrase in phrases)
    words = rng.choice(RELATION_WORDS[relation])
    plain = f"{phrases[0]} {words} {phrases[1]}"
    return rng.choice((f"{first} {words} {second}", f"a picture of {first} {words} {second}", plain))


def held_out_prompts(kind: Kind, count: int, seed: int = 0) -> list[PromptCase]:
    """`count` distinct prompts about scenes that training never saw; the same list for the same arguments.

    Raises ValueError for an unknown kind or a negative count.
    """
    if kind not in ("single", "pair", "mixed"):
        raise ValueError(f"unknown kind {kind!r}: choose single, pair or mixed")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(f"{kind}-{seed}")
    cases: dict[str, PromptCase] = {}
    while len(cases) < count:
        one = ("single", "pair")[len(cases) % 2] if kind == "mixed" else kind
        case = _prompt_case(one, rng)
        if is_held_out(case.scene):
            cases.setdefault(case.prompt, case)
    return list(cases.values())


def _prompt_case(kind: str, rng: random.Random) -> PromptCase:
    scene = random_scene(rng, "single" if kind == "single" else "pair")
    stated = random_statement(scene, rng)
    return PromptCase(caption(scene, rng, stated), scene, stated)

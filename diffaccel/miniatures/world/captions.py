"""Captions of scenes in many phrasings, with what exactly each of them says; and prompts that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffaccel.miniatures.world.nouns import NAMES, NOUNS, PARENTS, names_of, noun, parents_of, with_article
from diffaccel.miniatures.world.scenes import (
    COLOURLESS_STYLES,
    GROUND_COLOURS,
    OUTLINE_STYLES,
    Scene,
    SceneObject,
    is_held_out,
    pick,
    random_scene,
)

if TYPE_CHECKING:
    from numpy.random import Generator

Kind = Literal["single", "style", "pair", "three", "four", "mixed"]
KINDS: tuple[Kind, ...] = ("single", "style", "pair", "three", "four", "mixed")

STYLE_PHRASES: dict[str, tuple[str, ...]] = {
    "pixel art": ("pixel art of {}", "{} in pixel art style", "pixel art, {}", "an 8-bit picture of {}"),
    "pencil drawing": ("a pencil drawing of {}", "{}, pencil drawing", "a pencil sketch of {}", "{} drawn in pencil"),
    "neon sign": ("a neon sign of {}", "{} as a neon sign", "{}, neon sign", "{} in neon light"),
    "old photo": ("an old photo of {}", "{}, old photo", "a vintage photo of {}", "{} in a sepia photo"),
    "mosaic": ("a mosaic of {}", "{} as a mosaic", "{}, mosaic", "{} in mosaic tiles"),
    "paper cut": ("a paper cut of {}", "{}, paper cut", "{} cut from paper", "a paper collage of {}"),
}
PLAIN_PHRASES = ("{}", "{}", "a picture of {}")
COUNTED_PHRASES = ("there is {}", "one {bare}")  # of one thing that can be counted
BULK_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "centre": ("in the middle", "in the centre"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "at the upper edge"),
    "bottom": ("at the bottom", "at the lower edge"),
    "top left": ("in the top left corner", "at the upper left"),
    "top right": ("in the top right corner", "at the upper right"),
    "bottom left": ("in the bottom left corner", "at the lower left"),
    "bottom right": ("in the bottom right corner", "at the lower right"),
}
# What two things are to each other; the first word names where the first lies. "and" reads from left to right.
RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "and"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
LINE_PHRASES: dict[str, tuple[str, ...]] = {
    "row": ("{0}, {1} and {2}", "{0}, {1} and {2} in a row", "{0}, {1} and {2} from left to right"),
    "column": ("{0}, {1} and {2} from top to bottom", "{0} above {1} above {2}", "{0}, {1} and {2} in a column"),
    "grid": ("{0} and {1} above {2} and {3}", "{0} and {1} over {2} and {3}"),
}
GROUND_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain",),
    "gradient": ("shaded",),
    "striped": ("striped",),
    "checkered": ("checkered",),
    "dotted": ("dotted", "spotted"),
    "cloudy": ("cloudy",),
}
GROUND_PHRASES = ("on {} background", "on {} ground", "against {} background")
SYNONYM_SHARE, PARENT_SHARE = 0.25, 0.06


@dataclass(frozen=True)
class Mention:
    """What a caption says of one object: the word, the nouns that fulfil it, and its place and size if told."""

    term: str
    names: tuple[str, ...]
    place: str | None = None
    bulk: str | None = None


@dataclass(frozen=True)
class Truth:
    """What a caption says. `mentions` lie in the scene's order, whatever the order of the words.

    `layout` is the scene's; None for style is the drawing as it is, None for the ground's colour or kind is untold.
    """

    mentions: tuple[Mention, ...]
    layout: str
    style: str | None = None
    ground_colour: str | None = None
    ground_kind: str | None = None


@dataclass(frozen=True)
class WorldCase:
    """A prompt, one scene it describes, and what of that scene it says."""

    prompt: str
    scene: Scene
    truth: Truth


def vocabulary_words() -> list[str]:
    """Every word a caption can hold, sorted; punctuation are words of their own."""
    tables: tuple[dict[str, tuple[str, ...]], ...] = (
        STYLE_PHRASES,
        BULK_WORDS,
        PLACE_PHRASES,
        RELATIONS,
        LINE_PHRASES,
        GROUND_WORDS,
    )
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    phrases += [*PLAIN_PHRASES, *COUNTED_PHRASES, *GROUND_PHRASES, *GROUND_COLOURS, *PARENTS, "a an"]
    phrases += [term for item in NOUNS for term in item.terms]
    return sorted({word for phrase in phrases for word in _words(phrase)})


def _words(phrase: str) -> list[str]:
    for mark in ("{}", "{bare}", *(f"{{{index}}}" for index in range(4))):
        phrase = phrase.replace(mark, " ")
    for mark in (",", "-"):
        phrase = phrase.replace(mark, f" {mark} ")
    return [piece for word in phrase.split() for piece in _split_digits(word)]


def _split_digits(word: str) -> list[str]:
    """CLIP's tokenizer never joins a digit with anything."""
    return list(word) if any(letter.isdigit() for letter in word) else [word]


def caption(scene: Scene, rng: Generator, parents: float = PARENT_SHARE) -> tuple[str, Truth]:
    """One of many phrasings of `scene` and what it says.

    `parents` is how often a wider word stands for a noun ("an animal"), in scenes of one or two things.
    """
    mentions = [_mention(item, scene, rng, parents) for item in scene.objects]
    phrases = [with_article(row.term, _bulk_word(row, rng)) for row in mentions]
    told = _told_ground(scene, rng)
    text = _arranged(scene, mentions, phrases, rng) + _ground_text(told, rng)
    text = _styled(text, scene, rng, phrases[0])
    return text, Truth(tuple(mentions), scene.layout, scene.style, *told)


def _mention(item: SceneObject, scene: Scene, rng: Generator, parents: float) -> Mention:
    term = item.noun
    if len(scene.objects) <= 2 and rng.random() < parents:
        term = pick(rng, parents_of(item.noun))
    elif noun(item.noun).synonyms and rng.random() < SYNONYM_SHARE:
        term = pick(rng, noun(item.noun).synonyms)
    return Mention(term, names_of(term), _told_place(item, scene, rng), _told_bulk(item, scene, rng))


def _told_place(item: SceneObject, scene: Scene, rng: Generator) -> str | None:
    """Of several things always; for one thing the middle goes without saying."""
    if len(scene.objects) > 1 or rng.random() < (0.06 if item.place == "centre" else 0.92):
        return item.place
    return None


def _told_bulk(item: SceneObject, scene: Scene, rng: Generator) -> str | None:
    """Size is told of single things, and only if it is unusual."""
    if len(scene.objects) > 1 or item.bulk == "medium" or rng.random() > 0.8:
        return None
    return item.bulk


def _bulk_word(row: Mention, rng: Generator) -> str:
    return pick(rng, BULK_WORDS[row.bulk]) if row.bulk else ""


def _arranged(scene: Scene, mentions: Sequence[Mention], phrases: Sequence[str], rng: Generator) -> str:
    if scene.layout == "single":
        place = mentions[0].place
        return f"{phrases[0]} {pick(rng, PLACE_PHRASES[place])}" if place else phrases[0]
    if len(phrases) == 2:
        return _pair_text(scene.layout, phrases, rng)
    return pick(rng, LINE_PHRASES[scene.layout]).format(*phrases)


def _pair_text(layout: str, phrases: Sequence[str], rng: Generator) -> str:
    forward, backward = ("left of", "right of") if layout == "horizontal" else ("above", "below")
    if rng.random() < 0.6:
        return f"{phrases[0]} {pick(rng, RELATIONS[forward])} {phrases[1]}"
    return f"{phrases[1]} {pick(rng, RELATIONS[backward])} {phrases[0]}"


def _told_ground(scene: Scene, rng: Generator) -> tuple[str | None, str | None]:
    """Colour and kind of the ground, where told; grey and plain go without saying, and styles without colour have none."""
    ground = scene.ground
    colour = ground.colour if rng.random() < (0.15 if ground.colour == "grey" else 0.88) else None
    kind = ground.kind if rng.random() < (0.05 if ground.kind == "plain" else 0.88) else None
    return None if scene.style in COLOURLESS_STYLES else colour, None if scene.style in OUTLINE_STYLES else kind


def _ground_text(told: tuple[str | None, str | None], rng: Generator) -> str:
    colour, kind = told
    words = ([pick(rng, GROUND_WORDS[kind])] if kind else []) + ([colour] if colour else [])
    return " " + pick(rng, GROUND_PHRASES).format(with_article(" ".join(words))) if words else ""


def _styled(text: str, scene: Scene, rng: Generator, first: str) -> str:
    if scene.style:
        return pick(rng, STYLE_PHRASES[scene.style]).format(text)
    article = next((word for word in ("a ", "an ") if first.startswith(word)), None)
    countable = len(scene.objects) == 1 and article is not None
    phrase = pick(rng, PLAIN_PHRASES + COUNTED_PHRASES if countable else PLAIN_PHRASES)
    return phrase.format(text, bare=text.removeprefix(article or ""))


def held_out_prompts(
    kind: Kind, count: int, seed: int = 0, side: int = 256, names: Sequence[str] | None = None
) -> list[WorldCase]:
    """`count` distinct prompts about scenes that training never saw; the same list for the same arguments.

    Args:
        kind: "single" (no style), "style" (one thing in a style), "pair", "three", "four", or "mixed": the first three in turn.
        side: of the pictures to be made; at 128 one thing fills the picture.
        names: the nouns to ask for, all of the world's if None. No wider words are used.
    Raises:
        ValueError: an unknown kind or a negative count.
    """
    import numpy

    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose {', '.join(KINDS)}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = numpy.random.default_rng([seed, KINDS.index(kind), side])
    cases: dict[str, WorldCase] = {}
    while len(cases) < count:
        one = KINDS[len(cases) % 3] if kind == "mixed" else kind
        case = _case(one, rng, side, names)
        if is_held_out(case.scene):
            cases.setdefault(case.prompt, case)
    return list(cases.values())


def _case(kind: Kind, rng: Generator, side: int, names: Sequence[str] | None) -> WorldCase:
    objects = {"pair": 2, "three": 3, "four": 4}.get(kind, 1)
    style = "random" if kind == "style" else None
    scene = random_scene(rng, objects, side, style, NAMES if names is None else names)
    text, truth = caption(scene, rng, parents=0.0)
    return WorldCase(text, scene, truth)

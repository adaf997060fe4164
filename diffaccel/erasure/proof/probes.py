"""What is drawn to prove an edit: prompts that name what was erased, its other names, what was to stay, and what nobody listed.

For the bundled models the prompts are captions of their own little world, phrased as in training; a phrase such as
"a red heart" then means one object that is both. For other models a phrase is put into templates.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from diffaccel.miniatures import scenes
from diffaccel.miniatures.scenes import PromptCase, Scene, SceneObject, Statement

Role = Literal["erased", "synonym", "kept", "neighbour"]
Attributes = tuple[tuple[str, str], ...]  # (("shape", "heart"), ("colour", "red"))

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": scenes.SHAPE_WORDS,
    "colour": scenes.COLOUR_WORDS,
    "texture": scenes.TEXTURE_WORDS,
    "size": scenes.SIZE_WORDS,
}
MEANINGS = {word: (field, name) for field, names in WORDS.items() for name, words in names.items() for word in words}
TEMPLATES = ("a picture of {}", "{}", "a photo of {}", "a drawing of {}", "{} in the centre of the picture")


@dataclass(frozen=True)
class Probe:
    """One prompt and what to look for in its picture.

    Attributes:
        prompt: the text given to the pipeline.
        role: why it is drawn; the rows of a proof are per role and concept.
        concept: the phrase as the user wrote it.
        looked_for: the phrase whose presence is recognised; for a synonym that is the erased concept.
    """

    prompt: str
    role: Role
    concept: str
    looked_for: str


def attributes(text: str) -> Attributes:
    """What a phrase says about one object of the shapes world; () if it says nothing about it."""
    return tuple(MEANINGS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in MEANINGS)


def other_names(text: str) -> tuple[str, ...]:
    """The other words of the shapes world for a concept that is one word of it."""
    if text.lower() not in MEANINGS:
        return ()
    field, name = MEANINGS[text.lower()]
    return tuple(word for word in WORDS[field][name] if word != text.lower())


def siblings(text: str) -> tuple[str, ...]:
    """The other classes of the same kinds: its neighbours."""
    return tuple(other for field, name in attributes(text) for other in WORDS[field] if other != name)


def shows(item: SceneObject, wanted: Attributes) -> bool:
    """Whether an object has all these attributes."""
    return all(getattr(item, field) == name for field, name in wanted)


def world_cases(
    phrase: str, count: int, *, avoid: Iterable[str] = (), pairs: float = 0.5, seed: int = 0
) -> list[PromptCase]:
    """`count` captions that name `phrase` in its own words, about scenes of the shapes world.

    Args:
        phrase: words of that world that describe one object.
        avoid: phrases; no object of the scenes may be described by one of them.
        pairs: share of scenes with a second object.
    Raises:
        ValueError: the phrase says nothing about the world, or nothing is left to draw.
    """
    wanted, excluded = attributes(phrase), [attributes(text) for text in avoid]
    if not wanted:
        raise ValueError(f"{phrase!r} names nothing that the bundled models draw.")
    rng = random.Random(f"{phrase}-{seed}")
    found: list[PromptCase] = []
    for _ in range(400 * max(count, 1)):
        if len(found) == count:
            break
        scene = _with(scenes.random_scene(rng, "pair" if rng.random() < pairs else "single"), wanted, rng)
        if not any(shows(item, other) for item in scene.objects for other in excluded):
            found.append(_case(scene, phrase, rng))
    if len(found) < count:
        raise ValueError(f"no scenes are left that show {phrase!r} and nothing that was erased.")
    return found


def _with(scene: Scene, wanted: Attributes, rng: random.Random) -> Scene:
    """The scene with one object changed so that it has the wanted attributes."""
    chosen = rng.randrange(len(scene.objects))
    objects = [
        dataclasses.replace(item, **dict(wanted)) if i == chosen else item for i, item in enumerate(scene.objects)
    ]
    return dataclasses.replace(scene, objects=tuple(objects))


def _case(scene: Scene, phrase: str, rng: random.Random) -> PromptCase:
    """A caption that uses the phrase's own words and none of their synonyms."""
    wanted = attributes(phrase)
    needed = {word for word in re.findall(r"[a-z]+", phrase.lower()) if word in MEANINGS}
    banned = {word for field, name in wanted for word in WORDS[field][name]} - needed
    stated = stating(scene, wanted, rng)
    while True:
        text = scenes.caption(scene, rng, stated)
        words = set(text.split())
        if needed <= words and not banned & words:
            return PromptCase(text, scene, stated)


def stating(scene: Scene, wanted: Attributes, rng: random.Random) -> Statement:
    """A random statement that mentions texture and size at least where they are wanted."""
    drawn, fields = scenes.random_statement(scene, rng), {field for field, _ in wanted}
    hits = [shows(item, wanted) for item in scene.objects]
    textures = tuple(s or (hit and "texture" in fields) for s, hit in zip(drawn.textures, hits, strict=True))
    sizes = tuple(s or (hit and "size" in fields) for s, hit in zip(drawn.sizes, hits, strict=True))
    return Statement(textures, sizes, drawn.background)


def without(case: PromptCase, phrase: str) -> str:
    """The same caption with the words of the phrase and their synonyms left out, to see what appears unasked."""
    gone = {word for field, name in attributes(phrase) for word in WORDS[field][name]}
    return " ".join(word for word in case.prompt.split() if word not in gone)


def world_probes(
    targets: Mapping[str, Sequence[str]],
    kept: Sequence[str],
    neighbours: Sequence[str],
    *,
    count: int,
    seed: int = 0,
    pairs: float = 0.5,
) -> list[Probe]:
    """Probes in the shapes world. `targets` maps each erased phrase to its listed synonyms; the world's own are added."""

    def some(phrase: str, role: Role, looked_for: str, avoid: Iterable[str] = ()) -> list[Probe]:
        cases = world_cases(phrase, count, avoid=avoid, pairs=pairs, seed=seed)
        return [Probe(case.prompt, role, phrase, looked_for) for case in cases]

    found = [probe for target in targets for probe in some(target, "erased", target)]
    for target, listed in targets.items():
        names = [name for name in dict.fromkeys((*listed, *other_names(target))) if attributes(name)]
        found += [probe for name in names for probe in some(name, "synonym", target)]
    roles: tuple[tuple[Role, Sequence[str]], ...] = (("kept", kept), ("neighbour", neighbours))
    for role, phrases in roles:
        found += [probe for phrase in phrases for probe in some(phrase, role, phrase, targets)]
    return found


def template_probes(
    targets: Mapping[str, Sequence[str]],
    kept: Sequence[str],
    neighbours: Sequence[str],
    *,
    count: int,
    templates: Sequence[str] = TEMPLATES,
) -> list[Probe]:
    """Probes for any model: each phrase in the templates, over and over until there are `count` (the seeds differ)."""
    named: list[tuple[Role, str, str]] = [("erased", target, target) for target in targets]
    named += [("synonym", name, target) for target, listed in targets.items() for name in listed]
    named += [("kept", phrase, phrase) for phrase in kept] + [("neighbour", phrase, phrase) for phrase in neighbours]
    return [
        Probe(templates[i % len(templates)].format(phrase), role, phrase, looked_for)
        for role, phrase, looked_for in named
        for i in range(count)
    ]

"""The things the world's pictures show: names, synonyms, and the wider words that span several of them.

The list was chosen once, by eye: whatever cannot be told apart at 96 pixels is not in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DATA: dict[str, Any] = json.loads((Path(__file__).parent / "nouns.json").read_text())


@dataclass(frozen=True)
class Noun:
    """One thing: `parent` is the narrowest wider word, `core` marks the hundred that a small world keeps."""

    name: str
    synonyms: tuple[str, ...]
    parent: str
    core: bool

    @property
    def terms(self) -> tuple[str, ...]:
        """All words for it, the name first."""
        return self.name, *self.synonyms


NOUNS = tuple(Noun(row["name"], tuple(row["synonyms"]), row["parent"], row["core"]) for row in _DATA["nouns"])
NAMES = tuple(noun.name for noun in NOUNS)
CORE_NAMES = tuple(noun.name for noun in NOUNS if noun.core)
NOUN_INDEX = {name: index for index, name in enumerate(NAMES)}
PARENTS: dict[str, str | None] = _DATA["parents"]
WITHOUT_ARTICLE = frozenset(_DATA["without_article"])


def noun(name: str) -> Noun:
    """The noun of that name. Raises ValueError for a word that is none."""
    if name not in NOUN_INDEX:
        raise ValueError(f"no noun {name!r} in the world: see NAMES")
    return NOUNS[NOUN_INDEX[name]]


def parents_of(name: str) -> tuple[str, ...]:
    """The wider words for a noun, narrowest first: ("bird", "animal") for "owl"."""
    chain = [noun(name).parent]
    while wider := PARENTS[chain[-1]]:
        chain.append(wider)
    return tuple(chain)


def children_of(parent: str) -> tuple[str, ...]:
    """The names that a wider word spans. Raises ValueError for a word that is none."""
    if parent not in PARENTS:
        raise ValueError(f"no wider word {parent!r} in the world: choose {', '.join(PARENTS)}")
    return tuple(name for name in NAMES if parent in parents_of(name))


def names_of(term: str) -> tuple[str, ...]:
    """Every noun that a word stands for: one for a name or synonym, the children for a wider word.

    Raises ValueError for a word the world does not know.
    """
    if term in PARENTS:
        return children_of(term)
    found = tuple(item.name for item in NOUNS if term in item.terms)
    if not found:
        raise ValueError(f"the world has no word {term!r}")
    return found


def with_article(term: str, adjective: str = "") -> str:
    """ "an owl", "a small owl", "scissors"."""
    phrase = f"{adjective} {term}".strip()
    if term in WITHOUT_ARTICLE:
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' and not phrase.startswith('uni') else 'a'} {phrase}"

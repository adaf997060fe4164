"""What to erase: concepts with weighted synonyms and anchors, their file, and the combinations that make no sense."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from diffaccel.errors import DiffaccelError
from diffaccel.files.text import read_text

LARGEST_FILE = 4_000_000  # bytes; a thousand concepts need about a tenth of it


class ErasureError(DiffaccelError, ValueError):
    """A request for an edit that cannot be fulfilled as it stands; the message says what to change."""


class ErasureWarning(UserWarning):
    """An edit that does not do all that one would expect."""


class WeakErasure(ErasureWarning):
    """The edit moves a concept less than half of the way to its anchor."""


class LostKeep(ErasureWarning):
    """The edit changes something that was to be kept."""


class UneditedControl(ErasureWarning):
    """A network that reads the prompt by projections of its own runs beside an edited one."""


Weight = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


class Concept(BaseModel):
    """One thing to erase.

    Attributes:
        target: how prompts name it.
        synonyms: other names (co-references) that must go too, each with its weight; the target's is 1.
        anchor: what to draw instead; "" is nothing in particular, None the anchor given to `erase`, or its choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    synonyms: tuple[tuple[str, Weight], ...] = ()
    anchor: str | None = None

    @field_validator("target")
    @classmethod
    def _named(cls, target: str) -> str:
        return _phrase(target, "a target")

    @field_validator("synonyms", mode="before")
    @classmethod
    def _weighted(cls, synonyms: object) -> object:
        """A synonym without a weight has weight 1."""
        if not isinstance(synonyms, list | tuple):
            return synonyms  # pydantic refuses it
        return tuple((entry, 1.0) if isinstance(entry, str) else entry for entry in synonyms)

    @field_validator("synonyms")
    @classmethod
    def _sorted(cls, synonyms: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        return tuple(sorted((_phrase(text, "a synonym"), weight) for text, weight in synonyms))

    @field_validator("anchor")
    @classmethod
    def _stripped(cls, anchor: str | None) -> str | None:
        return None if anchor is None else _one_line(anchor)

    @property
    def names(self) -> tuple[tuple[str, float], ...]:
        """Every text that names it, with weights; the target first."""
        return ((self.target, 1.0), *self.synonyms)


class ConceptList(BaseModel):
    """A concept file: `{"concepts": [...], "keep": [...], "anchor": "..."}`; concepts are texts or Concept objects.

    A text with commas names several things, see `names_in`; the target of an object is taken as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    concepts: tuple[Concept, ...]
    keep: tuple[str, ...] = ()
    anchor: str | None = None

    @field_validator("concepts", mode="before")
    @classmethod
    def _texts_too(cls, concepts: object) -> object:
        if not isinstance(concepts, list | tuple):
            return concepts  # pydantic refuses it
        named = [names_in(entry) if isinstance(entry, str) else [entry] for entry in concepts]
        return [{"target": entry} if isinstance(entry, str) else entry for entries in named for entry in entries]


def read_concepts(path: str | Path) -> ConceptList:
    """Read a concept file (JSON; UTF-8, or UTF-16 with a byte order mark).

    Raises:
        ErasureError: not such a file; the message names the place.
        OSError: cannot be read.
    """
    file = Path(path)
    if file.stat().st_size > LARGEST_FILE:
        raise ErasureError(f"{file} is larger than {LARGEST_FILE} bytes, too large for a concept file.")
    try:
        return ConceptList.model_validate(_json(read_text(file)))
    except ValidationError as error:
        raise ErasureError(f"{file} is not a concept file: {describe_problem(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise ErasureError(f"{file} is not a concept file: it is not JSON ({error}).") from None


def _json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is given twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def names_in(text: str) -> list[str]:
    r"""The things that a text names: commas and line ends separate them, in every way in; `\,` is a comma of a name."""
    parts = [part.replace("\\,", ",").strip() for part in re.split(r"(?<!\\)[,\n]", text)]
    return [part for part in parts if part] or [text.strip()]


def escaped(text: str) -> str:
    r"""A name as `names_in` reads it again: its commas as `\,`."""
    return text.replace(",", r"\,")


def settle(
    concepts: str | Concept | Sequence[str | Concept], keep: Sequence[str], anchor: str | None
) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """Concepts with the given anchor and the user's keeps, both without duplicates and in a fixed order.

    An anchor that nobody gave stays None.

    Raises:
        ErasureError: nothing to erase, an empty text, a text named twice, an anchor or a keep that names a target.
    """
    given = _separate([concepts] if isinstance(concepts, str | Concept) else listed(concepts, "concepts"))
    if not given:
        raise ErasureError("there is no concept to erase.")
    ready = sorted((_concept(entry, anchor) for entry in given), key=lambda concept: concept.model_dump_json())
    ready = list(dict.fromkeys(ready))
    kept = tuple(sorted({one_text(text, "a keep") for text in _separate(listed(keep, "keep"))}))
    _refuse_conflicts(ready, kept)
    return tuple(ready), kept


def _separate(entries: Sequence[Any]) -> list[Any]:
    return [part for entry in entries for part in (names_in(entry) if isinstance(entry, str) else [entry])]


def _concept(entry: str | Concept, anchor: str | None) -> Concept:
    if not isinstance(entry, str | Concept):
        raise ErasureError(f"a concept is a text or a Concept, not {type(entry).__name__}.")
    try:
        concept = Concept(target=entry) if isinstance(entry, str) else entry
    except ValidationError as error:
        raise ErasureError(f"{describe_problem(error)}.") from None
    if concept.anchor is not None or anchor is None:
        return concept
    return concept.model_copy(update={"anchor": one_text(anchor, "an anchor")})


def listed(texts: object, what: str) -> list[Any]:
    """A list of what was given.

    Raises:
        ErasureError: it is a single text, or nothing that can be listed.
    """
    if isinstance(texts, str):
        raise ErasureError(f"{what} is a list of texts; a single text would be read letter by letter.")
    if not isinstance(texts, Iterable):
        raise ErasureError(f"{what} is a list of texts, not {type(texts).__name__}.")
    return list(texts)


def one_text(text: object, what: str) -> str:
    """The text with single blanks.

    Raises:
        ErasureError: it is no text, or has characters that no file could hold.
    """
    if not isinstance(text, str):
        raise ErasureError(f"{what} is a text, not {type(text).__name__}.")
    try:
        return _one_line(text)
    except ValueError as error:
        raise ErasureError(f"{error}.") from None


def _refuse_conflicts(concepts: Sequence[Concept], keep: Sequence[str]) -> None:
    names = sorted(
        (unicodedata.normalize("NFC", name).lower(), concept.target)
        for concept in concepts
        for name, _ in concept.names
    )
    for (name, first), (other, second) in pairwise(names):
        if name == other:
            raise ErasureError(f"{name!r} is to be erased twice, for {first!r} and for {second!r}; name it once.")
    phrases = [name for concept in concepts for name, _ in concept.names]
    for concept in concepts:
        for phrase in phrases:
            if mentions(concept.anchor or "", phrase):
                raise ErasureError(f"the anchor {concept.anchor!r} names {phrase!r}, which is to be erased.")
    for text in keep:
        for phrase in phrases:
            if mentions(text, phrase):
                raise ErasureError(f"{text!r} cannot be kept while {phrase!r} is erased: the one names the other.")


def mentions(text: str, phrase: str) -> bool:
    """Whether the words of `phrase` occur in `text` side by side, whatever their case; a plural s counts as the same."""
    words, wanted = singular_words(text), singular_words(phrase)
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1)) if wanted else False


def singular_words(text: str) -> list[str]:
    """The words of a text in lower case, without the s of a plural."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())  # as tokenizers compose accents
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in line):
        raise ValueError(f"{line!r} has control characters")  # no file could hold it
    return line


def _phrase(text: str, what: str) -> str:
    if not singular_words(text):
        raise ValueError(f"{what} needs at least one word, and {text!r} has none")
    return _one_line(text)


def describe_problem(error: ValidationError) -> str:
    """The first complaint, with its place."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    problem = str(found["msg"]).removeprefix("Value error, ")
    return f"{place}: {problem}" if place else problem

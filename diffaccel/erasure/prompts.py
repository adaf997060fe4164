"""Contexts from a user's own prompts: where a concept stands in them, and what else they ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffaccel.edits.concepts import Concept, ErasureError, listed, mentions, one_text


@dataclass(frozen=True)
class Contexts:
    """Prompts, sorted by what they name.

    Attributes:
        templates: those that name one concept once, with {} in its place.
        others: those that name none.
        left_out: how many name several or one several times, which no template can hold.
    """

    templates: tuple[str, ...]
    others: tuple[str, ...]
    left_out: int

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {"contexts": len(self.templates), "preserved": len(self.others), "left out": self.left_out}


def sort_prompts(prompts: Sequence[str], concepts: Sequence[Concept]) -> Contexts:
    """Split prompts of the kind that a model gets into contexts of the concepts and what is to be preserved.

    Raises:
        ErasureError: a single text instead of a list, an empty prompt, or one with braces.
    """
    names = [name for concept in concepts for name, _ in concept.names]
    templates, others, left_out = dict[str, None](), dict[str, None](), 0
    for prompt in listed(prompts, "prompts"):
        text = one_text(prompt, "a prompt")
        if not text or "{" in text or "}" in text:
            raise ErasureError(f"{prompt!r} cannot be used as a prompt: it is empty or has braces.")
        named = [name for name in names if mentions(text, name)]
        if not named:
            others[text] = None
            continue
        template, count = _gap(text, max(named, key=len))
        if count == 1 and not any(mentions(template, name) for name in names):
            templates[template] = None
        else:
            left_out += 1
    return Contexts(tuple(templates), tuple(others), left_out)


def _gap(text: str, name: str) -> tuple[str, int]:
    """The text with {} for every occurrence of a name or its plural, and how many there were."""
    words = r"\W+".join(re.escape(word) for word in re.findall(r"\w+", name))
    return re.subn(rf"\b{words}s?\b", "{}", text, flags=re.IGNORECASE)

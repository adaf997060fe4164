"""What a look at an edit showed: how far the denoiser's predictions go towards the anchor's, and how far those of keeps do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = 2  # predictions that are looked at
WEAK, LOST = 0.5, 0.5


@dataclass(frozen=True)
class Effect:
    """What was seen.

    Attributes:
        moved: of each looked-at concept, how far its prediction goes towards the anchor's: 0 not at all, 1 all the way.
        changed: of the same, by which share of its length the prediction changes at all.
        kept: of looked-at keeps, how far their prediction goes, against the way of the concepts.
        note: why nothing could be seen; "" otherwise.
    """

    moved: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def weak(self) -> tuple[str, ...]:
        """Concepts that will hardly look erased."""
        return tuple(name for name, share in self.moved.items() if share < WEAK)

    @property
    def lost(self) -> tuple[str, ...]:
        """Keeps that will hardly look kept."""
        return tuple(name for name, share in self.kept.items() if share > LOST)

    def __str__(self) -> str:
        if self.note:
            return f"The effect was not checked: {self.note}"
        said = [f"{name!r} {way(share)}" for name, share in self.moved.items()]
        said += [f"{name!r} (kept) {share:.0%} as far" for name, share in self.kept.items()]
        return f"Checked on {STEPS} predictions of the denoiser: {', '.join(said)}."

    @classmethod
    def of(cls, found: Any) -> Effect | None:
        """From what a file holds; None if it holds none of it."""
        parts = ("moved", "changed", "kept")
        if not isinstance(found, Mapping) or not all(isinstance(found.get(name), Mapping) for name in parts):
            return None
        return cls(found["moved"], found["changed"], found["kept"], str(found.get("note", "")))

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it."""
        return {"moved": dict(self.moved), "changed": dict(self.changed), "kept": dict(self.kept), "note": self.note}


def way(share: float) -> str:
    """How far, in words that make sense whatever the number."""
    if share > 2:
        return "goes far past its anchor"
    if abs(share) < 0.005:
        return "does not move"
    return "moves away from its anchor" if share < 0 else f"goes {share:.0%} of the way to its anchor"

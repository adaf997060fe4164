"""The recipes of fidelity.py: every method alone at several strengths, combinations, and the presets."""

from __future__ import annotations

from diffaccel import (
    AdaptiveGuidance,
    GuidanceInterval,
    Recipe,
    SkipCache,
    TokenDownsampling,
    TokenMerging,
    presets,
)
from diffaccel.method import Method


def named(name: str, *methods: Method) -> Recipe:
    """A recipe with a short name for tables."""
    return Recipe(name=name, methods=methods)


def final_recipes() -> list[Recipe]:
    """What the published table holds."""
    singles = [
        named("guidance first half", GuidanceInterval(stop_fraction=0.5)),
        named("adaptive guidance 0.999", AdaptiveGuidance(threshold=0.999)),
        named("skip cache 2", SkipCache(interval=2)),
        named("skip cache 3", SkipCache(interval=3)),
        named("skip cache 3, linear", SkipCache(interval=3, order=1)),
        named("token merging 0.5", TokenMerging(ratio=0.5, min_tokens=1)),
        named("token downsampling 2", TokenDownsampling(factor=2, min_tokens=1)),
    ]
    chosen = [recipe for recipe in presets().values() if not all(m.is_off for m in recipe.methods)]
    return [*singles, *chosen]

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
from diffaccel.run import Layer


def named(name: str, *methods: Method) -> Recipe:
    """A recipe with a short name for tables."""
    return Recipe(name=name, methods=methods)


def methods_alone() -> list[Recipe]:
    """Every method at one or two strengths."""
    return [
        named("guidance above 1", GuidanceInterval(low=1.0)),
        named("adaptive guidance 0.999", AdaptiveGuidance(threshold=0.999)),
        named("skip cache 2", SkipCache(interval=2, order=0)),
        named("skip cache 3", SkipCache(interval=3, order=0)),
        named("skip cache 3, linear", SkipCache(interval=3, order=1)),
        named("token merging 0.5", TokenMerging(ratio=0.5, min_tokens=1)),
        named("token downsampling 2", TokenDownsampling(factor=2, min_tokens=1)),
    ]


def transformer_methods_alone() -> list[Recipe]:
    """Every method for diffusion transformers at one or two strengths."""
    return [
        named("guidance above 1", GuidanceInterval(low=1.0)),
        named("adaptive guidance 0.999", AdaptiveGuidance(threshold=0.999)),
    ]


def chosen_presets() -> list[Recipe]:
    """The presets that do something other than lower the steps: those are the line itself."""
    return [
        recipe for recipe in presets().values() if any(m.layer > Layer.SCHEDULE for m in recipe.methods if not m.is_off)
    ]

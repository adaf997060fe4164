"""The recipes of fidelity.py: every method alone at several strengths, combinations, and the presets."""

from __future__ import annotations

from diffaccel import (
    AdaptiveGuidance,
    Forecast,
    GuidanceInterval,
    Recipe,
    RegionSampling,
    ResidualCache,
    SkipCache,
    StepReuse,
    TokenDownsampling,
    TokenMerging,
    presets,
)
from diffaccel.engine.method import Method
from diffaccel.engine.run import Layer


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
        named("step reuse 0.05", StepReuse(threshold=0.05)),
        named("forecast 2", Forecast(interval=2)),
        named("forecast 2, quadratic", Forecast(interval=2, order=2)),
        named("forecast 3", Forecast(interval=3)),
        named("forecast 3, early", Forecast(interval=3, schedule="early")),
        named("forecast 3, in flow time", Forecast(interval=3, coordinate="flow_time")),
        named("residual cache 2, reuse", ResidualCache(interval=2, order=0)),
        named("residual cache 2, linear", ResidualCache(interval=2, order=1)),
        named("residual cache 3, linear", ResidualCache(interval=3, order=1)),
        named("regions 0.5", RegionSampling(ratio=0.5)),
        named("regions 0.5, reuse", RegionSampling(ratio=0.5, frozen="reuse")),
        named("regions 0.5, as published", RegionSampling(ratio=0.5, metric="std", high_share=0.3, frozen="reuse")),
        named("regions 0.25", RegionSampling(ratio=0.25)),
        named("regions 0.25, reuse", RegionSampling(ratio=0.25, frozen="reuse")),
    ]


def chosen_presets() -> list[Recipe]:
    """The presets that do something other than lower the steps: those are the line itself."""
    return [
        recipe for recipe in presets().values() if any(m.layer > Layer.SCHEDULE for m in recipe.methods if not m.is_off)
    ]

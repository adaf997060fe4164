"""The named recipes. Their notes are filled from benchmarks/results."""

from __future__ import annotations

from diffaccel.methods import AdaptiveGuidance, GuidanceInterval, SkipCache, StepSchedule
from diffaccel.recipe import Recipe

PRESETS = (
    Recipe(name="off", note="No method: bit-identical to the stock pipeline, with a report."),
    Recipe(name="fewer-steps", note="Half the steps: the baseline.", methods=(StepSchedule(fraction=0.5),)),
    Recipe(
        name="balanced",
        methods=(GuidanceInterval(low=0.28), SkipCache(interval=2, order=1)),
    ),
    Recipe(
        name="fast",
        methods=(AdaptiveGuidance(), SkipCache(interval=4, order=1)),
    ),
)

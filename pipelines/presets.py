"""The named recipes. Each note says what the recipe was measured to be worth; benchmarks/fidelity.py prints the figures."""

from __future__ import annotations

from diffaccel.methods import Forecast, SkipCache, StepSchedule
from diffaccel.recipe import Recipe

PRESETS = (
    Recipe(name="off", note="No method: bit-identical to the stock pipeline, with a report."),
    Recipe(
        name="fewer-steps",
        note="Half the steps and nothing else: the baseline that every other recipe has to beat.",
        methods=(StepSchedule(fraction=0.5),),
    ),
    Recipe(
        name="balanced",
        note="Closest to the plain picture at about half the work; beats fewer steps at equal FLOPs on both bundled models.",
        methods=(SkipCache(interval=3, order=1),),
        transformer_methods=(Forecast(interval=3, schedule="early"),),
    ),
    Recipe(
        name="fast",
        note="A third of the work at the full number of steps; beats fewer steps at equal FLOPs on both bundled models.",
        methods=(SkipCache(interval=5, order=1),),
        transformer_methods=(Forecast(interval=4, schedule="early"),),
    ),
    Recipe(
        name="fastest",
        note="Half the steps, two of three extrapolated. Ask for 50 steps: runs of 17 or fewer are not cached. Costs a few "
        "prompts on shapes-sd3.",
        methods=(StepSchedule(fraction=0.5), SkipCache(interval=3, order=1)),
        transformer_methods=(StepSchedule(fraction=0.5), Forecast(interval=3, schedule="early")),
    ),
)

"""The named recipes. Each note says under which solver and at how many steps the recipe was measured, and to be worth what.

benchmarks/fidelity.py prints the figures under DDIM and flow Euler; benchmarks/results/presets-by-solver.md has the others.
"""

from __future__ import annotations

from diffaccel.methods import Forecast, SkipCache, StepSchedule
from diffaccel.recipes.recipe import OFF, Recipe

PRESETS = (
    OFF,
    Recipe(
        name="fewer-steps",
        note="Half the steps and nothing else: the baseline that every other recipe has to beat.",
        methods=(StepSchedule(fraction=0.5),),
    ),
    Recipe(
        name="balanced",
        note="Closest to the plain picture at about half the work. Beats fewer steps at equal FLOPs under DDIM (25 and 50 steps, "
        "shapes-sd) and flow Euler (28, shapes-sd3); loses to them under DPM++ 2M Karras, beta and LMS schedules.",
        methods=(SkipCache(interval=3, order=1),),
        transformer_methods=(Forecast(interval=3, schedule="early"),),
    ),
    Recipe(
        name="fast",
        note="A third of the work at the full number of steps. Beats fewer steps at equal FLOPs under DDIM (50 steps, shapes-sd) "
        "and flow Euler (28, shapes-sd3); loses to them under DPM++ 2M Karras, beta and LMS schedules.",
        methods=(SkipCache(interval=5, order=1),),
        transformer_methods=(Forecast(interval=4, schedule="early"),),
    ),
    Recipe(
        name="fastest",
        note="Half the steps, two of three extrapolated. Ask for 50 steps: runs of 17 or fewer are not cached. Measured under "
        "DDIM (50 steps) and flow Euler (28) only; costs a few prompts on shapes-sd3.",
        methods=(StepSchedule(fraction=0.5), SkipCache(interval=3, order=1)),
        transformer_methods=(StepSchedule(fraction=0.5), Forecast(interval=3, schedule="early")),
    ),
)


def presets() -> dict[str, Recipe]:
    """The recipes that come with the package, by name: "off", "fewer-steps", "balanced", "fast" and "fastest".

    Each has a note on what it was measured to be worth on the bundled models.
    """
    return {recipe.name: recipe for recipe in PRESETS}

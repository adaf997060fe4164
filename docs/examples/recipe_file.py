"""Write a recipe to a file, check it, load it, and see what a wrong one says."""

import json
from pathlib import Path

import diffaccel
from diffaccel import Forecast, Recipe, RecipeError, SkipCache, StepSchedule

recipe = Recipe(
    name="mine",
    note="Three quarters of the steps, every second one cached.",
    methods=(StepSchedule(fraction=0.75), SkipCache(interval=2)),
    transformer_methods=(StepSchedule(fraction=0.75), Forecast(interval=2, schedule="early")),
)
recipe.save("mine.json")
print(Path("mine.json").read_text())

for model in ("shapes-sd", "shapes-sd3"):
    pipe = diffaccel.load_miniature(model)
    pipe.set_progress_bar_config(disable=True)
    fast = diffaccel.wrap(pipe, "mine.json")  # takes the part that fits the network
    fast("a green star", num_inference_steps=16)
    print(f"{model}: {fast.recipe.describe()}, {fast.report.flops_ratio:.2f} times fewer FLOPs")

data = json.loads(Path("mine.json").read_text())
data["methods"][1]["interval"] = 0
Path("wrong.json").write_text(json.dumps(data))
try:
    Recipe.load("wrong.json")
except RecipeError as error:
    message = str(error)
    print(message)  # names the method, the setting and the value

"""A batch from Python: a list of rows, a plan that checks all of them, progress, and a second start that finds all done."""

import csv
from pathlib import Path

import diffaccel
from diffaccel.batch import BatchError, BatchSettings, plan_batch, run_batch

with Path("rows.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, ["prompt", "seed", "steps", "name"])
    writer.writeheader()
    writer.writerow({"prompt": "a red square", "seed": 1, "steps": 12, "name": "square"})
    writer.writerow({"prompt": "a blue circle", "seed": 2, "steps": 12, "name": "circle"})
    writer.writerow({"prompt": "a green star", "seed": 3, "steps": 12, "name": "star"})

settings = BatchSettings(recipe="balanced", guidance_scale=2.5, batch_size=2)
pipe = diffaccel.load_miniature("shapes-sd")
pipe.set_progress_bar_config(disable=True)

plan = plan_batch(Path("rows.csv"), Path("pictures"), settings)
report = run_batch(plan, pipe, on_progress=lambda state: print(f"{state.done} of {state.total}"))
print(f"{report.made} made, {report.failed} failed, manifest in {report.manifest}")

again = run_batch(plan_batch(Path("rows.csv"), Path("pictures"), settings), pipe)
print(f"second start: {again.made} made, {again.skipped} were there")

try:
    plan_batch([{"prompt": "a red square", "steps": -3}, {"prompt": ""}], Path("elsewhere"), settings)
except BatchError as error:
    print(error)  # every problem by its row number, before anything is drawn
    problems = error.problems

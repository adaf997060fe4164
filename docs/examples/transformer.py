"""A diffusion transformer: a forecast, and region sampling with its map of what was computed."""

import torch

import diffaccel
from diffaccel import Forecast, RegionSampling

pipe = diffaccel.load_miniature("shapes-sd3")
pipe.set_progress_bar_config(disable=True)
call = {"prompt": "a red square above a blue circle", "num_inference_steps": 28, "max_sequence_length": 1}

forecast = diffaccel.wrap(pipe, Forecast(interval=3, schedule="early"))  # what "balanced" is on transformers
forecast(**call, generator=torch.Generator().manual_seed(1)).images[0].save("forecast.png")
print(forecast.report)

regions = diffaccel.wrap(pipe, RegionSampling(ratio=0.5))
regions(**call, generator=torch.Generator().manual_seed(1)).images[0].save("regions.png")
regions.report.region_map().save("regions-map.png")  # white: computed on every evaluation
counts = regions.report.region_counts()[0]
print(f"tokens were computed {counts.min()} to {counts.max()} times in {regions.report.evaluations} evaluations")

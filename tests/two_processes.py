"""Run by torchrun in two processes under context parallelism: what each method decides on either of them, as JSON lines."""

import datetime
import json
import sys
import warnings

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny_transformers import tiny_inputs, tiny_pipeline

import diffaccel

RECIPES = {
    "forecast": diffaccel.Forecast(interval=3),
    "residual_cache": diffaccel.ResidualCache(interval=3),
    "step_reuse": diffaccel.StepReuse(threshold=0.3),
    "mag": diffaccel.BlockCache(kind="mag", ratios="flux"),
}


def decisions(recipe) -> str:
    pipe = tiny_pipeline("flux-dev")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    fast, inputs = diffaccel.wrap(pipe, recipe), tiny_inputs("flux-dev", steps=12, size=(8, 8))
    for name, value in inputs.items():  # an even number of text tokens, which two processes can share
        if name.endswith("prompt_embeds") and value.dim() == 3:
            inputs[name] = torch.cat([value, value[:, :1]], 1)
    torch.manual_seed(0)
    fast(**inputs)
    return json.dumps(fast.report.methods, sort_keys=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    for name, recipe in RECIPES.items():
        both = [None, None]
        dist.all_gather_object(both, decisions(recipe))
        if dist.get_rank() == 0:
            print(json.dumps([name, *both]), file=sys.stdout, flush=True)
    dist.destroy_process_group()

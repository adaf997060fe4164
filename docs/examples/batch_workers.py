"""Several workers on one batch: `accelerate launch --num_processes 2 batch_workers.py`; on CPUs `torchrun --nproc-per-node 2`.

Every process runs the same lines. They share the list through the output folder: each claims rows, makes them, and takes
over the rows of a worker that died. No picture depends on how many there are.
"""

from pathlib import Path

import torch
from accelerate import PartialState

import diffaccel
from diffaccel.batch import BatchSettings, plan_batch, run_batch

state = PartialState(cpu=not torch.cuda.is_available())
rows = [{"prompt": f"a {colour} square", "seed": seed} for seed, colour in enumerate(("red", "blue", "green", "white"))]
settings = BatchSettings(recipe="balanced", steps=12, batch_size=1)

pipe = diffaccel.load_miniature("shapes-sd").to(state.device)
pipe.set_progress_bar_config(disable=True)
report = run_batch(plan_batch(rows, Path("pictures"), settings), pipe)
print(
    f"worker {state.process_index + 1} of {state.num_processes}: {report.made} made, {report.done} of {report.total} done"
)

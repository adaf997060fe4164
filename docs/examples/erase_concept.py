"""Make a pipeline forget a concept: compute the edit, prove it, save it, apply it, take it back."""

import torch

import diffaccel
from diffaccel import Erase, Recipe

pipe = diffaccel.load_miniature("shapes-sd")
pipe.set_progress_bar_config(disable=True)


def draw(model: object, prompt: str = "a red circle") -> bytes:
    images = model(prompt, num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images  # type: ignore[operator]
    return images[0].tobytes()


before = draw(pipe)
edit = diffaccel.erase(pipe, "circle", anchor="square", keep=["star", "triangle", "ring"])
print(edit)
for leak in edit.leaks:
    print("may still enter by:", leak)

proof = edit.prove(pipe, prompts=1, kept=["star"], attacks=["closed_form"], steps=4)  # too few to believe
print(proof)
proof.save("proof")

edit.save("no-circle.safetensors")
diffaccel.apply_edit(pipe, "no-circle.safetensors")
during = draw(pipe)
diffaccel.remove_edit(pipe, "no-circle.safetensors")
after = draw(pipe)
assert before == after != during

faster = diffaccel.presets()["balanced"].methods
fast = diffaccel.wrap(pipe, Recipe(name="no-circle", methods=(*faster, Erase(file="no-circle.safetensors"))))
fast("a red circle", num_inference_steps=20)
print(fast.report)

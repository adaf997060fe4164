"""Compare recipes with the plain pipeline and with fewer steps at equal FLOPs, on prompts that a judge can check."""

from pathlib import Path

import diffaccel
from diffaccel import Recipe, SkipCache
from diffaccel.measure.compare import compare
from diffaccel.miniatures.scenes import held_out_prompts

pipe = diffaccel.load_miniature("shapes-sd")
copying = Recipe(name="copying", methods=(SkipCache(interval=3, order=0),))  # as published
found = compare(
    pipe,
    held_out_prompts("mixed", 2, 0),  # two are enough to try this, not to believe it
    ["balanced", copying],
    steps=18,
    guidance=2.5,
    batch_size=2,
    equal=["flops"],
    judge=diffaccel.load_judge(),
)
found.save_json(Path("comparison.json"))
found.save_picture(Path("comparison.png"))
for row in found.rows:
    likeness = f"{row.psnr:.1f} dB" if row.psnr is not None else ""
    print(f"{row.name:<12}{row.steps:>4} steps {row.flops / 1e9:6.1f} GFLOP   {likeness}")

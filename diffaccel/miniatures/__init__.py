"""Small diffusion models that ship with the package: real weights, no download, a judge that reads pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from diffaccel.miniatures.judge import Judge

NAMES = ("shapes-sd",)
_FOLDER = Path(__file__).parent


def miniature_path(name: str = "shapes-sd") -> Path:
    """The folder of a bundled model, in diffusers' layout. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"no bundled model {name!r}: choose {', '.join(NAMES)}")
    return _FOLDER / name


def load_miniature(name: str = "shapes-sd", *, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """A bundled model as a plain diffusers pipeline on the CPU, in `dtype` (float32 unless told).

    Pictures are 128 x 128. Never touches the network. Raises ValueError for an unknown name.
    """
    folder = miniature_path(name)
    import torch
    from diffusers import StableDiffusionPipeline

    pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    # Cast afterwards, because the argument's name differs between the versions of diffusers that we support, and
    # with torch's own method, because diffusers' warns about modules to be kept in float32 even if there are none.
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        torch.nn.Module.to(part, dtype or torch.float32)
    return pipe


def recommended_guidance(name: str = "shapes-sd") -> float:
    """The guidance scale at which the model was most accurate when it was evaluated."""
    found = json.loads((miniature_path(name) / "evaluation.json").read_text())
    return float(found["recommended_guidance"])


def load_judge() -> Judge:
    """The judge of the shapes world, on the CPU."""
    from diffaccel.miniatures.judge import Judge

    return Judge.load(miniature_path("shapes-sd") / "judge")


def __getattr__(name: str) -> float:
    if name == "RECOMMENDED_GUIDANCE":
        return recommended_guidance()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NAMES",
    "RECOMMENDED_GUIDANCE",
    "load_judge",
    "load_miniature",
    "miniature_path",
    "recommended_guidance",
]

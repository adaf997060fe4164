"""Small diffusion models that ship with the package: real weights, no download, a judge that reads pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from diffaccel.files.model_folder import absent_parts

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

    from diffaccel.miniatures.judge import Judge

NAMES = ("shapes-sd", "shapes-sd3")
_FOLDER = Path(__file__).parent


def miniature_path(name: str = "shapes-sd") -> Path:
    """The folder of a bundled model, in diffusers' layout. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"no bundled model {name!r}: choose {', '.join(NAMES)}")
    return _FOLDER / name


@overload
def load_miniature(
    name: Literal["shapes-sd"] = "shapes-sd", *, dtype: torch.dtype | None = None
) -> StableDiffusionPipeline: ...
@overload
def load_miniature(name: Literal["shapes-sd3"], *, dtype: torch.dtype | None = None) -> StableDiffusion3Pipeline: ...
@overload
def load_miniature(name: str, *, dtype: torch.dtype | None = None) -> DiffusionPipeline: ...
def load_miniature(name: str = "shapes-sd", *, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """A bundled model as a plain diffusers pipeline on the CPU. Nothing is downloaded.

    Args:
        name: "shapes-sd", a StableDiffusionPipeline, or "shapes-sd3", a StableDiffusion3Pipeline. Both draw coloured shapes,
            128 x 128 pixels, and nothing else.
        dtype: of the weights; None is float32.
    Raises:
        ValueError: there is no bundled model of that name.
    """
    return load_folder(miniature_path(name), dtype=dtype)


def load_folder(folder: Path, *, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The pipeline that diffusers saved in `folder`, as `load_miniature` gives it; parts it lacks stay out."""
    import diffusers
    import torch

    index = json.loads((folder / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    pipe: DiffusionPipeline = kind.from_pretrained(folder, local_files_only=True, **absent_parts(folder))
    # Cast afterwards, because the argument's name differs between the versions of diffusers that we support, and
    # with torch's own method, because diffusers' warns about modules to be kept in float32 even if there are none.
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype or torch.float32)
    return pipe


def recommended_guidance(name: str = "shapes-sd") -> float:
    """The guidance scale at which the model was most accurate when it was evaluated."""
    found = json.loads((miniature_path(name) / "evaluation.json").read_text())
    return float(found["recommended_guidance"])


def load_judge() -> Judge:
    """The network that reads pictures of the bundled models, on the CPU: shape, colour, texture, size and arrangement.

    `judge.score(images, cases)` says which pictures show what their prompt asks for. It knows no other pictures; how
    often it is right stands in the model card of shapes-sd.
    """
    from diffaccel.miniatures.judge import Judge

    return Judge.load(miniature_path("shapes-sd") / "judge")


def __getattr__(name: str) -> float:
    if name == "RECOMMENDED_GUIDANCE":
        return recommended_guidance()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NAMES",
    "RECOMMENDED_GUIDANCE",
    "load_folder",
    "load_judge",
    "load_miniature",
    "miniature_path",
    "recommended_guidance",
]

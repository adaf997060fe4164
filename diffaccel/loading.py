"""From what a user types for `--model` to a pipeline: a bundled model, a local folder, or a hub id. Never pickle files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffaccelError
from diffaccel.files.model_folder import absent_parts
from diffaccel.files.text import read_text
from diffaccel.miniatures import NAMES, load_miniature, recommended_guidance

DTYPES = ("float32", "float16", "bfloat16")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Short names for `--scheduler`, and diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# The same names for flow models, which no scheduler can run without knowing that they are some.
FLOW_SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class LoadError(DiffaccelError):
    """A model that cannot be loaded; the message says why and what to give instead."""


def load_pipeline(
    model: str, *, device: str | None = None, dtype: str | None = None, variant: str | None = None
) -> Any:
    """Load a diffusers pipeline.

    Args:
        model: name of a bundled model, a local folder in diffusers' format, or a hub id "owner/name".
        device: torch device; default: "cuda" if there is one, else "cpu".
        dtype: "float32", "float16" or "bfloat16"; default: float16 on a GPU, else float32.
        variant: which weights to take where a model has several, such as "fp16".
    Raises:
        LoadError: no such model, not a whole pipeline, weights only as pickle files or only in a variant that was not asked
            for, own program code, or a device that is not there.
    """
    if model not in NAMES:
        _check_source(model, variant)
    elif variant is not None:
        raise LoadError(f"The bundled model {model} has no variants; leave out --variant.")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device.startswith("cpu") else "float16")
    if dtype not in DTYPES:
        raise LoadError(f"Unknown dtype {dtype!r}; known are {', '.join(DTYPES)}.")
    try:
        pipe = _load(model, variant).to(device)
        return pipe if dtype == "float32" else pipe.to(getattr(torch, dtype))
    # What diffusers, transformers, the hub client and torch raise for files and devices that are not there.
    except (OSError, ValueError, RuntimeError, AssertionError, AttributeError, KeyError) as error:
        raise LoadError(f"Cannot load {model} on {device}: {_first_line(error)}") from error


def _load(model: str, variant: str | None) -> Any:
    import diffusers

    if model in NAMES:
        return load_miniature(model)
    options = {} if variant is None else {"variant": variant}
    return diffusers.DiffusionPipeline.from_pretrained(
        model, use_safetensors=True, **options, **absent_parts(Path(model))
    )


def _check_source(model: str, variant: str | None) -> None:
    """Refuse what cannot be a pipeline before the slow imports."""
    path = Path(model)
    if path.is_file():
        raise LoadError(
            f"{model} is a single file; give a folder in diffusers' format (pipe.save_pretrained writes one)."
        )
    if path.is_dir():
        _check_folder(path, variant)
    elif not _is_hub_id(model):
        bundled = ", ".join(NAMES)
        raise LoadError(
            f"There is no folder {model}, and it is neither a bundled model ({bundled}) nor a hub id (owner/name)."
        )


def _check_folder(path: Path, variant: str | None) -> None:
    if not (path / "model_index.json").is_file():
        raise LoadError(f"The folder {path} is no diffusers pipeline: it holds no model_index.json.")
    code = sorted(path.rglob("*.py"))
    if code:
        raise LoadError(
            f"{path} brings its own program code ({code[0].name}), which is never run; load it in Python instead."
        )
    for name, kind in _named_parts(path):
        if not (path / name).is_dir() or not any((path / name).iterdir()):
            raise LoadError(f"Cannot load {path}: its folder {name!r} ({kind}) is missing or empty; copy it there.")
    for part in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        _check_weights(part, variant)


def _named_parts(path: Path) -> list[tuple[str, str]]:
    """Name and class of every part that the pipeline's index names.

    Raises:
        LoadError: it is damaged.
    """
    try:
        index = json.loads(read_text(path / "model_index.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"Cannot load {path}: its model_index.json is no JSON ({_first_line(error)}).") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise LoadError(f"Cannot load {path}: its model_index.json names no pipeline class.")
    origins = {name: origin for name, origin in index.items() if isinstance(origin, list) and len(origin) == 2}
    return [(name, str(kind)) for name, (library, kind) in origins.items() if isinstance(library, str)]


_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")


def _check_weights(part: Path, variant: str | None) -> None:
    pickles = sorted(file.name for file in part.iterdir() if file.suffix in PICKLES)
    if pickles and not any(part.glob("*.safetensors")):
        raise LoadError(
            f"{part} has its weights only as a pickle file ({pickles[0]}), which can run code when loaded; "
            "convert it to safetensors."
        )
    found = [match["variant"] for file in part.iterdir() if (match := _WEIGHTS.fullmatch(file.name))]
    variants = sorted({name for name in found if name})
    if variants and None not in found and variant not in variants:
        raise LoadError(f"{part} has its weights only in the variant {variants[0]}; add --variant {variants[0]}.")


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) is not None


def set_scheduler(pipe: Any, name: str) -> None:
    """Exchange the scheduler for the one with this short name, keeping its configuration.

    Raises:
        LoadError: unknown name, or a scheduler this pipeline cannot run with.
    """
    if name not in SCHEDULERS:
        raise LoadError(f"Unknown scheduler {name!r}; known are {', '.join(SCHEDULERS)}.")
    from diffaccel.engine.noise import is_flow

    pipe.scheduler = _flow_scheduler(pipe, name) if is_flow(pipe.scheduler) else _scheduler(pipe, name)


def _scheduler(pipe: Any, name: str) -> Any:
    import diffusers

    cls = getattr(diffusers, SCHEDULERS[name])
    if cls not in pipe.scheduler.compatibles:
        raise LoadError(f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} cannot run with {cls.__name__}.")
    return cls.from_config(pipe.scheduler.config)


def _flow_scheduler(pipe: Any, name: str) -> Any:
    """The scheduler for a flow model, with the same shift of its noise levels."""
    import diffusers

    config = pipe.scheduler.config
    if name not in FLOW_SCHEDULERS:
        known = ", ".join(FLOW_SCHEDULERS)
        raise LoadError(f"{type(pipe).__name__} is a flow model and cannot run with {name!r}; possible are {known}.")
    cls = getattr(diffusers, FLOW_SCHEDULERS[name])
    if config.get("use_dynamic_shifting") and cls is not type(pipe.scheduler):
        raise LoadError(
            f"{type(pipe).__name__} shifts its noise levels by the size of the picture, which only "
            f"{type(pipe.scheduler).__name__} does here; leave out --scheduler."
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if cls.__name__.startswith("FlowMatch"):
        return cls.from_config(config, shift=shift)
    return cls.from_config(config, flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction")


def default_guidance(model: str) -> float | None:
    """The guidance scale a bundled model was measured to be best at; None leaves the pipeline's own default."""
    return recommended_guidance(model) if model in NAMES else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

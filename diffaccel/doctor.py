"""What is installed, what the machine has, and which methods apply to a given pipeline and why not. Data first."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from diffaccel.errors import DiffaccelError
from diffaccel.version import __version__

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pydantic", "numpy", "pillow")
# Optional packages (distribution name, module name) and what they are good for.
OPTIONAL = {
    "triton": ("triton", "fused kernels on a GPU"),
    "xformers": ("xformers", "memory-efficient attention on a GPU"),
    "flash_attn_3": ("flash_attn_interface", "FlashAttention-3 on Hopper GPUs"),
    "sageattention": ("sageattention", "int8 attention on a GPU"),
    "natten": ("natten", "neighbourhood and dense attention on a GPU"),
    "torchmetrics": ("torchmetrics", "PSNR, SSIM and Frechet distance in diffaccel compare"),
    "peft": ("peft", "LoRA weights"),
    "gradio": ("gradio", "the demo page"),
    "pyarrow": ("pyarrow", "Parquet prompt lists"),
    "webdataset": ("webdataset", "sharded outputs"),
    "ray": ("ray", "batches over many machines"),
}
# The suite ran with these releases of diffusers; see docs/versions.md.
TESTED_DIFFUSERS = ((0, 35), (0, 42))


@dataclass(frozen=True)
class Optional:
    """An optional package: its version, or None if it is not installed, and what it is for."""

    name: str
    version: str | None
    purpose: str


@dataclass(frozen=True)
class Device:
    """A device torch can use."""

    name: str
    detail: str
    memory_gib: float | None = None


@dataclass(frozen=True)
class Check:
    """Whether a method or preset works on the pipeline; `reason` is empty if it does."""

    name: str
    applies: bool
    reason: str = ""


@dataclass(frozen=True)
class PipelineCheck:
    """What was found in a pipeline.

    Attributes:
        attention: how many attention layers run which processor class.
        methods: every method with its default settings.
        presets: every named recipe.
    """

    model: str
    pipeline: str
    denoiser: str
    scheduler: str
    attention: dict[str, int]
    methods: list[Check]
    presets: list[Check]


@dataclass(frozen=True)
class Diagnosis:
    """Everything `diffaccel doctor` knows. `problems` are sentences that need the user's attention."""

    versions: dict[str, str]
    optional: list[Optional]
    devices: list[Device]
    problems: list[str] = field(default_factory=list)
    pipeline: PipelineCheck | None = None

    def to_json(self) -> str:
        """The whole diagnosis as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def to_block(self) -> str:
        """A plain-text block for bug reports."""
        rows = [
            *((name, version) for name, version in self.versions.items()),
            *((package.name, package.version) for package in self.optional if package.version),
            *((device.name, device.detail) for device in self.devices),
        ]
        if self.pipeline is not None:
            rows += [("pipeline", self.pipeline.pipeline), ("scheduler", self.pipeline.scheduler)]
            rows += [("attention", f"{count} x {name}") for name, count in self.pipeline.attention.items()]
            rows += [(check.name, check.reason or "applies") for check in self.pipeline.methods]
        return "\n".join(f"{name}: {text}" for name, text in [*rows, *(("problem", text) for text in self.problems)])


def diagnose(pipe: Any = None, model: str = "") -> Diagnosis:
    """Look at this installation and, if given, at a pipeline. Changes nothing and raises nothing of its own."""
    versions = {"diffaccel": __version__, "python": platform.python_version(), "system": platform.platform()}
    versions |= {name: _version(name) or "missing" for name in REQUIRED}
    return Diagnosis(
        versions=versions,
        optional=[Optional(name, _version(name, module), use) for name, (module, use) in OPTIONAL.items()],
        devices=_devices(),
        problems=_problems(versions),
        pipeline=None if pipe is None else check_pipeline(pipe, model),
    )


def check_pipeline(pipe: Any, model: str = "") -> PipelineCheck:
    """Ask every method and preset whether it works on this pipeline."""
    from diffaccel.methods import registry
    from diffaccel.recipes.presets import presets

    denoiser = next((part for part in (getattr(pipe, name, None) for name in ("unet", "transformer")) if part), None)
    return PipelineCheck(
        model=model,
        pipeline=type(pipe).__name__,
        denoiser=type(denoiser).__name__,
        scheduler=type(getattr(pipe, "scheduler", None)).__name__,
        attention=_attention(denoiser),
        methods=[_check(name, functools.partial(_check_method, pipe, cls())) for name, cls in registry().items()],
        presets=[_check(name, functools.partial(_check_recipe, pipe, recipe)) for name, recipe in presets().items()],
    )


def _check(name: str, attempt: Callable[[], object]) -> Check:
    try:
        attempt()
    except DiffaccelError as error:
        return Check(name, applies=False, reason=str(error))
    return Check(name, applies=True)


def _check_method(pipe: Any, method: Any) -> None:
    from diffaccel.models.model_map import describe

    method.check(describe(pipe))


def _check_recipe(pipe: Any, recipe: Any) -> None:
    from diffaccel.wrapping import wrap  # noqa: PLC0415  (slow to import)

    wrap(pipe, recipe)  # it knows which of a recipe's methods are meant for this kind of denoiser


def _attention(denoiser: Any) -> dict[str, int]:
    processors = getattr(denoiser, "attn_processors", {})
    return dict(Counter(type(processor).__name__ for processor in processors.values()))


def _version(distribution: str, module: str | None = None) -> str | None:
    """Installed version without importing; a package that has no metadata but can be found is "unknown"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if module and importlib.util.find_spec(module) else None


def _devices() -> list[Device]:
    import torch

    devices = [Device("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, compute {properties.major}.{properties.minor}, torch built for CUDA {torch.version.cuda}"
        devices.append(Device(f"cuda:{index}", detail, round(properties.total_memory / 2**30, 1)))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", platform.processor()))
    return devices


def _problems(versions: dict[str, str]) -> list[str]:
    problems = [f"{name} is not installed." for name in REQUIRED if versions[name] == "missing"]
    low, high = TESTED_DIFFUSERS
    found = versions["diffusers"]
    if found != "missing" and not low <= tuple(int(part) for part in found.split(".")[:2]) <= high:
        tested = " to ".join(".".join(map(str, version)) for version in TESTED_DIFFUSERS)
        problems.append(f"diffusers {found} is outside the tested range {tested}.")
    return problems

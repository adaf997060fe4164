"""What a picture says about itself: the A1111 text other programs read, and a JSON chunk that holds everything.

PNG files get two text chunks: `parameters` (A1111) and `diffaccel` (JSON, the one to trust: A1111 text cannot tell a
prompt line that starts with "Negative prompt:" from the real one). Nothing is stored under `prompt`: ComfyUI keeps a
graph there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffaccel.errors import DiffaccelError
from diffaccel.version import __version__

SCHEMA = 1
VERSIONED = ("diffusers", "transformers", "torch")

# diffusers' class names in the words other programs use; a class not listed keeps its own name.
SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


class MetadataError(DiffaccelError):
    """A picture whose metadata cannot be read; the message names the file."""


@dataclass(frozen=True)
class Generation:
    """How one picture was made.

    Attributes:
        steps: denoising steps asked for.
        scheduler: class name of the scheduler.
        seed: seed of this picture alone: `torch.Generator("cpu").manual_seed(seed)` reproduces it without its batch mates.
        recipe: `Recipe.to_dict()`.
        report: `Report.to_dict()` of the call that made it.
        versions: installed versions, see `versions()`.
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    scheduler: str
    seed: int
    width: int
    height: int
    model: str
    recipe: Mapping[str, Any]
    seconds: float
    report: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as the JSON chunk holds it."""
        return {"schema": SCHEMA, **_strict(asdict(self))}

    def to_parameters(self) -> str:
        """The A1111 `parameters` text: prompt, negative prompt, one line of `Key: value` pairs."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        return "\n".join([*lines, ", ".join(f"{key}: {quote(value)}" for key, value in self._pairs().items())])

    def _pairs(self) -> dict[str, object]:
        return {
            "Steps": self.steps,
            "Sampler": SAMPLERS.get(self.scheduler, self.scheduler),
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
            "Version": f"diffaccel {self.versions['diffaccel']}",
            "diffaccel recipe": self.recipe.get("name", ""),
        }


def _strict(value: Any) -> Any:
    """JSON has no infinity: write it, and NaN, as text."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Installed versions of what decides how a picture comes out."""
    return {"diffaccel": __version__, "python": platform.python_version(), **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    """Read once: looking them up takes milliseconds, for every picture of a batch."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def quote(value: object) -> str:
    """JSON-quote a value that would break the `Key: value` line."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n\r"]', text) or text != text.strip() else text


def parse_parameters(text: str) -> dict[str, str]:
    """Read A1111 text: `Prompt`, `Negative prompt` and the pairs of the last line.

    As in other readers, a last line with fewer than three pairs belongs to the prompt.
    """
    *lines, last = text.split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    negative = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    return {
        "Prompt": "\n".join(lines[:negative]),
        "Negative prompt": "\n".join(lines[negative:]).removeprefix("Negative prompt:").removeprefix(" "),
        **{key: _unquote(value) for key, value in pairs},
    }


def _unquote(value: str) -> str:
    """Undo `quote`; a value that only looks quoted (other programs' files) is kept as it stands."""
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value.strip()


def png_info(generation: Generation) -> PngInfo:
    """The two text chunks, for `image.save(..., pnginfo=...)`."""
    info = PngInfo()
    # Half a character from a broken shell cannot be stored as UTF-8; the JSON below keeps it exactly.
    info.add_text("parameters", generation.to_parameters().encode("utf-8", "backslashreplace").decode())
    info.add_text("diffaccel", json.dumps(generation.to_dict(), allow_nan=False))
    return info


@dataclass(frozen=True)
class PictureText:
    """Metadata found in a picture; each part is None if the picture does not hold it."""

    parameters: dict[str, str] | None
    diffaccel: dict[str, Any] | None


def read(path: str | Path) -> PictureText:
    """Read both chunks of a picture made by any program.

    Raises:
        MetadataError: no such file, not a picture, or a `diffaccel` chunk that is not JSON.
    """
    try:
        with Image.open(path) as image:
            text = {key: value for key, value in image.info.items() if isinstance(value, str)}
    except OSError as error:
        raise MetadataError(f"{path} is not a readable picture: {error}.") from error
    parameters = parse_parameters(text["parameters"]) if "parameters" in text else None
    return PictureText(parameters, _load_chunk(path, text.get("diffaccel")))


def _load_chunk(path: str | Path, chunk: str | None) -> dict[str, Any] | None:
    if chunk is None:
        return None
    try:
        return dict(json.loads(chunk))
    except (ValueError, TypeError) as error:
        raise MetadataError(f"The diffaccel text of {path} is damaged: {error}.") from error

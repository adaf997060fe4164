"""One model, one picture at a time: loading from an allow-list, drawing with progress and cancel, never two runs at once."""

from __future__ import annotations

import inspect
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from diffaccel import generate as work
from diffaccel.engine.report import Report, refuse_broken
from diffaccel.errors import DiffaccelError
from diffaccel.files.metadata import Generation, png_info
from diffaccel.files.output import write_file
from diffaccel.loading import default_guidance, load_pipeline
from diffaccel.miniatures import NAMES, miniature_path
from diffaccel.models.model_map import ModelMap, describe
from diffaccel.recipes.recipe import Recipe
from diffaccel.wrapping import AcceleratedPipeline, wrap

PLAIN = Recipe(name="plain")
MOST_WRAPPED = 16  # recipes whose FLOP counts are kept


class PageError(DiffaccelError):
    """Something a person on the page can put right; the message says what."""


class Cancelled(DiffaccelError):
    """The run was stopped on request."""


class Ask(BaseModel):
    """What to draw, as it comes from the page or from a client; checked again here, whatever the controls allow.

    Attributes:
        guidance, width, height: None is the model's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1, max_length=2000)
    negative: str = Field(default="", max_length=2000)
    seed: int = Field(default=0, ge=0, le=2**53)
    steps: int = Field(default=25, ge=1, le=200)
    guidance: float | None = Field(default=None, ge=0, le=50, allow_inf_nan=False)
    width: int | None = Field(default=None, ge=16, le=2048)
    height: int | None = Field(default=None, ge=16, le=2048)

    @field_validator("prompt", "negative")
    @classmethod
    def _printable(cls, text: str) -> str:
        if "\0" in text:
            raise ValueError("it holds a NUL character")
        return text

    @classmethod
    def of(cls, **values: Any) -> Ask:
        """Checked values.

        Raises:
            PageError: one is missing or out of range; it is named.
        """
        try:
            return cls(**{name: value.strip() if isinstance(value, str) else value for name, value in values.items()})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "input"
            if name == "prompt" and first["type"] == "string_too_short":
                raise PageError("Write a prompt first: what shall be drawn?") from error
            said = first["msg"].removeprefix("Value error, ")
            raise PageError(f"{name.capitalize()}: {said[:1].lower()}{said[1:]}.") from error

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height, or None for the model's own.

        Raises:
            PageError: only one of them was given.
        """
        if (self.width is None) != (self.height is None):
            raise PageError("Give both width and height, or leave both empty for the model's own size.")
        return None if self.width is None or self.height is None else (self.width, self.height)


@dataclass
class Watch:
    """The way in and out of a running action: progress out, cancel in.

    Attributes:
        show: called as (steps done, steps in total, what is being drawn).
        cancel: set to stop at the next step.
    """

    show: Callable[[int, int, str], None] = lambda done, total, text: None
    cancel: threading.Event = field(default_factory=threading.Event)
    done: int = 0
    total: int = 0
    label: str = ""

    def step(self) -> None:
        """One denoising step is done."""
        self.done += 1
        self.show(self.done, max(self.total, self.done), self.label)

    def check(self) -> None:
        """Raise `Cancelled` if that was asked for."""
        if self.cancel.is_set():
            where = f" after {self.done} of {self.total} steps" if self.done else ""
            raise Cancelled(f"Cancelled{where}. Nothing is left over from this run.")


@dataclass(frozen=True)
class Drawn:
    """One picture, with the file that holds it.

    Attributes:
        seconds: of each timed call; empty if it was not timed.
    """

    image: Any
    report: Report
    path: Path
    seconds: tuple[float, ...] = ()


class Engine:
    """The model in memory, and the only door to it.

    Args:
        allowed: folders whose diffusers models may be loaded, beside the bundled ones.
        device, dtype: as in `load_pipeline`.
    """

    def __init__(self, allowed: Sequence[Path] = (), device: str | None = None, dtype: str | None = None) -> None:
        self.allowed = tuple(folder.resolve() for folder in allowed)
        self.device, self.dtype = device, dtype
        self._lock = threading.Lock()
        self._name: str | None = None
        self._pipe: Any = None
        self._map: ModelMap | None = None
        self._wrapped: OrderedDict[str, AcceleratedPipeline] = OrderedDict()

    def models(self) -> list[tuple[str, str]]:
        """(label, value) of the bundled models and of those found in the allowed folders, two levels deep."""
        found = [(name, name) for name in NAMES]
        for root in self.allowed:
            for index in sorted(
                (*root.glob("model_index.json"), *root.glob("*/model_index.json"), *root.glob("*/*/model_index.json"))
            ):
                label = index.parent.relative_to(root.parent).as_posix()
                found.append((label, str(index.parent)))
        return found

    def resolve(self, name: object) -> str:
        """A bundled name, or the resolved path of a folder on the allow-list.

        Raises:
            PageError: anything else. What exists outside of the list is not told.
        """
        if not isinstance(name, str):
            raise PageError("Choose a model first.")
        if name in NAMES:
            return name
        try:
            path = Path(name).expanduser().resolve()
            inside = any(path.is_relative_to(root) for root in self.allowed)
            known = inside and (path / "model_index.json").is_file()
        except (OSError, ValueError, RuntimeError):
            known = False
        if not known:
            raise PageError(
                f"{name!r} is no model this page may load: choose one from the list, or start the page with --allow and "
                "its folder."
            )
        return str(path)

    def is_transformer(self, name: str) -> bool:
        """Whether the model's denoiser is a transformer, read from its index without loading it."""
        return "transformer" in self._index(name)

    def pipeline_class(self, name: str) -> type | None:
        """The model's pipeline class, read from its index without loading it; None if diffusers has none of that name."""
        import diffusers

        found = getattr(diffusers, str(self._index(name).get("_class_name")), None)
        return found if isinstance(found, type) else None

    def _index(self, name: str) -> dict[str, Any]:
        resolved = self.resolve(name)
        folder = miniature_path(resolved) if resolved in NAMES else Path(resolved)
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PageError(f"The index of {name} cannot be read: {error}.") from error
        if not isinstance(index, dict):
            raise PageError(f"The index of {name} is no JSON object.")
        return index

    def known_map(self, name: str) -> ModelMap | None:
        """What is known about a model if it is the one in memory; loading it for a question would take too long."""
        return self._map if self._name == name else None

    @contextmanager
    def pipeline(self, name: str) -> Iterator[Any]:
        """The stock pipeline of this name, loaded if need be; all other runs wait until the block ends.

        Raises:
            PageError, LoadError: it is not allowed, or cannot be loaded.
        """
        resolved = self.resolve(name)
        with self._lock:
            if resolved != self._name:
                self._name, self._pipe, self._map = None, None, None  # first, so that two never share the memory
                self._wrapped.clear()
                pipe = load_pipeline(resolved, device=self.device, dtype=self.dtype)
                pipe.set_progress_bar_config(disable=True)
                self._pipe, self._map, self._name = pipe, describe(pipe), resolved
            yield self._pipe

    def wrapped(self, recipe: Recipe, owner: str = "") -> AcceleratedPipeline:
        """The loaded pipeline with this recipe, kept so that FLOPs are counted once; `owner` tells apart equal file names."""
        key = json.dumps([owner, recipe.to_dict()])
        if key not in self._wrapped:
            self._wrapped[key] = wrap(self._pipe, recipe)
            while len(self._wrapped) > MOST_WRAPPED:
                self._wrapped.popitem(last=False)
        self._wrapped.move_to_end(key)
        return self._wrapped[key]

    def draw(self, recipe: Recipe, ask: Ask, watch: Watch, path: Path | None, owner: str = "") -> Drawn:
        """One picture with the loaded pipeline, inside `pipeline(...)`; saved as PNG with its metadata if `path` is given.

        Raises:
            Cancelled: `watch` asked for it.
            DiffaccelError: the recipe or the settings do not fit the model, or the picture is not finite.
        """
        watch.check()
        pipe, guidance = self._pipe, self._guidance(ask)
        settings = work.Settings(ask.steps, guidance, ask.negative, ask.size, batch_size=1)
        work.check_size(pipe, settings.size)
        job = work.Job(ask.prompt, ask.seed, path or Path())
        fast = self.wrapped(recipe, owner)
        arguments = work.call_arguments(pipe, [job], settings) | _step_callback(pipe, watch)
        image = fast(**arguments).images[0]
        watch.check()
        assert fast.report is not None
        refuse_broken(fast.report)
        if path is not None:
            info = png_info(self._describe(fast, ask, image, guidance))
            write_file(path, lambda file: image.save(file, format="png", pnginfo=info))
        return Drawn(image, fast.report, path or Path())

    def _guidance(self, ask: Ask) -> float | None:
        return default_guidance(self._name or "") if ask.guidance is None else ask.guidance

    def _describe(self, fast: AcceleratedPipeline, ask: Ask, image: Any, guidance: float | None) -> Generation:
        report = fast.report
        assert report is not None
        default = getattr(inspect.signature(type(fast.pipe).__call__).parameters.get("guidance_scale"), "default", None)
        scale = default if guidance is None else guidance
        return Generation(
            prompt=ask.prompt,
            negative_prompt=ask.negative,
            steps=ask.steps,
            guidance=1.0 if scale is None else float(scale),
            scheduler=type(fast.pipe.scheduler).__name__,
            seed=ask.seed,
            width=image.width,
            height=image.height,
            model=Path(self._name or "").name,
            recipe=fast.recipe.to_dict(),
            seconds=report.seconds,
            report=report.to_dict(),
        )


def _step_callback(pipe: Any, watch: Watch) -> dict[str, Any]:
    """Call arguments that report each step and stop the run by diffusers' own interrupt.

    A pipeline without step callbacks runs through; a cancel is then seen when its picture is done.
    """
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        return {}

    def after_step(owner: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if watch.cancel.is_set():
            owner._interrupt = True
        elif not getattr(owner, "_interrupt", False):
            watch.step()
        return tensors

    return {"callback_on_step_end": after_step}

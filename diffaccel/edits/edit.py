"""An edit: low-rank maps on what text projections read, and everything one has to know about where they came from.

Each closed form multiplies weights from the right: W' = W (I + L R) on the columns [first, past) of W. All modules that
read the same text share L and R, so an edit is small, and it is the same thing as mapping their input x to x + L (R x).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffaccel.edits.concepts import Concept
from diffaccel.edits.effect import Effect
from diffaccel.edits.file import read_edit, write_edit
from diffaccel.edits.parts import EditedModule, EditError, TextMap, json_text, module_dict, tensor_digest

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}", re.ASCII)


@dataclass(frozen=True, eq=False)
class Edit:
    """What `erase` computes. Two edits are equal if their digests are.

    Attributes:
        method: "uce", "rece", "speed", "mace" or "context".
        concepts: what is erased.
        keep: what was to stay.
        parameters: settings of the method (as JSON holds them).
        diagnostics: what was measured while solving (as JSON holds it).
        leaks: ways by which the concept may still enter, one sentence each.
        pipeline: class name of the pipeline it was made on.
        versions: of diffaccel, diffusers, transformers and torch.
        maps: one per route.
    Raises:
        EditError: contents that cannot be.
    """

    method: str
    concepts: tuple[Concept, ...]
    keep: tuple[str, ...]
    parameters: Mapping[str, Any]
    diagnostics: Mapping[str, Any]
    leaks: tuple[str, ...]
    pipeline: str
    versions: Mapping[str, str]
    maps: tuple[TextMap, ...]

    def __post_init__(self) -> None:
        for name in ("parameters", "diagnostics"):
            # as it will be read from a file again: tuples become lists
            object.__setattr__(self, name, json.loads(json_text(getattr(self, name), name)))
        json_text(self.to_dict(), "contents of the edit")
        for name in ("method", "pipeline"):
            if not _WORD.fullmatch(getattr(self, name)):
                raise EditError(f"{getattr(self, name)[:60]!r} is not the name of a {name}.")
        if not self.concepts or not self.maps:
            raise EditError("an edit needs at least one concept and one map.")
        names = [module.name for text_map in self.maps for module in text_map.modules]
        if len(set(names)) != len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise EditError(f"{twice} appears more than once in one edit.")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of tensors and metadata, without the diagnostics (which may hold times): identifies the edit."""
        facts = {name: value for name, value in self.to_dict().items() if name != "diagnostics"}
        total = hashlib.sha256(json_text(facts, "edit").encode())
        for text_map in self.maps:
            for tensor in (text_map.left, text_map.right):
                total.update(f"{tuple(tensor.shape)}{tensor_digest(tensor)}".encode())
        return total.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<Edit: {self}>"

    def __str__(self) -> str:
        """ "erasing 'circle', 'disc' (speed)": how messages name it."""
        targets = [repr(concept.target) for concept in self.concepts]
        shown = ", ".join(targets[:3]) + (f" and {len(targets) - 3} more" if len(targets) > 3 else "")
        return f"edit erasing {shown} ({self.method})"

    @property
    def modules(self) -> tuple[EditedModule, ...]:
        """The edited projections of all routes."""
        return tuple(module for text_map in self.maps for module in text_map.modules)

    @property
    def routes(self) -> dict[str, dict[str, Any]]:
        """What was measured while solving, by the route of each map; none in an edit that was made by hand."""
        return {m.route: self.diagnostics[m.route] for m in self.maps if m.route in self.diagnostics}

    @property
    def effect(self) -> Effect | None:
        """What a few predictions of the denoiser showed when the edit was made; None if nobody looked."""
        return Effect.of(self.diagnostics.get("effect"))

    def check(self, pipe: Any) -> Effect:
        """Look again at a few predictions, on this pipeline, which ends as it was; nothing is drawn."""
        effect: Effect = _tool("check")(pipe, self)
        return effect

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, as JSON holds it."""
        return {
            "method": self.method,
            "concepts": [concept.model_dump(mode="json") for concept in self.concepts],
            "keep": list(self.keep),
            "parameters": self.parameters,
            "diagnostics": self.diagnostics,
            "leaks": list(self.leaks),
            "pipeline": self.pipeline,
            "versions": dict(self.versions),
            "maps": [{"route": m.route, "modules": [module_dict(module) for module in m.modules]} for m in self.maps],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which is replaced in one step.

        Raises:
            EditError: it cannot be written.
        """
        write_edit(path, {"digest": self.digest, **self.to_dict()}, self.maps)

    def prove(self, pipe: Any, **options: Any) -> Any:
        """Draw before and after, attack, and report: a `Proof`; options of `diffaccel.erasure.proof.proving.prove`."""
        return _tool("prove")(pipe, self, **options)


# What can be done with an edit by files above this one, by name; `diffaccel.erasure` fills it.
_TOOLS: dict[str, Callable[..., Any]] = {}


def provide(name: str, tool: Callable[..., Any]) -> None:
    """Make `tool(pipe, edit, ...)` what the method of this name calls."""
    _TOOLS[name] = tool


def _tool(name: str) -> Callable[..., Any]:
    if name not in _TOOLS:
        raise EditError(f"an edit can be asked to {name} once diffaccel.erasure was imported.")
    return _TOOLS[name]


def load_edit(path: str | os.PathLike[str]) -> Edit:
    """Read the file of an edit.

    Raises:
        EditError: it cannot be read, or is anything but a complete and sound edit; nothing in it is ever executed.
    """
    digest, fields = read_edit(path, frozenset(Edit.__dataclass_fields__))
    name = repr(os.fspath(path))
    try:
        edit = Edit(**fields)
    except EditError as error:
        raise EditError(f"{name} does not hold a sound edit: {error}") from error
    if edit.digest != digest:
        raise EditError(f"{name} is damaged or was changed: its contents do not have the digest that it states.")
    return edit

"""An edit: low-rank maps on what text projections read, and everything one has to know about where they came from.

Each closed form multiplies weights from the right: W' = W (I + L R) on the columns [first, past) of W. All modules that
read the same text share L and R, so an edit is small, and it is the same thing as mapping their input x to x + L (R x).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffaccel.erasure.concepts import Concept
from diffaccel.errors import DiffaccelError

if TYPE_CHECKING:
    from diffaccel.erasure.effect import Effect
    from diffaccel.erasure.proof_result import Proof

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUTES = ("sequence", "pooled")

# "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": identifiers and numbers, nothing private
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.([a-z][a-z0-9_]*|[0-9]{1,4}))+", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}", re.ASCII)
_LONGEST_NAME, _LONGEST_TEXT, _DEEPEST = 200, 10_000, 20


class EditError(DiffaccelError, ValueError):
    """An edit, or a file of one, that is wrong in itself."""


def weight_digests(weight: Tensor) -> dict[str, str]:
    """SHA-256 of a weight's bytes after a cast to each of `DTYPES`, by the name of the dtype.

    A model saved in fp32 and loaded in fp16 has the weights that the cast gives, so an edit made on either is known to fit.
    """
    weight = weight.detach().cpu()
    return {name: tensor_digest(weight.to(dtype)) for name, dtype in DTYPES.items()}


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row by row."""
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class EditedModule:
    """One projection that an edit changes.

    Attributes:
        name: dotted path from the pipeline.
        columns: [first, past) columns of the weight on which the map acts; (0, d_in) as a rule.
        shape: (d_out, d_in) of the weight.
        digests: `weight_digests` of the weight on which the edit was made.
    Raises:
        EditError: values that cannot be.
    """

    name: str
    columns: tuple[int, int]
    shape: tuple[int, int]
    digests: Mapping[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > _LONGEST_NAME or not _NAME.fullmatch(self.name):
            raise EditError(f"{str(self.name)[:60]!r} is not a path to a part of a pipeline.")
        for pair in (self.columns, self.shape):
            if not isinstance(pair, tuple) or len(pair) != 2 or any(type(item) is not int for item in pair):
                raise EditError(f"the columns and the shape of {self.name} must be two whole numbers each.")
        if min(self.shape) < 1 or not 0 <= self.columns[0] < self.columns[1] <= self.shape[1]:
            raise EditError(
                f"columns {list(self.columns)} are not in a weight of shape {list(self.shape)} ({self.name})."
            )
        if set(self.digests) != set(DTYPES) or not all(
            isinstance(value, str) and _DIGEST.fullmatch(value) for value in self.digests.values()
        ):
            raise EditError(f"{self.name} needs one SHA-256 for each of {', '.join(DTYPES)}.")

    @classmethod
    def of(cls, name: str, weight: Tensor, columns: tuple[int, int] | None = None) -> EditedModule:
        """The projection with this base weight (d_out, d_in); by default all of its columns are mapped."""
        rows, width = weight.shape
        return cls(name, columns or (0, width), (rows, width), weight_digests(weight))


@dataclass(frozen=True, eq=False)
class TextMap:
    """The map x -> x + L (R x) of one route by which text enters, and the modules that read it.

    Attributes:
        route: "sequence" (one vector per token) or "pooled" (one vector per prompt).
        left: L, (d, n), float32, on the CPU.
        right: R, (n, d), float32, on the CPU.
        modules: the projections that share the map.
    Raises:
        EditError: shapes, dtypes or numbers that make no map.
    """

    route: str
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    modules: tuple[EditedModule, ...]

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise EditError(f"there is no route {str(self.route)[:60]!r}; there are {' and '.join(ROUTES)}.")
        for tensor in (self.left, self.right):
            if tensor.dtype != torch.float32 or tensor.ndim != 2 or tensor.numel() == 0:
                raise EditError(f"the map of the {self.route} route must be two float32 matrices.")
            if not bool(torch.isfinite(tensor).all()):
                raise EditError(f"the map of the {self.route} route has numbers that are not finite.")
        if self.left.shape != self.right.shape[::-1]:
            raise EditError(f"the two matrices of the {self.route} route do not fit together.")
        if not self.modules:
            raise EditError(f"the map of the {self.route} route has no modules to act on.")
        for module in self.modules:
            if module.columns[1] - module.columns[0] != len(self.left):
                raise EditError(
                    f"{module.name} has another number of columns than the map has rows ({len(self.left)})."
                )


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
        from diffaccel.erasure.effect import Effect  # noqa: PLC0415  (it imports this file)

        return Effect.of(self.diagnostics.get("effect"))

    def check(self, pipe: Any) -> Effect:
        """Look again at a few predictions, on this pipeline, which ends as it was; nothing is drawn."""
        from diffaccel.erasure.effect import look_at  # noqa: PLC0415  (it imports this file)

        return look_at(pipe, self)

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
            "maps": [{"route": m.route, "modules": [_module_dict(module) for module in m.modules]} for m in self.maps],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which is replaced in one step.

        Raises:
            EditError: it cannot be written.
        """
        from diffaccel.erasure.edit_file import save_edit  # noqa: PLC0415  (it imports this file)

        save_edit(self, path)

    def prove(self, pipe: Any, **options: Any) -> Proof:
        """Draw before and after, attack, and report; options of `diffaccel.erasure.proof.prove`."""
        from diffaccel.erasure.proof import prove  # noqa: PLC0415  (drawing is not needed to apply an edit)

        return prove(pipe, self, **options)


def load_edit(path: str | os.PathLike[str]) -> Edit:
    """Read the file of an edit.

    Raises:
        EditError: it cannot be read, or is anything but a complete and sound edit; nothing in it is ever executed.
    """
    from diffaccel.erasure.edit_file import read_edit  # noqa: PLC0415  (it imports this file)

    return read_edit(path)


def json_text(value: Any, what: str) -> str:
    """Canonical JSON.

    Raises:
        EditError: something that JSON cannot hold, also NaN and infinity, or text that would steer a terminal.
    """
    _check_plain(value, what, 0)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_plain(value: Any, what: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise EditError(f"the {what} are nested too deeply.")
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise EditError(f"the {what} have a name that is not text.")
            _check_plain(name, what, depth + 1)
            _check_plain(item, what, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, what, depth + 1)
    elif isinstance(value, str):
        _check_text(value, what)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise EditError(f"the {what} hold {value}, which is not a finite number.")
    elif value is not None and not isinstance(value, int):
        raise EditError(f"the {what} hold a {type(value).__name__}, which a file cannot hold.")


def _check_text(text: str, what: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise EditError(f"the {what} hold a text of {len(text)} characters, and {_LONGEST_TEXT} are allowed.")
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in text):
        raise EditError(f"the {what} hold a text with control characters.")


def _module_dict(module: EditedModule) -> dict[str, Any]:
    return {
        "name": module.name,
        "columns": list(module.columns),
        "shape": list(module.shape),
        "digests": dict(module.digests),
    }

"""What an edit is made of: the maps of its routes, the projections that read them, digests, and JSON that a file may hold."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffaccelError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUTES = ("sequence", "pooled")

# "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": identifiers and numbers, nothing private
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.([a-z][a-z0-9_]*|[0-9]{1,4}))+", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
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


def module_dict(module: EditedModule) -> dict[str, Any]:
    """As a file holds it."""
    return {
        "name": module.name,
        "columns": list(module.columns),
        "shape": list(module.shape),
        "digests": dict(module.digests),
    }

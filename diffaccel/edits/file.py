"""The file of an edit: two matrices per route in safetensors, everything else as one JSON text in the metadata.

    tensors      map.0.left (d, n), map.0.right (n, d), map.1.left, ...; float32
    metadata     {"diffaccel.edit": JSON}: format, digest, and what `Edit.to_dict` gives

Files may come from strangers. Only exactly this is accepted, within limits that no real edit meets; the digest is computed
again. Whether the edit fits a pipeline is decided by `apply_edit`, before it changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from diffaccel.edits.concepts import Concept
from diffaccel.edits.parts import EditedModule, EditError, TextMap, json_text
from diffaccel.files.tensors import TensorFile, strict_json

FORMAT = "diffaccel edit 1"
KEY = "diffaccel.edit"
_FILE = TensorFile("an edit", EditError, largest=2**29)
_MOST_MAPS, _MOST_MODULES = 4, 5000


def write_edit(path: str | os.PathLike[str], facts: Mapping[str, Any], maps: Sequence[TextMap]) -> None:
    """Write an edit; the file is replaced in one step, and equal edits give equal bytes.

    Args:
        facts: digest and all but the tensors, as JSON holds it.
    Raises:
        EditError: it cannot be written.
    """
    tensors = dict[str, Tensor]()
    for i, text_map in enumerate(maps):
        tensors |= {f"map.{i}.left": text_map.left, f"map.{i}.right": text_map.right}
    _FILE.write(path, tensors, {KEY: json_text({"format": FORMAT, **facts}, "contents of the edit")})


def read_edit(path: str | os.PathLike[str], fields: frozenset[str]) -> tuple[str, dict[str, Any]]:
    """The digest that a file states, and the `fields` of its edit.

    Raises:
        EditError: it cannot be read, or holds anything else.
    """
    with torch.inference_mode(False):  # tensors made inside of it could never meet a gradient
        metadata, tensors = _FILE.read(path)
    name = repr(os.fspath(path))
    try:
        facts = strict_json(metadata[KEY]) if set(metadata) == {KEY} else None
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise EditError(f"{name} does not hold an edit that this version can read.")
    try:
        return _digest_and_fields(facts, tensors, fields)
    except EditError as error:
        raise EditError(f"{name} does not hold a sound edit: {error}") from error


def _digest_and_fields(
    facts: dict[str, Any], tensors: dict[str, Tensor], fields: frozenset[str]
) -> tuple[str, dict[str, Any]]:
    expected = {*fields, "format", "digest"}
    if set(facts) != expected:
        odd = min(set(facts) ^ expected)
        raise EditError(f"{odd[:60]!r} is {'unknown' if odd in facts else 'missing'}.")
    found = {
        "method": _text(facts["method"], "method"),
        "concepts": tuple(_concept(item) for item in _list(facts["concepts"], "concepts")),
        "keep": tuple(_text(item, "keep") for item in _list(facts["keep"], "keep")),
        "parameters": _dict(facts["parameters"], "parameters"),
        "diagnostics": _dict(facts["diagnostics"], "diagnostics"),
        "leaks": tuple(_text(item, "leaks") for item in _list(facts["leaks"], "leaks")),
        "pipeline": _text(facts["pipeline"], "pipeline"),
        "versions": {name: _text(item, "versions") for name, item in _dict(facts["versions"], "versions").items()},
        "maps": _maps(_list(facts["maps"], "maps"), tensors),
    }
    return facts["digest"], found


def _concept(item: Any) -> Concept:
    try:
        return Concept.model_validate(item)
    except ValidationError as error:
        raise EditError("one of its concepts is not of the form that a concept has.") from error


def _maps(items: list[Any], tensors: dict[str, Tensor]) -> tuple[TextMap, ...]:
    names = [f"map.{i}.{side}" for i in range(len(items)) for side in ("left", "right")]
    if len(items) > _MOST_MAPS or set(tensors) != set(names):
        raise EditError("it does not have exactly the matrices of its maps.")
    return tuple(_map(item, tensors[f"map.{i}.left"], tensors[f"map.{i}.right"]) for i, item in enumerate(items))


def _map(item: Any, left: Tensor, right: Tensor) -> TextMap:
    _exactly(_dict(item, "maps"), ("route", "modules"))
    modules = _list(item["modules"], "modules")
    if len(modules) > _MOST_MODULES:
        raise EditError(f"{len(modules)} modules are more than any network has.")
    return TextMap(_text(item["route"], "route"), left, right, tuple(_module(module) for module in modules))


def _module(item: Any) -> EditedModule:
    _exactly(_dict(item, "modules"), ("name", "columns", "shape", "digests"))
    columns, shape = _list(item["columns"], "columns"), _list(item["shape"], "shape")
    digests = _dict(item["digests"], "digests")
    return EditedModule(_text(item["name"], "name"), tuple(columns), tuple(shape), digests)


def _exactly(item: dict[str, Any], names: Iterable[str]) -> None:
    if set(item) != set(names):
        raise EditError(f"one of its parts does not have exactly {', '.join(names)}.")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise EditError(f"{what!r} is not text.")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise EditError(f"{what!r} is not a list.")
    return value


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EditError(f"{what!r} is not an object.")
    return value

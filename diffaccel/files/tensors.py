"""Safetensors files that diffaccel writes for itself: strict reading of what may come from a stranger, writing in one step.

The format is https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header with dtype,
shape and place of each tensor, then their bytes. The file is opened once and read as a whole, so that what was checked is
what is used; nothing in it is ever executed.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from diffaccel.errors import DiffaccelError
from diffaccel.files.output import replace_file

LONGEST_HEADER = 8 * 2**20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_DIMENSIONS = 8


class _Wrong(Exception):
    """What is wrong with a file, as the end of a sentence."""


@dataclass(frozen=True)
class TensorFile:
    """One kind of file.

    Attributes:
        holds: what is in it, as messages name it.
        refusal: the exception for files that cannot be read or written.
        largest: bytes; larger files are refused before they are read.
    """

    holds: str
    refusal: type[DiffaccelError]
    largest: int

    def write(self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a file, which is replaced in one step.

        Raises:
            refusal: it cannot be written.
        """
        target = Path(path)
        data = save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata=dict(metadata)
        )
        try:
            replace_file(target, lambda file: file.write(data))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self.refusal(f"cannot write {self.holds} to {target}: {reason}.") from error

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Metadata and tensors (on the CPU) of a file.

        Raises:
            refusal: no such file, no safetensors file, a damaged one, one beyond the limits, or one with
                numbers that are not finite.
        """
        try:
            # without O_NONBLOCK, opening a named pipe would wait for somebody to write to it
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                return self._parse(file)
        except _Wrong as error:
            reason: Any = error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
        raise self.refusal(f"cannot read {self.holds} from {os.fspath(path)!r}: {reason}.")

    def _parse(self, file: BinaryIO) -> tuple[dict[str, str], dict[str, Tensor]]:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _Wrong("it is not a regular file")
        if status.st_size > self.largest:
            raise _Wrong(f"it has {status.st_size} bytes, and {self.largest} are the most that could belong there")
        length = int.from_bytes(_exactly(file, 8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, status.st_size - 8):
            raise _Wrong("it is not a safetensors file, or damaged: its header cannot have the length it states")
        header = _header(_exactly(file, length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _Wrong("its metadata are not texts")
        data = bytearray(_exactly(file, status.st_size - 8 - length))
        if file.read(1):
            raise _Wrong("it grew while it was read")
        return metadata, _tensors(header, data)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise _Wrong("it is cut off")
    return data


def strict_json(text: str | bytes) -> Any:
    """JSON without the liberties of Python's reader.

    Raises:
        ValueError: no JSON, a name given twice, NaN or infinity, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _header(data: bytes) -> dict[str, Any]:
    try:
        header = strict_json(data.decode("utf-8"))
    except ValueError as error:
        raise _Wrong("it is not a safetensors file, or damaged: its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _Wrong("its header is not an object")
    return header


def _tensors(header: dict[str, Any], data: bytearray) -> dict[str, Tensor]:
    """The tensors, which must fill the data from the first byte to the last."""
    places = {name: _place(name, facts) for name, facts in header.items()}
    position, found = 0, {}
    for name, (dtype, shape, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != position or end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
            raise _Wrong(f"the place it states for the tensor {_shown(name)} cannot be")
        position = end
        flat = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=begin) if end > begin else None
        found[name] = torch.empty(shape, dtype=dtype) if flat is None else flat.clone().view(dtype).reshape(shape)
        if not bool(torch.isfinite(found[name]).all()):
            raise _Wrong(f"the tensor {_shown(name)} is not made of finite floating-point numbers")
    if position != len(data):
        raise _Wrong(f"{len(data) - position} bytes in it belong to no tensor")
    return found


def _place(name: str, facts: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one entry of the header."""
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise _Wrong(f"its entry for {_shown(name)} is not one of a tensor")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Wrong(f"the tensor {_shown(name)} is not made of finite floating-point numbers")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise _Wrong(f"its entry for {_shown(name)} is not one of a tensor")
    return _DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _shown(name: str) -> str:
    """A name from a file, safe to print."""
    return name[:60].encode("unicode_escape").decode("ascii")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)

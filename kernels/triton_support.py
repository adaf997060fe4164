"""Triton where it is installed: may a kernel run on this tensor, and with which tile.

Kernel files import `triton` and `tl` from here, so they load without Triton. Kernels use pointers and strides only, no
block pointers (gone in Triton 3.9) and no autotuning (it needs a driver, and would choose another tile on every machine).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton as _triton
    import triton.language as _language

    HAS_TRITON = True
    INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
except ImportError:
    HAS_TRITON = INTERPRETED = False

MIN_CAPABILITY = (8, 0)  # the first GPUs with asynchronous copies and bfloat16


class _NoTriton:
    """Stands for Triton where it is missing: kernels can be defined, and calling one says why it cannot run."""

    @staticmethod
    def jit(function: Any) -> Any:
        """The kernel, unusable."""

        class Unusable:
            def __getitem__(self, grid: Any) -> Any:
                raise RuntimeError(f"the kernel {function.__name__} needs the package triton, which is not installed.")

        return Unusable()


triton: Any = _triton if HAS_TRITON else _NoTriton
tl: Any = _language if HAS_TRITON else None

_FORCED: ContextVar[bool] = ContextVar("diffaccel_force_triton", default=False)


@contextlib.contextmanager
def force_triton() -> Iterator[None]:
    """For tests: take the Triton path on CPU tensors too, through the interpreter.

    Raises:
        RuntimeError: Triton is missing or was imported without TRITON_INTERPRET=1.
    """
    if not INTERPRETED:
        raise RuntimeError("force_triton() needs triton, imported with TRITON_INTERPRET=1 in the environment.")
    token = _FORCED.set(True)
    try:
        yield
    finally:
        _FORCED.reset(token)


def usable(tensor: torch.Tensor) -> bool:
    """Whether a Triton kernel may run on this tensor; the interpreter only inside `force_triton()`."""
    if _FORCED.get():
        return True
    if not HAS_TRITON or INTERPRETED or not tensor.is_cuda or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= MIN_CAPABILITY


def launching_on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches on that one, whatever GPU the pointers belong to."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's GPU; (9, 0) for the interpreter."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


@dataclass(frozen=True)
class Tile:
    """What one program owns and how it is launched.

    Attributes:
        rows: queries, sources or output rows of a program.
        columns: keys, destinations or channels of one loop step.
        depth: channels of one inner step; 0 where there is none.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 0

    @property
    def launch(self) -> dict[str, Any]:
        """Options of a kernel launch. Contracting a * b + c is what every release did so far; later ones would not."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# (lowest compute capability, largest size) -> tile. What "size" is belongs to the operator: head dimension, channels.
TileTable = Mapping[tuple[tuple[int, int], int], Tile]


def tiles(table: TileTable, size: int, capability: tuple[int, int]) -> Tile:
    """The entry of the newest architecture that is not newer than `capability`, with the smallest size that fits.

    Raises:
        KeyError: no entry fits.
    """
    fitting = [key for key in table if key[0] <= capability and key[1] >= size]
    if not fitting:
        raise KeyError(f"no tile for size {size} on compute capability {capability}")
    newest = max(key[0] for key in fitting)
    return table[newest, min(key[1] for key in fitting if key[0] == newest)]


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its last stride is not 1; kernels take any other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def interpreted_upcast() -> bool:
    """Value of a kernel's `UP` flag: the interpreter multiplies bfloat16 bit patterns, so operands go to float32."""
    return INTERPRETED


def power_of_two(size: int) -> int:
    """The smallest power of two that is not smaller than `size`."""
    return 1 << max(size - 1, 0).bit_length()

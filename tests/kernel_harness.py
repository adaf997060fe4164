"""What every operator test shares: hard conditions for a kernel, error metrics with their limits, far-away memory.

`harden` runs an operator's Triton path in the interpreter so that mistakes show: outputs start as NaN, inputs lie inside
NaN-filled buffers, masked loads without `other` return NaN, programs run in another order the second time, and both runs
must agree bit for bit and leave their inputs alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from diffaccel.kernels.triton_support import force_triton

SENTINEL = -(2**30)  # stands for NaN in integer tensors

# (relative Frobenius error of the worst slice, max |difference| / max |reference|); see the floors in the comments
LIMITS = {
    "fp32": (5e-6, 2e-5),  # 4e-7 seen
    "fp16": (6e-4, 2e-3),  # 3e-4 seen, output rounding alone 2e-4
    "bf16": (6e-3, 2e-2),  # the interpreter truncates; rounding to nearest gives 2.4e-3
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def guarded(tensor: torch.Tensor, pad: int = 3) -> torch.Tensor:
    """The same values as a view inside a larger buffer full of NaN (integers: SENTINEL); the last stride stays 1."""
    fill: Any = math.nan if tensor.is_floating_point() else (SENTINEL if tensor.dtype != torch.bool else True)
    if tensor.dtype in (torch.int8, torch.uint8):
        fill = torch.iinfo(tensor.dtype).max
    pads = [*[pad] * (tensor.dim() - 1), 8]  # a row of 8 n elements stays aligned, as kernels want it
    sizes = [size + 2 * p for size, p in zip(tensor.shape, pads, strict=True)]
    buffer = torch.full(sizes, fill, dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(p, p + size) for size, p in zip(tensor.shape, pads, strict=True))]
    view.copy_(tensor)
    return view


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a last stride of 2, zeros between them."""
    wide = tensor.new_zeros(*tensor.shape, 2)
    wide[..., 0] = tensor
    return wide[..., 0]


def harden(
    function: Callable[..., Any],
    *inputs: Any,
    mutated: Sequence[int] = (),
    guard: bool = True,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Run `function(*inputs, **options)` twice under hard conditions and return what the first run returned.

    Args:
        inputs: tensors are guarded, unless `guard` is False because their layout matters (fused projections).
        mutated: positions of the inputs that the operator writes; the caller's tensors get the result of the first run.
    """
    placed = [guarded(x) if guard and isinstance(x, torch.Tensor) and x.dim() else x for x in inputs]
    before = [_whole(x).clone() if isinstance(x, torch.Tensor) else None for x in placed]
    results, written = [], []
    for order in (None, random.Random(seed)):
        for number in mutated:
            _whole(placed[number]).copy_(before[number])
        with force_triton(), poisoned_outputs(), poisoned_loads(), program_order(order):
            results.append(function(*placed, **options))
        written.append([placed[number].clone() for number in mutated])
    for number, (x, old) in enumerate(zip(placed, before, strict=True)):
        if old is not None and number not in mutated:
            assert _same_bytes(_whole(x), old), f"input {number} was changed"
    for first, second in zip(_tensors(results[0]), _tensors(results[1]), strict=True):
        _check_written(first)
        assert _same_bytes(first, second), "the result depends on the order of the programs"
    for number, first, second in zip(mutated, *written, strict=True):
        assert _same_bytes(first, second), "what was written depends on the order of the programs"
        _check_surroundings(placed[number], before[number])
        inputs[number].copy_(first)
    return results[0]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)]


def _whole(x: torch.Tensor) -> torch.Tensor:
    """The whole storage, so that writes beside the view show."""
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True


def _check_written(x: torch.Tensor) -> None:
    if x.is_floating_point():
        assert not bool(x.isnan().any()), "part of an output was not written, or a stray value was read"
    elif x.dtype in (torch.int32, torch.int64):
        empty = (x == torch.iinfo(x.dtype).max) | (x == SENTINEL)
        assert not bool(empty.any()), "part of an output was not written, or a stray value was read"


def _check_surroundings(view: torch.Tensor, before: torch.Tensor) -> None:
    """Around a mutated view nothing was written."""
    after = _whole(view).clone()
    torch.as_strided(after, view.shape, view.stride(), view.storage_offset()).copy_(
        torch.as_strided(before, view.shape, view.stride(), view.storage_offset())
    )
    assert _same_bytes(after, before), "something was written beside a mutated input"


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """`torch.empty` and its relatives return NaN, integers the largest value."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def poisoned_loads() -> Iterator[None]:
    """Lanes that a mask turns off and no `other` fills read NaN (integers: SENTINEL), as a GPU may."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_masked_load

    def create_masked_load(self, ptrs, mask, other, *rest):
        if other is None:
            dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
            kind = np.dtype(dtype).kind
            poison = np.nan if kind == "f" else SENTINEL if np.dtype(dtype).itemsize >= 4 else np.iinfo(dtype).max
            other = interpreter.TensorHandle(np.full_like(ptrs.data, poison, dtype=dtype), ptrs.get_element_ty())
        return original(self, ptrs, mask, other, *rest)

    builder.create_masked_load = create_masked_load
    try:
        yield
    finally:
        builder.create_masked_load = original


@contextlib.contextmanager
def program_order(generator: random.Random | None) -> Iterator[None]:
    """Run the programs of every launch in a random order; None keeps the order."""
    builder = interpreter.InterpreterBuilder
    original_dim, original_idx = builder.set_grid_dim, builder.set_grid_idx
    places: dict[tuple[int, ...], tuple[int, ...]] = {}

    def set_grid_dim(self, *grid):
        original_dim(self, *grid)
        every = list(itertools.product(*(range(size) for size in grid)))
        shuffled = list(every)
        if generator is not None:
            generator.shuffle(shuffled)
        places.clear()
        places.update(zip(every, shuffled, strict=True))

    builder.set_grid_dim = set_grid_dim
    builder.set_grid_idx = lambda self, *place: original_idx(self, *places[place])
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = original_dim, original_idx


def errors(got: torch.Tensor, reference: torch.Tensor, leading: int = 2) -> tuple[float, float]:
    """Worst relative Frobenius error over the slices of the first `leading` dimensions, and max error over max value."""
    assert got.shape == reference.shape
    assert bool(got.isfinite().all())
    a = got.double().flatten(0, leading - 1).flatten(1) if leading else got.double().reshape(1, -1)
    b = reference.double().flatten(0, leading - 1).flatten(1) if leading else reference.double().reshape(1, -1)
    norm = b.norm(dim=1)
    relative = torch.where(norm > 0, (a - b).norm(dim=1) / norm.clamp_min(1e-300), a.norm(dim=1))
    scale = max(float(b.abs().max()), 1e-300)
    return float(relative.max()), float((a - b).abs().max()) / scale


def assert_accurate(got: torch.Tensor, reference: torch.Tensor, kind: str, leading: int = 2) -> None:
    """`got` is the float64 `reference` within the limits of its dtype ("fp32", "fp16", "bf16")."""
    assert got.dtype == DTYPES[kind]
    frobenius, largest = errors(got, reference, leading)
    assert frobenius <= LIMITS[kind][0], f"{frobenius:.2e} relative error in {kind}"
    assert largest <= LIMITS[kind][1], f"{largest:.2e} largest error in {kind}"


def assert_no_worse(got: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor, factor: float = 1.5) -> None:
    """The error of `got` is at most `factor` times that of the stock implementation in the same dtype."""
    ours, theirs = errors(got, reference)[0], errors(stock, reference)[0]
    assert ours <= factor * theirs, f"{ours:.2e}, stock {theirs:.2e}"


def far_tensor(shape: Sequence[int], dimension: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor whose index 1 along `dimension` (of size 2) lies past 2^31 elements: virtual memory, not filled.

    Write every element before it is read. Not to be used while outputs are poisoned.
    """
    assert shape[dimension] == 2
    rest = [1 if place == dimension else size for place, size in enumerate(shape)]
    strides = list(torch.empty(rest, device="meta").stride())
    strides[dimension] = 2**31 + 16
    storage = torch.empty(2**31 + 16 + math.prod(rest), dtype=dtype)
    return torch.as_strided(storage, tuple(shape), tuple(strides))

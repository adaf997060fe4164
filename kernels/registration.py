"""Operators `diffaccel::<name>`: a torch path for every device and a Triton path where it may run, as one torch operator.

Torch sees an opaque operator with a fake implementation and a FLOP formula, so `torch.compile(fullgraph=True)` works and
FLOP counters count it. Which path ran is told to whoever listens: a run opens `recording()` and its report prints it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from diffaccel.errors import Unsupported

NAMESPACE = "diffaccel"

Counts = dict[str, dict[str, int]]  # operator -> path ("triton" or "torch") -> calls

_RECORD: ContextVar[Counts | None] = ContextVar("diffaccel_operators", default=None)


@contextlib.contextmanager
def recording(counts: Counts) -> Iterator[Counts]:
    """Count in `counts` the path of every operator that is called inside; what is open outside hears nothing.

    Replays of a CUDA graph call no operators and are not counted.
    """
    token = _RECORD.set(counts)
    try:
        yield counts
    finally:
        _RECORD.reset(token)


def record(operator: str, path: str) -> None:
    """Tell the open recording, if there is one, that `operator` took `path`."""
    counts = _RECORD.get()
    if counts is not None:
        paths = counts.setdefault(operator, {})
        paths[path] = paths.get(path, 0) + 1


class Operator:
    """A registered operator. Call it like its torch path.

    Attributes:
        name: without the namespace.
        op: the operator as torch knows it, for `torch.library.opcheck`.
        torch_path, triton_path: its implementations; None where there is no kernel.
    """

    def __init__(
        self,
        name: str,
        torch_path: Callable[..., Any],
        triton_path: Callable[..., Any] | None,
        supported: Callable[..., bool],
        mutates: Sequence[str],
    ) -> None:
        self.name, self.torch_path, self.triton_path, self._supported = name, torch_path, triton_path, supported
        schema = torch.library.infer_schema(torch_path, mutates_args=tuple(mutates))
        self.custom = torch.library.custom_op(
            f"{NAMESPACE}::{name}", self._run, mutates_args=tuple(mutates), schema=schema
        )
        self.op: Any = getattr(getattr(torch.ops, NAMESPACE), name)
        functools.update_wrapper(self, torch_path)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        from diffaccel.kernels.triton_support import launching_on

        path, first = self.path(*args, **kwargs), _first_tensor(args, kwargs)
        record(self.name, path)
        if path == "torch" or self.triton_path is None:
            with _as_written(first.device.type):
                return self.torch_path(*args, **kwargs)
        with launching_on(first):
            return self.triton_path(*args, **kwargs)

    def path(self, *args: Any, **kwargs: Any) -> str:
        """The path that a call with these arguments takes: "triton" or "torch"."""
        from diffaccel.kernels.triton_support import usable

        if self.triton_path is None or not usable(_first_tensor(args, kwargs)):
            return "torch"
        return "triton" if self._supported(*args, **kwargs) else "torch"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator.

        Raises:
            Unsupported: a gradient would be needed; the operators have none.
        """
        if torch.is_grad_enabled() and any(_needs_gradient(value) for value in (*args, *kwargs.values())):
            raise Unsupported(
                f"{NAMESPACE}::{self.name} has no gradient; call it under torch.no_grad(), or with detached tensors."
            )
        if _watched((*args, *kwargs.values())):
            return self.op(*args, **kwargs)
        # nobody traces or counts: torch's wrapper around Python operators would only cost the host time before a launch
        return self._run(*args, **kwargs)


PLAIN = (torch.Tensor, torch.nn.Parameter)

# torch's own count of active modes (fake tensors, FLOP counters, tracers); a torch without it gets the wrapper always
_active_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _watched(values: Sequence[Any]) -> bool:
    """Whether torch must see the operator: it compiles, a mode listens, or a tensor is of a kind with rules of its own."""
    if torch.compiler.is_compiling() or _active_modes():
        return True
    return any(isinstance(value, torch.Tensor) and type(value) not in PLAIN for value in values)


def _as_written(device: str) -> contextlib.AbstractContextManager[Any]:
    """Operators compute in the types that they are given: autocast reaches them by some of torch's ways to a call only."""
    return torch.autocast(device, enabled=False) if _autocasts(device) else contextlib.nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def register(
    name: str,
    torch_path: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    triton_path: Callable[..., Any] | None = None,
    supported: Callable[..., bool] = lambda *args, **kwargs: True,
    mutates: Sequence[str] = (),
    flops: Callable[..., int] | None = None,
) -> Operator:
    """Make `diffaccel::<name>` known to torch.

    Args:
        torch_path: annotated with types that torch's schemas know; returns fresh tensors, never views of its inputs.
        fake: same arguments, returns empty tensors with the shapes, dtypes and strides of the real ones.
        triton_path: same arguments; used where `triton_support.usable(first tensor)` and `supported(...)`.
        supported: whether the kernel covers these arguments.
        mutates: names of the arguments that are written.
        flops: formula over the arguments with tensors replaced by their shapes, plus `out_shape`; None counts as zero.
    """
    operator = Operator(name, torch_path, triton_path, supported, mutates)
    operator.custom.register_fake(fake)

    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 0 if flops is None else int(flops(*args, out_shape=out_shape, **kwargs))

    register_flop_formula(operator.op)(formula)
    return operator


def _first_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad

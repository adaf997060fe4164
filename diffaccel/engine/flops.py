"""FLOPs of network calls: counted from the operators of the first call of a kind, then remembered.

Counted calls run uncompiled. With a compiler that rounds differently from eager mode, the first run of a kind may
therefore differ from later ones in the last bits.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.models.compiled import is_compiled

# torch's registry knows the CUDA attention operators only; without this entry attention on CPU would count as free.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Place = tuple[Any, str]  # an object, and the name of the attribute that holds a forward
# Questions about a tensor and not work on it; torch answers them itself.
_QUESTIONS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "sym_is_contiguous is_contiguous is_strides_like_format is_non_overlapping_and_dense size sym_size stride "
        "sym_stride storage_offset sym_storage_offset numel sym_numel dim"
    ).split()
) | {torch.ops.prim.layout}


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the matrix, convolution and attention FLOPs of the operators inside (2 per multiply-add).

    torch's own counter also keeps them by module. For that it walks the tree of modules, which never ends where a block
    refers to its network, and it refuses operators of higher order. This one only adds.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)  # an operator of higher order has none
        if packet in _QUESTIONS:
            return NotImplemented
        if packet not in flop_registry and hasattr(func, "decompose") and packet is not torch.ops.prim.device:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        formula = _cpu_attention_flops if packet is _CPU_ATTENTION else flop_registry.get(packet)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


_ACTIVE: ContextVar[tuple[FlopCounter, ...]] = ContextVar("active FLOP counters", default=())


def count_flops(function: Callable[[], Any]) -> tuple[Any, int]:
    """Run `function` and count the matrix, convolution and attention FLOPs it really executes (2 per multiply-add)."""
    counter = FlopCounter()
    token = _ACTIVE.set((*_ACTIVE.get(), counter))
    try:
        with _uncompiled(), counter:
            result = function()
    finally:
        _ACTIVE.reset(token)
    return result, counter.total


def _uncompiled() -> AbstractContextManager[Any]:
    """Ignore `torch.compile` for a while.

    Dynamo does not compile while an operator counter is active, and marks the code it meets then as never to be
    compiled: one counted call would make compiled blocks eager for good, in the stock pipeline too.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


# --- layers whose products torch does not count ---


def count_through_calls(networks: Iterable[nn.Module], seams: Seams) -> list[str]:
    """Count quantised layers by the shapes of their calls, as their own kernels are unknown to torch.

    Where a layer makes counted products itself (it unpacks its weight first), those count. Class names of quantised
    layers inside compiled blocks are returned: they stay uncounted, because nothing may stand inside a user's graph.
    """
    left = set()
    for network in networks:
        compiled = {id(part) for module in network.modules() if is_compiled(module) for part in module.modules()}
        for module in network.modules():
            if not _is_packed(module):
                continue
            if id(module) in compiled:
                left.add(type(module).__name__)
            else:
                seams.replace_forward(module, _Counted(module).around)
    return sorted(left)


def _is_packed(module: nn.Module) -> bool:
    """Whether this is a linear layer or a convolution whose weight is no plain floating-point tensor of its size."""
    if not (_has_numbers(module, "in_features", "out_features") or hasattr(module, "kernel_size")):
        return False
    weight = getattr(module, "weight", None)
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[union-attr]
    if plain and hasattr(module, "in_features"):  # 4-bit weights may hide in floating-point storage of another size
        return bool(weight.numel() != module.in_features * module.out_features)  # type: ignore[operator, union-attr]
    return not plain and (hasattr(module, "in_features") or _has_numbers(module, "in_channels", "out_channels"))


def _has_numbers(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in names)


class _Counted:
    """A quantised layer: while FLOPs are counted, its call is worth at least the product of its sizes."""

    def __init__(self, module: Any) -> None:
        if hasattr(module, "in_features"):
            self.each = 2 * int(module.in_features)  # FLOPs for each number in the output
        else:
            self.each = 2 * int(module.in_channels) // int(module.groups) * math.prod(module.kernel_size)

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The layer's forward."""

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            counters = _ACTIVE.get()
            if not counters:
                return original(*args, **kwargs)
            before = counters[-1].total
            output = original(*args, **kwargs)
            missing = max(0, self.each * output.numel() - (counters[-1].total - before))
            for counter in counters:
                counter.total += missing
            return output

        return forward


# --- what calls cost ---


class FlopLedger:
    """FLOPs by kind of call. Counting slows a call down, so each kind is counted once per wrapped pipeline.

    Attributes:
        known: FLOPs of the kinds of calls that were counted.
        failure: why nothing is counted any more; None while counting works.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, int] = {}
        self.failure: str | None = None

    def count(self, key: Hashable, function: Callable[[], Any]) -> tuple[Any, int | None]:
        """Result of `function()` and its FLOPs, None if they cannot be counted; `key` must determine the amount of work."""
        if key in self.known:
            return function(), self.known[key]
        result, flops = self.counted(function)
        if flops is not None:
            self.known[key] = flops
        return result, flops

    def counted(self, function: Callable[[], Any], again: Callable[[], None] = lambda: None) -> tuple[Any, int | None]:
        """As `count` for one call that is counted now. A call that fails under the counter runs once more without it.

        Args:
            again: called before the second try, to forget what the first one noted.
        """
        if self.failure is not None:
            return function(), None
        try:
            return count_flops(function)
        except Unsupported:
            raise
        except Exception as error:
            if not _may_come_from_counting(error):
                raise
            sentence = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        again()
        result = function()  # what is wrong with the call itself is raised again here
        self.failure = sentence
        return result, None


class PartMeter:
    """Sees which parts of a network ran, where something that is none of ours decides that (a cache the user enabled).

    The first call that runs all parts is counted part by part; from then on a call costs what its parts cost.
    """

    def __init__(self, parts: Sequence[tuple[nn.Module, Place]], seams: Seams) -> None:
        self._inside = [_owner(module, [m for m, _ in parts]) for module, _ in parts]
        self._ran, self._costs, self._thread = set[int](), dict[int, int](), threading.get_ident()
        for index, (_, place) in enumerate(parts):
            seams.replace(*place, self._around(index, getattr(*place)))

    def _around(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._ran.add(index)
            counters = _ACTIVE.get()
            before = counters[-1].total if counters else 0
            output = original(*args, **kwargs)
            if counters:
                self._costs[index] = self._costs.get(index, 0) + counters[-1].total - before
            return output

        return forward

    def _begin(self) -> None:
        self._ran.clear()
        self._costs.clear()

    def count(self, ledger: FlopLedger, key: Hashable, function: Callable[[], Any]) -> tuple[Any, int | None]:
        """As `FlopLedger.count`, for calls of which only the end tells what they did."""
        self._begin()
        known = ledger.known
        if key in known:
            result = function()
            return result, known[key] - sum(known[key, "part", index] for index in self._left_out())
        result, flops = ledger.counted(function, self._begin)
        if flops is not None and len(self._ran) == len(self._inside):
            known |= {(key, "part", index): cost for index, cost in self._costs.items()} | {key: flops}
        return result, flops

    def _left_out(self) -> Iterator[int]:
        """Parts that did not run, but for those inside others that did not."""
        for index, owner in enumerate(self._inside):
            if index not in self._ran and (owner is None or owner in self._ran):
                yield index


def _owner(module: nn.Module, others: Sequence[nn.Module]) -> int | None:
    """Number of the smallest of the other modules that holds this one."""
    holding = [i for i, other in enumerate(others) if other is not module and module in set(other.modules())]
    return min(holding, key=lambda i: len(list(others[i].modules())), default=None)


def _may_come_from_counting(error: BaseException) -> bool:
    """Whether it was raised inside torch or by the counter; exceptions of the user's own hooks and callbacks pass."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    return file == Path(__file__) or Path(torch.__file__).parent in file.parents

"""FLOPs of network calls: counted by torch's own counter the first time a kind of call happens, then remembered.

Counted calls run uncompiled. With a compiler that rounds differently from eager mode, the first run of a kind may
therefore differ from later ones in the last bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# torch's registry knows the CUDA attention operators only; without this entry attention on CPU would count as free.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def count_flops(function: Callable[[], Any]) -> tuple[Any, int]:
    """Run `function` and count the matrix, convolution and attention FLOPs it really executes (2 per multiply-add)."""
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _cpu_attention_flops})
    with _uncompiled(), counter:
        result = function()
    return result, int(counter.get_total_flops())


def _uncompiled() -> AbstractContextManager[Any]:
    """Ignore `torch.compile` for a while.

    Dynamo does not compile while an operator counter is active, and marks the code it meets then as never to be
    compiled: one counted call would make compiled blocks eager for good, in the stock pipeline too.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class FlopLedger:
    """FLOPs by kind of call. Counting slows a call down, so each kind is counted once per wrapped pipeline."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def count(self, key: Hashable, function: Callable[[], Any]) -> tuple[Any, int]:
        """Result of `function()` and its FLOPs; `key` must determine the amount of work."""
        if key in self._known:
            return function(), self._known[key]
        result, flops = count_flops(function)
        self._known[key] = flops
        return result, flops

"""FLOPs of network calls: counted by torch's own counter the first time a kind of call happens, then remembered."""

from __future__ import annotations

from collections.abc import Callable, Hashable
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
    with counter:
        result = function()
    return result, int(counter.get_total_flops())


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

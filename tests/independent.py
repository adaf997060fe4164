"""Counts that owe nothing to the engine: forward hooks, and torch's FLOP counter on attention as plain matrix products."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def networks(pipe: Any) -> list[Any]:
    """The denoisers and their ControlNets."""
    net = getattr(pipe, "controlnet", None)
    denoisers = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    return [part for part in denoisers if part is not None] + ([] if net is None else list(getattr(net, "nets", [net])))


@contextmanager
def counted_rows(pipe: Any):
    """Rows of every UNet evaluation that really happens inside."""
    rows: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    try:
        yield rows
    finally:
        handle.remove()


def network_flops(pipe: Any, call: Any) -> int:
    """FLOPs that UNet and ControlNets of `pipe` execute during `call()`."""
    total, counters, handles = [0], [], []

    def begin(module, args):
        counters.append(FlopCounterMode(display=False))
        counters[-1].__enter__()

    def end(module, args, output):
        counter = counters.pop()
        counter.__exit__(None, None, None)
        total[0] += counter.get_total_flops()

    for net in networks(pipe):
        handles += [net.register_forward_pre_hook(begin), net.register_forward_hook(end)]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return total[0]

"""Attention calls that a network makes inside: how they are caught, and computed by a kernel of the user's choice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.errors import Unsupported
from diffaccel.kernels.dense import choose, dense_attention
from diffaccel.models.call import Call
from diffaccel.models.compiled import is_compiled
from diffaccel.models.model_map import ModelMap

Stock = Callable[[], torch.Tensor]


class Caught(TorchFunctionMode):
    """Hands the attention calls inside to `attend(stock, (query, key, value), options)`; only this thread, only inside."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend, self.times = attend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.times += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        options = dict(zip(names, args, strict=False)) | kwargs
        parts = tuple(options.pop(name) for name in names[:3])
        return self.attend(functools.partial(func, *args, **kwargs), parts, options)


def check_kernel(name: str, model: ModelMap) -> None:
    """Raise `Unsupported` if this kernel is not installed, or the denoisers' attentions cannot be handed to it."""
    choose(name)
    for network, _ in model.denoisers:
        if any(is_compiled(module) for module in network.modules()):
            raise Unsupported(
                f"the attention kernel {name!r} cannot be put into compiled blocks; set it with diffusers' own "
                "set_attention_backend before compiling."
            )


def use_kernel(name: str, model: ModelMap, run: Run) -> None:
    """For this run, dense attentions of the denoisers are computed by the kernel of this name.

    Calls that it does not take (masks, large heads) stay with torch's own, and both are counted in the report. Text
    encoders and the autoencoder are left alone: their heads and masks are what most kernels fail on.
    """
    check_kernel(name, model)
    chosen = choose(name)

    def attend(stock: Stock, parts: tuple[torch.Tensor, ...], options: dict[str, Any]) -> torch.Tensor:
        mask, scale = options.get("attn_mask"), options.get("scale")
        plain = not (options.get("dropout_p") or options.get("is_causal") or options.get("enable_gqa"))
        taken = plain and chosen.takes(parts[0], mask)
        return dense_attention(*parts, kernel=name if taken else "sdpa", mask=mask, scale=scale) if plain else stock()

    def around(call: Call, proceed: Proceed) -> Any:
        with Caught(attend) as caught:
            output = proceed(call.tagged(("attention_kernel", name)))
        if call.complete and not caught.times:
            raise Unsupported(
                f"the attention kernel {name!r} found no attention to compute: this denoiser's processors do not call "
                "scaled_dot_product_attention; go back to diffusers' default attention backend."
            )
        return output

    run.around("denoiser", Layer.ATTENTION, around)

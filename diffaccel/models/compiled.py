"""Whether `torch.compile` stands around a module."""

from __future__ import annotations

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` stands around this module's call, in any of its forms.

    They are `module.compile()`, `torch.compile(module)` (a module of its own around it) and
    `module.forward = torch.compile(module.forward)`.
    """
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__name__ == "OptimizedModule"
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )

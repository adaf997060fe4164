"""Real calls of a pipeline's transformer, to be repeated on the bare network."""

from __future__ import annotations

from typing import Any

import torch
from tiny_transformers import run


class _Enough(Exception):
    pass


def recorded(pipe: Any, kind: str, count: int = 3, **options: Any) -> list[tuple[Any, Any]]:
    """Positional and keyword arguments of the first `count` calls of `pipe.transformer`."""
    calls: list[tuple[Any, Any]] = []

    def record(module, args, kwargs):
        calls.append((copied(args), copied(kwargs)))
        if len(calls) == count:
            raise _Enough

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        run(pipe, kind, **options)
    except _Enough:
        pass
    finally:
        handle.remove()
    return calls


def copied(value: Any) -> Any:
    """Other containers and tensors with the same contents: some networks empty the lists they are given."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(copied(item) for item in value) if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def repeated(network: Any, call: tuple[Any, Any]) -> torch.Tensor:
    """The prediction of `network` for a recorded call."""
    args, kwargs = copied(call)
    output = network(*args, **kwargs)[0]
    return torch.stack(list(output)) if isinstance(output, (list, tuple)) else output

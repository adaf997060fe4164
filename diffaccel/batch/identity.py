"""Which model made a picture: class, origin, scheduler, precision, and a sample of all weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

SAMPLE = 8  # values of each tensor


def identity(pipe: Any, recipe: dict[str, Any]) -> str:
    """A digest that changes with the pipeline's class, parts, scheduler, precision, weights, adapters or own recipe.

    Of each weight tensor a few values count, so that an exchanged model, an applied edit or an adapter is noticed in
    well under a second. Weights that are not in memory (sequential offload) count by their shape alone.
    """
    digest = hashlib.sha256()
    about = {
        "class": type(pipe).__name__,
        "scheduler": [type(pipe.scheduler).__name__, _plain(dict(pipe.scheduler.config))],
        "recipe": recipe,
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, part in sorted(pipe.components.items()):
        if hasattr(part, "named_parameters"):
            for piece in _weights(name, part):
                digest.update(piece)
    return digest.hexdigest()[:20]


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without the notes that only say where and by which version the configuration was saved."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _weights(name: str, part: Any) -> Iterator[bytes]:
    import torch

    samples = []
    for path, tensor in part.named_parameters():
        yield f"{name}.{path} {tuple(tensor.shape)} {tensor.dtype}".encode()
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float())
    if samples:
        yield torch.cat([sample.cpu() for sample in samples]).numpy().tobytes()

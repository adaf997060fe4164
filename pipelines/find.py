"""Which convention a pipeline follows: found by its class name or by the names of its base classes, then by its denoiser."""

from __future__ import annotations

from typing import Any

from diffaccel.errors import Unsupported
from diffaccel.pipelines import diffusion_transformers as transformers
from diffaccel.pipelines.conventions import Convention
from diffaccel.pipelines.stable_diffusion import CONVENTIONS, GENERIC_UNET


def find_convention(pipe: Any) -> Convention:
    """Convention of a pipeline.

    Raises:
        Unsupported: the family is refused, or nothing matches.
    """
    names = [cls.__name__ for cls in type(pipe).__mro__]
    known = (*CONVENTIONS, *transformers.CONVENTIONS)
    found = next((c for c in known if set(c.mixins) & set(names)), None)
    found = found or next((c for name in names for c in known if name in c.pipelines), None)
    if found is not None:
        return _accepted(found, type(pipe).__name__)
    if type(getattr(pipe, "unet", None)).__name__ in ("UNet2DConditionModel", "OptimizedModule"):
        return GENERIC_UNET
    raise Unsupported(
        f"{type(pipe).__name__} is not supported; supported are pipelines around a UNet2DConditionModel and the "
        f"diffusion transformers {', '.join(c.family for c in transformers.CONVENTIONS if not c.refusal)}."
    )


def _accepted(convention: Convention, name: str) -> Convention:
    if convention.refusal:
        raise Unsupported(f"{name} is not supported: {convention.refusal}")
    return convention

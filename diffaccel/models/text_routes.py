"""Where text enters a denoiser: the projections that read it, and which text encoder fills which columns of their input.

A route is one such place. "sequence" carries one row per token, "pooled" one vector per prompt. Every projection of a
route reads the same rows, so one map on these rows serves them all.
"""

from __future__ import annotations

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.facts import TextRoute
from diffaccel.models.known import KNOWN, family_of


def describe_text_routes(denoiser: nn.Module) -> tuple[TextRoute, ...]:
    """The routes of a denoiser, "sequence" first.

    Raises:
        Unsupported: no closed form applies to this class, with the reason.
    """
    kind, routes = type(denoiser).__name__, family_of(denoiser).routes
    if isinstance(routes, str):
        raise Unsupported(f"concepts cannot be erased from {kind} in closed form: {routes}.")
    if routes is None:
        known = ", ".join(name for name, family in KNOWN.items() if callable(family.routes))
        raise Unsupported(f"concept erasure does not know where text enters {kind}; it knows {known}.")
    return routes(denoiser)

"""The exceptions a user can meet. Each message is one sentence that says what to change."""

from __future__ import annotations


class DiffaccelError(Exception):
    """Base of the errors that diffaccel raises on purpose. Settings out of range raise pydantic's ValidationError, a ValueError."""


class Unsupported(DiffaccelError):
    """A pipeline, method or call that cannot work, raised by `wrap` where that is known before the call, else by the call.

    The message gives the reason.
    """


class RecipeError(DiffaccelError, ValueError):
    """A recipe, recipe file or combination of methods that is wrong; the message names the key, the value or the pair."""

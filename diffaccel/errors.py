"""The exceptions a user can meet. Each message is one sentence that says what to change."""

from __future__ import annotations


class DiffaccelError(Exception):
    """Base of all errors raised on purpose by diffaccel."""


class Unsupported(DiffaccelError):
    """A method, pipeline or call that cannot work; the message gives the reason."""


class RecipeError(DiffaccelError, ValueError):
    """A recipe or a method setting that is wrong; the message names the offending key or value."""

"""Values of further columns against the annotations of a pipeline's call: refused before the first picture, not by each row."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from typing import Any

from diffaccel.batch.settings import BatchError

_FILLS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
_COLLECTED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def possible_arguments(pipe: Any) -> set[str]:
    """Names that a call of the pipeline takes. What it collects in `**kwargs` it mostly ignores, so that is not counted."""
    return arguments_of(type(pipe))


def arguments_of(pipeline: Any) -> set[str]:
    """`possible_arguments` of a pipeline class."""
    parameters = list(inspect.signature(pipeline.__call__).parameters.values())[1:]  # without self
    return {parameter.name for parameter in parameters if parameter.kind not in _COLLECTED}


def converted(pipe: Any, name: str, value: Any) -> Any:
    """The value as the argument's annotation wants it: lists may become tuples, 2.0 (a table's way to write 2) an int.

    Raises:
        BatchError: the annotation takes nothing of this kind, or the installed libraries fail with the argument.
    """
    pipeline: Any = type(pipe)
    hint = _hints(pipeline).get(name, Any)
    for kind in _kinds(hint):
        found = _as(kind, value)
        if found is not _NO:
            if name == "clip_skip" and found is not None:
                _refuse_clip_skip(pipe)
            return found
    words = list(dict.fromkeys(_FILLS[base] for kind in _kinds(hint) if (base := _base(kind)) in _FILLS))
    wanted = f"is {' or '.join(words)}" if words else "cannot be given in a list of rows"
    raise BatchError(f"{name} of {type(pipe).__name__} {wanted}, not {value!r}.")


def _refuse_clip_skip(pipe: Any) -> None:
    """transformers 5 dissolved the part of CLIP that Stable Diffusion pipelines up to diffusers 0.42 ask for its last norm."""
    names = getattr(getattr(type(pipe), "encode_prompt", None), "__code__", None)
    asks = names is not None and {"text_model", "final_layer_norm"} <= set(names.co_names)
    if asks and not hasattr(pipe.text_encoder, "text_model"):
        import diffusers
        import transformers

        raise BatchError(
            f"clip_skip of {type(pipe).__name__} does not work with diffusers {diffusers.__version__} and transformers "
            f"{transformers.__version__} together; leave it out, or install transformers<5."
        )


_NO = object()


@functools.cache
def _hints(pipeline: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(pipeline.__call__)
    except (NameError, TypeError, AttributeError):  # annotations that only exist for a type checker say nothing here
        return {}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, exact ones first: 2 is an int before it is a float."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(sorted(typing.get_args(hint), key=lambda kind: kind is float)) if union else (hint,)


def _base(kind: Any) -> Any:
    """list for every kind of sequence, else the class behind a generic one."""
    found = typing.get_origin(kind) or kind
    sequence = isinstance(found, type) and issubclass(found, collections.abc.Sequence) and found is not str
    return list if sequence else found


def _as(kind: Any, value: Any) -> Any:
    """The value as one of this kind; `_NO` if it is none."""
    base = _base(kind)
    unknown = base in (object, Any) or not isinstance(base, type)  # also type variables and literals
    if value is None or unknown:
        return value
    if base is list:
        return _as_sequence(kind, value)
    if base is int and isinstance(value, float) and value.is_integer():
        return int(value)
    fitting = (int, float) if base is float else base
    return value if isinstance(value, fitting) and (base is bool or not isinstance(value, bool)) else _NO


def _as_sequence(kind: Any, value: Any) -> Any:
    if not isinstance(value, list):
        return _NO
    inner = next(iter(typing.get_args(kind)), Any)
    items = [next((found for each in _kinds(inner) if (found := _as(each, item)) is not _NO), _NO) for item in value]
    if any(item is _NO for item in items):
        return _NO
    return tuple(items) if (typing.get_origin(kind) or kind) is tuple else items

"""One call of a network: its arguments by name, what is known about its rows, and how rows are cut out of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffaccel.errors import Unsupported


@dataclass(frozen=True)
class Call:
    """One call of a denoiser or ControlNet: its arguments by name and what is known about its rows.

    Attributes:
        arguments: the call's arguments by name.
        batched: names of the arguments whose tensors have one row per batch row, "a.b" for entry "b" of a dictionary "a".
        shared: names, of the same form, of dictionary entries that are never cut; of others it is not known.
        branches: guidance branches stacked along the rows, e.g. ("uncond", "cond"); ("cond",) without guidance; () if
            the layout is unknown.
        lane: identifies the stream of calls this one belongs to over the run: the network, and how many calls of it
            came before in this evaluation (0 where guidance branches are stacked; the branch where they are separate
            calls). Cached tensors are kept per lane.
        sample_name: the argument with the noisy latents.
        listed: names of the arguments that are lists with one entry per batch row.
        kind: calls of one kind cost the same for each row where no method acts: network, shapes of a row, text lengths.
        tags: what the methods decided; calls with equal tags and shapes cost the same.
        saved_flops: FLOPs a dense call would have needed on top, counted by the token methods.
        complete: False if parts of the network are skipped, so that the call says nothing about the dense cost.
        positional: names of the arguments that came by position, in order; the network gets them so again.
    """

    arguments: Mapping[str, Any]
    batched: frozenset[str]
    branches: tuple[str, ...] = ()
    lane: tuple[int, int] = (0, 0)
    tags: tuple[Any, ...] = ()
    saved_flops: int = 0
    complete: bool = True
    sample_name: str = "sample"
    listed: frozenset[str] = frozenset()
    kind: Hashable = None
    shared: frozenset[str] = frozenset()
    positional: tuple[str, ...] = ()

    @property
    def sample(self) -> torch.Tensor:
        """The noisy input: (rows, channels, h, w); (rows, tokens, channels) where latents are packed; 5-d for video."""
        sample: torch.Tensor = self.arguments[self.sample_name]
        return sample

    @property
    def rows(self) -> int:
        """Batch rows of this call."""
        return int(self.sample.shape[0])

    def tagged(self, *tags: Any, saved_flops: int = 0, complete: bool = True) -> Call:
        """The same call with more tags."""
        return replace(
            self,
            tags=self.tags + tags,
            saved_flops=self.saved_flops + saved_flops,
            complete=self.complete and complete,
        )

    def only(self, branch: str) -> Call:
        """The rows of one branch. Batched tensors with another number of rows (guess mode) pass through unchanged."""
        size = self.rows // len(self.branches)
        start = self.branches.index(branch) * size
        return replace(self.rows_of(range(start, start + size)), branches=(branch,))

    def rows_of(self, wanted: Sequence[int]) -> Call:
        """The call with only these batch rows; a contiguous range is cut without copying.

        A network that is called with tensors of which nobody knows whether they have one row per batch row is refused.
        """
        arguments = {
            name: _cut_list(value, self.rows, wanted) if name in self.listed else self._cut(name, value, wanted)
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=arguments)

    def _cut(self, name: str, value: Any, wanted: Sequence[int]) -> Any:
        if name in self.batched:
            return _cut_rows(value, rows=self.rows, wanted=wanted)
        if isinstance(value, Mapping):
            return {key: self._cut_entry(f"{name}.{key}", item, wanted) for key, item in value.items()}
        return value

    def _cut_entry(self, name: str, value: Any, wanted: Sequence[int]) -> Any:
        if name not in self.batched and name not in self.shared and _may_be_rows(value, self.rows):
            return _Doubtful(name, self.rows)
        return self._cut(name, value, wanted)

    def refuse_doubtful(self) -> None:
        """Raises `Unsupported` if rows were cut of a call with entries of which nobody knows whether they should be."""
        for argument in self.arguments.values():
            for entry in argument.values() if isinstance(argument, Mapping) else ():
                if isinstance(entry, _Doubtful):
                    entry.refuse()


@dataclass(frozen=True)
class _Doubtful:
    """Stands for a dictionary entry with as many rows as the call it was in, before rows of that were cut."""

    name: str
    rows: int

    def refuse(self) -> None:
        owner, _, key = self.name.rpartition(".")
        raise Unsupported(
            f"{owner}[{key!r}] has as many rows as the network got ({self.rows}), and it is not known whether they belong to "
            "its pictures; leave out the methods that compute some rows only (guidance, step reuse), or give it another "
            "first size (tensor[None])."
        )


def _may_be_rows(value: Any, rows: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and value.shape[0] == rows
    return isinstance(value, (list, tuple)) and any(_may_be_rows(item, rows) for item in value)


def _cut_rows(value: Any, *, rows: int, wanted: Sequence[int]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] != rows:
            return value
        return value[wanted.start : wanted.stop] if isinstance(wanted, range) else value[list(wanted)]
    if isinstance(value, dict):
        return {key: _cut_rows(item, rows=rows, wanted=wanted) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cut_rows(item, rows=rows, wanted=wanted) for item in value)
    return value


def _cut_list(value: Any, rows: int, wanted: Sequence[int]) -> Any:
    if isinstance(value, torch.Tensor):  # the latents, stacked by the run
        return _cut_rows(value, rows=rows, wanted=wanted)
    return [value[row] for row in wanted] if isinstance(value, (list, tuple)) and len(value) == rows else value


def map_output(output: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the prediction inside a denoiser output (tuple or diffusers output object)."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return type(output)(**{**output, "sample": change(output["sample"])})


def prediction(output: Any) -> torch.Tensor:
    """The prediction tensor inside a denoiser output."""
    tensor: torch.Tensor = output[0]
    return tensor


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def bind_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, however the pipeline passed them; those that a network takes by `**kwargs` too."""
    bound = dict(_signature(cls).bind(*args, **kwargs).arguments)
    for name, parameter in _signature(cls).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def positional_names(cls: type, count: int) -> tuple[str, ...]:
    """Names of the first `count` arguments of a network's forward."""
    return tuple(_signature(cls).parameters)[:count]


def describe_shapes(value: Any) -> Any:
    """A hashable description of all tensor shapes and dtypes in nested arguments."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return tuple((key, describe_shapes(item)) for key, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(item if isinstance(item, int) else describe_shapes(item) for item in value)
    return value is None

"""One pipeline call: its clock, its state, and the chain of methods around the denoiser.

A `Run` starts when the call starts and dies with it. Nothing about a call is kept on modules, classes or in globals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch

from diffaccel.engine.clock import Clock
from diffaccel.engine.flops import FlopLedger, PartMeter
from diffaccel.engine.places import Places
from diffaccel.models.call import Call, bind_arguments, describe_shapes, map_output, positional_names

Forward = Callable[..., Any]
Proceed = Callable[["Call"], Any]
Around = Callable[["Call", Proceed], Any]


class Layer(IntEnum):
    """Nesting order, outside to inside. A layer only saves work of the layers inside it."""

    SCHEDULE = 0
    GUIDANCE = 1
    STEP = 2
    SKIP = 3
    TOKENS = 4
    ATTENTION = 5


@dataclass
class Evaluation:
    """What one executed network call was, for the report; `flops` is None where they could not be counted."""

    network: str
    evaluation: int
    sigma: float
    rows: int
    stock_rows: int
    flops: int | None
    dense_flops_per_row: float | None
    tags: tuple[Any, ...]
    kind: Hashable = field(default=None, repr=False)


@dataclass
class RegionCounts:
    """How often each token was computed by region sampling.

    Attributes:
        counts: (images, h, w) int64 over the token grid.
        evaluations: evaluations of the network; no count is larger.
    """

    counts: torch.Tensor
    evaluations: int = 0

    @classmethod
    def empty(cls, images: int, grid: tuple[int, int]) -> RegionCounts:
        """No evaluation yet."""
        return cls(torch.zeros(images, *grid, dtype=torch.int64))

    def add(self, computed: torch.Tensor) -> None:
        """One evaluation: (images, tokens) bool; tokens behind those of the picture are left out."""
        _, height, width = self.counts.shape
        seen = computed[:, : height * width].reshape(-1, height, width)
        self.counts = self.counts.to(seen.device) + seen
        self.evaluations += 1


@dataclass
class Run:
    """All state of one pipeline call.

    Pipelines may run the scheduler more than once in a call. Then the methods are attached anew for every run of it, so
    that none starts with what another one left; what is counted adds up.

    Attributes:
        clock: the only step counter; methods read it and never count for themselves.
        row_order, calls, sample_name, listed, lengths, shared: the pipeline's convention (pipelines/conventions.py).
        arguments: the pipeline call's arguments by name, as the methods changed them.
        measured: timings kept by the wrapped pipeline over its runs; results never depend on anything else in here.
        images: pictures made by this call (latent rows); None until the pipeline prepared its latents.
        finite: per picture or frame that was decoded, whether all its values are finite.
        guided: False while the schedule of a guidance method drops the unconditional rows of this evaluation.
        guided_before: the same of the last evaluation; True if it had no unconditional rows to drop.
        has_guidance: False if it had none.
        latched: (images,) bool, images whose guidance has ended for the rest of the run; None if no method decides that.
        all_latched: True once all have, from when on the unconditional rows are dropped for good.
        plain_ratio: evaluations of the plain call over evaluations of this one (schedule methods change it).
        evaluations: every executed network call, in order.
        counters: per method name, what it did; printed in the report.
        regions: how often each token was computed; None without region sampling.
        notes: sentences for the report (things a user should know, fallbacks included).
        operators: per operator of diffaccel/kernels, how many calls took which path ("triton" or "torch").
        kept: what methods keep for the whole call, over the runs of the scheduler.
        attach_again: takes the methods off and attaches them anew.
        guides: whether the pipeline says that it guides; None if it does not say.
        places: which part of the latents each call sees.
        meters: by id of a network that something else cuts short, what sees how much of it ran.
    """

    clock: Clock
    ledger: FlopLedger
    row_order: tuple[str, ...]
    calls: str = "stacked"
    sample_name: str = "sample"
    listed: frozenset[str] = frozenset()
    lengths: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    measured: dict[Hashable, Any] = field(default_factory=dict)
    images: int | None = None
    finite: list[bool] = field(default_factory=list)
    guided: bool = True
    guided_before: bool = True
    has_guidance: bool = True
    latched: torch.Tensor | None = None
    all_latched: bool = False
    plain_ratio: float = 1.0
    evaluations: list[Evaluation] = field(default_factory=list)
    counters: dict[str, dict[str, Any]] = field(default_factory=dict)
    regions: RegionCounts | None = None
    notes: list[str] = field(default_factory=list)
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    kept: dict[Hashable, Any] = field(default_factory=dict)
    attach_again: Callable[[], None] = lambda: None
    guides: Callable[[], bool | None] = lambda: None
    places: Places = field(default_factory=Places)
    _earlier_steps: int = 0
    _earlier_complete: bool = True
    meters: dict[int, PartMeter] = field(default_factory=dict)
    _around: dict[str, list[tuple[Layer, Around]]] = field(default_factory=dict)
    _planners: list[tuple[Layer, Callable[[], None]]] = field(default_factory=list)
    _watchers: list[Callable[[Call], None]] = field(default_factory=list)
    _ordinals: dict[int, int] = field(default_factory=dict)
    _shares: dict[int, tuple[float, bool | None]] = field(default_factory=dict)
    _branches_seen: set[str] = field(default_factory=set)

    def around(self, network: str, layer: Layer, function: Around) -> None:
        """Put `function(call, proceed)` around every call of `network` ("denoiser" or "controlnet")."""
        self._around.setdefault(network, []).append((layer, function))

    def before_controlnets(self, function: Callable[[Call], None]) -> None:
        """Call `function(call)` with the inputs of all ControlNets before the first of several is called."""
        self._watchers.append(function)

    def before_evaluation(self, layer: Layer, function: Callable[[], None]) -> None:
        """Call `function()` when the first network of an evaluation is called, outer layers first."""
        self._planners.append((layer, function))

    def count(self, method: str, **amounts: int) -> None:
        """Add to a method's counters."""
        counter = self.counters.setdefault(method, {})
        for name, amount in amounts.items():
            counter[name] = counter.get(name, 0) + amount

    @property
    def steps(self) -> int:
        """Solver steps of all runs of the scheduler."""
        return self._earlier_steps + self.clock.step + 1

    @property
    def complete(self) -> bool:
        """Whether all of them went to their last evaluation."""
        return self._earlier_complete and self.clock.evaluation >= self.clock.total

    def restart(self) -> None:
        """The scheduler got new timesteps, or begins with the same ones again."""
        if self.clock.step >= 0:
            self._earlier_steps, self._earlier_complete = self.steps, self.complete
            self.attach_again()
        self.clock.restart()

    def forget(self) -> None:
        """Nothing is attached, and nothing decided."""
        self._around.clear()
        self._planners.clear()
        self._watchers.clear()
        self._ordinals.clear()
        self.guided, self.latched, self.all_latched = True, None, False
        self.guided_before, self.has_guidance, self._branches_seen = True, True, set()

    def note(self, sentence: str) -> None:
        """Say something in the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def release(self) -> None:
        """The call is over: let go of the methods, and with them of all stored tensors.

        Methods refer to the run and the run to them, so that without this their tensors would wait for the garbage
        collector, which does not know how large they are.
        """
        self.forget()
        self.kept.clear()
        self.places = Places()
        self.ledger, self.arguments, self.attach_again = FlopLedger(), {}, lambda: None

    def same_place(self, call: Call) -> bool:
        """Whether a call sees the same part of the latents as the last one of its lane; the report says if not."""
        same = self.places.same(call.lane)
        if not same and self.places.met(call.lane):
            self.note(
                "the network sees a part of the latents at a time, and these parts move or cannot be found again: what was "
                "stored for another one is not used."
            )
        return same

    def tile(self, call: Call) -> int:
        """Number of the part of the latents within an evaluation; 0 where calls see the latents whole."""
        return call.lane[1] if self.places.is_part(call.lane) else 0

    def skip(self, network: str, call: Call, *tags: Any) -> None:
        """Record a call that the pipeline made and that was answered without running the network."""
        self.evaluations.append(
            Evaluation(
                network,
                self.clock.evaluation,
                self.clock.recorded_sigma,
                0,
                call.rows,
                0,
                None,
                call.tags + tags,
                call.kind,
            )
        )

    def handle(
        self, network: str, module: Any, original: Forward, batched: frozenset[str], args: Any, kwargs: Any
    ) -> Any:
        """One network call from the pipeline, through all methods, to the original forward."""
        arguments = bind_arguments(type(module), args, kwargs)
        if self.row_order == ("cond",):  # these pipelines go through their pictures in batches of their own
            self.images = len(arguments[self.sample_name])
        self._enter(arguments.get("timestep"))
        ordinal = self._ordinals.get(id(module), 0)
        if ordinal == 0:
            self._follow_batch(id(module), len(arguments[self.sample_name]))
        self._ordinals[id(module)] = ordinal + 1
        if self.sample_name in self.listed:
            arguments[self.sample_name] = torch.stack(list(arguments[self.sample_name]))
        call = Call(
            arguments,
            batched,
            self._branches(network, arguments[self.sample_name].shape[0], ordinal),
            (id(module), ordinal),
            sample_name=self.sample_name,
            listed=self.listed,
            shared=self.shared,
            positional=positional_names(type(module), len(args)),
        )
        self._branches_seen.update(call.branches)
        self.places.see(call.lane, call.sample)
        call = replace(call, kind=self._kind(network, call))
        execute = functools.partial(self._execute, network, original, call.rows)
        for _, function in sorted(self._around.get(network, []), key=lambda item: item[0], reverse=True):
            execute = functools.partial(_through, function, execute)
        output = execute(call)
        return map_output(output, _unstack) if self.sample_name in self.listed else output

    def announce(self, group: Any, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """A call of several ControlNets one after the other."""
        arguments = bind_arguments(type(group), args, kwargs)
        self._enter(arguments.get("timestep"))
        call = Call(arguments, frozenset(), lane=(id(group), 0), sample_name=self.sample_name)
        for function in self._watchers:
            function(call)
        return original(*args, **kwargs)

    def _enter(self, timestep: Any) -> None:
        time = None if timestep is None else float(_first(timestep))
        if self.clock.starts_over(time):
            self.restart()
        if self.clock.enter(time):
            self._begin_evaluation()

    def _follow_batch(self, module: int, rows: int) -> None:
        """A callback may leave pictures out. How many stay follows from the rows, as long as guidance is what it was."""
        if self.images is None:
            return
        share, guides = self._shares.get(module, (rows / self.images, self.guides()))
        images = rows / share
        if guides is not None and guides == self.guides() and images != self.images and images.is_integer():
            self.note(
                f"the batch changed from {self.images} to {images:.0f} pictures within the run: the methods start anew."
            )
            self.images = int(images)
            self.attach_again()
            self._begin_evaluation()
        self._shares[module] = (rows / self.images, self.guides())

    def _begin_evaluation(self) -> None:
        self._ordinals.clear()
        self.has_guidance = self._branches_seen != {"cond"}
        self.guided_before = self.guided or not self.has_guidance
        self.guided, self._branches_seen = True, set()
        for _, function in sorted(self._planners, key=lambda item: item[0]):
            function()

    def _branches(self, network: str, rows: int, ordinal: int) -> tuple[str, ...]:
        if self.row_order == ("cond",):
            return ("cond",)
        if self.images is None:
            return ()
        if self.calls == "separate":
            separate = {0: ("cond",), 1: ("uncond",)} if network == "denoiser" else {0: ("cond",)}
            return separate.get(ordinal, ()) if rows == self.images else ()
        if rows == self.images:
            return ("cond",)
        return self.row_order if rows == len(self.row_order) * self.images else ()

    def _kind(self, network: str, call: Call) -> Hashable:
        return network, call.lane[0], describe_shapes(call.rows_of(range(1)).arguments), self._lengths(call)

    def _lengths(self, call: Call) -> tuple[int | None, ...]:
        return tuple(_longest(call.arguments.get(name)) for name in sorted(self.lengths))

    def _execute(self, network: str, original: Forward, stock_rows: int, call: Call) -> Any:
        call.refuse_doubtful()
        key = (network, call.tags, describe_shapes(call.arguments), self._lengths(call))
        output, flops = self._count(call.lane[0], key, lambda: self._original(original, call))
        dense = (flops + call.saved_flops) / call.rows if call.complete and flops is not None else None
        clock = self.clock
        self.evaluations.append(
            Evaluation(
                network,
                clock.evaluation,
                clock.recorded_sigma,
                call.rows,
                stock_rows,
                flops,
                dense,
                call.tags,
                call.kind,
            )
        )
        return output

    def _count(self, network: int, key: Hashable, work: Callable[[], Any]) -> tuple[Any, int | None]:
        meter = self.meters.get(network)
        output, flops = self.ledger.count(key, work) if meter is None else meter.count(self.ledger, key, work)
        if flops is None:
            self.note(f"FLOPs are not counted: counting does not work inside this network ({self.ledger.failure}).")
        return output, flops

    def _original(self, original: Forward, call: Call) -> Any:
        arguments = {name: _fresh(value) for name, value in call.arguments.items()}
        if self.sample_name not in self.listed:
            return _call(original, call.positional, arguments)
        arguments = {**arguments, self.sample_name: list(call.sample.unbind())}
        return map_output(_call(original, call.positional, arguments), _stack)


def _call(original: Forward, positional: Sequence[str], arguments: dict[str, Any]) -> Any:
    # what another add-on or the user put around `forward` may read some arguments by position and some by name
    return original(*[arguments.pop(name) for name in positional], **arguments)


def _fresh(value: Any) -> Any:
    """Another list with the same contents: some networks empty the lists they are given, and a call may run twice."""
    return list(value) if type(value) is list else value


def _longest(mask: Any) -> int | None:
    """Ones in the fullest row of a (rows, tokens) mask."""
    return int(mask.sum(dim=1).max()) if isinstance(mask, torch.Tensor) else None


def _stack(rows: Any) -> torch.Tensor:
    return torch.stack(list(rows))


def _unstack(rows: torch.Tensor) -> Any:
    return list(rows.unbind())


def _through(function: Around, inner: Proceed, call: Call) -> Any:
    return function(call, inner)


def _first(timestep: Any) -> Any:
    return timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep

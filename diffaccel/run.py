"""One pipeline call: its clock, its state, and the chain of methods around the denoiser.

A `Run` starts when the call starts and dies with it. Nothing about a call is kept on modules, classes or in globals.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch

from diffaccel.errors import Unsupported
from diffaccel.flops import FlopLedger, PartMeter
from diffaccel.noise import edm_sigma
from diffaccel.places import Places

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


@dataclass
class Clock:
    """Where the run is. Counts `scheduler.step` calls; never looks a timestep up to find the step.

    Attributes:
        planned: how many timesteps the pipeline says it will visit; it may stop before the end of the scheduler's list.
        scheduler_time: whether networks get their timestep in the scheduler's units.
        lowest: timesteps below this one are in the scheduler's list and will not be visited.
        evaluation: scheduler.step calls finished so far.
        step: solver steps begun so far minus one; two-stage solvers (Heun, KDPM2) have two evaluations per step.
        total: evaluations this run will have; known from the first evaluation on.
        recorded_sigma: like `sigma`, for reports: NaN where that is not known.
    """

    scheduler: Any
    planned: Callable[[], int | None] = lambda: None
    scheduler_time: bool = True
    lowest: float = -math.inf
    evaluation: int = 0
    step: int = -1
    total: int = 0
    timestep: float | None = None
    recorded_sigma: float = float("nan")
    _step_sigma: float = float("nan")
    _unknown: Unsupported | None = None
    _entered: int = -1

    def restart(self) -> None:
        """A run of the scheduler begins."""
        self.evaluation, self.step, self.total, self._entered, self.timestep = 0, -1, 0, -1, None

    def starts_over(self, timestep: float | None) -> bool:
        """Whether a call at `timestep` is the first of another run through the same timesteps."""
        return 0 < self.total <= self.evaluation and edm_sigma(self.scheduler, *self._place(timestep)) > self.sigma

    def enter(self, timestep: float | None) -> bool:
        """A network is about to be called with `timestep`. Returns True at the first call of an evaluation."""
        if self._entered == self.evaluation:
            return False
        self._entered = self.evaluation
        timestep, index = self._place(timestep)
        self.total = self.total or self.evaluation + self._remaining(timestep)
        self._read_noise(timestep, index)
        if bool(getattr(self.scheduler, "state_in_first_order", True)) or self.step < 0:
            self.step += 1
            self._step_sigma = self.recorded_sigma
        return True

    def _read_noise(self, timestep: float, index: int | None) -> None:
        try:
            self.recorded_sigma, self._unknown = edm_sigma(self.scheduler, timestep, index), None
        except Unsupported as error:  # raised again for methods that ask; no method asks without a recipe
            self.recorded_sigma, self._unknown = float("nan"), error

    @property
    def sigma(self) -> float:
        """EDM sigma of the current evaluation.

        Raises:
            Unsupported: the scheduler keeps no noise levels that can be read.
        """
        if self._unknown is not None:
            raise self._unknown
        return self.recorded_sigma

    @property
    def step_sigma(self) -> float:
        """EDM sigma at the start of the current solver step; decisions that must not change inside a step use it.

        Raises:
            Unsupported: the scheduler keeps no noise levels that can be read.
        """
        if self._unknown is not None:
            raise self._unknown
        return self._step_sigma

    def advance(self) -> None:
        """`scheduler.step` has finished."""
        self.evaluation += 1
        self.timestep = None

    @property
    def fraction(self) -> float:
        """Share of the run's evaluations that are done, in [0, 1)."""
        return self.evaluation / self.total

    def _place(self, timestep: float | None) -> tuple[float, int | None]:
        """The scheduler's timestep of this evaluation and its index, whatever the network gets."""
        if self.timestep is not None:
            timestep = self.timestep
        elif not self.scheduler_time or timestep is None:
            timestep = self._listed_timestep()
        return timestep, self._index(timestep)

    def _listed_timestep(self) -> float:
        """The scheduler's timestep of this evaluation, for networks that get it in other units or not at all."""
        index = next((i for i in self._pointers() if i is not None), 0)
        if getattr(self.scheduler, "step_index", None) is None:  # it keeps no pointer, or has not started
            index += self.evaluation
        return float(self.scheduler.timesteps[index])

    def _pointers(self) -> Iterator[int | None]:
        for name in ("step_index", "begin_index"):  # step_index is None before the first step of some schedulers
            index = getattr(self.scheduler, name, None)
            yield None if index is None else int(index)

    def _index(self, timestep: float) -> int | None:
        index = next((i for i in self._pointers() if i is not None), None)
        return self._position(timestep) if index is None else index

    def _remaining(self, timestep: float) -> int:
        ahead = torch.as_tensor(self.scheduler.timesteps)[self._position(timestep) :]
        listed = int((ahead >= self.lowest).sum())
        planned = self.planned()
        return listed if planned is None else min(listed, planned)

    def _position(self, timestep: float) -> int:
        """First position of the run's first timestep: img2img pipelines start inside the list."""
        timesteps = torch.as_tensor(self.scheduler.timesteps)
        return int((timesteps - timestep).abs().argmin())


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

"""When a cache recomputes: the schedule that caches share, and everything that forces a full evaluation.

The rules are those of the skip cache: full evaluations by age, first and last ones full, a noise window, no caching of
runs with few evaluations; a full one when guidance rows, conditions or adapters change.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, field_validator

from diffaccel.engine.conditions import _VARYING, AdapterProbe, Conditions
from diffaccel.engine.method import Method
from diffaccel.engine.noise import is_flow
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.models.call import Call, describe_shapes
from diffaccel.models.model_map import ModelMap

Coordinate = Literal["log_sigma", "flow_time"]

# Inputs that change on every evaluation by nature; of the others any change forces a full one.
_TIME = frozenset({"timestep", "t"})
_RESIDUALS = frozenset(
    {"controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states"}
)


class CacheSettings(Method):
    """Settings of caches that follow a schedule.

    Attributes:
        interval: a full evaluation at least every `interval` evaluations. Off: 1.
        schedule: "uniform"; "early" or "late" for the same number of full evaluations, denser at that end; or the
            evaluation indices that are full.
        window: (high, low) EDM sigma; cached evaluations only while low <= sigma <= high.
        full_first, full_last: evaluations at the start and end of the run that are always full.
        min_evaluations: shorter runs are not cached (few-step models lose their picture); a warning and the report say so.
    """

    layer: ClassVar[Layer] = Layer.SKIP

    interval: int = Field(default=3, ge=1)
    schedule: Literal["uniform", "early", "late"] | tuple[int, ...] = "uniform"
    window: tuple[float, float] | None = None
    full_first: int = Field(default=1, ge=1)
    full_last: int = Field(default=1, ge=0)
    min_evaluations: int = Field(default=9, ge=1)

    @field_validator("window")
    @classmethod
    def _ordered(cls, window: tuple[float, float] | None) -> tuple[float, float] | None:
        if window is not None and not window[0] > window[1] >= 0:
            raise ValueError("window is (high, low) in EDM sigma with high > low >= 0")
        return window

    @field_validator("schedule")
    @classmethod
    def _counted(cls, schedule: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(schedule, tuple) and any(index < 0 for index in schedule):
            raise ValueError("evaluation indices start at 0")
        return schedule

    @property
    def is_off(self) -> bool:
        return self.interval == 1 and not isinstance(self.schedule, tuple)


def full_evaluations(total: int, interval: int, schedule: str | tuple[int, ...]) -> frozenset[int]:
    """Indices of the full evaluations of a run of `total`, before anything is forced.

    "early" and "late" place ceil(total / interval) indices at total * x^1.5 or its mirror image, x evenly spaced.
    """
    if isinstance(schedule, tuple):
        return frozenset(schedule)
    count = math.ceil(total / interval)
    if schedule == "uniform":
        return frozenset(range(0, total, interval))
    early = [round(total * (k / count) ** 1.5) for k in range(count)]
    return frozenset(early if schedule == "early" else [0] + [total - 1 - index for index in early])


class Store(Protocol):
    """What a cache keeps per lane, and the switch between storing and using it."""

    def holds(self, lane: Hashable) -> bool: ...

    def keep_rows(self, lane: Hashable, start: int, stop: int) -> None: ...

    def active(
        self, lane: Hashable, *, cached: bool, position: float | None = None, fresh: bool = True
    ) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Seen:
    """Conditions of a lane's last full evaluation, and of its conditional rows alone if there are others."""

    conditions: Conditions
    conditional: Conditions | None = None
    conditional_rows: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, call: Call) -> Seen:
        if len(call.branches) < 2 or "cond" not in call.branches:
            return cls(conditions_of(call))
        size = call.rows // len(call.branches)
        start = call.branches.index("cond") * size
        return cls(conditions_of(call), conditions_of(call.only("cond")), (start, start + size))

    def same(self, call: Call) -> bool:
        """Whether `call` has the conditions of the last full one."""
        return self.conditions.same(settled(call))


def settled(call: Call) -> Call:
    """The call with only the shapes of what changes on every evaluation: latents and residuals; time is left out."""
    varying = {call.sample_name} | _VARYING | _RESIDUALS
    steady = {name: value for name, value in call.arguments.items() if name not in varying | _TIME}
    shapes = describe_shapes({name: value for name, value in call.arguments.items() if name in varying - _TIME})
    return replace(call, arguments={**steady, "shapes": shapes})


def conditions_of(call: Call) -> Conditions:
    """Everything a cached value depends on besides latents, time and residuals."""
    return Conditions.of(settled(call))


def noise_position(sigma: float, coordinate: Coordinate) -> float | None:
    """Where an evaluation lies on the axis along which values are extrapolated; None where that is infinite.

    "log_sigma": log of the EDM sigma. "flow_time": s = sigma / (1 + sigma), finite at every noise level.
    """
    if coordinate == "flow_time":
        return sigma / (1 + sigma) if math.isfinite(sigma) else 1.0
    return math.log(sigma) if 0 < sigma < math.inf else None


def default_coordinate(model: ModelMap) -> Coordinate:
    """Flow models move evenly in s, the others in log sigma."""
    return "flow_time" if is_flow(model.pipe.scheduler) else "log_sigma"


class CachePlan:
    """The decision for every evaluation of one run, and which calls force a full one.

    `tag` marks cached calls; calls with equal tags and shapes do the same work.
    """

    def __init__(
        self, settings: CacheSettings, store: Store, model: ModelMap, run: Run, tag: Any, coordinate: Coordinate
    ) -> None:
        self.settings, self.store, self.run, self.tag, self.coordinate = settings, store, run, tag, coordinate
        self.probes = [AdapterProbe(network) for network, _ in model.denoisers]
        self.seen: dict[Hashable, Seen] = {}
        self.adapters: Any = None
        self.age = 0
        self.cached = False

    def attach(self) -> None:
        """Take part in the run's evaluations."""
        self.run.before_evaluation(Layer.SKIP, self.decide)
        self.run.around("denoiser", Layer.SKIP, self.around)

    def decide(self) -> None:
        """Decide the evaluation from the schedule and from what changed since the last full one."""
        clock = self.run.clock
        scheduled = self._scheduled(clock.evaluation, clock.total, clock.sigma) and clock.evaluation > 0
        adapters = [probe.state() for probe in self.probes]
        forced = "guidance" if self._guidance_changed() else "adapters" if adapters != self.adapters else None
        if adapters != self.adapters:
            self.seen.clear()  # also what was stored before is of no use: it came from other weights
        self.cached = scheduled and forced is None
        if scheduled and forced:
            self.run.count(self.settings.name, **{f"forced by {forced}": 1})
        self.adapters = adapters
        self.age = self.age + 1 if self.cached else 0

    def _guidance_changed(self) -> bool:
        """Separate calls of the conditional branch do not notice when the other branch is dropped."""
        now, before = self.run.guided, self.run.guided_before
        return now and not before if self.run.calls == "separate" else now != before

    def _scheduled(self, evaluation: int, total: int, sigma: float) -> bool:
        settings = self.settings
        if total < settings.min_evaluations:
            warn_few(self.run, settings.name, total, settings.min_evaluations)
            return False
        if evaluation < settings.full_first or evaluation >= total - settings.full_last:
            return False
        if settings.window and not settings.window[1] <= sigma <= settings.window[0]:
            return False
        if settings.schedule == "uniform":  # by age, so that a forced full evaluation starts a new interval
            return self.age + 1 < settings.interval
        return evaluation not in full_evaluations(total, settings.interval, settings.schedule)

    def around(self, call: Call, proceed: Proceed) -> Any:
        """Run the network whole or with what is stored."""
        self._follow_latch(call)
        changed = not self.knows(call) or not self.store.holds(call.lane)
        if changed and self.cached:
            self._force_full(call)
        self.run.count(self.settings.name, full=int(not self.cached), cached=int(self.cached))
        if not self.cached:
            self.seen[call.lane] = Seen.of(call)
        position = noise_position(self.run.clock.sigma, self.coordinate)
        with self.store.active(call.lane, cached=self.cached, position=position, fresh=changed):
            return proceed(call.tagged(self.tag, complete=False) if self.cached else call)

    def knows(self, call: Call) -> bool:
        """Whether the last full call of this lane had the same conditions, at the same place."""
        known = self.seen.get(call.lane)
        return known is not None and known.same(call) and self.run.same_place(call)

    def _force_full(self, call: Call) -> None:
        """The rest of this evaluation is full."""
        self.cached = False
        if call.lane[1] == 0:  # else an earlier call of this evaluation was cached, and what it used goes on ageing
            self.age = 0
        self.run.count(self.settings.name, **{"forced by inputs": 1})

    def _follow_latch(self, call: Call) -> None:
        """Adaptive guidance dropped the unconditional rows for good: keep the conditional rows of what is stored.

        A full evaluation here would come at another time next to slower batch mates, and change the picture with them.
        """
        seen = self.seen.get(call.lane)
        if self.run.all_latched and call.branches == ("cond",) and seen is not None and seen.conditional is not None:
            self.store.keep_rows(call.lane, *seen.conditional_rows)
            self.seen[call.lane] = Seen(seen.conditional)


def warn_few(run: Run, name: str, total: int, least: int) -> None:
    """Say once, as a warning and in the report, that a run is too short to leave anything out."""
    sentence = f"{name}: {total} evaluations are too few (min_evaluations is {least}); all of this run is computed."
    if sentence not in run.notes:
        warnings.warn(sentence, stacklevel=2)
    run.note(sentence)


def note_whole_controlnets(model: ModelMap, run: Run, name: str) -> None:
    """Say in the report that networks beside the denoiser are not cut short."""
    for net, _ in model.controlnets:
        run.note(f"{name}: {type(net).__name__} always runs whole.")

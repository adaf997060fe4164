"""Skip cache: deep UNet features change slowly, so most steps recompute only the outer skip branches.

Ma et al., "DeepCache" (arXiv 2312.00858). A full step stores one tensor F, the hidden state entering decoder layer
`depth` before its concatenation with skip `depth`; a cached step runs the encoder up to that skip, sets h = F and runs
the decoder layers depth, ..., 0. With order 1 or 2, F is extrapolated along log sigma from the last full steps (the idea
of TaylorSeer, arXiv 2503.06923, on this one tensor). The UNet's own forward always runs: deeper blocks are bypassed, so
time embeddings, IP-Adapter, ControlNet residuals, LoRA scales and offload hooks need no special care.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from diffaccel.errors import Unsupported
from diffaccel.method import Method, register
from diffaccel.methods.bypass import Bypass, bypass_controlnet, bypass_unet
from diffaccel.methods.conditions import AdapterProbe, Conditions
from diffaccel.model_map import ModelMap
from diffaccel.run import Call, Layer, Proceed, Run
from diffaccel.seams import Seams


@register
class SkipCache(Method):
    """Recompute the deep part of the UNet only on full evaluations.

    Attributes:
        interval: a full evaluation at least every `interval` evaluations. Off: 1.
        depth: skip branch kept fresh, 0 (outermost, cheapest) to the number of skips - 1; None takes the default of the
            model family.
        schedule: "uniform"; "early" or "late" for the same number of full evaluations, denser at that end; or the
            evaluation indices that are full.
        window: (high, low) EDM sigma; cached evaluations only while low <= sigma <= high.
        order: 0 reuses F; 1 and 2 extrapolate it along log sigma from the last two or three full evaluations, which are
            kept. On the bundled model 1 beats 0 clearly at every interval.
        full_first, full_last: evaluations at the start and end of the run that are always full.
        min_evaluations: shorter runs are not cached (few-step models lose their picture); a warning and the report say so.
    An evaluation is one denoiser call of the schedule: two-stage solvers have two per step. A full one is forced when
    guidance rows, prompt embeddings, ControlNet inputs, adapters, LoRA scales, FreeU or the picture size change; when
    adaptive guidance ends for good, the conditional rows of F stay in use instead.
    """

    name: ClassVar[str] = "skip_cache"
    layer: ClassVar[Layer] = Layer.SKIP

    interval: int = Field(default=3, ge=1)
    depth: int | None = Field(default=None, ge=0)
    schedule: Literal["uniform", "early", "late"] | tuple[int, ...] = "uniform"
    window: tuple[float, float] | None = None
    order: Literal[0, 1, 2] = 1
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

    def check(self, model: ModelMap) -> None:
        depth = self.depth_for(model)
        depths = model.unet(self.name).depths
        if depth >= depths:
            raise Unsupported(f"skip_cache: depth {depth} does not exist; this UNet has depths 0 to {depths - 1}.")

    def depth_for(self, model: ModelMap) -> int:
        """The depth used on this model."""
        deepest = model.unet(self.name).depths - 1
        return min(model.convention.default_depth, deepest) if self.depth is None else self.depth

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        depth = self.depth_for(model)
        cache = _Cache(self, depth, model, run)
        run.before_evaluation(Layer.SKIP, cache.plan)
        run.around("denoiser", Layer.SKIP, cache.around_denoiser)
        bypass_unet(model.unet(self.name), depth, cache.bypass, seams)
        for net, layout in model.controlnets:
            if layout is None:
                run.note(f"skip_cache: {type(net).__name__} always runs whole.")
            else:
                bypass_controlnet(net, layout, depth, cache.bypass, seams)
        run.around("controlnet", Layer.SKIP, cache.around_controlnet)


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


@dataclass(frozen=True)
class _Seen:
    """Conditions of a lane's last full evaluation, and of its conditional rows alone if there are others."""

    conditions: Conditions
    conditional: Conditions | None = None
    conditional_rows: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, call: Call) -> _Seen:
        if len(call.branches) < 2 or "cond" not in call.branches:
            return cls(Conditions.of(call))
        size = call.rows // len(call.branches)
        start = call.branches.index("cond") * size
        return cls(Conditions.of(call), Conditions.of(call.only("cond")), (start, start + size))


class _Cache:
    """What one run stores, and the decision for the current evaluation."""

    def __init__(self, config: SkipCache, depth: int, model: ModelMap, run: Run) -> None:
        self.config, self.depth, self.model, self.run = config, depth, model, run
        self.bypass = Bypass(config.order)
        self.seen: dict[Any, _Seen] = {}
        self.probe = AdapterProbe(model.denoiser)
        self.adapters: Any = None
        self.guided = True
        self.age = 0
        self.cached = False
        self.used_by_controlnet = False

    def plan(self) -> None:
        """Decide the evaluation from the schedule and from what changed since the last full one."""
        clock = self.run.clock
        scheduled = self._scheduled(clock.evaluation, clock.total, clock.sigma)
        adapters = self.probe.state()
        forced = "guidance" if self.run.guided != self.guided else "adapters" if adapters != self.adapters else None
        self.cached = scheduled and forced is None and clock.evaluation > 0
        if scheduled and forced and clock.evaluation > 0:
            self.run.count(SkipCache.name, **{f"forced by {forced}": 1})
        self.guided, self.adapters, self.used_by_controlnet = self.run.guided, adapters, False
        self.age = self.age + 1 if self.cached else 0

    def _scheduled(self, evaluation: int, total: int, sigma: float) -> bool:
        config = self.config
        if total < config.min_evaluations:
            self._warn_few(total)
            return False
        if evaluation < config.full_first or evaluation >= total - config.full_last:
            return False
        if config.window and not config.window[1] <= sigma <= config.window[0]:
            return False
        if config.schedule == "uniform":  # by age, so that a forced full evaluation starts a new interval
            return self.age + 1 < config.interval
        return evaluation not in full_evaluations(total, config.interval, config.schedule)

    def _warn_few(self, total: int) -> None:
        sentence = (
            f"skip_cache: {total} evaluations are too few to cache (min_evaluations is {self.config.min_evaluations}); "
            "this run is not cached."
        )
        if sentence not in self.run.notes:
            warnings.warn(sentence, stacklevel=2)
        self.run.note(sentence)

    def around_denoiser(self, call: Call, proceed: Proceed) -> Any:
        """Run the UNet whole or bypassed."""
        self._follow_latch(call)
        changed = self._changed(call) or not self.bypass.holds(call.lane)
        if changed and self.cached:
            self._force_full()
        self.run.count(SkipCache.name, full=int(not self.cached), cached=int(self.cached))
        self._remember(call)
        position = math.log(self.run.clock.sigma) if 0 < self.run.clock.sigma < math.inf else None
        with self.bypass.active(call.lane, cached=self.cached, position=position, fresh=changed):
            return proceed(call.tagged(("skip", self.depth), complete=False) if self.cached else call)

    def around_controlnet(self, call: Call, proceed: Proceed) -> Any:
        """Stop a ControlNet after the residuals that a cached UNet evaluation still uses."""
        self._follow_latch(call)
        if self._changed(call) and self.cached:
            self._force_full()
        self._remember(call)
        self.used_by_controlnet = self.cached
        self.run.count(SkipCache.name, **{"controlnet early exits": int(self.cached)})
        with self.bypass.active(call.lane, cached=self.cached):
            return proceed(call.tagged(("skip", self.depth), complete=False) if self.cached else call)

    def _force_full(self) -> None:
        if self.used_by_controlnet:
            raise Unsupported(
                "skip_cache: the UNet's inputs changed within a step in which its ControlNet was cut short; "
                "change prompts and adapters between steps."
            )
        self.cached, self.age = False, 0
        self.run.count(SkipCache.name, **{"forced by inputs": 1})

    def _follow_latch(self, call: Call) -> None:
        """Adaptive guidance dropped the unconditional rows for good: keep the conditional rows of what is stored.

        A full evaluation here would come at another time next to slower batch mates, and change the picture with them.
        """
        seen = self.seen.get(call.lane)
        if self.run.all_latched and call.branches == ("cond",) and seen is not None and seen.conditional is not None:
            self.bypass.keep_rows(call.lane, *seen.conditional_rows)
            self.seen[call.lane] = _Seen(seen.conditional)

    def _changed(self, call: Call) -> bool:
        return call.lane not in self.seen or not self.seen[call.lane].conditions.same(call)

    def _remember(self, call: Call) -> None:
        if not self.cached:
            self.seen[call.lane] = _Seen.of(call)

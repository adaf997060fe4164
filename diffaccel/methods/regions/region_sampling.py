"""Region sampling: between dense steps, only a part of the image tokens goes through the transformer.

Liu et al., "Region-Adaptive Sampling for Diffusion Transformers" (arXiv 2502.10389). A region step computes the active
tokens against the stored keys and values of all tokens; the others keep their last prediction, here extrapolated along
the noise axis from their last two evaluations. The scheduler always gets a full prediction. Which tokens are active is
decided per image from the guided prediction of the step before (select.py); all guidance branches use one set.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from diffaccel.engine.clock import Clock
from diffaccel.engine.conditions import AdapterProbe
from diffaccel.engine.method import Method, register
from diffaccel.engine.noise import adds_noise
from diffaccel.engine.run import Layer, Proceed, RegionCounts, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.caches.cache_plan import Seen, noise_position, note_whole_controlnets, warn_few
from diffaccel.methods.regions.score import Scores
from diffaccel.methods.regions.select import active_count, flat_index, gather_rows, rows_of_branches, select
from diffaccel.methods.regions.tokens import Pass, Stored, TokenGate
from diffaccel.models.call import Call
from diffaccel.models.model_map import ModelMap
from diffaccel.models.regions import region_facts
from diffaccel.models.transformers import TransformerLayout


@register
class RegionSampling(Method):
    """Compute only a part of the image tokens on most steps of a diffusion transformer.

    Attributes:
        ratio: share of the image tokens that a region step computes, in (0, 1]. Off: 1.0.
        start: solver steps at the start of the run that are dense.
        end: solver step from which all are dense again; None keeps only the last evaluation dense.
        resets: a dense step at the latest this many steps after the last one, or the solver steps that are dense; () for
            none between start and end.
        metric: what a token is ranked by, in the guided prediction: "std" over the channels (the authors' choice), "norm"
            over the channels, or "change" of the prediction along the noise axis between its last two evaluations.
        high_share: share of the frozen tokens that is taken from the high end of the ranking; the rest are the lowest.
        starvation: how strongly a dropped token moves up; no token is dropped more than
            ceil(1 / starvation) + (tokens - 1) // active region steps in a row.
        frozen: what the other tokens get: "forecast", linear in log sigma from their last two evaluations, or "reuse" of
            the last one; on the bundled transformer they are equally close.
        min_evaluations: shorter runs stay dense (few-step models lose their picture); a warning and the report say so.
        allow_stochastic: run with schedulers that add noise on every step, whose grain stays in frozen regions.
    A region step has ratio * tokens rounded up; a run has two sequence lengths. Text tokens are always computed. A dense
    step is forced when a guidance branch comes back, or prompts, adapters or the picture size change. `report.region_map()`
    shows how often each region was computed.
    Memory: keys and values of all image tokens in every block, given in the report.

    Paper: Liu et al. (RAS), arXiv 2502.10389.
    """

    name: ClassVar[str] = "region_sampling"
    layer: ClassVar[Layer] = Layer.TOKENS
    by_token: ClassVar[bool] = True

    ratio: float = Field(default=0.5, gt=0, le=1)
    start: int = Field(default=4, ge=1)
    end: int | None = Field(default=None, ge=1)
    resets: Annotated[int, Field(ge=2)] | tuple[int, ...] = 8
    metric: Literal["std", "norm", "change"] = "change"
    high_share: float = Field(default=0.0, ge=0, le=1)
    starvation: float = Field(default=0.25, gt=0)
    frozen: Literal["forecast", "reuse"] = "forecast"
    min_evaluations: int = Field(default=9, ge=1)
    allow_stochastic: bool = False

    @field_validator("resets")
    @classmethod
    def _counted(cls, resets: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(resets, tuple) and any(step < 0 for step in resets):
            raise ValueError("solver steps start at 0")
        return resets

    @property
    def is_off(self) -> bool:
        return self.ratio == 1.0

    def check(self, model: ModelMap) -> None:
        model.transformer(self.name)
        for network, _ in model.denoisers:
            region_facts(self.name, network)
        if not self.is_off:
            self._refuse_noise(adds_noise(model.pipe.scheduler), type(model.pipe.scheduler).__name__)

    def _refuse_noise(self, noisy: bool, what: str) -> None:
        if noisy and not self.allow_stochastic:
            raise Unsupported(
                f"{self.name}: {what} adds fresh noise on every step, which a token that is not computed cannot follow; "
                "use a deterministic scheduler, or set allow_stochastic."
            )

    def prepare_call(self, pipe: Any, arguments: dict[str, Any], run: Run, seams: Seams) -> dict[str, Any]:
        eta = float(arguments.get("eta") or 0.0)
        if not self.is_off:
            self._refuse_noise(
                adds_noise(pipe.scheduler, eta), f"eta {eta:g}" if eta else type(pipe.scheduler).__name__
            )
        return arguments

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        self.check(model)  # scheduler and processors may have changed since the pipeline was wrapped
        regions = _Regions(self, model, run, seams)
        run.before_evaluation(Layer.TOKENS, regions.plan)
        run.around("denoiser", Layer.TOKENS, regions.around)
        seams.wrap_method(model.pipe.scheduler, "step", regions.observe)
        note_whole_controlnets(model, run, self.name)

    def dense_by_plan(self, step: int, since_dense: int) -> bool:
        """Whether a solver step is dense before anything is forced; `since_dense`: 1 right after a dense step."""
        if step < self.start or (self.end is not None and step >= self.end):
            return True
        return step in self.resets if isinstance(self.resets, tuple) else since_dense >= self.resets


@dataclass
class _Lane:
    """One stream of calls: what is stored for it, under which conditions, and when it last ran."""

    stored: Stored = field(default_factory=Stored)
    seen: Seen | None = None
    branches: tuple[str, ...] = ()
    evaluation: int = -1

    def follow_rows(self, call: Call) -> None:
        """The unconditional rows were dropped: what is stored for the conditional ones stays good."""
        if self.seen is None or self.seen.conditional is None or call.branches != ("cond",):
            return
        self.stored.keep_rows(*self.seen.conditional_rows, len(self.branches) * call.rows)
        self.seen, self.branches = Seen(self.seen.conditional), call.branches


class _Regions:
    """What one run stores, and which tokens the current solver step computes."""

    def __init__(self, config: RegionSampling, model: ModelMap, run: Run, seams: Seams) -> None:
        self.config, self.run = config, run
        self.probes = [AdapterProbe(network) for network, _ in model.denoisers]
        self.gates = {
            id(network): TokenGate(region_facts(config.name, network), layout, seams)
            for network, layout in model.denoisers
            if isinstance(layout, TransformerLayout)
        }
        gate = next(iter(self.gates.values()))
        self.scores = Scores(config.metric, model.transformer(config.name).patch, gate.facts)
        self.lanes: dict[Hashable, _Lane] = {}
        self.active: torch.Tensor | None = None  # (images, active) tokens of this solver step; None if it is dense
        self.dropped: torch.Tensor | None = None  # (images, tokens) steps since each token was computed
        self.step, self.since_dense, self.aged_step = -1, 0, -1
        self.evaluation, self.previous = -1, -1  # in which a network ran: the last one, and the one before
        self.adapters: Any = None
        self.arguments: Mapping[str, Any] = {}
        self._note_solver(model.pipe.scheduler.config)

    def _note_solver(self, scheduler: Mapping[str, Any]) -> None:
        name = self.config.name
        if self.config.frozen == "reuse" and scheduler.get("solver_order", 1) > 1:
            self.run.note(f"{name}: a multistep solver sees a reused token jump; frozen='forecast' fits it better.")
        if scheduler.get("thresholding", False):
            self.run.note(f"{name}: the scheduler's thresholding mixes tokens of different age.")

    def plan(self) -> None:
        """Decide a solver step at its first evaluation: dense, or which tokens."""
        clock = self.run.clock
        if clock.step == self.step:
            return
        self.step = clock.step
        adapters = [probe.state() for probe in self.probes]
        returns = self.run.guided and not self.run.guided_before
        forced = "guidance" if returns else "adapters" if adapters != self.adapters else ""
        self.adapters = adapters
        if not self.run.guided or self.run.all_latched:  # an unconditional branch that comes back starts anew
            self.lanes = {key: lane for key, lane in self.lanes.items() if lane.branches != ("uncond",)}
        self.since_dense += 1
        planned = self._plans_region(clock)
        if planned and forced:
            self.run.count(self.config.name, **{f"forced by {forced}": 1})
        self.active = self._select() if planned and not forced else None

    def _plans_region(self, clock: Clock) -> bool:
        if clock.total < self.config.min_evaluations:
            warn_few(self.run, self.config.name, clock.total, self.config.min_evaluations)
            return False
        if self.dropped is None or (self.config.end is None and clock.evaluation >= clock.total - 1):
            return False
        return not self.config.dense_by_plan(clock.step, self.since_dense)

    def _select(self) -> torch.Tensor:
        assert self.dropped is not None
        tokens = self.dropped.shape[1]
        return select(
            self.scores.of_all(tokens),
            self.dropped,
            active_count(tokens, self.config.ratio),
            high_share=self.config.high_share,
            starvation=self.config.starvation,
        )

    def around(self, call: Call, proceed: Proceed) -> Any:
        """Run the transformer on all or on the active tokens."""
        self._refuse_call(call)
        clock = self.run.clock
        if clock.total < self.config.min_evaluations:
            return proceed(call)
        if clock.evaluation != self.evaluation:
            self.evaluation, self.previous = clock.evaluation, self.evaluation
        lane = self.lanes.setdefault(call.lane, _Lane())
        lane.follow_rows(call)
        changed = lane.seen is None or not lane.seen.same(call)
        index = self._index(call, stale=changed or lane.evaluation != self.previous or not lane.stored.keys)
        self.arguments, lane.evaluation = call.arguments, clock.evaluation
        if index is None:
            return self._dense(call, proceed, lane, changed)
        return self._region(call, proceed, lane, index)

    def _refuse_call(self, call: Call) -> None:
        if not call.branches:
            raise Unsupported(
                f"{self.config.name} cannot tell which rows belong to which image: the network got {call.rows} rows for "
                f"{'an unknown number of' if self.run.images is None else self.run.images} images."
            )
        if self.run.places.is_part(call.lane):
            raise Unsupported(
                f"{self.config.name} cannot follow tiles: this pipeline shows the network parts of a picture."
            )
        if not call.complete:
            raise Unsupported(f"{self.config.name} cannot run inside a method that skips blocks; use one of the two.")
        if call.arguments.get("attention_mask") is not None:  # over image tokens, in the models that have one
            raise Unsupported(f"{self.config.name} does not support masks over image tokens (attention_mask).")

    def _index(self, call: Call, *, stale: bool) -> torch.Tensor | None:
        """(rows, active) tokens of this call; None if all have to be computed."""
        if self.active is None:
            return None
        if not stale:
            return rows_of_branches(self.active, call)
        self.run.count(self.config.name, **{"forced by inputs": 1})
        if call.lane[1] == 0:  # nothing was computed yet: the whole evaluation is dense
            self.active = None
        return None

    def _dense(self, call: Call, proceed: Proceed, lane: _Lane, changed: bool) -> Any:
        stored = Stored() if changed else lane.stored
        stored.forget_attention()
        lane.stored, lane.seen, lane.branches = stored, Seen.of(call), call.branches
        with self.gates[call.lane[0]].passing(self._pass(stored, None)):
            return proceed(call)

    def _region(self, call: Call, proceed: Proceed, lane: _Lane, index: torch.Tensor) -> Any:
        call = self._with_residuals(call, index, lane)
        with self.gates[call.lane[0]].passing(self._pass(lane.stored, index)):
            return proceed(call.tagged(("regions", index.shape[1]), complete=False))

    def _pass(self, stored: Stored, index: torch.Tensor | None) -> Pass:
        clock, config = self.run.clock, self.config
        follows = clock.step + 1 >= config.start and (config.end is None or clock.step + 1 < config.end)
        place = noise_position(clock.sigma, "log_sigma")
        return Pass(
            stored,
            index,
            keep=index is None and follows and clock.evaluation < clock.total - 1,
            place=math.nan if place is None else place,
            forecast=config.frozen == "forecast",
        )

    def _with_residuals(self, call: Call, index: torch.Tensor, lane: _Lane) -> Call:
        """ControlNet residuals of the active tokens only."""
        names = [name for name in self.gates[call.lane[0]].facts.residuals if call.arguments.get(name) is not None]
        flat = flat_index(index, lane.stored.history.tokens)
        cut = {
            name: [gather_rows(part.expand(call.rows, *part.shape[1:]), flat) for part in call.arguments[name]]
            for name in names
        }
        return replace(call, arguments={**call.arguments, **cut}) if cut else call

    def observe(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """`scheduler.step` gets the guided prediction: score it, and let the dropped tokens age."""
        if self.evaluation == self.run.clock.evaluation and self.lanes:
            self._close(args[0] if args else kwargs["model_output"])
        return original(*args, **kwargs)

    def _close(self, guided: torch.Tensor) -> None:
        images = self.run.images or 0
        tokens = next(iter(self.lanes.values())).stored.history.tokens
        if self.dropped is None or self.dropped.shape != (images, tokens):
            self.dropped = torch.zeros(images, tokens, dtype=torch.int64, device=guided.device)
        computed = self._computed()
        place = noise_position(self.run.clock.sigma, "log_sigma")
        self.scores.update(guided[:images], computed, place)
        if self.aged_step != self.step:
            self.aged_step = self.step
            self.dropped = torch.where(computed, 0, self.dropped + 1)
        if self.active is None:
            self.since_dense = 0
        self._count(computed, guided[:images])

    def _computed(self) -> torch.Tensor:
        """(images, tokens) bool: what this evaluation computed."""
        assert self.dropped is not None
        if self.active is None:
            return torch.ones_like(self.dropped, dtype=torch.bool)
        return torch.zeros_like(self.dropped, dtype=torch.bool).scatter_(1, self.active, True)

    def _count(self, computed: torch.Tensor, guided: torch.Tensor) -> None:
        images, tokens = computed.shape
        active = tokens if self.active is None else self.active.shape[1]
        self.run.count(
            self.config.name,
            dense=int(self.active is None),
            region=int(self.active is not None),
            **{"tokens computed": images * active, "tokens": images * tokens},
        )
        counter = self.run.counters[self.config.name]
        stored = sum(lane.stored.bytes for lane in self.lanes.values())
        counter["key and value bytes"] = max(counter.get("key and value bytes", 0), stored)
        if self.run.regions is None or self.run.regions.counts.shape[0] != images:
            self.run.regions = RegionCounts.empty(images, self.scores.grid(guided, self.arguments))
        self.run.regions.add(computed)

"""Block cache: the caches that diffusers itself ships, where they truly run, with what they need and their pipelines forget.

First Block Cache (ParaAttention, after TeaCache, arXiv 2411.19108), MagCache (arXiv 2506.09045), TaylorSeer (arXiv
2503.06923) and Pyramid Attention Broadcast (arXiv 2408.12588); and the one of cache-dit where that is installed
(dual_block_cache.py). The rule and what is reused are theirs. This file opens the cache context of every guidance branch,
gives the step index and the number of steps, keeps a state per network call, forces full evaluations (warm-up, cap on
hits, changed inputs) and sees by the modules that ran whether a call was a hit. Hooks exist only while a run lasts;
afterwards the network is as it was, whatever diffusers leaves behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from diffaccel.engine.conditions import AdapterProbe
from diffaccel.engine.flops import FlopLedger
from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.block_cache import dual_block_cache as block_cache_dit
from diffaccel.methods.block_cache.dual_block_cache import DualBlockCache, DualBlockSettings, StackWatch
from diffaccel.methods.caches.cache_plan import Seen, warn_few
from diffaccel.models.call import Call
from diffaccel.models.compiled import is_compiled
from diffaccel.models.model_map import ModelMap, is_spread
from diffaccel.models.transformers import TransformerLayout

Kind = Literal["first_block", "mag", "taylor", "pyramid", "dual_block"]
Target = Literal["attention", "output"]

# Settings that only some kinds have, with the value each of these kinds takes for None.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "threshold": {"first_block": 0.05, "mag": 0.06, "dual_block": 0.08},
    "interval": {"taylor": 5, "pyramid": 2},
    "ratios": {"mag": None},
    "order": {"taylor": 1},
    "target": {"taylor": "attention"},
    "first_blocks": {"dual_block": 8},
    "last_blocks": {"dual_block": 0},
}
# Names under which diffusers 0.42 registers the hooks of each kind.
_HOOKS: dict[str, tuple[str, ...]] = {
    "first_block": ("fbc_leader_block_hook", "fbc_block_hook"),
    "mag": ("mag_cache_leader_block_hook", "mag_cache_block_hook"),
    "taylor": ("taylorseer_cache",),
    "pyramid": ("pyramid_attention_broadcast",),
}
_NEVER = 1 << 30
_MARKS = ("forward", "_diffusers_hook", "_cache_config")  # attributes that diffusers' caches leave on modules


@register
class BlockCache(Method):
    """One of diffusers' own caches for diffusion transformers, or cache-dit's. Off: threshold 0, or interval 1.

    Attributes:
        kind: "first_block": the first block runs; the others are skipped if its residual changed little since the last
            full evaluation. "mag": all blocks are skipped while the error that known magnitude ratios predict is small.
            "taylor": module outputs are extrapolated over steps. "pyramid": attention outputs are used several times.
            "dual_block": cache-dit's DBCache (pip install cache-dit): as first_block, with `first_blocks` blocks before
            and `last_blocks` behind those that are skipped, where diffusers has no caches too.
        threshold: first_block: relative change of the first residual, default 0.05. mag: accumulated error, default 0.06.
            dual_block: as first_block, default 0.08; from 1 on cache-dit takes every evaluation for similar.
        interval: taylor: one full evaluation in so many, default 5. pyramid: attentions run on one in so many, default 2.
        ratios: mag: magnitude ratios of the checkpoint, one per step of some run ("flux" for those of FLUX.1 in
            diffusers); stretched to this run's evaluations. diffusers' MagCacheConfig(calibrate=True) measures them.
        order: taylor: degree of the series, default 1.
        target: taylor: "attention" keeps every attention output; "output" the last layer only, and no block runs.
        first_blocks: dual_block: so many blocks of a stack run always and decide, default 8.
        last_blocks: dual_block: so many blocks at the end of a stack run always, default 0.
        window: (high, low) EDM sigma; hits only while low <= sigma <= high.
        max_hits: after so many hits in a row a full evaluation is forced.
        full_first, full_last: evaluations at the start and end of the run that are always full.
        min_evaluations: shorter runs are not cached (few-step models lose their picture); a warning and the report say so.
    Everything is decided and kept per network call (separate guidance branches by themselves); dual_block decides for
    every stack of blocks, and a call in which only some stacks have a hit counts as "partial". A full evaluation is forced
    also when prompt embeddings, guidance rows, adapters or the picture size change, and after a branch was left out.

    What runs (measured on every family by tests/test_block_cache.py and tests/test_block_cache_dit.py; everything else is
    refused with the reason):

    first_block: flux, qwen-image, cogview4, wan, cogvideox
    mag: flux, flux2, qwen-image, cogview4, wan, cogvideox
    taylor, attention: flux, flux2, qwen-image
    taylor, output: flux, flux2, qwen-image, cogview4, wan, cogvideox
    pyramid: flux, flux2, qwen-image, cogview4, wan, cogvideox
    dual_block: sd3, flux, flux2, pixart, lumina-next, lumina2, sana, qwen-image, z-image, cogview4, wan, cogvideox
    dual_block, single blocks only: auraflow

    Papers: TeaCache, arXiv 2411.19108; MagCache, arXiv 2506.09045; TaylorSeer, arXiv 2503.06923; Pyramid Attention
    Broadcast, arXiv 2408.12588.
    """

    name: ClassVar[str] = "block_cache"
    layer: ClassVar[Layer] = Layer.SKIP

    kind: Kind = "first_block"
    threshold: float | None = Field(default=None, ge=0)
    interval: int | None = Field(default=None, ge=1)
    ratios: tuple[float, ...] | Literal["flux"] | None = None
    order: int | None = Field(default=None, ge=0, le=3)
    target: Target | None = None
    first_blocks: int | None = Field(default=None, ge=1)
    last_blocks: int | None = Field(default=None, ge=0)
    window: tuple[float, float] | None = None
    max_hits: int = Field(default=4, ge=1)
    full_first: int = Field(default=3, ge=1)
    full_last: int = Field(default=1, ge=0)
    min_evaluations: int = Field(default=9, ge=1)

    @field_validator("window")
    @classmethod
    def _ordered(cls, window: tuple[float, float] | None) -> tuple[float, float] | None:
        if window is not None and not window[0] > window[1] >= 0:
            raise ValueError("window is (high, low) in EDM sigma with high > low >= 0")
        return window

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        for name, kinds in _DEFAULTS.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name} is a setting of {' and '.join(kinds)}, not of {self.kind}")
        if self.kind == "mag" and self.ratios is None:
            raise ValueError('mag needs the magnitude ratios of the checkpoint; "flux" names those of FLUX.1')
        if isinstance(self.ratios, tuple) and (len(self.ratios) < 2 or min(self.ratios) <= 0):
            raise ValueError("ratios are at least two positive numbers")
        return self

    def setting(self, name: str) -> Any:
        """The value of a setting of this kind, with the kind's default for None."""
        value = getattr(self, name)
        return _DEFAULTS[name].get(self.kind) if value is None else value

    @property
    def dual_block(self) -> DualBlockSettings:
        """The settings of the kind "dual_block"."""
        first, last, threshold = (self.setting(name) for name in ("first_blocks", "last_blocks", "threshold"))
        return DualBlockSettings(first, last, threshold, self.max_hits)

    @property
    def is_off(self) -> bool:
        if self.kind in _DEFAULTS["threshold"]:
            return bool(self.setting("threshold") == 0)
        return bool(self.setting("interval") == 1)

    def check(self, model: ModelMap) -> None:
        model.transformer(self.name)
        for network, layout in model.denoisers:
            assert isinstance(layout, TransformerLayout)
            if self.kind == "dual_block":
                block_cache_dit.refuse_unfit(self.dual_block, model.pipe, network, layout)
            else:
                _refuse_unfit(self, network, layout)
        if self.kind in ("first_block", "dual_block") and any(is_spread(network) for network, _ in model.denoisers):
            raise Unsupported(
                f"block_cache: {self.kind} decides on every process by its own part of the tokens, so that under context "
                "parallelism processes could wait for each other for ever; use mag, taylor, pyramid or Forecast."
            )
        if model.controlnets and self.kind in ("first_block", "mag"):
            raise Unsupported(
                f"block_cache: on a hit of {self.kind} the residuals of a ControlNet would be added a second time; use "
                "ResidualCache."
            )
        if model.controlnets and self.kind == "dual_block":
            raise Unsupported(
                "block_cache: under dual_block the residuals of a ControlNet would be added behind all blocks at once; "
                "use ResidualCache."
            )

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        caches: dict[int, _Cache | DualBlockCache] = {
            id(network): block_cache_dit.install(self.dual_block, model.pipe, network, seams)
            if self.kind == "dual_block"
            else _install(self, network, layout, seams)
            for network, layout in model.denoisers
        }
        plan = _Plan(self, caches, [AdapterProbe(network) for network, _ in model.denoisers], run)
        seams.on_close(partial(setattr, run, "ledger", run.ledger))
        run.ledger = _OutcomeLedger(run.ledger, plan)
        run.before_evaluation(Layer.SKIP, plan.begin)
        run.around("denoiser", Layer.SKIP, plan.around)
        seams.on_close(plan.sum_up)


# --- which modules diffusers will hook, and whether that works ---


def _refuse_unfit(config: BlockCache, network: nn.Module, layout: TransformerLayout) -> None:
    """Raise `Unsupported` with the reason unless this cache is known to act on this network."""
    from diffusers.models.cache_utils import CacheMixin  # noqa: PLC0415  (diffusers is slow to import)

    name, kind = type(network).__name__, config.kind
    if not isinstance(network, CacheMixin):
        raise Unsupported(f"block_cache: diffusers has no caches for {name}; use ResidualCache or Forecast.")
    if network.is_cache_enabled:
        raise Unsupported(f"block_cache: a cache of diffusers is enabled on this {name} already; disable it first.")
    modules = _hooked(config, network)
    if kind == "taylor" and config.setting("target") == "attention" and not modules:
        raise Unsupported(f'block_cache: taylor finds no attention it knows in {name}; set target to "output".')
    if not modules:
        raise Unsupported(f"block_cache: {kind} finds nothing it knows in {name}.")
    if kind in ("first_block", "mag"):
        _refuse_blocks(kind, name, modules, layout)
    if any(is_compiled(module) for module in (*modules, *layout.blocks)):
        raise Unsupported("block_cache: diffusers' cache hooks do not work on compiled blocks; use ResidualCache.")


def _refuse_blocks(kind: str, name: str, modules: list[nn.Module], layout: TransformerLayout) -> None:
    from diffusers.hooks._helpers import TransformerBlockRegistry  # noqa: PLC0415

    if modules != list(layout.blocks) or layout.long_skips or len(modules) < 2:
        raise Unsupported(f"block_cache: {kind} does not see all blocks of {name} in their order.")
    TransformerBlockRegistry._register()
    facts = [TransformerBlockRegistry._registry.get(type(module)) for module in modules]
    unknown = next((type(m).__name__ for m, found in zip(modules, facts, strict=True) if found is None), None)
    if unknown is not None:
        raise Unsupported(f"block_cache: diffusers does not know the results of {unknown}.")
    if kind == "first_block" and len({found.return_encoder_hidden_states_index for found in facts}) > 1:
        raise Unsupported(f"block_cache: first_block fails on {name}, whose last blocks return one tensor; use mag.")


def _hooked(config: BlockCache, network: nn.Module) -> list[nn.Module]:
    """The modules on which diffusers will put hooks, in its order; compared with the truth when it has."""
    from diffusers.hooks import _common, taylorseer_cache  # noqa: PLC0415
    from diffusers.models.attention import AttentionModuleMixin  # noqa: PLC0415

    if config.kind in ("first_block", "mag"):
        lists = [(n, m) for n, m in network.named_children() if n in _common._ALL_TRANSFORMER_BLOCK_IDENTIFIERS]
        return [block for _, blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]
    if config.kind == "taylor":
        whole = (*taylorseer_cache._BLOCK_IDENTIFIERS, *taylorseer_cache._PROJ_OUT_IDENTIFIERS)
        patterns = taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS
        patterns = whole if config.setting("target") == "output" else patterns
        return [m for n, m in network.named_modules() if any(re.fullmatch(pattern, n) for pattern in patterns)]
    classes = (*_common._ATTENTION_CLASSES, AttentionModuleMixin)
    places = _common._SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, classes)
        and any(re.search(place, name) for place in places)
        and not getattr(module, "is_cross_attention", False)
    ]


# --- hooks on, hooks off ---


class _Watch:
    """Counts which of the modules that a hit skips have run in this network call."""

    def __init__(self, modules: list[nn.Module], seams: Seams) -> None:
        self.total, self.ran = len(modules), 0
        for module in modules:
            seams.replace_forward(module, self._around)

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.ran += 1
            return original(*args, **kwargs)

        return forward

    def begin(self) -> None:
        """A network call begins."""
        self.ran = 0

    def counting(self) -> AbstractContextManager[None]:
        """Nothing is counted by itself."""
        return nullcontext()

    def knows(self, known: dict[Hashable, int], key: Hashable) -> bool:
        """Whether both a full call of this kind and a hit have been counted."""
        return key in known and (key, "hit") in known

    def cost(self, known: dict[Hashable, int], key: Hashable) -> int:
        """FLOPs of the call that just ended."""
        return known[key if self.ran else (key, "hit")]

    def remember(self, known: dict[Hashable, int], key: Hashable, flops: int) -> None:
        """Learn from a counted call."""
        if self.ran in (0, self.total):
            known[key if self.ran else (key, "hit")] = flops


@dataclass
class _Cache:
    """A network with its hooks, and what stands behind them."""

    network: Any
    config: BlockCache
    settings: Any  # diffusers' config; its hooks read it during the run
    hooks: list[Any]
    watch: _Watch
    allowed: list[bool]  # one element, which pyramid's timestep callback reads
    states: dict[Hashable, list[Any]] = field(default_factory=dict)  # pyramid, which knows no contexts

    def opened(self, call: Call, lane: str, run: Run) -> AbstractContextManager[Any]:
        """diffusers' context of the lane."""
        context: AbstractContextManager[Any] = self.network.cache_context(
            lane, step_index=run.clock.evaluation, num_inference_steps=run.clock.total
        )
        return context

    def prepare(self, lane: str, run: Run, *, full: bool, forget: bool) -> None:
        """Inside the lane's context: state, step index, and whether the next call must be full."""
        if forget:
            self._forget(lane)
        getattr(self, f"_prepare_{self.config.kind}")(self.config, lane, run, full)
        self.watch.begin()
        self.allowed[0] = not full

    def _forget(self, lane: str) -> None:
        self.states.pop(lane, None)
        for hook in self.hooks:
            if hasattr(hook, "state_manager"):
                hook.state_manager._state_cache.pop(lane, None)

    def _prepare_first_block(self, config: BlockCache, lane: str, run: Run, full: bool) -> None:
        if full:
            self._forget(lane)  # without a residual to compare with the rule computes

    def _prepare_mag(self, config: BlockCache, lane: str, run: Run, full: bool) -> None:
        state = self.hooks[0].state_manager.get_state()
        state.step_index = run.clock.evaluation
        if full:
            state.previous_residual = None  # the rule computes and starts its sums again
        if self.settings.num_inference_steps != run.clock.total:
            self.settings.num_inference_steps = run.clock.total
            self.settings.mag_ratios = _mag_ratios(config, run.clock.total)

    def _prepare_taylor(self, config: BlockCache, lane: str, run: Run, full: bool) -> None:
        for hook in self.hooks:
            hook.state_manager.get_state().current_step = run.clock.evaluation - 1  # it counts up before it decides
            hook.disable_cache_before_step = _NEVER if full else config.full_first

    def _prepare_pyramid(self, config: BlockCache, lane: str, run: Run, full: bool) -> None:
        """Its hooks have one state for all branches, which would answer one branch with the other."""
        if lane not in self.states:
            self.states[lane] = [type(hook.state)() for hook in self.hooks]
        for hook, state in zip(self.hooks, self.states[lane], strict=True):
            hook.state = state


def _install(config: BlockCache, network: Any, layout: Any, seams: Seams) -> _Cache:
    """Enable diffusers' cache on a network until `seams` close."""
    modules = _hooked(config, network)
    before = [(m, {key: vars(m)[key] for key in _MARKS if key in vars(m)}) for m in network.modules()]
    seams.on_close(partial(_restore, before))
    watch = _Watch(modules[1:] if config.kind == "first_block" else modules, seams)
    allowed = [False]
    settings = _diffusers_config(config, network, allowed)
    forwards = [(module, module.forward) for module in modules]
    seams.on_close(partial(_disable, network, settings))
    network.enable_cache(settings)
    hooks = [(m, hook) for m in network.modules() for hook in _own_hooks(config.kind, m)]
    if {id(m) for m, _ in hooks} != {id(m) for m in modules}:
        raise Unsupported(f"block_cache: this version of diffusers hooks other parts of {type(network).__name__}.")
    for module, forward in forwards:
        seams.let_others_through(module, forward)
    return _Cache(network, config, settings, [hook for _, hook in hooks], watch, allowed)


def _own_hooks(kind: str, module: nn.Module) -> Iterator[Any]:
    registry: Any = vars(module).get("_diffusers_hook")
    if registry is not None:
        yield from (registry.hooks[name] for name in _HOOKS[kind] if name in registry.hooks)


def _disable(network: Any, settings: Any) -> None:
    """Take the hooks off where others may have theirs on the same modules; one hook of ours per module, the last one."""
    if network._cache_config is settings:
        network.disable_cache()


def _restore(before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Exactly the attributes of before: diffusers leaves `forward`, registries and the name of the config behind."""
    for module, values in before:
        attributes = vars(module)
        for key in _MARKS:
            if key in values:
                attributes[key] = values[key]
            else:
                attributes.pop(key, None)
        registry: Any = values.get("_diffusers_hook")
        if registry is not None:  # it lists the registries of children, of which some are gone
            registry._child_registries_cache = None


def _diffusers_config(config: BlockCache, network: nn.Module, allowed: list[bool]) -> Any:
    import diffusers  # noqa: PLC0415
    from diffusers.hooks import TaylorSeerCacheConfig  # noqa: PLC0415

    if config.kind == "first_block":
        return diffusers.FirstBlockCacheConfig(threshold=config.setting("threshold"))
    if config.kind == "mag":
        return diffusers.MagCacheConfig(
            threshold=config.setting("threshold"),
            max_skip_steps=config.max_hits,
            retention_ratio=0.0,  # the first evaluations are forced
            num_inference_steps=2,
            mag_ratios=_mag_ratios(config, 2),
        )
    if config.kind == "taylor":
        return TaylorSeerCacheConfig(
            cache_interval=config.setting("interval"),
            disable_cache_before_step=config.full_first,
            max_order=config.setting("order"),
            taylor_factors_dtype=None,  # of what each module returns; stored weights may be packed
            use_lite_mode=config.setting("target") == "output",
        )
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=config.setting("interval"),
        spatial_attention_timestep_skip_range=(0, 2),
        current_timestep_callback=lambda: int(allowed[0]),
    )


def _mag_ratios(config: BlockCache, total: int) -> torch.Tensor:
    """The ratios, stretched to a run of `total` evaluations by diffusers' own rule."""
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp  # noqa: PLC0415

    ratios = config.ratios
    given = FLUX_MAG_RATIOS if ratios == "flux" else torch.tensor(ratios)
    stretched: torch.Tensor = nearest_interp(given, total)
    return stretched


# --- one run ---


@dataclass
class _Lane:
    """What is known about the calls of one lane."""

    seen: Seen
    evaluation: int
    hits: int = 0


class _Plan:
    """Opens contexts, forces full evaluations and counts what really happened."""

    def __init__(
        self, config: BlockCache, caches: dict[int, _Cache | DualBlockCache], probes: list[AdapterProbe], run: Run
    ) -> None:
        self.config, self.caches, self.probes, self.run = config, caches, probes, run
        self.lanes: dict[Hashable, _Lane] = {}
        self.adapters: Any = None
        self.current: _Cache | DualBlockCache | None = None
        self.undecided = False

    def begin(self) -> None:
        adapters = [probe.state() for probe in self.probes]
        if adapters != self.adapters:
            self.lanes.clear()
        self.adapters = adapters

    def around(self, call: Call, proceed: Proceed) -> Any:
        """One network call in its context."""
        run, cache = self.run, self.caches[call.lane[0]]
        known = self.lanes.get(call.lane)
        usable = known is not None and known.evaluation == run.clock.evaluation - 1 and known.seen.same(call)
        usable = usable and run.same_place(call)
        may_hit = self._may_hit(known.hits if known else 0)
        if may_hit and not usable:
            run.count(self.config.name, **{"forced by inputs": 1})
        full = not (may_hit and usable)
        lane = f"diffaccel {call.lane[1]}"
        with cache.opened(call, lane, run):
            cache.prepare(lane, run, full=full, forget=not usable)
            self.current, self.undecided = cache, not full
            try:
                # whether it is a hit is known afterwards: such a call says nothing about the dense cost
                output = proceed(call if full else call.tagged(complete=False))
            finally:
                self.current, self.undecided = None, False
        self._count(call, cache.watch, known)
        return output

    def _may_hit(self, hits: int) -> bool:
        """Whether the settings allow a hit after so many in a row."""
        config, clock = self.config, self.run.clock
        if clock.total < config.min_evaluations:
            warn_few(self.run, config.name, clock.total, config.min_evaluations)
            return False
        if not config.full_first <= clock.evaluation < clock.total - config.full_last or hits >= config.max_hits:
            return False
        return config.window is None or config.window[1] <= clock.sigma <= config.window[0]

    def _count(self, call: Call, watch: _Watch | StackWatch, known: _Lane | None) -> None:
        """What ran tells what the call was."""
        config, branches = self.config, "+".join(call.branches) or f"call {call.lane[1]}"
        outcome = "hits" if watch.ran == 0 else "full" if watch.ran == watch.total else "partial"
        self.run.count(config.name, **{name: int(name == outcome) for name in ("full", "hits")})
        self.run.count(config.name, **{f"{outcome} of {branches}": 1})
        if self.run.evaluations:
            self.run.evaluations[-1].tags += ((config.name, outcome),)
        hit = outcome == "hits"
        if hit and known is not None:
            known.evaluation, known.hits = self.run.clock.evaluation, known.hits + 1
        else:
            self.lanes[call.lane] = _Lane(Seen.of(call), self.run.clock.evaluation)
        if config.kind in ("first_block", "dual_block") and (self.run.images or 1) > 1:
            self.run.note(f"block_cache: {config.kind} decides for the whole batch at once, so pictures depend on it.")

    def sum_up(self) -> None:
        """A run without a hit says so."""
        if self.run.counters.get(self.config.name, {}).get("hits", 0) == 0:
            self.run.note(f"block_cache: {self.config.kind} never had a hit in this run, so nothing was saved.")


class _OutcomeLedger(FlopLedger):
    """The run's ledger, for calls of which only their end tells whether they were hits or as dear as any full call."""

    def __init__(self, ledger: FlopLedger, plan: _Plan) -> None:
        super().__init__()
        self.known, self._ledger, self._plan = ledger.known, ledger, plan

    def count(self, key: Hashable, function: Callable[[], Any]) -> tuple[Any, int | None]:
        """As in the base class; counts until the cost of every outcome is known."""
        cache, ledger = self._plan.current, self._ledger
        if cache is None or (key in self.known and not self._plan.undecided):
            result = ledger.count(key, function)
        elif self._plan.undecided and cache.watch.knows(self.known, key):
            output = function()
            result = output, cache.watch.cost(self.known, key)
        else:
            with cache.watch.counting():
                result = ledger.counted(function, cache.watch.begin)
            if result[1] is not None:
                cache.watch.remember(self.known, key, result[1])
        self.failure = ledger.failure
        return result

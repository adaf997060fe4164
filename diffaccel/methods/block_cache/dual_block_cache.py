"""Dual block cache: cache-dit's DBCache in one run, without a trace afterwards.

In a network call the first blocks of a stack run, the relative change of their residual since the last full evaluation
decides, on a hit the stored residual of the middle blocks is added instead of running them, and the last blocks run. The
rule and what is reused are cache-dit's (Apache-2.0, checked with 1.5.3): its table of block lists and their forms, its
blocks around a stack, its contexts. Its `enable_cache` is not used, because that replaces `__call__` on the class of the
pipeline, tells guidance branches apart by counting calls, and leaves the state of an interrupted run behind. Here the
network's lists are shadowed by instance attributes while a run lasts, and every network call of an evaluation has
contexts of its own, which die with the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffaccel.engine.flops import count_flops
from diffaccel.engine.others import enabled_cache
from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.models.call import Call
from diffaccel.models.transformers import TransformerLayout

# cache-dit rewrites the forward of other models; this rewriting is for releases of diffusers before 0.35 only.
_OBSOLETE_FUNCTORS = ("FluxPatchFunctor",)


@dataclass(frozen=True)
class _Found:
    """Blocks that cache-dit treats as one stack, the lists of the network they are in, and what they take and return."""

    lists: tuple[str, ...]
    blocks: nn.ModuleList
    pattern: Any
    checked: bool  # whether the names of the blocks' arguments tell if the pattern fits


@dataclass(frozen=True)
class DualBlockSettings:
    """The settings of `BlockCache` that DBCache reads.

    Attributes:
        first_blocks, last_blocks: always computed; the change of the first ones decides.
        threshold: relative change below which the blocks between are left out.
        max_hits: evaluations in a row at most.
    """

    first_blocks: int
    last_blocks: int
    threshold: float
    max_hits: int


def refuse_unfit(config: DualBlockSettings, pipe: Any, network: nn.Module, layout: TransformerLayout) -> None:
    """Raise `Unsupported` with the reason unless cache-dit's DBCache is known to act on this network."""
    name, ends = type(network).__name__, config.first_blocks + config.last_blocks
    _import()
    _refuse_enabled(pipe, network)
    if enabled_cache(network):
        raise Unsupported(f"block_cache: a cache of diffusers is enabled on this {name} already; disable it first.")
    if layout.long_skips:
        raise Unsupported(f"block_cache: cache-dit does not know the long skips between the blocks of {name}.")
    for found in (stacks := _find(pipe, network)):
        if ends >= len(found.blocks):
            raise Unsupported(
                f"block_cache: first_blocks and last_blocks leave none of the {len(found.blocks)} blocks in "
                f"{' and '.join(found.lists)} of {name} to skip; use smaller ones."
            )
    _wrap(network, stacks)


def _refuse_enabled(pipe: Any, network: nn.Module) -> None:
    """cache-dit marks the networks it changed, and the classes of their pipelines."""
    if getattr(network, "_is_cached", False) or getattr(pipe, "_is_cached", False):
        raise Unsupported(
            f"block_cache: cache-dit is enabled on {type(pipe).__name__} or this {type(network).__name__} already; "
            "disable it first."
        )


def install(config: DualBlockSettings, pipe: Any, network: nn.Module, seams: Seams) -> DualBlockCache:
    """Put cache-dit's blocks around the stacks of a network until `seams` close."""
    _refuse_enabled(pipe, network)
    stacks = _find(pipe, network)
    wrappers = _wrap(network, stacks)
    for found, wrapper in zip(stacks, wrappers, strict=True):
        # the attribute hides the child of the same name, which stays where it is with all its parameters
        seams.replace_blocks(network, found.lists[0], [wrapper])
        for emptied in found.lists[1:]:
            seams.replace_blocks(network, emptied, [])
    cache = DualBlockCache(type(network).__name__, config, wrappers, StackWatch(wrappers))
    seams.on_close(cache.release)
    return cache


class StackWatch:
    """Sees which stacks ran their middle blocks in this network call, and what these cost."""

    def __init__(self, wrappers: list[Any]) -> None:
        self.total, self._ran, self._counting = len(wrappers), set[int](), False
        self._costs: dict[int, int] = {}
        for index, wrapper in enumerate(wrappers):
            wrapper.call_Mn_blocks = self._around(index, wrapper.call_Mn_blocks)  # cache-dit calls it on a miss only

    def _around(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call_middle(*args: Any, **kwargs: Any) -> Any:
            self._ran.add(index)
            if not self._counting:
                return original(*args, **kwargs)
            result, self._costs[index] = count_flops(lambda: original(*args, **kwargs))
            return result

        return call_middle

    @property
    def ran(self) -> int:
        """How many stacks were computed whole."""
        return len(self._ran)

    def begin(self) -> None:
        """A network call begins."""
        self._ran.clear()
        self._costs.clear()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the middle blocks of every stack by themselves."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def knows(self, known: dict[Hashable, int], key: Hashable) -> bool:
        """Whether the cost of a call of this kind is known, whatever its stacks decide."""
        return key in known and all((key, "stack", index) in known for index in range(self.total))

    def cost(self, known: dict[Hashable, int], key: Hashable) -> int:
        """FLOPs of the call that just ended."""
        return known[key] - sum(known[key, "stack", index] for index in range(self.total) if index not in self._ran)

    def remember(self, known: dict[Hashable, int], key: Hashable, flops: int) -> None:
        """Learn from a counted call; only a full one tells what all stacks cost."""
        if self.ran == self.total:
            known[key] = flops
            known.update({(key, "stack", index): cost for index, cost in self._costs.items()})


@dataclass
class DualBlockCache:
    """A network with cache-dit's blocks around its stacks."""

    network: str
    config: DualBlockSettings
    wrappers: list[Any]
    watch: StackWatch
    states: dict[str, list[Any]] = field(default_factory=dict)  # per lane one context of cache-dit for every stack
    full: bool = True

    @contextmanager
    def opened(self, call: Call, lane: str, run: Run) -> Iterator[None]:
        """Around a call: a full one must have run everything, or the counts of this run would be made up."""
        if call.arguments.get("skip_layers") is not None:
            raise Unsupported("block_cache: dual_block cannot leave out single layers (skip_guidance_layers).")
        yield
        if self.full and self.watch.ran < self.watch.total:
            raise Unsupported(f"block_cache: {self.network} does not run the blocks that cache-dit put in its place.")

    def prepare(self, lane: str, run: Run, *, full: bool, forget: bool) -> None:
        """The lane's state, and whether the next call must be full."""
        if forget:
            self.states.pop(lane, None)
        if lane not in self.states:
            self.states[lane] = [_context(self.config, f"{lane} {index}") for index in range(len(self.wrappers))]
        for wrapper, context in zip(self.wrappers, self.states[lane], strict=True):
            context.cache_config.residual_diff_threshold = 0.0 if full else self.config.threshold
            wrapper.cache_context = context
        self.full = full
        self.watch.begin()

    def release(self) -> None:
        """Drop the stored tensors at once: cache-dit's objects refer to each other and wait for the garbage collector."""
        for context in (context for contexts in self.states.values() for context in contexts):
            context.clear_buffers()
        self.states.clear()


def _context(config: DualBlockSettings | None, name: str) -> Any:
    """A fresh context; warm-up and the end of the run are forced from outside."""
    contexts, settings = _import()[1:]
    if config is None:
        return contexts.CachedContext(name=name)
    return contexts.CachedContext(
        name=name,
        cache_config=settings.DBCacheConfig(
            Fn_compute_blocks=config.first_blocks,
            Bn_compute_blocks=config.last_blocks,
            residual_diff_threshold=config.threshold,
            max_warmup_steps=0,
            max_continuous_cached_steps=config.max_hits,
            enable_separate_cfg=False,
        ),
    )


# --- what cache-dit knows about a network ---


def _find(pipe: Any, network: nn.Module) -> list[_Found]:
    """The stacks that cache-dit's own table gives for this network."""
    adapters, name = _import()[0], type(network).__name__
    try:
        # skip_post_init: the table is only read, and no forward is rewritten
        adapter = adapters.BlockAdapterRegister.get_adapter(pipe, skip_post_init=True)
    except (AssertionError, AttributeError, ValueError) as error:
        raise Unsupported(f"block_cache: cache-dit fails on {type(pipe).__name__} ({error}).") from error
    if adapter is None:
        raise Unsupported(f"block_cache: cache-dit does not know {type(pipe).__name__}.")
    functor = type(adapter.patch_functor).__name__
    if adapter.patch_functor is not None and functor not in _OBSOLETE_FUNCTORS:
        raise Unsupported(
            f"block_cache: cache-dit rewrites the forward of {name} ({functor}) and does not take it back."
        )
    pairs = zip(_flat(adapter.blocks), _flat(adapter.forward_pattern), strict=True)
    own = {id(module) for module in network.modules()}
    checked = adapter.check_forward_pattern is not False
    found = [
        _place(network, blocks, pattern, checked=checked)
        for blocks, pattern in pairs
        if all(id(block) in own for block in blocks)
    ]
    if not found:
        raise Unsupported(f"block_cache: cache-dit finds no blocks in {name}.")
    return found


def _place(network: nn.Module, blocks: nn.ModuleList, pattern: Any, *, checked: bool) -> _Found:
    """Which lists of the network a stack consists of."""
    lists = [(name, child) for name, child in network.named_children() if isinstance(child, nn.ModuleList)]
    inside = {id(block) for block in blocks}
    mine = [(name, child) for name, child in lists if len(child) > 0 and all(id(block) in inside for block in child)]
    if [id(block) for _, child in mine for block in child] != [id(block) for block in blocks]:
        raise Unsupported(f"block_cache: cache-dit does not see the blocks of {type(network).__name__} in their order.")
    return _Found(tuple(name for name, _ in mine), blocks, pattern, checked)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)) and not hasattr(value, "Supported"):
        return [item for part in value for item in _flat(part)]
    return [value]


def _wrap(network: nn.Module, stacks: Iterable[_Found]) -> list[Any]:
    """cache-dit's blocks around every stack, each with a manager of its own."""
    from cache_dit.caching.cache_blocks import CachedBlocks  # noqa: PLC0415
    from cache_dit.caching.cache_contexts import CachedContextManager  # noqa: PLC0415

    try:
        with _quiet("cache_dit.caching.cache_blocks.pattern_base"):
            return [
                CachedBlocks(
                    found.blocks,
                    transformer=network,
                    forward_pattern=found.pattern,
                    check_forward_pattern=found.checked,
                    check_num_outputs=False,  # it reads annotations, which not all blocks have
                    cache_prefix=found.lists[0],
                    cache_context=_context(None, found.lists[0]),
                    context_manager=CachedContextManager(name=found.lists[0]),
                )
                for found in stacks
            ]
    except AssertionError as error:
        raise Unsupported(f"block_cache: cache-dit does not fit {type(network).__name__} ({error}).") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No lines of a logger of cache-dit, which tells about every stack in every run."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _import() -> tuple[Any, Any, Any]:
    """Modules of cache-dit: adapters, contexts, settings.

    Raises:
        Unsupported: it is not installed, or a version with another inside.
    """
    try:
        import cache_dit  # noqa: PLC0415
        from cache_dit.caching import block_adapters, cache_contexts  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "cache_dit":
            raise Unsupported(f"block_cache: this version of cache-dit does not work here ({error}).") from error
        raise Unsupported("block_cache: dual_block needs cache-dit; pip install cache-dit.") from error
    except ImportError as error:
        raise Unsupported(f"block_cache: this version of cache-dit does not work here ({error}).") from error
    return block_adapters, cache_contexts, cache_dit

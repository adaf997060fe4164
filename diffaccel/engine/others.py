"""What others have put on a network before a run: caches that leave parts of it out, and weights offloaded in groups.

Read in diffusers 0.42: every hook stands in the registry of its module; only hooks with a `new_forward` may skip what they
stand around. The blocks of a group share the hooks of its first and last block, which load and unload all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from diffaccel.engine.flops import PartMeter, Place, count_through_calls
from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.models.compiled import is_compiled
from diffaccel.models.model_map import ModelMap
from diffaccel.models.transformers import TransformerLayout


def live_with_others(model: ModelMap, run: Run, seams: Seams) -> None:
    """Stand inside everything that methods will put on the networks: count what others do, load what others offload."""
    # a network compiled as a whole runs whole, and nothing may stand inside its graph
    whole = {
        id(net) for net, _ in (*model.denoisers, *model.controlnets) if is_compiled(net) or is_compiled(model.seat(net))
    }
    networks = [net for net, _ in (*model.denoisers, *model.controlnets) if id(net) not in whole]
    for left in count_through_calls(networks, seams):
        run.note(f"FLOPs of {left} inside compiled blocks are not counted, as far as torch does not know its kernels.")
    for network, layout in model.denoisers:
        parts = [] if id(network) in whole else _skipped_by_others(network, layout)
        if parts:
            run.meters[id(network)] = PartMeter(parts, seams)
    for network in networks:
        _Groups(network).attach(network, seams)


# --- caches ---


def _skipped_by_others(network: nn.Module, layout: Any) -> list[tuple[nn.Module, Place]]:
    """The parts of a network that something of the user's may leave out, each with the place of its own forward."""
    hooked = [module for module in network.modules() if _first_skipping(module) is not None]
    blocks = list(layout.blocks) if isinstance(layout, TransformerLayout) else []
    if not hooked and not (blocks and _is_replaced(network)):
        return []
    return [(module, _innermost(module)) for module in dict.fromkeys((*blocks, *hooked))]


def _is_replaced(network: nn.Module) -> bool:
    """Whether somebody stands around the network (cache-dit, ParaAttention) who may put other blocks in its place."""
    forward = vars(network).get("forward")
    return forward is not None and not any(name in vars(network) for name in ("_hf_hook", "_diffusers_hook"))


def _innermost(module: nn.Module) -> Place:
    """Where the module's own forward is called from, inside all hooks of diffusers."""
    registry: Any = vars(module).get("_diffusers_hook")
    if registry is None or not registry._fn_refs:
        return module, "forward"
    reference = registry._fn_refs[0]
    return reference, "forward" if reference.original_forward is None else "original_forward"


def _first_skipping(module: nn.Module) -> Any:
    registry: Any = vars(module).get("_diffusers_hook")
    hooks = () if registry is None else registry.hooks.values()
    return next((hook for hook in hooks if hasattr(hook, "new_forward")), None)


def enabled_cache(network: nn.Module) -> bool:
    """Whether the user enabled a cache of diffusers on this network."""
    return any(_first_skipping(module) is not None for module in network.modules())


# --- group offloading ---


class _Groups:
    """Offloaded groups of a network's modules: loaded also where the module that loads them does not run.

    A bypassed block takes its hooks with it. If it is the one that loads its group, the next block of the group that
    runs has the group loaded; what nobody unloads is unloaded when the call of the network is over.
    """

    def __init__(self, network: nn.Module) -> None:
        self.members = list(_group_members(network))
        self.loaded: dict[int, Any] = {}

    def attach(self, network: nn.Module, seams: Seams) -> None:
        """Watch all groups for one run."""
        for group in {id(group): group for _, group in self.members}.values():
            seams.replace(group, "onload_", self._noting(group, group.onload_, self.loaded.__setitem__))
            seams.replace(group, "offload_", self._noting(group, group.offload_, lambda key, _: self._forget(key)))
        for module, group in self.members:
            _stand_inside(module, functools.partial(self._ensuring, module, group), seams)
        if self.members:
            _stand_inside(network, self._clearing, seams)

    def _forget(self, key: int) -> None:
        self.loaded.pop(key, None)

    def _noting(self, group: Any, original: Callable[[], None], note: Callable[[int, Any], None]) -> Callable[[], None]:
        def move() -> None:
            original()
            note(id(group), group)

        # diffusers keeps these calls out of graphs too
        kept_out: Callable[[], None] = torch.compiler.disable(move)  # type: ignore[no-untyped-call]
        return kept_out

    def _ensuring(self, module: nn.Module, group: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if id(group) not in self.loaded and group.onload_leader not in (None, module):
                group.onload_()
            return forward(*args, **kwargs)

        return run

    def _clearing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            finally:
                for group in list(self.loaded.values()):
                    group.offload_()

        return run


def _stand_inside(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]], seams: Seams) -> None:
    """For all threads, as offloading is, and with the module's signature, which cache-dit reads."""
    name = "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
    seams.replace(module, name, make(getattr(module, name)))


def _group_members(network: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in network.modules():
        registry: Any = vars(module).get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            yield module, hook.group

"""What is applied to a network, kept on the network itself: base weights, hooks, and the order in which edits act."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel import seams
from diffaccel.erasure.edit import DTYPES, Edit, tensor_digest
from diffaccel.erasure.live import (
    FUSED,
    FusedMaps,
    LowRank,
    inside,
    live,
    map_text,
    maps_of,
    parent_of,
    render,
    require_plain,
    sites,
    stored_weight,
    unwrapped,
)
from diffaccel.errors import Unsupported

_HOME = "_diffaccel_edits"


class Applied(seams.Residence):
    """What is applied to one network; lives on it.

    Attributes:
        name: of the network in the pipeline.
        written: edits in the form of weights.
        mapped: edits in the form of maps.
        bases: weights before the first edit, by path in the network, on the CPU.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.bases = name, dict[str, Tensor]()
        self.written: tuple[Edit, ...] = ()
        self.mapped: tuple[Edit, ...] = ()
        self._plan: dict[str, list[LowRank]] = {}  # maps in front of projections, by path
        self._written_plan: dict[str, list[LowRank]] = {}  # maps in their weights
        self._rendered: dict[str, str] = {}  # digests of written weights
        self._links: list[_Link] = []

    @classmethod
    def of(cls, network: Any) -> Applied | None:
        found = getattr(network, _HOME, None)
        return found if isinstance(found, cls) else None

    @property
    def edits(self) -> tuple[Edit, ...]:
        return (*self.written, *self.mapped)

    def base_now(self, network: nn.Module, path: str) -> tuple[Tensor, Tensor]:
        """(base, current weight), both (d_out, d_in) on the CPU and of the dtype the network has now.

        Raises:
            Unsupported: the current weight is not what the written edits made of the base.
        """
        weight = stored_weight(unwrapped(live(network, path)))
        if weight is None:
            raise Unsupported(
                f"{path} has no weight in fp32, fp16 or bf16 any more, so its edits cannot be taken back."
            )
        current = weight.cpu()
        if path not in self.bases:
            return current, current
        base = self.bases[path]
        if base.dtype == current.dtype and tensor_digest(current) == self._rendered.get(path):
            return base, current
        expected = render(base, self._written_plan[path])
        for casts in _casts(base.dtype, current.dtype):
            # the base itself: its weights were loaded again, the edit is gone already
            if _same_bytes(_cast(expected, casts), current) or _same_bytes(_cast(base, casts), current):
                return _cast(base, casts), current
        raise Unsupported(
            f"the weight of {path} was changed by something else since the edit was applied (a merged LoRA, other weights "
            "loaded); take that back first, or load the model again."
        )

    def rewrite(self, network: nn.Module, written: Iterable[Edit], changed: Edit, undo: ExitStack) -> None:
        """Write every weight of `changed` as the edits in `written` make it; `undo` gets what takes that back."""
        after, seen = _plan(written), set[int]()
        for module in changed.modules:
            path = inside(module.name)
            projection = require_plain(network, path, "write the weights")
            base, current = self.base_now(network, path)
            weight = stored_weight(projection)
            assert weight is not None
            if weight.data_ptr() in seen:  # one projection under two names
                continue
            seen.add(weight.data_ptr())
            before = current.clone()
            undo.callback(self._undo, path, self.bases.get(path), weight, before)
            base = before if base is current else base
            maps = after.get(path, [])
            self.bases[path] = base
            value = finite(render(base, maps), changed) if maps else base
            seams.overwrite(weight, value)
            self._rendered[path] = tensor_digest(value)
            if not maps:
                del self.bases[path], self._rendered[path]

    def settle(self, network: nn.Module) -> None:
        """Bring hooks to where the edits ask for them; move in with the first edit and out with the last."""
        had_maps = bool(self._plan)
        self._plan, self._written_plan = _plan(self.mapped), _plan(self.written)
        for module in self.hooked:
            self.unhook(module)
        if had_maps or self._plan:
            _forget_graphs(network)
        if not self.edits:
            if Applied.of(network) is self:
                self.move_out(network, _HOME)
            return
        if Applied.of(network) is not self:
            self.move_in(network, _HOME)
        self.before(network, _Guard(self))
        self._hook(network)

    def follow(self, network: nn.Module) -> None:
        """Before each call: hooks go to where the projections are now; edits that would not reach them refuse.

        Raises:
            Unsupported: a LoRA was loaded on written weights.
        """
        if all(children.get(name) is module for children, name, module in self._links):
            return
        for module in self.hooked:
            if module is not network:
                self.unhook(module)
        self._hook(network)
        if self._plan:
            _forget_graphs(network)
        for path in self.bases:
            if unwrapped(module := live(network, path)) is not module:
                self._links = [({}, "", network)]  # look again before the next call
                raise Unsupported(
                    f"a LoRA was loaded on {path} after an edit had been written into its weights, and its own reading of "
                    "the prompt is not edited: unload it, or remove the edit and apply it with form='map'."
                )

    def _hook(self, network: nn.Module) -> None:
        for module, site in sites(network, self._plan).items():
            if isinstance(site, FusedMaps):
                self.after(module, _MapFused(site))
            else:
                self.before(module, _MapInput(site))
        self._links = _links(network, {*self._plan, *self.bases})

    def _undo(self, path: str, base: Tensor | None, weight: Tensor, before: Tensor) -> None:
        seams.overwrite(weight, before)
        self.bases.pop(path, None)
        self._rendered.pop(path, None)
        if base is not None:
            self.bases[path] = base


def base_weight(network: nn.Module, path: str) -> Tensor:
    """The weight (d_out, d_in) of a projection without any applied edit, on the CPU.

    Raises:
        Unsupported: there is none in fp32, fp16 or bf16, or something else changed it since an edit was applied.
    """
    applied = Applied.of(network)
    if applied is not None:
        return applied.base_now(network, path)[0]
    weight = stored_weight(unwrapped(live(network, path)))
    if weight is None:
        raise Unsupported(
            f"{path} has no weight in fp32, fp16 or bf16 (quantised, or not loaded); compute the edit on the plain model, "
            "and apply it here with form='map'."
        )
    return weight.cpu()


class _Guard:
    """Hook in front of the network."""

    def __init__(self, applied: Applied) -> None:
        self.applied = applied

    def __call__(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        self.applied.follow(network)


class _MapInput:
    """Hook in front of a projection."""

    def __init__(self, maps: list[LowRank]) -> None:
        self.maps = maps

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (map_text(args[0], self.maps), *args[1:]), kwargs


class _MapFused:
    """Hook behind a fused projection."""

    def __init__(self, maps: FusedMaps) -> None:
        self.maps = maps

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        return self.maps(args[0], module.forward, output)


# the children of one module, the name of one of them, and that child: a step on the way to a projection
_Link = tuple[Mapping[str, nn.Module | None], str, nn.Module | None]


def _links(network: nn.Module, paths: Iterable[str]) -> list[_Link]:
    """Every step on the way to the projections, and the fused copies beside them; another child means another model."""
    found: dict[tuple[int, str], _Link] = {}
    for path in paths:
        module = network
        for name in path.split("."):
            children: Mapping[str, nn.Module | None] = module._modules
            found[id(children), name] = children, name, module.get_submodule(name)
            module = module.get_submodule(name)
        beside = parent_of(network, path)[0]._modules
        found[id(beside), FUSED] = beside, FUSED, beside.get(FUSED)
    return list(found.values())


def _plan(edits: Iterable[Edit]) -> dict[str, list[LowRank]]:
    """Maps by path in the network."""
    return {inside(name): maps for name, maps in maps_of(edits).items()}


def _forget_graphs(network: nn.Module) -> None:
    """Compiled blocks do not look whether hooks came or went, so they are compiled again."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules()):
        torch.compiler.reset()


def finite(weight: Tensor, edit: Edit) -> Tensor:
    """The weight an edit makes; Unsupported if the edit is too much for its dtype."""
    if not bool(torch.isfinite(weight).all()):
        raise Unsupported(f"the {edit} would make weights infinite in {str(weight.dtype).removeprefix('torch.')}.")
    return weight


def _casts(before: torch.dtype, now: torch.dtype) -> list[tuple[torch.dtype, ...]]:
    """The casts by which `.to(dtype)` may have come from one dtype to another, directly or by a detour."""
    direct: tuple[torch.dtype, ...] = () if before == now else (now,)
    return [direct, *((via, now) for via in DTYPES.values() if via not in (before, now))]


def _cast(tensor: Tensor, casts: Iterable[torch.dtype]) -> Tensor:
    for dtype in casts:
        tensor = tensor.to(dtype)
    return tensor


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)

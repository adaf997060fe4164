"""What is applied to a network, kept on the network itself: base weights, hooks, and the order in which edits act."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.edits.concepts import UneditedControl
from diffaccel.edits.edit import Edit
from diffaccel.edits.live import (
    FUSED,
    NO_WEIGHT,
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
    weight_at,
)
from diffaccel.edits.parts import tensor_digest
from diffaccel.edits.routes import CONTROL
from diffaccel.engine import seams
from diffaccel.errors import Unsupported
from diffaccel.models.compiled import is_compiled

_HOME = "_diffaccel_edits"
_GLIMPSE = 16


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
        self._glimpse = torch.empty(0)  # of the written weights
        self._text: weakref.ref[Tensor] | None = None  # what the network read when they were looked at
        self._seen: Any = None  # traces of then
        self.told_of_control = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own weights: weak references cannot be copied everywhere."""
        return {**vars(self), "_text": None}

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
        weight = weight_at(network, path)
        if weight is None:
            raise Unsupported(f"{path} has {NO_WEIGHT} any more, so its edits cannot be taken back.")
        current = weight.cpu()
        if path not in self.bases:
            return current, current
        return self._origin(path, current)[0], current

    def _origin(self, path: str, current: Tensor) -> tuple[Tensor, bool]:
        """The base of a weight in its dtype of now, and whether the written edits are (still) in it.

        Raises:
            Unsupported: the weight is neither what they made of the base nor the base itself.
        """
        base = self.bases[path]
        if base.dtype == current.dtype and tensor_digest(current) == self._rendered.get(path):
            return base, True
        expected = render(base, self._written_plan[path])
        for casts in _casts(base.dtype, current.dtype):
            if _same_bytes(_cast(expected, casts), current):
                return _cast(base, casts), True
            if _same_bytes(_cast(base, casts), current):
                return _cast(base, casts), False
        raise Unsupported(
            f"the weight of {path} was changed by something else since the edit was applied (a LoRA that was merged, even "
            "if it was taken out again, or other weights loaded); take that back, or load the model again."
        )

    def rewrite(self, network: nn.Module, written: Iterable[Edit], changed: Edit, undo: ExitStack) -> None:
        """Write every weight of `changed` as the edits in `written` make it; `undo` gets what takes that back."""
        written = list(written)
        after, seen = _plan(written), set[int]()
        coming = changed in written
        for module in changed.modules:
            path = inside(module.name)
            projection = require_plain(network, path, "write the weights" if coming else "take the edit back")
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
        torch.clear_autocast_cache()  # an open `autocast` would go on with its copies of the old weights
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
        self._glimpse, self._text = self._look(network), None
        self.before(network, _Guard(self))
        self._hook(network)

    def follow(self, network: nn.Module, text: Any = None) -> None:
        """Before each call: hooks go to where the projections are now; edits that would not reach them refuse.

        Args:
            text: what the network reads; written weights are looked at once for each, and after anything else that shows.
        Raises:
            Unsupported: a LoRA was loaded on written weights, or they are others now.
        """
        self._follow_modules(network)
        if not self.bases or torch.compiler.is_compiling():
            return
        traces = self._traces(network)
        if self._text is None or self._text() is not text or traces != self._seen:
            self._follow_weights(network)
            self._text, self._seen = weakref.ref(text) if isinstance(text, Tensor) else None, traces

    def _traces(self, network: nn.Module) -> tuple[Any, list[int]]:
        """What shows without a look at the numbers that adapters came or went, or that weights were written."""
        weights = [getattr(module, "weight", None) for _, _, module in self._links]
        versions = [w._version for w in weights if isinstance(w, Tensor) and not w.is_inference()]
        return getattr(network, "_hf_peft_config_loaded", None), versions

    def _follow_weights(self, network: nn.Module) -> None:
        """A LoRA that was merged and unloaded leaves no trace but the weights; few numbers of each tell."""
        seen = self._look(network)
        if _same_bytes(seen.to(self._glimpse.device), self._glimpse):
            return
        for path in self.bases:
            weight = weight_at(network, path)
            if weight is not None and not self._origin(path, weight.cpu())[1]:
                raise Unsupported(
                    f"the weight of {path} was loaded again since an edit was written into it, so the edit is gone: remove "
                    "it, and apply it again."
                )
        self._glimpse = seen

    def _look(self, network: nn.Module) -> Tensor:
        """Sixteen numbers, spread evenly, of each written weight that is in memory; on the device of the first."""
        found = [weight for path in self.bases if (weight := weight_at(network, path)) is not None]
        rows = [flat[:: max(1, len(flat) // _GLIMPSE)][:_GLIMPSE] for flat in (weight.reshape(-1) for weight in found)]
        return torch.cat([row.to(rows[0].device) for row in rows]) if rows else torch.empty(0)

    def _follow_modules(self, network: nn.Module) -> None:
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
    weight = weight_at(network, path)
    if weight is None:
        raise Unsupported(
            f"{path} has {NO_WEIGHT}; compute the edit on the plain model, and apply it here with form='map'."
        )
    return weight.cpu()


class _Guard:
    """Hook in front of the network."""

    def __init__(self, applied: Applied) -> None:
        self.applied = applied

    def __call__(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        self.applied.follow(network, kwargs.get("encoder_hidden_states"))
        if not self.applied.told_of_control and any(kwargs.get(name) is not None for name in _CONTROLS):
            tell_of_control(self.applied)


# what a ControlNet hands to a UNet, to SD3's and to FLUX's transformer
_CONTROLS = ("mid_block_additional_residual", "block_controlnet_hidden_states", "controlnet_block_samples")


def tell_of_control(applied: Applied) -> None:
    """Warn, once for each network, that a ControlNet beside it is not edited."""
    applied.told_of_control = True
    warnings.warn(f"{CONTROL} A concept that was erased may come back by it.", UneditedControl, stacklevel=2)


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
    if any(is_compiled(module) for module in network.modules()):
        torch.compiler.reset()


def finite(weight: Tensor, edit: Edit) -> Tensor:
    """The weight an edit makes; Unsupported if the edit is too much for its dtype."""
    if not bool(torch.isfinite(weight).all()):
        raise Unsupported(f"the {edit} would make weights infinite in {str(weight.dtype).removeprefix('torch.')}.")
    return weight


def _casts(before: torch.dtype, now: torch.dtype) -> list[tuple[torch.dtype, ...]]:
    """The casts by which `.to(dtype)` may have come from one dtype to another, directly or by detours.

    Detours over fp32 lose nothing; after one over each of the others, a second one over the same loses nothing more.
    """
    half = (torch.float16, torch.bfloat16)
    detours: list[tuple[torch.dtype, ...]] = [(), *((one,) for one in half), half, half[::-1]]
    chains = [(*detour, now) for detour in detours]
    return [chain[1:] if chain[0] == before else chain for chain in chains]


def _cast(tensor: Tensor, casts: Iterable[torch.dtype]) -> Tensor:
    for dtype in casts:
        tensor = tensor.to(dtype)
    return tensor


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)

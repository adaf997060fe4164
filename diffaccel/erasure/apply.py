"""apply_edit and remove_edit: edits on a pipeline until they are taken back, in one of two forms.

- "weights": every edited weight is computed from the stored base by all applied edits, in an order fixed by their digests,
  so the bytes do not depend on the order of applying. The base is kept (on the CPU); when no edit is left it comes back.
- "map": hooks map what the projections read. For LoRA, quantised or fused models; nothing is written.

What is applied lives on the edited network itself: pipelines that share it agree, and a deepcopy can be undone like the
original. Before each call of the network it is checked that the edit still acts: where a LoRA was loaded or projections
were fused since, hooks follow; written weights, which would not reach them, refuse the call.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffaccel import seams
from diffaccel.erasure.edit import DTYPES, Edit, EditError, load_edit
from diffaccel.erasure.live import (
    FusedMaps,
    LowRank,
    check_base,
    fits,
    live,
    map_text,
    maps_of,
    network_of,
    render,
    require_plain,
    sites,
    stored_weight,
    unwrapped,
)
from diffaccel.errors import Unsupported

Form = Literal["weights", "map"]
FORMS = ("weights", "map")
_HOME = "_diffaccel_edits"


def apply_edit(pipe: Any, edit: Edit | str | os.PathLike[str], *, form: Form | str = "weights") -> Edit:
    """Apply an edit until `remove_edit`; either all of it or, on any error, nothing.

    Args:
        pipe: the pipeline it was made on, or another one with the same network in fp32, fp16 or bf16.
        edit: what `erase` returned, or the file of one.
        form: "weights" writes the projections; "map" changes what they read (LoRA, quantised or fused models).
    Returns:
        The edit, read from its file if it was one.
    Raises:
        EditError: the file is unreadable or unsound, or there is no such form.
        Unsupported: another base, applied already, or something is in the way that the sentence names.
    """
    edit = _read(edit)
    if form not in FORMS:
        raise EditError(f"an edit is applied in the form 'weights' or 'map', not {form!r}.")
    name, network = network_of(pipe, edit)
    check_fit(network, edit, form)
    applied = _Applied.of(network) or _Applied(name)
    with _all_or_nothing(network, applied) as undo:
        if form == "weights":
            applied.rewrite(network, [*applied.written, edit], edit, undo)
            applied.written = (*applied.written, edit)
        else:
            applied.mapped = (*applied.mapped, edit)
        applied.settle(network)
    return edit


def remove_edit(pipe: Any, edit: Edit | str | os.PathLike[str]) -> None:
    """Take one edit back; the others stay. Without any edit left, the weights have the bytes they had before the first.

    Raises:
        EditError: the file is unreadable or unsound.
        Unsupported: it is not applied, or the weights were changed by something else since; nothing is changed.
    """
    edit = _read(edit)
    network: Any = getattr(pipe, edit.modules[0].name.split(".")[0], None)
    network = getattr(network, "_orig_mod", network)  # compiled as a whole since
    applied = _Applied.of(network)
    if applied is None or edit not in applied.edits:
        raise Unsupported(f"the {edit} is not applied to this {type(pipe).__name__}.")
    with _all_or_nothing(network, applied) as undo:
        if edit in applied.written:
            rest = tuple(other for other in applied.written if other != edit)
            applied.rewrite(network, rest, edit, undo)
            applied.written = rest
        applied.mapped = tuple(other for other in applied.mapped if other != edit)
        applied.settle(network)


def applied_edits(pipe: Any) -> tuple[tuple[Edit, Form], ...]:
    """The edits on a pipeline's networks and their forms, in no particular order."""
    networks = [getattr(pipe, name, None) for name in ("unet", "transformer")]
    found = [_Applied.of(getattr(network, "_orig_mod", network)) for network in networks]
    both = [one for one in found if one is not None]
    return (
        *((edit, "weights") for one in both for edit in one.written),
        *((e, "map") for one in both for e in one.mapped),
    )


def check_fit(network: nn.Module, edit: Edit, form: str, *, bases: bool = True) -> None:
    """Whether an edit can be applied to a network now.

    In the form "map", projections without a plain weight (quantised, LoRA merged into them) are known by their width only.

    Args:
        bases: compare the weights with the ones on which the edit was made.
    Raises:
        Unsupported: it cannot, with the reason.
    """
    applied = _Applied.of(network)
    if applied is not None and edit in applied.edits:
        raise Unsupported(f"the {edit} is applied already; once is enough.")
    for module in edit.modules:
        path = _inside(module.name)
        if form == "weights":
            require_plain(network, path, "write the weights")
        if not fits(network, module):
            raise Unsupported(f"the {edit} does not fit: {module.name} does not read {module.shape[1]} numbers.")
        weight = _base(network, applied, path, form) if bases else None
        if weight is not None:
            check_base(weight, module, edit)


def _base(network: nn.Module, applied: _Applied | None, path: str, form: str) -> Tensor | None:
    """The weight before all edits, (d_out, d_in); None where a map goes in front of something else."""
    outer = live(network, path)
    if applied is not None and path in applied.bases:
        return applied.bases[path] if form == "map" else applied.base_now(network, path)[0]
    return None if getattr(outer, "merged", False) else stored_weight(unwrapped(outer))


class _Applied(seams.Residence):
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
        self._plan: dict[str, list[LowRank]] = {}

    @classmethod
    def of(cls, network: Any) -> _Applied | None:
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
        expected = render(base, self._maps(path))
        for casts in _casts(base.dtype, current.dtype):
            if _same_bytes(_cast(expected, casts), current):
                return _cast(base, casts), current
        raise Unsupported(
            f"the weight of {path} was changed by something else since the edit was applied (a merged LoRA, other weights "
            "loaded); take that back first, or load the model again."
        )

    def rewrite(self, network: nn.Module, written: Iterable[Edit], changed: Edit, undo: ExitStack) -> None:
        """Write every weight of `changed` as the edits in `written` make it; `undo` gets what takes that back."""
        after, seen = maps_of(written), set[int]()
        for module in changed.modules:
            path = _inside(module.name)
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
            maps = after.get(module.name, [])
            self.bases[path] = base
            seams.overwrite(weight, _finite(render(base, maps), changed) if maps else base)
            if not maps:
                del self.bases[path]

    def settle(self, network: nn.Module) -> None:
        """Bring hooks to where the edits ask for them; move in with the first edit and out with the last."""
        had_maps = bool(self._plan)
        self._plan = {_inside(name): maps for name, maps in maps_of(self.mapped).items()}
        for module in self.hooked:
            self.unhook(module)
        if had_maps or self._plan:
            _forget_graphs(network)
        if not self.edits:
            if _Applied.of(network) is self:
                self.move_out(network, _HOME)
            return
        if _Applied.of(network) is not self:
            self.move_in(network, _HOME)
        self.before(network, _Guard(self))
        self._hook(network)

    def follow(self, network: nn.Module) -> None:
        """Before each call: hooks go to where the projections are now; edits that would not reach them refuse.

        Raises:
            Unsupported: a LoRA was loaded on written weights.
        """
        if sites(network, self._plan).keys() != set(self.hooked) - {network}:
            for module in self.hooked:
                if module is not network:
                    self.unhook(module)
            self._hook(network)
            _forget_graphs(network)
        for path in self.bases:
            if unwrapped(module := live(network, path)) is not module:
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

    def _maps(self, path: str) -> list[LowRank]:
        return maps_of(self.written).get(f"{self.name}.{path}", [])

    def _undo(self, path: str, base: Tensor | None, weight: Tensor, before: Tensor) -> None:
        seams.overwrite(weight, before)
        self.bases.pop(path, None)
        if base is not None:
            self.bases[path] = base


class _Guard:
    """Hook in front of the network."""

    def __init__(self, applied: _Applied) -> None:
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


@contextmanager
def _all_or_nothing(network: nn.Module, applied: _Applied) -> Iterator[ExitStack]:
    """Gives a stack of what takes written weights back, which an error runs; an error also restores what was applied."""
    before = applied.written, applied.mapped
    with ExitStack() as undo:
        try:
            yield undo
        except BaseException:
            undo.close()
            applied.written, applied.mapped = before
            applied.settle(network)
            raise
        undo.pop_all()


def _forget_graphs(network: nn.Module) -> None:
    """Compiled blocks do not look whether hooks came or went, so they are compiled again."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules()):
        torch.compiler.reset()


def _read(edit: Edit | str | os.PathLike[str]) -> Edit:
    return edit if isinstance(edit, Edit) else load_edit(edit)


def _inside(name: str) -> str:
    """Path inside the network."""
    return name.split(".", 1)[1]


def _finite(weight: Tensor, edit: Edit) -> Tensor:
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

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
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from diffaccel.edits.applied import Applied, finite, tell_of_control
from diffaccel.edits.edit import Edit, load_edit
from diffaccel.edits.live import (
    check_base,
    fits,
    inside,
    live,
    maps_of,
    network_of,
    render,
    require_plain,
    weight_at,
)
from diffaccel.edits.parts import EditError
from diffaccel.errors import Unsupported

Form = Literal["weights", "map"]
FORMS = ("weights", "map")
_ONE_AT_A_TIME = threading.RLock()  # what is applied to a network changes in several steps


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

    Warns:
        UneditedControl: a ControlNet reads the prompt too; said again at a call if one comes later.
    """
    edit = _read(edit)
    check_form(form)
    name, network = network_of(pipe, edit)
    with _ONE_AT_A_TIME:
        _add(network, name, edit, form)
    applied = Applied.of(network)
    if applied is not None and getattr(pipe, "controlnet", None) is not None:
        tell_of_control(applied)
    return edit


def _add(network: nn.Module, name: str, edit: Edit, form: Form | str) -> None:
    check_fit(network, edit, form)
    applied = Applied.of(network) or Applied(name)
    with _all_or_nothing(network, applied) as undo:
        if form == "weights":
            applied.rewrite(network, [*applied.written, edit], edit, undo)
            applied.written = (*applied.written, edit)
        else:
            applied.mapped = (*applied.mapped, edit)
        applied.settle(network)


def remove_edit(pipe: Any, edit: Edit | str | os.PathLike[str]) -> None:
    """Take one edit back; the others stay. Without any edit left, the weights have the bytes they had before the first.

    Raises:
        EditError: the file is unreadable or unsound.
        Unsupported: it is not applied, or the weights were changed by something else since; nothing is changed.
    """
    try:
        edit = _read(edit)
    except EditError as error:
        if not applied_edits(pipe):
            raise
        raise EditError(f"{str(error)[:-1]}; diffaccel.erasure.applied_edits lists the edits to take back.") from None
    network: Any = getattr(pipe, edit.modules[0].name.split(".")[0], None)
    network = getattr(network, "_orig_mod", network)  # compiled as a whole since
    with _ONE_AT_A_TIME:
        applied = Applied.of(network)
        if applied is None or edit not in applied.edits:
            raise Unsupported(f"the {edit} is not applied to this {type(pipe).__name__}.")
        _drop(network, applied, edit)


def _drop(network: nn.Module, applied: Applied, edit: Edit) -> None:
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
    found = [Applied.of(getattr(network, "_orig_mod", network)) for network in networks]
    both = [one for one in found if one is not None]
    return (
        *((edit, "weights") for one in both for edit in one.written),
        *((e, "map") for one in both for e in one.mapped),
    )


def check_form(form: str) -> None:
    """Raises EditError unless there is such a form."""
    if form not in FORMS:
        raise EditError(f"an edit is applied in the form 'weights' or 'map', not {form!r}.")


def check_fit(network: nn.Module, edit: Edit, form: str, *, bases: bool = True) -> None:
    """Whether an edit can be applied to a network now.

    In the form "map", projections without a plain weight (quantised, LoRA merged into them) are known by their width only.

    Args:
        bases: compare the weights with the ones on which the edit was made.
    Raises:
        Unsupported: it cannot, with the reason.
    """
    applied = Applied.of(network)
    if applied is not None and edit in applied.edits:
        raise Unsupported(f"the {edit} is applied already; once is enough.")
    names = {text_map.modules[0].name for text_map in edit.maps}  # one of each map tells whether its numbers are sane
    first = {name: maps for name, maps in maps_of([edit]).items() if name in names}
    for module in edit.modules:
        path = inside(module.name)
        if form == "weights":
            require_plain(network, path, "write the weights", ", or apply the edit with form='map'")
        if not fits(network, module):
            raise Unsupported(f"the {edit} does not fit: {module.name} does not read {module.shape[1]} numbers.")
        weight = _base(network, applied, path) if bases else None
        if weight is not None:
            check_base(weight, module, edit)
            if module.name in first:
                finite(render(weight, first[module.name]), edit)


def _base(network: nn.Module, applied: Applied | None, path: str) -> Tensor | None:
    """The weight before all edits, (d_out, d_in); None where a map goes in front of something else."""
    outer = live(network, path)
    if applied is not None and path in applied.bases:
        return applied.bases[path]
    return None if getattr(outer, "merged", False) else weight_at(network, path)


@contextmanager
def _all_or_nothing(network: nn.Module, applied: Applied) -> Iterator[ExitStack]:
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


def _read(edit: Edit | str | os.PathLike[str]) -> Edit:
    if not isinstance(edit, Edit | str | os.PathLike):
        raise EditError(f"an edit is what erase returned, or the file of one, not {type(edit).__name__}.")
    return edit if isinstance(edit, Edit) else load_edit(edit)

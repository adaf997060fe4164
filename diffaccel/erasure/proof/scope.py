"""What a proof does to a pipeline lasts as long as the proof."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffaccel.edits.edit import Edit
from diffaccel.edits.live import network_of
from diffaccel.engine.seams import Seams


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Give back scheduler, progress bar and the pipeline's own variables as they were."""
    before = dict(vars(pipe))
    with Seams() as seams:
        if getattr(pipe, "scheduler", None) is not None:
            seams.replace(pipe, "scheduler", copy.deepcopy(pipe.scheduler))
        if hasattr(pipe, "progress_bar"):
            seams.replace(pipe, "_progress_bar_config", {"disable": True})
        try:
            yield
        finally:
            for name in set(vars(pipe)) - set(before) - {"_progress_bar_config"}:
                object.__delattr__(pipe, name)
            for name, value in before.items():
                if value is None or isinstance(value, (bool, int, float, str)):
                    object.__setattr__(pipe, name, value)


@contextmanager
def without_edit(pipe: Any, edit: Any, form: str) -> Iterator[Callable[[], Any]]:
    """The pipeline without this edit; gives what applies it for a while. At the end it is applied if it was before.

    Raises:
        EditError: there is no such form.
        Unsupported: the edit could not be applied, said before anything is drawn.
    """
    from diffaccel.edits.apply import applied_edits, apply_edit, remove_edit  # noqa: PLC0415

    @contextmanager
    def applied() -> Iterator[None]:
        apply_edit(pipe, edit, form=form)
        try:
            yield
        finally:
            remove_edit(pipe, edit)

    forms = [form for other, form in applied_edits(pipe) if other == edit]
    if forms:
        remove_edit(pipe, edit)
    try:
        if isinstance(edit, Edit):
            _check(pipe, edit, form)
        yield applied
    finally:
        if forms:
            apply_edit(pipe, edit, form=forms[0])


def _check(pipe: Any, edit: Edit, form: str) -> None:
    from diffaccel.edits.apply import check_fit, check_form  # noqa: PLC0415

    check_form(form)
    check_fit(network_of(pipe, edit)[1], edit, form)

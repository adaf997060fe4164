"""Pictures with NaN or infinite values: found before the pipeline makes ordinary files of them, black or damaged ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import DiffaccelError

# The last step of pipelines, by the name of its owner: what it gets is not yet cut to [0, 1] and 8 bits.
_LAST = {"image_processor": "postprocess", "video_processor": "postprocess_video"}
_HINT = "float16 is too short for some models: bfloat16 or float32 often helps (--dtype)"


class BrokenPicture(DiffaccelError):
    """A picture that holds NaN or infinite values."""


def refuse_these(broken: Sequence[int], images: int) -> None:
    """Raise `BrokenPicture` if any of so many pictures is broken; which ones, from 0."""
    if broken:
        raise BrokenPicture(f"{sentence(broken, images)}; {_HINT}.")


def sentence(broken: Sequence[int], images: int) -> str:
    """Which of so many pictures are broken, without a full stop."""
    which = "the picture holds" if images == 1 else f"picture {broken[0] + 1} of {images} holds"
    if len(broken) > 1:
        which = f"{len(broken)} of {images} pictures hold"
    return f"{which} values that are not finite (NaN or infinite) and would be black or damaged"


def watch_pictures(pipe: Any, run: Run, seams: Seams) -> None:
    """Note in the run which pictures are finite, when the pipeline hands them to its image processor."""
    for owner, name in _LAST.items():
        if hasattr(getattr(pipe, owner, None), name):
            seams.wrap_method(getattr(pipe, owner), name, functools.partial(_look, run))


def _look(run: Run, original: Any, *args: Any, **kwargs: Any) -> Any:
    given = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(given, torch.Tensor):
        run.finite += _rows(given)
    return original(*args, **kwargs)


def watch_result(run: Run, result: Any) -> None:
    """The same for a pipeline without an image processor that returns tensors or arrays; says what is broken in a note."""
    first = _first(result)
    if not run.finite and isinstance(first, (torch.Tensor, np.ndarray)) and first.ndim:
        run.finite += _rows(torch.as_tensor(first))
    if broken := broken_pictures(run):
        run.note(f"{sentence(broken, decoded_pictures(run))}; {_HINT}.")


def _first(result: Any) -> Any:
    values = tuple(result.values()) if isinstance(result, Mapping) else result
    return values[0] if isinstance(values, tuple) and values else None


def _rows(pictures: torch.Tensor) -> list[bool]:
    """Whether each is finite: (n, ...) to n."""
    found: list[bool] = torch.isfinite(pictures).reshape(len(pictures), -1).all(dim=1).tolist()
    return found


def broken_pictures(run: Run) -> tuple[int, ...]:
    """Which pictures of the call are not finite, from 0. One bad frame breaks a picture of several."""
    each = max(1, len(run.finite) // decoded_pictures(run))
    return tuple(sorted({row // each for row, finite in enumerate(run.finite) if not finite}))


def decoded_pictures(run: Run) -> int:
    """How many pictures the call has decoded; at least 1."""
    seen = len(run.finite)
    return run.images if run.images and seen % run.images == 0 else max(1, seen)

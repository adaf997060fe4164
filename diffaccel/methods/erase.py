"""Concept erasure while the recipe runs: what the text projections read is mapped, and the weights stay as they are.

An edit (`diffaccel.erase`, Gandikota et al., "Unified Concept Editing", arXiv 2308.14761, and its successors) multiplies
weights from the right, W (I + L R); here every edited projection is given x + L (R x) instead of x, which is the same. So
it works beside LoRA, quantised weights and fused projections, and outside a wrapped call nothing is erased.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from pydantic import Field, PrivateAttr, field_validator
from torch import nn

from diffaccel.edits.apply import check_fit
from diffaccel.edits.edit import Edit, load_edit
from diffaccel.edits.live import (
    FusedMaps,
    LowRank,
    Site,
    inside,
    live,
    map_text,
    maps_of,
    network_of,
    sites,
    unwrapped,
)
from diffaccel.edits.routes import CONTROL
from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import RecipeError
from diffaccel.models.model_map import ModelMap


@register
class Erase(Method):
    """Erase concepts during wrapped calls.

    Attributes:
        file: an edit saved by `Edit.save`. A relative path starts at the working directory; in a recipe file it starts at
            the folder of that file, which it must not leave: recipes may come from strangers, and they name no other files
            of this machine.
        strength: 1 erases as solved; less erases less; off: 0, or no file.

    Paper: the one of the edit (`Edit.method`): UCE, arXiv 2308.14761; RECE, arXiv 2407.12383; SPEED, arXiv 2503.07392; MACE,
    arXiv 2403.06135.
    """

    name: ClassVar[str] = "erase"
    layer: ClassVar[Layer] = Layer.ATTENTION

    file: str | None = Field(default=None, min_length=1)
    strength: float = Field(default=1.0, ge=0, le=1)
    _folder: Path = PrivateAttr(default=Path())  # where relative paths start

    @field_validator("file", mode="before")
    @classmethod
    def _as_text(cls, file: object) -> object:
        return os.fspath(file) if isinstance(file, os.PathLike) else file

    @property
    def is_off(self) -> bool:
        return self.file is None or self.strength == 0

    def check(self, model: ModelMap) -> None:
        if self.file is not None:
            edit = _load(str(self._path))
            _, network = network_of(model.pipe, edit)
            _check(network, edit)

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        edit = _load(str(self._path))
        _, network = network_of(model.pipe, edit)
        _check(network, edit)  # weights or adapters may have come since wrap()
        found = sites(network, self._plan(edit))
        for module, site in found.items():
            seams.replace_forward(module, functools.partial(_reader, site))
        run.counters[self.name] = {"projections": len(edit.modules), "concepts": len(edit.concepts)}
        if getattr(model.pipe, "controlnet", None) is not None:
            run.note(CONTROL)

    def _plan(self, edit: Edit) -> dict[str, list[LowRank]]:
        plan = {inside(name): maps for name, maps in maps_of([edit]).items()}
        if self.strength == 1:
            return plan
        weaker = {
            low: LowRank(self.strength * low.left, low.right, low.columns) for maps in plan.values() for low in maps
        }
        return {path: [weaker[low] for low in maps] for path, maps in plan.items()}

    def __eq__(self, other: object) -> bool:
        """By the settings, wherever the recipe was read from."""
        return isinstance(other, Erase) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash((self.file, self.strength))

    def located(self, folder: Path) -> Erase:
        """For a recipe file in `folder`.

        Raises:
            RecipeError: the edit lies outside of it.
        """
        if self.file is None:
            return self
        if Path(self.file).is_absolute() or not (folder / self.file).resolve().is_relative_to(folder.resolve()):
            raise RecipeError(
                f"erase.file: a recipe file can only name edits in its own folder or below (got {self.file!r}); put the "
                "edit there, or build the recipe in Python."
            )
        found = self.model_copy()
        found._folder = folder
        return found

    def portable(self, folder: Path) -> Erase:
        """As it is written to a recipe file in `folder`: names of files that exist become relative to it.

        Raises:
            RecipeError: the edit lies outside of it, so that the recipe could not be loaded.
        """
        if self.file is None:
            return self
        path, folder = self._path.resolve(), folder.resolve()
        if path.is_relative_to(folder):
            return self.model_copy(update={"file": path.relative_to(folder).as_posix()})
        if path.exists() or Path(self.file).is_absolute() or ".." in Path(self.file).parts:
            raise RecipeError(
                f"erase.file: a recipe file can only name edits in its own folder or below; save the recipe beside "
                f"{self.file!r}."
            )
        return self  # a file that is not there yet

    @property
    def _path(self) -> Path:
        assert self.file is not None
        return self._folder / self.file


class _Reader:
    """What stands for the `forward` of a projection."""

    def __init__(self, site: Site, original: Any) -> None:
        self.site, self.original = site, original


def _read_mapped(reader: _Reader, x: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(reader.site, FusedMaps):
        return reader.site(x, reader.original)
    return reader.original(map_text(x, reader.site), *args, **kwargs)


def _reader(site: Site, original: Any) -> Any:
    # a bound method of one shared function, so that compiled blocks share their graphs
    return MethodType(_read_mapped, _Reader(site, original))


def _load(file: str) -> Edit:
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return load_edit(file)  # which says why it cannot be read
    return _load_version(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _load_version(file: str, changed: int, size: int) -> Edit:
    return load_edit(file)


_CHECKED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _check(network: nn.Module, edit: Edit) -> None:
    """`check_fit`, without reading all weights again while they are the same."""
    weights = [getattr(unwrapped(live(network, inside(m.name))), "weight", None) for m in edit.modules]
    state = (edit.digest, [(id(w), getattr(w, "_version", None)) for w in weights])
    check_fit(network, edit, "map", bases=_CHECKED.get(network) != state)
    _CHECKED[network] = state

"""Edits with random maps for the tiny pipelines."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from diffaccel.edits.concepts import Concept
from diffaccel.edits.edit import Edit
from diffaccel.edits.parts import EditedModule, TextMap
from diffaccel.edits.routes import find_routes

VALUES = ("value", "both")
ALL = ("key", *VALUES)


def tiny_of(kind: str) -> Any:
    """The module that builds this kind of pipeline."""
    return importlib.import_module("tiny" if kind.startswith("sd") and "sd3" not in kind else "tiny_transformers")


def weights_of(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights of the denoiser."""
    return {name: value.detach().clone() for name, value in denoiser(pipe).state_dict().items()}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def same_weights(pipe: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether the weights have these bytes (those of copies that fusing makes do not count)."""
    now = denoiser(pipe).state_dict()
    return all(
        now[name].dtype == value.dtype
        and torch.equal(now[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8))
        for name, value in before.items()
    )


def random_edit(
    pipe: Any, seed: int = 0, *, rank: int = 2, size: float = 0.3, roles: tuple[str, ...] = ALL, target: str = ""
) -> Edit:
    """An edit of every route of a pipeline by random maps, on projections with these roles."""
    maker, maps = torch.Generator().manual_seed(seed), []
    for route in find_routes(pipe):
        left, right = (size * torch.randn(*s, generator=maker) for s in ((route.width, rank), (rank, route.width)))
        modules = tuple(
            EditedModule.of(item.name, item.module.weight, item.reader.columns)
            for item in route.projections
            if item.reader.role in roles
        )
        if modules:
            maps.append(TextMap(route.name, left, right, modules))
    return Edit(
        method="uce",
        concepts=(Concept(target=target or f"circle {seed}", synonyms=(("disc", 0.5),), anchor="shape"),),
        keep=("square", "a red heart"),
        parameters={"scale": 0.5, "rounds": [1, 2]},
        diagnostics={"seconds": 0.25},
        leaks=("Pictures given with the prompt are not edited.",),
        pipeline=type(pipe).__name__,
        versions={"torch": "2"},
        maps=tuple(maps),
    )


def mapped(edit: Edit, route: str, x: torch.Tensor) -> torch.Tensor:
    """What the edit makes of text rows (..., d) of a route, row by row in float64."""
    for text_map in edit.maps:
        if text_map.route == route:
            rows = x.double().reshape(-1, x.shape[-1])
            done = [row + text_map.left.double() @ (text_map.right.double() @ row) for row in rows]
            return torch.stack(done).reshape(x.shape).to(x.dtype)
    return x

"""From what a user gives as a recipe to a `Recipe`: a name, a file, methods, or a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffaccel.engine.method import Method
from diffaccel.errors import RecipeError
from diffaccel.recipes.recipe import OFF, Recipe


def resolve_recipe(recipe: Recipe | str | os.PathLike[str] | Method | Sequence[Method]) -> Recipe:
    """A `Recipe` from any accepted form: recipe, method or list of methods, preset name, path to a JSON file.

    Raises:
        RecipeError: an unknown name that is no file either, or a list holding something else than methods.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, os.PathLike)):
        return _named_or_file(recipe)
    if not isinstance(recipe, (Method, Sequence)):
        raise RecipeError(f"a recipe is a name, a file, methods or a Recipe, not {type(recipe).__name__}.")
    methods = (recipe,) if isinstance(recipe, Method) else tuple(recipe)
    for method in methods:
        if not isinstance(method, Method):
            raise RecipeError(f"a recipe is made of methods; {method!r} is none.")
    return Recipe(methods=methods)


def _named_or_file(recipe: str | os.PathLike[str]) -> Recipe:
    if recipe == OFF.name:
        return OFF
    from diffaccel.recipes.presets import presets  # noqa: PLC0415  (it loads the methods)

    known = presets()
    if isinstance(recipe, str) and recipe in known:
        return known[recipe]
    if Path(recipe).suffix == ".json" or Path(recipe).is_file():
        return Recipe.load(recipe)
    raise RecipeError(f"unknown recipe {os.fspath(recipe)!r}; presets are {', '.join(known)}, or give a .json file.")

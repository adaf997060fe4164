"""Recipes on the page: from presets, switches and files, and a sentence that says what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

from diffaccel.demo.engine import Engine, PageError
from diffaccel.demo.fields import show_recipe
from diffaccel.demo.sessions import Session
from diffaccel.errors import DiffaccelError
from diffaccel.files.output import safe_name
from diffaccel.files.text import decode
from diffaccel.recipes.presets import presets
from diffaccel.recipes.recipe import Recipe, each_once

MOST_BYTES = 64 * 1024
CUSTOM = "custom"


def for_model(recipe: Recipe, engine: Engine, model: str) -> Recipe:
    """The recipe as it runs on this kind of denoiser."""
    return recipe.on_transformers() if engine.is_transformer(model) else recipe.on_unets()


def preset(name: str, engine: Engine, model: str) -> Recipe:
    """A named recipe for a model. Raises `PageError` for an unknown name."""
    known = presets()
    if name not in known:
        raise PageError(f"There is no preset {name!r}; choose one of {', '.join(known)}.")
    return for_model(known[name], engine, model)


def from_text(text: object, engine: Engine, model: str) -> Recipe:
    """From JSON, or from a preset's name.

    Raises:
        PageError, RecipeError: too long, no JSON, or no valid recipe.
    """
    if not isinstance(text, str):
        raise PageError("A recipe is the name of a preset or JSON as text.")
    if text.strip() in presets():
        return preset(text.strip(), engine, model)
    if len(text.encode(errors="replace")) > MOST_BYTES:
        raise PageError(f"This recipe is larger than {MOST_BYTES // 1024} KB, which no recipe is.")
    try:
        data = json.loads(text, object_pairs_hook=each_once)
    except RecursionError as error:
        raise PageError("This recipe is no valid JSON: it is nested too deeply.") from error
    except ValueError as error:  # also a key given twice, and a number with thousands of digits
        raise PageError(f"This recipe is no valid JSON: {str(error).partition(';')[0]}.") from error
    recipe = Recipe.from_dict(data)
    show_recipe(for_model(recipe, engine, model))  # refuses methods that name files: the server has its own
    return for_model(recipe, engine, model)


def from_file(path: str | Path, engine: Engine, model: str) -> Recipe:
    """From an uploaded file; no more of it is read than a recipe may have.

    Raises:
        PageError, RecipeError: as `from_text`, or no text file.
    """
    with Path(path).open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    try:
        return from_text(decode(data) if len(data) <= MOST_BYTES else "x" * len(data), engine, model)
    except UnicodeDecodeError as error:
        raise PageError("This file is no recipe: it is not text.") from error


def complaint(recipe: Recipe, engine: Engine, model: str) -> str:
    """Why the recipe cannot run on the model, if that model is in memory and somebody knows; else empty."""
    known = engine.known_map(engine.resolve(model))
    if known is None:
        return ""
    try:
        for method in recipe.methods:
            method.check(known)
    except DiffaccelError as error:
        return str(error)
    return ""


def save(recipe: Recipe, session: Session) -> Path:
    """The recipe as a file of the session, for download."""
    folder = session.folder / "recipes"
    folder.mkdir(exist_ok=True)
    path = folder / f"{safe_name(recipe.name)}.json"
    recipe.save(path)
    return path

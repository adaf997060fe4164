"""Meaning of the columns: raw rows to `Row`s, with every problem found and none repaired."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffaccel.batch.names import checked_name, default_name, folded
from diffaccel.batch.rows import RawRow
from diffaccel.batch.settings import BatchSettings, RowProblem
from diffaccel.engine.method import Method
from diffaccel.errors import RecipeError
from diffaccel.recipes.presets import presets
from diffaccel.recipes.recipe import Recipe, each_once

COLUMNS = ("prompt", "negative_prompt", "seed", "steps", "width", "height", "guidance_scale", "recipe", "name")
# Call arguments that the batch sets itself, and what to write instead.
OWN = {
    "num_inference_steps": "use the column 'steps'",
    "generator": "use the column 'seed'",
    "num_images_per_prompt": "give one row per picture",
    "output_type": "pictures are written as files",
    "return_dict": "pictures are written as files",
}
LARGEST_SIDE, MOST_STEPS, LARGEST_SEED = 32_768, 10_000, 2**53
KEY_LENGTH = 20  # hex digits of SHA-256
SHOWN = 60  # characters of a wrong value in its message


@dataclass(frozen=True)
class Row:
    """One picture: everything that decides its pixels and its file, except the model.

    Attributes:
        index: position in the list, from 0.
        size: width and height; None: the model's own.
        recipe: key into `Rows.recipes`; "" for the batch's own pipeline.
        extras: further call arguments, sorted by name, values as JSON text.
        name: file name without extension.
        key: digest of all of this and of how the picture is stored.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    size: tuple[int, int] | None
    guidance_scale: float | None
    recipe: str
    extras: tuple[tuple[str, str], ...]
    name: str
    key: str = field(default="", compare=False)

    @property
    def number(self) -> int:
        """As people count: 1 for the first row."""
        return self.index + 1


class _Wrong(ValueError):
    """A problem of one cell, as a sentence without its full stop."""


@dataclass
class Parsed:
    """What a list was read as.

    Attributes:
        recipes: those that rows use, by key.
        undecided: wrong values by column, of columns that are ignored unless the pipeline turns out to know them.
    """

    rows: list[Row]
    recipes: dict[str, Recipe]
    problems: list[RowProblem]
    undecided: list[tuple[str, RowProblem]]


def parse_rows(raw: Sequence[RawRow], settings: BatchSettings, folder: Path | None, bad: set[int]) -> Parsed:
    """Rows and all problems.

    Args:
        folder: where recipe files that a row names must lie; None: rows may not name files.
        bad: numbers of rows that have been complained about already.
    """
    recipes = _Recipes(folder)
    default = recipes.add(settings.recipe) if settings.recipe is not None else ""
    found = Parsed([], recipes.known, list(_missing_columns(raw, bad)), [])
    for index, cells in enumerate(raw):
        if index + 1 in bad:
            continue
        reading = _Cells(index, cells, settings, recipes, default)
        row = reading.row()
        found.problems.extend(RowProblem(index + 1, f"{sentence}.") for sentence in reading.problems)
        found.undecided.extend((name, RowProblem(index + 1, f"{said}.")) for name, said in reading.undecided)
        if row is not None:
            found.rows.append(row)
    found.problems.extend(_twice(found.rows))
    return found


def _missing_columns(raw: Sequence[RawRow], bad: set[int]) -> Iterator[RowProblem]:
    columns = {name for row in raw for name in row}
    if columns and "prompt" not in columns:
        yield RowProblem(0, f"The list has no column 'prompt'; its columns are {', '.join(sorted(columns))}.")
        bad.update(range(1, len(raw) + 1))
    for name in sorted(columns & set(OWN)):
        yield RowProblem(0, f"The column {name!r} is not possible: {OWN[name]}.")


def _twice(rows: Sequence[Row]) -> Iterator[RowProblem]:
    seen: dict[str, int] = {}
    for row in rows:
        first = seen.setdefault(folded(row.name), row.number)
        if first != row.number:
            yield RowProblem(row.number, f"its name {row.name!r} is that of row {first}.")


class _Cells:
    """One row being read; collects problems instead of stopping at the first."""

    def __init__(self, index: int, cells: RawRow, settings: BatchSettings, recipes: _Recipes, recipe: str) -> None:
        self.index, self.settings, self.recipes, self.recipe = index, settings, recipes, recipe
        plain = {name: _plain(value) for name, value in cells.items()}
        self.cells = {name: value for name, value in plain.items() if not _is_empty(value)}
        self.problems: list[str] = []
        self.undecided: list[tuple[str, str]] = []

    def row(self) -> Row | None:
        settings = self.settings
        prompt = self.get("prompt", _text, None)
        if prompt is None and not self.problems:
            self.problems.append("it has no prompt")
        values: dict[str, Any] = {
            "negative_prompt": self.get("negative_prompt", _text, settings.negative_prompt),
            "seed": self.get("seed", _whole(0, LARGEST_SEED), settings.seed + self.index),
            "steps": self.get("steps", _whole(1, MOST_STEPS), settings.steps),
            "size": self._size(),
            "guidance_scale": self.get("guidance_scale", _scale, settings.guidance_scale),
            "recipe": self.get("recipe", self.recipes.read, self.recipe),
            "extras": self._extras(),
            "name": self.get("name", self._name, None),
        }
        if self.problems or prompt is None:
            return None
        values["name"] = values["name"] or default_name(self.index, prompt)
        row = Row(index=self.index, prompt=prompt, **values)
        return Row(**{**row.__dict__, "key": _row_key(row, settings)})

    def get(self, name: str, read: Callable[[Any], Any], default: Any) -> Any:
        if name not in self.cells:
            return default
        try:
            return read(self.cells[name])
        except (_Wrong, RecipeError) as error:
            self.problems.append(f"{name}: {str(error).rstrip('.')}")
            return default

    def _size(self) -> tuple[int, int] | None:
        own = self.settings.size or (None, None)
        side = _whole(1, LARGEST_SIDE)
        width, height = self.get("width", side, own[0]), self.get("height", side, own[1])
        if (width is None) != (height is None):
            if not self.problems:
                self.problems.append("it has only one of width and height; give both")
            return None
        return None if width is None else (width, height)

    def _extras(self) -> tuple[tuple[str, str], ...]:
        names = sorted(set(self.cells) - set(COLUMNS) - set(OWN))
        return tuple((name, self._extra(name)) for name in names)

    def _extra(self, name: str) -> str:
        """The value as JSON text. Where unknown columns are ignored, a wrong one is a problem only if the column is known."""
        if not self.settings.ignore_unknown_columns:
            return str(self.get(name, functools.partial(_argument, name), ""))
        try:
            return _argument(name, self.cells[name])
        except _Wrong as error:
            self.undecided.append((name, f"{name}: {error}"))
            return json.dumps(repr(self.cells[name]))

    def _name(self, value: Any) -> str:
        try:
            return checked_name(_string(value), self.settings.format, in_shards=self.settings.shards > 0)
        except _Wrong:
            raise
        except ValueError as error:
            raise _Wrong(str(error)) from error


class _Recipes:
    """Recipes that rows name, each read once."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.known: dict[str, Recipe] = {}
        self._read: dict[str, str] = {}

    def add(self, recipe: Recipe) -> str:
        data = json.dumps(recipe.to_dict(), sort_keys=True) + "".join(_file_digests(recipe))
        key = hashlib.sha256(data.encode()).hexdigest()[:KEY_LENGTH]
        self.known[key] = recipe
        return key

    def read(self, value: Any) -> str:
        """Key of a preset, a JSON object (as text or not), or a file in the list's folder."""
        if isinstance(value, Recipe):
            return self.add(value)
        if not isinstance(value, (str, dict)):
            raise _Wrong(f"a recipe is a preset's name, a JSON object or a file, not {type(value).__name__}")
        try:
            text = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)
        except (TypeError, ValueError) as error:  # a table can hold bytes and dates
            raise _Wrong(f"{_shown(value)} holds what JSON cannot") from error
        if text not in self._read:
            self._read[text] = self.add(self._build(text))
        return self._read[text]

    def _build(self, text: str) -> Recipe:
        if text.startswith("{"):
            try:
                recipe = Recipe.from_dict(json.loads(text, object_pairs_hook=each_once))
            except (ValueError, RecursionError) as error:
                raise _Wrong(f"{text[:40]!r} is not valid JSON: {error}") from error
            return self._located(recipe)
        if text in presets():
            return presets()[text]
        return Recipe.load(self._file(text))

    def _file(self, text: str) -> Path:
        known = ", ".join(presets())
        if self.folder is None:
            raise _Wrong(f"{text!r} is no preset ({known}), and these rows cannot name files")
        path = self.folder / text
        if "\x00" in text or not path.resolve().is_relative_to(self.folder.resolve()):
            raise _Wrong(f"the recipe file {text!r} is not in the folder of the list")
        if path.suffix != ".json" or not path.is_file():
            raise _Wrong(f"{text!r} is neither a preset ({known}) nor a .json file in the folder of the list")
        return path

    def _located(self, recipe: Recipe) -> Recipe:
        """With the files its methods name looked for in the list's folder."""

        def locate(method: Method) -> Method:
            found = method.located(self.folder or Path())
            if self.folder is None and found is not method:
                raise _Wrong(f"{method.name} names a file, which these rows cannot do")
            return found

        other = recipe.transformer_methods
        return Recipe(
            name=recipe.name,
            note=recipe.note,
            methods=tuple(map(locate, recipe.methods)),
            transformer_methods=None if other is None else tuple(map(locate, other)),
        )


def _file_digests(recipe: Recipe) -> Iterator[str]:
    """Contents of the files that methods name: a changed edit is a changed recipe."""
    for method in (*recipe.methods, *(recipe.transformer_methods or ())):
        named = getattr(method, "file", None)
        if named is not None and Path(named).is_file():
            yield hashlib.sha256(Path(named).read_bytes()).hexdigest()


def _row_key(row: Row, settings: BatchSettings) -> str:
    content = {name: value for name, value in row.__dict__.items() if name not in ("index", "key")}
    stored = [settings.format, settings.metadata, settings.quality if settings.format != "png" else None]
    text = json.dumps([content, stored], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and the like as Python's own."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def _is_empty(value: Any) -> bool:
    """Not given: nothing, blanks, or what table tools store for an empty cell (NaN, pandas' NA and NaT)."""
    if isinstance(value, float):
        return math.isnan(value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return True
    return value is None or (isinstance(value, str) and not value.strip())


def _shown(value: Any) -> str:
    """A value for a message: long ones are cut, and numbers too long for Python to print are described."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"it must be text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Wrong("it is not valid UTF-8 text") from error
    return value


def _text(value: Any) -> str:
    if "\0" in _string(value):
        raise _Wrong("it holds a NUL character")
    return str(value)


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Wrong(f"{_shown(value)} is not a number")
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    except ValueError as error:
        raise _Wrong(f"{_shown(value)} is not a number") from error


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = _number(value)
        if isinstance(number, float) and not number.is_integer():
            raise _Wrong(f"{_shown(value)} is not a whole number")
        if not low <= number <= high:
            raise _Wrong(f"{_shown(value)} is not between {low} and {high}")
        return int(number)

    return read


def _scale(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= sys.float_info.max:
        raise _Wrong(f"{_shown(value)} is not a guidance scale of 0 or more")
    return float(number)


def is_prompt(name: str) -> bool:
    """Whether a call argument is a text per picture, such as `prompt_2`."""
    return name.removeprefix("negative_").startswith("prompt") and "embeds" not in name


def _argument(name: str, value: Any) -> str:
    """A further call argument as JSON text; cells of CSV files hold JSON, or text as it stands."""
    if is_prompt(name):
        return json.dumps(_text(value))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = _text(value)
    if isinstance(value, dict):
        raise _Wrong("a call argument is a number, text, true or false, or a list of these")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _Wrong(f"{_shown(value)} is no finite number, text, true or false, or a list of these") from error

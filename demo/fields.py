"""Controls of the page, read from the methods' pydantic models: what can be set, within which bounds, and what it means.

Nothing here knows a method by name: a method that is registered appears on the page.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffaccel.engine.method import Method
from diffaccel.errors import RecipeError
from diffaccel.methods import registry
from diffaccel.recipes.recipe import Recipe, build_method

Kind = Literal["switch", "slider", "number", "choice", "text"]
_NUMBERS = ("number", "integer")


@dataclass(frozen=True)
class Field:
    """One setting of a method.

    Attributes:
        method, name: where it belongs.
        kind: "switch" (bool), "slider" (number between two bounds), "number", "choice" (also takes other values if
            `open`), or "text" (JSON, quotes optional).
        default: the method's own default; an empty control means it.
        whole: whole numbers only.
        minimum, maximum: bounds of a number, None where there is none. Bounds that a value must not reach are included:
            the method says so itself.
        choices: names to choose from.
        open: other values than the choices are possible, as JSON.
        help: what the method's documentation says.
    """

    method: str
    name: str
    kind: Kind
    default: Any
    whole: bool = False
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    open: bool = False
    help: str = ""

    @property
    def label(self) -> str:
        """The name as words."""
        return words(self.name)

    @property
    def step(self) -> float:
        """Step of a slider: fine enough to hit the default."""
        if self.whole:
            return 1
        decimals = len(f"{self.default:g}".partition(".")[2]) if isinstance(self.default, (int, float)) else 2
        return float(10.0 ** -max(2, decimals))

    def parse(self, shown: Any) -> Any:
        """The setting that a control's value stands for; the default if it is empty.

        Raises:
            RecipeError: a text that is no value.
        """
        if shown is None or (isinstance(shown, str) and not shown.strip()):
            return self.default
        if self.kind == "number" and self.whole and isinstance(shown, float) and shown.is_integer():
            return int(shown)
        if self.kind == "slider" and self.whole and float(shown).is_integer():
            return int(shown)
        if self.kind not in ("choice", "text") or not isinstance(shown, str):
            return shown
        by_text = {str(choice): choice for choice in self.choices}
        return by_text[shown] if shown in by_text else _from_text(shown, self)

    def show(self, value: Any) -> Any:
        """The inverse of `parse`: what a control shows for a setting. Empty where it is a default that has no place in it."""
        if self.kind in ("switch", "slider"):
            return value
        if self.kind == "number":
            return None if value is None or math.isinf(value) else value
        if value is None:
            return None if self.kind == "choice" else ""
        return value if value in self.choices else _to_text(value)


def words(name: str) -> str:
    """skip_cache -> Skip cache"""
    return name.replace("_", " ").capitalize()


def _from_text(text: str, field: Field) -> Any:
    for attempt in (text, f"[{text}]"):
        try:
            return json.loads(attempt)
        except ValueError:
            continue
    if field.choices:
        known = ", ".join(str(choice) for choice in field.choices)
        raise RecipeError(f"{field.method}.{field.name}: {text!r} is none of {known}.")
    raise RecipeError(f"{field.method}.{field.name}: {text!r} is no number and no list of numbers.")


def _to_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(json.dumps(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


# --- from JSON schema ---


def fields_of(cls: type[Method]) -> tuple[Field, ...]:
    """The settings of a method, in the order of its definition."""
    helps = attribute_help(cls)
    properties: dict[str, Any] = cls.model_json_schema().get("properties", {})
    return tuple(
        _field(
            cls.name, name, cls.model_fields[name].get_default(call_default_factory=True), schema, helps.get(name, "")
        )
        for name, schema in properties.items()
    )


def _field(method: str, name: str, default: Any, schema: dict[str, Any], text: str) -> Field:
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    numbers = [part for part in parts if part.get("type") in _NUMBERS and "enum" not in part]
    choices = tuple(item for part in parts for item in part.get("enum", [part["const"]] if "const" in part else []))
    if choices:
        opened = any("enum" not in part and "const" not in part for part in parts)
        return Field(method, name, "choice", default, choices=choices, open=opened, help=text)
    if len(parts) == 1 and parts[0].get("type") == "boolean":
        return Field(method, name, "switch", default, help=text)
    if len(parts) == 1 and numbers:
        return _number(Field(method, name, "number", default, help=text), numbers[0])
    return Field(method, name, "text", default, help=text)


def _number(field: Field, schema: dict[str, Any]) -> Field:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    bounded = low is not None and high is not None and field.default is not None
    return Field(
        field.method,
        field.name,
        "slider" if bounded else "number",
        field.default,
        whole=schema["type"] == "integer",
        minimum=low,
        maximum=high,
        help=field.help,
    )


def attribute_help(cls: type) -> dict[str, str]:
    """Texts of the "Attributes:" sections of a class and its bases, by attribute."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "") + "\n"
        section = re.search(r"^Attributes:\n((?:(?: {4,}.*)?\n)+)", text, re.MULTILINE)
        entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
        for names, meaning in entries:
            found |= {name: " ".join(meaning.split()).replace("`", "") for name in names.split(", ")}
    return found


def summary_of(cls: type) -> str:
    """The first sentence of the documentation."""
    return (cls.__doc__ or "").strip().partition("\n")[0].partition(". Off:")[0]


def is_offered(cls: type[Method]) -> bool:
    """Whether a method can be set up by controls; one that needs a free text, such as a file, cannot."""
    return not any(field.kind == "text" and _is_plain_text(cls, field.name) for field in fields_of(cls))


def _is_plain_text(cls: type[Method], name: str) -> bool:
    schema = cls.model_json_schema()["properties"][name]
    return any(part.get("type") == "string" and "enum" not in part for part in schema.get("anyOf", [schema]))


def offered() -> dict[str, tuple[Field, ...]]:
    """All methods with controls, and their fields."""
    return {name: fields_of(cls) for name, cls in registry().items() if is_offered(cls)}


# --- from and to recipes ---


def build_recipe(chosen: Sequence[str], shown: Mapping[tuple[str, str], Any], name: str = "custom") -> Recipe:
    """The recipe of the chosen methods with what their controls show, by (method, field).

    Raises:
        RecipeError: a value out of range, or methods that cannot run together.
    """
    known = offered()
    for method in chosen:
        if method not in known:
            raise RecipeError(f"unknown method {method!r}; known are {', '.join(known)}.")
    methods = tuple(
        build_method(registry()[method], _settings(known[method], shown))
        for method in known
        if method in chosen  # in the order of their layers
    )
    return Recipe(name=name, methods=methods)


def _settings(fields: Sequence[Field], shown: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    found = {field.name: field.parse(shown.get((field.method, field.name))) for field in fields}
    # a default is left to the method: some tell apart what was given from what was not
    return {field.name: found[field.name] for field in fields if found[field.name] != field.default}


def show_recipe(recipe: Recipe) -> tuple[list[str], dict[tuple[str, str], Any]]:
    """What the controls show for a recipe: the chosen methods, and every field.

    Raises:
        RecipeError: it holds a method that has no controls.
    """
    by_name = {method.name: method for method in recipe.methods}
    known = offered()
    strangers = [name for name in by_name if name not in known]
    if strangers:
        raise RecipeError(
            f"{strangers[0]} has no switches on this page; on the Erase tab an edit can be made and applied to all pictures."
            if strangers[0] == "erase"
            else f"{strangers[0]} has no switches on this page; use this recipe in Python or on the command line."
        )
    shown: dict[tuple[str, str], Any] = {}
    for name, fields in known.items():
        for field in fields:
            value = getattr(by_name[name], field.name) if name in by_name else field.default
            shown[name, field.name] = field.show(value)
    return list(by_name), shown

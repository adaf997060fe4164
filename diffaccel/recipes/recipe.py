"""Recipe: an ordered set of method settings. JSON in and out, and which methods do not go together."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from diffaccel.engine.method import Method
from diffaccel.errors import RecipeError
from diffaccel.files.output import replace_file
from diffaccel.files.text import read_text

SCHEMA_VERSION = 1

_CACHES = ("skip_cache", "residual_cache", "forecast", "block_cache")


def _cache_conflicts() -> dict[frozenset[str], str]:
    """Methods that keep what blocks computed: one at a time."""
    found = {
        frozenset({first, second}): f"{first} and {second} both replace what the same blocks compute; use one of them."
        for first, second in itertools.combinations(_CACHES, 2)
    }
    for cache in _CACHES:
        found[frozenset({cache, "region_sampling"})] = (
            f"{cache} and region_sampling both keep parts of the same blocks, of different steps; use one of them."
        )
    for other in (*_CACHES, "region_sampling"):
        found[frozenset({other, "step_reuse"})] = (
            f"step_reuse decides image by image which steps run, and what {other} keeps for a batch cannot follow; use one "
            "of them."
        )
    return found


# Pairs that cannot run together, each with the sentence a user sees. All other pairs nest by layer.
CONFLICTS: dict[frozenset[str], str] = {
    **_cache_conflicts(),
    frozenset({"token_merging", "token_downsampling"}): (
        "token_merging and token_downsampling both shorten the same self-attentions: after merging there is no token "
        "grid left to downsample; use one of them."
    ),
    frozenset({"token_merging", "region_sampling"}): (
        "token_merging matches tokens over the whole grid, and region_sampling computes only some of them; use one of them."
    ),
    frozenset({"sparse_attention", "region_sampling"}): (
        "sparse_attention divides all tokens into blocks, and region_sampling computes only some of them; use one of them."
    ),
    frozenset({"sparse_attention", "token_merging"}): (
        "sparse_attention divides the token grid into blocks, and merged tokens stand in no grid; use one of them."
    ),
}


class Recipe(BaseModel):
    """Methods to run together. The order given does not matter: methods nest by their layer.

    Attributes:
        name: shown in reports.
        note: one sentence on what the recipe is good for and where that was measured.
        methods: at most one of each kind.
        transformer_methods: used instead of `methods` on diffusion transformers, so that one recipe fits both kinds of
            denoisers; None where `methods` are meant for both.
    Raises:
        RecipeError: two methods of one kind, or two that cannot run together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = "custom"
    note: str = ""
    methods: tuple[Method, ...] = ()
    transformer_methods: tuple[Method, ...] | None = None

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _as_recipe_error("recipe", error) from error

    @field_validator("name", "note")
    @classmethod
    def _check_text(cls, text: str, info: ValidationInfo) -> str:
        # both are printed, and written into pictures as UTF-8
        if not (text if info.field_name == "name" else "".join(text.split())).isprintable():
            raise ValueError("only printable characters are allowed")
        return text

    @field_validator("methods", "transformer_methods")
    @classmethod
    def _check_methods(cls, methods: tuple[Method, ...] | None) -> tuple[Method, ...] | None:
        if methods is None:
            return None
        check_conflicts(methods)
        # within a layer by name, last first: guidance_interval outside adaptive_guidance, which must not measure the equal
        # branches that the interval returns
        by_name = sorted(methods, key=lambda method: method.name, reverse=True)
        return tuple(sorted(by_name, key=lambda method: method.layer))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        data = {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "note": self.note,
            "methods": _methods_to_list(self.methods),
        }
        if self.transformer_methods is not None:
            data["transformer_methods"] = _methods_to_list(self.transformer_methods)
        return data

    def on_transformers(self) -> Recipe:
        """The recipe as it runs on diffusion transformers."""
        if self.transformer_methods is None:
            return self
        return Recipe(name=self.name, note=self.note, methods=self.transformer_methods)

    def on_unets(self) -> Recipe:
        """The recipe as it runs on UNets."""
        if self.transformer_methods is None:
            return self
        return Recipe(name=self.name, note=self.note, methods=self.methods)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Build from the JSON form.

        Raises:
            RecipeError: unknown keys, methods or schema, or a value out of range, each named.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"a recipe must be a JSON object, not {type(data).__name__}.")
        if data.get("schema") != SCHEMA_VERSION:
            raise RecipeError(
                f"recipe schema {data.get('schema')!r} is not supported; this version reads {SCHEMA_VERSION}."
            )
        _refuse_unknown(set(data) - {"schema", "name", "note", "methods", "transformer_methods"}, "recipe")
        methods, transformers = _methods_from_list(data, "methods"), None
        if data.get("transformer_methods") is not None:
            transformers = _methods_from_list(data, "transformer_methods")
        name, note = data.get("name", "custom"), data.get("note", "")
        if not isinstance(name, str) or not isinstance(note, str):
            raise RecipeError("the recipe keys 'name' and 'note' must be text.")
        return cls(name=name, note=note, methods=methods, transformer_methods=transformers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON; the file is replaced in one step. Files that methods name are written as seen from its folder.

        Raises:
            RecipeError: it cannot be written, or a method names a file that is not in this folder or below.
        """
        target = Path(path)
        data = self._with(lambda method: method.portable(target.parent)).to_dict()
        text = json.dumps(data, indent=2) + "\n"
        try:
            replace_file(target, lambda file: file.write(text.encode()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"cannot write the recipe to {target}: {reason}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a JSON recipe (UTF-8, or UTF-16 with a byte order mark). Files that methods name are looked for in its folder and below.

        Raises:
            RecipeError: no such file, no valid JSON, or wrong contents.
        """
        try:
            text = read_text(Path(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            raise RecipeError(f"cannot read the recipe {path}: {reason}.") from error
        try:
            data = json.loads(text, object_pairs_hook=each_once)
        except RecursionError as error:
            raise RecipeError(f"{path} is not a recipe: it is nested too deeply.") from error
        except ValueError as error:  # no JSON, or a number with thousands of digits
            raise RecipeError(f"{path} is not valid JSON: {error}.") from error
        return cls.from_dict(data)._with(lambda method: method.located(Path(path).parent))

    def _with(self, change: Callable[[Method], Method]) -> Recipe:
        """The recipe with every method changed."""
        transformers = self.transformer_methods
        return Recipe(
            name=self.name,
            note=self.note,
            methods=tuple(map(change, self.methods)),
            transformer_methods=None if transformers is None else tuple(map(change, transformers)),
        )

    def describe(self) -> str:
        """One line: methods with the settings that differ from their defaults."""
        text = _describe_all(self.methods)
        if self.transformer_methods is None:
            return text
        return f"{text}; on transformers {_describe_all(self.transformer_methods)}"


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python's reader would take the last of two equal keys and say nothing."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _methods_to_list(methods: Iterable[Method]) -> list[dict[str, Any]]:
    # by way of JSON text: only there pydantic writes inf as a string, which strict JSON can hold
    return [{"method": method.name, **json.loads(method.model_dump_json())} for method in methods]


def _methods_from_list(data: dict[str, Any], key: str) -> tuple[Method, ...]:
    items = data.get(key, [])
    if not isinstance(items, list):
        raise RecipeError(f"the recipe key {key!r} must be a list.")
    return tuple(_method_from_dict(item) for item in items)


def _describe_all(methods: Iterable[Method]) -> str:
    return " + ".join(_describe(method) for method in methods) or "no methods"


def _describe(method: Method) -> str:
    settings = method.model_dump(exclude_defaults=True)
    inner = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"{method.name}({inner})"


def _refuse_unknown(keys: Iterable[str], where: str) -> None:
    unknown = ", ".join(repr(key) for key in sorted(map(str, keys)))
    if unknown:
        raise RecipeError(f"unknown {where} key {unknown}.")


def _method_from_dict(item: Any) -> Method:
    if not isinstance(item, dict) or "method" not in item:
        raise RecipeError("each entry of 'methods' must be an object with the key 'method'.")
    from diffaccel.methods import registry  # noqa: PLC0415  (a recipe without methods loads none)

    known = registry()
    if not isinstance(item["method"], str) or item["method"] not in known:
        raise RecipeError(f"unknown method {item['method']!r}; known are {', '.join(known)}.")
    return build_method(known[item["method"]], {key: value for key, value in item.items() if key != "method"})


def build_method(cls: type[Method], settings: dict[str, Any]) -> Method:
    """A method from plain settings, with pydantic's complaints turned into one sentence."""
    _refuse_unknown(set(settings) - set(cls.model_fields), cls.name)
    try:
        return cls(**settings)
    except ValidationError as error:
        raise _as_recipe_error(cls.name, error) from error


def _as_recipe_error(owner: str, error: ValidationError) -> RecipeError:
    """One sentence that names the field; a field of several types has one complaint per type."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RecipeError):
        return cause
    field = first["loc"][:1]
    complaints = [item["msg"].removeprefix("Value error, ") for item in error.errors() if item["loc"][:1] == field]
    where = ".".join([owner, *map(str, field)])
    got = f" (got {first['input']!r})" if field else ""
    return RecipeError(f"{where}: {' or '.join(complaints)}{got}.")


def check_conflicts(methods: Sequence[Method]) -> None:
    """Raise `RecipeError` if two methods are of one kind or cannot run together."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{name} appears {names.count(name)} times in one recipe; give it once.")
    active = {method.name for method in methods if not method.is_off}
    for pair, sentence in CONFLICTS.items():
        if pair <= active:
            raise RecipeError(sentence)


OFF = Recipe(name="off", note="No method: bit-identical to the stock pipeline, with a report.")

"""One or two settings over a list of values each: a grid of pictures, and speed over fidelity against fewer steps."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.bench import spread
from diffaccel.comparison import Row
from diffaccel.demo.comparing import likeness
from diffaccel.demo.engine import PLAIN, Ask, Drawn, Engine, PageError, Watch
from diffaccel.demo.fields import Field, offered
from diffaccel.demo.markup import decibel, table
from diffaccel.demo.sessions import Session
from diffaccel.frontier import Over, save_frontier
from diffaccel.method import registry
from diffaccel.output import safe_name
from diffaccel.recipe import Recipe, build_method

MOST_CELLS = 36
COSTS: dict[str, Over] = {"FLOPs": "flops", "time": "seconds", "evaluations": "evaluations"}


def axis_of(name: str) -> Over:
    """What the plot's axis shows. Raises `PageError` for an unknown name."""
    if name not in COSTS:
        raise PageError(f"The plot has no axis {name!r}; choose one of {', '.join(COSTS)}.")
    return COSTS[name]


@dataclass(frozen=True)
class Axis:
    """A setting and the values it takes."""

    field: Field
    values: tuple[Any, ...]

    @classmethod
    def of(cls, setting: str, text: str) -> Axis:
        """From "method.field" and values with commas (semicolons, where a value is itself a list).

        Raises:
            PageError: no such setting, no value, or one twice.
            RecipeError: a text that is no value.
        """
        field = next((f for fields in offered().values() for f in fields if f"{f.method}.{f.name}" == setting), None)
        if field is None:
            raise PageError(f"There is no setting {setting!r}; choose one from the list.")
        parts = [part.strip() for part in text.split(";" if ";" in text else ",") if part.strip()]
        if len(parts) > MOST_CELLS:
            raise PageError(f"That makes {len(parts)} pictures; at most {MOST_CELLS} are drawn at once.")
        values = tuple(_value(field, part) for part in parts)
        if not values:
            raise PageError(f"Give values for {setting}, for example 2, 3, 5.")
        if len(set(map(repr, values))) < len(values):
            raise PageError(f"A value of {setting} is listed twice.")
        return cls(field, values)

    @property
    def name(self) -> str:
        """method.field"""
        return f"{self.field.method}.{self.field.name}"


def _value(field: Field, text: str) -> Any:
    if field.kind == "switch":
        known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if text.lower() not in known:
            raise PageError(f"{field.method}.{field.name} is a switch: its values are true and false, not {text!r}.")
        return known[text.lower()]
    if field.kind in ("slider", "number"):
        try:
            number = float(text)
        except ValueError:
            raise PageError(f"{field.method}.{field.name} takes numbers, not {text!r}.") from None
        return int(number) if field.whole and math.isfinite(number) and number.is_integer() else number
    return field.parse(text)


@dataclass(frozen=True)
class Cell:
    """One picture of the grid."""

    label: str
    drawn: Drawn
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True)
class Explored:
    """The grid, plain and fewer steps, and the plot.

    Attributes:
        columns: pictures in a row of the grid: the values of the second setting, or three.
        warm: whether each was drawn once before the clock ran.
    """

    plain: Drawn
    cells: tuple[Cell, ...]
    columns: int
    warm: bool
    plot: Path

    def gallery(self) -> list[tuple[str, str]]:
        """(file, caption) of every picture, plain last."""
        return [*((str(cell.drawn.path), cell.label) for cell in self.cells), (str(self.plain.path), "plain")]

    def figures(self) -> str:
        """The figures as a table."""
        header = ("", "seconds", "faster", "fewer FLOPs", "evaluations", "PSNR", "SSIM")
        rows = [
            (
                cell.label,
                f"{cell.drawn.report.seconds:.2f}",
                f"{self._speed(cell):.2f}x",
                f"{self.plain.report.flops / max(cell.drawn.report.flops, 1):.2f}x",
                str(cell.drawn.report.evaluations),
                decibel(cell.psnr),
                "n/a" if cell.ssim is None else f"{cell.ssim:.4f}",
            )
            for cell in self.cells
        ]
        return table(header, rows, self._caption())

    def _caption(self) -> str:
        own = "" if self.warm else "; counting FLOPs is part of the times"
        return f"Against plain with {self.plain.report.seconds:.2f} s; one run each{own}"

    def _speed(self, cell: Cell) -> float:
        return self.plain.report.seconds / max(cell.drawn.report.seconds, 1e-9)


def variants(recipe: Recipe, axes: Sequence[Axis]) -> list[Recipe]:
    """The recipe with every combination of values, in the order of the grid.

    Raises:
        PageError: no axis, one twice, or too many pictures.
        RecipeError: a value out of range, or methods that cannot run together.
    """
    names = [axis.name for axis in axes]
    count = math.prod(len(axis.values) for axis in axes)
    if not axes:
        raise PageError("Choose a setting to vary.")
    if len(set(names)) < len(names):
        raise PageError(f"{names[0]} is chosen twice; choose two different settings.")
    if count > MOST_CELLS:
        raise PageError(f"That makes {count} pictures; at most {MOST_CELLS} are drawn at once.")
    return [_variant(recipe, axes, values) for values in itertools.product(*(axis.values for axis in axes))]


def _variant(recipe: Recipe, axes: Sequence[Axis], values: Sequence[Any]) -> Recipe:
    methods = {method.name: method for method in recipe.methods}
    wanted: dict[str, dict[str, Any]] = {}
    for axis, value in zip(axes, values, strict=True):
        wanted.setdefault(axis.field.method, {})[axis.field.name] = value
    for name, settings in wanted.items():
        given = methods[name].model_dump(exclude_unset=True) if name in methods else {}
        methods[name] = build_method(registry()[name], given | settings)
    label = ", ".join(f"{axis.field.name}={_short(value)}" for axis, value in zip(axes, values, strict=True))
    return Recipe(name=label, methods=tuple(methods.values()))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def explore(
    engine: Engine,
    session: Session,
    model: str,
    ask: Ask,
    recipe: Recipe,
    axes: Sequence[Axis],
    watch: Watch,
    *,
    baseline: bool = True,
    warm: bool = True,
    over: Over = "flops",
) -> Explored:
    """Draw the grid, the plain picture and, for the plot over `over`, the plain pipeline with fewer steps.

    Raises:
        DiffaccelError: the model, the settings or a recipe; or `Cancelled`.
    """
    recipes = [session.with_edit(variant) for variant in variants(recipe, axes)]
    fewer = fewer_steps(ask.steps) if baseline else []
    watch.total = ask.steps * (1 + len(recipes)) * (2 if warm else 1) + sum(fewer)
    watch.show(0, watch.total, f"loading {Path(model).name}")
    owner = str(session.folder)
    with engine.pipeline(model):
        for variant in recipes:
            engine.wrapped(variant, owner)  # all are refused before any is drawn
        folder, stock = session.new_folder(), session.with_edit(PLAIN)
        draw = functools.partial(_draw, engine, ask, watch, owner, warm)
        plain = draw("plain", stock, folder / "plain.png")
        cells = []
        for number, variant in enumerate(recipes):
            name = f"{number + 1:02d}-{safe_name(variant.name)}.png"
            drawn = draw(f"{variant.name} ({number + 1} of {len(recipes)})", variant, folder / name)
            cells.append(_cell(variant.name, drawn, plain))
        line = []
        for steps in fewer:
            watch.label = f"plain, {steps} steps"
            asked = ask.model_copy(update={"steps": steps})
            line.append(_cell(str(steps), engine.draw(stock, asked, watch, None, owner), plain))
    plot = folder / "speed-fidelity.png"
    save_frontier(_rows(ask, plain, cells, line), plot, over=over)
    columns = len(axes[1].values) if len(axes) > 1 else 3
    return Explored(plain, tuple(cells), columns, warm, plot)


def _draw(
    engine: Engine, ask: Ask, watch: Watch, owner: str, warm: bool, label: str, recipe: Recipe, path: Path
) -> Drawn:
    if warm:
        watch.label = f"{label}, warming up"
        engine.draw(recipe, ask, watch, None, owner)
    watch.label = label
    return engine.draw(recipe, ask, watch, path, owner)


def fewer_steps(steps: int) -> list[int]:
    """Step counts of the baseline: an eighth to three quarters of the asked ones."""
    return sorted({max(1, round(steps * share)) for share in (0.125, 0.25, 0.375, 0.5, 0.75)} - {steps})


def _cell(label: str, drawn: Drawn, plain: Drawn) -> Cell:
    close = likeness(drawn.image, plain.image)
    return Cell(label, drawn, close.psnr, close.ssim)


def _rows(ask: Ask, plain: Drawn, cells: Sequence[Cell], line: Sequence[Cell]) -> list[Row]:
    """The rows that the plot of `diffaccel compare` takes."""
    found = [_as_row("plain", "plain", ask.steps, plain, None)]
    found += [_as_row(cell.label, "recipe", ask.steps, cell.drawn, cell.psnr) for cell in cells]
    return found + [
        _as_row(f"{cell.label} steps", "fewer steps", int(cell.label), cell.drawn, cell.psnr) for cell in line
    ]


def _as_row(name: str, kind: Any, steps: int, drawn: Drawn, psnr: float | None) -> Row:
    report = drawn.report
    time = spread([report.seconds])
    return Row(name, kind, steps, report.recipe, report.evaluations, report.rows, report.flops, seconds=time, psnr=psnr)

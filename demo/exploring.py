"""One or two settings over a list of values each: a grid of pictures, and speed over fidelity against fewer steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.demo.comparing import likeness
from diffaccel.demo.engine import PLAIN, Ask, Drawn, Engine, PageError, Watch
from diffaccel.demo.fields import Field, offered
from diffaccel.demo.markup import decibel, fewer, table
from diffaccel.demo.sessions import Session
from diffaccel.demo.timing import ROUNDS, Job, draw_all, pace, seconds_of, speedup
from diffaccel.files.output import safe_name
from diffaccel.measure.frontier import Over, save_frontier
from diffaccel.measure.rows import Row
from diffaccel.measure.timing import spread
from diffaccel.methods import registry
from diffaccel.recipes.recipe import Recipe, build_method

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
    """

    plain: Drawn
    cells: tuple[Cell, ...]
    columns: int
    plot: Path

    def gallery(self) -> list[tuple[str, str]]:
        """(file, caption) of every picture, plain last."""
        return [*((str(cell.drawn.path), cell.label) for cell in self.cells), (str(self.plain.path), "plain")]

    def figures(self) -> str:
        """The figures as a table."""
        header = ("", "fewer FLOPs", "evaluations", "PSNR", "SSIM")
        if not self.plain.seconds:
            return table(header, map(self._row, self.cells), "Against plain; times were not measured")
        rows = [(*self._row(cell), seconds_of(cell.drawn), self._speed(cell)) for cell in self.cells]
        caption = f"Against plain with {seconds_of(self.plain)} s; median and range of {ROUNDS} rounds"
        return table((*header, "seconds", "speed"), rows, caption)

    def _row(self, cell: Cell) -> tuple[str, ...]:
        report = cell.drawn.report
        return (
            cell.label,
            fewer(self.plain.report.flops, report.flops),
            str(report.evaluations),
            decibel(cell.psnr),
            "n/a" if cell.ssim is None else f"{cell.ssim:.4f}",
        )

    def _speed(self, cell: Cell) -> str:
        found = speedup(cell.drawn, self.plain)
        if found is None:
            return "same work"
        value, word, _ = pace(found)
        return f"{value} {word} ({found.low:.2f}x to {found.high:.2f}x)"


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
    timed: bool = True,
    over: Over = "flops",
) -> Explored:
    """Draw the grid, the plain picture and, for the plot over `over`, the plain pipeline with fewer steps.

    Args:
        timed: measure times, in several rounds.
    Raises:
        DiffaccelError: the model, the settings or a recipe, a plot of times that are not measured; or `Cancelled`.
    """
    if over == "seconds" and not timed:
        raise PageError("There are no times to plot: let them be measured, or plot over FLOPs.")
    recipes = [session.with_edit(variant) for variant in variants(recipe, axes)]
    stock, fewer = session.with_edit(PLAIN), fewer_steps(ask.steps) if baseline else []
    line = [Job(f"plain, {steps} steps", stock, ask.model_copy(update={"steps": steps})) for steps in fewer]
    drawn_steps = ask.steps * (1 + len(recipes))
    watch.total = (drawn_steps + sum(fewer)) * (1 + ROUNDS if timed else 1)
    watch.show(0, watch.total, f"loading {Path(model).name}")
    with engine.pipeline(model):
        for variant in recipes:
            engine.wrapped(variant, str(session.folder))  # all are refused before any is drawn
        folder = session.new_folder()
        jobs = [Job("plain", stock, ask, folder / "plain.png"), *_grid(recipes, ask, folder), *line]
        plain, *drawn = draw_all(engine, session, jobs, watch, timed=timed)
    cells = [_cell(variant.name, own, plain) for variant, own in zip(recipes, drawn, strict=False)]
    below = [_cell(str(steps), own, plain) for steps, own in zip(fewer, drawn[len(cells) :], strict=True)]
    plot = folder / "speed-fidelity.png"
    save_frontier(_rows(ask, plain, cells, below), plot, over=over)
    columns = len(axes[1].values) if len(axes) > 1 else 3
    return Explored(plain, tuple(cells), columns, plot)


def _grid(recipes: Sequence[Recipe], ask: Ask, folder: Path) -> list[Job]:
    return [
        Job(
            f"{recipe.name} ({number} of {len(recipes)})",
            recipe,
            ask,
            folder / f"{number:02d}-{safe_name(recipe.name)}.png",
        )
        for number, recipe in enumerate(recipes, 1)
    ]


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
    time = spread(drawn.seconds) if drawn.seconds else None
    return Row(name, kind, steps, report.recipe, report.evaluations, report.rows, report.flops, seconds=time, psnr=psnr)

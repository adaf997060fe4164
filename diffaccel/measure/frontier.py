"""Quality over cost: recipes as points, the plain pipeline with fewer steps as the line they have to beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from diffaccel.errors import DiffaccelError
from diffaccel.files.output import write_file
from diffaccel.measure.rows import Row

Over = Literal["flops", "seconds", "evaluations"]
Quality = Callable[[Row], float | None]


def save_frontier(rows: Sequence[Row], path: Path, *, over: Over = "flops", overwrite: bool = True) -> None:
    """Write the plot as PNG; complete or not at all.

    Raises:
        DiffaccelError: matplotlib is missing, or nothing was measured on that axis.
    """
    figure = draw_frontier(rows, over)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=130), overwrite=overwrite)


def draw_frontier(rows: Sequence[Row], over: Over) -> Any:
    """One panel for PSNR and, where there was a judge, one for prompt accuracy."""
    panels = [(title, value) for title, value in _QUALITIES if any(value(row) is not None for row in rows)]
    if not panels or any(cost(row, over) is None for row in rows):
        raise DiffaccelError(f"there is nothing to plot over {over}.")
    figure = _figure(len(panels))
    for axes, (title, value) in zip(figure.axes, panels, strict=True):
        _draw_panel(axes, rows, over, value)
        axes.set(xlabel=_AXIS[over], ylabel=title)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(loc="lower right", frameon=False)
    return figure


def cost(row: Row, over: Over) -> float | None:
    """GFLOP per image, seconds per image, or denoiser evaluations."""
    if over != "seconds":
        return row.flops / 1e9 if over == "flops" else row.evaluations
    return None if row.seconds is None else row.seconds.median


def line_at(rows: Sequence[Row], x: float, value: Quality, over: Over = "flops") -> float | None:
    """Quality of the plain pipeline with as many steps as cost `x`, linear between measured step counts.

    None outside the measured range.
    """
    points = line_points(rows, value, over)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return None


def line_points(rows: Sequence[Row], value: Quality, over: Over) -> list[tuple[float, float]]:
    """(cost, quality) of plain and its fewer-steps runs, by rising cost."""
    line = [row for row in rows if row.kind != "recipe"]
    found = [(cost(row, over), value(row)) for row in line]
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def psnr_of(row: Row) -> float | None:
    """PSNR in dB; None for the reference and for identical pictures, which have no place on an axis."""
    return None if row.psnr is None or math.isinf(row.psnr) else row.psnr


def accuracy_of(row: Row) -> float | None:
    """Prompt accuracy in percent."""
    return None if row.accuracy is None else 100 * row.accuracy.mean


_QUALITIES: list[tuple[str, Quality]] = [
    ("PSNR against plain (dB)", psnr_of),
    ("correct pictures (%)", accuracy_of),
]
_AXIS = {
    "flops": "GFLOP per image (denoiser)",
    "seconds": "seconds per image",
    "evaluations": "denoiser evaluations",
}


def _figure(panels: int) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra; Figure alone starts no window system)
    except ImportError as error:
        raise DiffaccelError("plots need matplotlib; install it with: pip install matplotlib") from error
    figure = Figure(figsize=(6.5 * panels, 5), layout="constrained")
    figure.subplots(1, panels)
    return figure


def _draw_panel(axes: Any, rows: Sequence[Row], over: Over, value: Quality) -> None:
    points = line_points(rows, value, over)
    axes.plot(*zip(*points, strict=True), "-o", color="0.45", markersize=4, label="plain, fewer steps")
    for row in rows:
        x, y = cost(row, over), value(row)
        if y is None:
            continue
        if row.kind == "recipe":
            axes.plot([x], [y], "D", color="tab:red", markersize=5)
        if (
            value is accuracy_of and row.accuracy is not None
        ):  # without its interval a tenth of a point looks like a cliff
            axes.plot([x, x], [100 * row.accuracy.low, 100 * row.accuracy.high], color="0.7", linewidth=1, zorder=0)
        if over == "seconds" and row.seconds is not None:
            axes.plot([row.seconds.low, row.seconds.high], [y, y], color="0.7", linewidth=1, zorder=0)
        label = row.name if row.kind == "recipe" else str(row.steps)
        axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, parse_math=False)
    axes.plot([], [], "D", color="tab:red", label="recipes")

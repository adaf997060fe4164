"""One measured variant of a comparison, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from diffaccel.measure.quality import Interval
from diffaccel.measure.timing import Spread

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["plain", "recipe", "fewer steps"]


@dataclass(frozen=True)
class Row:
    """One variant, measured and scored.

    Attributes:
        name: recipe name, "plain", or "<n> steps".
        kind: "fewer steps" is the plain pipeline with a smaller step count.
        steps: denoising steps asked for.
        recipe: JSON form of what ran.
        matches: for "fewer steps", what it was chosen to equal, e.g. "time of balanced".
        seconds: seconds per image of the whole pipeline call; None if not timed.
        speedup: plain seconds over own seconds of the same round; None if not timed.
        evaluations: denoiser forwards per call, averaged over the batches.
        rows: batch rows the denoiser evaluated, per image.
        flops: FLOPs of denoiser and ControlNets, per image.
        accuracy: share of prompts whose picture shows all that was asked; None without a judge.
        accuracy_change: own accuracy minus plain accuracy, paired by prompt and seed.
        psnr: mean PSNR in dB against the reference, `inf` if all pictures are identical; None for the reference.
        ssim: mean SSIM against the reference; None for the reference.
        frechet: Frechet distance to the reference pictures in the judge's features; None if too few pictures.
        images: (n, 3, h, w) pictures in [0, 1].
    """

    name: str
    kind: Kind
    steps: int
    recipe: dict[str, Any]
    evaluations: float
    rows: float
    flops: float
    matches: tuple[str, ...] = ()
    seconds: Spread | None = None
    speedup: Spread | None = None
    accuracy: Interval | None = None
    accuracy_change: Interval | None = None
    psnr: float | None = None
    ssim: float | None = None
    frechet: float | None = None
    images: Tensor | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the pictures. Infinite numbers become "inf"."""
        return {key: json_value(value) for key, value in vars(self).items() if key != "images"}


def json_value(value: Any) -> Any:
    """The value as JSON holds it; infinite numbers become text."""
    if isinstance(value, (Spread, Interval)):
        return json_value(vars(value))
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Table columns by title, formatted; only those with at least one value."""
    plain = next((row for row in rows if row.kind == "plain"), None)
    found = {
        "variant": [row.name for row in rows],
        "steps": [str(row.steps) for row in rows],
        "evaluations": [f"{row.evaluations:g}" for row in rows],
        "rows/image": [f"{row.rows:.4g}" for row in rows],
        "s/image (range)": [_spread(row.seconds, "") for row in rows],
        "faster (range)": [_spread(row.speedup, "x") for row in rows],
        "GFLOP/image": [f"{row.flops / 1e9:.4g}" if row.flops else "" for row in rows],
        "fewer FLOPs": [_fewer(plain, row) for row in rows],
        "correct [95 %]": [_percent(row.accuracy) for row in rows],
        "change [95 %]": [_points(row.accuracy_change) for row in rows],
        "PSNR dB": [_decibel(row) for row in rows],
        "SSIM": [_number(row.ssim, ".3f") for row in rows],
        "Frechet": [_number(row.frechet, ".3g") for row in rows],
        "chosen to match": [", ".join(row.matches) for row in rows],
    }
    return {title: cells for title, cells in found.items() if any(cells)}


def rich_table(rows: Sequence[Row], caption: str = "") -> Table:
    """The columns as a rich table."""
    from rich.markup import escape  # noqa: PLC0415  (only for people at a terminal)
    from rich.table import Table  # noqa: PLC0415

    found = columns(rows)
    table = Table(caption=caption)
    for title in found:
        table.add_column(escape(title), justify="left" if title in ("variant", "chosen to match") else "right")
    for cells in zip(*found.values(), strict=True):
        table.add_row(*(escape(cell) for cell in cells))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The columns as a Markdown table."""
    found = columns(rows)
    lines = [" | ".join(found), " | ".join("---" for _ in found)]
    lines += [" | ".join(cells) for cells in zip(*found.values(), strict=True)]
    return "".join(f"| {line} |\n" for line in lines)


def _spread(value: Spread | None, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value.median:.3g}{unit}"
    return text if value.low == value.high else f"{text} ({value.low:.3g}-{value.high:.3g})"


def _fewer(plain: Row | None, row: Row) -> str:
    """Nothing where FLOPs could not be counted."""
    return f"{plain.flops / row.flops:.2f}x" if plain is not None and plain.flops and row.flops else ""


def _percent(value: Interval | None) -> str:
    return "" if value is None else f"{100 * value.mean:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _points(value: Interval | None) -> str:
    return "" if value is None else f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _decibel(row: Row) -> str:
    if row.psnr is None:
        return ""
    return "identical" if math.isinf(row.psnr) else f"{row.psnr:.1f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

"""The figures of a proof: one row per concept, one result per attack, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from diffaccel.erasure.proof.probes import Role
from diffaccel.measure.quality import Interval

if TYPE_CHECKING:
    from rich.table import Table

TITLES: dict[str, str] = {
    "erased": "erased",
    "synonym": "erased, another name",
    "kept": "kept",
    "neighbour": "not listed",
}


@dataclass(frozen=True)
class Row:
    """One concept, before and after the edit, on the same prompts and seeds.

    Attributes:
        role: erased, synonym (another name of an erased concept), kept, or neighbour (near it, listed nowhere).
        looked_for: what was recognised or not; for synonyms the erased concept.
        distance: root mean square change of pixels, 0 to 1.
        before, after: share of pictures in which it was recognised; None if nobody decides.
        change: after minus before, paired.
        clip_before, clip_after: mean agreement of picture and prompt.
        kernel_before, kernel_after: kernel distance to the real pictures in the reference folder.
    """

    role: Role
    concept: str
    looked_for: str
    prompts: int
    distance: float
    before: Interval | None = None
    after: Interval | None = None
    change: Interval | None = None
    clip_before: float | None = None
    clip_after: float | None = None
    kernel_before: float | None = None
    kernel_after: float | None = None


@dataclass(frozen=True)
class AttackResult:
    """One attack on prompts that name an erased concept.

    Attributes:
        lengths: norm of the attacking embedding over that of the prompt's; a large one is no realistic prompt.
        losses: difference to the original predictions at the first and the last step; () for the closed form.
        pictures: (n, 3, 3, h, w): original, edited, and edited under attack.
        original, before, after: share of pictures that show the concept, in the same order.
    """

    name: str
    prompts: tuple[str, ...]
    lengths: float
    losses: tuple[float, ...]
    seconds: float
    pictures: Tensor = field(repr=False)
    original: Interval | None = None
    before: Interval | None = None
    after: Interval | None = None


def concept_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Table columns by title, formatted; only those with a value."""
    found = {
        "": [TITLES[row.role] for row in rows],
        "concept": [row.concept for row in rows],
        "prompts": [str(row.prompts) for row in rows],
        "recognised before [95 %]": [percent(row.before) for row in rows],
        "after [95 %]": [percent(row.after) for row in rows],
        "change": ["" if row.change is None else f"{100 * row.change.mean:+.1f}" for row in rows],
        "CLIP before": [_number(row.clip_before) for row in rows],
        "CLIP after": [_number(row.clip_after) for row in rows],
        "to real pictures before": [_number(row.kernel_before) for row in rows],
        "to real pictures after": [_number(row.kernel_after) for row in rows],
        "pixels": [f"{row.distance:.3f}" for row in rows],
    }
    return {title: cells for title, cells in found.items() if any(cells)}


def attack_columns(results: Sequence[AttackResult]) -> dict[str, list[str]]:
    """The same for attacks."""
    found = {
        "attack": [result.name.replace("_", " ") for result in results],
        "prompts": [str(len(result.prompts)) for result in results],
        "original model": [percent(result.original) for result in results],
        "edited": [percent(result.before) for result in results],
        "under attack": [percent(result.after) for result in results],
        "length": [f"{result.lengths:.2f}x" for result in results],
        "loss": [" to ".join(f"{loss:.3g}" for loss in result.losses) for result in results],
        "seconds": [f"{result.seconds:.1f}" for result in results],
    }
    return {title: cells for title, cells in found.items() if any(cells)}


def percent(value: Interval | None) -> str:
    """A share with its interval in per cent."""
    return "" if value is None else f"{100 * value.mean:.1f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def rich_table(columns: Mapping[str, Sequence[str]], caption: str) -> Table:
    """Columns by title as a rich table."""
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(caption=caption)
    for title in columns:
        table.add_column(escape(title))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(escape(cell) for cell in cells))
    return table

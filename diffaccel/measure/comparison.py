"""What a comparison found: one row per variant, as a table, JSON, a contact sheet and a frontier plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffaccel.files.output import write_text
from diffaccel.measure.contact_sheet import save_contact_sheet
from diffaccel.measure.frontier import save_frontier
from diffaccel.measure.rows import Row, rich_table
from diffaccel.measure.timing import describe_machine

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Comparison:
    """Plain, recipes and fewer steps on the same prompts and seeds.

    Attributes:
        rows: plain first.
        prompts: the texts, in the order of the pictures.
        settings: steps, guidance, seed, batch size and the rest of the call.
        machine: what the seconds were measured on.
        notes: sentences a reader should know.
    """

    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def plain(self) -> Row:
        """The unaccelerated run."""
        return self.rows[0]

    def row(self, name: str) -> Row:
        """The variant of this name."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "settings": dict(self.settings) | {"prompts": len(self.prompts)},
            "machine": dict(self.machine),
            "notes": list(self.notes),
            "variants": [row.to_dict() for row in self.rows],
            "prompts": list(self.prompts),
        }

    def table(self) -> Table:
        """A rich table; columns nobody measured are left out."""
        return rich_table(self.rows, caption=describe_machine(self.machine))

    def save_json(self, path: Path, *, overwrite: bool = True) -> None:
        """Write `to_dict()`; complete or not at all. Raises `OutputError`."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        write_text(Path(path), text, overwrite=overwrite)

    def save_picture(self, path: Path, *, limit: int = 8, overwrite: bool = True) -> None:
        """Write a labelled contact sheet (PNG) of the first `limit` prompts. Raises `OutputError`."""
        save_contact_sheet(self, Path(path), limit=limit, overwrite=overwrite)

    def save_frontier(self, path: Path, *, over: Literal["flops", "seconds"] = "flops", overwrite: bool = True) -> None:
        """Write a plot of PSNR and accuracy over cost, with the line of fewer steps. Raises `OutputError`."""
        save_frontier(self.rows, Path(path), over=over, overwrite=overwrite)

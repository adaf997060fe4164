"""What a proof found: figures per concept and attack, pictures, and their table, JSON and sheet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffaccel.erasure.proof.figures import AttackResult, Row, attack_columns, concept_columns, rich_table
from diffaccel.erasure.proof.probes import Probe
from diffaccel.erasure.proof.sheet import save_sheet
from diffaccel.files.output import OutputFolder, write_text
from diffaccel.measure.quality import Interval
from diffaccel.measure.rows import json_value
from diffaccel.measure.timing import describe_machine

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Proof:
    """The outcome of `prove`.

    Attributes:
        edit: method, concepts, keeps, parameters, leaks and digest of the edit.
        null_drift: relative change of the prediction for the empty prompt; if it moves, all pictures do.
        frechet: distance of kept and neighbouring pictures after the edit to those before; None for too few of them.
        notes: what a reader should know, who decided first.
        probes, before, after: the prompts, and their pictures (n, 3, h, w) in [0, 1].
    """

    edit: Mapping[str, Any]
    rows: tuple[Row, ...]
    attacks: tuple[AttackResult, ...]
    null_drift: float | None
    frechet: float | None
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    notes: tuple[str, ...]
    probes: tuple[Probe, ...] = field(repr=False)
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)

    def of(self, *roles: str) -> list[Row]:
        """The rows of some roles."""
        return [row for row in self.rows if row.role in roles]

    @property
    def erased(self) -> float | None:
        """Share of pictures of erased concepts, by any of their names, that still show them."""
        return _mean((row.after, row.prompts) for row in self.of("erased", "synonym"))

    @property
    def kept_change(self) -> float | None:
        """Mean change of the share in which kept and neighbouring concepts are recognised."""
        return _mean((row.change, row.prompts) for row in self.of("kept", "neighbour"))

    @property
    def worst_kept(self) -> Row | None:
        """The kept or neighbouring concept that lost most."""
        rows = [row for row in self.of("kept", "neighbour") if row.change is not None]
        return min(rows, key=lambda row: row.change.mean if row.change else 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the pictures."""
        worst = self.worst_kept
        summary = {
            "erased_after": self.erased,
            "kept_change": self.kept_change,
            "worst_kept": None if worst is None else {"concept": worst.concept, "change": worst.change},
            "null_drift": self.null_drift,
            "frechet": self.frechet,
        }
        found = {
            "edit": self.edit,
            "summary": summary,
            "rows": [vars(row) for row in self.rows],
            "attacks": [{k: v for k, v in vars(a).items() if k != "pictures"} for a in self.attacks],
            "settings": self.settings,
            "machine": self.machine,
            "notes": self.notes,
            "prompts": [vars(probe) for probe in self.probes],
        }
        return {key: json_value(value) for key, value in found.items()}

    def summary(self) -> list[str]:
        """A few sentences with the figures that count."""
        lines = []
        if self.erased is not None:
            lines.append(
                f"Erased concepts are recognised in {100 * self.erased:.1f} % of their pictures, all names together."
            )
        worst = self.worst_kept
        if self.kept_change is not None and worst is not None and worst.change is not None:
            lines.append(
                f"Kept and unlisted concepts change by {100 * self.kept_change:+.1f} points on average; the worst is "
                f"{worst.concept} ({100 * worst.change.mean:+.1f})."
            )
        if self.null_drift is not None:
            lines.append(f"The prediction for the empty prompt moves by {100 * self.null_drift:.2f} %.")
        if self.frechet is not None:
            lines.append(f"Frechet distance of kept pictures after to before: {self.frechet:.3g}.")
        return lines

    def tables(self) -> list[Table]:
        """Rich tables: concepts, and attacks if there were any; columns that nobody measured are left out."""
        tables = [rich_table(concept_columns(self.rows), describe_machine(self.machine))]
        return [*tables, rich_table(attack_columns(self.attacks), "")] if self.attacks else tables

    def __str__(self) -> str:
        from rich.console import Console  # noqa: PLC0415

        text = io.StringIO()
        console = Console(file=text, width=160)
        for table in self.tables():
            console.print(table)
        return text.getvalue() + "\n".join([*self.summary(), *self.notes])

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write proof.json and proof.png into a folder; returns their paths. Raises `OutputError`."""
        target = OutputFolder(Path(folder), overwrite)
        report, picture = target.claim("proof.json"), target.claim("proof.png")
        write_text(report, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", overwrite=overwrite)
        save_sheet(self, picture, overwrite=overwrite)
        return [report, picture]


def _mean(parts: Iterable[tuple[Interval | None, int]]) -> float | None:
    """Mean weighted by the number of pictures; None if nothing was measured."""
    known = [(interval.mean, count) for interval, count in parts if interval is not None]
    return sum(m * c for m, c in known) / sum(c for _, c in known) if known else None

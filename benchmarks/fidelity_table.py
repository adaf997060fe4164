"""Verdicts of fidelity.py: recipes against the line of fewer steps, and the page that shows them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.subjects import Subject
from diffaccel.measure.frontier import Over, Quality, accuracy_of, line_at, psnr_of
from diffaccel.measure.quality import IDENTICAL_DB, Interval, bootstrap, psnr
from diffaccel.measure.rows import Row, markdown_table
from diffaccel.measure.runner import Runner
from diffaccel.measure.timing import describe_machine
from diffaccel.recipes.recipe import Recipe

PSNR_MARGIN = 0.3  # dB; closer than this to the line counts as on it
_EXPLANATION = (
    "Against fewer steps: quality of the recipe minus that of the plain pipeline with as many steps as cost the same, linear between "
    f"measured step counts. Within {PSNR_MARGIN} dB a recipe counts as on the line."
)


def against_line(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For every recipe: its quality minus that of fewer steps at equal FLOPs and at equal evaluations.

    PSNR has no value for plain itself, so a recipe that saves less than the longest line run has no PSNR to compare with.
    """
    return [
        {"name": row.name}
        | {f"psnr_{over}": _above(rows, row, psnr_of, over) for over in ("flops", "evaluations")}
        | {"psnr_flops_interval": vars(found) if (found := psnr_interval(rows, row)) else None}
        | {f"accuracy_{over}": _above(rows, row, accuracy_of, over) for over in ("flops", "evaluations")}
        | {"verdict": verdict(rows, row)}
        for row in rows
        if row.kind == "recipe"
    ]


def psnr_interval(rows: Sequence[Row], row: Row) -> Interval | None:
    """PSNR minus that of fewer steps at equal FLOPs with a bootstrap interval, picture by picture (same prompt and seed).

    None outside the line, or where the pictures were not kept.
    """
    line = sorted((r for r in rows if r.kind == "fewer steps" and psnr_of(r) is not None), key=lambda r: r.flops)
    for below, above in itertools.pairwise(line):
        if below.flops <= row.flops <= above.flops and rows[0].images is not None:
            own, low, high = (_psnr_by_picture(r, rows[0]) for r in (row, below, above))
            weight = (row.flops - below.flops) / (above.flops - below.flops)
            return bootstrap(own - (low + weight * (high - low)))
    return None


def _psnr_by_picture(row: Row, plain: Row) -> torch.Tensor:
    assert row.images is not None
    assert plain.images is not None
    return psnr(row.images, plain.images).double().clamp(max=IDENTICAL_DB)


def _above(rows: Sequence[Row], row: Row, value: Quality, over: Over) -> float | None:
    x = row.flops / 1e9 if over == "flops" else row.evaluations
    own, line = value(row), line_at(rows, x, value, over)
    return None if own is None or line is None else own - line


def verdict(rows: Sequence[Row], row: Row) -> str:
    """One word for PSNR at equal FLOPs; accuracy counts only where it leaves its own confidence interval."""
    psnr, accuracy = _above(rows, row, psnr_of, "flops"), _above(rows, row, accuracy_of, "flops")
    if psnr is None:
        return "loses: fewer steps are cheaper and closer" if dominated(rows, row) else "outside the line"
    word = "wins" if psnr > PSNR_MARGIN else "loses" if psnr < -PSNR_MARGIN else "on the line"
    if row.accuracy is None or accuracy is None:
        return word
    noise = 100 * (row.accuracy.high - row.accuracy.low) / 2
    return word if abs(accuracy) <= noise else f"{word}; accuracy {'wins' if accuracy > 0 else 'loses'}"


def dominated(rows: Sequence[Row], row: Row) -> bool:
    """Whether some run with fewer steps costs no more and is closer to plain."""
    own = psnr_of(row)
    line = [other for other in rows if other.kind == "fewer steps" and other.flops <= row.flops]
    return own is not None and any((psnr_of(other) or 0.0) > own + PSNR_MARGIN for other in line)


def target(rows: Sequence[Row], least: float = 3.0) -> str:
    """The promise about the preset `fast` (`least` times fewer FLOPs), kept or not."""
    plain, fast = rows[0], next((row for row in rows if row.name == "fast"), None)
    if fast is None or fast.accuracy is None or plain.accuracy is None:
        return "`fast` was not measured."
    saving, kept = plain.flops / fast.flops, fast.accuracy.mean / plain.accuracy.mean
    word = "met" if saving >= least and kept >= 0.98 and fast.steps == plain.steps else "missed"
    return (
        f"Target of `fast` ({least:g}x fewer FLOPs, 98 % of plain accuracy, same steps): **{word}**, {saving:.2f}x fewer FLOPs, "
        f"{100 * kept:.1f} % of plain accuracy."
    )


@dataclass(frozen=True)
class Page:
    """The conditions of a run, and the page that shows its rows."""

    runner: Runner
    machine: dict[str, Any]
    check: str
    subject: Subject

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the conditions."""
        settings = self.runner.settings
        facts = {
            "steps": settings.steps,
            "guidance": settings.guidance,
            "seed": settings.seed,
            "batch": settings.batch_size,
            "call": dict(settings.call),
        }
        return {
            "machine": self.machine,
            "settings": facts | {"prompts": len(self.runner.prompts)},
            "notes": [self.check],
        }

    def render(self, rows: Sequence[Row], methods: Sequence[Row]) -> str:
        """Everything as Markdown."""
        count = len(methods[0].images) if methods[0].images is not None else 0
        alone = [row for row in methods if row.name not in {known.name for known in rows}]
        sections = [
            f"# Fidelity on {self.subject.name}",
            self._conditions(),
            *_section("Presets", rows, f"{self.subject.stem}-presets.png"),
            target(rows, self.subject.saving),
            *_section(f"Methods alone, on the first {count} prompts", methods, f"{self.subject.stem}-methods.png"),
            "## The recipes",
            "\n".join(_recipe_line(row) for row in [*rows, *alone] if row.kind == "recipe"),
        ]
        return "\n\n".join(sections) + "\n"

    def _conditions(self) -> str:
        settings, pipe = self.runner.settings, self.runner.pipe
        return (
            f"{len(self.runner.prompts)} held-out prompts (half with one object, half with two), {settings.steps} steps of "
            f"{type(pipe.scheduler).__name__}, guidance {settings.guidance}, seeds from {settings.seed}. PSNR, SSIM and "
            f"Frechet distance are against plain. {self.check} {describe_machine(self.machine)}. Seconds of a machine with "
            "other work are rough; FLOPs are exact."
        )


def _section(title: str, rows: Sequence[Row], picture: str) -> list[str]:
    return [
        f"## {title}",
        markdown_table(rows).rstrip(),
        _EXPLANATION,
        _line_table(against_line(rows)).rstrip(),
        f"![{title}]({picture})",
    ]


def _recipe_line(row: Row) -> str:
    return f"- {row.name}: `{Recipe.from_dict(row.recipe).describe()}`"


def _line_table(entries: Sequence[dict[str, Any]]) -> str:
    entries = [entry | {"psnr_flops": _with_interval(entry)} for entry in entries]
    titles = {
        "name": "recipe",
        "psnr_flops": "PSNR, equal FLOPs [95 %]",
        "accuracy_flops": "accuracy, equal FLOPs",
        "psnr_evaluations": "PSNR, equal evaluations",
        "accuracy_evaluations": "accuracy, equal evaluations",
        "verdict": "verdict",
    }
    lines = [" | ".join(titles.values()), " | ".join("---" for _ in titles)]
    lines += [" | ".join(_cell(entry[key]) for key in titles) for entry in entries]
    return "".join(f"| {line} |\n" for line in lines)


def _with_interval(entry: dict[str, Any]) -> str:
    found = entry["psnr_flops_interval"]
    return _cell(entry["psnr_flops"]) + (f" [{found['low']:+.1f}, {found['high']:+.1f}]" if found else "")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:+.1f}" if isinstance(value, float) else str(value)

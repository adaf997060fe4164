"""Pieces of HTML: figures, the strip of steps, messages. Every text that came from a person or a file is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from diffaccel.engine.report import Report
from diffaccel.engine.run import Evaluation

Work = Literal["full", "partial", "guidance", "skipped"]
MEANING: dict[Work, str] = {
    "full": "everything computed",
    "partial": "part of the network or of the picture",
    "guidance": "without the unconditional half",
    "skipped": "network not run",
}
_FULL = 0.98  # share of the plain FLOPs from which a step counts as full


@dataclass(frozen=True)
class Step:
    """One denoiser evaluation of a run.

    Attributes:
        share: FLOPs as a share of what the plain pipeline spends on an evaluation, in [0, 1].
        work: what was left out.
        tags: what the methods said about it.
    """

    index: int
    sigma: float
    share: float
    work: Work
    tags: str = ""


def steps_of(report: Report) -> list[Step]:
    """What was computed at each evaluation, ControlNets included."""
    dense = _dense_per_row(report.trace)
    by_evaluation: dict[int, list[Evaluation]] = {}
    for entry in report.trace:
        by_evaluation.setdefault(entry.evaluation, []).append(entry)
    return [_step(index, entries, dense) for index, entries in sorted(by_evaluation.items())]


def _dense_per_row(trace: Iterable[Evaluation]) -> dict[str, float]:
    """FLOPs of a row in a complete call, by network: the largest seen stands in where no call was complete."""
    found: dict[str, float] = {}
    for entry in trace:
        cost = entry.dense_flops_per_row
        if cost is None:
            cost = (entry.flops or 0) / entry.rows if entry.rows else 0.0
        found[entry.network] = max(found.get(entry.network, 0.0), cost)
    return found


def _step(index: int, entries: Sequence[Evaluation], dense: dict[str, float]) -> Step:
    plain = sum(entry.stock_rows * dense[entry.network] for entry in entries)
    done = sum(entry.flops or 0 for entry in entries)
    of_rows = sum(entry.rows * dense[entry.network] for entry in entries)
    share = min(1.0, done / plain) if plain else 1.0
    if not done:
        work: Work = "skipped"
    elif share >= _FULL:
        work = "full"
    else:
        work = "guidance" if done >= _FULL * of_rows else "partial"
    tags = dict.fromkeys(str(tag) for entry in entries for tag in entry.tags if isinstance(tag, str))
    return Step(index, entries[0].sigma, share, work, ", ".join(tags))


def strip(title: str, report: Report) -> str:
    """A bar per evaluation, as high as its share of the plain work."""
    found = steps_of(report)
    bars = "".join(_bar(step) for step in found)
    counts = {work: sum(step.work == work for step in found) for work in MEANING}
    spoken = ", ".join(f"{count} {MEANING[work]}" for work, count in counts.items() if count)
    label = f"{title}: {len(found)} evaluations, {spoken}"
    return (
        f'<div class="da-strip"><div class="da-strip-name">{escape(title)}'
        f"<span>{len(found)} evaluations</span></div>"
        f'<div class="da-bars" role="img" aria-label="{escape(label)}">{bars}</div></div>'
    )


def _bar(step: Step) -> str:
    sigma = "" if math.isnan(step.sigma) else f", noise level {step.sigma:.3g}"
    tip = f"Evaluation {step.index + 1}{sigma}: {step.share:.0%} of the plain work, {MEANING[step.work]}"
    height = max(3.0, 100 * step.share) if step.work != "skipped" else 3.0
    return f'<span class="da-slot" title="{escape(tip)}"><i class="da-{step.work}" style="height:{height:.0f}%"></i></span>'


def legend(reports: Sequence[Report]) -> str:
    """What the colours of the strips mean; only those that occur."""
    present = {step.work for report in reports for step in steps_of(report)}
    items = "".join(
        f'<span><i class="da-{work}"></i>{text}</span>' for work, text in MEANING.items() if work in present
    )
    return f'<div class="da-legend">{items}</div>'


def strips(named: dict[str, Report]) -> str:
    """Strips under each other, with their legend."""
    return (
        '<section class="da-card" aria-label="What was computed at each step"><h3>What was computed at each step</h3>'
        + "".join(strip(title, report) for title, report in named.items())
        + legend(list(named.values()))
        + "</section>"
    )


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Large figures: (value, what it is, small print)."""
    cells = "".join(
        f'<div class="da-tile"><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(note)}</small></div>'
        for value, name, note in items
    )
    return f'<div class="da-tiles">{cells}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, text: bool = False) -> str:
    """A small table; the first column names the row. With `text`, cells are words rather than numbers."""
    kind = "da-table da-words" if text else "da-table"
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="da-scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def message(text: str, kind: Literal["good", "bad", "plain"] = "plain") -> str:
    """One sentence that screen readers announce when it changes."""
    role = "alert" if kind == "bad" else "status"
    return f'<div class="da-message da-{kind}" role="{role}">{escape(text)}</div>' if text else ""


def notes(sentences: Sequence[str]) -> str:
    """Sentences worth reading."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in dict.fromkeys(sentences))
    return f'<ul class="da-notes">{items}</ul>' if items else ""


def decibel(value: float | None) -> str:
    """A PSNR for people."""
    if value is None:
        return "n/a"
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def fewer(plain: float, own: float) -> str:
    """How many times fewer FLOPs; 0 stands for those that could not be counted."""
    return f"{plain / own:.2f}x" if plain and own else "n/a"


def flops(value: float) -> str:
    """FLOPs with a unit; 0 stands for those that could not be counted."""
    if not value:
        return "not counted"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value:.3g} FLOP"

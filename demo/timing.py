"""Pictures drawn against the clock: each once before it runs, then all of them several times in turns.

A speed is shown with the range that it had over the rounds, or not at all; one run each says nothing on a machine that
does other things as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from diffaccel.demo.engine import Ask, Drawn, Engine, Watch
from diffaccel.demo.sessions import Session
from diffaccel.measure.timing import Spread, ratio, rotated, spread
from diffaccel.recipes.recipe import Recipe

ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to draw; None as path keeps it out of the session's files."""

    label: str
    recipe: Recipe
    ask: Ask
    path: Path | None = None


def steps_in_all(jobs: Sequence[Job], *, timed: bool) -> int:
    """Denoising steps until all jobs are done."""
    return sum(job.ask.steps for job in jobs) * (1 + ROUNDS if timed else 1)


def draw_all(engine: Engine, session: Session, jobs: Sequence[Job], watch: Watch, *, timed: bool) -> list[Drawn]:
    """The pictures, inside `engine.pipeline(...)`; with `timed`, each with the seconds of every round.

    Raises:
        DiffaccelError: a recipe or its settings; or `Cancelled`.
    """

    def draw(job: Job, path: Path | None, note: str = "") -> Drawn:
        watch.label = job.label + note
        return engine.draw(job.recipe, job.ask, watch, path, str(session.folder))

    if not timed:
        return [draw(job, job.path) for job in jobs]
    for job in jobs:
        draw(job, None, ", warming up")
    drawn = [draw(job, job.path, _round(1)) for job in jobs]
    seconds = [[first.report.seconds] for first in drawn]
    for number in range(1, ROUNDS):
        for index in rotated(range(len(jobs)), number):
            seconds[index].append(draw(jobs[index], None, _round(number + 1)).report.seconds)
    return [dataclasses.replace(first, seconds=tuple(own)) for first, own in zip(drawn, seconds, strict=True)]


def _round(number: int) -> str:
    return f", round {number} of {ROUNDS}"


def speedup(own: Drawn, plain: Drawn) -> Spread | None:
    """Plain seconds over own seconds, round by round; None if they were not timed or did the same work.

    The same work with the same result has no speed: whatever the clock says then is noise.
    """
    same = own.report.flops == plain.report.flops and own.image.tobytes() == plain.image.tobytes()
    return ratio(own.seconds, plain.seconds) if own.seconds and not same else None


def pace(speed: Spread) -> tuple[str, str, str]:
    """A speed-up in words: ("1.90x", "faster", "1.84x to 1.97x in 3 rounds"); what the noise hides is no difference."""
    low, high = speed.low, speed.high
    if low <= 1 <= high:
        return "as fast", "within the noise", f"{low:.2f}x to {high:.2f}x as fast in {ROUNDS} rounds"
    if high < 1:
        return f"{1 / speed.median:.2f}x", "slower", f"{1 / high:.2f}x to {1 / low:.2f}x in {ROUNDS} rounds"
    return f"{speed.median:.2f}x", "faster", f"{low:.2f}x to {high:.2f}x in {ROUNDS} rounds"


def seconds_of(drawn: Drawn) -> str:
    """Median and range, or nothing if it was not timed."""
    if not drawn.seconds:
        return ""
    found = spread(drawn.seconds)
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"

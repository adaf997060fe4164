"""Looking for recipes above the line of fewer steps: methods alone first, then the best of each kind together.

Three rounds, each on fewer candidates and more prompts (successive halving). Candidates are ranked by how far their PSNR
lies above the line of fewer steps at equal FLOPs, within bands of equal saving, so cheap and careful recipes both survive.
Nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity_table import against_line
from diffaccel import (
    AdaptiveGuidance,
    GuidanceInterval,
    Recipe,
    SkipCache,
    StepSchedule,
    TokenDownsampling,
    TokenMerging,
)
from diffaccel.engine.method import Method
from diffaccel.errors import DiffaccelError
from diffaccel.files.output import write_text
from diffaccel.measure.compare import score
from diffaccel.measure.frontier import line_at, psnr_of
from diffaccel.measure.rows import Row, markdown_table
from diffaccel.measure.runner import PLAIN, Contestant, Measurement, Runner

# Divisors of 1000 (nearly): for others the DDIM of diffusers rounds its stride down and the line would be unfairly low.
LINE = (8, 10, 20, 25, 40)
FIRST, SECOND = 8, 16  # prompts of the first two rounds; the last one takes all
BANDS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, math.inf)  # plain FLOPs over own FLOPs
Methods = tuple[Method, ...]


def guidance_grid() -> list[Methods]:
    """Where guidance stops and starts, in noise levels, and adaptive thresholds."""
    intervals = [GuidanceInterval(low=low) for low in (0.3, 1.0, 2.0, 4.0, 8.0)]
    late = [GuidanceInterval(high=high, low=1.0) for high in (8.0, 20.0)]
    adaptive = [AdaptiveGuidance(threshold=t) for t in (0.99, 0.999)]
    return [(m,) for m in [*intervals, *late, *adaptive]]


def skip_grid() -> list[Methods]:
    """Interval, depth, order of prediction, spacing and noise window of the skip cache."""
    plain = [SkipCache(interval=n, depth=0, order=o) for n in (3, 5) for o in (0, 1, 2)]
    deep = [SkipCache(interval=3, depth=d, order=1) for d in (1, 2)]
    spaced = [SkipCache(interval=n, order=1, schedule="early") for n in (2, 3)] + [
        SkipCache(interval=3, order=1, schedule="late")
    ]
    windows = [SkipCache(interval=n, order=1, window=(high, 0.0)) for n in (2, 4) for high in (8.0, 2.0)]
    return [(m,) for m in [*plain, *deep, *spaced, *windows]]


def token_grid() -> list[Methods]:
    """Token methods, at all sizes whether or not they pay on this machine: the axis is FLOPs."""
    merging = [TokenMerging(ratio=0.5, importance=i, min_tokens=1) for i in (False, True)]
    return [(m,) for m in [*merging, TokenDownsampling(factor=2, min_tokens=1)]]


def step_grid() -> list[Methods]:
    """Fewer steps as a part of a recipe; the empty tuple keeps them."""
    return [(), (StepSchedule(fraction=0.6),)]


class Search:
    """One plain run and one line per number of prompts; candidates are measured against both."""

    def __init__(self, runner: Runner, cases: Sequence[Any]) -> None:
        self.runner, self.cases = runner, cases
        self.base: dict[int, list[Measurement]] = {}

    def rows(self, candidates: Iterable[Methods], count: int, judge: Any = None) -> list[Row]:
        """Plain, line and candidates on the first `count` prompts; candidates that cannot run are left out."""
        steps = self.runner.settings.steps
        if count not in self.base:
            line = [Contestant(f"{k} steps", "fewer steps", PLAIN, k) for k in LINE if k < steps]
            self.base[count] = [self._run(c, count) for c in [Contestant("plain", "plain", PLAIN, steps), *line]]
        recipes = [Recipe(name=Recipe(methods=methods).describe(), methods=methods) for methods in candidates]
        found = [self._try(Contestant(recipe.name, "recipe", recipe, steps), count) for recipe in recipes]
        return score([*self.base[count], *(m for m in found if m is not None)], self.cases[:count], judge)

    def _try(self, contestant: Contestant, count: int) -> Measurement | None:
        try:
            return self._run(contestant, count)
        except DiffaccelError as error:
            print(f"left out: {contestant.name}: {error}", file=sys.stderr)
            return None

    def _run(self, contestant: Contestant, count: int) -> Measurement:
        measurement = Measurement(contestant)
        for batch in self.runner.batches():
            batch = range(batch.start, min(batch.stop, count))
            if batch:
                images, report, _ = self.runner.run(contestant, batch)
                measurement.images.append(images)
                measurement.reports.append(report)
        print(f"{count} prompts: {contestant.name}", file=sys.stderr, flush=True)
        return measurement


def margin(rows: Sequence[Row], row: Row) -> float:
    """PSNR above the line at equal FLOPs, in dB; -inf where the line was not measured."""
    psnr, line = psnr_of(row), line_at(rows, row.flops / 1e9, psnr_of)
    return -math.inf if psnr is None or line is None else psnr - line


def best_by_band(rows: Sequence[Row], keep: int) -> list[Row]:
    """The `keep` recipes furthest above the line within each band of FLOP savings."""
    plain, recipes = rows[0], [row for row in rows if row.kind == "recipe"]
    chosen = []
    for low, high in itertools.pairwise(BANDS):
        band = [row for row in recipes if low <= plain.flops / row.flops < high]
        chosen += sorted(band, key=lambda row: margin(rows, row), reverse=True)[:keep]
    return chosen


def methods_of(row: Row) -> Methods:
    """The methods of a measured recipe."""
    return Recipe.from_dict(row.recipe).methods


def combinations(parts: Sequence[Sequence[Methods]]) -> list[Methods]:
    """One of each part, joined; combinations of fewer than two methods are known already."""
    joined = [tuple(itertools.chain.from_iterable(choice)) for choice in itertools.product(*parts)]
    return [methods for methods in joined if len(methods) > 1]


def search(runner: Runner, cases: Sequence[Any], judge: Any, out: Path) -> list[Row]:
    """Run the rounds; writes search.md and search.json and returns the rows of the last round."""
    work = Search(runner, cases)
    grids = (guidance_grid(), skip_grid(), token_grid())
    guidance, skips, tokens = (best_by_band(work.rows(grid, FIRST), 1) for grid in grids)
    parts = [[(), *map(methods_of, kept)] for kept in (guidance, skips)]
    pairs = work.rows(combinations([*parts, step_grid()]), FIRST)
    with_tokens = [(*methods_of(row), *methods_of(token)) for row in best_by_band(pairs, 1) for token in tokens[:1]]
    singles = [methods_of(row) for row in (*guidance, *skips, *tokens)]
    second = work.rows([*singles, *map(methods_of, best_by_band(pairs, 2)), *with_tokens], min(SECOND, len(cases)))
    rows = work.rows(map(methods_of, best_by_band(second, 1)), len(cases), judge)
    _write(rows, len(cases), out)
    return rows


def _write(rows: Sequence[Row], prompts: int, out: Path) -> None:
    data = {"prompts": prompts, "rows": [row.to_dict() for row in rows], "against_fewer_steps": against_line(rows)}
    write_text(out / "search.json", json.dumps(data, indent=2, allow_nan=False) + "\n", overwrite=True)
    text = f"# Search on shapes-sd, {prompts} prompts\n\n{markdown_table(rows)}"
    write_text(out / "search.md", text, overwrite=True)
    print(text)

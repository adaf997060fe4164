"""Plain against accelerated: the same prompt and seed, drawn by the stock pipeline and with a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffaccel.demo.engine import PLAIN, Ask, Drawn, Engine, Watch
from diffaccel.demo.markup import decibel, flops, notes, strips, table, tiles
from diffaccel.demo.sessions import Session
from diffaccel.demo.timing import Job, draw_all, pace, seconds_of, speedup, steps_in_all
from diffaccel.files.output import safe_name
from diffaccel.measure.quality import QualityError, psnr, ssim
from diffaccel.measure.timing import Spread
from diffaccel.recipes.recipe import Recipe


@dataclass(frozen=True)
class Likeness:
    """How close a picture is to another one of the same seed; None where it could not be measured, `reason` says why."""

    psnr: float | None
    ssim: float | None
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    """Two pictures and how they differ.

    Attributes:
        region_map: file with the grey picture of how often each region was computed, or None.
    """

    plain: Drawn
    fast: Drawn
    likeness: Likeness
    region_map: Path | None = None

    @property
    def saved(self) -> tuple[str, str]:
        """The FLOPs in words: ("2.23x", "fewer FLOPs"), ("1.10x", "more FLOPs") or ("1.00x", "the FLOPs of plain")."""
        if not (self.plain.report.flops and self.fast.report.flops):
            return "n/a", "FLOPs not counted"
        share = self.plain.report.flops / self.fast.report.flops
        if abs(share - 1) < 0.005:
            return "1.00x", "the FLOPs of plain"
        return (f"{share:.2f}x", "fewer FLOPs") if share > 1 else (f"{1 / share:.2f}x", "more FLOPs")

    def summary(self) -> str:
        """The gain in a sentence."""
        speed = speedup(self.fast, self.plain)
        if speed is None:
            return f"Done: {' '.join(self.saved)}."
        value, word, noise = pace(speed)
        return f"Done: {value} {word} ({noise})."

    def figures(self) -> str:
        """Tiles, table and notes as HTML."""
        fast, speed = self.fast.report, speedup(self.fast, self.plain)
        close = "n/a" if self.likeness.ssim is None else f"{self.likeness.ssim:.4f}"
        shown = tiles(
            [
                *([pace(speed)] if speed is not None else []),
                (*self.saved, flops(fast.flops)),
                (decibel(self.likeness.psnr), "PSNR to plain", "higher is closer; above 40 dB is hard to see"),
                (close, "SSIM to plain", "1 is identical"),
            ]
        )
        sentences = [*fast.notes, *([self.likeness.reason] if self.likeness.reason else []), *self._about_time(speed)]
        return shown + self._table() + notes(sentences)

    def _about_time(self, speed: Spread | None) -> list[str]:
        if not self.fast.seconds:
            return ["Times were not measured."]
        return [] if speed is not None else ["Nothing was left out, so there is no speed to show."]

    def _table(self) -> str:
        columns = {"seconds": seconds_of, "steps": _steps, "evaluations": _evaluations, "rows": _rows, "work": _work}
        if not self.fast.seconds:
            del columns["seconds"]
        rows = [
            (name, *(column(drawn) for column in columns.values()))
            for name, drawn in (("Plain", self.plain), ("Accelerated", self.fast))
        ]
        return table(("", *columns), rows, f"Recipe: {self.fast.report.recipe['name']}")

    def steps(self) -> str:
        """The two strips as HTML."""
        return strips({"Plain": self.plain.report, "Accelerated": self.fast.report})


def _steps(drawn: Drawn) -> str:
    return str(drawn.report.steps)


def _evaluations(drawn: Drawn) -> str:
    return str(drawn.report.evaluations)


def _rows(drawn: Drawn) -> str:
    return str(drawn.report.rows)


def _work(drawn: Drawn) -> str:
    return flops(drawn.report.flops)


def compare(
    engine: Engine, session: Session, model: str, ask: Ask, recipe: Recipe, watch: Watch, *, timed: bool = True
) -> Compared:
    """Draw both pictures; files lie in a new folder of the session.

    Args:
        timed: measure times, in several rounds.
    Raises:
        DiffaccelError: the model, the settings or the recipe; or `Cancelled`.
    """
    plain_recipe, recipe = session.with_edit(PLAIN), session.with_edit(recipe)
    jobs = [Job("plain", plain_recipe, ask), Job("accelerated", recipe, ask)]
    watch.total = steps_in_all(jobs, timed=timed)
    watch.show(0, watch.total, f"loading {Path(model).name}")
    with engine.pipeline(model):
        watch.check()
        engine.wrapped(recipe, str(session.folder))  # refused before anything is drawn
        folder, name = session.new_folder(), f"{safe_name(ask.prompt)}-{ask.seed}"
        files = (folder / f"{name}-plain.png", folder / f"{name}.png")
        jobs = [replace(job, path=path) for job, path in zip(jobs, files, strict=True)]
        plain, fast = draw_all(engine, session, jobs, watch, timed=timed)
    return Compared(plain, fast, likeness(fast.image, plain.image), _save_map(fast, folder))


def likeness(image: Any, reference: Any) -> Likeness:
    """PSNR and SSIM of two PIL pictures."""
    try:
        first, second = _tensor(image), _tensor(reference)
        return Likeness(float(psnr(first, second)[0]), float(ssim(first, second)[0]))
    except QualityError as error:
        return Likeness(None, None, str(error))


def _tensor(image: Any) -> torch.Tensor:
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _save_map(fast: Drawn, folder: Path) -> Path | None:
    if fast.report.regions is None:
        return None
    path = folder / "regions.png"
    fast.report.region_map().save(path)
    return path

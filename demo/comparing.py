"""Plain against accelerated: the same prompt and seed, drawn by the stock pipeline and with a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffaccel.demo.engine import PLAIN, Ask, Drawn, Engine, Watch
from diffaccel.demo.markup import decibel, flops, notes, strips, table, tiles
from diffaccel.demo.sessions import Session
from diffaccel.output import safe_name
from diffaccel.quality import QualityError, psnr, ssim
from diffaccel.recipe import Recipe


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
        warm: whether both were drawn once before the clock ran.
        region_map: file with the grey picture of how often each region was computed, or None.
    """

    plain: Drawn
    fast: Drawn
    likeness: Likeness
    warm: bool
    region_map: Path | None = None

    @property
    def speedup(self) -> float:
        """Plain seconds over accelerated seconds."""
        return self.plain.report.seconds / max(self.fast.report.seconds, 1e-9)

    @property
    def pace(self) -> tuple[str, str]:
        """The speed-up in words: ("1.90x", "faster"), ("1.10x", "slower") or ("1.00x", "as fast")."""
        if abs(self.speedup - 1) < 0.005:
            return "1.00x", "as fast"
        slower = self.speedup < 1
        return f"{1 / self.speedup if slower else self.speedup:.2f}x", "slower" if slower else "faster"

    def figures(self) -> str:
        """Tiles, table and notes as HTML."""
        fast, plain = self.fast.report, self.plain.report
        shown = tiles(
            [
                (*self.pace, f"{fast.seconds:.2f} s instead of {plain.seconds:.2f} s"),
                (f"{plain.flops / max(fast.flops, 1):.2f}x", "fewer FLOPs", flops(fast.flops)),
                (decibel(self.likeness.psnr), "PSNR to plain", "higher is closer; above 40 dB is hard to see"),
                (
                    "n/a" if self.likeness.ssim is None else f"{self.likeness.ssim:.4f}",
                    "SSIM to plain",
                    "1 is identical",
                ),
            ]
        )
        rows = [_row("Plain", self.plain), _row("Accelerated", self.fast)]
        header = ("", "seconds", "steps", "evaluations", "rows", "work")
        sentences = [*fast.notes, *([self.likeness.reason] if self.likeness.reason else [])]
        if not self.warm:
            sentences.append("Neither picture was drawn before the clock ran, so counting FLOPs is part of the time.")
        return shown + table(header, rows, f"Recipe: {fast.recipe['name']}") + notes(sentences)

    def steps(self) -> str:
        """The two strips as HTML."""
        return strips({"Plain": self.plain.report, "Accelerated": self.fast.report})


def _row(name: str, drawn: Drawn) -> tuple[str, ...]:
    report = drawn.report
    return (
        name,
        f"{report.seconds:.2f}",
        str(report.steps),
        str(report.evaluations),
        str(report.rows),
        flops(report.flops),
    )


def compare(
    engine: Engine, session: Session, model: str, ask: Ask, recipe: Recipe, watch: Watch, *, warm: bool = True
) -> Compared:
    """Draw both pictures; files lie in a new folder of the session.

    Raises:
        DiffaccelError: the model, the settings or the recipe; or `Cancelled`.
    """
    watch.total = ask.steps * (4 if warm else 2)
    watch.label = f"loading {Path(model).name}"
    watch.show(0, watch.total, watch.label)
    plain_recipe, recipe = session.with_edit(PLAIN), session.with_edit(recipe)
    with engine.pipeline(model):
        watch.check()
        engine.wrapped(recipe, str(session.folder))  # refused before anything is drawn
        folder, name = session.new_folder(), f"{safe_name(ask.prompt)}-{ask.seed}"
        runs = [("plain", plain_recipe, folder / f"{name}-plain.png"), ("accelerated", recipe, folder / f"{name}.png")]
        if warm:
            _draw_all(engine, session, ask, [(f"{label}, warming up", item, None) for label, item, _ in runs], watch)
        plain, fast = _draw_all(engine, session, ask, runs, watch)
    return Compared(plain, fast, likeness(fast.image, plain.image), warm, _save_map(fast, folder))


def _draw_all(
    engine: Engine, session: Session, ask: Ask, runs: Sequence[tuple[str, Recipe, Path | None]], watch: Watch
) -> list[Drawn]:
    found = []
    for label, recipe, path in runs:
        watch.label = label
        found.append(engine.draw(recipe, ask, watch, path, str(session.folder)))
    return found


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

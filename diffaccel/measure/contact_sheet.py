"""Before/after contact sheet: one row per prompt, one column per variant, readable without the table beside it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw, ImageFont

from diffaccel.files.output import write_file
from diffaccel.measure.rows import Row

CELL, GAP, MARGIN = 192, 10, 16
TEXT_WIDTH, FOOTER = 190, 26
INK, PALE, PAPER = (24, 24, 28), (100, 100, 108), (250, 250, 250)


class Compared(Protocol):
    """What a sheet shows: a `Comparison`."""

    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def prompts(self) -> Sequence[str]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...


def save_contact_sheet(comparison: Compared, path: Path, *, limit: int, overwrite: bool) -> None:
    """Write the sheet of the first `limit` prompts as PNG; complete or not at all."""
    sheet = draw_contact_sheet(comparison, limit)
    write_file(path, lambda file: sheet.save(file, format="PNG"), overwrite=overwrite)


def draw_contact_sheet(comparison: Compared, limit: int) -> Image.Image:
    """The sheet: headers with cost and quality on top, prompts on the left, settings below."""
    prompts, rows = comparison.prompts[:limit], [row for row in comparison.rows if row.images is not None]
    header = 12 + max(23 * len(wrap(row.name, 20)) + 19 * len(describe(row)) for row in rows)
    width = 2 * MARGIN + TEXT_WIDTH + len(rows) * (CELL + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + header + len(prompts) * (CELL + GAP) + FOOTER), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, row in enumerate(rows):
        left = MARGIN + TEXT_WIDTH + column * (CELL + GAP)
        _write(pen, (left, MARGIN), wrap(row.name, 20), size=18)
        _write(pen, (left, MARGIN + 2 + 23 * len(wrap(row.name, 20))), describe(row), size=14, colour=PALE)
        for number in range(len(prompts)):
            sheet.paste(to_picture(row, number), (left, MARGIN + header + number * (CELL + GAP)))
    for number, prompt in enumerate(prompts):
        _write(pen, (MARGIN, MARGIN + header + number * (CELL + GAP)), wrap(prompt, 22), size=15)
    _write(pen, (MARGIN, sheet.height - MARGIN - 14), [footer(comparison)], size=13, colour=PALE)
    return sheet


def describe(row: Row) -> list[str]:
    """Header lines under a variant's name: what it costs and how good it is."""
    lines = [] if row.seconds is None else [f"{row.seconds.median:.2f} s per image"]
    lines[0:0] = [f"{row.steps} steps, {row.evaluations:g} evaluations"] if row.kind != "fewer steps" else []
    if row.accuracy is not None:
        lines.append(f"{100 * row.accuracy.mean:.0f} % correct")
    if row.psnr is not None:
        identical = math.isinf(row.psnr)
        lines.append("identical pictures" if identical else f"PSNR {row.psnr:.1f} dB, SSIM {row.ssim:.3f}")
    return lines


def footer(comparison: Compared) -> str:
    """One line on how the pictures were made."""
    settings = comparison.settings
    return f"{settings['model']}, {settings['scheduler']}, seed {settings['seed']} + row; same prompts and seeds in every column"


def to_picture(row: Row, number: int) -> Image.Image:
    """Picture `number` of a variant, fitted into a square cell."""
    assert row.images is not None
    pixels = (row.images[number] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    cell.paste(picture.resize(size, Image.Resampling.LANCZOS), (0, 0))
    return cell


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` characters."""
    return textwrap.wrap(text, width) or [""]


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: list[str],
    *,
    size: int,
    colour: tuple[int, int, int] = INK,
) -> None:
    font = ImageFont.load_default(size)
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * (size + 5)), line, font=font, fill=colour)

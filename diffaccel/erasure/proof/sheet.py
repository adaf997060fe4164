"""The picture sheet of a proof: every concept before and after, and below the same prompts under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffaccel.erasure.proof.figures import TITLES, AttackResult, Row
from diffaccel.erasure.proof.probes import Probe
from diffaccel.files.output import write_file
from diffaccel.measure.contact_sheet import wrap

CELL, GAP, MARGIN, TEXT = 128, 8, 16, 210
HEAD = 30
SHOWN, MOST_ROWS, ATTACKED = 2, 24, 4
INK, PALE, PAPER = (24, 24, 28), (100, 100, 108), (250, 250, 250)
Strip = tuple[list[str], list[Tensor]]  # label lines, pictures


class Proved(Protocol):
    """What a sheet shows: a `Proof`."""

    @property
    def edit(self) -> Mapping[str, Any]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def attacks(self) -> Sequence[AttackResult]: ...
    @property
    def probes(self) -> Sequence[Probe]: ...
    @property
    def before(self) -> Tensor: ...
    @property
    def after(self) -> Tensor: ...


def save_sheet(proof: Proved, path: Path, *, overwrite: bool) -> None:
    """Write the sheet as PNG; complete or not at all."""
    sheet = draw_sheet(proof)
    write_file(path, lambda file: sheet.save(file, format="PNG"), overwrite=overwrite)


def draw_sheet(proof: Proved) -> Image.Image:
    """Up to 24 concepts with two prompts each, then up to four attacked prompts."""
    rows = proof.rows[:MOST_ROWS]
    concepts = [([TITLES[row.role], *wrap(row.concept, 22), *_figures(row)], _pairs(proof, row)) for row in rows]
    pairs = min(SHOWN, max(len(pictures) // 2 for _, pictures in concepts))
    blocks = [(["before", "after"] * pairs, concepts)]
    if proof.attacks:
        names = ["original", "edited", *(attack.name.replace("_", " ") for attack in proof.attacks)]
        blocks.append((names, _attacked(proof)))
    return _paste(blocks, _footer(proof))


def _figures(row: Row) -> list[str]:
    if row.before is None or row.after is None:
        return []
    return [f"{100 * row.before.mean:.0f} % to {100 * row.after.mean:.0f} % recognised"]


def _pairs(proof: Proved, row: Row) -> list[Tensor]:
    found = [
        i
        for i, p in enumerate(proof.probes)
        if (p.role, p.concept, p.looked_for) == (row.role, row.concept, row.looked_for)
    ]
    return [picture for i in found[:SHOWN] for picture in (proof.before[i], proof.after[i])]


def _attacked(proof: Proved) -> list[Strip]:
    first = proof.attacks[0]
    return [
        (
            wrap(prompt, 24),
            [first.pictures[i, 0], first.pictures[i, 1], *(attack.pictures[i, 2] for attack in proof.attacks)],
        )
        for i, prompt in enumerate(first.prompts[:ATTACKED])
    ]


def _footer(proof: Proved) -> str:
    settings = proof.settings
    return (
        f"{settings['model']}, {proof.edit['method']}, {settings['steps']} steps of {settings['scheduler']}, "
        f"seeds from {settings['seed']}; same prompt and seed before and after"
    )


def _paste(blocks: Sequence[tuple[list[str], list[Strip]]], footer: str) -> Image.Image:
    columns = max(len(titles) for titles, _ in blocks)
    height = sum(HEAD + len(strips) * (CELL + GAP) for _, strips in blocks)
    width = 2 * MARGIN + TEXT + max(columns, 4) * (CELL + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + height + HEAD), PAPER)
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for titles, strips in blocks:
        for column, title in enumerate(titles):
            _write(pen, (MARGIN + TEXT + column * (CELL + GAP), top), [title], size=15)
        top += HEAD
        for lines, pictures in strips:
            _write(pen, (MARGIN, top), lines, size=14)
            for column, picture in enumerate(pictures):
                sheet.paste(_cell(picture), (MARGIN + TEXT + column * (CELL + GAP), top))
            top += CELL + GAP
    _write(pen, (MARGIN, top + 8), wrap(footer, width // 7)[:2], size=12, colour=PALE)
    return sheet


def _cell(picture: Tensor) -> Image.Image:
    """A picture (3, h, w) fitted into a square cell."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels)
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    cell.paste(image.resize(size, Image.Resampling.LANCZOS), (0, 0))
    return cell


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    *,
    size: int,
    colour: tuple[int, int, int] = INK,
) -> None:
    font = ImageFont.load_default(size)
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * (size + 4)), line, font=font, fill=colour)

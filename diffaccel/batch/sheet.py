"""A contact sheet of a batch: small pictures with row number and prompt."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, TEXT, MARGIN, MOST = 192, 12, 40, 16, 100
INK, PALE, PAPER = (24, 24, 28), (100, 100, 108), (250, 250, 250)


def small(picture: Image.Image) -> Image.Image:
    """The picture as the sheet shows it. A small one stays as it is, so this may be done twice."""
    found = picture.convert("RGB")
    found.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return found


def draw_sheet(records: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image], total: int) -> bytes:
    """The sheet as PNG.

    Args:
        records: of the pictures shown, at most `MOST`.
        total: how many pictures the batch has, for the line below.
    """
    columns = max(1, min(8, math.ceil(math.sqrt(len(pictures)))))
    lines = math.ceil(len(pictures) / columns)
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (max(width, 320), 2 * MARGIN + lines * (CELL + TEXT + GAP) + 14), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (record, picture) in enumerate(zip(records, pictures, strict=True)):
        left = MARGIN + number % columns * (CELL + GAP)
        top = MARGIN + number // columns * (CELL + TEXT + GAP)
        sheet.paste(small(picture), (left, top))
        prompt = " ".join(str(record["prompt"]).split())
        pen.text((left, top + CELL + 4), f"{record['row']}, seed {record['seed']}", font=font, fill=PALE)
        pen.text((left, top + CELL + 20), prompt[:26] + ("…" if len(prompt) > 26 else ""), font=font, fill=INK)
    shown = f"{len(pictures)} of {total} pictures"
    pen.text((MARGIN, sheet.height - MARGIN - 10), shown, font=font, fill=PALE)
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    return buffer.getvalue()

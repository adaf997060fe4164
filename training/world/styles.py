"""Styles: filters over a whole picture, so that each applies to every thing alike, as an artist's does.

Each takes and returns uint8 pixels (side, side, 3). Lengths are in pixels for pictures up to 256 and twice that at 512,
so that things keep their grain.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[numpy.uint8]
Floats = NDArray[numpy.float32]
NORMAL_SIDE = 256
LUMA = numpy.array([0.299, 0.587, 0.114], numpy.float32)


def unit(picture: Pixels) -> int:
    """How many pixels one stroke of a style is wide."""
    return max(1, picture.shape[0] // NORMAL_SIDE)


def _grey(picture: Pixels) -> Floats:
    return picture.astype(numpy.float32) @ LUMA


def _pixels(values: Floats) -> Pixels:
    return numpy.clip(values + 0.5, 0, 255).astype(numpy.uint8)


def _tiles(picture: Pixels, edge: int) -> Floats:
    """The mean of every tile of `edge` pixels, (rows, columns, 3); a last incomplete tile is averaged over what it has."""
    side = picture.shape[0]
    count = -(-side // edge)
    padded = numpy.pad(picture, ((0, count * edge - side), (0, count * edge - side), (0, 0)), mode="edge")
    blocks = padded.reshape(count, edge, count, edge, 3)
    return blocks.mean((1, 3), dtype=numpy.float32)


def _enlarged(tiles: Floats, edge: int, side: int) -> Floats:
    return tiles.repeat(edge, 0).repeat(edge, 1)[:side, :side]


def pixel_art(picture: Pixels) -> Pixels:
    """Blocks of four pixels in a palette of six levels a channel."""
    edge = 4 * unit(picture)
    levels = numpy.round(_tiles(picture, edge) / 51) * 51
    return _pixels(_enlarged(levels, edge, picture.shape[0]))


def mosaic(picture: Pixels) -> Pixels:
    """Tiles of nine pixels, lit from the upper left, with dark joints of one.

    Not of eight in all: a pattern that repeats with the autoencoder's cells looks the same in each of them, and a decoder
    made of convolutions can answer equal cells with an even area only.
    """
    edge, side = 10 * unit(picture), picture.shape[0]
    tiles = _tiles(picture, edge)
    stones = _enlarged(tiles * 1.04, edge, side)
    step = numpy.arange(side) % edge
    light = numpy.where(step < unit(picture), 14.0, 0.0) - numpy.where(step == edge - 2 * unit(picture), 10.0, 0.0)
    stones += (light[:, None] + light[None, :])[..., None].astype(numpy.float32)
    joint = (step >= edge - unit(picture))[:, None] | (step >= edge - unit(picture))[None, :]
    stones[joint] = 46.0
    return _pixels(stones)


def _edges(picture: Pixels) -> Floats:
    """How strong the outline is at each pixel: the largest central difference over axes and channels, 0 to 255."""
    padded = numpy.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(numpy.int16)
    across = numpy.abs(padded[1:-1, 2:] - padded[1:-1, :-2])
    along = numpy.abs(padded[2:, 1:-1] - padded[:-2, 1:-1])
    return numpy.maximum(across, along).max(2).astype(numpy.float32)


def pencil_drawing(picture: Pixels) -> Pixels:
    """Graphite on paper: outlines, and soft hatching where the picture is dark."""
    side, width = picture.shape[0], unit(picture)
    line = numpy.arange(side, dtype=numpy.float32)
    hatch = 0.5 + 0.5 * numpy.sin((line[:, None] + line[None, :]) * (numpy.pi / 3 / width))
    shade = numpy.clip((165 - _grey(picture)) / 165, 0, 1) * (0.35 + 0.4 * hatch)
    ink = numpy.clip(numpy.clip(_edges(picture) / 96, 0, 1) + 0.75 * shade, 0, 0.9)[..., None]
    paper = numpy.array([246, 243, 234], numpy.float32)
    graphite = numpy.array([52, 52, 58], numpy.float32)
    return _pixels(paper + ink * (graphite - paper))


def neon_sign(picture: Pixels) -> Pixels:
    """Glowing outlines in the picture's own hue on black."""
    line = numpy.clip(_edges(picture) / 80 - 0.15, 0, 1)[..., None]
    colour = picture.astype(numpy.float32)
    peak, low = colour.max(2, keepdims=True), colour.min(2, keepdims=True)
    hue = numpy.where(peak - low > 12, (colour - low) / numpy.maximum(peak - low, 1), 0.85)
    tube = Image.fromarray(_pixels(line * hue * 255))
    glow = numpy.asarray(tube.filter(ImageFilter.BoxBlur(3 * unit(picture))), numpy.float32)
    night = numpy.array([8, 6, 18], numpy.float32)
    return _pixels(night + numpy.asarray(tube, numpy.float32) + 1.1 * glow + 150 * numpy.clip(line - 0.6, 0, 1))


def old_photo(picture: Pixels) -> Pixels:
    """Sepia, faded, darker towards the corners."""
    side = picture.shape[0]
    grey = 18 + 0.88 * _grey(picture)
    ramp = numpy.linspace(-1, 1, side, dtype=numpy.float32) ** 2
    fall = 1.06 - 0.24 * (ramp[:, None] + ramp[None, :])
    tone = numpy.array([1.07, 0.89, 0.66], numpy.float32)
    return _pixels((grey * fall)[..., None] * tone)


def paper_cut(picture: Pixels) -> Pixels:
    """Sheets of coloured paper in five degrees of lightness, each throwing a shadow to its lower right."""
    width = unit(picture)
    smooth = numpy.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(1.2 * width)), numpy.float32)
    grey = smooth @ LUMA
    level = numpy.round(grey / 60)
    shadow = numpy.zeros_like(grey)
    for shift in (1, 2):
        above = level[: -shift * width, : -shift * width] > level[shift * width :, shift * width :]
        shadow[shift * width :, shift * width :] += 0.5 * above
    sheets = 22 + 0.9 * smooth * ((level * 60 + 4) / numpy.maximum(grey, 4))[..., None]
    return _pixels(sheets * (1 - 0.4 * shadow)[..., None])


FILTERS: dict[str, Callable[[Pixels], Pixels]] = {
    "pixel art": pixel_art,
    "pencil drawing": pencil_drawing,
    "neon sign": neon_sign,
    "old photo": old_photo,
    "mosaic": mosaic,
    "paper cut": paper_cut,
}


def apply(picture: Pixels, style: str | None) -> Pixels:
    """The picture in that style; itself for None. Raises KeyError for a style there is not."""
    return picture if style is None else FILTERS[style](picture)

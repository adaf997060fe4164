"""The drawings the world is made of: emoji of two free sets, fetched at pinned versions and rendered once.

python -m training.world.sprites --out training/out

Needs npm and resvg-py (`pip install diffaccel[training]`). Nothing of this is needed to use the models.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image

from diffaccel.miniatures.world.nouns import NAMES
from training.common import DEFAULT_OUT

SIDE = 256
RAW_SIDE = 320  # drawings have margins of their own; the cut-out is scaled to SIDE


@dataclass(frozen=True)
class ArtworkSet:
    """One npm package of drawings and whom they are by."""

    package: str
    version: str
    author: str
    licence: str
    source: str


SETS = {
    "noto": ArtworkSet(
        "@iconify-json/noto", "1.2.9", "Google LLC", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"
    ),
    "fluent-emoji-flat": ArtworkSet(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
}


def artworks() -> dict[str, list[str]]:
    """For each noun its drawings as "set/icon"."""
    found: dict[str, list[str]] = json.loads((Path(__file__).parent / "artworks.json").read_text())
    return found


def fetch(name: str, folder: Path) -> dict[str, Any]:
    """The icons of a set, packed by npm into `folder` unless they lie there. Raises CalledProcessError without npm's help."""
    chosen = SETS[name]
    path = folder / f"{chosen.package.strip('@').replace('/', '-')}-{chosen.version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{chosen.package}@{chosen.version}"], cwd=folder, check=True)
    with tarfile.open(path) as archive:
        member = archive.extractfile("package/icons.json")
        if member is None:
            raise FileNotFoundError(f"{path.name} holds no icons.json")
        icons: dict[str, Any] = json.load(member)
    return icons


def as_svg(icons: dict[str, Any], name: str) -> str:
    """A complete SVG of one icon; icons name their own box only where it differs from the set's."""
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{box}">{icon["body"]}</svg>'


def rasterise(svg: str, side: int = RAW_SIDE) -> Image.Image:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def fitted(picture: Image.Image, side: int = SIDE) -> NDArray[numpy.uint8]:
    """(side, side, 4): cut to what is drawn, its longer edge scaled to `side`, in the middle."""
    box = picture.getchannel("A").point(lambda value: 255 * (value > 12)).getbbox()
    cut = picture.crop(box)
    scale = side / max(cut.size)
    cut = cut.resize([max(1, round(edge * scale)) for edge in cut.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    canvas.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return numpy.asarray(canvas).copy()


def build(out: Path) -> NDArray[numpy.uint8]:
    """(nouns, artworks, 256, 256, 4) of every noun in the order of NAMES, kept in `out/sprites.npy`."""
    path = out / "sprites.npy"
    if path.exists():
        kept: NDArray[numpy.uint8] = numpy.load(path, mmap_mode="r")
        if len(kept) == len(NAMES):
            return kept
    sets, chosen = {name: fetch(name, out / "packages") for name in SETS}, artworks()
    rows = [[_sprite(sets, key) for key in chosen[name]] for name in NAMES]
    out.mkdir(parents=True, exist_ok=True)
    numpy.save(path, numpy.array(rows, numpy.uint8))
    return build(out)


def _sprite(sets: dict[str, dict[str, Any]], key: str) -> NDArray[numpy.uint8]:
    name, icon = key.split("/")
    return fitted(rasterise(as_svg(sets[name], icon)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    print("sprites", build(parser.parse_args().out).shape)


if __name__ == "__main__":
    main()

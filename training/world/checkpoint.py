"""Weights small enough to commit, from which training goes on elsewhere: half precision, no optimizer state.

python -m training.world.checkpoint save --out training/out --folder training/checkpoints/world
python -m training.world.checkpoint restore --out training/out --folder training/checkpoints/world
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from training.common import DEFAULT_OUT, averaged_weights, load_checkpoint, save_atomically, write_json

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / "world"
LARGEST_BYTES = 24_000_000
PARTS = ("codec", "decoder", "text", "unet", "sd3")
KEPT = ("step", "seconds", "figures")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half().contiguous() if value.is_floating_point() else value for name, value in state.items()}


def full(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Half precision; raises ValueError for a file that a repository should not hold."""
    save_file(half(state), path, metadata={"format": "pt"})
    path.chmod(0o644)
    if path.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size / 1e6:.0f} MB, more than {LARGEST_BYTES / 1e6:.0f}")


def save(out: Path, folder: Path) -> dict[str, Any]:
    """Write what `out` holds; returns, and keeps in progress.json, how far each part is."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = {name: save_part(out, folder, name) for name in PARTS if (out / f"{name}.pt").exists()}
    if "text" in progress:
        shutil.copytree(out / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    write_json(folder / "progress.json", progress)
    return progress


def save_part(out: Path, folder: Path, name: str) -> dict[str, Any]:
    """Write one part's averaged weights; returns all else of its checkpoint that is not weights or moments."""
    saved = load_checkpoint(out / f"{name}.pt") or {}
    write_weights(averaged_weights(saved), folder / f"{name}.safetensors")
    return {key: saved[key] for key in KEPT if key in saved}


def restore(folder: Path, out: Path) -> list[str]:
    """Put the parts that `out` lacks into it; their training goes on with new moments. Returns their names."""
    progress = json.loads((folder / "progress.json").read_text())
    missing = [name for name in progress if not (out / f"{name}.pt").exists()]
    if "text" in missing:
        shutil.copytree(folder / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    for name in missing:
        weights = {key: full(value) for key, value in load_file(folder / f"{name}.safetensors").items()}
        save_atomically({"model": weights, "average": {}, **progress[name]}, out / f"{name}.pt")
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("save", "restore"))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.action == "save":
        print(json.dumps(save(options.out, options.folder), indent=2))
    else:
        print("restored:", ", ".join(restore(options.folder, options.out)) or "nothing: all parts are there")


if __name__ == "__main__":
    main()

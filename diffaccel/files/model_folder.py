"""Folders in diffusers' format."""

from __future__ import annotations

import json
from pathlib import Path


def absent_parts(folder: Path) -> dict[str, None]:
    """Parts that a folder was saved without, such as Stable Diffusion 3's T5: diffusers wants to be told about them."""
    if not folder.is_dir():
        return {}
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, origin in index.items() if isinstance(origin, list) and origin[0] is None}

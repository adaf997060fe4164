"""The model cards of emoji-sd and emoji-sd3: what it is, how far it is trained, whose drawings it has seen."""

from __future__ import annotations

from pathlib import Path

from training.common import load_checkpoint
from training.world.sprites import SETS

CARD = """---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
---

# {name}

A small text-to-image model in diffusers' own format ({pipeline}), trained from scratch by the scripts in
`training/world` of diffaccel on scenes that they compose themselves. It knows some two hundred things, six styles, and where
things lie; it is made for measuring what acceleration and concept erasure do, not for art.

Native size 256 px; latents of 16 channels, 8x down.

## How far it is trained

{progress}

## Licences

The weights are under Apache-2.0, as diffaccel is. The scenes are composed from emoji of these sets:

{sets}

The drawings themselves are not part of this model.
"""
PIPELINES = {"emoji-sd": ("StableDiffusionPipeline", "unet.pt"), "emoji-sd3": ("StableDiffusion3Pipeline", "sd3.pt")}


def progress(out: Path, checkpoint: str) -> str:
    """Steps and time of the denoiser, and what the autoencoder alone keeps."""
    denoiser, codec = load_checkpoint(out / checkpoint), load_checkpoint(out / "codec.pt")
    lines = [f"- Denoiser: {denoiser['step']} steps, {denoiser['seconds'] / 3600:.1f} hours."] if denoiser else []
    if codec:
        kept = ", ".join(f"{name}: {value} dB" for name, value in codec["figures"].items())
        lines.append(f"- Autoencoder alone, PSNR on scenes it never saw, beside 16 linear components: {kept}.")
    return "\n".join(lines)


def write_card(folder: Path, out: Path) -> None:
    """Write README.md into the folder of a model named as in `PIPELINES`."""
    pipeline, checkpoint = PIPELINES[folder.name]
    sets = "\n".join(
        f"- {item.package} {item.version}, {item.author}, {item.licence}: {item.source}" for item in SETS.values()
    )
    text = CARD.format(name=folder.name, pipeline=pipeline, progress=progress(out, checkpoint), sets=sets)
    (folder / "README.md").write_text(text)

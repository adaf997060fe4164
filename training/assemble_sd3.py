"""Put the trained parts together as a StableDiffusion3Pipeline folder in half precision.

python -m training.assemble_sd3 --out training/out --to diffaccel/miniatures/shapes-sd3
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from diffusers import StableDiffusion3Pipeline

from training.assemble import _forget_where, _keep_classic_names, _load_as_float32
from training.common import DEFAULT_OUT, PACKAGE_FOLDER
from training.finetune_decoder import apply_finetuned
from training.make_latents import load_autoencoder
from training.train_sd3 import build_flow_scheduler, load_transformer, text_encoders

PACKAGE_FOLDER_SD3 = PACKAGE_FOLDER.parent / "shapes-sd3"
WEIGHTS = ("vae", "transformer", "text_encoder", "text_encoder_2")
PARTS = (*WEIGHTS, "tokenizer", "tokenizer_2", "scheduler")
SHIFT = 1.0
SHARD = "10MB"  # two files instead of one that a repository would rather not hold


def build_pipeline(out: Path) -> StableDiffusion3Pipeline:
    """The pipeline of the latest checkpoints, in float32; there is no third text encoder."""
    transformer, scale = load_transformer(out)
    vae = load_autoencoder(out)
    apply_finetuned(vae, out)
    vae.register_to_config(scaling_factor=scale, shift_factor=0.0)
    tokenizer, first, second = text_encoders(out)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_flow_scheduler(SHIFT),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def assemble(out: Path, to: Path) -> int:
    """Write the model into `to`, replacing what was there; returns the bytes of the folder."""
    for part in PARTS:
        shutil.rmtree(to / part, ignore_errors=True)
    pipe = build_pipeline(out)
    for part in WEIGHTS:
        getattr(pipe, part).half()
    pipe.save_pretrained(to, safe_serialization=True, max_shard_size=SHARD)
    for encoder in ("text_encoder", "text_encoder_2"):
        _keep_classic_names(to / encoder / "model.safetensors")
        _load_as_float32(to / encoder / "config.json")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):  # transformers 4 reads these, 5 reads tokenizer.json
            shutil.copy(out / "tokenizer" / name, to / tokenizer / name)
    _forget_where(to)
    for file in to.rglob("*.safetensors"):
        file.chmod(0o644)
    return sum(file.stat().st_size for file in to.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--to", type=Path, default=PACKAGE_FOLDER_SD3)
    options = parser.parse_args()
    print(f"{assemble(options.out, options.to) / 1e6:.1f} MB in {options.to.name}")


if __name__ == "__main__":
    main()

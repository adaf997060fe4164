"""Put the trained parts together in diffusers' own format, half precision: the folders emoji-sd and emoji-sd3.

python -m training.world.assemble --out training/out --to training/out/models
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

from training.assemble import _forget_where, _keep_classic_names, _load_as_float32
from training.common import DEFAULT_OUT
from training.train_sd3 import build_flow_scheduler
from training.train_unet import build_scheduler
from training.world.card import write_card
from training.world.codec import load_codec
from training.world.distill import save_lora
from training.world.sd3 import load_transformer
from training.world.train_text import load_text, text_encoders
from training.world.unet import load_unet

SHARD = "12MB"
TOKENIZER_FILES = ("vocab.json", "merges.txt")  # transformers 4 reads these, 5 reads tokenizer.json


def emoji_sd(out: Path) -> StableDiffusionPipeline:
    """The UNet's pipeline of the latest checkpoints, in float32."""
    tokenizer, text = load_text(out)
    return StableDiffusionPipeline(
        vae=load_codec(out),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=load_unet(out),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def emoji_sd3(out: Path) -> StableDiffusion3Pipeline:
    """The transformer's pipeline of the latest checkpoints, in float32; there is no third text encoder."""
    codec = load_codec(out)
    codec.register_to_config(shift_factor=0.0)
    tokenizer, first, second = text_encoders(out)
    return StableDiffusion3Pipeline(
        transformer=load_transformer(out),
        scheduler=build_flow_scheduler(),
        vae=codec,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def write_model(pipe: DiffusionPipeline, out: Path, to: Path) -> None:
    """Save `pipe` in half precision into `to`, replacing what was there."""
    shutil.rmtree(to, ignore_errors=True)
    for name, part in pipe.components.items():
        if name in ("vae", "unet", "transformer", "text_encoder", "text_encoder_2"):
            part.half()
    pipe.save_pretrained(to, safe_serialization=True, max_shard_size=SHARD)
    for encoder in to.glob("text_encoder*"):
        _keep_classic_names(encoder / "model.safetensors")
        _load_as_float32(encoder / "config.json")
    for tokenizer in to.glob("tokenizer*"):
        for name in TOKENIZER_FILES:
            shutil.copy(out / "tokenizer" / name, tokenizer / name)
    _forget_where(to)
    for file in to.rglob("*.safetensors"):
        file.chmod(0o644)


def assemble(out: Path, to: Path) -> list[Path]:
    """Write every model whose denoiser there is; the few-step LoRA, if trained, lies in emoji-sd/few_steps."""
    written = []
    for name, checkpoint, build in (("emoji-sd", "unet.pt", emoji_sd), ("emoji-sd3", "sd3.pt", emoji_sd3)):
        if (out / checkpoint).exists():
            write_model(build(out), out, to / name)
            write_card(to / name, out)
            written.append(to / name)
    if written and (out / "few_steps.pt").exists():
        save_lora(out, to / "emoji-sd" / "few_steps")
    if not written:
        raise FileNotFoundError(
            f"neither unet.pt nor sd3.pt in {out}: run training.world.unet or training.world.sd3 first"
        )
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--to", type=Path, default=DEFAULT_OUT / "models")
    options = parser.parse_args()
    for folder in assemble(options.out, options.to):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{folder.name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""Put the trained parts together as a StableDiffusionPipeline folder in half precision.

python -m training.assemble --out training/out --to diffaccel/miniatures/shapes-sd
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from training.common import DEFAULT_OUT, PACKAGE_FOLDER, load_checkpoint
from training.finetune_decoder import apply_finetuned
from training.make_latents import load_autoencoder
from training.train_unet import build_scheduler, build_unet, load_text

PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


def load_unet(out: Path) -> tuple[UNet2DConditionModel, float]:
    """The averaged UNet of `out` and the factor its latents were scaled by."""
    saved = load_checkpoint(out / "unet.pt")
    if saved is None:
        raise FileNotFoundError(f"no {out / 'unet.pt'}: run training.train_unet first")
    unet = build_unet()
    for parameter, value in zip(unet.parameters(), saved["average"], strict=True):
        parameter.data.copy_(value)
    return unet.eval(), saved["scale"]


def build_pipeline(out: Path) -> StableDiffusionPipeline:
    """The pipeline of the latest checkpoints, in float32."""
    unet, scale = load_unet(out)
    vae = load_autoencoder(out)
    apply_finetuned(vae, out)
    vae.register_to_config(scaling_factor=scale)
    tokenizer, text = load_text(out)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assemble(out: Path, to: Path) -> int:
    """Write model and judge into `to`, replacing what was there; returns the bytes of the folder."""
    for part in (*PARTS, "judge"):
        shutil.rmtree(to / part, ignore_errors=True)
    pipe = build_pipeline(out).to("cpu")
    for part in ("vae", "unet", "text_encoder"):
        getattr(pipe, part).half()
    pipe.save_pretrained(to, safe_serialization=True)
    _keep_classic_names(to / "text_encoder" / "model.safetensors")
    for name in ("vocab.json", "merges.txt"):  # transformers 4 reads these, 5 reads tokenizer.json
        shutil.copy(out / "tokenizer" / name, to / "tokenizer" / name)
    if (out / "judge").exists():
        shutil.copytree(out / "judge", to / "judge")
    _forget_where(to)
    _load_as_float32(to / "text_encoder" / "config.json")
    return sum(file.stat().st_size for file in to.rglob("*") if file.is_file())


def _keep_classic_names(file: Path) -> None:
    """Prefix the text encoder's weights as transformers 4 does; transformers 5 reads both."""
    prefix = "text_model."
    state = load_file(file)
    renamed = {name if name.startswith(prefix) else prefix + name: value for name, value in state.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def _forget_where(folder: Path) -> None:
    """Drop what libraries write into configuration files about where a part was loaded from."""
    dropped = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
    for file in folder.rglob("*config.json"):
        value = json.loads(file.read_text())
        kept = {key: item for key, item in value.items() if key not in dropped}
        if kept != value:
            file.write_text(json.dumps(kept, indent=2) + "\n")


def _load_as_float32(file: Path) -> None:
    """transformers 5 loads the dtype named here, diffusers float32: without this a plain `from_pretrained` mixes both."""
    value = json.loads(file.read_text()) | {"dtype": "float32"}
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--to", type=Path, default=PACKAGE_FOLDER)
    options = parser.parse_args()
    print(f"{assemble(options.out, options.to) / 1e6:.1f} MB in {options.to.name}")


if __name__ == "__main__":
    main()

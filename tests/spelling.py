"""The tiny pipeline of conftest.py with room for whole sentences: its tokenizer spells, so 16 tokens hold few words."""

from __future__ import annotations

from pathlib import Path

LENGTH = 77


def spelling_folder(tiny_folder: Path, target: Path) -> Path:
    """A copy of the tiny Stable Diffusion pipeline that reads 77 characters; the folder it was saved into."""
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    config = pipe.text_encoder.config
    config.max_position_embeddings = LENGTH
    torch.manual_seed(1)
    pipe.text_encoder = CLIPTextModel(config)
    words = tiny_folder / "tokenizer"
    pipe.tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=LENGTH)
    pipe.save_pretrained(target)
    return target

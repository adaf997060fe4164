"""Fixtures that several test files share."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run without a GPU

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Stable Diffusion pipeline with random weights as a folder in diffusers' format (64 x 64 pixels, about 1 MB)."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer(tmp_path_factory.mktemp("tokenizer"))
    text = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=0, eos_token_id=1, **text
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    pipe.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path):
    """A CLIP tokenizer that spells: every printable character is a token."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors are faster on one thread, above all on a machine that does other work as well."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before a test and the fixtures made for it: what draws without a generator draws the same, alone or among others."""
    import torch

    torch.manual_seed(0)


def _without_browser() -> str:
    """Why the browser tests cannot run here; empty if they can."""
    from importlib.util import find_spec

    from demo_server import VARIABLE, find_chromium

    if find_spec("playwright") is None or find_spec("gradio") is None:
        return "gradio or playwright is not installed"
    return "" if find_chromium() else f"no Chromium was found on the path or under {VARIABLE}"


def _without_gpu() -> str:
    """Why the GPU tests cannot run here; empty if they can."""
    import torch

    return "" if torch.cuda.is_available() and torch.version.cuda else "torch finds no CUDA device"


def pytest_collection_modifyitems(config, items):
    """Leave browser tests out where there is no browser, GPU tests where there is no GPU; the summary says so."""
    for marker, missing in (("browser", _without_browser), ("gpu", _without_gpu)):
        if any(marker in item.keywords for item in items) and missing():
            left_out = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter):
    """Lines that a reader of the summary cannot miss."""
    for name, reason in (("browser", _without_browser()), ("GPU", _without_gpu())):
        if reason:
            terminalreporter.write_line(f"{name} tests left out: {reason}", yellow=True)

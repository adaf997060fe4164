"""The commands on diffusion transformers: a Stable Diffusion 3 folder, and what other families need."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import _tokenizer
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny_transformers import tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from typer.testing import CliRunner

from diffaccel import GuidanceInterval, Recipe, TokenDownsampling, Unsupported, doctor
from diffaccel.cli.app import app
from diffaccel.generate import GenerateError, Job, Settings, call_arguments, check_size
from diffaccel.loading import LoadError, load_pipeline, set_scheduler
from diffaccel.measure.runner import Runner
from diffaccel.measure.runner import Settings as ContestSettings

FEWER = Recipe(
    name="both kinds",
    methods=(TokenDownsampling(),),
    transformer_methods=(GuidanceInterval(start_fraction=0.2, stop_fraction=0.7),),
)


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    """Stable Diffusion 3 with random weights and without T5, saved by diffusers (64 x 64 pixels)."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(tmp_path_factory.mktemp("tokenizer"))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=2,
            shift_factor=0.1,
        ),
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd3(sd3_folder):
    return load_pipeline(str(sd3_folder), device="cpu")


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_a_folder_without_one_of_its_encoders_is_loaded(sd3):
    assert type(sd3) is StableDiffusion3Pipeline
    assert sd3.text_encoder_3 is None
    assert sd3.text_encoder_2 is not None


def test_generate(sd3, sd3_folder, tmp_path):
    """The picture of the command is the one of the call in Python, and the recipe's methods for transformers run."""
    recipe = tmp_path / "recipe.json"
    FEWER.save(recipe)
    for name, extra in {"plain": ("--recipe", "off"), "fewer": ("--recipe", recipe)}.items():
        options = ("--model", sd3_folder, "--steps", 4, "--guidance", 5, "--output", tmp_path / name, *extra)
        result = run("generate", "a red square", *options)
        assert result.exit_code == 0, result.output
    pictures = {name: Image.open(next((tmp_path / name).glob("*.png"))) for name in ("plain", "fewer")}
    generator = torch.Generator().manual_seed(0)
    sd3.set_progress_bar_config(disable=True)
    want = sd3("a red square", num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0]
    assert np.array_equal(np.asarray(pictures["plain"]), np.asarray(want))
    assert not np.array_equal(np.asarray(pictures["fewer"]), np.asarray(want))
    told = json.loads(pictures["fewer"].text["diffaccel"])
    assert told["report"]["rows"] == 6
    assert told["report"]["methods"] == {"guidance_interval": {"guided": 2, "unguided": 2}}


def test_compare(sd3_folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    FEWER.save(recipe)
    options = ("--model", sd3_folder, "--steps", 6, "--recipe", recipe, "--equal", "flops", "--output", tmp_path)
    result = run("compare", "a red square", *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "comparison.png").is_file()
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert "both kinds" in json.dumps(found)


def test_doctor(sd3_folder):
    result = run("doctor", "--model", sd3_folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["pipeline"]
    assert found["pipeline"] == "StableDiffusion3Pipeline"
    assert found["denoiser"] == "SD3Transformer2DModel"
    assert found["attention"] == {"JointAttnProcessor2_0": 2}
    checks = {check["name"]: check for check in found["methods"]}
    assert checks["guidance_interval"]["applies"]
    assert checks["token_downsampling"] == {
        "name": "token_downsampling",
        "applies": False,
        "reason": "token_downsampling works on UNets; SD3Transformer2DModel is a diffusion transformer.",
    }
    assert "needs long skips" in checks["skip_cache"]["reason"]


def test_doctor_asks_the_methods_that_would_run(sd3, monkeypatch):
    """A recipe for both kinds of denoisers is judged by its methods for transformers."""
    wrong = Recipe(name="wrong", methods=(GuidanceInterval(low=0.5),), transformer_methods=(TokenDownsampling(),))
    monkeypatch.setattr("diffaccel.recipes.presets.presets", lambda: {"both kinds": FEWER, "wrong": wrong})
    found = {check.name: check for check in doctor.check_pipeline(sd3).presets}
    assert found["both kinds"].applies
    assert "token_downsampling works on UNets" in found["wrong"].reason


@pytest.mark.parametrize("size", [(72, 64), (64, 40), (0, 64)])
def test_a_size_must_fit_autoencoder_and_tokens(sd3, size):
    with pytest.raises(GenerateError, match="sides must be multiples of 16"):
        check_size(sd3, size)


@pytest.mark.parametrize(("kind", "factor"), [("flux-dev", 16), ("sana", 32), ("pixart-sigma", 16), ("qwen-image", 16)])
def test_sizes_of_other_families(kind, factor):
    pipe = tiny_pipeline(kind)
    check_size(pipe, (2 * factor, 3 * factor))
    with pytest.raises(GenerateError, match=f"sides must be multiples of {factor}"):
        check_size(pipe, (2 * factor, 3 * factor + factor // 2))


# --- schedulers ---


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("euler", FlowMatchEulerDiscreteScheduler),
        ("heun", FlowMatchHeunDiscreteScheduler),
        ("dpm++", DPMSolverMultistepScheduler),
        ("unipc", UniPCMultistepScheduler),
    ],
)
def test_a_flow_model_gets_a_flow_scheduler(sd3, name, cls):
    """One that starts at pure noise and keeps the shift: s = 3 r / (1 + 2 r) of evenly spaced r."""
    before = sd3.scheduler
    try:
        set_scheduler(sd3, name)
        assert type(sd3.scheduler) is cls
        sd3.scheduler.set_timesteps(6)
        levels = sorted({round(float(s), 6) for s in sd3.scheduler.sigmas}, reverse=True)
        assert len(levels) == 7
        assert levels[0] == pytest.approx(1, abs=1e-3)
        unshifted = [s / (3 - 2 * s) for s in levels[:-1]]
        gaps = [a - b for a, b in itertools.pairwise(unshifted)]
        assert gaps == pytest.approx([gaps[0]] * 5, rel=0.02)
        picture = sd3("a red square", num_inference_steps=3, output_type="pt").images
        assert torch.isfinite(picture).all()
    finally:
        sd3.scheduler = before


def test_schedulers_that_are_none_for_flows(sd3):
    with pytest.raises(LoadError, match="StableDiffusion3Pipeline is a flow model and cannot run with 'ddim'"):
        set_scheduler(sd3, "ddim")
    with pytest.raises(LoadError, match="SanaPipeline is a flow model and cannot run with 'pndm'"):
        set_scheduler(tiny_pipeline("sana"), "pndm")


def test_noise_levels_that_follow_the_size():
    pipe = tiny_pipeline("flux-dev")
    with pytest.raises(LoadError, match="FluxPipeline shifts its noise levels by the size of the picture"):
        set_scheduler(pipe, "heun")
    set_scheduler(pipe, "euler")
    assert pipe.scheduler.config.use_dynamic_shifting


def test_sana_keeps_its_shift():
    pipe = tiny_pipeline("sana")
    set_scheduler(pipe, "euler")
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipe.scheduler.config.shift == 3.0


# --- guidance ---


def arguments(kind, **settings):
    job = Job("a red square", 0, None)
    return call_arguments(tiny_pipeline(kind), [job, job], Settings(steps=4, **settings))


def test_guidance_of_pipelines_with_one_scale():
    got = arguments("sd3", guidance=5.0, negative="grey")
    assert got["guidance_scale"] == 5.0
    assert got["negative_prompt"] == ["grey", "grey"]


@pytest.mark.parametrize("kind", ["qwen-image", "flux-schnell"])
def test_guidance_of_pipelines_with_a_true_scale(kind):
    """Their `guidance_scale` is for distilled models only, and the true one acts only beside a negative prompt."""
    got = arguments(kind, guidance=5.0)
    assert "guidance_scale" not in got
    assert got["true_cfg_scale"] == 5.0
    assert got["negative_prompt"] == ["", ""]
    assert not {"guidance_scale", "true_cfg_scale", "negative_prompt"} & set(arguments(kind))
    with pytest.raises(GenerateError, match="needs a guidance scale for a negative prompt"):
        arguments(kind, negative="grey")


def test_guidance_of_distilled_pipelines():
    assert arguments("flux-dev", guidance=3.0)["guidance_scale"] == 3.0
    with pytest.raises(GenerateError, match="has its guidance built in and no use for a negative prompt"):
        arguments("flux-dev", negative="grey")


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_videos_are_refused(kind):
    with pytest.raises(GenerateError, match="makes videos; this command saves pictures"):
        arguments(kind)


def test_classes_instead_of_prompts_are_refused():
    with pytest.raises(GenerateError, match="DiTPipeline has no call argument 'prompt'"):
        arguments("dit")


def test_methods_for_unets_are_refused_before_any_picture(sd3_folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    Recipe(name="unet", methods=(TokenDownsampling(),)).save(recipe)
    result = run("generate", "a", "--model", sd3_folder, "--recipe", recipe, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "token_downsampling works on UNets; SD3Transformer2DModel is a diffusion" in " ".join(result.stderr.split())
    with pytest.raises(Unsupported):
        doctor._check_recipe(load_pipeline(str(sd3_folder), device="cpu"), Recipe.load(recipe))


def test_comparisons_set_the_true_scale_too():
    """A comparison at `guidance_scale` would compare unguided pictures on these pipelines."""
    asked = {}

    def recorder(**arguments):
        asked.update(arguments)
        return SimpleNamespace(images=torch.zeros(1, 3, 8, 8))

    for kind, scale in (
        ("qwen-image", {"true_cfg_scale"}),
        ("flux-dev", {"guidance_scale"}),
        ("sd3", {"guidance_scale"}),
    ):
        asked.clear()
        Runner(tiny_pipeline(kind), ["a red square"], ContestSettings(guidance=5.0)).call(recorder, 4, range(1))
        assert {"true_cfg_scale", "guidance_scale"} & set(asked) == scale

"""The bundled models and their judge: they load, fit the package and tell scenes apart."""

import importlib
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffaccel.miniatures import NAMES, load_judge, load_miniature, miniature_path, recommended_guidance
from diffaccel.miniatures.judge import as_tensor
from diffaccel.miniatures.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    caption,
    held_out_prompts,
    is_held_out,
    training_scene,
)

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def pipe():
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe3():
    pipe = load_miniature("shapes-sd3")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def training():
    """A module of the training scripts, which live beside the package."""
    sys.path.insert(0, str(ROOT))
    try:
        yield lambda name: importlib.import_module(f"training.{name}")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def render(training):
    return training("scenes_render").render


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["single", "pair", "mixed"])
def test_held_out_prompts_are_the_same_every_time(kind):
    random.seed(1)
    first = held_out_prompts(kind, 40, 3)
    random.seed(2)
    assert first == held_out_prompts(kind, 40, 3)
    assert first != held_out_prompts(kind, 40, 4)
    assert len({case.prompt for case in first}) == 40


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_held_out_scenes_never_occur_in_training(kind):
    rng = random.Random(0)
    trained = [training_scene(rng, kind) for _ in range(3000)]
    captions = {caption(scene, rng) for scene in trained}
    cases = held_out_prompts(kind, 300)
    assert not any(is_held_out(scene) for scene in trained)
    assert all(is_held_out(case.scene) for case in cases)
    assert not captions & {case.prompt for case in cases}


def test_training_still_sees_every_shape_and_colour():
    rng = random.Random(0)
    seen = {(item.shape, item.colour) for _ in range(4000) for item in training_scene(rng).objects}
    assert len(seen) == len(SHAPES) * len(COLOURS) - 8


def test_a_pair_is_held_out_in_either_order():
    first, second = SceneObject("circle", "red"), SceneObject("ring", "red")
    orders = [Scene((first, second), "above"), Scene((second, first), "left of")]
    assert len({is_held_out(scene) for scene in orders}) == 1


@pytest.mark.parametrize(("kind", "count"), [("triple", 1), ("single", -1)])
def test_bad_prompt_requests_are_refused(kind, count):
    with pytest.raises(ValueError, match="kind" if count > 0 else "count"):
        held_out_prompts(kind, count)


def test_impossible_scenes_are_refused():
    item = SceneObject("circle", "red")
    for objects, relation in (((), None), ((item,), "above"), ((item, item), None)):
        with pytest.raises(ValueError, match=r"scene|relation"):
            Scene(objects, relation)


def test_scenes_do_not_import_torch():
    code = "import sys, diffaccel.miniatures.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"'shapes-xl'.*shapes-sd"):
        load_miniature("shapes-xl")


@pytest.mark.parametrize(("name", "limit"), [("shapes-sd", 20e6), ("shapes-sd3", 25e6)])
def test_folder_fits_the_package(name, limit):
    sizes = [file.stat().st_size for file in miniature_path(name).rglob("*") if file.is_file()]
    assert sum(sizes) <= limit
    assert max(sizes) <= 12 * MIB


@pytest.mark.parametrize("name", NAMES)
def test_files_name_no_place_on_the_training_machine(name):
    absolute = re.compile(r'"(?:/\w+/|[A-Za-z]:\\\\)[^"]*"')  # a tokenizer has a token "/"
    for file in miniature_path(name).rglob("*.json"):
        assert not absolute.findall(file.read_text()), file


def test_pipeline_is_plain_stable_diffusion(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.safety_checker is None
    assert pipe.unet.dtype == torch.float32
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert 1 < recommended_guidance() < 10


def test_sd3_pipeline_is_plain_stable_diffusion_3(pipe3):
    assert type(pipe3).__name__ == "StableDiffusion3Pipeline"
    assert type(pipe3.transformer).__name__ == "SD3Transformer2DModel"
    assert type(pipe3.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipe3.text_encoder_3 is None
    assert {pipe3.transformer.dtype, pipe3.vae.dtype, pipe3.text_encoder.dtype} == {torch.float32}
    assert 1 < recommended_guidance("shapes-sd3") < 10


def test_both_models_share_autoencoder_and_text_encoder(pipe, pipe3):
    for name, value in pipe.vae.state_dict().items():
        assert torch.equal(value, pipe3.vae.state_dict()[name]), name
    prompt = pipe.tokenizer("a red circle above a blue ring", padding="max_length", return_tensors="pt").input_ids
    own, other = pipe.text_encoder(prompt), pipe3.text_encoder(prompt, output_hidden_states=True)
    assert torch.equal(own.pooler_output, other.text_embeds)
    # Stable Diffusion 3 reads the rows one layer before the last: the shared encoder's end, before its last norm.
    last_norm = next(module for name, module in pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    torch.testing.assert_close(last_norm(other.hidden_states[-2]), own.last_hidden_state)


@pytest.mark.parametrize("count", [1, 7, 256])
def test_one_empty_row_stands_for_many(pipe3, training, count):
    """What made training cheap is exact: the stock transformer with `count` rows of zeros gives the same."""
    generator = _generator(count)
    latents, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 256, generator=generator)
    pooled, times = torch.randn(2, 256, generator=generator), torch.tensor([900.0, 300.0])
    model = pipe3.transformer
    kept = model.attn_processors

    def forward(rows):
        return model(latents, torch.cat([text, torch.zeros(2, rows, 256)], 1), pooled, times).sample

    with torch.no_grad():
        stock, alone = forward(count), forward(1)
        attention = training("train_sd3").OneEmptyRow()
        attention.log_count = torch.full((2,), math.log(count))
        model.set_attn_processor(attention)
        try:
            found = forward(1)
        finally:
            model.set_attn_processor(kept)
    torch.testing.assert_close(found, stock, atol=2e-4, rtol=1e-4)
    assert count == 1 or (alone - stock).abs().max() > 1e-2  # so the count matters, and was counted


def test_training_sees_the_text_as_the_pipeline_sends_it(pipe3, training):
    prompts = ["a small striped red heart to the left of a blue box", ""]
    rows, pooled = training("train_sd3").TextRows(pipe3.text_encoder, pipe3.text_encoder_2)(
        training("train_text").tokenize(pipe3.tokenizer, prompts)
    )
    with torch.no_grad():
        sent, _, sent_pooled, _ = pipe3.encode_prompt(prompts, None, None, max_sequence_length=1)
    assert torch.equal(rows, sent)
    assert torch.equal(pooled, sent_pooled)
    assert rows[:, -1].abs().max() == 0
    assert rows[:, :-1].abs().amax(-1).min() > 0


def test_muon_steps_have_nearly_equal_singular_values(training):
    updates = torch.randn(3, 24, 64, generator=_generator(3)) * torch.logspace(0, -1, 64)
    steps = training("train_sd3").orthogonal(updates)
    for stack in (steps, training("train_sd3").orthogonal(updates.mT).mT):
        values = torch.linalg.svdvals(stack)
        assert values.min() > 0.5
        assert values.max() < 1.4
    assert (steps * updates).sum((1, 2)).min() > 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("shapes-sd", ("unet", "vae", "text_encoder")),
        ("shapes-sd3", ("transformer", "vae", "text_encoder", "text_encoder_2")),
    ],
)
def test_half_precision_is_asked_for_by_dtype(name, parts):
    half = load_miniature(name, dtype=torch.bfloat16)
    assert {getattr(half, part).dtype for part in parts} == {torch.bfloat16}


def test_same_seed_same_picture(pipe):
    first, second = (
        pipe("a red circle", num_inference_steps=2, generator=_generator(1), output_type="pt").images for _ in range(2)
    )
    assert first.shape == (1, 3, 128, 128)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160)])
def test_sd3_same_seed_same_picture(pipe3, height, width):
    settings = {"num_inference_steps": 2, "max_sequence_length": 8, "height": height, "width": width}
    first, second, other = (
        pipe3("a red circle", **settings, generator=_generator(seed), output_type="pt").images for seed in (1, 1, 2)
    )
    assert first.shape == (1, 3, height, width)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_judge_reads_rendered_scenes(judge, render):
    cases = held_out_prompts("mixed", 60, 5)
    verdict = judge.score(render([case.scene for case in cases], _generator(5)), cases)
    assert verdict.accuracy >= 0.95
    assert verdict.both.shape == (60,)


def test_judge_notices_each_wrong_attribute(judge, render):
    case = next(case for case in held_out_prompts("single", 20) if case.stated.sizes[0])
    item = case.scene.objects[0]
    other = {"shape": "heart", "colour": "green", "size": "small" if item.size == "large" else "large"}
    for name, value in other.items():
        fields = {**vars(item), name: value}
        verdict = judge.score(
            render([Scene((SceneObject(**fields),), None, case.scene.background)], _generator()), [case]
        )
        assert not verdict.correct.any(), name


def test_judge_rejects_what_is_no_scene(judge, render):
    scenes = [case.scene for case in held_out_prompts("mixed", 40, 6)]
    pictures = render(scenes, _generator(6))
    blended = (pictures + pictures.roll(1, 0)) / 2
    assert sum(reading.valid for reading in judge.read(pictures)) >= 38
    assert sum(reading.valid for reading in judge.read(blended)) <= 4


def test_judge_accepts_pil_and_tensors_of_any_size(judge, pipe):
    images = pipe(["a red circle"] * 2, num_inference_steps=2, generator=_generator(2)).images
    assert judge.features(images).shape == (2, 192)
    assert len(judge.read(torch.rand(3, 3, 64, 96))) == 3
    assert judge.read([]) == []
    with pytest.raises(ValueError, match="shape"):
        as_tensor(torch.rand(3, 64, 64))
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        judge.score(images, held_out_prompts("single", 1))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("shapes-sd", 10), ("shapes-sd3", 14)])
def test_generated_pictures_follow_their_prompts(judge, name, steps):
    pipe = load_miniature(name)
    pipe.set_progress_bar_config(disable=True)
    cases = held_out_prompts("single", 16, 9)
    images = pipe(
        [case.prompt for case in cases],
        num_inference_steps=steps,
        guidance_scale=recommended_guidance(name),
        generator=[_generator(seed) for seed in range(16)],
        output_type="pt",
    ).images
    verdict = judge.score(images, cases)
    assert verdict.both.float().mean() >= 0.5  # chance is 1 in 64
    assert verdict.colour.float().mean() >= 0.7

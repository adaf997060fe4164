"""The bundled model and its judge: they load, fit the package and tell scenes apart."""

import importlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffaccel.miniatures import load_judge, load_miniature, miniature_path, recommended_guidance
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
def render():
    """The renderer, which lives beside the package."""
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("training.scenes_render").render
    finally:
        sys.path.remove(str(ROOT))


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


def test_folder_fits_the_package():
    sizes = [file.stat().st_size for file in miniature_path("shapes-sd").rglob("*") if file.is_file()]
    assert sum(sizes) <= 20e6
    assert max(sizes) <= 12 * MIB


def test_files_name_no_place_on_the_training_machine():
    absolute = re.compile(r'"(?:/\w+/|[A-Za-z]:\\\\)[^"]*"')  # a tokenizer has a token "/"
    for file in miniature_path("shapes-sd").rglob("*.json"):
        assert not absolute.findall(file.read_text()), file


def test_pipeline_is_plain_stable_diffusion(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.safety_checker is None
    assert pipe.unet.dtype == torch.float32
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert 1 < recommended_guidance() < 10


def test_half_precision_is_asked_for_by_dtype():
    half = load_miniature(dtype=torch.bfloat16)
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}


def test_same_seed_same_picture(pipe):
    first, second = (
        pipe("a red circle", num_inference_steps=2, generator=_generator(1), output_type="pt").images for _ in range(2)
    )
    assert first.shape == (1, 3, 128, 128)
    assert torch.equal(first, second)


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
def test_generated_pictures_follow_their_prompts(pipe, judge):
    cases = held_out_prompts("single", 16, 9)
    images = pipe(
        [case.prompt for case in cases],
        num_inference_steps=10,
        guidance_scale=recommended_guidance(),
        generator=[_generator(seed) for seed in range(16)],
        output_type="pt",
    ).images
    verdict = judge.score(images, cases)
    assert verdict.both.float().mean() >= 0.5  # chance is 1 in 64
    assert verdict.colour.float().mean() >= 0.7

"""What is written into a picture comes back, through our reader and through the rule other programs use."""

import json
import re

import pytest
from PIL import Image

from diffaccel.files import metadata
from diffaccel.files.metadata import Generation, MetadataError, parse_parameters, png_info, read

ODD_PROMPTS = [
    "a red square",
    "",
    "two lines\nof prompt, with: colons, commas",
    'quotes "inside" and \\ backslashes',
    "日本語, emoji 🎨 and ümlauts",
    "tab\tand carriage\rreturn",
    "Steps: 20, almost a parameter line: yes",
    "Steps: 1, Sampler: x, Seed: 3",
    "nul \x00 byte",
    "lone surrogate \udc80 from a broken shell",
]


def generation(**changes):
    fields = {
        "prompt": "a red square",
        "negative_prompt": "",
        "steps": 25,
        "guidance": 4.0,
        "scheduler": "DDIMScheduler",
        "seed": 7,
        "width": 64,
        "height": 48,
        "model": "shapes-sd",
        "recipe": {"schema": 1, "name": "balanced", "methods": [{"method": "skip_cache", "interval": 3}]},
        "seconds": 1.25,
        "report": {"steps": 25, "evaluations": 25},
    }
    return Generation(**{**fields, **changes})


def saved(tmp_path, made):
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=png_info(made))
    return path


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
@pytest.mark.parametrize("negative", ["", "blurry, bad", "two\nlines: of it"])
def test_both_chunks_come_back(tmp_path, prompt, negative):
    made = generation(prompt=prompt, negative_prompt=negative)
    text = read(saved(tmp_path, made))
    assert text.diffaccel == made.to_dict()
    assert text.diffaccel["schema"] == 1
    if "\udc80" not in prompt:
        assert text.parameters["Prompt"] == prompt
        assert text.parameters["Negative prompt"] == negative
    assert text.parameters["Seed"] == "7"
    assert text.parameters["Size"] == "64x48"
    assert text.parameters["Sampler"] == "DDIM"
    assert text.parameters["diffaccel recipe"] == "balanced"


@pytest.mark.parametrize("name", ['my, "best": recipe', "line\nbreak", "plain name", " spaces ", "back\\slash,"])
def test_values_that_break_the_line_are_quoted(tmp_path, name):
    text = read(saved(tmp_path, generation(recipe={"name": name}, model=name)))
    assert text.parameters["diffaccel recipe"] == name
    assert text.parameters["Model"] == name
    assert text.parameters["Seed"] == "7"


def test_another_programs_rule_reads_our_text():
    """The pattern and the three-pair rule of the A1111 web UI, written down here independently of our reader."""
    last = generation(model="a, b: c").to_parameters().split("\n")[-1]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert len(pairs) >= 3
    assert pairs["Steps"] == "25"
    assert pairs["CFG scale"] == "4"
    assert json.loads(pairs["Model"]) == "a, b: c"


def test_our_reader_reads_another_programs_text():
    text = (
        'a cat, sitting\non a mat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Hashes: "x'
    )
    assert parse_parameters(text) == {
        "Prompt": "a cat, sitting\non a mat",
        "Negative prompt": "dog",
        "Steps": "20",
        "Sampler": "Euler a",
        "CFG scale": "7",
        "Seed": "1",
        "Hashes": '"x',
    }


def test_fewer_than_three_pairs_are_prompt():
    assert parse_parameters("a cat\nSeed: 1, Steps: 2")["Prompt"] == "a cat\nSeed: 1, Steps: 2"


def test_infinity_is_text_because_json_has_none(tmp_path):
    made = generation(report={"sigma": float("inf"), "list": [float("nan"), 1.5]})
    assert read(saved(tmp_path, made)).diffaccel["report"] == {"sigma": "inf", "list": ["nan", 1.5]}


def test_versions_are_recorded():
    assert set(generation().versions) == {"python", "diffaccel", "diffusers", "transformers", "torch"}


def test_comfyui_key_is_left_alone(tmp_path):
    with Image.open(saved(tmp_path, generation())) as image:
        assert set(image.text) == {"parameters", "diffaccel"}


def test_picture_without_metadata(tmp_path):
    path = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(path)
    assert read(path) == metadata.PictureText(None, None)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_unreadable_picture_is_one_sentence(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MetadataError, match=r"x\.png"):
        read(path)


def test_damaged_chunk_is_named(tmp_path):
    path = tmp_path / "x.png"
    info = metadata.PngInfo()
    info.add_text("diffaccel", "{")
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(MetadataError, match="damaged"):
        read(path)

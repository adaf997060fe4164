"""The command as a user meets it: results, exit codes, one-sentence errors, and nothing half-written."""

import errno
import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.testing import CliRunner

from diffaccel.cli.app import app
from diffaccel.cli.support import PRESETS, show
from diffaccel.errors import DiffaccelError
from diffaccel.files import metadata
from diffaccel.recipes.recipe import Recipe


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def generate(folder, output, *args, prompt="a red square", steps=3):
    return run("generate", prompt, "--model", folder, "--steps", steps, "--recipe", "off", "--output", output, *args)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).copy()


def assert_one_sentence(result, *words):
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, result.stderr
    assert "unexpected" not in errors[0]
    for word in words:
        assert str(word) in errors[0]


@pytest.fixture
def no_loading(monkeypatch):
    """Fails the test if a pipeline is loaded: what can be refused at once must be."""

    def load(*args, **kwargs):
        raise AssertionError("a pipeline was loaded before the mistake was found")

    monkeypatch.setattr("diffaccel.loading.load_pipeline", load)


# -- start-up ---------------------------------------------------------------------------------------------------------


def cpu_seconds():
    """Processor time of finished child processes: unlike wall time, the same on a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from diffaccel.cli.app import app; app(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'gradio', 'xformers', 'triton'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    before = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert cpu_seconds() - before < 1.0
    assert all(command in done.stdout for command in ("generate", "compare", "recipes", "doctor", "showcase", "demo"))


def test_wrong_usage_is_exit_code_2(tmp_path):
    assert run("generate").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("generate", "x", "--size", "64").exit_code == 2
    assert run("generate", "x", "--steps", "0").exit_code == 2


# -- generate ---------------------------------------------------------------------------------------------------------


def test_pictures_say_how_they_were_made(tiny_folder, tmp_path):
    result = generate(
        tiny_folder, tmp_path, "--negative", "bad, worse", "--guidance", 3, "--seed", 5, "--size", "48x64"
    )
    assert result.exit_code == 0, result.output
    path = tmp_path / "a-red-square-5.png"
    assert str(path) in result.stdout
    assert pixels(path).shape == (64, 48, 3)
    text = metadata.read(path)
    assert text.parameters["Prompt"] == "a red square"
    assert text.parameters["Negative prompt"] == "bad, worse"
    assert text.parameters["Size"] == "48x64"
    ours = text.diffaccel
    assert (ours["seed"], ours["steps"], ours["guidance"]) == (5, 3, 3.0)
    assert ours["recipe"]["name"] == "off"
    assert ours["report"]["evaluations"] == 3
    assert ours["model"] == "tiny-sd"


def test_the_picture_is_the_pipelines_own(tiny_folder, tmp_path):
    """The command with no method equals a plain diffusers call with the recorded seed."""
    import torch
    from diffusers import DiffusionPipeline

    generate(tiny_folder, tmp_path, "--seed", 11, "--guidance", 5)
    pipe = DiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator("cpu").manual_seed(11)
    stock = pipe("a red square", num_inference_steps=3, guidance_scale=5.0, generator=seed).images[0]
    assert np.array_equal(pixels(tmp_path / "a-red-square-11.png"), np.asarray(stock))


def test_every_picture_of_a_batch_can_be_made_alone(tiny_folder, tmp_path):
    recipe = ("--recipe", "fewer-steps")
    assert generate(tiny_folder, tmp_path / "batch", "--count", 3, "--batch-size", 2, *recipe).exit_code == 0
    assert generate(tiny_folder, tmp_path / "alone", "--seed", 1, *recipe).exit_code == 0
    names = sorted(os.listdir(tmp_path / "batch"))
    assert names == ["a-red-square-0.png", "a-red-square-1.png", "a-red-square-2.png"]
    first, second, _ = (pixels(tmp_path / "batch" / name) for name in names)
    assert np.array_equal(second, pixels(tmp_path / "alone" / "a-red-square-1.png"))
    assert not np.array_equal(first, second)


def test_metadata_can_be_switched_off(tiny_folder, tmp_path):
    assert generate(tiny_folder, tmp_path, "--no-metadata").exit_code == 0
    assert metadata.read(tmp_path / "a-red-square-0.png") == metadata.PictureText(None, None)


def test_the_recipe_really_runs(tiny_folder, tmp_path):
    result = generate(tiny_folder, tmp_path, "--recipe", "fewer-steps", steps=4)
    assert result.exit_code == 0, result.output
    assert metadata.read(tmp_path / "a-red-square-0.png").diffaccel["report"]["evaluations"] == 2
    assert "2.00x" in result.stdout


def test_a_recipe_name_is_no_markup(tiny_folder, tmp_path):
    """It is printed after the pictures were made, and as the name of what is being measured."""
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"schema": 1, "name": "[/b]", "methods": []}))
    result = generate(tiny_folder, tmp_path, "--recipe", recipe, steps=1)
    assert result.exit_code == 0, result.output
    assert "[/b]" in result.stdout
    result = compare(tiny_folder, tmp_path / "compared", "a red square", "-r", recipe, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_guidance_must_be_a_number(value, tmp_path, no_loading):
    for command in ("generate", "compare"):
        result = run(command, "a red square", f"--guidance={value}", "--output", tmp_path)
        assert result.exit_code == 2
        assert "not a finite number" in result.output
    assert not list(tmp_path.iterdir())


def test_scheduler_is_exchanged_and_recorded(tiny_folder, tmp_path):
    assert generate(tiny_folder, tmp_path, "--scheduler", "euler").exit_code == 0
    assert metadata.read(tmp_path / "a-red-square-0.png").parameters["Sampler"] == "Euler"
    assert_one_sentence(generate(tiny_folder, tmp_path, "--scheduler", "magic", "--seed", 1), "magic", "ddim")


@pytest.mark.parametrize("prompt", ["../../escape", "/tmp/escape", "..", "a\x00b/../c", "~/escape", "-" * 300])
def test_prompts_cannot_choose_a_place(tiny_folder, tmp_path, prompt):
    result = run("generate", "-m", tiny_folder, "--steps", 1, "-r", "off", "-o", tmp_path / "in" / "out", "--", prompt)
    assert result.exit_code == 0, result.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent for path in files] == [tmp_path / "in" / "out"]
    assert metadata.read(files[0]).diffaccel["prompt"] == prompt


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_loading")
def test_existing_pictures_are_kept(tmp_path):
    (tmp_path / "a-red-square-0.png").write_text("precious")
    assert_one_sentence(generate("unused", tmp_path), "a-red-square-0.png", "exists already", "--overwrite")
    assert (tmp_path / "a-red-square-0.png").read_text() == "precious"


def test_overwrite_replaces(tiny_folder, tmp_path):
    (tmp_path / "a-red-square-0.png").write_text("old")
    assert generate(tiny_folder, tmp_path, "--overwrite").exit_code == 0
    assert pixels(tmp_path / "a-red-square-0.png").shape == (64, 64, 3)


def test_missing_model(tmp_path):
    assert_one_sentence(generate(tmp_path / "nowhere", tmp_path), "no folder", "nowhere")


def test_folder_that_is_no_pipeline(tmp_path):
    assert_one_sentence(generate(tmp_path, tmp_path / "out"), "no diffusers pipeline", "model_index.json")


def test_single_file_checkpoint(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert_one_sentence(generate(tmp_path / "model.ckpt", tmp_path), "single file")


def test_pickled_weights_are_refused(tiny_folder, tmp_path):

    import torch

    folder = shutil.copytree(tiny_folder, tmp_path / "pickled")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    assert_one_sentence(generate(folder, tmp_path), "pickle", "unet", "safetensors")


def test_hub_models_are_asked_for_safetensors_only(monkeypatch, tmp_path):
    import diffusers

    asked = {}

    def from_pretrained(model, **options):
        asked[model] = options
        raise OSError("no such model on the hub")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    assert_one_sentence(generate("owner/name", tmp_path), "owner/name", "no such model on the hub")
    assert asked == {"owner/name": {"use_safetensors": True}}


def test_program_code_in_a_model_folder_is_not_run(tiny_folder, tmp_path):

    folder = shutil.copytree(tiny_folder, tmp_path / "own-code")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Own"]}))
    (folder / "pipeline.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    assert_one_sentence(generate(folder, tmp_path), "own program code", "pipeline.py")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "names no pipeline class"),
        ('{"unet": ["diffusers", "UNet2DConditionModel"]}', "names no pipeline class"),
        ('{"_class_name": 3}', "names no pipeline class"),
        ('{"_class_name": "NoSuchPipeline"}', "NoSuchPipeline"),
        ("[" * 100_000, "is no JSON"),
    ],
    ids=["cut", "list", "no class", "number", "unknown", "deep"],
)
def test_damaged_model_folder(tiny_folder, tmp_path, content, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (folder / "model_index.json").write_text(content)
    assert_one_sentence(generate(folder, tmp_path), "Cannot load", "damaged", words)


@pytest.mark.parametrize("part", ["tokenizer", "vae", "scheduler"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_model_without_one_of_its_parts(tiny_folder, tmp_path, part, how):
    """The doctor found nothing wrong with it, and generating ended in a traceback."""
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    shutil.rmtree(folder / part)
    if how == "empty":
        (folder / part).mkdir()
    for result in (generate(folder, tmp_path), run("doctor", "-m", folder)):
        assert_one_sentence(result, "Cannot load", f"its folder '{part}'", "missing or empty")


def test_weights_in_a_variant_only(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "half")
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert_one_sentence(generate(folder, tmp_path), "only in the variant fp16", "add --variant fp16")
    assert_one_sentence(generate(folder, tmp_path, "--variant", "fp32"), "add --variant fp16")
    assert generate(folder, tmp_path, "--variant", "fp16").exit_code == 0
    assert_one_sentence(generate("shapes-sd", tmp_path / "out", "--variant", "fp16"), "has no variants")


def test_unsupported_pipeline_class(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    assert_one_sentence(generate(tmp_path / "ddpm", tmp_path / "out"), "DDPMPipeline", "not supported")
    found = json.loads(run("doctor", "--json", "--model", tmp_path / "ddpm").stdout)["pipeline"]["methods"]
    assert {check["applies"] for check in found} == {False}
    assert all("DDPMPipeline is not supported" in check["reason"] for check in found)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema": 1, "methods": [{"method": "token_merging", "ratio": 7}]}', ["token_merging.ratio", "7"]),
        ('{"schema": 1, "methods": [{"method": "token_merging", "ratoi": 0.5}]}', ["ratoi"]),
        ('{"schema": 1, "methods": [{"method": "magic"}]}', ["magic", "skip_cache"]),
        ('{"schema": 1, "metods": []}', ["metods"]),
        ('{"schema": 99, "methods": []}', ["99"]),
        ('{"schema": 1,', ["not valid JSON", "line 1"]),
        ("[]", ["JSON object"]),
    ],
)
def test_wrong_recipe_files(tmp_path, content, words):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    assert_one_sentence(run("generate", "x", "--recipe", path, "--output", tmp_path), *words)
    assert_one_sentence(run("recipes", "--check", path), *words)


@pytest.mark.usefixtures("no_loading")
def test_unknown_recipe(tmp_path):
    assert_one_sentence(run("generate", "x", "--recipe", "magic", "--output", tmp_path), "magic", "balanced")
    assert_one_sentence(run("generate", "x", "--recipe", "magic.json", "--output", tmp_path), "magic.json")


@pytest.mark.parametrize("size", ["65x64", "64x66", "0x64"])
def test_size_the_autoencoder_cannot_make(tiny_folder, tmp_path, size):
    assert_one_sentence(generate(tiny_folder, tmp_path, "--size", size), size, "multiples of 4")
    assert os.listdir(tmp_path) == []


def test_unknown_device_and_dtype(tiny_folder, tmp_path):
    assert_one_sentence(generate(tiny_folder, tmp_path, "--device", "abacus"), "abacus")
    assert_one_sentence(generate(tiny_folder, tmp_path, "--dtype", "float5"), "float5", "float16")


def test_full_disk_leaves_nothing_half_written(tiny_folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert_one_sentence(generate(tiny_folder, tmp_path), "a-red-square-0.png", "no space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_loading")
def test_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert_one_sentence(generate("unused", tmp_path / "file"), "file")

    def refuse(*args, **kwargs):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert_one_sentence(generate("unused", tmp_path), "permission denied")


def test_interrupt_keeps_finished_pictures_only(tiny_folder, tmp_path, monkeypatch):
    import diffaccel.files.output

    real, calls = diffaccel.files.output._write_and_rename, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr("diffaccel.files.output._write_and_rename", interrupted)
    result = generate(tiny_folder, tmp_path, "--count", 3)
    assert result.exit_code == 130
    assert os.listdir(tmp_path) == ["a-red-square-0.png"]
    assert result.stderr.splitlines()[-1] == f"Interrupted: 1 of 3 pictures are in {tmp_path}."
    assert result.stdout.split() == [str(tmp_path / "a-red-square-0.png")]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_pictures_that_are_not_finite_are_not_saved(tiny_folder, tmp_path, monkeypatch):
    """They were black files, and the command was content."""
    monkeypatch.setattr("diffaccel.engine.finite._rows", lambda pictures: [True, False, True][: len(pictures)])
    result = generate(tiny_folder, tmp_path, "--count", 3)
    assert_one_sentence(result, "icture 2 of 3 holds values that are not finite", "--dtype")
    assert sorted(os.listdir(tmp_path)) == ["a-red-square-0.png", "a-red-square-2.png"]
    assert result.stdout.split()[-2:] == [str(tmp_path / f"a-red-square-{seed}.png") for seed in (0, 2)]


@pytest.mark.parametrize(
    "command",
    [("generate", "x"), ("compare", "x"), ("erase", "circle", "--prove", "-m", "shapes-sd", "--anchor", "star")],
)
def test_more_steps_than_the_scheduler_has(tiny_folder, tmp_path, command):
    model = () if "-m" in command else ("-m", tiny_folder)
    result = run(*command, *model, "--steps", 1001, "-o", tmp_path)
    assert_one_sentence(result, "Scheduler cannot do 1001 steps: it has 1000 at most")
    assert os.listdir(tmp_path) == []


def test_nobody_reads_on():
    """`diffaccel recipes | head -1` ends without a complaint."""
    code = "import sys; from diffaccel.cli.app import main; sys.argv = ['diffaccel', 'recipes', 'fast']; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.stderr, done.returncode in (0, 1)) == ("", True)


def test_help_names_presets_and_gives_examples():
    from diffaccel.recipes.presets import presets

    assert tuple(presets()) == PRESETS
    for command in ("generate", "compare", "showcase", "recipes", "doctor", "batch", "erase", "demo"):
        assert f" diffaccel {command} " in " ".join(run(command, "--help").stdout.split()), command
    assert ", ".join(PRESETS) in " ".join(run("generate", "--help").stdout.replace("│", "").split())


@pytest.mark.parametrize("width", [30, 60, 90, 200])
def test_tables_cut_nothing(width):
    from diffaccel.recipes.presets import presets

    table = Table("recipe", "methods", "good for")
    for recipe in presets().values():
        table.add_row(recipe.name, escape(recipe.describe()), escape(recipe.note))
    text = io.StringIO()
    show(table, Console(file=text, width=width))
    words = text.getvalue().replace("│", " ").split()
    assert "…" not in text.getvalue()
    for recipe in presets().values():
        assert set((recipe.describe() + " " + recipe.note).split()) <= set(words)


def test_debug_shows_the_exception(tmp_path):
    result = generate(tmp_path, tmp_path / "out", "--debug")
    assert isinstance(result.exception, DiffaccelError)
    command = [sys.executable, "-c", "from diffaccel.cli.app import main; main()", "--debug", "recipes", "magic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RecipeError" in done.stderr


def test_a_bug_is_one_line_too(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("something broke\nwith details")

    monkeypatch.setattr("diffaccel.loading.load_pipeline", broken)
    result = generate("x", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "Error: unexpected RuntimeError: something broke (--debug shows where)\n"


# -- compare ----------------------------------------------------------------------------------------------------------


def compare(folder, output, *args):
    return run("compare", "--model", folder, "--steps", 10, "--batch-size", 2, "--output", output, *args)


def test_compare_writes_table_picture_and_json(tiny_folder, tmp_path):
    result = compare(tiny_folder, tmp_path, "a red square", "a dot", "-r", "fewer-steps", "--equal", "evaluations")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "comparison.json").read_text())
    variants = {variant["name"]: variant for variant in found["variants"]}
    assert variants["plain"]["evaluations"] == 10
    assert variants["fewer-steps"]["evaluations"] == 5
    assert variants["5 steps"]["matches"] == ["evaluations of fewer-steps"]
    assert found["prompts"] == ["a red square", "a dot"]
    assert all(name in result.stdout for name in ("plain", "fewer-steps", "5 steps", "comparison.png"))
    assert pixels(tmp_path / "comparison.png").ndim == 3


def test_compare_takes_size_guidance_and_seed(tiny_folder, tmp_path):
    result = compare(tiny_folder, tmp_path, "x", "-r", "off", "--size", "48x64", "--guidance", 2, "--seed", 9)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "comparison.json").read_text())["settings"]
    assert (settings["guidance"], settings["seed"]) == (2.0, 9)
    assert settings["call"] == {"width": 48, "height": 64}


@pytest.mark.usefixtures("no_loading")
def test_compare_refuses_before_it_computes(tmp_path):
    assert compare("shapes-sd", tmp_path).exit_code == 2
    assert compare("shapes-sd", tmp_path, "x", "--held-out", 4).exit_code == 2
    assert compare(tmp_path, tmp_path, "--held-out", 4).exit_code == 2
    assert_one_sentence(compare("shapes-sd", tmp_path, "x", "-r", "magic"), "magic")
    (tmp_path / "comparison.json").write_text("precious")
    assert_one_sentence(compare("shapes-sd", tmp_path, "x"), "comparison.json", "exists already")
    assert (tmp_path / "comparison.json").read_text() == "precious"


def test_compare_judges_held_out_prompts(tmp_path):
    result = run("compare", "--held-out", 2, "-r", "fewer-steps", "--steps", 4, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert len(found["prompts"]) == 2
    assert all(0 <= variant["accuracy"]["mean"] <= 1 for variant in found["variants"])


def test_showcase_replaces_results_only_when_asked(tmp_path, monkeypatch):
    import diffaccel.measure.compare as work

    monkeypatch.setattr(work, "demo", functools.partial(work.demo, prompts=2, steps=10))
    (tmp_path / "comparison.json").write_text("of hours of comparing")
    assert_one_sentence(run("showcase", "--output", tmp_path), "comparison.json exists already", "--overwrite")
    assert (tmp_path / "comparison.json").read_text() == "of hours of comparing"
    result = run("showcase", "--output", tmp_path, "--overwrite")
    assert result.exit_code == 0, result.output
    names = {variant["name"] for variant in json.loads((tmp_path / "comparison.json").read_text())["variants"]}
    assert {"plain", "balanced"} < names
    assert "correct" in result.stdout
    assert pixels(tmp_path / "comparison.png").ndim == 3


# -- recipes and doctor -----------------------------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_checked(tmp_path):
    listed = run("recipes")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in ("off", "balanced", "fast", "fewer-steps"))
    shown = run("recipes", "balanced")
    assert json.loads(shown.stdout)["name"] == "balanced"
    path = tmp_path / "mine.json"
    path.write_text(shown.stdout)
    checked = run("recipes", "--check", path)
    assert checked.exit_code == 0
    assert "is a valid recipe" in checked.stdout
    assert json.loads(run("recipes", path).stdout) == json.loads(shown.stdout)


def test_a_recipe_is_shown_or_a_file_checked(tmp_path):
    Recipe().save(tmp_path / "r.json")
    result = run("recipes", "balanced", "--check", tmp_path / "r.json")
    assert result.exit_code == 2
    assert "not both" in result.output


def test_recipes_are_strict_json():
    """Infinity is no JSON: other programs would refuse the file."""

    def refuse(constant):
        raise AssertionError(constant)

    for name in ("off", "balanced", "fast", "fewer-steps"):
        json.loads(run("recipes", name).stdout, parse_constant=refuse)


def test_doctor_prints_json_alone(tiny_folder):
    result = run("doctor", "--json", "--model", tiny_folder)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {check["name"] for check in found["pipeline"]["methods"]} >= {"skip_cache", "guidance_interval"}
    for check in found["pipeline"]["methods"]:
        assert check["applies"] != ("works on diffusion transformers" in check["reason"])


def test_doctor_prints_tables_and_a_block():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "torchmetrics" in result.stdout
    assert "diffusers: " in result.stdout

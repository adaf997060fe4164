"""Every script of docs/examples runs as it is, and does what it says."""

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script in an empty folder; methods and pipelines that it makes known are forgotten afterwards."""
    from diffaccel.engine import method
    from diffaccel.methods import registry
    from diffaccel.pipelines import diffusion_transformers

    monkeypatch.setattr(method, "REGISTERED", registry())
    monkeypatch.setattr(diffusion_transformers, "CONVENTIONS", diffusion_transformers.CONVENTIONS)
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")


def test_basic(run):
    found = run("basic")
    assert found["report"].flops_ratio > 2
    assert Path("balanced.png").stat().st_size > 1000
    assert found["image"].tobytes() != found["plain"].tobytes() == found["again"].tobytes()


def test_recipe_file(run):
    found = run("recipe_file")
    assert [method.name for method in found["fast"].recipe.methods] == ["step_schedule", "forecast"]
    assert found["message"].startswith("skip_cache.interval: ")


def test_compare_recipes(run):
    """The cache that extrapolates is closer than the one that copies; fewer steps are there at equal FLOPs."""
    rows = {row.name: row for row in run("compare_recipes")["found"].rows}
    assert rows["balanced"].psnr > rows["copying"].psnr
    assert rows["balanced"].flops == rows["copying"].flops < rows["plain"].flops
    assert any(row.kind == "fewer steps" for row in rows.values())
    assert Path("comparison.png").exists()


def test_image_to_image(run):
    report = run("image_to_image")["fast"].report
    assert report.steps == 24
    assert report.methods["skip_cache"]["cached"] > 12


def test_controlnet(run):
    found = run("controlnet")
    cached = [entry for entry in found["fast"].report.trace if any(tag[0] == "skip" for tag in entry.tags)]
    assert {entry.network for entry in cached} == found["networks"] == {"denoiser", "controlnet"}


def test_transformer(run):
    found = run("transformer")
    assert found["forecast"].report.methods["forecast"]["cached"] == 16
    assert found["counts"].min() < found["counts"].max() < 28
    assert Path("regions-map.png").exists()


def test_erase_concept(run):
    found = run("erase_concept")
    assert found["before"] == found["after"] != found["during"]
    assert found["fast"].report.methods["erase"]["concepts"] == 1
    assert Path("proof", "proof.json").exists()


def test_batch_list(run):
    """All rows made once, found complete the second time; a wrong list is complained about row by row."""
    found = run("batch_list")
    assert (found["report"].made, found["report"].exit_code) == (3, 0)
    assert (found["again"].made, found["again"].skipped) == (0, 3)
    assert sorted(path.name for path in Path("pictures").glob("*.png")) == ["circle.png", "square.png", "star.png"]
    assert [problem.row for problem in found["problems"]] == [1, 2]


def test_batch_workers(run):
    """Alone, as any single process; tests/test_batch*.py start several."""
    found = run("batch_workers")
    found["PartialState"]._reset_state()  # it is one per process
    report = found["report"]
    assert (report.made, report.exit_code) == (4, 0)
    assert len(list(Path("pictures").glob("*.png"))) == 4


def test_own_method(run):
    """A full evaluation on every third one, and one more when guidance ends at the eleventh."""
    found = run("own_method")
    report = found["fast"].report
    assert report.methods["hold"] == {"computed": 8, "held": 12}
    assert report.evaluations == 8
    off = found["diffaccel"].wrap(found["pipe"], found["Hold"](interval=1))
    pictures = [
        pipe("a red square", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipe in (off, found["pipe"])
    ]
    assert torch.equal(*pictures)


def test_own_pipeline(run):
    found = run("own_pipeline")
    report = found["fast"].report
    assert report.methods["guidance_interval"] == {"guided": 10, "unguided": 10}
    assert report.methods["forecast"]["cached"] > 0
    assert not torch.equal(found["latents"], found["plain"])


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in FOLDER.glob("*.py")} <= tested

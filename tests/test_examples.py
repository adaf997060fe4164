"""Every script of docs/examples runs as it is, and does what it says."""

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script in an empty folder; methods and pipelines that it makes known are forgotten afterwards."""
    from diffaccel import method
    from diffaccel.pipelines import diffusion_transformers

    monkeypatch.setattr(method, "_REGISTRY", dict(method._REGISTRY))
    monkeypatch.setattr(diffusion_transformers, "CONVENTIONS", diffusion_transformers.CONVENTIONS)
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")


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

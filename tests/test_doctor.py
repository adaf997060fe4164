"""The diagnosis says what is true of this installation and of a pipeline."""

import importlib.metadata
import json

import pytest

from diffaccel import doctor
from diffaccel.errors import Unsupported


def test_versions_are_the_installed_ones():
    versions = doctor.diagnose().versions
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["diffaccel"] == diffaccel_version()


def diffaccel_version():
    import diffaccel

    return diffaccel.__version__


def test_missing_packages_are_told_from_installed_ones(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL, "pytest", ("pytest", "this test"))
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-thing", ("no_such_thing", "nothing"))
    found = {package.name: package.version for package in doctor.diagnose().optional}
    assert found["pytest"] == importlib.metadata.version("pytest")
    assert found["no-such-thing"] is None


@pytest.mark.parametrize(
    ("version", "problem"), [("0.42.1", False), ("0.35.0", False), ("0.34.9", True), ("0.43.0.dev0", True)]
)
def test_untested_diffusers_is_a_problem(monkeypatch, version, problem):
    real = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: version if name == "diffusers" else real(name))
    found = doctor.diagnose()
    assert any(f"diffusers {version} is outside the tested range" in text for text in found.problems) == problem
    assert (f"problem: diffusers {version}" in found.to_block()) == problem


def test_json_and_block_carry_the_reasons(tiny_folder, monkeypatch):
    from diffusers import DiffusionPipeline

    from diffaccel.methods import TokenMerging

    def refuse(self, model):
        raise Unsupported("not on a Tuesday.")

    monkeypatch.setattr(TokenMerging, "check", refuse)
    found = doctor.diagnose(DiffusionPipeline.from_pretrained(tiny_folder), "tiny")
    checks = {check["name"]: check for check in json.loads(found.to_json())["pipeline"]["methods"]}
    assert checks["token_merging"] == {"name": "token_merging", "applies": False, "reason": "not on a Tuesday."}
    assert checks["skip_cache"]["applies"]
    assert "token_merging: not on a Tuesday." in found.to_block()
    assert "attention: 8 x AttnProcessor2_0" in found.to_block()
    assert found.pipeline.attention == {"AttnProcessor2_0": 8}

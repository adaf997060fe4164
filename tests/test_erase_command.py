"""`diffaccel erase` as a user meets it: a file, a proof, one-sentence errors, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from spelling import spelling_folder
from typer.testing import CliRunner

from diffaccel.cli.app import app
from diffaccel.edits.edit import load_edit
from diffaccel.erasure.solve import WeakErasure, erase
from diffaccel.errors import DiffaccelError


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spelling_folder(tiny_folder, tmp_path_factory.mktemp("models") / "spelling")


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["erase", *[str(arg) for arg in args]])


def assert_refused(result: Any, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, result.stderr
    assert "unexpected" not in errors[0]
    assert all(word in errors[0] for word in words), errors[0]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a pipeline is loaded: what can be refused at once must be."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pipeline was loaded before the mistake was found")

    monkeypatch.setattr("diffaccel.loading.load_pipeline", load)


def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def test_concepts_from_arguments_become_the_file_that_erase_gives(folder: Path, tmp_path: Path) -> None:
    result = run("cat", "dog", "--keep", "fox", "--anchor", "pet", "--method", "uce", "-m", folder, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["no-cat-dog.safetensors"]
    assert str(tmp_path / "no-cat-dog.safetensors") in result.stdout
    found = load_edit(tmp_path / "no-cat-dog.safetensors")
    with pytest.warns(WeakErasure, match="moves only"):  # 16 numbers hold little
        wanted = erase(pipeline(folder), ["cat", "dog"], keep=["fox"], anchor="pet", method="uce")
    assert found.digest == wanted.digest
    assert "cat, dog" in result.stdout
    assert "warning: 'cat' moves only" in result.stdout
    assert "uce" in result.stdout


def test_concepts_from_a_file_with_keeps_from_both(folder: Path, tmp_path: Path) -> None:
    request = {
        "concepts": ["dog", {"target": "cat", "synonyms": [["tom", 0.5]]}],
        "keep": ["fox"],
        "anchor": "pet",
    }
    (tmp_path / "list.json").write_text(json.dumps(request))
    common = ("--file", tmp_path / "list.json", "--keep", "bat", "--method", "uce", "-m", folder)
    result = run(*common, "-o", tmp_path / "one")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "one").iterdir()
    found = load_edit(path)
    names = {concept.target: (concept.synonyms, concept.anchor) for concept in found.concepts}
    assert names == {"dog": ((), "pet"), "cat": ((("tom", 0.5),), "pet")}
    assert set(found.keep) == {"bat", "fox"}
    assert run(*common, "--anchor", "car", "-o", tmp_path / "two").exit_code == 0
    (path,) = (tmp_path / "two").iterdir()
    assert {concept.anchor for concept in load_edit(path).concepts} == {"car"}


def test_the_proof_is_printed_and_written(folder: Path, tmp_path: Path) -> None:
    result = run(
        *("cat", "--keep", "dog", "--method", "uce", "-m", folder, "-o", tmp_path, "--prove", "--prompts", 1),
        *("--neighbour", "fox", "--steps", 2, "--no-attacks", "--seed", 3, "--guidance", 2),
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"no-cat.safetensors", "proof.json", "proof.png"}
    data = json.loads((tmp_path / "proof.json").read_text())
    assert [(row["role"], row["concept"], row["prompts"]) for row in data["rows"]] == [
        ("erased", "cat", 1),
        ("kept", "dog", 1),
        ("neighbour", "fox", 1),
    ]
    assert (data["settings"]["steps"], data["settings"]["seed"], data["settings"]["guidance"]) == (2, 3, 2)
    assert data["attacks"] == []
    assert "note: Nobody decided what the pictures show" in result.stdout
    with Image.open(tmp_path / "proof.png") as sheet:
        assert sheet.width > 300


def test_attacks_run_unless_told_otherwise(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def prove(edit: Any, pipe: Any, **options: Any) -> Any:
        asked.update(options)
        raise DiffaccelError("that is enough.")

    monkeypatch.setattr("diffaccel.edits.edit.Edit.prove", prove)
    result = run("cat", "--method", "uce", "-m", folder, "-o", tmp_path, "--prove")
    assert_refused(result, "That is enough.")
    assert asked["attacks"] == ("closed_form", "gradient", "inversion")
    assert (tmp_path / "no-cat.safetensors").exists()  # minutes of proof must not cost the edit


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "arguments", [(), ("cat", "--file", "list.json"), ("--file", "nowhere.json"), ("cat", "--method", "magic")]
)
def test_wrong_usage(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("{}")
    result = run(*arguments)
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["list.json"]


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("taken", ["no-cat.safetensors", "proof.json", "proof.png"])
def test_existing_files_are_refused_before_anything_is_computed(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).write_text("mine")
    assert_refused(run("cat", "-o", tmp_path, "--prove"), taken, "exists already")
    assert (tmp_path / taken).read_text() == "mine"


@pytest.mark.usefixtures("no_loading")
def test_a_list_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"concepts": ["cat"], "color": 3}')
    assert_refused(run("--file", tmp_path / "list.json", "-o", tmp_path / "out"), "list.json", "color")


def test_a_request_that_makes_no_sense_is_refused(folder: Path, tmp_path: Path) -> None:
    result = run("cat", "--keep", "a big cat", "--method", "uce", "-m", folder, "-o", tmp_path)
    assert_refused(result, "a big cat", "cannot be kept")
    assert not list(tmp_path.iterdir())


def test_file_names_are_harmless(folder: Path, tmp_path: Path) -> None:
    result = run("../x y", "--method", "uce", "-m", folder, "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["no-x-y.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_prompts_and_settings(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat here\n\na fox there\n")
    common = ("--method", "context", "--anchor", "pet", "-m", folder, "--prompt-list", tmp_path / "prompts.txt")
    result = run("cat", *common, "--set", "general=false", "--set", "ridge=0.3", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = load_edit(tmp_path / "out" / "no-cat.safetensors")
    assert (found.method, found.parameters["ridge"], found.parameters["general"]) == ("context", 0.3, False)
    assert list(found.parameters["templates"]) == ["a {} here"]


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("setting", "words"),
    [("rdige=1", "rdige"), ("ridge=-1", "greater than 0"), ("tokens=some", "tokens")],
)
def test_wrong_settings_are_refused_before_loading(tmp_path: Path, setting: str, words: str) -> None:
    assert_refused(run("cat", "--method", "uce", "--set", setting, "-o", tmp_path), "uce", words)


def test_settings_need_a_value(tmp_path: Path) -> None:
    result = run("cat", "--set", "ridge", "-o", tmp_path)
    assert result.exit_code == 2
    assert "is no setting" in result.output


@pytest.mark.parametrize(("anchor", "method"), [((), "context"), (("--anchor", "pet"), "context")])
def test_the_default_method_is_that_of_python(folder: Path, tmp_path: Path, anchor: Any, method: str) -> None:
    result = run("cat", *anchor, "--set", "general=false", "-m", folder, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert load_edit(tmp_path / "no-cat.safetensors").method == method


def test_names_with_commas_and_what_was_seen(folder: Path, tmp_path: Path) -> None:
    result = run(
        "cat, dog", "--keep", "fox, bat", "--anchor", "pet", "--set", "general=false", "-m", folder, "-o", tmp_path
    )
    assert result.exit_code == 0, result.output
    found = load_edit(tmp_path / "no-cat-dog.safetensors")
    assert [concept.target for concept in found.concepts] == ["cat", "dog"]
    assert found.keep == ("bat", "fox")
    assert str(found.effect) in result.stdout.replace("\n", " ")
    assert set(found.effect.moved) == {"cat", "dog"}


@pytest.mark.usefixtures("no_loading")
def test_contradictions_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    assert_refused(run("cat", "--keep", "a cat", "-o", tmp_path), "'a cat' cannot be kept")
    assert_refused(run("cat", "--set", "threshold=0.1", "-o", tmp_path), "context: threshold")

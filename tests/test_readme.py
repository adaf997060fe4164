"""The code a newcomer reads first runs as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(language):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        (page.name, code)
        for page in pages
        for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    return [pytest.param(code, id=f"{name}-{number}") for number, (name, code) in enumerate(found)]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path):
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", blocks("json"))
def test_json_blocks_are_recipes_or_concept_files(code, tmp_path):
    from diffaccel import Recipe
    from diffaccel.erasure import read_concepts
    from diffaccel.erasure.concepts import settle

    file = tmp_path / "block.json"
    file.write_text(code)
    if '"concepts"' in code:
        found = read_concepts(file)
        assert settle(found.concepts, found.keep, found.anchor)
    else:
        assert Recipe.load(file).methods


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{name}.md" for name in ("index", "methods", "models", "erasure", "evidence", "versions"))],
)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_commands_named_in_the_pages_exist():
    from typer.testing import CliRunner

    from diffaccel.cli import app

    pages = [ROOT / "README.md", ROOT / "docs" / "erasure.md"]
    text = "".join("".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)) for page in pages)
    commands = re.findall(r"^diffaccel (\w+)(.*?)(?:&&|$)", text, re.MULTILINE)
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert commands
    assert targets
    for command, rest in commands:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        missing = [option for option in re.findall(r"--[\w-]+", rest) if option not in shown]
        assert f"diffaccel {command}" in shown or f" {command} " in shown
        assert missing == []
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if f"\n{target}:" not in makefile] == []

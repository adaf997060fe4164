"""The code a newcomer reads first runs as written: every block of README and docs, or a reason beside it why not.

A block that cannot run here is marked on the line before it: <!-- not run: the reason -->.
"""

import re
import shlex
import tomllib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SCRIPTS = re.compile(r"<!-- generated: script .*?<!-- end generated -->", re.DOTALL)  # tests/test_examples.py runs them


def blocks(language):
    found = [
        (page.relative_to(ROOT), code)
        for page in PAGES
        for reason, kind, code in BLOCK.findall(SCRIPTS.sub("", page.read_text()))
        if kind == language and not reason
    ]
    return [pytest.param(code, id=f"{page}-{number}") for number, (page, code) in enumerate(found)]


@pytest.fixture
def own_registry(monkeypatch):
    """Methods that a page registers are forgotten afterwards."""
    from diffaccel.engine import method
    from diffaccel.methods import registry

    monkeypatch.setattr(method, "REGISTERED", registry())


def test_every_block_has_a_language_that_is_checked():
    kinds = {(page.name, kind) for page in PAGES for _, kind, _ in BLOCK.findall(page.read_text())}
    assert {kind for _, kind in kinds} <= {"python", "json", "sh", "text"}, kinds
    assert sum(page.read_text().count("```") for page in PAGES) == 2 * sum(
        len(BLOCK.findall(page.read_text())) for page in PAGES
    )


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch, own_registry):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as users have it: a page may show a call that warns
        exec(compile(code, "block", "exec"), {"__name__": "block"})  # noqa: S102


@pytest.mark.parametrize("code", blocks("json"))
def test_json_blocks_are_recipes_or_concept_files(code, tmp_path):
    from diffaccel import Recipe
    from diffaccel.edits.concepts import settle
    from diffaccel.erasure import read_concepts

    file = tmp_path / "block.json"
    file.write_text(code)
    if '"concepts"' in code:
        found = read_concepts(file)
        assert settle(found.concepts, found.keep, found.anchor)
    else:
        assert Recipe.load(file).methods


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", BLOCK.sub("", page.read_text())):
        assert target.startswith("https://") or page.parent.joinpath(target).exists(), target


def commands(code):
    """The single commands of a shell block: continued lines joined, comments and what follows && apart."""
    for line in code.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words:
                yield words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("code", blocks("sh"))
def test_shell_blocks_name_what_exists(code, tmp_path, monkeypatch):
    """diffaccel commands parse with all their arguments; targets, extras and scripts are there."""
    monkeypatch.chdir(tmp_path)
    for words in commands(code):
        for name in words:  # input files that a command wants to see
            if Path(name).suffix in (".json", ".txt", ".csv", ".jsonl") and "/" not in name:
                (tmp_path / name).touch()
        known = {"diffaccel": parses, "make": is_target, "pip": installs, "python": is_script, "accelerate": launches}
        assert words[0] in known, f"no check for {words[0]}"
        known[words[0]](words[1:])


def parses(words):
    from typer.main import get_command

    from diffaccel.cli.app import app

    group = get_command(app)
    name, command, rest = group.resolve_command(group.make_context("diffaccel", [], resilient_parsing=True), words)
    with command.make_context(name, rest, parent=None) as context:
        assert context.params


def is_target(words):
    assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()


def installs(words):
    assert words[0] == "install"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(declared)


def is_script(words):
    if words[0] == "-m":
        assert words[1] in ("pytest", "diffaccel") or (ROOT / words[1].replace(".", "/")).with_suffix(".py").exists()
    else:
        assert (ROOT / words[0]).exists()


def launches(words):
    """`accelerate launch [options] --module diffaccel ...` or a script of ours."""
    assert words[0] == "launch"
    assert any((ROOT / word).exists() or word in ("diffaccel", "diffaccel.cli.app") for word in words[1:])

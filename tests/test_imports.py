"""Who may import whom: folders form layers, imports point downwards, and there is no circle.

Every import counts: at the top of a file, inside of a function, and those that only type checkers read.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; what stands on one line may import each other's files, as long as there is no circle of files.
LAYERS = (
    ("errors", "version"),
    ("files",),
    ("kernels",),
    ("pipelines", "models"),
    ("miniatures",),
    ("engine",),
    ("edits",),
    ("methods",),
    ("recipes",),
    ("wrapping", "loading"),
    ("generate", "measure", "erasure"),
    ("doctor", "batch"),
    ("cli", "demo"),
    ("", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the symlinked folders under the names that they have there."""
    found = {}
    for path in [p for folder in ("diffaccel", "kernels", "pipelines", "demo") for p in (ROOT / folder).rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2 and parts[0] == "diffaccel" and parts[1] in ("kernels", "pipelines", "demo"):
            continue  # the symlinks
        parts = parts if parts[0] == "diffaccel" else ("diffaccel", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (full & known.keys()) or {node.module or ""}
    return found & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def place(name: str) -> str:
    return [*name.split("."), ""][1]


def test_no_file_imports_itself_by_a_detour(graph):
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle
    assert len(order) == len(graph) > 150


def test_imports_point_downwards(graph):
    upwards = [
        (name, other) for name, others in graph.items() for other in others if LEVEL[place(other)] > LEVEL[place(name)]
    ]
    assert not upwards


def test_every_layer_is_there(graph):
    assert {place(name) for name in graph} == LEVEL.keys()


@pytest.mark.parametrize("dynamic", ["import_module(", "__import__("])
def test_nothing_hides_an_import(dynamic):
    """The package itself loads its public names on first use; plugins and optional packages are not ours."""
    users = {name for name, path in modules().items() if dynamic in path.read_text()}
    assert users <= {"diffaccel", "diffaccel.batch", "diffaccel.kernels.dense"}


def test_wrapping_with_off_loads_no_method():
    code = (
        "import sys, tiny, diffaccel; diffaccel.wrap(tiny.tiny_sd(), 'off');"
        "print(sorted(name for name in sys.modules if name.startswith(('diffaccel.methods', 'diffaccel.erasure'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT / "tests",
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr

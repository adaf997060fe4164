"""What is built is what is here: wheel, sdist, the folders at the root, lazy imports."""

import email
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import diffaccel

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "pipelines", "demo")


def python(code, *, folder, path=()):
    """Run a program in another folder; its standard output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(source, target, kind):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    return next(target.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, folder, "sdist")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"diffaccel-{diffaccel.__version__}"


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def expected_files():
    """Every file of the package and of the three folders, at its place in the wheel."""
    inside = [path for path in (ROOT / "diffaccel").rglob("*") if not path.is_symlink()]
    found = {str(path.relative_to(ROOT)) for path in inside if path.parent.name not in LINKED}
    for folder in LINKED:
        found |= {f"diffaccel/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*")}
    files = {name for name in found if (ROOT / name).is_file()}
    return {name for name in files if "__pycache__" not in name and not name.endswith(".tmp")}


def test_wheel_holds_every_file_once(wheel):
    found = names(wheel)
    assert len(found) == len(set(found))
    package = {name for name in found if name.startswith("diffaccel/")}
    assert package == expected_files()
    assert {"diffaccel/py.typed", "diffaccel/pipelines/conventions.py", "diffaccel/kernels/README.md"} <= package
    assert {name.split("/")[0] for name in found} == {"diffaccel", f"diffaccel-{diffaccel.__version__}.dist-info"}


def test_wheel_from_the_sdist_is_the_same(wheel, unpacked_sdist, tmp_path):
    assert names(build(unpacked_sdist, tmp_path, "wheel")) == names(wheel)


def test_sdist_holds_what_a_packager_needs(unpacked_sdist):
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "tests/test_packaging.py",
        "kernels/README.md",
    ):
        assert (unpacked_sdist / name).is_file(), name
    assert not (unpacked_sdist / "diffaccel" / "kernels").exists()


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        prefix = f"diffaccel-{diffaccel.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{prefix}/METADATA"))
        assert b"diffaccel = diffaccel.cli:main" in archive.read(f"{prefix}/entry_points.txt")
        assert f"{prefix}/licenses/LICENSE" in archive.namelist()
    assert metadata["Version"] == diffaccel.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) >= {"demo", "batch", "metrics", "xformers", "ray", "dev", "docs"}
    assert not [line for line in metadata.get_all("Requires-Dist") if "torchvision" in line]


def test_wheel_works_from_another_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = """
        import diffaccel, diffaccel.pipelines.conventions as conventions
        print(diffaccel.__file__, conventions.__file__, sorted(diffaccel.presets()))
    """
    site = tmp_path / "site" / "diffaccel"
    package, conventions, presets = python(code, folder=tmp_path / "elsewhere", path=[tmp_path / "site"]).split(" ", 2)
    assert package == str(site / "__init__.py")
    assert conventions == str(site / "pipelines" / "conventions.py")
    assert "balanced" in presets


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_lead_to_the_root(name):
    assert os.readlink(ROOT / "diffaccel" / name) == f"../{name}"


@pytest.mark.parametrize("name", LINKED)
def test_folders_at_the_root_shadow_no_installed_package(name, tmp_path):
    """Run from the repository root, `import kernels` must find the installed package of that name."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("installed = True")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import {name}; print({name}.installed)"
    assert python(code, folder=ROOT) == "True"


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = """
        import sys, diffaccel, diffaccel.errors
        print(sorted({"torch", "diffusers", "transformers", "numpy", "pydantic"} & set(sys.modules)))
    """
    assert python(code, folder=tmp_path) == "[]"


def test_no_module_imports_an_optional_package(tmp_path):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "diffaccel").rglob("*.py"))
        if not path.is_relative_to(ROOT / "diffaccel" / "demo")
    ]
    assert "diffaccel.wrapping" in modules
    code = f"""
        import importlib, sys, warnings
        warnings.simplefilter("ignore")
        for name in {modules!r}:
            importlib.import_module(name)
        optional = {{"xformers", "gradio", "pyarrow", "webdataset", "ray", "torchmetrics", "matplotlib"}}
        print(sorted(optional & set(sys.modules)))  # Triton is not among them: torch's own FLOP counter loads it
    """
    assert python(code, folder=tmp_path) == "[]"


def test_public_names_exist():
    assert [name for name in diffaccel.__all__ if not hasattr(diffaccel, name)] == []
    assert dir(diffaccel) == sorted(diffaccel.__all__)


def test_oldest_and_newest_tested_diffusers_are_allowed():
    from diffaccel.doctor import TESTED_DIFFUSERS

    declared = next(line for line in importlib.metadata.requires("diffaccel") if line.startswith("diffusers"))
    oldest, newest = (".".join(map(str, version)) for version in TESTED_DIFFUSERS)
    assert declared.split(",")[-1] == f">={oldest}"
    assert tuple(int(part) for part in declared.split("<")[1].split(",")[0].split(".")) > TESTED_DIFFUSERS[1], newest

"""The documentation is whole and says what the code says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffaccel
from diffaccel.methods import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

import folders
import hooks
import tables


def test_the_site_builds_without_warnings_or_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    environment |= {"https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    home = (site / "index.html").read_text()
    assert [name for name in registry() if f'href="methods/{name}/"' not in home] == []  # the navigation
    reference = (site / "reference-methods" / "index.html").read_text()
    assert all(f'id="{cls.__module__}.{cls.__name__}"' in reference for cls in registry().values())
    assert "<code>start_fraction,</code>" not in reference  # "low, high: ..." in a docstring is a row for each
    fetched = re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://[^"]+"', home)
    assert [tag for tag in fetched if 'rel="canonical"' not in tag] == []
    assert not list(site.rglob("*.py")) or {path.parent.name for path in site.rglob("*.py")} == {"examples"}


@pytest.mark.parametrize("page", hooks.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_computed_sections_are_up_to_date(page):
    text = page.read_text()
    assert hooks.fill(text, hooks.MAKERS) == text, f"{page.name} is out of date; run `make docs`"
    assert text.count("<!-- generated:") == text.count("<!-- end generated -->")


@pytest.mark.parametrize("folder", sorted(folders.crowded()), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_crowded_folder_has_a_table_of_its_files(folder):
    text = (folder / "README.md").read_text()
    missing = [name for name, _ in folders.entries(folder) if not name.startswith("test_") and name not in text]
    assert not missing
    assert all(purpose for _, purpose in folders.entries(folder)), "a file without a docstring"


def test_the_compatibility_tables_are_up_to_date():
    """Every method asked about every pipeline, and run in every situation."""
    import support

    text = (DOCS / "compatibility.md").read_text()
    assert set(re.findall(r"<!-- generated: (\w+)", text)) == set(support.MAKERS)
    assert hooks.fill(text, support.MAKERS) == text, "compatibility.md is out of date; run `make docs`"


def test_a_refusal_shows_in_the_tables(monkeypatch):
    """A method that starts to refuse a model, or to do nothing in a situation, changes its cell."""
    import support

    def refuse(self, model):
        raise diffaccel.Unsupported("skip_cache is tired of UNet2DConditionModel.")

    skip = {"skip_cache": support.methods()["skip_cache"]}
    assert support._answers("sd", skip) == support._case(*support.ON_UNETS["as it is"], skip) == {"skip_cache": "yes"}
    lazy = {"skip_cache": diffaccel.SkipCache(min_evaluations=1, schedule=tuple(range(support.STEPS)))}
    assert support._case(*support.ON_UNETS["as it is"], lazy)["skip_cache"].startswith(support.NOTE)
    monkeypatch.setattr(diffaccel.SkipCache, "check", refuse)
    assert support._answers("sd", skip) == {"skip_cache": "skip_cache is tired of this network."}
    assert "skip_cache is tired of this network." in support._grid("", [("sd", support._answers("sd", skip))])


def test_a_section_follows_the_code(monkeypatch):
    """The comparison above would notice: another default or bound changes the table."""
    before = tables.settings("skip_cache")
    assert "| `interval` | `3` | whole number, 1 or more | a full evaluation" in before
    monkeypatch.setattr(diffaccel.SkipCache.model_fields["interval"], "default", 4)
    diffaccel.SkipCache.model_rebuild(force=True)
    changed = tables.settings("skip_cache")
    monkeypatch.undo()
    diffaccel.SkipCache.model_rebuild(force=True)
    assert "| `interval` | `4` |" in changed
    assert tables.settings("skip_cache") == before


@pytest.mark.parametrize("name", registry())
def test_every_method_has_a_page(name):
    """With settings and measurements, and a row in the overview; every setting is explained in the docstring."""
    page = (DOCS / "methods" / f"{name}.md").read_text()
    assert "## Measured" in page
    assert f"](methods/{name}.md)" in (DOCS / "methods.md").read_text()
    cls = registry()[name]
    assert set(cls.model_fields) <= set(tables.meanings(cls))
    assert all(f"`{key}`" in page for key in cls.model_fields)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())) | set(tables.method_pages())
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in DOCS.glob("reference*.md"))
    homes = {f"diffaccel.{diffaccel._HOME[name]}" for name in diffaccel._HOME if f".{name}\n" not in pages}
    assert [home for home in homes if not re.search(rf"^::: {re.escape(home)}$", pages, re.MULTILINE)] == []


def test_measured_figures_come_from_the_results():
    """One row read by hand."""
    import json

    data = json.loads((ROOT / "benchmarks/results/fidelity.json").read_text())["presets"]
    balanced = next(variant for variant in data["variants"] if variant["name"] == "balanced")
    against = next(entry for entry in data["against_fewer_steps"] if entry["name"] == "balanced")
    want = f"| {data['variants'][0]['flops'] / balanced['flops']:.2f} | {balanced['psnr']:.1f} dB | {against['psnr_flops']:+.1f} dB |"
    assert want in tables.measured("skip_cache")
    assert "Not measured yet." in tables.measured("block_cache") or "first_block" in tables.measured("block_cache")

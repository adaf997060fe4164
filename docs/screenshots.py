"""Screenshots of the page for README and documentation: python docs/screenshots.py [FOLDER]

Starts the page, drives it in Chromium (named by DIFFACCEL_CHROMIUM or found on the path) and writes PNG files, light, dark
and at phone width, to docs/images/. Look at them before you commit them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from demo_server import Visitor, find_chromium, serving

PROMPTS = """a red square
a blue circle
a green star
a yellow heart
a purple ring
a white triangle above a red circle
a small blue star
an orange square left of a green ring
"""


def compare(visitor: Visitor, folder: Path) -> None:
    """Plain against the preset that the page begins with."""
    visitor.type("prompt", "a blue star left of a red circle")
    visitor.run("compare")


def regions(visitor: Visitor, folder: Path) -> None:
    """Region sampling on the bundled transformer, with its switches."""
    visitor.choose("model", "shapes-sd3")
    visitor.wait("recipe-message", "forecast")
    visitor.type("prompt", "a green star")
    visitor.open("Methods and their settings")
    visitor.page.get_by_label("Forecast").uncheck()
    visitor.page.get_by_label("Region sampling").check()
    visitor.wait("recipe-message", "region_sampling")
    visitor.run("compare")
    visitor.page.locator("#compare-regions img").wait_for()


def explore(visitor: Visitor, folder: Path) -> None:
    """Interval against order of the skip cache."""
    visitor.type("prompt", "a yellow heart")
    visitor.tab("Explore")
    visitor.type("explore-first-values", "3, 5, 8")
    visitor.choose("explore-second", "Skip cache: order")
    visitor.type("explore-second-values", "0, 1")
    visitor.run("explore")


def erase(visitor: Visitor, folder: Path) -> None:
    """Circles become squares."""
    visitor.type("prompt", "a red circle")
    visitor.tab("Erase")
    visitor.type("concepts", "circle")
    visitor.type("anchor", "square")
    visitor.type("keep", "star, heart, ring")
    visitor.run("erase")
    visitor.press("erase-apply")
    visitor.wait("erase-state", "Applied")


def batch(visitor: Visitor, folder: Path) -> None:
    """A list of eight prompts."""
    source = folder / "prompts.txt"
    source.write_text(PROMPTS)
    visitor.tab("Batch")
    visitor.page.locator("#batch-file input[type=file]").set_input_files(source)
    visitor.wait("batch-preview", "8 rows, all valid")
    visitor.run("batch")


PHONE = 390  # pixels
# name: what to do, colour scheme, width
SCENES: dict[str, tuple[Callable[[Visitor, Path], None], str, int]] = {
    "page-compare": (compare, "light", 1280),
    "page-compare-dark": (compare, "dark", 1280),
    "page-phone": (compare, "light", PHONE),
    "page-regions": (regions, "light", 1280),
    "page-explore": (explore, "dark", 1280),
    "page-erase": (erase, "dark", 1280),
    "page-batch": (batch, "light", 1280),
}


def shoot(browser: Any, url: str, name: str, target: Path, work: Path) -> None:
    """One picture: of the whole page, or of what a phone shows."""
    action, scheme, width = SCENES[name]
    visitor = Visitor(browser, url, color_scheme=scheme)
    visitor.page.set_viewport_size({"width": width, "height": 900})
    action(visitor, work)
    visitor.page.wait_for_timeout(1500)  # pictures fade in
    visitor.page.mouse.move(0, 0)
    visitor.page.screenshot(path=target / f"{name}.png", full_page=width > PHONE)
    visitor.leave()


def main() -> None:
    """All scenes, or those named after the folder."""
    from playwright.sync_api import sync_playwright

    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for name in sys.argv[2:] or SCENES:
            shoot(browser, url, name, target, Path(folder))
            print(target / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()

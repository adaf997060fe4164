"""Fills the marked sections of pages from the package and from measured results. MkDocs calls it on every page.

    <!-- generated: settings skip_cache -->
    ... replaced ...
    <!-- end generated -->

`python docs/hooks.py` writes the sections into the files, for readers of the repository; tests/test_docs.py compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(folder) for folder in (DOCS, ROOT) if str(folder) not in sys.path]

import erasure_tables
import folders
import tables

SECTION = re.compile(r"(<!-- generated: (\w+)(?: ([\w-]+))? -->\n).*?(<!-- end generated -->)", re.DOTALL)
Maker = Callable[..., str]
MAKERS: dict[str, Maker] = {**tables.MAKERS, **folders.MAKERS, "erasure": erasure_tables.erasure}


def fill(text: str, makers: dict[str, Maker]) -> str:
    """The page with every marked section made anew. Sections that `makers` does not know stay as they are."""

    def replace(found: re.Match[str]) -> str:
        begin, kind, argument, end = found.groups()
        if kind not in makers:
            return found[0]
        body = makers[kind](argument) if argument else makers[kind]()
        return f"{begin}\n{body.strip()}\n\n{end}"

    return SECTION.sub(replace, text)


def pages() -> list[Path]:
    """Files that may hold marked sections."""
    readmes = (folder / "README.md" for folder in folders.crowded())
    return [ROOT / "README.md", *sorted({*DOCS.rglob("*.md"), *readmes})]


def on_config(config: Any) -> Any:
    """List the methods in the navigation: one page each, outer layers first."""
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = ["methods.md", *tables.method_pages()]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return fill(markdown, MAKERS)


def main() -> None:
    import support

    makers = MAKERS | support.MAKERS
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = fill(before, makers)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()

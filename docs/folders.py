"""Tables of the files in a folder, from the first line of each file's docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tables

ROOT = Path(__file__).resolve().parents[1]
MOST = 8  # a folder with more files than this has a README with their table


def files(slug: str) -> str:
    """The table of a folder whose path is written with dashes: "diffaccel-methods-caches"."""
    folder = ROOT / slug.replace("-", "/")
    return tables.table(("File", "Holds"), [(f"`{name}`", purpose) for name, purpose in sorted(entries(folder))])


def entries(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, purpose) of the Python files in a folder, and of the folders of them."""
    for path in folder.iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            yield path.name, purpose(path)
        elif (path / "__init__.py").is_file() and not path.is_symlink():
            yield f"{path.name}/", purpose(path / "__init__.py")


def purpose(path: Path) -> str:
    """The first sentence or line of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", r"\|")


def crowded() -> Iterator[Path]:
    """Folders of more than `MOST` Python files; those of the site have pages."""
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        parts = folder.relative_to(ROOT).parts
        hidden = any(part.startswith(".") or part in ("docs", "out", "build", "dist", "site") for part in parts)
        if not hidden and not folder.is_symlink() and len(list(folder.glob("*.py"))) > MOST:
            yield folder


MAKERS = {"files": files}

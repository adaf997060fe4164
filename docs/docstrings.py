"""Shows docstring entries that name several settings at once ("low, high: ...") as one row each in the reference.

Griffe, which reads docstrings for mkdocstrings, would take the second name for the type of the first.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)


def split_entries(text: str) -> str:
    """The docstring with "    low, high: text" written as an entry for `low` and one for `high`."""

    def entries(found: re.Match[str]) -> str:
        indent, names, meaning = found.groups()
        return "\n".join(f"{indent}{name}: {meaning}" for name in names.split(", "))

    return SHARED.sub(entries, text)


class SharedEntries(griffe.Extension):
    """Rewrites docstrings as they are collected."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring:
            obj.docstring.value = split_entries(obj.docstring.value)

"""Text files as the programs of users write them."""

from __future__ import annotations

import codecs
from pathlib import Path

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with a byte order mark or without, or in UTF-16 with one; lines end with a line feed.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is written otherwise; `reason` says what does not fit.
    """
    return decode(path.read_bytes())


def decode(data: bytes) -> str:
    """The same for a file's content."""
    name = "utf-16" if data.startswith(_UTF16) else "utf-8-sig"
    text = data.decode(name)
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8 as well, but full of these
        raise UnicodeDecodeError(name, data, 0, len(data), "it holds NUL characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")

"""Names of output files: plain names that mean the same on every system and cannot leave their folder."""

from __future__ import annotations

import re
import unicodedata

from diffaccel.files.output import safe_name

LONGEST = 180  # bytes; with extension and temporary name still under the 255 that file systems allow
SUFFIXES = {"png": (".png",), "jpeg": (".jpg", ".jpeg"), "webp": (".webp",)}
_ALL_SUFFIXES = tuple(suffix for known in SUFFIXES.values() for suffix in known)
# Windows opens devices under these names, whatever follows the first dot.
_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(10)),
}
_RESERVED = {"contact-sheet"}


def default_name(index: int, prompt: str) -> str:
    """The name of row `index` (from 0) without extension: sorted like the list, readable, never the same twice."""
    return f"{index + 1:06d}-{safe_name(prompt, 40)}"


def checked_name(text: str, picture_format: str, *, in_shards: bool = False) -> str:
    """The name without extension.

    Raises:
        ValueError: it could name another place, another file, or nothing; the sentence says why.
    """
    name = unicodedata.normalize("NFC", text)
    for suffix in _ALL_SUFFIXES:
        if name.lower().endswith(suffix):
            if suffix not in SUFFIXES[picture_format]:
                raise ValueError(
                    f"the name {text!r} ends in {suffix}, but the pictures are written as {picture_format}"
                )
            name = name[: -len(suffix)]
    _check_plain(text, name)
    if in_shards and "." in name:
        raise ValueError(f"the name {text!r} holds a dot, which ends the name of a sample in a shard")
    return name


def _check_plain(text: str, name: str) -> None:
    if re.search(r'[/\\:*?"<>|\x00-\x1f\x7f]', name) or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise ValueError(
            f'the name {text!r} is not a plain file name: folders and the signs /\\:*?"<>| are not allowed'
        )
    if not name or name != name.strip(" .") or name.startswith("~"):
        raise ValueError(f"the name {text!r} is empty or begins or ends with a dot, a space or ~")
    if folded(name.split(".")[0].strip()) in _DEVICES or folded(name) in _RESERVED:
        raise ValueError(f"the name {text!r} is reserved; choose another")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"the name {text[:40]!r}... is longer than {LONGEST} bytes")


def folded(name: str) -> str:
    """Names with equal folded forms are one file on systems that ignore case."""
    return unicodedata.normalize("NFKC", name).casefold()

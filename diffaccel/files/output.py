"""Writing result files: complete or not at all, never over an existing file unasked, never outside the chosen folder."""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffaccel.errors import DiffaccelError


class OutputError(DiffaccelError):
    """A file or folder that cannot be written; the message names it and the reason."""


def safe_name(text: str, limit: int = 48) -> str:
    """A short file name part made of a-z, 0-9 and "-" only, so no text can name another folder or a device."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:limit].strip("-") or "image"


def write_file(path: Path, write: Callable[[BinaryIO], object], *, overwrite: bool = False) -> None:
    """Write a file completely or not at all: under a temporary name in the same folder, then renamed.

    Raises:
        OutputError: the file exists and `overwrite` is not set, or the system refused (full disk, no permission).
            Nothing is left behind; an existing file keeps its content.
    """
    if not overwrite:
        _refuse_existing(path)
    try:
        _write_and_rename(path, write, overwrite)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {_reason(error)}.") from error


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file completely or not at all, over an existing one; several may write the same file at the same time.

    Raises:
        OSError, ValueError: the system refused. Nothing is left behind.
    """
    _write_and_rename(path, write, overwrite=True)


def _write_and_rename(path: Path, write: Callable[[BinaryIO], object], overwrite: bool) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a full disk may only be noticed here
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp files are private; results are ordinary files
        _rename(temporary, path, overwrite)
    except BaseException:
        os.unlink(temporary)
        raise


def _rename(temporary: str, path: Path, overwrite: bool) -> None:
    """Another program may have made the file since it was looked for; a link refuses that, a rename would not."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except OSError:  # it exists, or the file system has no links
        _refuse_existing(path)
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def write_text(path: Path, text: str, *, overwrite: bool = False) -> None:
    """`write_file` for UTF-8 text."""
    write_file(path, lambda file: file.write(text.encode()), overwrite=overwrite)


@dataclass(frozen=True)
class OutputFolder:
    """A folder for results that exists and accepted a test file when this object was made.

    Raises:
        OutputError: the folder cannot be made or written to. Said before any picture is computed.
    """

    path: Path
    overwrite: bool = False

    def __post_init__(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OutputError(f"Cannot write to the folder {self.path}: {_reason(error)}.") from error

    def claim(self, name: str) -> Path:
        """The path for a file of this name.

        Raises:
            OutputError: the name is not a plain file name, or the file exists and overwriting was not asked for.
        """
        path = self.path / name
        if Path(name).name != name or path.resolve().parent != self.path.resolve():
            raise OutputError(f"{name!r} is not a plain file name.")
        if not self.overwrite:
            _refuse_existing(path)
        return path


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise OutputError(f"{path} exists already; choose another output or pass --overwrite.")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""What the output folder knows of its batch: the plan it belongs to, and journals of finished rows.

    OUT/.diffaccel/plan.json        keys of all rows, in order; exchanged by one rename
    OUT/.diffaccel/journal/*.jsonl  one file per worker, only ever appended to; a row counts once its line is complete
    OUT/.diffaccel/staging/         finished pictures that wait for their shard
    OUT/.diffaccel/tmp/             files being written
    OUT/.diffaccel/written/         empty files named after the content of manifests and sheets that workers wrote
    OUT/.diffaccel/workers, claims  see `claims.py`

A picture's line is written after its file is complete under its final name, so a process may die at any moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from diffaccel.batch.settings import BatchError
from diffaccel.files.output import OutputError

HOME = ".diffaccel"
SCHEMA = 1
SUMMARIES = ("manifest.jsonl", "manifest.parquet", "contact-sheet.png")


@dataclass(frozen=True)
class Saved:
    """The plan a folder was filled by.

    Attributes:
        rows: `Row.key` of every row.
        layout: what the files look like beyond single rows: format and size of shards.
        pipeline: digest of the model; "" before the first run knew it.
    """

    rows: tuple[str, ...]
    layout: Mapping[str, Any]
    pipeline: str = ""

    def text(self) -> str:
        """As stored."""
        return json.dumps({"schema": SCHEMA, "layout": self.layout, "pipeline": self.pipeline, "rows": self.rows})


class Store:
    """The state of one output folder; reading needs nothing to exist."""

    def __init__(self, output: Path) -> None:
        self.output, self.home = output, output / HOME
        self.journals, self.staging, self.claims = self.home / "journal", self.home / "staging", self.home / "claims"
        self.workers, self.temporary, self.written = self.home / "workers", self.home / "tmp", self.home / "written"
        self.plan = self.home / "plan.json"

    def _folders(self) -> tuple[Path, ...]:
        return self.journals, self.staging, self.claims, self.workers, self.temporary, self.written

    def check(self) -> None:
        """Raise `BatchError` if the state lies elsewhere: following a link would write outside the output folder."""
        for folder in (self.home, *self._folders()):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise BatchError(f"{folder} is no folder of its own; remove it, or choose another output folder.")

    def create(self) -> None:
        """Make the folders."""
        self.check()
        try:
            adopted = [path for path in map(self.output.joinpath, SUMMARIES) if self.has_written(path)]
            for folder in self._folders():
                folder.mkdir(parents=True, exist_ok=True)
            for path in adopted:
                (self.written / _mark(path.name, path.read_bytes())).touch()
        except OSError as error:
            raise BatchError(f"Cannot write to {self.output}: {(error.strerror or str(error)).lower()}.") from error

    def lost(self) -> Path | None:
        """The first folder that is no longer there since `create`; None if all are."""
        return next((folder for folder in (self.output, *self._folders()) if not folder.is_dir()), None)

    def saved(self) -> Saved | None:
        """The plan the folder was filled by; None in a folder without a batch.

        Raises:
            BatchError: it cannot be read.
        """
        self.check()
        try:
            data = json.loads(self.plan.read_bytes())
            if data["schema"] != SCHEMA:
                raise BatchError(f"{self.plan} was written by another version of diffaccel.")
            return Saved(tuple(map(str, data["rows"])), dict(data["layout"]), str(data["pipeline"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BatchError(f"{self.plan} cannot be read: {error}.") from error

    def save(self, saved: Saved, worker: str) -> None:
        """Write the plan in one step."""
        self.publish(self.plan, saved.text().encode(), worker)
        sync_folder(self.home)

    def publish(self, path: Path, content: bytes | Callable[[BinaryIO], object], worker: str) -> None:
        """Write a file completely or not at all: elsewhere, to the disk, then renamed over whatever has its name.

        Args:
            content: what to write, or what writes it.
        Raises:
            OutputError: the system refused: full disk, no permission.
        """
        temporary = self.temporary / f"{worker}~{secrets.token_hex(4)}"
        try:
            with temporary.open("xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a full disk may only be noticed here
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise OutputError(f"Cannot write {path}: {(error.strerror or str(error)).lower()}.") from error
            raise

    def has_written(self, path: Path) -> bool:
        """Whether a file of the folder is one that a worker of its batch wrote, as it is.

        Batches of earlier versions kept no account of that; theirs counts as written.
        """
        if not self.written.is_dir():
            return path.is_file() and self.plan.exists()
        return path.is_file() and (self.written / _mark(path.name, path.read_bytes())).exists()

    def publish_summary(self, path: Path, content: bytes, worker: str, *, overwrite: bool) -> None:
        """`publish` for a file that is written again at the end of every run, and only over one that was written so.

        Raises:
            OutputError: a file of somebody else has its name.
        """
        if not overwrite and os.path.lexists(path) and not self.has_written(path):
            raise OutputError(
                f"{path} exists already, and this batch did not write it as it is; move it away and start again."
            )
        # before the file itself: a kill between the two does no harm
        (self.written / _mark(path.name, content)).touch()
        sync_folder(self.written)
        self.publish(path, content, worker)
        sync_folder(path.parent)

    def tidy(self, is_alive: Callable[[str], bool]) -> None:
        """Remove what dead workers left half-written."""
        for path in self.temporary.iterdir():
            if not is_alive(path.name.rpartition("~")[0]):
                with contextlib.suppress(OSError):  # another worker tidies as well
                    path.unlink()


def _mark(name: str, content: bytes) -> str:
    return f"{name.casefold()}.{hashlib.sha256(content).hexdigest()}"


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """One worker's journal; opened with the first line."""

    def __init__(self, folder: Path, worker: str) -> None:
        self.path = folder / f"{worker}.jsonl"
        self._file: BinaryIO | None = None

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add lines and wait until they are on the disk."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        if not text:
            return
        if self._file is None:
            self._file = self.path.open("ab")
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Ledger:
    """Reads all journals; each refresh only what was added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, int] = {}

    def refresh(self) -> list[dict[str, Any]]:
        """Records added since the last time. A line without its end is still being written, or never will be."""
        return [record for path in sorted(self.folder.glob("*.jsonl")) for record in self._added(path)]

    def _added(self, path: Path) -> Iterator[dict[str, Any]]:
        start = self._read.get(path.name, 0)
        with path.open("rb") as file:
            file.seek(start)
            text = file.read()
        complete = text.rfind(b"\n") + 1
        self._read[path.name] = start + complete
        for line in text[:complete].splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a power cut can leave zeros; the row is made again
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                yield record

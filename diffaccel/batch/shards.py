"""webdataset shards: tar files of pictures, prompts and records. A shard appears complete, under one rename.

Members are sorted by row and carry no times or owners, so that a shard depends on its pictures and records alone.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.batch.settings import BatchError


@dataclass(frozen=True)
class Sample:
    """One row of a shard: its name, the picture waiting for the shard, and its record."""

    name: str
    picture: Path
    record: Mapping[str, Any]


def names_in(path: Path) -> frozenset[str]:
    """Names of the samples of a shard."""
    try:
        with tarfile.open(path, "r:") as archive:
            return frozenset(Path(name).stem for name in archive.getnames() if name.endswith(".json"))
    except (OSError, tarfile.TarError) as error:
        raise BatchError(
            f"{path} is not a readable shard: {error}; remove it to have its pictures made again."
        ) from error


def pack(path: Path, samples: Sequence[Sample]) -> bytes:
    """The content of a shard: new pictures, and those the file has already.

    Raises:
        BatchError: a picture is in neither place.
    """
    old = _pictures_in(path) if path.exists() else {}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for sample in samples:
            picture = sample.picture.read_bytes() if sample.picture.exists() else old.get(sample.picture.name)
            if picture is None:
                raise BatchError(f"{sample.picture} is gone; start the batch again to have it made again.")
            _add(archive, sample.picture.name, picture)
            _add(archive, f"{sample.name}.txt", str(sample.record["prompt"]).encode())
            _add(archive, f"{sample.name}.json", json.dumps(sample.record, sort_keys=True).encode())
    return buffer.getvalue()


def _pictures_in(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            file = archive.extractfile(member)  # only into memory: no member can choose a place
            if file is not None and not member.name.endswith((".txt", ".json")):
                found[member.name] = file.read()
    return found


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))


def member_of(path: Path, name: str) -> bytes:
    """One member of a shard."""
    with tarfile.open(path, "r:") as archive:
        file = archive.extractfile(name)
        assert file is not None  # `pack` writes plain files only
        return file.read()

"""webdataset shards: tar files of pictures, prompts and records. A shard appears complete, under one rename.

Members are sorted by row and carry no times or owners, so that a shard depends on its pictures and records alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from diffaccel.batch.settings import BatchError


@dataclass(frozen=True)
class Sample:
    """One row of a shard: its name, the picture waiting for the shard, and its record."""

    name: str
    picture: Path
    record: Mapping[str, Any]


def members_in(path: Path) -> frozenset[str]:
    """Names of everything in a shard.

    Raises:
        BatchError: it cannot be read.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            return frozenset(archive.getnames())
    except (OSError, tarfile.TarError) as error:
        raise BatchError(
            f"{path} is not a readable shard: {error}; remove it to have its pictures made again."
        ) from error


def names_in(path: Path) -> frozenset[str]:
    """Names of the samples of a shard."""
    return frozenset(Path(name).stem for name in members_in(path) if name.endswith(".json"))


def pack(path: Path, samples: Sequence[Sample], file: BinaryIO) -> None:
    """Write the content of a shard, picture by picture: new ones, and those the shard has already.

    Args:
        path: the shard as it is; it need not exist.
        file: where the new one goes.
    Raises:
        BatchError: a picture is in neither place.
    """
    with contextlib.ExitStack() as stack:
        old = _opened(path)
        if old is not None:
            stack.enter_context(old)
        members = {} if old is None else {member.name: member for member in old}
        archive = stack.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT))
        for sample in samples:
            picture = _picture(sample.picture, old, members)
            if picture is None:
                raise BatchError(f"{sample.picture} is gone; start the batch again to have it made again.")
            _add(archive, sample.picture.name, picture)
            _add(archive, f"{sample.name}.txt", str(sample.record["prompt"]).encode())
            _add(archive, f"{sample.name}.json", json.dumps(sample.record, sort_keys=True).encode())


def _opened(path: Path) -> tarfile.TarFile | None:
    try:
        return tarfile.open(path, "r:")
    except (FileNotFoundError, tarfile.TarError):  # what is no shard holds none of the pictures
        return None


def _picture(path: Path, old: tarfile.TarFile | None, members: Mapping[str, tarfile.TarInfo]) -> bytes | None:
    if path.exists():
        return path.read_bytes()
    if old is None or path.name not in members:
        return None
    file = old.extractfile(members[path.name])  # only into memory: no member can choose a place
    return None if file is None else file.read()


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

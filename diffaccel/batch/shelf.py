"""Which recorded pictures are still there."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffaccel.batch.plan import BatchPlan
from diffaccel.batch.shards import member_of, names_in


class Shelf:
    """Whether recorded pictures are still there as recorded: in the folder, waiting for a shard, or in it."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self._inside: dict[Path, tuple[int, frozenset[str]]] = {}

    def holds(self, index: int, record: Mapping[str, Any]) -> bool:
        """Whether the row's file exists with the recorded size."""
        row = self.plan.rows[index]
        path, shard = self.plan.path(row), self.plan.shard(row)
        if path.is_file() and path.stat().st_size == record.get("bytes"):
            return True
        return shard is not None and row.name in self._names(shard)

    def digest(self, index: int) -> str:
        """SHA-256 of the row's picture; "" if it cannot be read."""
        row = self.plan.rows[index]
        path, shard = self.plan.path(row), self.plan.shard(row)
        try:
            content = path.read_bytes() if shard is None or path.exists() else member_of(shard, path.name)
        except (OSError, KeyError, tarfile.TarError):  # another worker may just be moving it
            return ""
        return hashlib.sha256(content).hexdigest()

    def _names(self, shard: Path) -> Iterable[str]:
        try:
            stamp = shard.stat().st_mtime_ns
        except OSError:
            return ()
        if self._inside.get(shard, (None,))[0] != stamp:
            self._inside[shard] = (stamp, names_in(shard))
        return self._inside[shard][1]

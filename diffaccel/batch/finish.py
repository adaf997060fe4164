"""What is written once rows are settled: shards as they fill, then manifest and contact sheet."""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from diffaccel.batch.claims import Claims, Member
from diffaccel.batch.manifest import encode_manifest
from diffaccel.batch.plan import BatchPlan
from diffaccel.batch.shards import Sample, member_of, pack
from diffaccel.batch.sheet import MOST, draw_sheet, small
from diffaccel.batch.state import Store, sync_folder
from diffaccel.batch.strangers import foreign_members
from diffaccel.batch.tally import Tally
from diffaccel.files.output import OutputError


class Finisher:
    """Packs shards and writes manifest and sheet. All of it may be repeated without harm.

    Attributes:
        manifest: the manifest's path once it is written.
    """

    def __init__(self, plan: BatchPlan, store: Store, claims: Claims, member: Member, tally: Tally) -> None:
        self.plan, self.store, self.claims, self.member, self.tally = plan, store, claims, member, tally
        self.manifest: Path | None = None
        self._packed: set[int] = set()
        self._overwrite = plan.settings.on_change == "overwrite"

    def pack_complete(self) -> None:
        """Pack shards all of whose rows are done and wait."""
        for number in self._shards():
            if number not in self._packed and all(index in self.tally.done for index in self._rows(number)):
                self._pack(number)

    def finish(self, *, everything: bool, should_stop: Callable[[], bool]) -> None:
        """Pack what is left, complete or not; write manifest and contact sheet.

        Args:
            everything: False for a worker that was given a part of the batches only: others finish.
        """
        self.pack_complete()
        if not everything:
            return
        for number in self._shards():
            while number not in self._packed and not self._pack(number) and not should_stop():
                time.sleep(min(1.0, self.plan.settings.lease / 20))
        self._write_manifest()
        if self.plan.settings.contact_sheet:
            self._write_sheet()
        if len(self.tally.done) == len(self.plan.rows):
            self.claims.remove()

    def _shards(self) -> range:
        size = self.plan.settings.shards
        return range(-(-len(self.plan.rows) // size)) if size else range(0)

    def _rows(self, number: int) -> range:
        size = self.plan.settings.shards
        return range(number * size, min((number + 1) * size, len(self.plan.rows)))

    def _pack(self, number: int) -> bool:
        """Whether the shard is packed with all its finished rows."""
        done = [index for index in self._rows(number) if index in self.tally.done]
        waiting = [path for index in done if (path := self.plan.path(self.plan.rows[index])).exists()]
        if waiting:
            unit = f"shard-{number}"
            last = self.claims.attempts().get(unit, -1)
            mine_or_free = (
                last < 0 or self.claims.owner(unit, last) == self.member.name or self.claims.is_free(unit, last)
            )
            if not mine_or_free or not self._claim(unit, last + 1, waiting):
                return False
            self.tally.refresh()  # a packer that knew fewer rows than the one before would drop them
            done = [index for index in self._rows(number) if index in self.tally.done]
            self._write_shard(done)
            for path in waiting:
                path.unlink(missing_ok=True)
        if len(done) == len(self._rows(number)):
            self._packed.add(number)
        return True

    def _claim(self, unit: str, attempt: int, waiting: list[Path]) -> bool:
        try:
            return self.claims.try_claim(unit, attempt)
        except FileNotFoundError:
            if any(path.exists() for path in waiting):
                raise
            return False  # another worker has packed them and tidied up

    def _write_shard(self, done: list[int]) -> None:
        rows = [self.plan.rows[index] for index in done]
        path = self.plan.shard(rows[0])
        assert path is not None
        if not self._overwrite and (foreign := foreign_members(self.plan, path)):
            raise OutputError(f"{path} holds {foreign[0]!r}, which this batch did not put there; move it away.")
        samples = [Sample(row.name, self.plan.path(row), self._entry(row.index)) for row in rows]
        self.store.publish(path, functools.partial(pack, path, samples), self.member.name)
        sync_folder(path.parent)

    def _entry(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.tally.done[index].items() if name != "key"}

    def _write_manifest(self) -> None:
        failures = self.tally.failures()
        records = []
        for row in self.plan.rows:
            if row.index in self.tally.done:
                records.append(self.tally.done[row.index])
            elif row.index in failures:
                failed = {"row": row.number, "status": "failed", "error": failures[row.index]}
                records.append({**failed, "prompt": row.prompt, "seed": row.seed})
        path = self.plan.manifest
        content = encode_manifest(records, self.plan.settings.manifest)
        self.store.publish_summary(path, content, self.member.name, overwrite=self._overwrite)
        self.manifest = path

    def _write_sheet(self) -> None:
        shown = [index for index in range(len(self.plan.rows)) if index in self.tally.done][:MOST]
        pictures = [self._picture(index) for index in shown]
        content = draw_sheet([self.tally.done[index] for index in shown], pictures, len(self.tally.done))
        self.store.publish_summary(self.plan.contact_sheet, content, self.member.name, overwrite=self._overwrite)

    def _picture(self, index: int) -> Image.Image:
        row = self.plan.rows[index]
        path, shard = self.plan.path(row), self.plan.shard(row)
        content = path.read_bytes() if shard is None or path.exists() else member_of(shard, path.name)
        with contextlib.closing(Image.open(io.BytesIO(content))) as image:
            return small(image)

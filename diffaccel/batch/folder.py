"""The output folder made ready for a plan: created, continued, extended or overwritten, by one worker at a time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffaccel.batch.claims import Claims, Member
from diffaccel.batch.plan import BatchPlan, record_key
from diffaccel.batch.planning import find_change
from diffaccel.batch.settings import BatchError
from diffaccel.batch.state import Ledger, Saved, Store
from diffaccel.batch.strangers import refuse_strangers

SETUP = "setup"


def prepare(plan: BatchPlan, store: Store, member: Member, pipeline: str) -> None:
    """Make the folder hold this plan, or find that it does.

    Raises:
        BatchError: it holds another batch and `on_change` does not allow the change, or files of others in the way, or
            workers are busy with that one, or with this one cut into other batches.
    """
    wanted = Saved(tuple(row.key for row in plan.rows), plan.layout, pipeline)
    claims = Claims(store.claims / SETUP, member)
    while True:
        saved = store.saved()
        if saved is not None:
            if saved != wanted:
                check_change(plan, saved, wanted)
            _refuse_strangers(store, member, same_pictures=saved == wanted)
        if saved is not None and saved == wanted:
            store.tidy(member.is_alive)
            member.tidy()
            return
        attempt = claims.attempts().get(SETUP, -1)
        free = attempt < 0 or claims.is_free(SETUP, attempt)
        if free and claims.try_claim(SETUP, attempt + 1):
            _change(plan, store, member, wanted)
        else:
            time.sleep(0.05)


def _change(plan: BatchPlan, store: Store, member: Member, wanted: Saved) -> None:
    saved = store.saved()
    if saved == wanted:
        return
    refuse_strangers(plan, saved)
    if saved is not None:
        check_change(plan, saved, wanted)
        _refuse_strangers(store, member, same_pictures=False)
        _keep_only(plan, store, member, saved, wanted)
    store.save(wanted, member.name)


def _refuse_strangers(store: Store, member: Member, *, same_pictures: bool) -> None:
    """Raise `BatchError` if living workers divide the folder's work in another way: claims of two divisions do not meet.

    The card of a worker that died with its machine looks like a living one's; it is watched for a lease before it is ignored.
    """
    while strangers := member.strangers():
        if any(map(member.is_surely_alive, strangers)):
            raise BatchError(
                f"This batch is running in {store.output} with another batch size; use the same, or wait for it to end."
                if same_pictures
                else f"Another batch is running in {store.output}; wait for it or choose another output folder."
            )
        time.sleep(0.05)


def check_change(plan: BatchPlan, saved: Saved, wanted: Saved) -> None:
    """Raise `BatchError` if the folder holds another batch, or another model's, and `on_change` does not allow the change."""
    find_change(plan, saved)
    if saved.pipeline != wanted.pipeline and plan.settings.on_change != "overwrite":
        raise BatchError(
            f"The batch in {plan.output} was made with another model, scheduler, precision or recipe of the pipeline; "
            "choose another output folder, or let the change replace its pictures (--on-change overwrite)."
        )


def _keep_only(plan: BatchPlan, store: Store, member: Member, saved: Saved, wanted: Saved) -> None:
    """Forget and remove pictures that are not of the plan. Pictures first: the journals know them until they are gone."""
    same_layout = dict(saved.layout) == dict(wanted.layout)
    mine = {record_key(row, wanted.pipeline) for row in plan.rows} if same_layout else set()
    records = [record for record in Ledger(store.journals).refresh() if record.get("status") == "done"]
    keep = [record for record in records if record["key"] in mine]
    shards = {record.get("shard") for record in keep}
    for record in records:
        if record["key"] not in mine:
            _remove(store, record, shards)
    old = list(store.journals.glob("*.jsonl"))
    text = "".join(json.dumps(record) + "\n" for record in keep)
    store.publish(store.journals / f"{member.name}-kept.jsonl", text.encode(), member.name)
    for path in old:
        path.unlink()
    for folder in store.claims.iterdir():
        if folder.name != SETUP:
            shutil.rmtree(folder)


def _remove(store: Store, record: Mapping[str, Any], kept_shards: set[Any]) -> None:
    """Remove the file of a record. The journal is only a file: its names are not trusted to be plain."""
    shard = record.get("shard")
    if shard is not None and shard not in kept_shards:
        _unlink_plain(store.output, shard)
    _unlink_plain(store.staging if shard is not None else store.output, record.get("file"))


def _unlink_plain(folder: Path, name: Any) -> None:
    if isinstance(name, str) and Path(name).name == name and not name.startswith("."):
        (folder / name).unlink(missing_ok=True)

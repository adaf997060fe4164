"""Killed at any moment: nothing lost, nothing doubled, nothing half-written, same pixels. Workers that die are replaced."""

import hashlib
import json
import os
import random
import shutil
import signal
import tarfile
import time

import numpy as np
import pytest
from batch_forge import ROWS, SETTINGS, Forge
from PIL import Image

from diffaccel.batch.manifest import read_manifest
from diffaccel.batch.shards import names_in

KILLS = 100


@pytest.fixture(scope="module")
def forge():
    process = Forge()
    yield process
    process.close()


@pytest.fixture(scope="module")
def reference(forge, tmp_path_factory):
    """Pixels of an uninterrupted run, by file name."""
    folder = tmp_path_factory.mktemp("reference")
    assert forge.run(ROWS, folder, SETTINGS) == 0
    return pixels_of(folder)


def pixels_of(folder):
    return {path.name: pixels(path) for path in sorted(folder.glob("*.png"))}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).copy()  # decodes all of it: half a file raises


def journal(folder):
    texts = [path.read_text() for path in (folder / ".diffaccel" / "journal").glob("*.jsonl")]
    return [json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for_a_claim(folder):
    deadline = time.monotonic() + 60
    while not [*folder.glob(".diffaccel/claims/*/0.0")]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_nothing_half(folder, reference):
    """Between kills: only complete pictures with the right pixels, and every recorded one is there."""
    found = pixels_of(folder)
    assert set(found) <= set(reference)
    assert all(np.array_equal(found[name], reference[name]) for name in found)
    for record in journal(folder):
        assert hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest() == record["sha256"]


def assert_complete(folder, reference):
    assert_nothing_half(folder, reference)
    assert set(pixels_of(folder)) == set(reference)
    rows = [record["row"] for record in journal(folder)]
    assert sorted(rows) == [*range(1, len(ROWS) + 1)]  # no row was made twice
    manifest = read_manifest(folder / "manifest.jsonl")
    assert [entry["row"] for entry in manifest] == [*range(1, len(ROWS) + 1)]
    assert {entry["status"] for entry in manifest} == {"done"}
    assert {path.name for path in folder.iterdir()} == {*reference, "manifest.jsonl", ".diffaccel"}
    assert not any((folder / ".diffaccel" / "tmp").iterdir())
    assert not any((folder / ".diffaccel" / "workers").iterdir())


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments(forge, reference, tmp_path):
    """Each folder is killed and resumed until it is complete, then another one is begun. A moment is one of the process's
    own computing time: by the clock, a busy machine would never let a run come to its end."""
    rng = random.Random(0)
    whole = forge.seconds(forge.start(ROWS, tmp_path / "whole", SETTINGS))
    kills = folders = 0
    while kills < KILLS:
        folder = tmp_path / f"{folders}"
        while kills < KILLS:
            status = forge.run(ROWS, folder, SETTINGS, kill_at_second=rng.uniform(0.001, whole))
            assert status in (-signal.SIGPROF, 0)
            if folder.exists():
                assert_nothing_half(folder, reference)
            if status == 0:
                break
            kills += 1
        assert forge.run(ROWS, folder, SETTINGS) == 0
        assert_complete(folder, reference)
        folders += 1
    assert folders > 2  # the moments were spread over whole runs


def test_killed_before_every_request_to_the_disk(forge, reference, tmp_path):
    """Renames, links, syncs and removals are the moments that matter: none is left out."""
    number, interrupted = 0, 0
    while True:
        number += 1
        folder = tmp_path / f"{number}"
        status = forge.run(ROWS[:3], folder, SETTINGS, kill_at_call=number)
        if status == 0:
            break
        assert status == -9
        interrupted += 1
        assert forge.run(ROWS[:3], folder, SETTINGS) == 0
        found = pixels_of(folder)
        assert [*found] == [*reference][:3]
        assert all(np.array_equal(found[name], reference[name]) for name in found)
        assert sorted(record["row"] for record in journal(folder)) == [1, 2, 3]
        assert {path.name for path in folder.iterdir()} == {*found, "manifest.jsonl", ".diffaccel"}
        shutil.rmtree(folder)
    assert interrupted > 15


def test_shards_survive_kills_before_every_request_to_the_disk(forge, reference, tmp_path):
    settings = {**SETTINGS, "shards": 2}
    number = 0
    while True:
        number += 3
        folder = tmp_path / f"{number}"
        status = forge.run(ROWS[:3], folder, settings, kill_at_call=number)
        if status == 0:
            break
        assert forge.run(ROWS[:3], folder, settings) == 0
        assert sorted(path.name for path in folder.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
        assert {len(names_in(path)) for path in folder.glob("*.tar")} == {1, 2}
        found = {}
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as archive:
                found |= {name: pixels(archive.extractfile(name)) for name in archive.getnames() if ".png" in name}
        assert [*sorted(found)] == [*reference][:3]
        assert all(np.array_equal(found[name], reference[name]) for name in found)
        assert not any((folder / ".diffaccel" / "staging").iterdir())
        assert sorted(record["row"] for record in journal(folder)) == [1, 2, 3]


def test_a_torn_line_of_the_journal_is_made_again(forge, reference, tmp_path):
    assert forge.run(ROWS, tmp_path, SETTINGS) == 0
    path = next((tmp_path / ".diffaccel" / "journal").iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "manifest.jsonl").unlink()
    assert forge.run(ROWS, tmp_path, SETTINGS) == 0
    lines = [len(path.read_text().splitlines()) for path in (tmp_path / ".diffaccel" / "journal").iterdir()]
    assert sorted(lines) == [1, 8]  # one row was made again, and only one
    assert all(np.array_equal(pixels_of(tmp_path)[name], reference[name]) for name in reference)


# -- several workers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_a_list(forge, reference, tmp_path, workers):
    pids = [forge.start(ROWS, tmp_path, SETTINGS, pause=0.15) for _ in range(workers)]
    assert [forge.wait(pid) for pid in pids] == [0] * workers
    assert_complete(tmp_path, reference)  # no row was made twice, whoever made it
    assert len({record["worker"] for record in journal(tmp_path)}) == workers


def test_workers_fill_shards_together(forge, reference, tmp_path):
    settings = {**SETTINGS, "shards": 3}
    pids = [forge.start(ROWS, tmp_path, settings, pause=0.1) for _ in range(3)]
    assert [forge.wait(pid) for pid in pids] == [0, 0, 0]
    found = [name for path in sorted(tmp_path.glob("*.tar")) for name in sorted(names_in(path))]
    assert found == [name.removesuffix(".png") for name in reference]
    assert sorted(record["row"] for record in journal(tmp_path)) == [*range(1, len(ROWS) + 1)]
    assert not any((tmp_path / ".diffaccel" / "staging").iterdir())


def test_a_dead_workers_rows_are_picked_up(forge, reference, tmp_path):
    """The first worker claims a batch and dies over it; the second is at work meanwhile and does not wait for the lease."""
    settings = {**SETTINGS, "lease": 600.0}
    dying = forge.start(ROWS, tmp_path, settings, pause=600)
    wait_for_a_claim(tmp_path)
    living = forge.start(ROWS, tmp_path, settings, pause=0.05)
    assert forge.kill(dying, after=0.3) == -9
    assert forge.wait(living) == 0
    assert_complete(tmp_path, reference)
    assert len({record["worker"] for record in journal(tmp_path)}) == 1


def test_a_silent_worker_of_another_machine_is_replaced_after_the_lease(forge, reference, tmp_path):
    """Nothing is known about its process; its counter stands still."""
    settings = {**SETTINGS, "lease": 1.0}
    dying = forge.start(ROWS, tmp_path, settings, pause=600)
    home = tmp_path / ".diffaccel"
    wait_for_a_claim(tmp_path)
    assert forge.kill(dying, after=0) == -9
    card = next((home / "workers").glob("[!.]*"))
    card.write_text(json.dumps({**json.loads(card.read_text()), "machine": "another"}))
    assert forge.run(ROWS, tmp_path, settings) == 0
    assert_complete(tmp_path, reference)


@pytest.mark.parametrize("other", [{"on_change": "overwrite", "seed": 5}, {"batch_size": 3}])
def test_a_folder_at_work_takes_no_other_division_of_the_work(forge, reference, tmp_path, other):
    """It was waited for in silence and then replaced, or its rows were made twice."""
    running = forge.start(ROWS, tmp_path, SETTINGS, pause=1.0)
    wait_for_a_claim(tmp_path)
    assert forge.run(ROWS, tmp_path, {**SETTINGS, **other}) == 70  # at once, with the sentence of `BatchError`
    assert len(list(tmp_path.glob("*.png"))) < len(ROWS)
    assert forge.wait(running) == 0
    assert_complete(tmp_path, reference)


@pytest.mark.parametrize("other", [{"on_change": "overwrite", "seed": 5}, {"batch_size": 3}])
def test_the_card_of_a_machine_that_died_is_in_the_way_for_a_lease_only(forge, tmp_path, other):
    settings = {**SETTINGS, "lease": 1.0}
    dying = forge.start(ROWS, tmp_path, settings, pause=600)
    wait_for_a_claim(tmp_path)
    assert forge.kill(dying, after=0) == -9
    card = next((tmp_path / ".diffaccel" / "workers").glob("[!.]*"))
    card.write_text(json.dumps({**json.loads(card.read_text()), "machine": "another boot"}))
    assert forge.run(ROWS, tmp_path, {**settings, **other}) == 0
    assert len(list(tmp_path.glob("*.png"))) == len(ROWS)


def test_a_worker_that_was_only_slow_changes_nothing(forge, reference, tmp_path):
    """Stopped longer than its lease and then woken, it finds its rows taken and leaves them alone."""
    settings = {**SETTINGS, "lease": 0.6}
    slow = forge.start(ROWS, tmp_path, settings, pause=0.4)
    wait_for_a_claim(tmp_path)
    os.kill(slow, signal.SIGSTOP)
    assert forge.run(ROWS, tmp_path, settings) == 0
    os.kill(slow, signal.SIGCONT)
    assert forge.wait(slow) == 0
    assert_complete(tmp_path, reference)

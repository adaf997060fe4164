"""The command: a real process killed and continued, launchers, Ray, and what a user sees."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffaccel.batch.manifest import read_manifest
from diffaccel.cli.app import app

PROMPTS = ["a red square", "a blue dot", "a star, green", "two lines", "a cat", "a dog"]
OPTIONS = ("--steps", "2", "--recipe", "off", "--batch-size", "2", "--size", "32x32")


def run(*args):
    return CliRunner().invoke(app, ["batch", *map(str, args)])


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def no_loading(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a pipeline was loaded before the mistake was found")

    monkeypatch.setattr("diffaccel.loading.load_pipeline", load)


def pictures(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image).copy()
    return found


def command(*args):
    return [sys.executable, "-m", "diffaccel", "batch", *map(str, args)]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def assert_whole(folder, reference):
    found = pictures(folder)
    assert set(found) == set(reference)
    assert all(np.array_equal(found[name], reference[name]) for name in reference)
    entries = read_manifest(folder / "manifest.jsonl")
    assert [entry["row"] for entry in entries] == [*range(1, len(reference) + 1)]
    return entries


def test_a_list_becomes_pictures(tiny_folder, rows, tmp_path):
    out = tmp_path / "out"
    result = run(rows, "-o", out, "-m", tiny_folder, *OPTIONS, "--seed", 5, "--contact-sheet")
    assert result.exit_code == 0, result.output
    assert "6 of 6" in result.stdout
    assert str(out / "manifest.jsonl") in result.stdout
    entries = read_manifest(out / "manifest.jsonl")
    assert [entry["prompt"] for entry in entries] == PROMPTS
    assert [entry["seed"] for entry in entries] == [5, 6, 7, 8, 9, 10]
    assert {entry["model"] for entry in entries} == {"tiny-sd"}
    assert (out / "contact-sheet.png").exists()
    again = run(rows, "-o", out, "-m", tiny_folder, *OPTIONS, "--seed", 5)
    assert again.exit_code == 0
    changed = run(rows, "-o", out, "-m", tiny_folder, *OPTIONS, "--seed", 6)
    assert changed.exit_code == 1
    assert "6 of 6 rows differ" in changed.stderr
    assert "Traceback" not in changed.output


def test_the_picture_is_that_of_generate(tiny_folder, rows, tmp_path):
    assert run(rows, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS, "--seed", 5).exit_code == 0
    arguments = ["generate", PROMPTS[2], "-m", str(tiny_folder), *OPTIONS, "--seed", "7", "-o", str(tmp_path / "one")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (alone,) = pictures(tmp_path / "one").values()
    assert np.array_equal(alone, pictures(tmp_path / "out")["000003-a-star-green.png"])


def test_a_dry_run_writes_nothing(tiny_folder, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,steps\na,2\nb,3\nc,\nd,\n")
    result = run(path, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS, "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    for words in ("32x32", "000001-a.png", "(new)", "0 of 4 pictures", "time on one worker", "timed steps"):
        assert words in result.stdout
    assert run(path, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS).exit_code == 0
    result = run(path, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS, "--dry-run")
    assert "4 of 4 pictures" in result.stdout
    assert "last run" in result.stdout


@pytest.mark.usefixtures("no_loading")
def test_mistakes_are_listed_before_anything_is_loaded(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*(json.dumps({"prompt": "x", "seed": -1}) for _ in range(30)), '{"prompt": "fine"}']))
    result = run(path, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: 30 problems in the list, nothing was generated:")
    assert all(f"  row {number}: seed: -1" in result.stderr for number in range(1, 31))
    assert not (tmp_path / "out").exists()
    assert run(path, "-o", tmp_path / "out", "--recipe", "magic").exit_code == 1
    assert run(path).exit_code == 2  # the folder is never guessed


def test_progress_is_told_where_there_is_no_terminal(tiny_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("diffaccel.cli.batch.SECONDS_BETWEEN_LINES", 0)
    result = run(rows, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS)
    assert re.search(r"^[1-6] of 6 pictures, \d+\.\d\d pictures/s, .* left$", result.stderr, re.MULTILINE)
    monkeypatch.undo()
    assert "of 6 pictures," not in run(rows, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS).stderr


def test_a_plan_of_many_groups_is_shown_in_part(tiny_folder, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,guidance_scale\n" + "".join(f"a,{1.5 + number / 1000}\n" for number in range(1000)))
    result = run(path, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "and 970 more groups, 1000 batches in all" in result.stdout
    assert len(result.stdout.splitlines()) < 60


def test_exit_code_1_if_a_row_is_missing(tiny_folder, rows, tmp_path, monkeypatch):
    from diffaccel.batch.calls import Caller

    call = Caller.call

    def fail(self, rows):
        if any(row.index == 3 for row in rows):
            raise ValueError("no lines today")
        return call(self, rows)

    monkeypatch.setattr(Caller, "call", fail)
    result = run(rows, "-o", tmp_path / "out", "-m", tiny_folder, *OPTIONS)
    assert result.exit_code == 1
    assert "5 of 6" in result.stdout
    assert "failed: row 4: ValueError: no lines today" in result.stdout
    assert "1 picture is missing" in result.stdout


@pytest.mark.slow
def test_a_killed_command_continues(tiny_folder, rows, tmp_path):
    """A real process, killed as soon as it has recorded pictures; the same command finishes the list."""
    reference = tmp_path / "reference"
    rows.write_text("\n".join(f"prompt {number}" for number in range(40)))
    arguments = (rows, "-m", tiny_folder, *OPTIONS, "-o")
    assert run(*arguments, reference).exit_code == 0
    out = tmp_path / "out"
    process = subprocess.Popen(command(*arguments, out), env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not [path for path in out.glob(".diffaccel/journal/*.jsonl") if path.stat().st_size]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(list(out.glob("*.png")))
    assert 0 < before < 40
    done = subprocess.run(command(*arguments, out), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    workers = [entry["worker"] for entry in assert_whole(out, pictures(reference))]
    assert len(set(workers)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupted_command_says_so_and_leaves_a_manifest(tiny_folder, rows, tmp_path, number, times):
    """Once: the pictures being made are kept and the manifest is written. Twice: at once, still with a sentence."""
    rows.write_text("\n".join(f"prompt {number}" for number in range(4000)))
    out = tmp_path / "out"
    # the second Ctrl+C must meet a call that is still running, on a busy machine too: one of 500 steps
    options = (*OPTIONS, "--steps", 500) if times > 1 else OPTIONS
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it, and children too
    try:
        process = subprocess.Popen(
            command(rows, "-m", tiny_folder, *options, "-o", out),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            while not list(out.glob("*.png")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            if times > 1:
                assert process.stderr is not None
                while "Ctrl+C again" not in (
                    line := process.stderr.readline()
                ):  # a slow machine also tells its progress
                    assert line
                process.send_signal(number)
            said, complained = process.communicate(timeout=120)
        finally:
            process.kill()
    made = len(list(out.glob("*.png")))
    assert 0 < made < 4000
    if times > 1:
        assert process.returncode == 130
        assert "Interrupted. What is recorded is kept" in complained
    else:
        assert process.returncode == 1
        assert "Stopping after" in complained
        assert "stopped early" in said
        assert len(read_manifest(out / "manifest.jsonl")) == made
    assert not list((out / ".diffaccel" / "workers").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_launcher_of_several_processes(tiny_folder, rows, tmp_path, processes):
    """`accelerate launch` starts as many workers as it is asked for; they share the list."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    rows.write_text("\n".join(f"prompt {number}" for number in range(40)))
    arguments = (rows, "-m", tiny_folder, *OPTIONS, "--steps", 10, "-o")
    assert run(*arguments, reference).exit_code == 0
    # "--multi_gpu" is accelerate's word for several processes of one machine; without GPUs they use the CPU
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", *command(*arguments, out)[2:]],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 of 40") == 1  # one report, not one per process
    entries = assert_whole(out, pictures(reference))
    assert len({entry["worker"] for entry in entries}) > 1

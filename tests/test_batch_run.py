"""A batch as it runs: pictures that depend on their row alone, failures that stay with theirs, folders that notice changes."""

import functools
import gc
import json
import logging
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batch_forge import fast_pipe
from PIL import Image

import diffaccel
from diffaccel import GuidanceInterval, Recipe, TokenMerging
from diffaccel.batch import BatchError, BatchProgress, BatchSettings, calls, estimate, plan_batch, run_batch
from diffaccel.batch.arguments import converted
from diffaccel.batch.calls import Caller
from diffaccel.batch.claims import Claims, Member
from diffaccel.batch.engine import known_model
from diffaccel.batch.manifest import read_manifest
from diffaccel.batch.pictures import user_comment
from diffaccel.batch.shards import Sample, pack
from diffaccel.batch.state import Journal, Store
from diffaccel.batch.tally import Tally
from diffaccel.errors import DiffaccelError
from diffaccel.files import metadata
from diffaccel.files.output import OutputError

SETTINGS = {"steps": 2, "batch_size": 2, "guidance_scale": 3.0, "size": (16, 16)}
ROWS = [{"prompt": f"a red square {number}"} for number in range(5)]


@pytest.fixture(scope="module")
def pipe():
    return fast_pipe()


def planned(folder, rows=ROWS, **settings):
    return plan_batch(rows, folder, BatchSettings(**{**SETTINGS, **settings}))


def run(rows, folder, pipe, on_progress=None, should_stop=None, **settings):
    plan = planned(folder, rows, **settings)
    return run_batch(plan, pipe, on_progress=on_progress, should_stop=should_stop)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).copy()


def pictures(folder, pattern="*.png"):
    return {path.stem: pixels(path) for path in sorted(Path(folder).glob(pattern))}


def entries(folder):
    return read_manifest(folder / "manifest.jsonl")


# -- a picture depends on its row alone -------------------------------------------------------------------------------

MERGING = Recipe(name="merging", methods=(TokenMerging(ratio=0.5), GuidanceInterval(high=5.0))).to_dict()
MIXED = [
    {"prompt": "a", "recipe": MERGING},
    {"prompt": "b", "width": 24, "height": 16},
    {"prompt": "c", "negative_prompt": "bad"},
    {"prompt": "d, longer than the others", "recipe": MERGING, "steps": 3},
    {"prompt": "e", "seed": 2},
    {"prompt": "f", "recipe": MERGING, "steps": 3},
    {"prompt": "g", "negative_prompt": "worse"},
    {"prompt": "h", "width": 24, "height": 16},
    {"prompt": "i", "recipe": MERGING},
    {"prompt": "j"},
    {"prompt": "k"},
    {"prompt": "l", "recipe": MERGING},
]


def test_pictures_do_not_depend_on_batch_size_or_batch_mates(pipe, tmp_path):
    """Against the wrapped pipeline called alone with each row's own seed: bit for bit alone, within a level of grey in company.

    Some processors' kernels round by the number of rows.
    """
    alone = {}
    for number, row in enumerate(MIXED):
        fast = diffaccel.wrap(pipe, Recipe.from_dict(row["recipe"]) if "recipe" in row else "off")
        picture = fast(
            prompt=row["prompt"],
            negative_prompt=row.get("negative_prompt"),
            num_inference_steps=row.get("steps", 2),
            guidance_scale=3.0,
            width=row.get("width", 16),
            height=16,
            generator=torch.Generator("cpu").manual_seed(row.get("seed", 50 + number)),
        )
        alone[f"{number + 1}"] = np.asarray(picture.images[0])
    rows = [{**row, "name": f"{number}"} for number, row in enumerate(MIXED, 1)]
    for batch_size in (1, 2, 3):
        folder = tmp_path / f"{batch_size}"
        assert run(rows, folder, pipe, batch_size=batch_size, seed=50).exit_code == 0
        found = pictures(folder)
        assert set(found) == set(alone)
        apart = max(int(np.abs(found[name].astype(int) - alone[name].astype(int)).max()) for name in alone)
        assert apart <= (batch_size > 1), batch_size
    assert max(entry["batch"] for entry in entries(tmp_path / "3")) == 3
    assert not np.array_equal(alone["1"], alone["9"])


def test_rows_without_a_recipe_use_the_wrapped_pipelines(pipe, tmp_path):
    fast = diffaccel.wrap(pipe, [GuidanceInterval(high=0.01, low=0.0)])
    assert run(ROWS[:1], tmp_path / "own", fast).exit_code == 0
    assert run(ROWS[:1], tmp_path / "named", pipe, recipe=GuidanceInterval(high=0.01, low=0.0)).exit_code == 0
    assert run(ROWS[:1], tmp_path / "plain", pipe).exit_code == 0
    own, named, plain = (pictures(tmp_path / name).popitem()[1] for name in ("own", "named", "plain"))
    assert np.array_equal(own, named)
    assert not np.array_equal(own, plain)
    assert entries(tmp_path / "own")[0]["recipe"]["methods"][0]["method"] == "guidance_interval"


def test_further_columns_are_call_arguments(pipe, tmp_path):
    rows = [{"prompt": "x"}, {"prompt": "x", "seed": 0, "guidance_rescale": 0.7}]
    assert run(rows, tmp_path, pipe).exit_code == 0
    first, second = pictures(tmp_path).values()
    assert not np.array_equal(first, second)
    assert entries(tmp_path)[1]["arguments"] == {"guidance_rescale": "0.7"}


# -- what this pipeline cannot take -----------------------------------------------------------------------------------


def test_rows_this_pipeline_cannot_take_are_listed_before_the_first_picture(pipe, tmp_path):
    rows = [{"prompt": "x"}, {"prompt": "x", "width": 17, "height": 16}, {"prompt": "x", "width": 16, "height": 15}]
    with pytest.raises(BatchError) as found:
        run(rows, tmp_path / "out", pipe)
    assert [problem.row for problem in found.value.problems] == [2, 3]
    assert "multiples of 2" in found.value.problems[0].sentence
    assert not (tmp_path / "out").exists()


def test_unknown_columns_are_refused_unless_told(pipe, tmp_path):
    rows = [{"prompt": "x", "artist": "me"}]
    with pytest.raises(BatchError, match="'artist' is no column"):
        run(rows, tmp_path / "out", pipe)
    report = run(rows, tmp_path / "out", pipe, ignore_unknown_columns=True)
    assert report.exit_code == 0
    assert "artist" in report.notes[0]


def test_values_of_ignored_columns_are_ignored(pipe, tmp_path):
    """They are no problems and divide no batches; those of columns that the pipeline knows still are."""
    rows = [
        {"prompt": f"{number}", "source": {"id": number}, "score": float("inf"), "note": number} for number in range(4)
    ]
    report = run(rows, tmp_path / "out", pipe, ignore_unknown_columns=True, batch_size=4)
    assert report.exit_code == 0
    assert report.notes[0].endswith("has no such argument: note, score, source.")
    assert [entry["batch"] for entry in entries(tmp_path / "out")] == [4, 4, 4, 4]
    assert run(rows, tmp_path / "out", pipe, ignore_unknown_columns=True, batch_size=4).skipped == 4
    with pytest.raises(BatchError, match=r"row 1: score: inf is no finite number"):
        run(rows, tmp_path / "other", pipe)
    rows[2]["eta"] = {"a": 1}
    with pytest.raises(BatchError) as found:
        run(rows, tmp_path / "other", pipe, ignore_unknown_columns=True)
    assert [(problem.row, problem.sentence[:30]) for problem in found.value.problems] == [
        (3, "eta: a call argument is a numb")
    ]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"steps": 1001}, "DDIMScheduler cannot do 1001 steps: it has 1000 at most."),
        (
            {"steps": 1000},
            "cannot do 1000 steps: its first would be at noise level 1000 of 1000",
        ),  # of its steps_offset
        ({"clip_skip": 1}, r"clip_skip of StableDiffusionPipeline does not work with diffusers .* and transformers"),
        ({"negative_prompt": "x", "timesteps": [5, 5]}, r"row 2: a trial call fails: ValueError: .*timesteps"),
    ],
)
def test_a_dry_run_refuses_what_must_fail(pipe, tmp_path, row, words):
    with pytest.raises(BatchError, match=words) as found:
        estimate(planned(tmp_path, [{"prompt": "fine"}, {"prompt": "x", **row}]), pipe)
    assert [problem.row for problem in found.value.problems] == [2]


def test_an_argument_that_works_with_the_libraries_is_taken(pipe):
    """clip_skip fails where the text encoder has lost what the pipeline asks it for, and only there."""

    class Whole:
        def encode_prompt(self):
            return self.text_encoder.text_model.final_layer_norm

        def __call__(self, clip_skip: int | None = None): ...

    whole = Whole()
    whole.text_encoder = SimpleNamespace(text_model=SimpleNamespace(final_layer_norm=None))
    assert converted(whole, "clip_skip", 1) == 1
    assert converted(pipe, "clip_skip", None) is None


def test_a_long_list_is_checked_in_a_few_questions(pipe, tmp_path, monkeypatch):
    """50,000 rows of different guidance took 100 seconds before the first picture."""
    asked = []
    for name in ("check_size", "check_steps", "call_arguments", "wrap"):
        original = getattr(calls, name)
        monkeypatch.setattr(calls, name, lambda *args, _own=original, **more: asked.append(_own) or _own(*args, **more))
    rows = [{"prompt": "x", "guidance_scale": 1 + number / 1000, "eta": number / 1000} for number in range(1000)]
    Caller(planned(tmp_path, rows), pipe, "").check()
    assert len(asked) == 4


def test_arguments_are_compared_with_the_pipelines_annotations(pipe, tmp_path):
    """Each of these took the list's whole time to fail row by row; `kwargs` was even taken and ignored."""
    wrong = {
        "clip_skip": ("abc", "clip_skip of StableDiffusionPipeline is a whole number, not 'abc'."),
        "guidance_rescale": ("much", "guidance_rescale of StableDiffusionPipeline is a number, not 'much'."),
        "eta": (True, "eta of StableDiffusionPipeline is a number, not True."),
        "timesteps": ([1, "x"], "timesteps of StableDiffusionPipeline is a list, not [1, 'x']."),
        "callback_on_step_end": (
            "f",
            "callback_on_step_end of StableDiffusionPipeline cannot be given in a list of rows",
        ),
        "latents": ([0.0], "latents of StableDiffusionPipeline cannot be given in a list of rows"),
    }
    rows = [{"prompt": "x", name: value} for name, (value, _) in wrong.items()]
    with pytest.raises(BatchError) as found:
        run([{"prompt": "fine"}, *rows], tmp_path / "out", pipe)
    assert [problem.row for problem in found.value.problems] == [2, 3, 4, 5, 6, 7]
    for problem, (_, sentence) in zip(found.value.problems, wrong.values(), strict=True):
        assert problem.sentence.startswith(sentence)
    for name in ("self", "kwargs"):
        with pytest.raises(BatchError, match=f"'{name}' is no column"):
            run([{"prompt": "x", name: 1}], tmp_path / "out", pipe)
    assert not (tmp_path / "out").exists()


def test_values_become_what_the_annotation_says():
    class Pipe:
        def __call__(self, size: tuple[int, int] | None, skip: int | None, scale: float | list[float], free=None): ...

    def found(name, value):
        return converted(Pipe(), name, value)

    assert found("size", [512, 768.0]) == (512, 768)
    assert type(found("size", [1, 2])) is tuple  # Stable Diffusion XL adds it to other tuples
    assert (found("skip", 2.0), type(found("skip", 2.0))) == (2, int)  # a table with an empty cell holds 2.0
    assert (found("scale", 1), found("scale", [1, 0.5])) == (1, [1, 0.5])
    assert found("free", {"any": 1}) == {"any": 1}
    assert found("skip", None) is None
    for name, value in (("skip", 2.5), ("skip", True), ("size", 512), ("scale", "x"), ("scale", [[1]])):
        with pytest.raises(BatchError, match=f"^{name} of Pipe"):
            found(name, value)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fragile(monkeypatch):
    """The pipeline fails wherever a prompt says "bad"; out of memory with more than `limit` pictures together."""
    state = {"limit": 99, "calls": [], "fails": True}
    call = Caller.call

    def fail(self, rows):
        state["calls"].append(len(rows))
        if len(rows) > state["limit"]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if state["fails"] and any("bad" in row.prompt for row in rows):
            raise ValueError("a bad prompt\nwith details")
        return call(self, rows)

    monkeypatch.setattr(Caller, "call", fail)
    return state


def test_a_bad_row_takes_nobody_with_it(pipe, tmp_path, fragile):
    rows = [{"prompt": "a"}, {"prompt": "bad"}, {"prompt": "c"}, {"prompt": "d"}, {"prompt": "bad too"}]
    report = run(rows, tmp_path, pipe, batch_size=3)
    assert (report.done, report.failed, report.made, report.exit_code) == (3, 2, 3, 1)
    assert [(failure.row, failure.sentence) for failure in report.failures] == [
        (2, "ValueError: a bad prompt"),
        (5, "ValueError: a bad prompt"),
    ]
    assert report.stopped == ""
    assert [entry["status"] for entry in entries(tmp_path)] == ["done", "failed", "done", "done", "failed"]
    assert entries(tmp_path)[1]["error"] == "ValueError: a bad prompt"
    fragile["fails"] = False  # started again, only the failed rows are tried
    fragile["calls"].clear()
    report = run(rows, tmp_path, pipe, batch_size=3)
    assert (report.exit_code, report.skipped, report.made) == (0, 3, 2)
    assert sum(fragile["calls"]) == 2


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_picture_that_is_not_finite_is_a_failure_of_its_row(tmp_path):
    """It was written as a black picture, and the exit code was 0."""
    pipe = fast_pipe()
    encode = pipe.encode_prompt

    def spoilt(prompt, *args, **kwargs):
        positive, negative = encode(prompt, *args, **kwargs)
        for index, text in enumerate(prompt):
            positive[index] *= float("nan") if "bad" in text else 1.0
        return positive, negative

    pipe.encode_prompt = spoilt
    report = run([{"prompt": "a"}, {"prompt": "bad"}, {"prompt": "c"}], tmp_path, pipe, batch_size=3)
    assert (report.done, report.failed, report.exit_code) == (2, 1, 1)
    assert report.failures[0].sentence.startswith("the picture holds values that are not finite (NaN or infinite)")
    assert [*pictures(tmp_path)] == ["000001-a", "000003-c"]
    assert [entry["status"] for entry in entries(tmp_path)] == ["done", "failed", "done"]


def test_failures_in_a_row_stop_the_batch(pipe, tmp_path, fragile):
    rows = [{"prompt": "bad"}] * 2 + [{"prompt": "fine"}] + [{"prompt": "bad"}] * 3 + [{"prompt": "never reached"}]
    report = run(rows, tmp_path, pipe, batch_size=1, max_failures=3)
    assert (report.done, report.failed, report.exit_code) == (1, 5, 1)
    assert report.stopped == "3 rows in a row failed"
    assert [*pictures(tmp_path)] == ["000003-fine"]


def test_out_of_memory_halves_the_batch_and_is_remembered(pipe, tmp_path, fragile, caplog):
    fragile["limit"] = 1
    rows = [{"prompt": f"{number}"} for number in range(8)]
    with caplog.at_level(logging.WARNING, "diffaccel.batch"):
        report = run(rows, tmp_path / "split", pipe, batch_size=4)
    assert report.exit_code == 0
    assert fragile["calls"] == [4, 2, *[1] * 8]  # nothing larger is tried again
    assert [note.split(" of 16")[0] for note in report.notes] == [
        "Out of memory with 4 pictures",
        "Out of memory with 2 pictures",
    ]
    assert len(caplog.records) == 2
    fragile["limit"] = 99
    assert run(rows, tmp_path / "whole", pipe, batch_size=4).exit_code == 0
    split, whole = pictures(tmp_path / "split"), pictures(tmp_path / "whole")
    assert all(np.array_equal(split[name], whole[name]) for name in whole)


def test_a_picture_too_large_for_the_memory_is_a_failure(pipe, tmp_path, fragile):
    fragile["limit"] = 0
    report = run(ROWS[:2], tmp_path, pipe)
    assert [failure.sentence[:30] for failure in report.failures] == ["RuntimeError: CUDA out of memo"] * 2


def test_a_full_disk_ends_the_batch_with_a_reason(pipe, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"^Cannot write .*: no space left on device\.$"):
        run(ROWS, tmp_path, pipe)
    monkeypatch.setattr(os, "fsync", real)
    assert len(pictures(tmp_path)) < 5
    assert run(ROWS, tmp_path, pipe).exit_code == 0
    assert len(pictures(tmp_path)) == 5


@pytest.mark.parametrize(("place", "name"), [(Journal, "append"), (Claims, "try_claim"), (Member, "_write")])
def test_whatever_the_disk_refuses_is_one_sentence(pipe, tmp_path, monkeypatch, place, name):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, name, refuse)
    with pytest.raises(OutputError, match=rf"^Cannot write to {tmp_path}: no space left on device\.$"):
        run(ROWS, tmp_path, pipe)
    monkeypatch.undo()
    assert run(ROWS, tmp_path, pipe).exit_code == 0


@pytest.mark.parametrize(
    "part", [".", ".diffaccel", *(f".diffaccel/{name}" for name in ("claims", "journal", "workers"))]
)
@pytest.mark.parametrize("away", ["moved", "removed"])
def test_a_folder_that_goes_away_ends_the_batch(pipe, tmp_path, part, away):
    """It was waited for without end."""
    folder, looks = tmp_path / "out", []

    def go_away(progress):
        if progress.done and (folder / part).exists():
            (folder / part).rename(tmp_path / "elsewhere") if away == "moved" else shutil.rmtree(folder / part)

    def give_up():
        looks.append(None)
        return len(looks) > 200

    with pytest.raises(OutputError, match=rf"^{folder}.* was moved or removed while the batch was running"):
        run([*ROWS, *ROWS], folder, pipe, on_progress=go_away, should_stop=give_up)
    assert len(looks) < 100


def test_claims_that_go_away_end_the_batch(pipe, tmp_path):
    """Without them each batch looks as if another worker had it; those of a finished batch are tidied up, though."""

    def go_away(progress):
        for path in (tmp_path / ".diffaccel" / "claims").glob("*"):
            shutil.rmtree(path)

    looks = []
    with pytest.raises(OutputError, match=r"no such file or directory"):
        run(ROWS, tmp_path, pipe, on_progress=go_away, should_stop=lambda: looks.append(None) or len(looks) > 200)


@pytest.mark.parametrize("links", [True, False])
def test_a_claim_has_one_owner(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    (tmp_path / "workers").mkdir()
    first, second = (Member(tmp_path / "workers", 60.0) for _ in range(2))
    ours, theirs = (Claims(tmp_path / "claims", member) for member in (first, second))
    assert ours.try_claim("0", 0)
    assert not theirs.try_claim("0", 0)
    assert (ours.owner("0", 0), theirs.is_mine("0", 0), ours.is_mine("0", 0)) == (first.name, False, True)
    assert theirs.try_claim("0", 1)  # after the first owner died
    assert not ours.try_claim("0", 1)
    assert not ours.is_mine("0", 0)


def test_a_link_that_a_network_file_system_made_and_denied_is_ours(tmp_path, monkeypatch):
    link = os.link

    def denied(source, target):
        link(source, target)
        raise FileExistsError(17, "it exists")

    monkeypatch.setattr(os, "link", denied)
    (tmp_path / "workers").mkdir()
    assert Claims(tmp_path / "claims", Member(tmp_path / "workers", 60.0)).try_claim("0", 0)


# -- progress and stopping --------------------------------------------------------------------------------------------


def test_progress_counts_up_and_names_complete_files(pipe, tmp_path):
    seen: list[BatchProgress] = []

    def note(progress):
        seen.append(progress)
        if progress.last_path is not None:
            pixels(progress.last_path)

    report = run(ROWS, tmp_path, pipe, on_progress=note)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert (seen[0].done, seen[0].seconds_left, seen[-1].done, seen[-1].total) == (0, None, 5, 5)
    assert seen[-1].seconds_left == 0.0
    assert seen[-1].pictures_per_second > 0
    assert report.pictures_per_second == pytest.approx(report.made / report.seconds)


def test_stopping_keeps_what_is_done(pipe, tmp_path):
    calls = []
    report = run(
        ROWS,
        tmp_path,
        pipe,
        should_stop=lambda: len(calls) >= 1,
        on_progress=lambda p: calls.append(p) if p.done else None,
    )
    assert 0 < report.done < 5
    assert (report.stopped, report.exit_code) == ("it was asked to", 1)
    assert len(entries(tmp_path)) == len(pictures(tmp_path)) == report.done
    after = run(ROWS, tmp_path, pipe)
    assert (after.exit_code, after.skipped, after.made) == (0, report.done, 5 - report.done)


def test_a_batch_that_another_worker_finished_is_not_taken_over(pipe, tmp_path, monkeypatch):
    """It may end between our look at the journals and our look at its claim."""
    assert run_batch(planned(tmp_path), pipe, batches=[0, 1]).made == 4
    refresh, looks = Tally.refresh, []

    def late(self):
        looks.append(None)
        if len(looks) > 1:
            refresh(self)

    monkeypatch.setattr(Tally, "refresh", late)
    report = run(ROWS, tmp_path, pipe)
    assert (report.made, report.exit_code, report.notes) == (1, 0, ())


# -- changes ----------------------------------------------------------------------------------------------------------


def test_a_changed_list_is_noticed(pipe, tmp_path):
    assert run(ROWS, tmp_path, pipe).exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(BatchError, match="1 of 5 rows differ, the first is row 2"):
        run([ROWS[0], {"prompt": "other"}, *ROWS[2:]], tmp_path, pipe)
    with pytest.raises(BatchError, match="5 of 5 rows differ"):
        run(ROWS, tmp_path, pipe, steps=3)
    with pytest.raises(BatchError, match="5 of 5 rows differ"):
        run(ROWS, tmp_path, pipe, recipe="balanced")
    with pytest.raises(BatchError, match="2 rows fewer"):
        run(ROWS[:3], tmp_path, pipe, on_change="extend")
    with pytest.raises(BatchError, match="1 row more"):
        run([*ROWS, {"prompt": "x"}], tmp_path, pipe)
    with pytest.raises(BatchError, match="stored as png files, not as png in shards of 2;"):
        run(ROWS, tmp_path, pipe, shards=2)
    with pytest.raises(BatchError, match="rows differ"):
        run([ROWS[1], ROWS[0], *ROWS[2:], {"prompt": "x"}], tmp_path, pipe, on_change="extend")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_changed_model_is_noticed(tmp_path):
    pipe = fast_pipe()
    assert run(ROWS[:1], tmp_path, pipe).exit_code == 0
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1
    with pytest.raises(BatchError, match="another model"):
        run(ROWS[:1], tmp_path, pipe)
    with pytest.raises(BatchError, match="another model"):
        known_model(planned(tmp_path, ROWS[:1]), pipe)  # of a dry run
    would = known_model(planned(tmp_path, ROWS[:1], on_change="overwrite"), pipe)
    assert (would.change, would.kept) == ("overwrite", 0)
    report = run(ROWS[:1], tmp_path, pipe, on_change="overwrite")
    assert (report.made, report.skipped, report.exit_code) == (1, 0, 0)


def test_settings_that_change_no_picture_may_change(pipe, tmp_path):
    assert run(ROWS, tmp_path, pipe).exit_code == 0
    report = run(ROWS, tmp_path, pipe, batch_size=5, manifest="parquet", contact_sheet=True, max_failures=1)
    assert (report.made, report.exit_code) == (0, 0)
    assert read_manifest(tmp_path / "manifest.parquet") == entries(tmp_path)


def test_extending_keeps_what_is_there(pipe, tmp_path):
    assert run(ROWS[:3], tmp_path, pipe).exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    report = run(ROWS, tmp_path, pipe, on_change="extend")
    assert (report.made, report.skipped, report.exit_code) == (2, 3, 0)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}.items()
    assert len(entries(tmp_path)) == 5


def test_overwriting_replaces_changed_rows_and_removes_old_ones(pipe, tmp_path):
    assert run(ROWS, tmp_path, pipe).exit_code == 0
    (tmp_path / "mine.png").write_bytes(b"precious")
    first = (tmp_path / "000001-a-red-square-0.png").stat().st_mtime_ns
    rows = [ROWS[0], {"prompt": ROWS[1]["prompt"], "seed": 99}, {"prompt": "new"}]
    report = run(rows, tmp_path, pipe, on_change="overwrite")
    assert (report.made, report.skipped, report.exit_code) == (2, 1, 0)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"000001-a-red-square-0.png", "000002-a-red-square-1.png", "000003-new.png", "mine.png"}
    assert (tmp_path / "000001-a-red-square-0.png").stat().st_mtime_ns == first
    assert [entry["seed"] for entry in entries(tmp_path)] == [0, 99, 2]
    assert run(ROWS, tmp_path, pipe, on_change="overwrite").made == 4  # and back: nothing of the list between counts


def test_a_lost_picture_is_made_again(pipe, tmp_path):
    assert run(ROWS, tmp_path, pipe).exit_code == 0
    before = pictures(tmp_path)
    (tmp_path / "000002-a-red-square-1.png").unlink()
    (tmp_path / "000004-a-red-square-3.png").write_bytes(b"cut off")
    assert planned(tmp_path).kept == 3  # what a dry run says is there
    report = run(ROWS, tmp_path, pipe)
    assert (report.made, report.skipped) == (2, 3)
    assert planned(tmp_path).kept == 5
    assert all(np.array_equal(pictures(tmp_path)[name], before[name]) for name in before)


@pytest.mark.parametrize("shards", [0, 5])
def test_the_manifest_has_the_hash_of_the_picture_that_is_there(pipe, tmp_path, shards):
    """A picture made again has a second record, of the same size if the seconds in its metadata have as many digits."""
    assert run(ROWS, tmp_path, pipe, shards=shards).exit_code == 0
    (journal,) = (tmp_path / ".diffaccel" / "journal").iterdir()
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    for name in (
        "0-before.jsonl",
        "zz-after.jsonl",
    ):  # of the pictures that were lost, read before and after the others
        lost = [{**record, "sha256": name} for record in records]
        (journal.parent / name).write_text("".join(f"{json.dumps(record)}\n" for record in lost))
    assert run(ROWS, tmp_path, pipe, shards=shards).made == 0
    assert [entry["sha256"] for entry in entries(tmp_path)] == [record["sha256"] for record in records]


def test_files_of_others_are_not_replaced(pipe, tmp_path):
    (tmp_path / "000001-A-RED-square-0.png").write_text("precious")
    with pytest.raises(BatchError, match=r"row 1: .*exists already"):
        run(ROWS, tmp_path, pipe)
    assert os.listdir(tmp_path) == ["000001-A-RED-square-0.png"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("manifest.jsonl", {}),
        ("Manifest.parquet", {"manifest": "parquet"}),
        ("contact-sheet.png", {"contact_sheet": True}),
    ],
)
def test_a_strangers_manifest_or_sheet_is_not_replaced(pipe, tmp_path, name, settings):
    (tmp_path / name).write_text("precious")
    with pytest.raises(BatchError, match=r"(?i) exists already"):
        run(ROWS, tmp_path, pipe, **settings)
    assert (tmp_path / name).read_text() == "precious"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "more", "settings"),
    [
        ("000006-new.png", [{"prompt": "new"}], {"on_change": "extend"}),
        ("Contact-Sheet.png", [], {"contact_sheet": True}),
        ("manifest.parquet", [], {"manifest": "parquet"}),
        ("manifest.parquet", [{"prompt": "new"}], {"manifest": "parquet", "on_change": "extend"}),
    ],
)
def test_files_of_others_are_not_replaced_by_a_later_run(pipe, tmp_path, name, more, settings):
    assert run(ROWS, tmp_path, pipe).exit_code == 0
    (tmp_path / name).write_text("precious")
    for attempt in (planned, functools.partial(run, pipe=pipe)):  # a dry run says it too
        with pytest.raises(BatchError, match=rf"{name} exists already"):
            attempt(folder=tmp_path, rows=[*ROWS, *more], **settings)
    assert (tmp_path / name).read_text() == "precious"
    (tmp_path / name).unlink()
    for _ in range(2):  # its own files of the run before are no strangers
        assert run([*ROWS, *more], tmp_path, pipe, **settings).exit_code == 0


def test_a_manifest_that_was_changed_is_not_replaced(pipe, tmp_path):
    assert run(ROWS[:1], tmp_path, pipe).exit_code == 0
    path = tmp_path / "manifest.jsonl"
    path.write_text(path.read_text() + "my own line\n")
    with pytest.raises(BatchError, match="did not write it as it is"):
        run(ROWS[:1], tmp_path, pipe)
    assert "my own line" in path.read_text()
    assert run(ROWS[:1], tmp_path, pipe, on_change="overwrite").exit_code == 0
    assert "my own line" not in path.read_text()


def test_a_manifest_that_appears_while_the_batch_runs_is_kept(pipe, tmp_path):
    def appear(progress):
        if not (tmp_path / "manifest.jsonl").exists():
            (tmp_path / "manifest.jsonl").write_text("precious")

    with pytest.raises(OutputError, match="exists already, and this batch did not write it"):
        run(ROWS[:1], tmp_path, pipe, on_progress=appear)
    assert (tmp_path / "manifest.jsonl").read_text() == "precious"
    assert len(pictures(tmp_path)) == 1


def test_a_folder_of_an_earlier_version_is_continued(pipe, tmp_path):
    """It kept no account of what it wrote beside the pictures."""
    assert run(ROWS, tmp_path, pipe).exit_code == 0
    shutil.rmtree(tmp_path / ".diffaccel" / "written")
    assert run(ROWS, tmp_path, pipe).skipped == 5


@pytest.mark.parametrize("kind", ["garbage", "tar"])
def test_a_strangers_shard_is_not_replaced(pipe, tmp_path, kind, fragile):
    rows = [*ROWS[:3], {"prompt": "bad"}]
    (tmp_path / "mine.txt").write_text("precious")
    shard = tmp_path / "out" / "shard-000001.tar"

    def put():
        with tarfile.open(shard, "w") as archive:
            archive.add(tmp_path / "mine.txt", "mine.txt")
        if kind == "garbage":
            shard.write_text("precious")
        return shard.read_bytes()

    fragile["fails"] = False
    stopped = run(rows, tmp_path / "out", pipe, shards=2, should_stop=lambda: bool(fragile["calls"]))
    assert stopped.done == 2
    content, words = put(), r"shard-000001.tar (holds 'mine.txt', which|is not a readable shard)"
    for attempt in (planned, functools.partial(run, pipe=pipe)):
        with pytest.raises(BatchError, match=words):
            attempt(folder=tmp_path / "out", rows=rows, shards=2)
    assert shard.read_bytes() == content
    shard.unlink()
    with pytest.raises(DiffaccelError, match=words):  # it may also appear while the batch runs
        run(rows, tmp_path / "out", pipe, shards=2, on_progress=lambda progress: shard.exists() or put())
    assert shard.read_bytes() == content
    assert run(rows, tmp_path / "out", pipe, shards=2, on_change="overwrite").exit_code == 0
    with tarfile.open(shard) as archive:
        assert len(archive.getnames()) == 6


def test_a_list_is_never_replaced_by_its_manifest(pipe, tmp_path):
    source = tmp_path / "manifest.jsonl"
    source.write_text('{"prompt": "mine"}\n')
    for change in ("refuse", "overwrite"):
        with pytest.raises(BatchError, match="the list itself"):
            run(source, tmp_path, pipe, on_change=change)
    assert source.read_text() == '{"prompt": "mine"}\n'
    assert run(source, tmp_path, pipe, manifest="parquet").exit_code == 0


@pytest.mark.parametrize(
    ("below", "words"), [("file", "file is a file"), ("file/a/b", "file is a file"), ("x" * 300, "name too long")]
)
def test_places_that_are_no_folders_are_one_sentence(tmp_path, below, words):
    (tmp_path / "file").touch()
    with pytest.raises(BatchError, match=words):
        planned(tmp_path / below)


def test_links_in_the_output_folder_lead_nowhere(pipe, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir(), folder.mkdir()
    (folder / ".diffaccel").symlink_to(outside)
    with pytest.raises(BatchError, match="no folder of its own"):
        run(ROWS, folder, pipe)
    (folder / ".diffaccel").unlink()
    (outside / "victim").write_text("precious")
    (folder / "manifest.jsonl").symlink_to(outside / "victim")
    assert run(ROWS[:1], folder, pipe, on_change="overwrite").exit_code == 0
    assert (outside / "victim").read_text() == "precious"
    assert os.listdir(outside) == ["victim"]


def test_a_forged_journal_removes_nothing_outside(pipe, tmp_path):
    folder, victim = tmp_path / "out", tmp_path / "victim.png"
    victim.write_text("precious")
    assert run(ROWS[:2], folder, pipe).exit_code == 0
    forged = {"key": "x", "row": 1, "status": "done", "file": "../victim.png", "shard": None}
    (folder / ".diffaccel" / "journal" / "forged.jsonl").write_text(
        json.dumps(forged) + "\n" + json.dumps({**forged, "file": str(victim)}) + "\n"
    )
    assert run(ROWS[:1], folder, pipe, on_change="overwrite").exit_code == 0
    assert victim.read_text() == "precious"


# -- files ------------------------------------------------------------------------------------------------------------


def test_pictures_say_how_they_were_made(pipe, tmp_path):
    assert run([{"prompt": "a cat", "negative_prompt": "a dog"}], tmp_path, pipe, seed=7).exit_code == 0
    text = metadata.read(tmp_path / "000001-a-cat.png")
    assert (text.parameters["Prompt"], text.parameters["Negative prompt"]) == ("a cat", "a dog")
    assert (text.diffaccel["seed"], text.diffaccel["steps"], text.diffaccel["recipe"]["name"]) == (7, 2, "off")
    assert run(ROWS[:1], tmp_path / "silent", pipe, metadata=False).exit_code == 0
    assert metadata.read(tmp_path / "silent" / "000001-a-red-square-0.png") == metadata.PictureText(None, None)


@pytest.mark.parametrize(("kind", "suffix"), [("jpeg", ".jpg"), ("webp", ".webp")])
def test_other_formats_carry_exif(pipe, tmp_path, kind, suffix):
    row = {"prompt": "日本の猫 🐈, ünïcode"}
    assert run([row], tmp_path, pipe, format=kind, metadata=True, seed=3).exit_code == 0
    (path,) = tmp_path.glob(f"*{suffix}")
    with Image.open(path) as image:
        assert image.format == kind.upper()
        text = metadata.parse_parameters(user_comment(image))
    assert (text["Prompt"], text["Seed"]) == (row["prompt"], "3")
    assert run([row], tmp_path / "silent", pipe, format=kind, metadata=False).exit_code == 0
    with Image.open(next((tmp_path / "silent").glob(f"*{suffix}"))) as image:
        assert not image.getexif()


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's
def test_webdataset_reads_the_shards(pipe, tmp_path):
    import webdataset

    assert run(ROWS, tmp_path / "files", pipe).exit_code == 0
    assert run(ROWS, tmp_path / "shards", pipe, shards=2, contact_sheet=True).exit_code == 0
    paths = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    assert [Path(path).name for path in paths] == [f"shard-{number:06d}.tar" for number in range(3)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode("rgb8"))
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [*pictures(tmp_path / "files")]
    for sample, expected in zip(samples, pictures(tmp_path / "files").values(), strict=True):
        assert np.array_equal(sample["png"], expected)
        assert sample["txt"] == sample["json"]["prompt"]
    assert not list((tmp_path / "shards").glob("*.png")) or (tmp_path / "shards" / "contact-sheet.png").exists()
    again = run(ROWS, tmp_path / "shards", pipe, shards=2)
    assert (again.made, again.skipped, again.exit_code) == (0, 5, 0)


def test_a_shard_is_written_picture_by_picture(tmp_path):
    """A thousand pictures of two megabytes do not have to fit into the memory, let alone twice."""
    samples = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        path.write_bytes(os.urandom(1 << 20))
        samples.append(Sample(path.stem, path, {"prompt": "x"}))
    store = Store(tmp_path / "out")
    store.create()
    shard = store.output / "shard.tar"

    def packed():
        tracemalloc.start()
        store.publish(shard, functools.partial(pack, shard, samples), "worker")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
        return shard.read_bytes()

    first = packed()
    for sample in samples:
        sample.picture.unlink()
    assert packed() == first  # from the shard that is there


def test_a_shard_is_completed_when_its_failed_row_succeeds(pipe, tmp_path, fragile):
    rows = [{"prompt": "a"}, {"prompt": "bad"}, {"prompt": "c"}]
    assert run(rows, tmp_path, pipe, shards=3).exit_code == 1
    with tarfile.open(tmp_path / "shard-000000.tar") as archive:
        assert [name for name in archive.getnames() if name.endswith("png")] == ["000001-a.png", "000003-c.png"]
    fragile["fails"] = False
    assert run(rows, tmp_path, pipe, shards=3).made == 1
    with tarfile.open(tmp_path / "shard-000000.tar") as archive:
        assert [name for name in archive.getnames() if name.endswith("png")] == [
            "000001-a.png",
            "000002-bad.png",
            "000003-c.png",
        ]


def test_the_manifest_describes_every_file(pipe, tmp_path):
    import hashlib

    assert (
        run(ROWS, tmp_path, pipe, manifest="parquet", recipe=Recipe.from_dict(MERGING), contact_sheet=True).exit_code
        == 0
    )
    found = read_manifest(tmp_path / "manifest.parquet")
    assert [entry["row"] for entry in found] == [1, 2, 3, 4, 5]
    for entry in found:
        content = (tmp_path / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert entry["seed"] == metadata.read(tmp_path / entry["file"]).diffaccel["seed"] == entry["row"] - 1
        assert entry["recipe"]["name"] == "merging"
        assert entry["seconds"] > 0
        assert "key" not in entry
    assert pixels(tmp_path / "contact-sheet.png").shape[2] == 3


def test_estimates_say_what_they_rest_on(pipe, tmp_path):
    plan = plan_batch(ROWS, tmp_path, BatchSettings(**SETTINGS))
    first = estimate(plan, pipe)
    assert first.seconds > 0
    assert "timed steps" in first.source
    assert not (tmp_path / ".diffaccel").exists()
    assert run(ROWS[:3], tmp_path, pipe).exit_code == 0
    plan = plan_batch(ROWS, tmp_path, BatchSettings(**SETTINGS, on_change="extend"))
    made = np.mean([entry["seconds"] for entry in entries(tmp_path)])
    second = estimate(plan, pipe)
    assert second.seconds == pytest.approx(2 * made)
    assert "last run" in second.source


def test_a_list_of_which_every_row_differs_is_estimated_from_a_few_calls(pipe, tmp_path, monkeypatch):
    """A call for each of these kinds would take as long as the pictures."""
    from diffaccel.batch import timing as estimating

    calls, call = [], estimating._Timing._timed

    def counted(self, rows, steps):
        calls.append([row.size for row in rows])
        return call(self, rows, steps)

    monkeypatch.setattr(estimating._Timing, "_timed", counted)
    rows = [
        {"prompt": "x", "guidance_scale": 1.5 + n / 100, "eta": n / 100, "width": 16 + 8 * n, "height": 16}
        for n in range(40)
    ]
    found = estimate(planned(tmp_path, rows), pipe)
    assert len(calls) == 3 * estimating.MOST_SIZES
    assert {size for sizes in calls for size in sizes} >= {(16, 16), (328, 16)}
    assert "of 5 of its 40 sizes" in found.source
    assert found.seconds > 0


def test_the_pipeline_is_stock_afterwards(pipe, tmp_path):
    def stock():
        seed = torch.Generator("cpu").manual_seed(0)
        return np.asarray(pipe("x", num_inference_steps=2, width=16, height=16, generator=seed).images[0])

    before = stock()
    assert run(ROWS, tmp_path, pipe, recipe=TokenMerging(ratio=0.5)).exit_code == 0
    assert np.array_equal(stock(), before)

"""Lists and what is wrong with them: every problem by row number, before anything is loaded or written."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from diffaccel import GuidanceInterval, Recipe
from diffaccel.batch import BatchError, BatchSettings, plan_batch
from diffaccel.batch.names import checked_name, default_name
from diffaccel.batch.rows import Limits, TooLarge
from diffaccel.batch.settings import RowProblem, summary


def plan(rows, folder, **settings):
    return plan_batch(rows, folder / "out", BatchSettings(**settings))


def problems(rows, folder, **settings):
    """Problems as (row, sentence); the plan must be refused and nothing written."""
    with pytest.raises(BatchError) as found:
        plan(rows, folder, **settings)
    assert not (folder / "out").exists()
    return [(problem.row, problem.sentence) for problem in found.value.problems]


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


CSV = """prompt,negative_prompt,seed,steps,width,height,guidance_scale,recipe,name,clip_skip
a red dot,,,,,,,,,
"a blue dot, small",bad,7,10,64,48,2.5,balanced,blue,2
"""


def check_two_rows(found):
    first, second = found.rows
    assert (first.prompt, first.seed, first.steps, first.size, first.name) == (
        "a red dot",
        100,
        25,
        None,
        "000001-a-red-dot",
    )
    assert (first.negative_prompt, first.guidance_scale, first.recipe, first.extras) == ("", None, "", ())
    assert (second.prompt, second.negative_prompt, second.seed, second.steps) == ("a blue dot, small", "bad", 7, 10)
    assert (second.size, second.guidance_scale, second.name) == ((64, 48), 2.5, "blue")
    assert found.recipes[second.recipe].name == "balanced"
    assert second.extras == (("clip_skip", "2"),)


def test_the_same_list_in_every_format(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": "a red dot"},
        {
            "prompt": "a blue dot, small",
            "negative_prompt": "bad",
            "seed": 7,
            "steps": 10,
            "width": 64,
            "height": 48,
            "guidance_scale": 2.5,
            "recipe": "balanced",
            "name": "blue",
            "clip_skip": 2,
        },
    ]
    names = list(rows[1])
    pyarrow.parquet.write_table(
        pyarrow.table({name: [row.get(name) for row in rows] for name in names}), tmp_path / "rows.parquet"
    )
    sources = [
        rows,
        written(tmp_path, "rows.csv", "\ufeff" + CSV),
        written(tmp_path, "rows.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n"),
        tmp_path / "rows.parquet",
    ]
    keys = set()
    for source in sources:
        found = plan(source, tmp_path, seed=100)
        check_two_rows(found)
        keys.add(tuple(row.key for row in found.rows))
    assert len(keys) == 1  # a list may change its format between two runs


def test_plain_text_and_tabs(tmp_path):
    found = plan(written(tmp_path, "prompts.txt", "a red dot\n\n  a blue dot  \n"), tmp_path)
    assert [row.prompt for row in found.rows] == ["a red dot", "a blue dot"]
    found = plan(written(tmp_path, "rows.tsv", "prompt\tseed\na, b\t4\n"), tmp_path)
    assert [(row.prompt, row.seed) for row in found.rows] == [("a, b", 4)]


def test_every_problem_is_listed_by_row(tmp_path):
    rows = [
        {"prompt": "fine"},
        {"prompt": " ", "seed": 1},
        {"prompt": "x", "seed": -1, "steps": "many", "width": 64},
        {"prompt": "x", "guidance_scale": float("inf"), "seed": 1.5},
        {"prompt": "x", "recipe": "magic"},
        {"prompt": 7},
        {"prompt": "\ud800"},
        {"prompt": "x", "steps": True},
        {"prompt": "a\0b"},
    ]
    found = problems(rows, tmp_path)
    expected = [
        (2, "no prompt"),
        (3, "seed: -1"),
        (3, "steps: 'many' is not a number"),
        (4, "seed: 1.5 is not a whole number"),
        (4, "guidance_scale: inf"),
        (5, "recipe: 'magic'"),
        (6, "prompt: it must be text, not 7"),
        (7, "UTF-8"),
        (8, "steps: True is not a number"),
        (9, "NUL"),
    ]
    assert [row for row, _ in found] == [row for row, _ in expected]
    assert all(words in sentence for (_, words), (_, sentence) in zip(expected, found, strict=True))


@pytest.mark.parametrize("column", ["seed", "steps", "width", "guidance_scale"])
@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_beyond_every_float_are_refused_in_a_short_sentence(tmp_path, column, digits):
    """400 digits are more than a float holds, 5000 more than Python turns into text."""
    values = ["9" * digits, 10**digits]
    found = problems([{"prompt": "x", "width": 16, "height": 16, column: value} for value in values], tmp_path)
    assert [row for row, _ in found] == [1, 2]
    assert all(sentence.startswith(f"{column}: ") and len(sentence) < 140 for _, sentence in found)


def test_values_that_json_does_not_know_are_shown(tmp_path):
    (only,) = problems([{"prompt": "x", "eta": float("inf")}], tmp_path)
    assert only == (1, "eta: inf is no finite number, text, true or false, or a list of these.")


def test_one_side_is_no_size(tmp_path):
    assert problems([{"prompt": "x", "width": 64}], tmp_path) == [
        (1, "it has only one of width and height; give both.")
    ]
    assert plan([{"prompt": "x", "width": 64}], tmp_path, size=(32, 48)).rows[0].size == (64, 48)


def test_many_problems_are_one_line_for_each_kind(tmp_path):
    rows = [{"prompt": "x", "seed": -number, "steps": "many"} for number in range(1, 31)]
    with pytest.raises(BatchError) as found:
        plan([*rows, {"prompt": ""}], tmp_path)
    assert len(found.value.problems) == 61
    assert str(found.value).splitlines() == [
        "61 problems in the list, nothing was generated:",
        "row 1: seed: -1 is not between 0 and 9007199254740992. And so in 29 more, the last is row 30.",
        "row 1: steps: 'many' is not a number. And so in 29 more, the last is row 30.",
        "row 31: it has no prompt.",
    ]
    several = [RowProblem(number, f"wrong in way {chr(64 + number)}.") for number in range(1, 6)]
    assert summary(several, 5) == [str(problem) for problem in several]
    assert summary(several, 4)[-2:] == ["row 4: wrong in way D.", "and 1 more of 1 other kinds"]


@pytest.mark.parametrize(
    ("name", "text", "row", "words"),
    [
        ("a.csv", "prompt,seed\nx,1,2\ny\nz,3\n", [1, 2], ["3 cells", "1 cells"]),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": \n[1]\n{"prompt": "x", "prompt": "y"}\n',
            [2, 3, 4],
            ["", "list", "twice"],
        ),
        ("a.csv", "text,seed\nx,1\n", [0], ["no column 'prompt'"]),
        ("a.csv", "prompt,generator\nx,1\n", [0], ["use the column 'seed'"]),
        ("a.csv", "prompt,clip_skip\nx,{}\n".replace("{}", '"{""a"": 1}"'), [1], ["clip_skip"]),
    ],
)
def test_damaged_lists(tmp_path, name, text, row, words):
    found = problems(written(tmp_path, name, text), tmp_path)
    assert [number for number, _ in found] == row
    assert all(word in sentence for word, (_, sentence) in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xlsx", "x", "no list that is known"),
        ("a.csv", b"prompt\n\xff\xfe\n", "UTF-8"),
        ("a.csv", "prompt,seed\nx,1\n".encode("utf-16-le"), "UTF-8: it holds NUL"),
        ("a.txt", "a red dot\n".encode("utf-16-be"), "UTF-8: it holds NUL"),
        ("a.jsonl", b'{"prompt": "x"}\0\n', "UTF-8: it holds NUL"),
        ("a.csv", "prompt,prompt\nx,y\n", "twice"),
        ("a.csv", 'prompt\n"x\n', "line"),
        ("a.csv", "prompt\n", "no rows"),
        ("a.txt", "\n \n", "no rows"),
        ("a.parquet", "not parquet", "Parquet"),
    ],
)
def test_files_that_are_no_lists(tmp_path, name, content, words):
    with pytest.raises(BatchError, match=words):
        plan(written(tmp_path, name, content), tmp_path)
    with pytest.raises(BatchError, match="no such file"):
        plan(tmp_path / "missing.csv", tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt\n" + "x\n" * 6 + '"never closed\n'),
        ("a.tsv", "prompt\tseed\n" + "x\t1\n" * 6 + '"never closed\n'),
        ("a.jsonl", '{"prompt": "x"}\n' * 6 + "{\n"),
        ("a.txt", "x\n\n" * 6),
    ],
)
def test_a_list_is_read_no_further_than_its_limit(tmp_path, name, text):
    """What stands behind the limit is not even looked at."""
    path = written(tmp_path, name, text)
    with pytest.raises(TooLarge, match="has more than 5 rows"):
        plan_batch(path, tmp_path / "out", limits=Limits(rows=5))
    with pytest.raises(TooLarge, match="holds more than 9 bytes"):
        plan_batch(path, tmp_path / "out", limits=Limits(bytes=9))


def test_a_parquet_file_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    text = "".join(map(chr, range(33, 126))) * 30
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [text] * 4000}), path)
    assert path.stat().st_size < 20_000  # a text that repeats is stored once
    unpacked: list[int] = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self, **options):
        for part in real(self, **options):
            unpacked.append(part.num_rows)
            yield part

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    with pytest.raises(TooLarge, match="more than 500 rows"):
        plan_batch(path, tmp_path / "out", limits=Limits(rows=500))
    assert unpacked == []
    with pytest.raises(TooLarge, match="more than 20000 bytes"):
        plan_batch(path, tmp_path / "out", limits=Limits(bytes=20_000))
    assert sum(unpacked) == 8
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x" * 100_000]}), path, compression="zstd")
    with pytest.raises(TooLarge, match="more than 20000 bytes"):
        plan_batch(path, tmp_path / "out", limits=Limits(bytes=20_000))
    assert sum(unpacked) == 8
    assert len(plan_batch(path, tmp_path / "out", limits=Limits(rows=1, bytes=200_000)).rows) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt\r\nein süßer Hund\r\n"),
        ("a.tsv", "prompt\nein süßer Hund\n"),
        ("a.jsonl", '{"prompt": "ein süßer Hund"}\r\n'),
        ("a.txt", "ein süßer Hund\r"),
    ],
)
def test_lists_may_be_written_as_windows_programs_do(tmp_path, encoding, name, text):
    marked = "\ufeff" + text if encoding == "utf-16-be" else text
    found = plan(written(tmp_path, name, marked.encode(encoding)), tmp_path)
    assert [row.prompt for row in found.rows] == ["ein süßer Hund"]


def test_empty_columns_behind_the_last_one_are_left_out(tmp_path):
    """Spreadsheets write them for cells that were emptied."""
    found = plan(written(tmp_path, "a.csv", "prompt,seed,, \na,1,,\nb,2,, ,\nc,3\n,,,\n"), tmp_path)
    assert [(row.prompt, row.seed) for row in found.rows] == [("a", 1), ("b", 2), ("c", 3)]
    assert problems(written(tmp_path, "a.csv", "prompt,seed,,\na,1,,x\n"), tmp_path) == [
        (1, "it has 4 cells, the header has 2.")
    ]
    with pytest.raises(BatchError, match="without a name"):
        plan(written(tmp_path, "a.csv", "prompt,,seed\na,,1\n"), tmp_path)


def test_values_of_numpy_are_values(tmp_path):
    row = {
        "prompt": np.str_("x"),
        "seed": np.int64(7),
        "steps": np.float32(3),
        "width": np.uint16(64),
        "height": np.int32(64),
        "guidance_scale": np.float64(2.5),
        "clip_skip": np.int8(2),
        "sigmas": np.array([1.0, 0.5]),
        "negative_prompt": np.float64("nan"),
    }
    plain = {"prompt": "x", "seed": 7, "steps": 3, "width": 64, "height": 64, "guidance_scale": 2.5, "clip_skip": 2}
    found = plan([row, {**plain, "sigmas": [1.0, 0.5], "name": "other"}], tmp_path).rows
    assert found[0].extras == found[1].extras == (("clip_skip", "2"), ("sigmas", "[1.0, 0.5]"))
    same = ("prompt", "seed", "steps", "size", "guidance_scale", "negative_prompt")
    assert [getattr(found[0], name) for name in same] == [getattr(found[1], name) for name in same]
    assert problems([{"prompt": "x", "steps": np.True_}], tmp_path) == [(1, "steps: True is not a number.")]


def test_an_output_folder_that_is_read_only_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))  # a superuser may write anywhere
    with pytest.raises(BatchError, match=rf"out cannot be the output folder: {tmp_path} is read-only"):
        plan([{"prompt": "x"}], tmp_path)
    assert asked == [tmp_path]


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_of_rows(tmp_path):
    inline = Recipe(name="mine", methods=(GuidanceInterval(high=2.0),)).to_dict()
    (tmp_path / "sub").mkdir()
    Recipe(name="filed", methods=()).save(tmp_path / "sub" / "filed.json")
    rows = [
        {"prompt": "x", "recipe": "fast"},
        {"prompt": "x", "recipe": inline},
        {"prompt": "x", "recipe": json.dumps(inline)},
        {"prompt": "x", "recipe": "sub/filed.json"},
        {"prompt": "x"},
    ]
    path = written(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    found = plan(path, tmp_path, recipe="balanced")
    assert [found.recipes[row.recipe].name for row in found.rows] == ["fast", "mine", "mine", "filed", "balanced"]
    assert [len(group.rows) for group in found.groups] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    "name", ["../secret.json", "/etc/secret.json", "link/secret.json", "a\0b.json", "sub/none.json"]
)
def test_recipe_files_stay_in_the_lists_folder(tmp_path, name):
    folder, outside = tmp_path / "in", tmp_path / "outside"
    folder.mkdir(), outside.mkdir()
    for place in (outside, tmp_path):
        Recipe(name="secret").save(place / "secret.json")
    (folder / "link").symlink_to(outside)
    found = problems(written(folder, "rows.jsonl", json.dumps({"prompt": "x", "recipe": name})), tmp_path)
    assert len(found) == 1
    assert "in the folder of the list" in found[0][1]


def test_recipes_without_a_folder_name_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Recipe(name="here").save("here.json")
    assert "cannot name files" in problems([{"prompt": "x", "recipe": "here.json"}], tmp_path)[0][1]
    erase = {"schema": 1, "methods": [{"method": "erase", "file": "edit.safetensors"}]}
    assert "names a file" in problems([{"prompt": "x", "recipe": erase}], tmp_path)[0][1]


def test_wrong_recipes_name_their_mistake(tmp_path):
    wrong = {"schema": 1, "methods": [{"method": "token_merging", "ratio": 7}]}
    assert "token_merging.ratio" in problems([{"prompt": "x", "recipe": wrong}], tmp_path)[0][1]
    assert "not valid JSON" in problems([{"prompt": "x", "recipe": "{"}], tmp_path)[0][1]
    assert "not int" in problems([{"prompt": "x", "recipe": 3}], tmp_path)[0][1]
    twice = '{"schema": 1, "methods": [], "methods": []}'
    assert "the key 'methods' is given twice" in problems([{"prompt": "x", "recipe": twice}], tmp_path)[0][1]
    assert "holds what JSON cannot" in problems([{"prompt": "x", "recipe": {"name": b"mine"}}], tmp_path)[0][1]


# -- names ------------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    *(
        "../up",
        "/absolute",
        "a/b",
        "a\\b",
        "..",
        ".",
        ".hidden",
        "~root",
        "COM\u00b9",
        "conin$.x",
        "a\0b",
        "a\nb",
        "C:drive",
        "con",
        "NUL.x",
    ),
    *("LPT1", "trailing.", "x" * 181, "日" * 61, "a?b", "contact-sheet", "..png", ".diffaccel", "a\u202e\x7f"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_lead_elsewhere_are_refused(tmp_path, name):
    (row, sentence) = problems([{"prompt": "x", "name": name}], tmp_path)[0]
    assert row == 1
    assert sentence.startswith("name: the name")


def test_good_names(tmp_path):
    assert checked_name("Straße 日本 (2)", "png") == "Straße 日本 (2)"
    assert checked_name("cat.PNG", "png") == "cat"
    assert checked_name("cat.jpeg", "jpeg") == "cat"
    assert default_name(6, "../../A Cat!") == "000007-a-cat"
    with pytest.raises(ValueError, match="written as png"):
        checked_name("cat.jpg", "png")
    with pytest.raises(ValueError, match="dot"):
        checked_name("v1.5", "png", in_shards=True)


@pytest.mark.parametrize("other", ["cat", "CAT", "cat.png", "\uff43\uff41\uff54"])
def test_a_name_is_used_once(tmp_path, other):
    found = problems([{"prompt": "x", "name": "cat"}, {"prompt": "x"}, {"prompt": "x", "name": other}], tmp_path)
    assert found == [(3, f"its name {other.removesuffix('.png')!r} is that of row 1.")]


# -- groups and settings ----------------------------------------------------------------------------------------------


def test_rows_of_equal_calls_are_grouped(tmp_path):
    rows = [
        {"prompt": "a", "width": 64, "height": 64},
        {"prompt": "b", "width": 64, "height": 48},
        {"prompt": "c", "width": 64, "height": 64, "steps": 10},
        {"prompt": "d", "width": 64, "height": 64, "negative_prompt": "bad"},
        {"prompt": "e", "width": 64, "height": 64, "prompt_2": "other"},
        {"prompt": "f", "width": 64, "height": 64, "prompt_2": "another"},
        {"prompt": "g", "width": 64, "height": 64, "clip_skip": 1},
        {"prompt": "h", "width": 64, "height": 64},
        {"prompt": "i", "width": 64, "height": 64},
    ]
    found = plan(rows, tmp_path, batch_size=2)
    assert [group.rows for group in found.groups] == [(0, 7, 8), (1,), (2,), (3,), (4, 5), (6,)]
    assert [batch.rows for batch in found.batches] == [(0, 7), (8,), (1,), (2,), (3,), (4, 5), (6,)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"steps": -1}, "steps"),
        ({"batchsize": 3}, "batchsize"),
        ({"format": "gif"}, "format"),
        ({"recipe": "magic"}, "magic"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"lease": float("inf")}, "lease"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(BatchError, match=words):
        BatchSettings(**settings)


def test_problems_read_well():
    assert str(RowProblem(3, "it has no prompt.")) == "row 3: it has no prompt."
    assert str(RowProblem(0, "The list has no rows.")) == "The list has no rows."
    error = BatchError.of([RowProblem(3, "b."), RowProblem(1, "a.")])
    assert str(error).splitlines() == ["2 problems in the list, nothing was generated:", "row 1: a.", "row 3: b."]


def test_planning_loads_no_pipelines(tmp_path):
    """A list is refused at once, not after the seconds that loading takes."""
    code = (
        "import sys; from diffaccel.batch import plan_batch, BatchSettings;"
        "plan_batch([{'prompt': 'x'}], sys.argv[1], BatchSettings());"
        "sys.exit(f\"imported {heavy}\" if (heavy := {'diffusers', 'transformers', 'pyarrow', 'ray'} & set(sys.modules)) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr

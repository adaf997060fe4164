"""benchmarks/erasure.py: prompts are balanced and honest, figures add up, work is resumed, verdicts follow the targets."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import erasure, erasure_measure, erasure_table
from benchmarks.erasure_tasks import Task, concepts, erased_cases, keep_list, named, pool, shown, tasks, world_prompts
from diffaccel.erasure.proof.probes import MEANINGS, attributes
from diffaccel.errors import Unsupported
from diffaccel.miniatures.scenes import COLOUR_WORDS, SHAPE_WORDS, SHAPES, TEXTURE_WORDS


def test_tasks_by_group_and_name() -> None:
    assert [task.name for task in tasks(["shapes", "circle", "red+star"])] == [*SHAPES, "red+star"]
    assert [task.group for task in tasks(["circle", "red", "dotted", "joint"])] == [
        "shapes",
        "colours",
        "textures",
        "2 at once",
        "4 at once",
    ]
    with pytest.raises(ValueError, match="'dog'"):
        tasks(["circle+dog"])


def test_the_pool_is_balanced_and_says_what_it_shows() -> None:
    cases = pool(128)
    for field, each in (("shape", 16), ("colour", 16), ("texture", 32)):
        counts = Counter(getattr(case.scene.objects[0], field) for case in cases)
        assert set(counts.values()) == {each}
    assert len({(c.scene.objects[0].shape, c.scene.objects[0].colour) for c in cases}) == 64
    assert sum(len(case.scene.objects) == 2 for case in cases) == 64
    words = {name: set(ws) for table in (SHAPE_WORDS, COLOUR_WORDS, TEXTURE_WORDS) for name, ws in table.items()}
    for case in cases:
        assert all(words[name] & set(case.prompt.split()) for _, name in named(case))
    assert [case.prompt for case in pool(128)] == [case.prompt for case in cases]


@pytest.mark.parametrize("keep", ["words", "captions", "both", "half", "none"])
def test_keep_lists_never_name_what_is_erased(keep: Any) -> None:
    task = Task("circle+red")
    found = keep_list(task, keep)
    for text in found:
        assert not {"circle", "disc", "red", "crimson"} & set(text.split())
    count = {"words": True, "both": True, "half": True, "captions": False, "none": False}[keep]
    assert ("triangle" in found) == count
    assert len(found) == len(set(found)) >= {"none": 0, "captions": 200, "both": 230}.get(keep, 25)
    unlisted = {"square", "box", "green", "emerald"} - set(found)
    assert bool(unlisted) == (keep in ("half", "captions", "none"))


def test_erased_prompts_are_shared_among_the_words() -> None:
    found = erased_cases("circle", 9, 0)
    assert {word: len(cases) for word, cases in found.items()} == {"circle": 5, "disc": 4}
    assert all(word in case.prompt.split() for word, cases in found.items() for case in cases)
    assert list(erased_cases("star", 3, 0)) == ["star"]


def test_concepts_know_the_synonyms_if_asked() -> None:
    told, untold = (concepts(Task("circle+star"), listed, "shape") for listed in (True, False))
    assert [(c.target, c.synonyms, c.anchor) for c in told] == [
        ("circle", (("disc", 1.0),), "shape"),
        ("star", (), "shape"),
    ]
    assert [c.synonyms for c in untold] == [(), ()]


def test_anchors_are_siblings_that_stay() -> None:
    found = concepts(Task("circle+star+square"), False, "sibling")
    assert len({c.anchor for c in found} & {"circle", "star", "square"}) == 0
    assert all(attributes(c.anchor)[0][0] == "shape" for c in found)
    assert concepts(Task("red"), False, "sibling")[0].anchor == "green"
    assert concepts(Task("red"), False, "")[0].anchor == ""


def test_prompts_are_the_same_for_every_task() -> None:
    assert world_prompts() == world_prompts()
    assert sum("circle" in prompt for prompt in world_prompts()) > 20


# -- a whole run with a stand-in that silences the text ------------------------------------------------------------------


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`erase` and `apply_edit` that stop the UNet from reading; gives a log."""
    log: list[str] = []
    kept: list[Any] = []

    def erase(pipe: Any, wanted: Any, *, keep: Any, method: str, **parameters: Any) -> Any:
        log.append(f"{method} {'+'.join(c.target for c in wanted)} {parameters}")
        return SimpleNamespace(digest="d", parameters=parameters, diagnostics={"g": torch.ones(1)})

    def apply_edit(pipe: Any, edit: Any) -> None:
        for name, layer in pipe.unet.named_modules():
            if name.endswith("attn2.to_v"):
                kept.append((layer, layer.weight.data))
                layer.weight.data = torch.zeros_like(layer.weight)

    def remove_edit(pipe: Any, edit: Any) -> None:
        while kept:
            layer, weight = kept.pop()
            layer.weight.data = weight

    module = ModuleType("diffaccel.edits.apply")
    module.apply_edit, module.remove_edit = apply_edit, remove_edit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffaccel.edits.apply", module)
    monkeypatch.setattr("diffaccel.erasure.solve.erase", erase)
    return log


ARGUMENTS = "--methods uce speed --concepts circle --pictures 16 --erased-pictures 4 --steps 4 --attack-pictures 2 --attacks closed_form"


def run(out: Path, *more: str) -> dict[str, Any]:
    erasure.main([*ARGUMENTS.split(), "--out", str(out), *more])
    found: dict[str, Any] = json.loads((out / "erasure.json").read_text())
    return found


def test_a_run_is_written_resumed_and_merged(
    silence: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--set", "speed.tau=0.1")
    assert silence == ["uce circle {}", "speed circle {'tau': 0.1}"]
    first, second = found["rows"]
    assert (first["method"], second["parameters"], second["diagnostics"]) == ("uce", {"tau": 0.1}, {"g": [1.0]})
    assert first["erased_before"]["mean"] >= 0.75
    assert first["erased"]["mean"] < first["erased_before"]["mean"]  # nothing is read any more
    assert first["worst"]["change"]["mean"] < -0.3
    assert first["correct"]["mean"] < first["correct_before"]["mean"]
    assert first["null_drift"] > 0.01
    assert first["frechet"] is None  # too few pictures for the judge's features
    assert set(first["attacks"]) == {"closed_form"}
    assert second["attacks"]["closed_form"]["original"]["mean"] == 1
    page = (tmp_path / "erasure.md").read_text()
    assert "| circle | speed (tau 0.1) |" in page
    assert "- uce: **missed**" in page
    assert capsys.readouterr().out.count("circle, ") == 2
    run(tmp_path, "--set", "speed.tau=0.1")
    assert len(silence) == 2  # all was there
    run(tmp_path, "--set", "speed.tau=0.2", "--label", "wide", "--share", "0/2")
    assert len(silence) == 2  # one edit is missing, which is the other process's
    run(tmp_path, "--set", "speed.tau=0.2", "--label", "wide", "--share", "1/2")
    assert silence[2:] == ["speed circle {'tau': 0.2}"]
    again = run(tmp_path / "other", "--render", "--merge", str(tmp_path / "erasure.json"))
    assert [row["label"] for row in again["rows"]] == ["", "", "wide"]
    assert len(silence) == 3


def test_a_method_may_refuse_a_task(silence: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bench: Any, options: Any, method: str, task: Task) -> Any:
        raise Unsupported(f"{method} cannot.")

    monkeypatch.setattr(erasure, "prepare", lambda options: None)
    monkeypatch.setattr(erasure, "one", refuse)
    erasure.main([*ARGUMENTS.split(), "--out", str(tmp_path)])
    page = (tmp_path / "erasure.md").read_text()
    assert "- shapes-sd, circle, uce: uce cannot." in page
    assert "- shapes-sd, circle, speed: speed cannot." in page


def test_the_model_is_unedited_after_a_failure(silence: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = erasure.parse([*ARGUMENTS.split(), "--pictures", "8", "--steps", "1"])
    bench = erasure.prepare(options)
    weights = [value.clone() for value in bench.pipe.unet.state_dict().values()]
    monkeypatch.setattr(erasure_measure, "predict", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        erasure.one(bench, options, "uce", Task("circle"))
    assert all(torch.equal(a, b) for a, b in zip(weights, bench.pipe.unet.state_dict().values(), strict=True))


# -- the page ----------------------------------------------------------------------------------------------------------


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}


def row(
    method: str, task: str, erased: float, kept: float, worst: float, attack: float | None = None
) -> dict[str, Any]:
    attacks = (
        {}
        if attack is None
        else {
            "closed_form": {
                "original": interval(1),
                "before": interval(erased),
                "after": interval(attack),
                "length": 2.0,
                "losses": [],
            }
        }
    )
    return {
        "key": ["shapes-sd", method, task, "words", "listed", "sibling", {}],
        "subject": "shapes-sd",
        "label": "",
        "task": task,
        "group": Task(task).group,
        "conditions": {"steps": 25},
        "seconds": 0.5,
        "erased": interval(erased),
        "erased_before": interval(0.98),
        "erased_word": interval(erased),
        "erased_synonyms": None,
        "floor": interval(0.01),
        "unasked": interval(0.3),
        "valid_erased": interval(0.9),
        "beside": None,
        "kept_change": kept,
        "kept_unlisted_change": None,
        "worst": {"concept": "ring", "change": interval(worst)},
        "correct_change": interval(kept),
        "frechet": 3.0,
        "null_drift": 0.01,
        "attacks": attacks,
    }


@pytest.mark.parametrize(
    ("erased", "kept", "worst", "flags"),
    [
        (0.05, -0.02, -0.08, "yes/yes/yes"),
        (0.06, -0.02, -0.08, "no/yes/yes"),
        (0.05, -0.021, -0.08, "yes/no/yes"),
        (0.05, -0.02, -0.09, "yes/yes/no"),
    ],
)
def test_targets(erased: float, kept: float, worst: float, flags: str) -> None:
    rows = [row("speed", "circle", erased, kept, worst)]
    assert f"| {flags} |" in erasure_table.page(rows, FACTS)
    word = "met" if flags == "yes/yes/yes" else "missed"
    assert erasure_table.verdicts(rows)[0].startswith(
        f"- speed: **{word}**, all three targets in {int(word == 'met')} of 1"
    )


FACTS = {
    "date": "today",
    "cpu": "x",
    "cores": 2,
    "threads": 1,
    "load_before": 0,
    "python": "3",
    "torch": "2",
    "diffusers": "0",
    "diffaccel": "0",
}


def test_claims_in_sign() -> None:
    rows = [
        row("uce", "circle+star", 0, -0.10, -0.2, 0.9),
        row("speed", "circle+star", 0, -0.01, -0.2, 0.5),
        row("uce", "circle", 0, -0.01, 0, 0.8),
        row("speed", "circle", 0, -0.09, 0),
        row("rece", "circle", 0, 0, 0, 0.2),
    ]
    claims = erasure_table.verdicts(rows)[-2:]
    assert claims[0].endswith("**yes**, speed -1.0, uce -10.0; 1 of 1 tasks.")  # only where several are erased
    assert claims[1].endswith("**yes**, uce +80.0, rece +20.0; 1 of 1 tasks.")
    assert "**no**" in erasure_table.verdicts([row("uce", "a+b", 0, 0.1, 0), row("speed", "a+b", 0, 0, 0)])[-1]


def test_summary_by_kind_of_task() -> None:
    rows = [
        row("uce", "circle", 0.02, -0.01, -0.04),
        row("uce", "star", 0.04, -0.03, -0.02),
        row("uce", "red", 0, 0, 0),
    ]
    page = erasure_table.page(rows, FACTS)
    assert "| shapes | uce | 2 | 3.0 | 4.0 | 1.0 | 30 | -2.0 | -4.0 | -2.0 | 3 | 1.00 | 0.50 |" in page
    assert "### Attacks" not in page


def test_every_word_of_the_world_has_one_meaning() -> None:
    for word, meaning in MEANINGS.items():
        assert attributes(word) == (meaning,)
    assert shown(pool(1)[0].scene, [attributes("circle")])

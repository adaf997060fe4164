"""The benchmarks behind the claims about erasure: frontier, attack curves, cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import erasure_attacks, erasure_budget, erasure_frontier
from benchmarks.erasure_measure import Bench
from benchmarks.erasure_tasks import Task, shown
from diffaccel.edits.concepts import ErasureError
from diffaccel.erasure.proof.attacks import Budget
from diffaccel.erasure.proof.probes import attributes
from diffaccel.erasure.proof.recording import Drawing
from diffaccel.erasure.settings import CONTEXTS, settings_of
from diffaccel.miniatures import load_judge, load_miniature


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean, "high": mean}


def test_kept_prompts_are_drawn_as_in_the_whole_pool() -> None:
    pipe: Any = load_miniature("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(pipe, load_judge(), Drawing(1, 2.0, 7, 4), Budget(), 10, 1, 0)
    rows = bench.kept(Task("circle+red"))
    assert 0 < len(rows) < 10
    assert not any(shown(bench.pool[i].scene, [attributes("circle"), attributes("red")]) for i in rows)
    again = bench.look_at([bench.pool[i].prompt for i in rows], rows)
    assert torch.allclose(again.pictures, bench.pool_before.pictures[rows], atol=1e-5)


@pytest.mark.parametrize("sweep", erasure_frontier.SWEEPS, ids=lambda sweep: sweep[0])
def test_every_form_of_the_frontier_has_valid_settings(sweep: Any) -> None:
    _, method, fixed, name, values = sweep
    for value in values:
        assert getattr(settings_of(method, {**fixed, name: value}), name) == value


def test_the_frontier_resumes_and_notes_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[tuple[str, float]] = []

    def point(bench: Any, task: Task, sweep: Any, value: float, prompts: int) -> dict[str, Any]:
        drawn.append((sweep[0], value))
        if sweep[0].startswith("SPEED as"):
            raise ErasureError("nothing is left.")
        return {
            "erased": interval(0.25),
            "kept_change": -0.031,
            "kept_all": interval(-0.04),
            "correct_change": interval(-0.1),
            "worst": {"concept": "ring", "change": interval(-0.2)},
            "pixels": 0.05,
            "null_drift": None,
            "diagnostics": {"null_directions": 83},
        }

    monkeypatch.setattr(erasure_frontier, "_bench", lambda options: object())
    monkeypatch.setattr(erasure_frontier, "point", point)
    arguments = ["--out", str(tmp_path), "--families", "UCE, phrases", "SPEED as"]
    erasure_frontier.main(arguments)
    assert [value for family, value in drawn if family == "UCE, phrases"] == [1.0, 0.2, 8.0, 0.05]
    assert "SPEED as published, phrases, 1 refused: nothing is left." in capsys.readouterr().out
    drawn.clear()
    erasure_frontier.main(arguments)
    assert drawn == [("SPEED as published, phrases", 1.0)]  # the others are in the file
    page = (tmp_path / "erasure-frontier.md").read_text()
    assert "| UCE, phrases | erase_weight 8 | 25.0 [25, 25] | -3.1 | -4.0 [-4, -4] |" in page


def test_the_attack_table_has_a_mean_only_of_complete_curves() -> None:
    def row(form: str, radius: float, after: float) -> dict[str, Any]:
        return {"concept": "circle", "form": form, "attack": "gradient", "radius": radius, "after": interval(after)}

    rows = [row("uce", 0, 0.5), row("uce", 0.1, 0.6), row("uce", 0.2, 1.0), row("context", 0.1, 0.25)]
    columns = erasure_attacks._columns(rows)
    assert columns["edit"] == ["uce", "context"]
    assert columns["radius 0.1"] == ["60.0 [60, 60]", "25.0 [25, 25]"]
    assert columns["radius 0.2"] == ["100.0 [100, 100]", ""]
    assert columns["mean"] == ["80.0", ""]  # without the radius 0, which is no attack


def test_the_costed_edit_has_the_size_it_says() -> None:
    targets, kept = erasure_budget.texts()
    assert (len(targets), len(set(targets)), len(kept), len(set(kept))) == (100, 100, 1000, 1000)
    assert not {word for text in targets for word in text.split()} & {word for text in kept for word in text.split()}
    tokenizer = erasure_budget.tokenizer()
    for text in (*targets[:5], *kept[:5], *(t.replace("{}", targets[0]) for t in CONTEXTS)):
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2, text  # one token a word, start and end


def test_the_cost_page_says_what_is_over_budget() -> None:
    def row(method: str, cpu: float, memory: float) -> dict[str, Any]:
        sizes = {"targets": 1, "kept": 2, "rank": 1}
        return {"method": method, "threads": 1, "cpu": cpu, "wall": cpu, "memory": memory, **sizes}

    rows = [row("uce", 59.9, 0.5), row("rece", 61.0, 0.5), row("mace", 10.0, 3.5)]
    facts = dict.fromkeys(("date", "cpu", "python", "torch", "diffusers", "diffaccel"), "x")
    page = erasure_budget.page(rows, {**facts, "cores": 2, "threads": 1, "load_before": 0})
    lines = [line for line in page.splitlines() if line.startswith(("| uce", "| rece", "| mace"))]
    assert [line.split("|")[-2].strip() for line in lines] == ["yes", "no", "no"]

"""Benchmarks: timing arithmetic with a fake clock, selection logic, verdicts, and whole runs on tiny networks."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import fidelity, fidelity_table, models, peers, search, unet, unet_table
from benchmarks.recipes import chosen_presets, methods_alone
from benchmarks.subjects import SUBJECTS
from diffaccel import GuidanceInterval, Recipe, SkipCache, StepSchedule
from diffaccel.measure.quality import Interval
from diffaccel.measure.rows import Row
from diffaccel.measure.runner import PLAIN, Runner, Settings
from diffaccel.measure.timing import (
    PeakMemory,
    Spread,
    closest_steps,
    describe_machine,
    machine,
    ratio,
    rotated,
    spread,
    timed,
)
from tests.tiny import WIDTH, tiny_sd, tiny_sdxl


def test_spread_and_ratio() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    # repetition by repetition: 4/2, 9/3, 8/8
    assert ratio([2.0, 3.0, 8.0], [4.0, 9.0, 8.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        ratio([1.0], [1.0, 2.0])


def test_timed_uses_the_clock_around_the_call() -> None:
    clock = iter([10.0, 12.5])
    assert timed(lambda: "result", clock=lambda: next(clock)) == ("result", 2.5)


def test_peak_memory_sees_what_is_gone_again() -> None:
    def needs(megabytes: int) -> int:
        with PeakMemory() as memory:
            torch.ones(megabytes * 2**18).sum()  # float32, freed inside the block
        assert memory.bytes is not None
        return memory.bytes

    needs(1)
    assert needs(8) < 32 * 2**20  # earlier peaks do not count
    assert 250 * 2**20 < needs(256) < 300 * 2**20  # pages that were free before count only when they are touched
    assert needs(8) < 32 * 2**20


def test_rotated_starts_elsewhere_each_time() -> None:
    assert [rotated("abc", by) for by in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert rotated([], 3) == []


@pytest.mark.parametrize("seed", range(20))
def test_closest_steps_equals_trying_every_count(seed: int) -> None:
    rng = random.Random(seed)
    most = rng.randint(1, 60)
    start, per_step = rng.uniform(0, 5), rng.uniform(0.1, 2)
    measured: list[int] = []

    def cost(steps: int) -> float:
        measured.append(steps)
        return start + per_step * steps

    target = rng.uniform(0, cost(most) * 1.2)
    measured.clear()
    best = closest_steps(cost, target, most)
    tried = list(measured)
    assert abs(cost(best) - target) == min(abs(cost(k) - target) for k in range(1, most + 1))
    assert len(tried) == len(set(tried))


def test_machine_names_what_matters_and_nothing_private() -> None:
    facts = machine()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    text = describe_machine(facts)
    assert facts["cpu"] in text
    assert str(Path.home()) not in text
    assert socket.gethostname() not in text.split()


@pytest.mark.parametrize(("name", "size"), [("sd15", 860), ("sdxl", 2567)])
def test_real_size_configurations(name: str, size: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**{"sd15": models.SD15_UNET, "sdxl": models.SDXL_UNET}[name])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == size


def test_random_weights_keep_activations_finite_and_repeat() -> None:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(20)))

    first, second = (models._random(make, "cpu", torch.float32) for _ in range(2))
    output = first(torch.ones(1, 256))
    assert torch.equal(output, second(torch.ones(1, 256)))
    assert 0.2 < float(output.std()) < 5
    assert models._random(make, "cpu", torch.bfloat16)[0].weight.dtype == torch.bfloat16


def tiny_arguments(name: str, device: str, dtype: torch.dtype, *, size: int, batch: int) -> dict[str, Any]:
    """The real argument builder, cut to the tiny networks' width."""
    found = models.call_arguments(name, device, dtype, size=size, batch=batch)
    return {key: value[..., :WIDTH] if "embeds" in key else value for key, value in found.items()}


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "build_pipeline", lambda name, *args: {"sd15": tiny_sd, "sdxl": tiny_sdxl}[name]())
    monkeypatch.setattr(unet, "call_arguments", tiny_arguments)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.usefixtures("tiny_models")
def test_unet_benchmark_end_to_end(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda: dict.fromkeys(peers.PACKAGES))
    options = [
        "--models",
        model,
        "--size",
        "64",
        "--steps",
        "4",
        "--repeats",
        "2",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    unet.main([*options, "--out", str(tmp_path)])
    result = json.loads((tmp_path / f"unet-{model}-cpu.json").read_text())
    rows = {row["name"]: row for row in result["variants"]}
    assert result["not installed"] == ["DeepCache(3)", "tomesd(0.5)"]
    assert rows["stock"]["faster"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows["empty recipe"]["fewer_flops"] == 1.0
    assert rows["guidance half"]["fewer_flops"] == pytest.approx(4 / 3)
    assert rows["SkipCache(3)"]["fewer_flops"] > 1.2
    assert (rows["half the steps"]["steps"], rows["half the steps"]["asked"]) == (1, 2)
    assert [t["promise"] for t in result["targets"]] == ["the empty recipe costs at most 1 %"]
    page = (tmp_path / f"unet-{model}-cpu.md").read_text()
    assert all(f"| {name} |" in page for name in rows)
    assert "not installed, so not measured: DeepCache(3), tomesd(0.5)" in page


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_peers_act_and_leave_a_stock_pipeline(name: str) -> None:
    pytest.importorskip(name)
    pipe = tiny_sd()
    arguments = tiny_arguments("sd15", "cpu", torch.float32, size=64, batch=1) | {"num_inference_steps": 4}

    def picture() -> torch.Tensor:
        return pipe(**arguments | {"generator": [torch.Generator().manual_seed(0)]}).images

    before, stock = [set(vars(m)) for m in pipe.unet.modules()], picture()
    opened = peers.tomesd(pipe, 0.5) if name == "tomesd" else peers.deepcache(pipe, 2)
    with opened:
        changed = picture()
    assert not torch.equal(changed, stock)
    assert torch.equal(picture(), stock)
    assert [set(vars(m)) for m in pipe.unet.modules()] == before


def test_targets_compare_within_a_repetition() -> None:
    def timing(name: str, *seconds: float) -> unet.Timing:
        return unet.Timing(unet.Variant(name, 1, lambda pipe: None), list(seconds))  # type: ignore[arg-type, return-value]

    stock, empty = timing("stock", 1.0, 2.0), timing("empty recipe", 1.005, 2.01)
    ours, rival = timing("SkipCache(3)", 1.1, 2.2), timing("DeepCache(3)", 1.0, 2.0)
    first, second = unet.targets([stock, empty, ours, rival])
    assert first["verdict"] == "met"
    assert first["faster"]["median"] == pytest.approx(1 / 1.005)
    assert second["verdict"] == "missed"
    assert second["faster"]["median"] == pytest.approx(1 / 1.1)
    assert "**missed**, 0.909x" in unet_table._verdict(second)
    (undecided,) = unet.targets([timing("SkipCache(3)", 1.02, 1.01, 0.99), timing("DeepCache(3)", 1.0, 1.0, 1.0)])
    assert undecided["verdict"] == "no difference beyond the noise"


def test_fewer_steps_are_divided_by_the_steps_asked_for() -> None:
    variant = unet.Variant("a third", 1, unet.nullcontext, asked=3)
    seconds, flops = unet.run_once(lambda num_inference_steps: None, variant, {}, "cpu")
    assert seconds < 0.1
    assert flops is None
    assert variant.per == 3
    assert unet.Variant("plain", 4, unet.nullcontext).per == 4


def row(
    name: str, kind: Any, gflops: float, psnr: float | None = None, accuracy: float | None = None, steps: int = 50
) -> Row:
    interval = None if accuracy is None else Interval(accuracy, accuracy - 0.02, accuracy + 0.02)
    return Row(name, kind, steps, PLAIN.to_dict(), steps, 2 * steps, gflops * 1e9, psnr=psnr, accuracy=interval)


def rows_with(*recipes: Row) -> list[Row]:
    return [
        row("plain", "plain", 100, None, 0.9),
        row("10 steps", "fewer steps", 20, 20, 0.7, 10),
        row("20 steps", "fewer steps", 40, 30, 0.8, 20),
        *recipes,
    ]


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (row("a", "recipe", 30, 26, 0.75), "wins"),
        (row("b", "recipe", 30, 24, 0.75), "loses"),
        (row("c", "recipe", 30, 25.1, 0.75), "on the line"),
        (row("d", "recipe", 30, 26, 0.6), "wins; accuracy loses"),
        (row("e", "recipe", 30, 24, 0.85), "loses; accuracy wins"),
        (row("f", "recipe", 70, 40, 0.9), "outside the line"),
        (row("g", "recipe", 70, 29, 0.9), "loses: fewer steps are cheaper and closer"),
    ],
)
def test_verdict_against_the_line(recipe: Row, word: str) -> None:
    assert fidelity_table.verdict(rows_with(recipe), recipe) == word


def test_distance_to_the_line_at_equal_flops_and_evaluations() -> None:
    (entry,) = fidelity_table.against_line(rows_with(row("a", "recipe", 30, 26, 0.78, 20)))
    assert entry["psnr_flops"] == pytest.approx(1)
    assert entry["psnr_evaluations"] == pytest.approx(-4)
    assert entry["accuracy_flops"] == pytest.approx(3)
    assert entry["accuracy_evaluations"] == pytest.approx(-2)


def test_distance_to_the_line_has_an_interval_over_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(12, 3, 8, 8, generator=generator) * 0.5 + 0.25

    def shown(name: str, kind: Any, gflops: float, error: float) -> Row:
        found = row(name, kind, gflops, -20 * math.log10(error)) if error else row(name, kind, gflops)
        return dataclasses.replace(found, images=plain + error)

    line = [shown("10 steps", "fewer steps", 20, 0.1), shown("20 steps", "fewer steps", 40, 0.01)]
    rows = [shown("plain", "plain", 100, 0), *line, shown("a", "recipe", 30, 0.01)]
    (entry,) = fidelity_table.against_line(rows)
    assert entry["psnr_flops"] == pytest.approx(10)
    assert entry["psnr_flops_interval"]["mean"] == pytest.approx(10, abs=0.01)
    assert entry["psnr_flops_interval"]["low"] <= 10.01
    assert "+10.0 [+10.0, +10.0]" in fidelity_table._line_table([entry])


def test_the_promise_about_fast() -> None:
    assert "**met**, 4.00x fewer FLOPs, 98.9 %" in fidelity_table.target(rows_with(row("fast", "recipe", 25, 20, 0.89)))
    assert "**missed**" in fidelity_table.target(rows_with(row("fast", "recipe", 35, 20, 0.9)))
    assert "**missed**" in fidelity_table.target(rows_with(row("fast", "recipe", 25, 20, 0.88)))
    assert "**missed**" in fidelity_table.target(rows_with(row("fast", "recipe", 25, 20, 0.9, steps=20)))
    assert fidelity_table.target(rows_with()) == "`fast` was not measured."


def test_search_keeps_the_best_of_each_band() -> None:
    cheap = [row(f"cheap {i}", "recipe", 30, 25 + i) for i in range(3)]
    careful = [row("careful", "recipe", 38, 29.5), row("unmeasured", "recipe", 90, 50)]
    found = search.best_by_band(rows_with(*cheap, *careful), 1)
    assert [r.name for r in found] == ["unmeasured", "careful", "cheap 2"]
    assert search.margin(rows_with(), cheap[2]) == pytest.approx(2)
    assert search.margin(rows_with(), careful[1]) == -math.inf


def test_search_joins_methods_and_forgets_singles() -> None:
    guidance, cache, steps = GuidanceInterval(low=1.0), SkipCache(), StepSchedule(fraction=0.5)
    found = search.combinations([[(), (guidance,)], [(), (cache,)], [(), (steps,)]])
    assert sorted(map(len, found)) == [2, 2, 2, 3]


def test_the_grids_and_the_published_recipes_are_valid_and_distinct() -> None:
    grids = (search.guidance_grid(), search.skip_grid(), search.token_grid())
    names = [Recipe(methods=methods).describe() for grid in grids for methods in grid]
    assert len(names) == len(set(names)) > 20
    published = [recipe.name for recipe in [*methods_alone(), *chosen_presets()]]
    assert len(published) == len(set(published))
    assert not {"off", "fewer-steps"} & set(published)
    assert {"balanced", "fast"} <= set(published)


class ConstantJudge:
    def score(self, images: torch.Tensor, cases: list[Any]) -> Any:
        return SimpleNamespace(correct=torch.arange(len(images)) % 2 == 0)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2).mean(2)


@pytest.fixture
def tiny_runner(tiny_folder: Path) -> tuple[Runner, list[Any], Any]:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    cases = [SimpleNamespace(prompt=text) for text in ("a", "b", "c")]
    runner = Runner(pipe, [case.prompt for case in cases], Settings(steps=6, guidance=3.0, batch_size=2))
    return runner, cases, ConstantJudge()


def test_fidelity_end_to_end(
    tiny_runner: tuple[Runner, list[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Recipe(name="fast", methods=(GuidanceInterval(stop_fraction=0.5),))
    cache = Recipe(name="cache", methods=(SkipCache(min_evaluations=1),))
    monkeypatch.setattr(fidelity, "prepare", lambda options: tiny_runner)
    monkeypatch.setattr(fidelity, "chosen_presets", lambda: [fast])
    monkeypatch.setattr(fidelity, "methods_alone", lambda: [cache])
    subject = dataclasses.replace(SUBJECTS["shapes-sd"], line=(2, 4, 50), long_line=(5,))
    monkeypatch.setitem(SUBJECTS, "shapes-sd", subject)
    fidelity.main(["--out", str(tmp_path), "--method-prompts", "2"])
    data = json.loads((tmp_path / "fidelity.json").read_text())
    presets, methods = data["presets"]["variants"], data["methods"]["variants"]
    assert [v["name"] for v in presets] == ["plain", "2 steps", "4 steps", "fast"]
    assert [v["name"] for v in methods] == ["plain", "2 steps", "4 steps", "fast", "5 steps", "cache"]
    assert presets[3]["flops"] == pytest.approx(0.75 * presets[0]["flops"])
    assert methods[3]["flops"] == presets[3]["flops"]
    assert methods[5]["seconds"] is None  # no plain run beside it
    assert [entry["name"] for entry in data["methods"]["against_fewer_steps"]] == ["fast", "cache"]
    assert "bit-identical" in data["notes"][0]
    page = (tmp_path / "fidelity.md").read_text()
    assert "**missed**, 1.33x fewer FLOPs, 100.0 % of plain accuracy" in page
    assert "- fast: `guidance_interval(stop_fraction=0.5)`" in page
    assert "Methods alone, on the first 2 prompts" in page
    assert (tmp_path / "fidelity-presets.png").stat().st_size > 10_000
    assert (tmp_path / "fidelity-methods.png").stat().st_size > 10_000


def test_search_end_to_end(
    tiny_runner: tuple[Runner, list[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LINE", (1, 2, 4))
    monkeypatch.setattr(search, "FIRST", 1)
    monkeypatch.setattr(search, "SECOND", 2)
    monkeypatch.setattr(search, "guidance_grid", lambda: [(GuidanceInterval(stop_fraction=0.5),)])
    monkeypatch.setattr(search, "skip_grid", lambda: [(SkipCache(min_evaluations=1),), (SkipCache(depth=99),)])
    monkeypatch.setattr(search, "token_grid", list)
    monkeypatch.setattr(search, "step_grid", lambda: [(), (StepSchedule(fraction=0.5),)])
    rows = search.search(*tiny_runner, tmp_path)
    names = [r.name for r in rows if r.kind == "recipe"]
    assert any("skip_cache" in name and "guidance_interval" in name for name in names)
    assert not any("99" in name for name in names)  # it cannot work on this network and was left out
    assert json.loads((tmp_path / "search.json").read_text())["prompts"] == 3
    assert "accuracy" in json.loads((tmp_path / "search.json").read_text())["rows"][0]

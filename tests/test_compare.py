"""Comparisons on a tiny pipeline: what is run, what is counted, what is written, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from PIL import Image

from diffaccel import GuidanceInterval, Recipe, SkipCache
from diffaccel.errors import DiffaccelError, Unsupported
from diffaccel.files.output import OutputError
from diffaccel.measure.compare import Measurement, compare, demo, score
from diffaccel.measure.comparison import Comparison
from diffaccel.measure.contact_sheet import CELL, MARGIN, TEXT_WIDTH, draw_contact_sheet
from diffaccel.measure.frontier import accuracy_of, draw_frontier, line_at, psnr_of, save_frontier
from diffaccel.measure.quality import Interval
from diffaccel.measure.rows import Row, columns, markdown_table
from diffaccel.measure.runner import (
    PLAIN,
    CompareError,
    Contestant,
    Runner,
    Settings,
    fewer_steps,
    spacing_notes,
    verify_plain,
)
from diffaccel.measure.timing import Spread

PROMPTS = ["a cat", "a dog", "a fish"]
HALF = Recipe(name="half guided", methods=(GuidanceInterval(stop_fraction=0.5),))
CACHE = Recipe(name="cache", methods=(SkipCache(interval=3, min_evaluations=1),))


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)


class RowClock:
    """A clock that advances by one second per batch row that the UNet really evaluates."""

    def __init__(self, pipe: Any) -> None:
        self.now = 0.0
        self.hook = pipe.unet.conv_in.register_forward_hook(self.tick)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def tick(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.now += output.shape[0]

    def __call__(self) -> float:
        return self.now


class BrightnessJudge:
    """Calls a picture correct if its mean brightness is what the case says, within 0.05."""

    def score(self, images: torch.Tensor, cases: list[Any]) -> Any:
        wanted = torch.tensor([case.brightness for case in cases])
        return SimpleNamespace(correct=(images.mean((1, 2, 3)) - wanted).abs() < 0.05)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2).mean(2)


def cases(pictures: torch.Tensor) -> list[Any]:
    return [SimpleNamespace(prompt=f"picture {i}", brightness=float(p.mean())) for i, p in enumerate(pictures)]


def test_rows_are_counted_timed_and_matched_with_fewer_steps(pipe: Any) -> None:
    kinds = ("time", "evaluations", "flops")
    with RowClock(pipe) as clock:
        found = compare(pipe, PROMPTS, [HALF, CACHE], steps=8, batch_size=3, equal=kinds, clock=clock)
    rows = {row.name: row for row in found.rows}
    assert next(iter(rows)) == "plain"
    assert rows["plain"].rows == 16
    assert rows["half guided"].rows == 12
    assert rows["half guided"].evaluations == rows["cache"].evaluations == 8
    assert rows["plain"].seconds == Spread(16, 16, 16)  # one second per row, per image
    assert rows["half guided"].speedup == Spread(16 / 12, 16 / 12, 16 / 12)
    assert rows["plain"].speedup is None
    # 12 rows are 6 plain steps, in time and in FLOPs; equal evaluations and cache rows are plain itself and left out
    assert rows["6 steps"].matches[:1] == ("time of half guided",)
    assert "flops of half guided" in rows["6 steps"].matches
    assert rows["6 steps"].kind == "fewer steps"
    assert rows["plain"].flops / rows["half guided"].flops == pytest.approx(16 / 12)
    assert rows["cache"].flops < rows["half guided"].flops
    assert [row.psnr is None for row in found.rows] == [True] + [False] * (len(rows) - 1)
    assert all(0 < row.psnr < 100 and 0 < row.ssim <= 1 for row in found.rows[1:])
    assert found.notes == ("The plain variant was checked on one batch: bit-identical to the stock pipeline.",)


def test_pictures_are_the_stock_ones_and_depend_on_their_own_seed_only(pipe: Any) -> None:
    found = compare(pipe, PROMPTS, [], steps=3, seed=5, batch_size=2)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    stock = pipe(PROMPTS[:2], num_inference_steps=3, generator=generators, output_type="pt").images
    assert torch.equal(found.plain.images[:2], stock)
    single = compare(pipe, PROMPTS, [], steps=3, seed=5, batch_size=1)
    assert torch.allclose(found.plain.images, single.plain.images, atol=1e-3)


def test_a_short_last_batch_is_not_timed(pipe: Any) -> None:
    calls = Runner(pipe, PROMPTS, Settings(steps=2, batch_size=2)).batches()
    assert [list(batch) for batch in calls] == [[0, 1], [2]]
    with RowClock(pipe) as clock:
        found = compare(pipe, PROMPTS, [HALF], steps=4, batch_size=2, repeats=2, equal=(), clock=clock)
    assert found.row("half guided").seconds == Spread(6, 6, 6)
    assert len(found.plain.images) == 3


def test_pipeline_and_global_random_state_are_untouched(pipe: Any) -> None:
    pipe("a cat", num_inference_steps=1)  # pipelines keep the settings of their last call
    before, random_state = set(vars(pipe)), torch.get_rng_state()
    compare(pipe, PROMPTS[:1], [HALF], steps=2, equal=())
    assert set(vars(pipe)) == before
    assert "forward" not in vars(pipe.unet)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_identical_pictures_say_so(pipe: Any) -> None:
    off = Recipe(name="nothing", methods=(SkipCache(interval=1),))
    row = compare(pipe, PROMPTS[:1], [off], steps=2, equal=()).row("nothing")
    assert row.psnr == math.inf
    assert row.ssim == pytest.approx(1)
    assert columns([row])["PSNR dB"] == ["identical"]
    assert row.to_dict()["psnr"] == "inf"


def test_equal_step_counts_are_merged_and_plain_itself_is_no_match() -> None:
    cost = {"a": 6.0, "b": 6.4, "c": 10.0, "d": 2.2}

    def run(contestant: Contestant, batch: range) -> Any:
        return None, SimpleNamespace(flops=cost.get(contestant.name, float(contestant.steps))), 0.0

    runner = SimpleNamespace(settings=Settings(steps=10), batches=lambda: [range(1)], run=run)
    found = fewer_steps(runner, [Contestant(name, "recipe", PLAIN, 10) for name in cost], ("flops",))  # type: ignore[arg-type]
    assert [(c.name, c.steps, c.matches) for c in found] == [
        ("2 steps", 2, ("flops of d",)),
        ("6 steps", 6, ("flops of a", "flops of b")),
    ]


@pytest.mark.parametrize(
    ("spacing", "steps", "noted"), [("trailing", 22, True), ("trailing", 25, False), ("leading", 22, False)]
)
def test_step_counts_that_ddim_handicaps_are_noted(spacing: str, steps: int, noted: bool) -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    contestants = [Contestant("plain", "plain", PLAIN, 33), Contestant(f"{steps} steps", "fewer steps", PLAIN, steps)]
    notes = spacing_notes(DDIMScheduler(timestep_spacing=spacing), contestants)
    assert [note.startswith("22 steps: these counts do not divide 1000") for note in notes] == [True] * noted
    assert spacing_notes(EulerDiscreteScheduler(timestep_spacing=spacing), contestants) == []


def measurement(name: str, kind: Any, images: torch.Tensor) -> Measurement:
    report: Any = SimpleNamespace(evaluations=10, rows=20, flops=1000)
    return Measurement(Contestant(name, kind, PLAIN, 10), [images], [report], [1.0])


def test_corruption_lowers_every_score() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(40, 3, 16, 16, generator=generator) * 0.5 + torch.linspace(0, 0.5, 40).view(-1, 1, 1, 1)
    noise = torch.rand(40, 3, 16, 16, generator=generator) - 0.5
    light, heavy = (clean + 0.02 * noise).clamp(0, 1), (clean + 0.5 * noise.abs()).clamp(0, 1)
    measured = [
        measurement("plain", "plain", clean),
        *(measurement(n, "recipe", i) for n, i in (("light", light), ("heavy", heavy))),
    ]
    rows = {row.name: row for row in score(measured, cases(clean), BrightnessJudge())}
    assert rows["plain"].accuracy == Interval(1, 1, 1)
    assert rows["light"].accuracy.mean == 1.0
    assert rows["heavy"].accuracy.mean < 0.2
    assert rows["heavy"].accuracy_change.high < -0.6
    assert rows["heavy"].psnr < rows["light"].psnr - 10
    assert rows["heavy"].ssim < rows["light"].ssim
    assert rows["heavy"].frechet > rows["light"].frechet
    assert rows["plain"].frechet is None
    swapped = {row.name: row for row in score(measured, cases(clean), None, reference="heavy")}
    assert swapped["heavy"].psnr is None
    assert swapped["plain"].psnr == pytest.approx(rows["heavy"].psnr)
    assert swapped["plain"].accuracy is None


def test_frechet_is_left_out_with_too_few_pictures() -> None:
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    measured = [measurement("plain", "plain", pictures), measurement("other", "recipe", pictures)]
    assert score(measured, cases(pictures), BrightnessJudge())[1].frechet is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"recipes": [HALF, HALF]}, "two variants are called 'half guided'"),
        ({"recipes": [Recipe(name="plain")]}, "'plain' is taken"),
        ({"judge": BrightnessJudge()}, "needs prompt cases"),
        ({"batch_size": 0}, "must be 1 or more"),
        ({"steps": 0}, "must be 1 or more"),
        ({"reference": "fastest"}, "the reference 'fastest' is none of plain, half guided"),
    ],
)
def test_refusals(pipe: Any, arguments: dict[str, Any], sentence: str) -> None:
    given = {"prompts": PROMPTS[:1], "recipes": [HALF], "steps": 1, "equal": (), **arguments}
    with pytest.raises(CompareError, match=sentence):
        compare(pipe, given.pop("prompts"), given.pop("recipes"), **given)


def test_a_recipe_that_cannot_work_is_refused_before_anything_runs_long(pipe: Any) -> None:
    with pytest.raises(Unsupported, match="depth 99 does not exist"):
        compare(pipe, PROMPTS[:1], [[SkipCache(depth=99)]], steps=1)


def test_an_empty_recipe_that_changes_pictures_is_a_bug(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(pipe, PROMPTS[:1], Settings(steps=1))
    monkeypatch.setattr(runner, "run", lambda contestant, batch: (torch.zeros(1, 3, 64, 64), None, 0.0))
    with pytest.raises(CompareError, match="report this as a bug"):
        verify_plain(runner)


def test_a_pipeline_that_never_repeats_itself_is_noted() -> None:
    runner: Any = SimpleNamespace(settings=Settings(steps=1), batches=lambda: [range(1)], pipe=None)
    runner.call = lambda *args: torch.rand(1, 3, 4, 4)
    runner.run = lambda *args: (torch.rand(1, 3, 4, 4), None, 0.0)
    assert "does not repeat itself" in verify_plain(runner)


def row(
    name: str, kind: Any, flops: float, psnr: float | None = None, accuracy: float | None = None, **more: Any
) -> Row:
    interval = None if accuracy is None else Interval(accuracy, accuracy - 0.05, accuracy + 0.05)
    settings: dict[str, Any] = {"steps": 50, "evaluations": 50, "rows": 100, "recipe": PLAIN.to_dict(), **more}
    return Row(name, kind, flops=flops * 1e9, psnr=psnr, accuracy=interval, **settings)


def frontier_rows() -> list[Row]:
    return [
        row("plain", "plain", 100, accuracy=0.9),
        row("40 steps", "fewer steps", 40, 30.0, 0.8, steps=20),
        row("20 steps", "fewer steps", 20, 20.0, 0.6, steps=10),
        row("good", "recipe", 30, 28.0, 0.85),
    ]


def test_the_line_is_linear_between_measured_step_counts() -> None:
    rows = frontier_rows()
    assert line_at(rows, 30, psnr_of) == pytest.approx(25)
    assert line_at(rows, 20, psnr_of) == 20
    assert line_at(rows, 70, psnr_of) is None  # plain has no PSNR against itself
    assert line_at(rows, 70, accuracy_of) == pytest.approx(85)
    assert line_at(rows, 10, accuracy_of) is None


def test_the_frontier_shows_line_and_recipes(tmp_path: Path) -> None:
    figure = draw_frontier(frontier_rows(), "flops")
    psnr_axes, accuracy_axes = figure.axes
    assert psnr_axes.lines[0].get_xydata().tolist() == [[20, 20], [40, 30]]
    assert accuracy_axes.lines[0].get_xydata().tolist() == [[20, 60], [40, 80], [100, 90]]
    assert psnr_axes.lines[1].get_xydata().tolist() == [[30, 28]]
    assert {text.get_text() for text in psnr_axes.texts} == {"10", "20", "good"}
    Comparison(tuple(frontier_rows()), (), {}, {}).save_frontier(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000
    with pytest.raises(DiffaccelError, match="nothing to plot over seconds"):
        draw_frontier(frontier_rows(), "seconds")


def test_names_in_the_plot_are_text_and_times_have_their_range(tmp_path: Path) -> None:
    """matplotlib reads what stands between dollars as mathematics, and fails where it is none."""
    rows = (
        row("plain", "plain", 4, seconds=Spread(1, 1, 1)),
        row("$\\frac{$", "recipe", 2, 31.25, seconds=Spread(0.5, 0.4, 0.7)),
    )
    lines = [line.get_xydata().tolist() for line in draw_frontier(rows, "seconds").axes[0].lines]
    assert [[0.4, 31.25], [0.7, 31.25]] in lines
    save_frontier(rows, tmp_path / "plot.png", over="seconds")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def comparison() -> Comparison:
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]).view(2, 3, 1, 1).expand(2, 3, 32, 32)
    spread, accuracy = Spread(0.5, 0.4, 0.7), Interval(0.75, 0.5, 1.0)
    rows = (
        row("plain", "plain", 4, accuracy=0.9, seconds=Spread(1, 1, 1), images=colours),
        row(
            "sooner",
            "recipe",
            2,
            31.25,
            0.8,
            seconds=spread,
            speedup=Spread(2, 1.5, 2.5),
            ssim=0.9,
            images=colours.flip(0),
        ),
        row(
            "25 steps",
            "fewer steps",
            2,
            math.inf,
            steps=25,
            ssim=1.0,
            accuracy_change=accuracy,
            images=colours,
            matches=("time of sooner",),
        ),
    )
    settings = {"model": "Tiny", "scheduler": "DDIM", "seed": 3}
    facts = {"date": "today", "cpu": "a chip", "cores": 2, "threads": 1, "load_before": 0.1, "python": "3"}
    return Comparison(
        rows,
        ("a red thing", "something blue"),
        settings,
        facts | dict.fromkeys(("torch", "diffusers", "diffaccel"), "1"),
    )


def test_table_columns() -> None:
    found = columns(comparison().rows)
    assert found["variant"] == ["plain", "sooner", "25 steps"]
    assert found["s/image (range)"] == ["1", "0.5 (0.4-0.7)", ""]
    assert found["faster (range)"] == ["", "2x (1.5-2.5)", ""]
    assert found["fewer FLOPs"] == ["1.00x", "2.00x", "2.00x"]
    assert found["correct [95 %]"] == ["90.0 % [85.0, 95.0]", "80.0 % [75.0, 85.0]", ""]
    assert found["change [95 %]"] == ["", "", "+75.0 [+50.0, +100.0]"]
    assert found["PSNR dB"] == ["", "31.2", "identical"]
    assert found["chosen to match"] == ["", "", "time of sooner"]
    assert "Frechet" not in found  # nobody measured it


def test_rich_and_markdown_tables_hold_the_same_cells() -> None:
    from rich.console import Console

    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison().table())
    console.file.close()
    text, lines = console.export_text(), markdown_table(comparison().rows).splitlines()
    assert lines[1].count("---") == lines[0].count("|") - 1
    for cell in lines[3].strip("| ").split(" | "):
        assert cell.strip() in text
    assert "a chip (2 cores, 1 threads)" in text


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    comparison().save_json(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [variant["name"] for variant in data["variants"]] == ["plain", "sooner", "25 steps"]
    assert data["variants"][1]["seconds"] == {"median": 0.5, "low": 0.4, "high": 0.7}
    assert data["variants"][2]["psnr"] == "inf"
    assert data["variants"][2]["matches"] == ["time of sooner"]
    assert data["prompts"] == ["a red thing", "something blue"]
    assert data["settings"]["prompts"] == 2
    assert "images" not in data["variants"][0]


def test_nothing_half_written(tmp_path: Path) -> None:
    for save in (comparison().save_json, comparison().save_picture, comparison().save_frontier):
        with pytest.raises(OutputError, match="Cannot write"):
            save(tmp_path / "missing" / "file")
    (tmp_path / "old.json").write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        comparison().save_json(tmp_path / "old.json", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_contact_sheet_holds_every_picture_and_readable_labels(tmp_path: Path) -> None:
    comparison().save_picture(tmp_path / "sheet.png", limit=2)
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.size == draw_contact_sheet(comparison(), 2).size
    colours = [[(255, 0, 0), (0, 0, 255)], [(0, 0, 255), (255, 0, 0)], [(255, 0, 0), (0, 0, 255)]]
    for column, wanted in enumerate(colours):
        x = MARGIN + TEXT_WIDTH + column * (CELL + 10) + CELL // 2
        bottom = sheet.height - MARGIN - 26 - 10
        for number, colour in enumerate(reversed(wanted)):
            assert sheet.getpixel((x, bottom - number * (CELL + 10) - CELL // 2)) == colour
    header = sheet.crop((MARGIN + TEXT_WIDTH, MARGIN, sheet.width - MARGIN, MARGIN + 60))
    assert header.convert("L").getextrema()[0] < 60  # dark ink on light paper
    assert len(draw_contact_sheet(comparison(), 1).tobytes()) < len(sheet.tobytes())


def test_demo_writes_picture_and_report(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffaccel.miniatures
    from diffaccel.miniatures import scenes

    monkeypatch.setattr(diffaccel.miniatures, "load_miniature", lambda name: pipe)
    monkeypatch.setattr(diffaccel.miniatures, "load_judge", BrightnessJudge)
    monkeypatch.setattr(diffaccel.miniatures, "recommended_guidance", lambda name: 3.0)
    monkeypatch.setattr(scenes, "held_out_prompts", lambda kind, count, seed: cases(torch.zeros(count, 3, 2, 2)))
    seen: list[tuple[int, int, str]] = []
    found = demo(tmp_path / "out", recipes=(HALF,), prompts=2, steps=2, on_progress=lambda *args: seen.append(args))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.json", "comparison.png"]
    assert found.settings["guidance"] == 3.0
    assert found.plain.accuracy is not None
    assert [done for done, _, _ in seen] == list(range(len(found.rows)))
    with pytest.raises(OutputError, match="exists already; choose another output or pass --overwrite"):
        demo(tmp_path / "out", recipes=(HALF,), prompts=2, steps=2)
    demo(tmp_path / "out", recipes=(HALF,), prompts=2, steps=2, overwrite=True)


def test_demo_refuses_an_unusable_folder_before_loading_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write to the folder"):
        demo(tmp_path / "file")

"""The page without a browser: controls from schemas, sessions, the engine, what each tab computes."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import gradio as gr
import pytest
import torch
from pydantic import Field as PydanticField

import diffaccel
from diffaccel import GuidanceInterval, Recipe, SkipCache
from diffaccel.demo import actions, batching, comparing, erasing, exploring, fields, markup, recipes, timing
from diffaccel.demo.engine import PLAIN, Ask, Cancelled, Drawn, Engine, PageError, Watch
from diffaccel.demo.sessions import KEPT_RUNS, Session, Sessions
from diffaccel.engine.method import Method
from diffaccel.engine.run import Evaluation, Layer
from diffaccel.erasure.settings import METHODS
from diffaccel.errors import DiffaccelError, RecipeError
from diffaccel.files import metadata
from diffaccel.methods import registry
from diffaccel.recipes.presets import presets

TWO = Ask.of(prompt="a red square", steps=2, seed=3)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine([tiny_folder.parent], device="cpu")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Sessions(tmp_path / "sessions").of("somebody")


@pytest.fixture
def tiny(tiny_folder: Path) -> str:
    return str(tiny_folder)


def stock(folder: str, ask: Ask) -> Any:
    """What diffusers alone draws."""
    from diffaccel.loading import load_pipeline

    pipe = load_pipeline(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(ask.seed)
    return pipe(ask.prompt, num_inference_steps=ask.steps, generator=generator).images[0]


# --- controls ---


@pytest.mark.parametrize("name", fields.offered())
def test_controls_hold_every_default(name):
    """A method chosen without touching a control is the method with its defaults."""
    shown = {(field.method, field.name): field.show(field.default) for field in fields.offered()[name]}
    assert fields.build_recipe([name], shown).methods == (registry()[name](),)


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("kind", ["on_unets", "on_transformers"])
def test_presets_survive_the_controls(name, kind):
    recipe = getattr(presets()[name], kind)()
    assert fields.build_recipe(*fields.show_recipe(recipe)).methods == recipe.methods


@pytest.mark.parametrize(
    "method",
    [
        SkipCache(schedule=(0, 2, 5), window=(10.0, 0.5), depth=1, order=2),
        GuidanceInterval(high=5.42, low=0.28),
        diffaccel.RegionSampling(resets=(3, 7), end=9),
        diffaccel.TokenMerging(min_tokens=64, importance=True, ratio=0.3),
        diffaccel.BlockCache(kind="mag", ratios=(1.0, 0.9, 0.8)),
    ],
)
def test_unusual_settings_survive_the_controls(method):
    chosen, shown = fields.show_recipe(Recipe(methods=(method,)))
    # as the browser has them: texts, and numbers that may be floats
    shown = {key: float(value) if type(value) is int else value for key, value in shown.items()}
    assert fields.build_recipe(chosen, shown).methods == (method,)


def test_a_new_method_appears_without_edits(monkeypatch):
    class Blur(Method):
        """Blur what nobody looks at.

        Attributes:
            radius: in pixels.
            mode: how.
        """

        name: ClassVar[str] = "blur"
        layer: ClassVar[Layer] = Layer.TOKENS
        radius: float = PydanticField(default=1.5, ge=0, le=8)
        mode: Literal["box", "gauss"] = "box"

        @property
        def is_off(self) -> bool:
            return self.radius == 0

        def attach(self, model: Any, run: Any, seams: Any) -> None: ...

    import diffaccel.engine.method

    monkeypatch.setitem(diffaccel.engine.method.REGISTERED, "blur", Blur)
    radius, mode = fields.offered()["blur"]
    assert (radius.kind, radius.minimum, radius.maximum, radius.help) == ("slider", 0, 8, "in pixels.")
    assert (mode.kind, mode.choices) == ("choice", ("box", "gauss"))
    assert fields.summary_of(Blur) == "Blur what nobody looks at."
    assert fields.build_recipe(["blur"], {("blur", "radius"): 3}).methods == (Blur(radius=3),)


def test_methods_that_need_a_file_have_no_controls():
    assert "erase" not in fields.offered()
    with pytest.raises(RecipeError, match="Erase tab"):
        fields.show_recipe(Recipe(methods=(diffaccel.Erase(file="x.safetensors"),)))


@pytest.mark.parametrize(
    ("chosen", "shown", "sentence"),
    [
        (["skip_cache"], {("skip_cache", "interval"): 0}, "skip_cache.interval"),
        (["skip_cache"], {("skip_cache", "interval"): 2.5}, "skip_cache.interval"),
        (["skip_cache"], {("skip_cache", "window"): "wide"}, "no list of numbers"),
        (["skip_cache"], {("skip_cache", "schedule"): "sometimes"}, "none of uniform, early, late"),
        (["skip_cache", "forecast"], {}, "use one of them"),
        (["nonsense"], {}, "unknown method"),
    ],
)
def test_wrong_controls_are_sentences(chosen, shown, sentence):
    with pytest.raises(RecipeError, match=sentence):
        fields.build_recipe(chosen, shown)


# --- recipes from outside ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "larger than 64 KB"),
        ("[" * 30_000, "nested too deeply|no valid JSON"),
        ('{"schema": 1, "methods": [{"method": "erase", "file": "/etc/passwd"}]}', "no switches"),
        ('{"schema": 1, "methods": [{"method": "skip_cache", "interval": -1}]}', "skip_cache.interval"),
        ("3", "must be a JSON object"),
        ('{"schema": 1, "methods": [], "methods": []}', "no valid JSON: the key 'methods' is given twice"),
        ("9" * 5000, "no valid JSON: Exceeds the limit"),
    ],
)
def test_hostile_recipes_are_refused(engine, tiny, text, sentence):
    with pytest.raises(DiffaccelError, match=sentence):
        recipes.from_text(text, engine, tiny)


def test_uploads_are_read_no_further_than_a_recipe_goes(engine, tiny, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PageError, match="not text"):
        recipes.from_file(path, engine, tiny)
    path.write_bytes(b" " * 5_000_000)
    with pytest.raises(PageError, match="larger than"):
        recipes.from_file(path, engine, tiny)
    Recipe(name="mine", methods=(SkipCache(interval=4),)).save(path)
    assert recipes.from_file(path, engine, tiny).methods == (SkipCache(interval=4),)


# --- engine ---


def test_the_plain_picture_is_the_stock_picture(engine, tiny, tmp_path):
    with engine.pipeline(tiny):
        drawn = engine.draw(PLAIN, TWO, Watch(), tmp_path / "a.png")
    assert drawn.image.tobytes() == stock(tiny, TWO).tobytes()
    found = metadata.read(tmp_path / "a.png")
    assert found.diffaccel["seed"] == 3
    assert str(tmp_path) not in json.dumps(found.diffaccel)


@pytest.mark.parametrize("wrong", [None, 3, ["shapes-sd"], {"a": 1}])
def test_what_is_no_text_is_refused_in_words(engine, wrong):
    """A client may send anything; a browser sends nothing for an emptied list."""
    with pytest.raises(PageError, match="Choose a model first"):
        engine.resolve(wrong)
    with pytest.raises(PageError, match="name of a preset or JSON"):
        recipes.from_text(wrong, engine, "shapes-sd")


@pytest.mark.parametrize("name", ["/etc", "..", "nobody/model", "", "\0", "~root", "tiny-sd/../../.."])
def test_only_listed_models_load(engine, name):
    with pytest.raises(PageError, match="no model this page may load"):
        engine.resolve(name)


def test_links_out_of_the_allowed_folder_are_refused(tiny_folder, tmp_path):
    (tmp_path / "link").symlink_to(tiny_folder)
    with pytest.raises(PageError, match="no model"):
        Engine([tmp_path]).resolve(str(tmp_path / "link"))
    assert Engine([tiny_folder.parent]).resolve(str(tiny_folder)) == str(tiny_folder.resolve())


def test_the_list_names_bundled_and_allowed_models(engine, tiny):
    assert [value for _, value in engine.models()] == ["shapes-sd", "shapes-sd3", tiny]
    assert engine.is_transformer("shapes-sd3")
    assert not engine.is_transformer(tiny)


def test_cancel_in_the_middle_leaves_nothing_behind(engine, tiny, tmp_path):
    watch = Watch()
    seen: list[int] = []

    def show(done: int, total: int, text: str) -> None:
        seen.append(done)
        if done == 2:
            watch.cancel.set()

    watch.show = show
    ask = TWO.model_copy(update={"steps": 8})
    watch.total = 8
    with engine.pipeline(tiny) as pipe:
        with pytest.raises(Cancelled, match="after 2 of"):
            engine.draw(PLAIN, ask, watch, tmp_path / "never.png")
        assert seen == [1, 2]
        assert not (tmp_path / "never.png").exists()
        assert "forward" not in vars(pipe.unet)
        again = engine.draw(PLAIN, TWO, Watch(), None)
    assert again.image.tobytes() == stock(tiny, TWO).tobytes()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_picture_that_is_not_finite_is_a_failure(engine, tiny, tmp_path, monkeypatch):
    """It was shown, black, with figures beside it."""
    with engine.pipeline(tiny) as pipe:
        decode = pipe.vae.decode

        def spoilt(latents: torch.Tensor, **options: Any) -> Any:
            return decode(latents * float("nan"), **options)

        monkeypatch.setattr(pipe.vae, "decode", spoilt)
        with pytest.raises(DiffaccelError, match="values that are not finite"):
            engine.draw(PLAIN, TWO, Watch(), tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()


def test_one_run_at_a_time(engine, tiny):
    order: list[str] = []

    def other() -> None:
        with engine.pipeline(tiny):
            order.append("second")

    with engine.pipeline(tiny):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": "  "}, "Write a prompt"),
        ({"prompt": "x" * 2001}, "Prompt: "),
        ({"prompt": "x", "steps": 0}, "Steps: "),
        ({"prompt": "x", "steps": 10**9}, "Steps: "),
        ({"prompt": "x", "seed": -1}, "Seed: "),
        ({"prompt": "x", "seed": 1.7}, "Seed: input should be a valid integer"),
        ({"prompt": "x", "steps": 2.5}, "Steps: input should be a valid integer"),
        ({"prompt": "x", "width": 64.5, "height": 64}, "Width: input should be a valid integer"),
        ({"prompt": "a\0b"}, "^Prompt: it holds a NUL character.$"),
        ({"prompt": "x", "negative": "\ud800"}, "^Negative: input should be a valid string"),
        ({"prompt": "x", "width": 100_000, "height": 64}, "Width: "),
        ({"prompt": "x", "guidance": float("nan")}, "Guidance: "),
    ],
)
def test_what_to_draw_is_checked_again(values, sentence):
    with pytest.raises(PageError, match=sentence):
        Ask.of(**values)
    with pytest.raises(PageError, match="both width and height"):
        _ = Ask.of(prompt="x", width=64).size


# --- sessions ---


def test_sessions_share_nothing_and_close(tmp_path):
    sessions = Sessions(tmp_path)
    first, second = sessions.of("a"), sessions.of("../../b")
    assert first.folder != second.folder
    assert {first.folder.parent, second.folder.parent} == {tmp_path}
    assert sessions.of("a") is first
    with first.running("compare") as event:
        assert first.cancel("compare")
        assert event.is_set()
        assert not second.cancel("compare")
    assert not first.cancel("compare")
    sessions.close("a")
    assert not first.folder.exists()
    assert second.folder.exists()


def test_a_waiting_run_can_be_cancelled_and_the_next_one_is_not(session):
    session.prepare("compare")
    assert session.cancel("compare")
    with session.running("compare") as event:
        assert event.is_set()
    session.prepare("compare")
    with session.running("compare") as event:
        assert not event.is_set()


def test_old_runs_make_room(session):
    made = [session.new_folder() for _ in range(KEPT_RUNS + 3)]
    assert [folder.exists() for folder in made] == [False] * 3 + [True] * KEPT_RUNS


# --- tabs ---


def test_compare_measures_and_saves(engine, tiny, session):
    steps = Ask.of(prompt="x", steps=12)
    recipe = Recipe(name="mine", methods=(SkipCache(interval=3),))
    found = comparing.compare(engine, session, tiny, steps, recipe, Watch())
    assert found.plain.path.is_file()
    assert found.fast.path.is_file()
    assert found.fast.report.flops < found.plain.report.flops
    assert "PSNR to plain" in found.figures()
    assert "rounds" in found.summary()
    assert len(found.plain.seconds) == len(found.fast.seconds) == timing.ROUNDS
    off = comparing.compare(engine, session, tiny, TWO, PLAIN, Watch())
    assert "faster" not in off.figures()
    assert "slower" not in off.figures()
    assert "no speed to show" in off.figures()
    assert found.steps().count("da-slot") == 24
    same = comparing.compare(engine, session, tiny, steps, PLAIN, Watch(), timed=False)
    assert same.likeness.psnr == float("inf")
    assert "identical" in same.figures()
    assert same.saved == ("1.00x", "the FLOPs of plain")
    assert "Times were not measured" in same.figures()
    assert "seconds" not in same.figures()
    assert same.summary() == "Done: 1.00x the FLOPs of plain."


def drawn(seconds: tuple[float, ...], flops: int, pixel: int = 0) -> Drawn:
    from PIL import Image

    report: Any = SimpleNamespace(flops=flops, seconds=seconds[0] if seconds else 0.0)
    return Drawn(Image.new("L", (1, 1), pixel), report, Path(), seconds)


@pytest.mark.parametrize(
    ("own", "plain", "words"),
    [
        ((1.0, 2.0, 1.0), (2.0, 4.4, 1.8), ("2.00x", "faster", "1.80x to 2.20x in 3 rounds")),
        ((2.0, 2.0, 2.5), (1.0, 1.25, 2.0), ("1.60x", "slower", "1.25x to 2.00x in 3 rounds")),
        ((1.0, 1.0, 1.0), (1.42, 1.5, 0.9), ("as fast", "within the noise", "0.90x to 1.50x as fast in 3 rounds")),
    ],
)
def test_a_speed_has_its_noise(own, plain, words):
    found = timing.speedup(drawn(own, 1, pixel=1), drawn(plain, 2))
    assert found is not None
    assert timing.pace(found) == words


def test_the_same_work_has_no_speed():
    """ "1.42x faster" stood beside "identical" and "1.00x fewer FLOPs"."""
    fast, slow = drawn((1.0, 1.0, 1.0), 5), drawn((1.4, 1.5, 1.6), 5)
    assert timing.speedup(fast, slow) is None
    assert timing.speedup(drawn((), 1), drawn((), 2)) is None


@pytest.mark.parametrize("timed", [True, False])
def test_pictures_are_timed_in_turns(session, tmp_path, timed):
    calls: list[tuple[str, bool]] = []

    def draw(recipe: Recipe, ask: Ask, watch: Watch, path: Path | None, owner: str) -> Drawn:
        calls.append((recipe.name, path is not None))
        return drawn((float(len(calls)),), 1)

    jobs = [timing.Job(name, Recipe(name=name), TWO, tmp_path / name) for name in "ab"]
    found = timing.draw_all(SimpleNamespace(draw=draw), session, jobs, Watch(), timed=timed)  # type: ignore[arg-type]
    assert timing.steps_in_all(jobs, timed=timed) == len(calls) * TWO.steps
    if timed:
        assert "".join(name for name, _ in calls) == "ababbaab"
        assert [kept for _, kept in calls] == [False] * 2 + [True] * 2 + [False] * 4
        assert [each.seconds for each in found] == [(3.0, 6.0, 7.0), (4.0, 5.0, 8.0)]
    else:
        assert calls == [("a", True), ("b", True)]


def test_the_strip_shows_what_was_left_out():
    def entry(index: int, rows: int, flops: int, dense: float | None = None) -> Evaluation:
        return Evaluation("denoiser", index, 1.0, rows, 2, flops, dense, ())

    trace = (entry(0, 2, 200, 100.0), entry(1, 1, 100, 100.0), entry(2, 2, 60), entry(3, 0, 0))
    steps = markup.steps_of(SimpleNamespace(trace=trace))  # type: ignore[arg-type]
    assert [step.work for step in steps] == ["full", "guidance", "partial", "skipped"]
    assert [round(step.share, 2) for step in steps] == [1.0, 0.5, 0.3, 0.0]


def test_what_people_write_is_escaped():
    evil = "<script>alert(1)</script>"
    for text in (
        markup.message(evil),
        markup.notes([evil]),
        markup.table([evil], [[evil, evil]], evil),
        markup.tiles([(evil, evil, evil)]),
    ):
        assert "<script" not in text


def test_explore_crosses_two_settings(engine, tiny, session):
    axes = [exploring.Axis.of("skip_cache.interval", "2, 3"), exploring.Axis.of("skip_cache.order", "0, 1")]
    ask = Ask.of(prompt="x", steps=10)
    found = exploring.explore(engine, session, tiny, ask, Recipe(), axes, Watch(), timed=False)
    names = ["interval=2, order=0", "interval=2, order=1", "interval=3, order=0", "interval=3, order=1"]
    assert [cell.label for cell in found.cells] == names
    assert [caption for _, caption in found.gallery()] == [*names, "plain"]
    assert found.columns == 2
    recipe = metadata.read(found.cells[2].drawn.path).diffaccel["recipe"]["methods"][0]
    assert (recipe["interval"], recipe["order"]) == (3, 0)
    assert found.plot.is_file()
    assert "times were not measured" in found.figures()
    with pytest.raises(PageError, match="no times to plot"):
        exploring.explore(engine, session, tiny, ask, Recipe(), axes, Watch(), timed=False, over="seconds")
    few = [exploring.Axis.of("step_schedule.fraction", "0.5, 1")]
    timed = exploring.explore(engine, session, tiny, TWO, Recipe(), few, Watch(), over="seconds")
    assert timed.figures().count("rounds") == 2  # the caption, as a text and as a name
    assert timed.figures().count("same work") == 1


@pytest.mark.parametrize(
    ("setting", "values", "sentence"),
    [
        ("skip_cache.depths", "1", "no setting"),
        ("skip_cache.interval", " ", "Give values"),
        ("skip_cache.interval", "2, 2", "listed twice"),
        ("skip_cache.interval", "two", "takes numbers"),
        ("token_merging.importance", "maybe", "true and false"),
        ("skip_cache.interval", ", ".join(map(str, range(1, 40))), "at most 36"),
    ],
)
def test_wrong_sweeps_are_sentences(setting, values, sentence):
    with pytest.raises(DiffaccelError, match=sentence):
        exploring.variants(Recipe(), [exploring.Axis.of(setting, values)])


def test_an_edit_acts_on_its_session_only(engine, session, tmp_path):
    ask = Ask.of(prompt="a red circle", steps=2)
    request = erasing.Request.of("circle", "star\nheart", "square", "uce", "ridge=0.5")
    found = erasing.erase(engine, session, "shapes-sd", ask, request, Watch())
    assert "circle" in found.figures()
    assert found.before.image.tobytes() != found.after.image.tobytes()
    with pytest.raises(PageError, match="nothing to undo"):
        erasing.undo(session)
    erasing.apply(session)
    mine = comparing.compare(engine, session, "shapes-sd", ask, PLAIN, Watch(), timed=False)
    assert mine.plain.image.tobytes() == found.after.image.tobytes()
    assert metadata.read(mine.plain.path).diffaccel["recipe"]["methods"][0]["file"] == found.file.name
    other = Sessions(tmp_path / "others").of("other")
    theirs = comparing.compare(engine, other, "shapes-sd", ask, PLAIN, Watch(), timed=False)
    assert theirs.plain.image.tobytes() == found.before.image.tobytes()
    erasing.undo(session)
    again = comparing.compare(engine, session, "shapes-sd", ask, PLAIN, Watch(), timed=False)
    assert again.plain.image.tobytes() == found.before.image.tobytes()


@pytest.mark.parametrize(("anchor", "method"), [("square", "context"), ("", "context")])
def test_without_a_choice_the_edit_is_that_of_python(engine, session, anchor, method):
    found = erasing.erase(
        engine,
        session,
        "shapes-sd",
        Ask.of(prompt="a red circle", steps=1),
        erasing.Request.of("circle, star", "heart", anchor, erasing.AUTOMATIC, "ridge=0.2"),
        Watch(),
    )
    assert found.edit.method == method
    pipe = diffaccel.load_miniature("shapes-sd")
    assert (
        found.edit.digest
        == diffaccel.erase(pipe, ["circle", "star"], keep=["heart"], anchor=anchor or None, ridge=0.2).digest
    )
    assert f"{method}: the picture changed" in found.figures()


def test_looking_at_another_edit_leaves_the_applied_one(session):
    """It was dropped without a word: pictures thought to be without circles had them again."""

    def edit(target: str) -> Any:
        return SimpleNamespace(concepts=[SimpleNamespace(target=target)]), f"no-{target}.safetensors"

    assert not erasing.can_apply(session)
    session.edit = edit("circle")
    erasing.apply(session)
    assert not erasing.can_apply(session)
    session.edit = edit("star")
    assert session.with_edit(PLAIN).methods[0].file.endswith("no-circle.safetensors")
    assert "draw with the edit against circle" in erasing.state(session)
    assert "newer edit against star is not applied" in erasing.state(session)
    assert erasing.can_apply(session)
    assert "edit against star" in erasing.apply(session)
    assert session.with_edit(PLAIN).methods[0].file.endswith("no-star.safetensors")
    assert erasing.undo(session) == "Computed, not applied: an edit against star."
    assert session.with_edit(PLAIN) == PLAIN


@pytest.mark.parametrize(
    ("prompt", "concepts", "keep", "words"),
    [
        ("a red square", "", "", []),
        ("a red Circle", "circle, star", "heart", []),
        ("a red square", "circle, star", "heart", ["does not mention circle or star"]),
        ("a red circle", "circle", " ", ["Nothing is named under Keep"]),
        ("", "circle", "", ["does not mention", "Nothing is named"]),
    ],
)
def test_erasing_tells_what_is_missing(prompt, concepts, keep, words):
    found = erasing.hints(prompt, concepts, keep)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_every_erasure_method_is_described():
    assert set(erasing.ABOUT) == {erasing.AUTOMATIC, *METHODS}


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (("", "", "", "uce", ""), "at least one concept"),
        (("a", "", "", "magic", ""), "no method"),
        (("a", "", "", "uce", "ridge"), "NAME=VALUE"),
        ((",".join(f"c{i}" for i in range(80)), "", "", "uce", ""), "at most"),
    ],
)
def test_wrong_erasures_are_sentences(request_, sentence):
    with pytest.raises(PageError, match=sentence):
        erasing.Request.of(*request_)


def test_a_batch_is_zipped_with_its_manifest(engine, tiny, session, tmp_path):
    source = tmp_path / "rows.csv"
    source.write_text("prompt,steps\na,2\nb,1\n")
    options = batching.Options(seed=5, steps=2)
    plan = batching.check(session.new_folder(), str(source), options)
    assert "2 rows, all valid" in batching.preview(plan, engine.pipeline_class(tiny))
    done = batching.run(engine, session, tiny, str(source), PLAIN, options, Watch())
    assert done.report.exit_code == 0
    assert [metadata.read(path).diffaccel["seed"] for path in done.pictures] == [5, 6]
    assert done.gallery() == [(str(path), text) for path, text in zip(done.pictures, ("1: a", "2: b"), strict=True)]
    with zipfile.ZipFile(done.archive) as archive:
        assert len(archive.namelist()) == 3
    with engine.pipeline(tiny):
        alone = engine.draw(PLAIN, Ask.of(prompt="a", steps=2, seed=5), Watch(), tmp_path / "alone.png")
    from PIL import Image

    with Image.open(done.pictures[0]) as image:
        assert image.tobytes() == alone.image.tobytes()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("rows.exe", "a", "A list is one of"),
        ("rows.csv", "prompt,steps\na,100000\n", "steps"),
        ("rows.csv", "prompt,width,height\na,4096,4096\n", "longer than 2048"),
        ("rows.txt", "a\n" * 501, "more than 500 rows. This page takes no more"),
        ("rows.csv", "prompt,recipe\na,/etc/hosts.json\n", "recipe"),
    ],
)
def test_lists_beyond_the_limits_are_refused(session, tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(DiffaccelError, match=sentence):
        batching.check(session.new_folder(), str(tmp_path / name), batching.Options())


def test_a_column_that_nobody_knows_is_not_valid(engine, tiny, session, tmp_path):
    """ "All valid" stood above a list that the run then refused."""
    (tmp_path / "rows.csv").write_text("prompt,clip_skip,artist\na,1,me\n")
    plan = batching.check(session.new_folder(), str(tmp_path / "rows.csv"), batching.Options())
    with pytest.raises(
        DiffaccelError, match="The column 'artist' is no column of a batch and no call argument of Stable"
    ):
        batching.preview(plan, engine.pipeline_class(tiny))
    shown = batching.preview(plan, None)
    assert "whether the pipeline takes artist, clip_skip is not known" in shown
    assert "valid" not in shown


def test_what_is_wrong_with_a_list_names_no_place_on_the_server(session, tmp_path):
    (tmp_path / "list.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(PageError) as refused:
        batching.check(session.new_folder(), str(tmp_path / "list.csv"), batching.Options())
    assert str(refused.value) == "the list is not a text file in UTF-8: invalid start byte."


def test_looking_at_lists_pushes_out_no_results(engine, tmp_path):
    """A batch may run for long; each look at another list took one of the folders that a visitor has."""
    acting, request = actions.Actions(engine, Sessions(tmp_path / "sessions")), SimpleNamespace(session_hash="somebody")
    (tmp_path / "list.txt").write_text("a red square\n")
    running = acting.session(request).new_folder()
    for _ in range(KEPT_RUNS + 1):
        shown = acting.check_batch(
            str(tmp_path / "list.txt"), 0, 2, None, None, None, "png", True, "shapes-sd", request
        )
        assert "1 row, valid" in shown
    assert running.is_dir()
    assert list(running.parent.iterdir()) == [running]


def test_notices_are_text():
    """Browsers show the notice of an error as HTML; a sentence repeats what stood in a file."""
    evil = "unknown method '<img src=\"http://example.com/x.png\">' & more"
    assert (
        str(actions.refusal(evil).message) == "unknown method '&lt;img src=\"http://example.com/x.png\"&gt;' &amp; more"
    )


def test_a_complaint_goes_with_its_inputs(engine, tmp_path):
    acting, request = actions.Actions(engine, Sessions(tmp_path / "sessions")), SimpleNamespace(session_hash="somebody")
    forget, failed = acting.forget("compare"), acting.failed("compare")
    assert forget(request, "") == gr.skip()
    assert "da-bad" in failed(request, "", 3)[0]
    assert forget(request, "", 3) == gr.skip()  # what was changed before it, answered late
    assert acting.forget("batch")(request, "a", 3) == gr.skip()
    assert forget(request, "a", 3) == ""
    assert forget(request, "ab", 3) == gr.skip()


def test_errors_are_one_sentence():
    assert actions.sentence(DiffaccelError("no such\nthing.")) == "No such thing."
    assert "smaller size" in actions.sentence(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert "secret" not in actions.sentence(ValueError("/home/secret"))


def test_another_model_sets_the_switches_only_where_its_preset_differs(engine, tmp_path):
    """A late answer to a change of the model took back what the visitor had switched meanwhile."""
    acting, request = actions.Actions(engine, Sessions(tmp_path / "sessions")), SimpleNamespace(session_hash="somebody")
    chosen = acting.fill("balanced", "shapes-sd", request)[0]
    assert chosen == ["skip_cache"]
    untouched = acting.refill("balanced", "shapes-sd", request)
    assert untouched == [gr.skip()] * len(untouched)
    assert acting.refill("balanced", "shapes-sd3", request)[0] == ["forecast"]
    assert acting.refill("balanced", "shapes-sd", request)[0] == ["skip_cache"]
    assert acting.fill("balanced", "shapes-sd", request)[0] == ["skip_cache"]
    assert acting.refill("custom", "shapes-sd3", request) == untouched

"""Recipes as files and as values: round trips, every refusal by its sentence, presets that run."""

from __future__ import annotations

import itertools
import json
import math
import os

import pytest
import tiny_transformers
from tiny import run, tiny_pipeline

import diffaccel
from diffaccel import (
    AdaptiveGuidance,
    BlockCache,
    Forecast,
    GuidanceInterval,
    NormalizedAttentionGuidance,
    Recipe,
    RecipeError,
    RegionSampling,
    ResidualCache,
    SkipCache,
    SparseAttention,
    SparseCrossAttention,
    StepReuse,
    StepSchedule,
    TokenDownsampling,
    TokenMerging,
)
from diffaccel.erasure import read_concepts
from diffaccel.methods import Erase, registry
from diffaccel.recipes.recipe import CONFLICTS, build_method
from diffaccel.recipes.resolve import resolve_recipe

# No setting below has its default value.
SCHEDULED = {
    "interval": 5,
    "schedule": (0, 4, 9),
    "window": (math.inf, 0.1),
    "full_first": 2,
    "full_last": 3,
    "min_evaluations": 4,
}
UNUSUAL = (
    GuidanceInterval(high=5.42, low=0.28, start_fraction=0.1, stop_fraction=0.9),
    AdaptiveGuidance(threshold=0.97),
    SkipCache(**SCHEDULED, depth=2, order=2),
    TokenMerging(ratio=0.25, importance=True, min_tokens=64, start_fraction=0.1, stop_fraction=0.8, seed=7),
    TokenMerging(matcher="tile", proportional=True, reuse=3, dense_blocks=(0, 2)),
    TokenDownsampling(factor=3, reduction="average", min_tokens=100, start_fraction=0.2, stop_fraction=0.7),
    StepSchedule(fraction=0.5, spacing="trailing"),
    StepSchedule(steps=12, spacing="ays"),
    ResidualCache(**SCHEDULED, keep_first=2, keep_last=3, order=2, coordinate="log_sigma"),
    Forecast(**SCHEDULED, order=2, target="residual", coordinate="flow_time"),
    RegionSampling(
        ratio=0.25,
        start=3,
        end=20,
        resets=(7, 14),
        metric="norm",
        high_share=0.5,
        starvation=0.5,
        frozen="reuse",
        min_evaluations=12,
        allow_stochastic=True,
    ),
    BlockCache(kind="mag", threshold=0.1, ratios=(1.0, 0.9), window=(math.inf, 0.1), max_hits=2, full_first=5),
    BlockCache(kind="dual_block", threshold=0.12, first_blocks=4, last_blocks=2, max_hits=3, full_first=8),
    BlockCache(kind="taylor", interval=3, order=2, target="output", full_last=2, min_evaluations=12),
    Erase(file="no-circle.safetensors", strength=0.5),
    StepReuse(threshold=0.03, max_skips=2, full_first=5, full_last=2, min_evaluations=12, allow_stochastic=True),
    NormalizedAttentionGuidance(
        negative_prompt="a red circle", scale=5.0, tau=3.0, alpha=0.25, start_fraction=0.1, stop_fraction=0.25
    ),
    SparseAttention(keep=0.3, mode="mass", reuse=2, start=5, similarity=0.1, skip=30.0, min_tokens=512),
    SparseCrossAttention(scale=1.5, alpha=2.0, start_fraction=0.2, stop_fraction=0.7),
)
MORE = (SkipCache(schedule="late"), GuidanceInterval(low=0.3), AdaptiveGuidance(), TokenMerging(), SkipCache())


def strict(text):
    """JSON as other programs read it: no Infinity, no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def entry(**settings):
    return {"schema": 1, "methods": [settings]}


def refusal(function, *args):
    with pytest.raises(RecipeError) as caught:
        function(*args)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


# --- round trips ---


def test_the_unusual_settings_cover_every_method_and_setting():
    assert {method.name for method in UNUSUAL} == set(registry())
    for name, cls in registry().items():
        changed = [m.model_dump(exclude_defaults=True) for m in UNUSUAL if m.name == name]
        assert set().union(*changed) == set(cls.model_fields)


@pytest.mark.parametrize("method", UNUSUAL + MORE, ids=lambda m: m.name)
def test_methods_survive_a_file(method, tmp_path):
    recipe = Recipe(name="näme", note="A note.", methods=(method,))
    recipe.save(tmp_path / "recipe.json")
    back = Recipe.load(tmp_path / "recipe.json")
    assert back == recipe
    assert back.methods == (method,)  # types and all settings
    written = strict((tmp_path / "recipe.json").read_text(encoding="utf-8"))
    assert written == recipe.to_dict()
    assert written["schema"] == 1
    assert written["methods"][0]["method"] == method.name
    assert set(written["methods"][0]) == {"method", *type(method).model_fields}


def test_infinite_bounds_are_written_as_text():
    data = strict(json.dumps(Recipe(methods=(GuidanceInterval(low=0.3), SkipCache(window=(math.inf, 1)))).to_dict()))
    interval, cache = data["methods"]
    assert interval["high"] == "Infinity"
    assert cache["window"] == ["Infinity", 1.0]
    back = Recipe.from_dict(data)
    assert back.methods[0].high == math.inf
    assert back.methods[1].window == (math.inf, 1.0)
    assert build_method(GuidanceInterval, {"high": "inf", "low": 0.3}).high == math.inf  # written by hand


def test_presets_survive_a_file(tmp_path):
    presets = diffaccel.presets()
    assert {"off", "balanced", "fast", "fewer-steps"} <= set(presets)
    assert presets["off"].methods == ()
    for name, recipe in presets.items():
        assert recipe.name == name
        recipe.save(tmp_path / "p.json")
        assert Recipe.load(tmp_path / "p.json") == recipe
        strict((tmp_path / "p.json").read_text())


def ran_whole(fast, recipe):
    """The preset's part for this network ran, and saved something unless it is empty."""
    assert fast.recipe == recipe
    assert fast.report.completed
    assert fast.report.recipe == recipe.to_dict()
    assert (fast.report.flops < fast.report.flops_plain) == bool(recipe.methods), recipe.name


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_presets_run(kind):
    pipe = tiny_pipeline(kind)
    for name, recipe in diffaccel.presets().items():
        fast = diffaccel.wrap(pipe, name)
        run(fast, kind, steps=24)
        ran_whole(fast, recipe.on_unets())


@pytest.mark.parametrize("kind", ["sd3", "flux-dev", "hunyuan"])
def test_presets_run_on_transformers(kind):
    pipe = tiny_transformers.tiny_pipeline(kind)
    for name, recipe in diffaccel.presets().items():
        fast = diffaccel.wrap(pipe, name)
        tiny_transformers.run(fast, kind, steps=24)
        ran_whole(fast, recipe.on_transformers())
        assert not any(method.name == "skip_cache" for method in fast.recipe.methods)


def test_the_order_given_does_not_matter():
    methods = [StepSchedule(fraction=0.9), GuidanceInterval(low=1.0), AdaptiveGuidance(), SkipCache(), TokenMerging()]
    recipes = {json.dumps(resolve_recipe(list(order)).to_dict()) for order in itertools.permutations(methods)}
    assert len(recipes) == 1
    assert [m["method"] for m in json.loads(recipes.pop())["methods"]] == [m.name for m in methods]


# --- refusals in files ---


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "JSON object, not list"),
        (None, "JSON object, not NoneType"),
        ({}, "schema None is not supported; this version reads 1"),
        ({"schema": 2, "methods": []}, "schema 2 is not supported"),
        ({"schema": "1"}, "schema '1' is not supported"),
        ({"schema": 1, "mehtods": []}, "unknown recipe key 'mehtods'"),
        ({"schema": 1, "b": 1, "a": 2}, "unknown recipe key 'a', 'b'"),
        ({"schema": 1, "methods": {}}, "'methods' must be a list"),
        ({"schema": 1, "methods": None}, "'methods' must be a list"),
        ({"schema": 1, "name": 3}, "'name' and 'note' must be text"),
        ({"schema": 1, "note": None}, "'name' and 'note' must be text"),
        ({"schema": 1, "methods": ["skip_cache"]}, "object with the key 'method'"),
        ({"schema": 1, "methods": [{"interval": 3}]}, "object with the key 'method'"),
        (entry(method="skipcache"), "unknown method 'skipcache'; known are step_schedule,"),
        (entry(method=["skip_cache"]), "unknown method ['skip_cache']"),
        (entry(method=None), "unknown method None"),
        (entry(method="skip_cache", intervall=3), "unknown skip_cache key 'intervall'"),
        (entry(method="skip_cache", name="x"), "unknown skip_cache key 'name'"),
        (entry(method="skip_cache", interval=0), "skip_cache.interval: Input should be greater than or equal to 1"),
        (entry(method="skip_cache", interval=2.5), "skip_cache.interval"),
        (entry(method="skip_cache", interval="often"), "'often'"),
        (entry(method="skip_cache", schedule="sometimes"), "skip_cache.schedule"),
        (entry(method="skip_cache", schedule=[0, -1]), "skip_cache.schedule: evaluation indices start at 0"),
        (entry(method="skip_cache", window=[0.1, 5.0]), "skip_cache.window: window is (high, low)"),
        (entry(method="skip_cache", window=[5.0]), "skip_cache.window"),
        (entry(method="skip_cache", order=3), "skip_cache.order"),
        (entry(method="skip_cache", depth=-1), "skip_cache.depth"),
        (entry(method="token_merging", ratio=0.76), "token_merging.ratio: Input should be less than or equal to 0.75"),
        (entry(method="token_merging", ratio=math.nan), "token_merging.ratio"),
        (entry(method="token_merging", min_tokens=0), "token_merging.min_tokens"),
        (entry(method="token_merging", start_fraction=0.8, stop_fraction=0.2), "start_fraction must not be above"),
        (entry(method="token_downsampling", start_fraction=0.8, stop_fraction=0.2), "start_fraction must not be above"),
        (entry(method="token_downsampling", factor=9), "token_downsampling.factor"),
        (entry(method="guidance_interval", high=0.1, low=0.2), "low (0.2) must be below high (0.1)"),
        (entry(method="guidance_interval", low=-1), "guidance_interval.low"),
        (entry(method="adaptive_guidance", threshold=1.1), "adaptive_guidance.threshold"),
        (entry(method="adaptive_guidance", threshold=0), "adaptive_guidance.threshold"),
        (entry(method="step_schedule", fraction=1.5), "step_schedule.fraction"),
        (entry(method="step_schedule", fraction=0.5, steps=10), "give fraction or steps, not both"),
        (entry(method="step_schedule", spacing="random"), "step_schedule.spacing"),
        (entry(method="skip_cache", interval=True), "skip_cache.interval: true and false are no values"),
        (entry(method="skip_cache", schedule=[0, True]), "skip_cache.schedule: true and false are no values"),
        (entry(method="step_reuse", threshold=False), "step_reuse.threshold: true and false are no values"),
        ({"schema": 1, "name": "\ud800"}, "recipe.name: only printable characters"),
        ({"schema": 1, "name": "two\nlines"}, "recipe.name: only printable characters"),
        ({"schema": 1, "note": "\x1b[31m"}, "recipe.note: only printable characters"),
    ],
    ids=str,
)
def test_wrong_contents_are_refused_by_name(data, words):
    assert words in refusal(Recipe.from_dict, data)


def test_switches_and_notes_of_several_lines_are_taken():
    recipe = Recipe.from_dict(entry(method="step_reuse", allow_stochastic=True) | {"note": "one\ntwo"})
    assert recipe.methods[0].allow_stochastic is True


@pytest.mark.parametrize("value", [0.9, -0.5, "much", None])
def test_range_errors_show_the_value(value):
    assert f"(got {value!r})" in refusal(build_method, TokenMerging, {"ratio": value})


def test_a_setting_of_two_types_names_both():
    sentence = refusal(build_method, TokenMerging, {"min_tokens": "often"})
    assert "'measured'" in sentence
    assert "integer" in sentence
    assert "token_merging.min_tokens: " in sentence


@pytest.mark.parametrize("pair", CONFLICTS, ids=lambda pair: "+".join(sorted(pair)))
def test_conflicts_have_a_sentence(pair):
    methods = [registry()[name]() for name in sorted(pair)]
    assert not any(method.is_off for method in methods)
    for order in (methods, methods[::-1]):
        assert refusal(resolve_recipe, order) == CONFLICTS[pair]
        with pytest.raises(RecipeError) as caught:
            Recipe(methods=tuple(order))
        assert str(caught.value) == CONFLICTS[pair]
    listed = {"schema": 1, "methods": [{"method": name} for name in pair]}
    assert refusal(Recipe.from_dict, listed) == CONFLICTS[pair]


def test_a_method_that_is_off_conflicts_with_nothing():
    resolve_recipe([TokenMerging(ratio=0), TokenDownsampling()])


@pytest.mark.parametrize("cls", registry().values(), ids=lambda cls: cls.name)
def test_the_same_method_twice_is_refused(cls):
    assert refusal(resolve_recipe, [cls(), cls()]) == f"{cls.name} appears 2 times in one recipe; give it once."


@pytest.mark.parametrize("value", [["skip_cache"], [SkipCache], [SkipCache(), None], 5, None, {1}, object()])
def test_things_that_are_no_recipe(value):
    refusal(resolve_recipe, value)


def test_recipes_and_methods_are_frozen():
    for thing, name in ((Recipe(), "name"), (SkipCache(), "interval")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(thing, name, 3)
    assert "Input should be a valid string" in refusal(lambda: Recipe(name=3))
    assert "recipe.mehtods" in refusal(lambda: Recipe(mehtods=()))


# --- names and files ---


def test_names_and_paths(tmp_path):
    Recipe(name="mine", methods=(SkipCache(),)).save(tmp_path / "mine.json")
    Recipe(name="mine too").save(tmp_path / "no suffix")
    assert resolve_recipe(tmp_path / "mine.json").name == "mine"
    assert resolve_recipe(str(tmp_path / "mine.json")).name == "mine"
    assert resolve_recipe(str(tmp_path / "no suffix")).name == "mine too"
    assert resolve_recipe("off") == diffaccel.presets()["off"]
    assert resolve_recipe(SkipCache()).methods == (SkipCache(),)
    assert resolve_recipe([]).methods == ()
    sentence = refusal(resolve_recipe, "blanced")
    assert "'blanced'" in sentence
    assert "balanced" in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"", "is not valid JSON"),
        (b'{"schema": 1', "is not valid JSON"),
        (b'{"schema": 1,}', "is not valid JSON"),
        (b"\xff{}", "it is not a text file"),
        (b"\x89PNG\r\n\x1a\n", "it is not a text file"),
        ("{}".encode("utf-16-le"), "it is not a text file"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", "JSON object, not list"),
        (
            b'{"schema": 1, "methods": [{"method": "skip_cache", "interval": 3, "interval": 4}]}',
            "'interval' is given twice",
        ),
        (b'{"schema": 1, "name": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
    ids=str,
)
def test_unreadable_files(content, words, tmp_path):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_bytes(content)
    for read in (Recipe.load, resolve_recipe):
        assert words in refusal(read, path)


def test_folders_and_impossible_places(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("x")
    assert "Is a directory" in refusal(Recipe.load, tmp_path / "folder.json")
    refusal(resolve_recipe, tmp_path)
    recipe = Recipe()
    for place in ("folder.json", "missing/r.json", "file/r.json", "n" * 300 + ".json"):
        assert "cannot write the recipe to" in refusal(recipe.save, tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_files_may_be_written_as_windows_programs_do(tmp_path, encoding):
    """Recipes and concept files: with a byte order mark, or in UTF-16 with one."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    recipe, concepts = tmp_path / "recipe.json", tmp_path / "concepts.json"
    recipe.write_bytes((mark + '{"schema": 1,\r\n"name": "süß", "methods": []}').encode(encoding))
    concepts.write_bytes((mark + '{"concepts": ["süß"]}').encode(encoding))
    assert Recipe.load(recipe).name == "süß"
    assert [concept.target for concept in read_concepts(concepts).concepts] == ["süß"]


def test_saving_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    """A failure while writing leaves the old recipe and nothing else."""
    path = tmp_path / "r.json"
    Recipe(name="old").save(path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for module, name in ((os, "replace"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, **__: full_disk())
            assert "No space left on device" in refusal(Recipe(name="new").save, path)
        assert Recipe.load(path).name == "old"
        assert list(tmp_path.iterdir()) == [path]
    Recipe(name="new").save(path)
    assert Recipe.load(path).name == "new"


def test_two_may_save_the_same_recipe_at_the_same_time(tmp_path, monkeypatch):
    """They shared one temporary file, and the slower one found it gone."""
    path, replace = tmp_path / "r.json", os.replace

    def meanwhile(*names):
        monkeypatch.setattr(os, "replace", replace)
        Recipe(name="other").save(path)
        replace(*names)

    monkeypatch.setattr(os, "replace", meanwhile)
    Recipe(name="mine").save(path)
    assert Recipe.load(path).name == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_descriptions_name_what_differs_from_the_default():
    assert Recipe().describe() == "no methods"
    text = resolve_recipe([SkipCache(interval=5), GuidanceInterval()]).describe()
    assert text == "guidance_interval() + skip_cache(interval=5)"


# --- one recipe for UNets and transformers ---


def test_transformer_methods_survive_the_file(tmp_path):
    recipe = Recipe(name="both", methods=(SkipCache(),), transformer_methods=(GuidanceInterval(low=0.5),))
    recipe.save(tmp_path / "both.json")
    assert Recipe.load(tmp_path / "both.json") == recipe
    assert "transformer_methods" not in Recipe(methods=(SkipCache(),)).to_dict()


def test_wrap_takes_the_methods_for_its_denoiser():
    recipe = Recipe(name="both", methods=(SkipCache(),), transformer_methods=(GuidanceInterval(low=0.5),))
    assert [m.name for m in recipe.on_unets().methods] == ["skip_cache"]
    assert [m.name for m in recipe.on_transformers().methods] == ["guidance_interval"]
    fast = diffaccel.wrap(tiny_pipeline("sd"), recipe)
    assert [m.name for m in fast.recipe.methods] == ["skip_cache"]


def test_transformer_methods_are_checked_for_conflicts_too():
    pair = (TokenMerging(ratio=0.5), TokenDownsampling(factor=2))
    with pytest.raises(RecipeError, match="same self-attentions"):
        Recipe(transformer_methods=pair)
    with pytest.raises(RecipeError, match="'transformer_methods' must be a list"):
        Recipe.from_dict({"schema": 1, "transformer_methods": {}})

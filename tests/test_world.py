"""The world of real things: its words, scenes, captions, pictures and judge. No drawing of the real sets is needed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffaccel.miniatures.world import (
    CORE_NAMES,
    NAMES,
    NOUNS,
    PARENTS,
    PLACES,
    STYLES,
    Ground,
    Mention,
    Scene,
    SceneObject,
    Truth,
    WorldCase,
    caption,
    children_of,
    held_out_prompts,
    is_held_out,
    names_of,
    parents_of,
    random_scene,
    training_scene,
)
from diffaccel.miniatures.world.captions import KINDS, STYLE_PHRASES, vocabulary_words
from diffaccel.miniatures.world.judge import (
    CELL,
    VERDICT_FIELDS,
    Seen,
    WorldJudge,
    WorldJudgeNetwork,
    WorldReading,
    WorldVerdict,
    as_tensor,
    compare,
    readings,
)
from diffaccel.miniatures.world.nouns import noun, with_article
from training.train_text import build_tokenizer, tokenize
from training.world import World, damage, sprites
from training.world.evaluate import OPEN_SEED, Maker, Plan, best_scale, by_style, openness
from training.world.train_judge import Batches as JudgeBatches
from training.world.train_judge import Pool, Row, Targets, fully_told, judge_loss, save_judge, whole_classes
from training.world.train_text import NOTHING, Batches, place_targets

ROOT = Path(__file__).resolve().parent.parent


def stand_ins(side=24):
    """One flat disc or square per noun and artwork, in a colour of its own: drawings without the real sets."""
    line = numpy.linspace(-1, 1, side)
    disc = numpy.hypot(line[:, None], line[None, :]) < 0.9
    rows = numpy.zeros((len(NAMES), 2, side, side, 4), numpy.uint8)
    for index in range(len(NAMES)):
        colour = [30 + step * index % 223 for step in (37, 91, 149)]
        rows[index, :, :, :, :3] = colour
        rows[index, 0, :, :, 3], rows[index, 1, :, :, 3] = 255 * disc, 255
    return rows


@pytest.fixture(scope="module")
def world():
    return World(stand_ins())


@pytest.fixture
def rng():
    return numpy.random.default_rng(7)


# words


def test_the_world_has_more_than_two_hundred_nouns_and_a_core_of_a_hundred():
    assert len(NAMES) >= 200
    assert len(CORE_NAMES) == 100
    assert set(CORE_NAMES) < set(NAMES)


def test_no_word_stands_for_two_things():
    terms = [term for item in NOUNS for term in item.terms] + list(PARENTS)
    assert [term for term, count in Counter(terms).items() if count > 1] == []


def test_every_noun_has_a_synonym_and_a_wider_word_with_other_children():
    for item in NOUNS:
        assert item.synonyms
        assert item.name in children_of(item.parent)
        assert len(children_of(item.parent)) >= 3


def test_wider_words_nest():
    assert parents_of("owl") == ("bird", "animal")
    assert set(children_of("bird")) < set(children_of("animal"))
    assert set(names_of("animal")).isdisjoint(names_of("vehicle"))
    assert names_of("kitty") == ("cat",)


@pytest.mark.parametrize("call", [noun, names_of, children_of])
def test_unknown_words_are_refused_by_name(call):
    with pytest.raises(ValueError, match="zeppelin"):
        call("zeppelin")


@pytest.mark.parametrize(
    ("term", "adjective", "phrase"),
    [
        ("owl", "", "an owl"),
        ("owl", "small", "a small owl"),
        ("unicorn", "", "a unicorn"),
        ("umbrella", "", "an umbrella"),
        ("scissors", "large", "large scissors"),
    ],
)
def test_articles(term, adjective, phrase):
    assert with_article(term, adjective) == phrase


def test_each_noun_has_two_different_drawings_of_known_sets():
    chosen = sprites.artworks()
    assert list(chosen) == list(NAMES)
    keys = [key for pair in chosen.values() for key in pair]
    assert len(set(keys)) == 2 * len(NAMES)
    assert {key.split("/")[0] for key in keys} == set(sprites.SETS)
    assert all(first.split("/")[0] != second.split("/")[0] for first, second in chosen.values())


def test_sets_are_pinned_and_free():
    for item in sprites.SETS.values():
        assert item.version.count(".") == 2
        assert item.licence in ("Apache-2.0", "MIT", "CC-BY-4.0")
        assert item.author


# scenes


@pytest.mark.parametrize("objects", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [128, 256, 512])
def test_things_keep_to_the_picture_and_off_each_other(objects, side, rng):
    for _ in range(200):
        scene = random_scene(rng, objects, side)
        assert len(scene.objects) == objects
        for item in scene.objects:
            assert all(item.size / 2 <= at <= 1 - item.size / 2 for at in (item.x, item.y)) or objects > 1
            assert all(0.12 < at < 0.88 for at in (item.x, item.y))
        for one, other in itertools.combinations(scene.objects, 2):
            apart = max(abs(one.x - other.x), abs(one.y - other.y))
            assert apart > 0.8 * (one.size + other.size) / 2


@pytest.mark.parametrize(("objects", "low", "high"), [(1, 90, 160), (2, 64, 160), (3, 64, 160), (4, 64, 160)])
def test_things_have_64_to_160_pixels_of_256(objects, low, high, rng):
    sizes = [256 * item.size for _ in range(200) for item in random_scene(rng, objects, 256).objects]
    assert low - 1 <= min(sizes) < max(sizes) <= high + 1


def test_one_thing_fills_a_small_picture(rng):
    scenes = [random_scene(rng, 1, 128) for _ in range(200)]
    assert all(91 <= 128 * scene.objects[0].size <= 117 for scene in scenes)
    assert {scene.objects[0].place for scene in scenes} == {"centre"}


def test_single_things_lie_everywhere(rng):
    places = {random_scene(rng, 1, 256).objects[0].place for _ in range(300)}
    assert places == set(PLACES)


def test_objects_come_in_reading_order(rng):
    for _ in range(100):
        pair, four = random_scene(rng, 2, 256), random_scene(rng, 4, 256)
        axis = "x" if pair.layout == "horizontal" else "y"
        assert getattr(pair.objects[0], axis) < getattr(pair.objects[1], axis)
        assert [item.place for item in four.objects] == ["top left", "top right", "bottom left", "bottom right"]


def test_held_out_scenes_never_occur_in_training(rng):
    scenes = [training_scene(rng, None, 256, "random") for _ in range(200)]
    assert not any(is_held_out(scene) for scene in scenes)


def test_training_sees_every_noun_style_and_most_pairings(rng):
    seen = [training_scene(rng, 1, 128, "random") for _ in range(3000)]
    assert {scene.objects[0].noun for scene in seen} == set(NAMES)
    held = [
        is_held_out(Scene((SceneObject(name, 0, 0.5, 0.5, 0.8),), Ground(), style))
        for name in NAMES
        for style in STYLES
    ]
    assert 0.1 < sum(held) / len(held) < 0.35


def test_a_pair_is_held_out_in_either_order(rng):
    for _ in range(100):
        scene = random_scene(rng, 2, 256)
        assert is_held_out(scene) == is_held_out(dataclasses.replace(scene, objects=scene.objects[::-1]))


def test_scenes_are_seeded():
    first, second = (
        [random_scene(numpy.random.default_rng(3), None, 256, "random") for _ in range(3)] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(("objects", "style"), [((), None), ((SceneObject("cat", 0, 0.5, 0.5, 0.5),) * 5, None)])
def test_scenes_of_no_or_five_things_are_refused(objects, style):
    with pytest.raises(ValueError, match="1 to 4 objects"):
        Scene(objects, Ground(), style)


def test_unknown_style_lists_the_choices():
    with pytest.raises(ValueError, match=r"'oil'.*pixel art"):
        Scene((SceneObject("cat", 0, 0.5, 0.5, 0.5),), Ground(), "oil")


def test_words_and_scenes_need_no_torch():
    code = "import sys; import diffaccel.miniatures.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# captions


@pytest.fixture(scope="module")
def captioned():
    rng = numpy.random.default_rng(11)
    rows = []
    for index in range(1200):
        scene = random_scene(
            rng, None, (128, 256, 512)[index % 3] if index % 2 else 256, "random" if index % 4 else None
        )
        rows.append((scene, *caption(scene, rng)))
    return rows


def test_captions_hold_the_words_their_truth_speaks_of(captioned):
    for scene, text, truth in captioned:
        assert [mention.term in text for mention in truth.mentions] == [True] * len(scene.objects)
        assert truth.style == scene.style
        if truth.ground_colour:
            assert f"{truth.ground_colour} " in text


def test_the_truth_is_true(captioned):
    for scene, _, truth in captioned:
        assert truth.layout == scene.layout
        assert truth.ground_colour in (None, scene.ground.colour)
        assert truth.ground_kind in (None, scene.ground.kind)
        for item, mention in zip(scene.objects, truth.mentions, strict=True):
            assert item.noun in mention.names
            assert mention.place in (None, item.place)
            assert mention.bulk in (None, item.bulk)


def test_relations_say_which_lies_where(captioned):
    pairs = [row for row in captioned if row[0].layout in ("horizontal", "vertical") and row[0].style is None]
    seen = set()
    for scene, text, truth in pairs:
        first, second = (text.find(mention.term) for mention in truth.mentions)
        backward = any(f" {word} " in text for word in ("right of", "below", "under"))
        assert (first > second) == backward
        across = any(f" {word} " in text for word in ("left of", "right of", "and"))
        assert across == (scene.layout == "horizontal")
        seen.add((scene.layout, backward))
    assert len(seen) == 4


def test_captions_use_synonyms_wider_words_and_leave_things_out(captioned):
    mentions = [mention for _, _, truth in captioned for mention in truth.mentions]
    assert any(mention.term in PARENTS for mention in mentions)
    assert any(len(mention.names) == 1 and mention.term not in NAMES for mention in mentions)
    singles = [truth for scene, _, truth in captioned if scene.layout == "single"]
    for value in ("ground_colour", "ground_kind"):
        assert {getattr(truth, value) is None for truth in singles} == {True, False}
    assert {truth.mentions[0].place is None for truth in singles} == {True, False}
    assert {truth.mentions[0].bulk for truth in singles} == {None, "small", "large"}


def test_a_style_is_always_told_and_none_never(captioned):
    marks = {
        style: [phrase.replace("{}", "").strip(" ,") for phrase in phrases] for style, phrases in STYLE_PHRASES.items()
    }
    for scene, text, _ in captioned:
        told = {style for style, phrases in marks.items() if any(phrase in text for phrase in phrases)}
        assert told == ({scene.style} if scene.style else set())


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_prompts_are_the_same_every_time_and_never_trained_on(kind):
    cases = held_out_prompts(kind, 30, seed=1)
    assert cases == held_out_prompts(kind, 30, seed=1)
    assert cases != held_out_prompts(kind, 30, seed=2)
    assert len({case.prompt for case in cases}) == 30
    assert all(is_held_out(case.scene) for case in cases)
    assert all(len(mention.names) == 1 for case in cases for mention in case.truth.mentions)


def test_held_out_prompts_keep_to_their_nouns():
    cases = held_out_prompts("pair", 20, names=CORE_NAMES)
    assert {item.noun for case in cases for item in case.scene.objects} <= set(CORE_NAMES)


@pytest.mark.parametrize(("kind", "count"), [("five", 3), ("single", -1)])
def test_bad_prompt_requests_are_refused(kind, count):
    with pytest.raises(ValueError, match="five" if count == 3 else "-1"):
        held_out_prompts(kind, count)


# pictures


@pytest.mark.parametrize("side", [128, 256])
def test_a_scene_fixes_its_picture(world, rng, side):
    for style in (None, *STYLES):
        scene = world.sample(rng, 2 if side == 256 else 1, side, style)
        picture = world.draw(scene, side)
        assert picture.shape == (side, side, 3)
        assert picture.dtype == numpy.uint8
        assert numpy.array_equal(picture, world.draw(scene, side))


def test_styles_change_the_picture_and_each_in_its_own_way(world, rng):
    scene = world.sample(rng, 1, 128)
    pictures = [world.draw(dataclasses.replace(scene, style=style), 128).astype(int) for style in (None, *STYLES)]
    for one, other in itertools.combinations(pictures, 2):
        assert numpy.abs(one - other).mean() > 4


def test_things_lie_where_the_scene_says(world):
    item = SceneObject("cat", 1, 0.25, 0.75, 0.3)
    picture = world.draw(Scene((item,)), 128)
    bare = world.draw(Scene((dataclasses.replace(item, x=0.75, y=0.25),)), 128)
    rows, columns = numpy.nonzero((picture != bare).any(2) & (numpy.arange(128)[:, None] > 64))
    assert abs(rows.mean() / 128 - 0.75) < 0.02
    assert abs(columns.mean() / 128 - 0.25) < 0.02
    assert abs((rows.max() - rows.min()) / 128 - 0.3) < 0.03


@pytest.mark.parametrize("kind", ["gradient", "striped", "checkered", "dotted", "cloudy"])
def test_grounds_differ(world, kind):
    item = SceneObject("cat", 0, 0.5, 0.5, 0.3)
    tones = ((200, 200, 200), (120, 120, 120))
    plain = world.draw(Scene((item,), Ground("plain", tones=((200, 200, 200), (190, 190, 190)))), 128).astype(int)
    other = world.draw(Scene((item,), Ground(kind, tones=tones)), 128).astype(int)
    assert numpy.abs(plain - other).mean() > 5


@pytest.mark.parametrize("damaged", damage.DAMAGES, ids=lambda function: function.__name__)
def test_damage_shows_and_forgiven_faults_hardly_do(world, rng, damaged):
    scene = Scene((SceneObject("cat", 0, 0.5, 0.5, 0.6),))
    drawn = damage.Drawn.of(world, scene, 128, rng)
    worst = (damaged(drawn) - drawn.picture).abs()
    assert worst.flatten(1).max() > 0.1
    assert (damage.soften(drawn) - drawn.picture).abs().mean() < worst.mean() + 0.06


# text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocabulary_words(), 32)


def test_every_word_is_one_token_and_comes_back(tokenizer, captioned):
    texts = [text for _, text, _ in captioned[:300]]
    ids = tokenize(tokenizer, texts)
    assert ids.shape == (300, 32)
    for text, row in zip(texts, ids, strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
        assert (row != tokenizer.eos_token_id).sum() < 31
    pieces = {piece for row in ids.tolist() for piece in tokenizer.convert_ids_to_tokens(row)}
    assert all(piece.endswith("</w>") or piece.startswith("<|") for piece in pieces)


def test_text_targets_say_what_the_caption_says(tokenizer, rng):
    batch = Batches(tokenizer, rng).draw(60)
    assert torch.allclose(batch.places.sum(-1), torch.ones(60, len(PLACES)))
    for ids, spoken, count, order, places in zip(
        batch.ids, batch.spoken, batch.count, batch.order, batch.places, strict=True
    ):
        filled = places[places.argmax(-1) != NOTHING]
        assert count[-1] == len(filled) == (order.sum(-1) > 0).sum()
        assert spoken[ids == tokenizer.eos_token_id].sum() == 0
        assert ((spoken.sum(-1) > 0) == ((count > 0) & (ids != tokenizer.eos_token_id))).all()
        assert torch.equal(filled.sum(0), order.sum(0))
    wider = place_targets(Truth((Mention("bird", names_of("bird")),), "single"))
    assert wider[PLACES.index("centre"), [NAMES.index(name) for name in children_of("bird")]].min() > 0


# judge


def reading_of(scene, **changes):
    seen = tuple(Seen(item.noun, item.artwork, item.x, item.y, item.size, 0.9) for item in scene.objects)
    found = WorldReading(seen, scene.style, scene.ground.colour, scene.ground.kind, 0.9)
    return dataclasses.replace(found, **changes)


def logits_of(scenes, side):
    """What a perfect network would answer."""
    targets = Targets(scenes, side)
    hit = 20.0 * torch.nn.functional.one_hot(targets.noun.clamp(min=0), len(NAMES)).permute(0, 3, 1, 2)
    art = 20.0 * torch.nn.functional.one_hot(targets.artwork.clamp(min=0), 2).permute(0, 3, 1, 2)
    whole = [20.0 * torch.nn.functional.one_hot(part.clamp(min=0), 8) for part in targets.whole.unbind(1)]
    names = ("style", "ground_colour", "ground_kind")
    widths = (len(STYLES) + 1, 8, 6)
    found = {name: part[:, :width] for name, part, width in zip(names, whole, widths, strict=True)}
    heat = torch.logit(targets.heat.clamp(1e-4, 1 - 1e-4))[:, None]
    return found | {"heat": heat, "noun": hit, "artwork": art, "box": targets.box, "validity": torch.ones(len(scenes))}


@pytest.mark.parametrize(("objects", "side"), [(1, 128), (1, 256), (2, 256), (3, 256), (4, 256)])
def test_a_perfect_network_is_read_without_fault(objects, side, rng):
    scenes = [random_scene(rng, objects, side, "random") for _ in range(40)]
    for found, scene in zip(readings(logits_of(scenes, side)), scenes, strict=True):
        assert compare(found, fully_told(scene)) == (True,) * 8
        seen = {item.noun: item for item in found.objects}
        for item in scene.objects:
            assert seen[item.noun].artwork == item.artwork
            assert abs(seen[item.noun].size - item.size) < 0.01
            assert abs(seen[item.noun].x - item.x) < 0.01


PAIR = Scene((SceneObject("cat", 0, 0.25, 0.5, 0.4), SceneObject("car", 0, 0.75, 0.5, 0.4)))
ONE = Scene((SceneObject("cat", 0, 0.7, 0.3, 0.56, 0.0, "large"),), Ground("striped", "blue"), "mosaic")


@pytest.mark.parametrize(
    ("scene", "changes", "wrong"),
    [
        (PAIR, {}, set()),
        (PAIR, {"objects": reading_of(PAIR).objects[:1]}, {"count", "nouns", "relation", "size"}),
        (PAIR, {"objects": tuple(Seen("dog", 0, x, 0.5, 0.4, 0.9) for x in (0.25, 0.75))}, {"nouns", "relation"}),
        (
            PAIR,
            {"objects": tuple(Seen(name, 0, x, 0.5, 0.4, 0.9) for name, x in (("cat", 0.75), ("car", 0.25)))},
            {"relation"},
        ),
        (PAIR, {"style": "mosaic"}, {"style"}),
        (PAIR, {"validity": 0.2}, {"valid"}),
        (ONE, {}, set()),
        (ONE, {"ground_kind": "dotted"}, {"ground"}),
        (ONE, {"style": None}, {"style"}),
        (ONE, {"objects": (Seen("cat", 0, 0.7, 0.3, 0.4, 0.9),)}, {"size"}),
        (ONE, {"objects": (Seen("cat", 0, 0.5, 0.5, 0.56, 0.9),)}, {"relation"}),
    ],
)
def test_the_verdict_names_what_is_wrong(scene, changes, wrong):
    rows = dict(zip(VERDICT_FIELDS, compare(reading_of(scene, **changes), fully_told(scene)), strict=True))
    assert {name for name, right in rows.items() if not right} == (wrong | {"correct"} if wrong else set())


def test_what_a_caption_leaves_out_is_never_wrong():
    bare = Truth((Mention("animal", names_of("animal")),), "single", "mosaic")
    assert compare(reading_of(ONE), bare) == (True,) * 8
    assert not compare(reading_of(ONE), dataclasses.replace(bare, mentions=(Mention("car", ("car",)),)))[1]


def test_sizes_are_read_by_the_side_of_the_picture():
    seen = (Seen("cat", 0, 0.5, 0.5, 0.43, 0.9),)
    truth = Truth((Mention("cat", ("cat",), None, "large"),), "single", "mosaic")
    assert [compare(reading_of(ONE, objects=seen, side=side), truth)[4] for side in (256, 512)] == [False, True]


def test_judge_takes_pictures_of_any_size_and_refuses_other_numbers(rng):
    judge = WorldJudge(WorldJudgeNetwork((8, 16, 24), 1))
    case = held_out_prompts("single", 1)[0]
    assert len(judge.read(torch.rand(3, 3, 128, 128))) == 3
    assert judge.read([]) == []
    assert judge.score([Image.new("RGB", (512, 512))], [case]).correct.shape == (1,)
    assert [as_tensor(torch.zeros(1, 3, side, side)).shape[-1] for side in (64, 128, 200, 256, 512)] == [
        128,
        128,
        256,
        256,
        256,
    ]
    assert judge.features(torch.rand(2, 3, 256, 256)).shape == (2, 48)
    with pytest.raises(ValueError, match="1 pictures but 2 prompts"):
        judge.score(torch.zeros(1, 3, 128, 128), [case, case])
    with pytest.raises(ValueError, match="shape"):
        judge.read(torch.zeros(1, 1, 128, 128))


def test_judge_of_another_list_of_nouns_is_refused(tmp_path):
    (tmp_path / "judge.json").write_text(json.dumps({"channels": [8, 16, 24], "depth": 1, "nouns": 3}))
    with pytest.raises(ValueError, match="3 nouns"):
        WorldJudge.load(tmp_path)


def test_saved_judge_reads_alike(tmp_path):
    network = WorldJudgeNetwork()
    save_judge(network, tmp_path, {})
    picture = torch.rand(1, 3, 128, 128)
    (old,), (new,) = WorldJudge(network).read(picture), WorldJudge.load(tmp_path).read(picture)
    assert old.validity == pytest.approx(new.validity, abs=0.02)
    assert (tmp_path / "judge.safetensors").stat().st_size < 6 * 1024 * 1024


def test_judge_learns_nothing_of_grounds_that_styles_hide():
    hidden = dataclasses.replace(ONE, style="neon sign")
    assert whole_classes(hidden)[1:] == [-100, -100]
    assert whole_classes(ONE)[1:] == [3, 2]


def test_judge_loss_falls_when_answers_get_right(rng):
    scenes = [random_scene(rng, 2, 256, "random") for _ in range(4)]
    targets, sound, bare = Targets(scenes, 256), torch.ones(4), torch.zeros(4, dtype=torch.bool)
    right = logits_of(scenes, 256)
    wrong = {name: part.roll(1, 0) for name, part in right.items()}
    assert judge_loss(right, targets, sound, bare) < judge_loss(wrong, targets, sound, bare) - 1
    assert right["heat"].shape[-1] == 256 // CELL


def test_batches_mark_what_is_damaged_and_what_is_bare(world, rng):
    pictures, targets, sound, bare = JudgeBatches(world, Pool({128: [], 256: []}), rng).draw(0)
    assert pictures.shape == (32, 3, 128, 128)
    assert targets.heat.shape == (32, 8, 8)
    assert 0 < sound.sum() < 32
    assert not (bare & sound.bool()).any()
    spoilt = Row(world.sample(rng), torch.full((3, 128, 128), 2.0), sound=False)
    pictures, _, sound, _ = JudgeBatches(world, Pool({128: [spoilt], 256: []}), rng).draw(0)
    pooled = pictures.flatten(1).min(1).values == 2
    assert pooled.any()
    assert not sound[pooled].any()


# evaluation


class Shown:
    """A judge that sees what each prompt asks for, with the drawing that the round of seeds says."""

    def __init__(self, cases, artworks, noun=None):
        self.cases, self.rounds, self.noun = cases, iter(artworks), noun

    def read(self, images):
        artwork = next(self.rounds)
        things = [case.scene.objects[0] for case in self.cases]
        return [
            WorldReading((Seen(self.noun or item.noun, artwork, 0.5, 0.5, 0.5, 0.9),), None, "grey", "plain", 0.9)
            for item in things
        ]


@pytest.mark.parametrize(
    ("artworks", "noun", "pairs", "mean"),
    [((0, 1, 0, 1), None, 18, 0.6667), ((1, 1, 1, 1), None, 18, 0.0), ((0, 1, 0, 1), "nothing", 0, None)],
)
def test_openness_counts_different_drawings_of_the_right_thing(artworks, noun, pairs, mean):
    make = Maker(FakePipe(), Plan(side=128))
    cases = make.plan.cases("single", 3, OPEN_SEED)
    found = openness(make, Shown(cases, artworks, noun), 3, 2.0)
    assert found["pairs"] == pairs
    assert found.get("mean") == mean


class FakePipe:
    """Notes the seeds it is called with; its pictures are black."""

    class scheduler:
        config = DDIMScheduler().config

    def __init__(self):
        self.seeds = []

    def __call__(self, prompts, *, height, width, generator, num_inference_steps, guidance_scale, output_type):
        self.seeds += [one.initial_seed() for one in generator]
        return SimpleNamespace(images=torch.zeros(len(prompts), 3, height, width))


def test_a_pictures_seed_does_not_depend_on_the_batch():
    seeds = []
    for batch in (2, 5):
        pipe = FakePipe()
        assert Maker(pipe, Plan(128, batch))(["a cat"] * 5, 2.0, seed=3).shape == (5, 3, 128, 128)
        seeds.append(pipe.seeds)
    assert seeds[0] == seeds[1] == [300_000 + index for index in range(5)]


def test_the_best_scale_has_most_pictures_right_in_everything():
    rows = [
        {"guidance": scale, "single_correct": single, "style_correct": style, "pair_correct": pair}
        for scale, single, style, pair in ((1.0, 0.9, 0.2, 0.1), (3.0, 0.6, 0.5, 0.4), (6.0, 0.5, 0.5, 0.3))
    ]
    assert best_scale(rows) == 3.0


def test_figures_by_style():
    cases = held_out_prompts("style", 40)
    rows = [compare(reading_of(case.scene, style=None), case.truth) for case in cases]
    found = by_style(WorldVerdict(*torch.tensor(rows).unbind(1)), cases)
    assert sum(row["prompts"] for row in found.values()) == 40
    assert {(row["nouns"], row["style"]) for row in found.values()} == {(1.0, 0.0)}


def test_cases_are_plain_data():
    case = held_out_prompts("pair", 1)[0]
    assert isinstance(case, WorldCase)
    assert json.dumps(dataclasses.asdict(case))


def test_a_version_without_the_judge_says_so(monkeypatch, tmp_path):
    from diffaccel.errors import DiffaccelError
    from diffaccel.miniatures import world

    monkeypatch.setattr(world, "JUDGE_FOLDER", tmp_path)
    with pytest.raises(DiffaccelError, match="the judge of the world is still in training"):
        world.load_judge()

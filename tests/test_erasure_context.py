"""Erasing on whole prompts: sorting them, the weights of both sides, and what it does to the bundled model."""

from __future__ import annotations

import random

import pytest
import torch

import diffaccel
from diffaccel.erasure import Concept, ErasureError, LostKeep
from diffaccel.erasure.prompts import sort_prompts
from diffaccel.erasure.proof.recording import Drawing, draw
from diffaccel.miniatures import load_judge, load_miniature, scenes

CIRCLE = Concept(target="circle", synonyms=(("disc", 1.0),), anchor="square")


def captions(count, seed):
    rng = random.Random(seed)
    return [scenes.caption(scene, rng) for scene in (scenes.training_scene(rng) for _ in range(count))]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_miniature("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def edit(pipe):
    return diffaccel.erase(pipe, [CIRCLE], prompts=captions(400, 1), method="context", general=False)


def rows(pipe, prompts):
    """(prompts, tokens, width) text rows as the UNet reads them, float64."""
    ids = pipe.tokenizer(
        prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0].double()


# --- sorting prompts ---


def test_prompts_are_sorted_by_what_they_name():
    found = sort_prompts(
        [
            "a red Circle",
            "a  blue star",
            "two discs on grey",
            "a circle above a disc",
            "a circle in a circle",
            "a star",
        ],
        [CIRCLE],
    )
    assert found.templates == ("a red {}", "two {} on grey")
    assert found.others == ("a blue star", "a star")
    assert found.left_out == 2


def test_words_that_only_begin_alike_are_other_words():
    assert sort_prompts(["a circlet", "encircled"], [CIRCLE]).others == ("a circlet", "encircled")


def test_names_of_several_words():
    concept = Concept(target="Van Gogh", anchor="art")
    assert sort_prompts(["a van gogh painting", "a van"], [concept]).templates == ("a {} painting",)


@pytest.mark.parametrize("prompts", ["a red circle", [""], ["a {} here"], ["  "]])
def test_what_is_no_list_of_prompts_is_refused(pipe, prompts):
    with pytest.raises(ErasureError, match=r"prompts is a list|cannot be used as a prompt"):
        diffaccel.erase(pipe, [CIRCLE], prompts=prompts, method="context")


def test_without_an_anchor_the_sentence_loses_the_concept(pipe):
    """Row by row: what stands before stays, the concept meets what takes its place, the rest moves up."""
    found = diffaccel.erase(
        pipe,
        ["circle"],
        anchor="",
        prompts=["a circle on grey", "a star", "a blue ring"],
        general=False,
        paddings=None,
        erase_weight=1000.0,
        ridge=1e-4,
        check=False,
    )
    own, without = rows(pipe, ["a circle on grey", "a on grey"])
    low = found.maps[0]
    moved = own + (own @ low.right.double().T) @ low.left.double().T
    used = [2, 3, 4]
    wanted = torch.stack([without[2], without[2], without[3]])
    assert (moved[used] - wanted).norm() < 0.1 * (own[used] - wanted).norm()


def test_templates_and_prompts_exclude_each_other(pipe):
    with pytest.raises(ErasureError, match="give templates, or prompts that name the concepts, but not both"):
        diffaccel.erase(pipe, [CIRCLE], prompts=["a circle"], method="context", templates=("a {}",))


def test_prompts_about_other_things_only(pipe):
    """They are preserved, and the contexts are the method's own."""
    found = diffaccel.erase(pipe, [CIRCLE], prompts=["a blue star", "a red heart"], method="context", general=False)
    own = diffaccel.erase(
        pipe, [CIRCLE], keep=["a blue star", "a red heart"], method="context", general=False, named_templates=()
    )
    assert torch.equal(found.maps[0].left, own.maps[0].left)
    assert torch.equal(found.maps[0].right, own.maps[0].right)


def test_prompts_work_with_the_published_forms_too(pipe):
    plain = diffaccel.erase(pipe, [CIRCLE], method="uce")
    found = diffaccel.erase(pipe, [CIRCLE], prompts=captions(40, 3), method="uce", check=False)
    assert found.diagnostics["sequence"]["kept"] > plain.diagnostics["sequence"]["kept"]
    assert found.diagnostics["sequence"]["targets"] != plain.diagnostics["sequence"]["targets"]


# --- the solution ---


def test_it_is_the_balanced_least_squares_solution(pipe):
    """Every row of every context against its counterpart, every row of the rest, and the weights of both sides as asked."""
    prompts = ["a red circle", "a circle on grey", "a star", "a blue ring", "a small heart"]
    found = diffaccel.erase(
        pipe,
        [Concept(target="circle", anchor="square")],
        prompts=prompts,
        method="context",
        general=False,
        paddings=None,
        keep_empty=False,
        ridge=0.05,
        erase_weight=2.0,
    )
    target, anchor = (
        rows(pipe, [prompt.replace("circle", word) for prompt in prompts[:2]])[:, 1:].flatten(0, 1)
        for word in ("circle", "square")
    )
    keep = rows(pipe, prompts[2:])[:, 1:].flatten(0, 1)
    weight = 2 * len(keep) / len(target)
    # sum w |M t - a|^2 + sum |M k - k|^2 + ridge |M - 1|^2, as one dense regression on stacked rows
    size = keep.shape[1]
    inputs = torch.cat([weight**0.5 * target, keep, 0.05**0.5 * torch.eye(size, dtype=torch.float64)])
    outputs = torch.cat([weight**0.5 * anchor, keep, 0.05**0.5 * torch.eye(size, dtype=torch.float64)])
    expected = torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution.T
    mine = torch.eye(size, dtype=torch.float64) + found.maps[0].left.double() @ found.maps[0].right.double()
    torch.testing.assert_close(mine, expected, atol=2e-4, rtol=0)
    assert (mine - torch.eye(size)).abs().max() > 0.1


def test_unseen_prompts_go_where_they_should(pipe, edit):
    fresh = captions(300, 77)
    split = sort_prompts(fresh, [CIRCLE])
    target, anchor = (rows(pipe, [t.replace("{}", word) for t in split.templates]) for word in ("circle", "square"))
    keep = rows(pipe, list(split.others))
    left, right = edit.maps[0].left.double(), edit.maps[0].right.double()

    def change(x):
        return (x @ right.T) @ left.T

    assert (target + change(target) - anchor).norm() < 0.45 * (target - anchor).norm()
    assert change(keep).norm() < 0.2 * (keep - keep.mean((0, 1))).norm()


def test_order_does_not_matter(pipe):
    prompts = captions(60, 5)
    concepts = [CIRCLE, Concept(target="star", anchor="ring")]
    first = diffaccel.erase(pipe, concepts, prompts=prompts, method="context", general=False)
    second = diffaccel.erase(pipe, concepts[::-1], prompts=prompts[::-1], method="context", general=False)
    assert first.digest == second.digest


# --- the shortest call ---


def seen_in(pipe, judge, prompts, steps=6):
    pictures = draw(pipe, prompts, Drawing(steps=steps, guidance=2.5, batch_size=8))
    return [{(item.colour, item.shape) for item in reading.scene.objects} for reading in judge.read(pictures)]


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.mark.parametrize("model", ["shapes-sd", "shapes-sd3"])
@pytest.mark.parametrize("concept", ["circle", "star", "ring", "red"])
def test_the_shortest_call_erases(pipe, judge, model, concept):
    used = pipe if model == "shapes-sd" else load_miniature(model)
    used.set_progress_bar_config(disable=True)
    edit = diffaccel.erase(used, concept)
    assert edit.effect.moved[concept] > 0.5
    named = (
        [f"a {concept} heart", f"a {concept} square"] if concept == "red" else [f"a red {concept}", f"a blue {concept}"]
    )
    diffaccel.apply_edit(used, edit)
    try:
        *erased, kept = seen_in(used, judge, [*named, "a green triangle"])
    finally:
        diffaccel.remove_edit(used, edit)
    assert not any(concept in item for found in erased for item in found)
    assert kept == {("green", "triangle")}


def test_what_the_user_keeps_outweighs_everyday_words(pipe, judge):
    keep = ["blue circle", "green star", "blue heart"]
    edit = diffaccel.erase(pipe, "blue star", anchor="red heart", keep=keep, check=False)
    diffaccel.apply_edit(pipe, edit)
    try:
        found = seen_in(pipe, judge, ["a blue star", *(f"a {text}" for text in keep)])
    finally:
        diffaccel.remove_edit(pipe, edit)
    assert found == [{("red", "heart")}, {("blue", "circle")}, {("green", "star")}, {("blue", "heart")}]


def test_a_keep_that_is_lost_is_named(pipe):
    options = {
        "anchor": "red heart",
        "keep": ["blue circle"],
        "named_weight": 0.0,
        "named_templates": (),
        "check": False,
    }
    with pytest.warns(LostKeep, match=r"^'blue circle' could not be kept: it moves \d+% as far as what is erased"):
        diffaccel.erase(pipe, "blue star", **options)


@pytest.mark.slow
def test_circles_are_gone_and_the_rest_is_not(pipe, edit):
    judge = load_judge()
    prompts = [f"a {colour} {word}" for word in ("circle", "disc", "star", "heart") for colour in ("red", "blue")]

    def drawn():
        images = pipe(
            prompts,
            num_inference_steps=8,
            guidance_scale=2.5,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="pt",
        ).images
        return [[item.shape for item in reading.scene.objects] for reading in judge.read(images)]

    assert drawn()[:4] == [["circle"]] * 4
    diffaccel.apply_edit(pipe, edit)
    try:
        after = drawn()
    finally:
        diffaccel.remove_edit(pipe, edit)
    assert not any("circle" in shapes for shapes in after)
    assert after[4:] == [["star"]] * 2 + [["heart"]] * 2


# --- hardening ---


def product(edit):
    return edit.maps[0].left.double() @ edit.maps[0].right.double()


def test_hardening_is_that_of_rece_with_the_balanced_weight(pipe):
    prompts = captions(30, 4)
    found = diffaccel.erase(pipe, [CIRCLE], prompts=prompts, method="context", general=False, rounds=2)
    made = found.diagnostics["sequence"]
    by_hand = diffaccel.erase(
        pipe,
        [CIRCLE],
        prompts=prompts,
        method="rece",
        general=False,
        rounds=2,
        tokens="all",
        keep_tokens="all",
        paddings=8,
        erase_weight=made["row_weight"],
    )
    assert torch.allclose(product(found), product(by_hand), atol=1e-6)
    assert made["attack_columns"] == by_hand.diagnostics["sequence"]["attack_columns"] > 0
    assert len(made["attack_error"]) == 2


def test_it_is_not_hardened_unless_asked(pipe):
    prompts = captions(30, 4)
    plain = diffaccel.erase(pipe, [CIRCLE], prompts=prompts, method="context", general=False)
    hard = diffaccel.erase(pipe, [CIRCLE], prompts=prompts, method="context", general=False, rounds=1)
    assert plain.parameters["rounds"] == 0
    assert "attack_error" not in plain.diagnostics["sequence"]
    assert not torch.allclose(product(plain), product(hard), atol=1e-2)

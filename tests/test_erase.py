"""erase(pipe, concepts): what the edits do to text, on tiny pipelines of every family and on the bundled model."""

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch
from tiny_text import KINDS, LIMIT, encode, tiny_text_pipeline

import diffaccel
from diffaccel.edits.concepts import escaped, mentions, names_in, settle
from diffaccel.edits.effect import way
from diffaccel.erasure import SPEED, UCE, Concept, ConceptList, ErasureError, ErasureWarning, WeakErasure, read_concepts
from diffaccel.erasure.kinds import KINDS as KINDS_OF_THINGS
from diffaccel.erasure.kinds import stand_in
from diffaccel.errors import DiffaccelError, Unsupported

METHODS = ("uce", "rece", "speed", "mace")
KEEP = ("square", "blue star")
SMALL = {"general": False, "templates": ("{}",)}  # 16 columns leave no room for two hundred everyday words
STRONG = {
    "uce": {**SMALL, "ridge": 1e-4},
    "rece": {**SMALL, "ridge": 1e-4, "attack_tokens": "last", "rounds": 0},
    "speed": {**SMALL, "ridge": 1e-4, "threshold": 1e-6, "prior_filter": False, "augment": 0, "centres": 1},
    "mace": {**SMALL, "ridge": 1e-4, "keep_tokens": "last"},
}


@pytest.fixture(scope="module")
def pipes():
    return {kind: tiny_text_pipeline(kind) for kind in KINDS}


def erase(pipe, concepts=("circle",), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ErasureWarning)
        return diffaccel.erase(pipe, concepts, **{"check": False, **options})


def dense(text_map) -> torch.Tensor:
    return torch.eye(len(text_map.left)).double() + text_map.left.double() @ text_map.right.double()


def row(pipe, kind, text: str, index: int, route: str = "sequence") -> torch.Tensor:
    rows, pooled = encode(pipe, kind, text)
    return (rows[index] if route == "sequence" else pooled).double()


def word(pipe, kind, text: str, route: str = "sequence") -> torch.Tensor:
    """The row of its last token."""
    tokenizer = pipe.tokenizer_2 if kind == "flux" else pipe.tokenizer
    return row(pipe, kind, text, len(tokenizer(text).input_ids) - 2, route)


def parameters(pipe) -> dict[str, torch.Tensor]:
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return {f"{i}.{k}": v.clone() for i, part in enumerate(networks) for k, v in part.state_dict().items()}


# --- what every edit is ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_moves_text_and_leaves_the_pipeline_alone(pipes, kind, method):
    pipe = pipes[kind]
    before, dice = parameters(pipe), torch.random.get_rng_state()
    edit = erase(pipe, keep=KEEP, method=method, **STRONG[method])
    assert torch.equal(torch.random.get_rng_state(), dice)
    after = parameters(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m.route for m in edit.maps] == ["sequence", *(["pooled"] if encode(pipe, kind, "")[1] is not None else [])]
    for text_map in edit.maps:
        moved = edit.diagnostics[text_map.route]["strength"]["circle"]
        assert moved > 0.05, (text_map.route, edit.diagnostics)
        assert text_map.left.shape[0] == 16 >= text_map.left.shape[1]
    assert erase(pipe, keep=KEEP, method=method, **STRONG[method]).digest == edit.digest


@pytest.mark.parametrize("method", ["uce", "speed"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_become_their_anchors(pipes, kind, method):
    """Measured on what the pipeline itself encodes, through the projection with its bias."""
    pipe = pipes[kind]
    edit = erase(pipe, keep=["square"], anchor="shape", method=method, **STRONG[method])
    for text_map in edit.maps:
        target, anchor = (word(pipe, kind, text, text_map.route) for text in ("circle", "shape"))
        assert float((target - anchor).norm() / anchor.norm()) > 0.1
        torch.testing.assert_close(dense(text_map) @ target, anchor, rtol=0, atol=0.02 * float(anchor.norm()))
        kept = word(pipe, kind, "square", text_map.route)
        torch.testing.assert_close(dense(text_map) @ kept, kept, rtol=0, atol=0.02 * float(kept.norm()))


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
def test_biased_projections_give_the_anchor_s_output(kind):
    pipe = tiny_text_pipeline(kind)
    edit = erase(pipe, keep=["square"], anchor="shape", method="speed", **STRONG["speed"])
    name = edit.modules[0].name
    home, path = name.split(".", 1)
    layer = getattr(pipe, home).get_submodule(path)
    words = {text: word(pipe, kind, text).float() for text in ("circle", "shape", "square")}
    with torch.no_grad():
        before = {text: layer(value) for text, value in words.items()}
        bias = layer.bias.clone()
        diffaccel.apply_edit(pipe, edit)
        after = {text: layer(value) for text, value in words.items()}
    assert torch.equal(layer.bias, bias)
    size = float(before["shape"].norm())
    assert float((before["circle"] - before["shape"]).norm()) > 0.1 * size
    assert float((after["circle"] - before["shape"]).norm()) < 0.02 * size
    assert float((after["square"] - before["square"]).norm()) < 0.02 * size


@pytest.mark.parametrize("kind", KINDS)
def test_start_token_and_empty_prompt_do_not_move(pipes, kind):
    pipe = pipes[kind]
    edit = erase(pipe, keep=KEEP, anchor="shape", method="speed", **STRONG["speed"])
    sequence = dense(edit.maps[0])
    if not kind.startswith(("flux", "pixart")):
        start = row(pipe, kind, "", 0)
        assert float((sequence @ start - start).norm()) < 1e-5 * float(start.norm())
    empty = encode(pipe, kind, "")[0].double()
    ends = {"sd": LIMIT, "sdxl": LIMIT, "sd3": LIMIT, "sd3-no-t5": LIMIT, "flux": 512, "pixart": 1}
    centre = empty[0 if kind in ("flux", "pixart") else 1 : ends[kind]].mean(0)
    assert float((sequence @ centre - centre).norm()) < 1e-5 * float(centre.norm())
    for text_map in edit.maps[1:]:
        pooled = row(pipe, kind, "", 0, "pooled")
        assert float((dense(text_map) @ pooled - pooled).norm()) < 1e-5 * float(pooled.norm())


def test_the_columns_that_clip_leaves_empty_stay_empty(pipes):
    edit = erase(pipes["sd3-no-t5"], keep=KEEP, method="uce", **STRONG["uce"])
    assert float(edit.maps[0].left[12:].abs().max()) == 0
    assert float(edit.maps[0].right[:, 12:].abs().max()) == 0
    assert any("text_encoder_3" in leak for leak in edit.leaks)
    assert not any("text_encoder_3" in leak for leak in erase(pipes["sd3"], method="uce", **STRONG["uce"]).leaks)


# --- order ---


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_what_was_asked_does_not_change_a_byte(pipes, method):
    concepts = [
        Concept(target="circle", synonyms=(("disc", 0.5), ("round shape", 2.0))),
        Concept(target="dog"),
        Concept(target="red heart", anchor="tree"),
    ]
    options = {**STRONG[method], "templates": ("{}", "a photo of {}")}
    first = None
    for order in itertools.permutations(range(3)):
        asked = [concepts[i] for i in order]
        asked = [c.model_copy(update={"synonyms": c.synonyms[::-1]}) for c in asked] if order[0] else asked
        again = [Concept(**c.model_dump()) for c in asked]
        options["templates"] = options["templates"][::-1]
        edit = erase(pipes["sd"], again, keep=KEEP[:: 1 if order[0] else -1], method=method, **options)
        first = first or edit
        assert edit.digest == first.digest
        assert edit.diagnostics == first.diagnostics
    assert [c.target for c in first.concepts] == ["circle", "dog", "red heart"]


# --- concepts ---


def test_synonyms_go_with_their_concept_and_neighbours_stay(pipes):
    pipe = pipes["sd"]
    plain = erase(pipe, keep=KEEP, anchor="shape", method="uce", **STRONG["uce"])
    wide = erase(
        pipe, [Concept(target="circle", synonyms=("disc",))], keep=KEEP, anchor="shape", method="uce", **STRONG["uce"]
    )
    goal, disc = word(pipe, "sd", "shape"), word(pipe, "sd", "disc")
    left = [float((dense(edit.maps[0]) @ disc - goal).norm() / (disc - goal).norm()) for edit in (plain, wide)]
    assert left[1] < 0.05
    assert left[0] > 0.3


def test_a_heavier_synonym_is_erased_more(pipes):
    found = []
    for weight in (0.01, 1.0, 100.0):
        concept = Concept(target="circle", synonyms=(("disc", weight),))
        edit = erase(pipes["sd"], [concept], keep=KEEP, anchor="shape", method="uce", **SMALL, ridge=5.0)
        goal, disc = word(pipes["sd"], "sd", "shape"), word(pipes["sd"], "sd", "disc")
        found.append(float((dense(edit.maps[0]) @ disc - goal).norm()))
    assert found[0] > found[1] > found[2]


def test_concepts_of_several_tokens_follow_the_policy(pipes):
    pipe, options = pipes["sd"], STRONG["uce"]
    helicopter = row(pipe, "sd", "helicopter", 1), row(pipe, "sd", "", 1)
    for tokens, moved in (("last", False), ("span", True)):
        edit = erase(pipe, ["helicopter"], method="uce", **options, tokens=tokens)
        many = len(pipe.tokenizer("helicopter").input_ids) - 2
        assert many > 3
        assert edit.diagnostics["sequence"]["targets"] == (1 if tokens == "last" else many)
        first, goal = helicopter
        share = float((dense(edit.maps[0]) @ first - goal).norm() / (first - goal).norm())
        assert (share < 0.2) == moved, share


def test_the_tail_policy_erases_what_follows_too(pipes):
    pipe = pipes["sd"]
    pad, empty = row(pipe, "sd", "circle", LIMIT - 1), row(pipe, "sd", "", LIMIT - 1)
    left = []
    for tokens in ("last", "tail"):
        edit = erase(pipe, keep=KEEP, method="uce", **{**STRONG["uce"], "tokens": tokens})
        left.append(float((dense(edit.maps[0]) @ pad - empty).norm() / (pad - empty).norm()))
    assert left[1] < 0.6 * left[0]


def test_mace_edits_the_context_and_leaves_the_phrase_to_others(pipes):
    edit = erase(pipes["sd"], keep=KEEP, method="mace", **STRONG["mace"])
    assert any("words of the concept itself" in leak for leak in edit.leaks)
    every = erase(pipes["sd"], keep=KEEP, method="mace", **STRONG["mace"], tokens="all")
    assert every.diagnostics["sequence"]["targets"] == edit.diagnostics["sequence"]["targets"] + 1
    assert not any("words of the concept itself" in leak for leak in every.leaks)


REFUSED = [
    ([], {}, "no concept to erase"),
    ([""], {}, "at least one word"),
    (["!?"], {}, "at least one word"),
    ([7], {}, "a concept is a text or a Concept, not int"),
    (["circle", Concept(target="Circle", anchor="dog")], {}, "erased twice"),
    ([Concept(target="circle", synonyms=("disc",)), "disc"], {}, "erased twice"),
    (["circle"], {"keep": ["a red circle"]}, "'a red circle' cannot be kept while 'circle' is erased"),
    ([Concept(target="circle", synonyms=("disc",))], {"keep": ["Discs"]}, "cannot be kept"),
    (["circle"], {"keep": "square"}, "keep is a list"),
    (["circle"], {"keep": [3]}, "a keep is a text, not int"),
    (["circle"], {"anchor": "a circle"}, "the anchor 'a circle' names 'circle'"),
    (["circle", Concept(target="dog", anchor="circle")], {}, "names 'circle'"),
    (["circle " * 40], {}, "cuts off after 32"),
    (["circle"], {"method": "esd"}, "no erasure method 'esd': choose uce, rece, speed, mace"),
    (["circle"], {"method": "uce", "threshold": 0.1}, "uce: threshold"),
    (["circle"], {"method": "uce", "ridge": 0}, "uce: ridge"),
    (["circle"], {"method": "uce", "ridge": float("nan")}, "uce: ridge"),
    (["circle"], {"method": "uce", "templates": ["no gap"]}, "exactly one"),
    (["circle"], {"method": "uce", "templates": []}, "at least one template"),
    (["circle"], {"method": "uce", "templates": ["x{}"]}, "melt"),
    (["circle"], {"method": "speed", "directions": 3, "threshold": 1.0}, "not both"),
    (["circle"], {"method": "speed", "strength": 0.9, "ridge": 1.0}, "not both"),
    (["circle"], {"method": UCE(), "ridge": 1.0}, "beside a complete UCE"),
]


@pytest.mark.parametrize(("concepts", "options", "message"), REFUSED)
def test_requests_that_make_no_sense_are_refused(pipes, concepts, options, message):
    with pytest.raises(ErasureError, match=message) as caught:
        diffaccel.erase(pipes["sd"], concepts, **options)
    assert isinstance(caught.value, DiffaccelError)
    assert "\n" not in str(caught.value)


def test_everyday_words_that_name_a_target_are_not_preserved(pipes):
    kept = [erase(pipes["sd"], [word], method="uce").diagnostics["sequence"]["kept"] for word in ("zzz", "dog")]
    assert kept[0] > 150
    assert kept[1] == kept[0] - 2  # "dog" and "a dog running on the beach"
    assert mentions("two Red Hearts", "red heart")
    assert not mentions("a redhead", "red")


def test_settling_is_idempotent():
    concepts, keep = settle(["dog", "circle"], ["b", "a", "a"], "shape")
    assert keep == ("a", "b")
    assert [c.anchor for c in concepts] == ["shape", "shape"]
    assert settle(concepts, keep, None) == (concepts, keep)


# --- concept files ---


def test_a_concept_file_is_read(tmp_path, pipes):
    file = tmp_path / "concepts.json"
    entries = ["dog", {"target": "circle", "synonyms": ["round shape", ["disc", 0.5]], "anchor": "tree"}]
    file.write_text(json.dumps({"concepts": entries, "keep": ["square"], "anchor": "shape"}))
    found = read_concepts(file)
    assert found.concepts[1].synonyms == (("disc", 0.5), ("round shape", 1.0))
    options = {"method": "uce", **STRONG["uce"]}
    edit = erase(pipes["sd"], found, keep=["star"], **options)
    assert edit.keep == ("square", "star")
    assert {c.target: c.anchor for c in edit.concepts} == {"dog": "shape", "circle": "tree"}
    by_hand = erase(pipes["sd"], list(found.concepts), keep=["square", "star"], anchor="shape", **options)
    assert by_hand.digest == edit.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a concept file"),
        ("{}", "concepts: Field required"),
        ('{"concepts": "dog"}', "concepts"),
        ('{"concepts": ["dog"], "kepe": []}', "kepe"),
        ('{"concepts": [{"target": " "}]}', "at least one word"),
        ('{"concepts": [{"target": "dog", "synonyms": "puppy"}]}', "synonyms"),
        ('{"concepts": [{"target": "dog", "synonyms": [["puppy", -1]]}]}', "synonyms"),
        ('{"concepts": [{"target": "dog", "synonyms": [["puppy", NaN]]}]}', "synonyms"),
        ('{"concepts": [7]}', "concepts.0"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    file = tmp_path / "concepts.json"
    file.write_text(text)
    with pytest.raises(ErasureError, match=message):
        read_concepts(file)


def test_a_huge_or_binary_concept_file_is_refused(tmp_path):
    file = tmp_path / "concepts.json"
    file.write_bytes(b" " * 4_000_001)
    with pytest.raises(ErasureError, match="too large"):
        read_concepts(file)
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ErasureError, match="not JSON"):
        read_concepts(file)


def test_a_list_of_concepts_needs_something_to_erase(pipes):
    with pytest.raises(ErasureError, match="no concept"):
        diffaccel.erase(pipes["sd"], ConceptList(concepts=()))


# --- which projections ---


@pytest.mark.parametrize(
    ("method", "options", "leaves"),
    [
        ("speed", {}, {"to_v"}),
        ("speed", {"projections": "keys"}, {"to_k"}),
        ("speed", {"projections": "keys and values"}, {"to_k", "to_v"}),
        ("uce", {}, {"to_k", "to_v"}),
        ("uce", {"projections": "values"}, {"to_v"}),
    ],
)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_keys_and_values_are_chosen(pipes, kind, method, options, leaves):
    edit = erase(pipes[kind], keep=KEEP, method=method, **STRONG[method], **options)
    assert {module.name.split(".")[-1] for module in edit.maps[0].modules} == leaves
    assert all(".attn2." in module.name for module in edit.maps[0].modules)
    counts = {name: sum(m.name.endswith(name) for m in edit.maps[0].modules) for name in leaves}
    sites = sum(name.endswith("attn2") for name, _ in pipes[kind].unet.named_modules())
    assert set(counts.values()) == {sites}


def test_where_there_is_no_choice_it_is_refused(pipes):
    for kind in ("sd3", "flux", "pixart"):
        with pytest.raises(Unsupported, match="no choice of keys or values"):
            diffaccel.erase(pipes[kind], ["circle"], projections="values")


def test_the_pooled_path_of_sdxl_is_edited_or_told_as_a_leak(pipes):
    edit = erase(pipes["sdxl"], keep=KEEP, anchor="shape", method="uce", **STRONG["uce"])
    (module,) = edit.maps[1].modules
    assert module.name == "unet.add_embedding.linear_1"
    assert (module.columns, module.shape[1]) == ((0, 16), 16 + 6 * 4)
    assert edit.leaks == ()
    partial = erase(pipes["sdxl"], keep=KEEP, anchor="shape", method="uce", **STRONG["uce"], pooled=False)
    assert [text_map.route for text_map in partial.maps] == ["sequence"]
    assert any("pooled text vector still carries" in leak for leak in partial.leaks)
    assert torch.equal(partial.maps[0].left, edit.maps[0].left)


def test_encoders_side_by_side_are_balanced(pipes):
    loud = tiny_text_pipeline("sdxl")
    with torch.no_grad():  # the rows of the second encoder a thousand times as long
        for block in loud.text_encoder_2.text_model.encoder.layers[-2].mlp.fc2.parameters():
            block.mul_(1000)
    shares = {}
    for balance in (True, False):
        edit = erase(loud, keep=KEEP, method="uce", **{**STRONG["uce"], "ridge": 1e-2}, balance=balance)
        low = edit.maps[0]
        target = row(loud, "sdxl", "circle", 1)
        quiet = low.right.double()[:, :4] @ target[:4]
        shares[balance] = float(quiet.norm() / (low.right.double() @ target).norm())
    assert shares[True] > 10 * shares[False]


# --- SPEED ---


def test_an_empty_null_space_is_refused(pipes):
    with pytest.raises(ErasureError, match="fills all 16 dimensions of the sequence text"):
        diffaccel.erase(pipes["sd"], ["circle"], method="speed", threshold=1e-12)


def test_a_weak_edit_warns(pipes):
    with pytest.warns(WeakErasure, match=r"'circle' (moves only \d+% of the way|does not move)"):
        diffaccel.erase(pipes["sd"], ["circle"], method="speed", **{**STRONG["speed"], "ridge": 1e4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffaccel.erase(pipes["sd"], ["circle"], method="speed", check=False, **STRONG["speed"])


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (-257.71, "moves away from its anchor"),
        (-0.001, "does not move"),
        (0.25, "goes 25% of the way to its anchor"),
        (1.0, "goes 100% of the way to its anchor"),
        (257.71, "goes far past its anchor"),
    ],
)
def test_shares_are_said_in_words_that_make_sense(share, words):
    assert way(share) == words


# --- one text, several things ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("circle", ["circle"]),
        ("circle, star", ["circle", "star"]),
        ("circle,\n star,,", ["circle", "star"]),
        (r"Muybridge\, Eadweard, star", ["Muybridge, Eadweard", "star"]),
        ("", [""]),
    ],
)
def test_commas_separate_names(text, names):
    assert names_in(text) == names
    assert [name for one in names for name in names_in(escaped(one))] == names


def test_every_way_in_reads_commas_alike(pipes, tmp_path):
    options = {"anchor": "shape", "method": "uce", **SMALL}
    (tmp_path / "c.json").write_text(json.dumps({"concepts": ["dog, heart"], "keep": ["square, star"]}))
    wanted = erase(pipes["sd"], ["dog", "heart"], keep=["square", "star"], **options)
    for asked in ("dog, heart", ["dog, heart"], read_concepts(tmp_path / "c.json")):
        keep = () if isinstance(asked, ConceptList) else ["square, star"]
        assert erase(pipes["sd"], asked, keep=keep, **options) == wanted
    one = erase(pipes["sd"], [Concept(target="dog, heart")], **options)
    assert [concept.target for concept in one.concepts] == ["dog, heart"]
    assert erase(pipes["sd"], r"dog\, heart", **options) == one


# --- another thing of its kind ---


def length(text):
    return len(text.split())


@pytest.mark.parametrize(
    ("target", "erased", "instead"),
    [
        ("circle", (), "square"),
        ("Circles", (), "square"),
        ("disc", (), "square"),
        ("square", (), "circle"),
        ("circle", ("square",), "triangle"),
        ("red", (), "blue"),
        ("blue star", (), "blue square"),
        ("Van Gogh", (), "an artist"),
        ("gobbledygook", (), ""),
        ("blue gobbledygook", (), ""),
    ],
)
def test_what_takes_the_place_of_a_concept(target, erased, instead):
    found = stand_in(target, (target, *erased), lambda text: 1)
    assert found == instead


def test_a_word_that_the_model_knows_comes_first():
    assert stand_in("circle", ("circle",), lambda text: 1 if text == "heart" else 5) == "heart"


@pytest.mark.parametrize("kind", KINDS_OF_THINGS)
def test_kinds_hold_every_thing_once(kind):
    names = [name for thing in KINDS_OF_THINGS[kind] for name in thing]
    assert len(names) == len(set(names))
    assert all(name == name.strip() and name for name in names)


def test_the_choice_is_told(pipes):
    edit = erase(pipes["sd"], ["circle", Concept(target="dog", anchor="tree")], general=False)
    assert edit.diagnostics["stand_ins"] == {"circle": edit.concepts[0].anchor}
    assert edit.concepts[0].anchor in {"square", "star", "heart"}
    nothing = erase(pipes["sd"], ["circle"], anchor="", general=False)
    assert nothing.concepts[0].anchor == ""
    assert any("takes the place of 'circle'" in leak for leak in nothing.leaks)


def test_strength_is_what_was_asked(pipes):
    options = {**STRONG["speed"], "strength": 0.9}
    del options["ridge"]
    edit = erase(pipes["sd"], ["circle", "dog"], method="speed", keep=["square"], **options)
    found = edit.diagnostics["sequence"]
    assert min(found["strength"].values()) == pytest.approx(0.9, abs=1e-4)
    assert found["ridge"] > 0
    impossible = {**options, "strength": 0.999999999999, "directions": 1}
    del impossible["threshold"]
    with pytest.raises(ErasureError, match="no ridge erases every concept"):
        erase(pipes["sd"], ["circle", "dog", "red heart"], method="speed", keep=["square"], **impossible)


def test_strength_and_residual_are_measured_on_the_edit(pipes):
    pipe = pipes["sd"]
    edit = erase(pipe, keep=KEEP, anchor="shape", method="speed", **{**STRONG["speed"], "ridge": 5.0})
    target, anchor = word(pipe, "sd", "circle"), word(pipe, "sd", "shape")
    moved = dense(edit.maps[0]) @ target - target
    share = float(moved @ (anchor - target) / (anchor - target).square().sum())
    found = edit.diagnostics["sequence"]
    assert 0.02 < share < 0.98
    assert found["strength"]["circle"] == pytest.approx(share, abs=1e-4)
    left = float((target + moved - anchor).norm() / (anchor - target).norm())
    assert found["residual"]["circle"] == pytest.approx(left, abs=1e-4)


def test_filter_augmentation_and_seed_act(pipes):
    base = {**SMALL, "threshold": 0.05, "centres": 1}
    settings = (
        {"prior_filter": False, "augment": 0},
        {"prior_filter": True, "augment": 0},
        {"prior_filter": False, "augment": 4},
        {"prior_filter": False, "augment": 4, "seed": 1},
    )
    words = ["square", "blue star", "tree", "heart", "dog", "large", "photo"]
    edits = [erase(pipes["sd"], keep=words, method=SPEED(**base, **one)) for one in settings]
    refined = [edit.diagnostics["sequence"]["refined"] for edit in edits]
    assert refined[0] == 7 > refined[1] > 0
    assert refined[2] == refined[3] == 35
    assert len({edit.digest for edit in edits}) == 4


# --- RECE ---


def test_rece_hardens(pipes):
    options = {**SMALL, "attack_ridge": 1e-3, "norm_budget": 50.0, "attack_tokens": "last", "anchor": "shape"}
    plain = erase(pipes["sd"], keep=KEEP, method="rece", rounds=0, **options)
    hard = erase(pipes["sd"], keep=KEEP, method="rece", rounds=1, **options)
    twice = erase(pipes["sd"], keep=KEEP, method="rece", rounds=2, **options)
    first, second = twice.diagnostics["sequence"]["attack_error"]
    assert hard.diagnostics["sequence"]["attack_error"] == [first]
    assert second > 2 * first
    assert hard.diagnostics["sequence"]["attack_columns"] == 1
    like_uce = {k: v for k, v in options.items() if not k.startswith(("attack", "norm"))}
    uce = erase(pipes["sd"], keep=KEEP, method="uce", ridge=0.1, **like_uce)
    assert torch.equal(plain.maps[0].left @ plain.maps[0].right, uce.maps[0].left @ uce.maps[0].right)


# --- pipelines in use ---


def test_an_edit_is_made_from_the_base_even_while_others_are_applied():
    pipe = tiny_text_pipeline("sd")
    options = {"method": "rece", "keep": KEEP, **STRONG["rece"], "rounds": 1}
    options["attack_tokens"] = "last"
    clean = erase(pipe, ["circle"], **options)
    other = diffaccel.apply_edit(pipe, erase(pipe, ["dog"], **options))
    assert erase(pipe, ["circle"], **options).digest == clean.digest
    diffaccel.apply_edit(pipe, clean)
    diffaccel.remove_edit(pipe, other)
    diffaccel.remove_edit(pipe, clean)


def test_half_precision_gives_nearly_the_same_edit():
    full = erase(tiny_text_pipeline("sd"), keep=KEEP, method="uce", **STRONG["uce"])
    half = erase(tiny_text_pipeline("sd").to(torch.float16), keep=KEEP, method="uce", **STRONG["uce"])
    assert {m.name: m.digests["float16"] for m in full.modules} == {m.name: m.digests["float16"] for m in half.modules}
    torch.testing.assert_close(dense(half.maps[0]), dense(full.maps[0]), rtol=0, atol=0.05)


def test_methods_that_need_no_weights_of_a_quantised_layer_still_name_it():
    pipe = tiny_text_pipeline("pixart")
    layer = pipe.transformer.caption_projection.linear_1
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(Unsupported, match=r"caption_projection.linear_1 has no weight in fp32, fp16 or bf16"):
        erase(pipe, method="uce", **STRONG["uce"])


# --- the bundled model ---


@pytest.mark.parametrize("method", METHODS)
def test_defaults_work_on_the_bundled_model(method):
    pipe = diffaccel.load_miniature("shapes-sd")
    edit = erase(pipe, ["circle"], keep=["square", "a red heart"], method=method)
    found = edit.diagnostics["sequence"]
    assert found["strength"]["circle"] > 0.5
    assert edit.method == method
    assert edit.parameters["tokens"] == ("context" if method == "mace" else "last")
    assert len(edit.modules) == (7 if method == "speed" else 14)


# --- the default ---


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"anchor": "square"}, "context"),
        ({}, "context"),
        ({"anchor": ""}, "context"),
        ({"concepts": [Concept(target="circle", anchor="square"), "star"]}, "context"),
        ({"concepts": ConceptList(concepts=("circle", "star"), anchor="square")}, "context"),
        ({"anchor": "square", "method": "speed"}, "speed"),
    ],
)
def test_the_default_method_is_the_one_that_works_best(pipes, options, method):
    assert erase(pipes["sd"], **{"concepts": ["circle"], "general": False, **options}).method == method


def test_settings_go_to_the_default_method(pipes):
    found = erase(pipes["sd"], anchor="square", general=False, erase_weight=3.0)
    assert (found.method, found.parameters["erase_weight"]) == ("context", 3.0)
    with pytest.raises(ErasureError, match=r"^context: threshold"):
        erase(pipes["sd"], anchor="square", threshold=0.1)

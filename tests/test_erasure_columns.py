"""Which rows of which prompts an edit is made of, and that their values are those the denoiser receives."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_pipeline as tiny_unet_pipeline
from tiny_text import KINDS, LIMIT, clip_tokenizer, encode, t5_tokenizer, tiny_sd_with_wider_text, tiny_text_pipeline
from tiny_transformers import tiny_pipeline as tiny_transformer_pipeline

from diffaccel.edits.concepts import ErasureError
from diffaccel.edits.routes import find_routes, leaks, require_encoders
from diffaccel.erasure.columns import POOLED_SECTION, RowReader, Span, chosen_rows, pair_rows
from diffaccel.errors import Unsupported

# "a photo of <two tokens> now" in a sequence of 12 rows, start token first
TARGET = Span(head=1, start=4, stop=6, end=8, total=12)
LONGER = Span(head=1, start=4, stop=8, end=10, total=12)
SHORTER = Span(head=1, start=4, stop=5, end=7, total=12)
EMPTY = Span(head=1, start=1, stop=1, end=2, total=12)


# --- which rows ---


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("last", [5]),
        ("span", [4, 5]),
        ("tail", [5, 6, 7, 8, 9, 10, 11]),
        ("words", [1, 2, 3, 4, 5, 6, 7]),
        ("all", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("context", [1, 2, 3, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_policies_choose_rows(policy, rows):
    assert chosen_rows(policy, TARGET) == rows


def test_rows_pair_by_meaning():
    # words before from the start, the phrase from its end, what follows by distance, paddings by place
    assert dict(pair_rows("all", TARGET, LONGER)) == {
        1: 1, 2: 2, 3: 3, 4: 6, 5: 7, 6: 8, 7: 9, 8: 10, 9: 10, 10: 10, 11: 11,
    }  # fmt: skip
    assert dict(pair_rows("all", TARGET, SHORTER)) == {
        1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 5, 7: 6, 8: 8, 9: 9, 10: 10, 11: 11,
    }  # fmt: skip


def test_rows_pair_with_the_empty_prompt_by_place():
    assert pair_rows("tail", TARGET, EMPTY) == [(row, row) for row in range(5, 12)]
    masked = Span(head=0, start=0, stop=0, end=1, total=1)
    assert pair_rows("span", TARGET, masked) == [(4, 0), (5, 0)]


def test_no_row_of_a_full_sequence_is_left_out_or_wraps():
    full = Span(head=1, start=4, stop=6, end=12, total=12)
    for policy in ("tail", "all"):
        for anchor in (TARGET, LONGER, SHORTER, EMPTY, full):
            pairs = pair_rows(policy, full, anchor)
            assert [row for row, _ in pairs] == chosen_rows(policy, full)
            assert all(1 <= other < 12 for _, other in pairs)


# --- where phrases lie ---


def reader(kind: str, route: int = 0, **options) -> RowReader:
    pipe = tiny_text_pipeline(kind)
    return RowReader(pipe, find_routes(pipe)[route], **options)


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


@pytest.mark.parametrize("phrase", ["circle", "red heart", "helicopter"])
@pytest.mark.parametrize("template", ["{}", "a photo of {}", "a picture of {}, and a dog"])
def test_phrases_are_found_among_the_tokens(template, phrase):
    (span,) = reader("sd").spans(template, [phrase], 0)
    tokens = pieces(clip_tokenizer(), template.replace("{}", phrase))
    joined = "".join(tokens[span.start : span.stop]).replace("</w>", " ").strip()
    assert joined == phrase
    assert (span.head, span.end, span.total) == (1, len(tokens), LIMIT)


@pytest.mark.parametrize(("kind", "total"), [("flux", 512), ("pixart", None)])
def test_phrases_are_found_among_the_tokens_of_t5(kind, total):
    (span,) = reader(kind).spans("a photo of {} and a dog", ["red heart"], 0)
    tokens = pieces(t5_tokenizer(), "a photo of red heart and a dog")
    assert tokens[span.start : span.stop] == ["\u2581red", "\u2581heart"]
    assert (span.head, span.end, span.total) == (0, len(tokens), total or len(tokens))


def test_an_empty_phrase_is_the_empty_prompt():
    found = reader("sd")
    assert found.text("a photo of {}", "") == ""
    assert found.spans("a photo of {}", [""], 0) == [Span(1, 1, 1, 2, LIMIT)] == [found.empty_span(0)]


def test_paddings_can_be_limited_but_not_those_of_the_empty_prompt():
    found = reader("sd", paddings=3)
    circle, empty = found.spans("a {}", ["circle", ""], 0)
    assert circle == Span(1, 2, 3, 4, 7, stands_for=(LIMIT - 4) / 3)
    assert empty.total == LIMIT
    assert chosen_rows("tail", circle) == [2, 3, 4, 5, 6]
    (at_the_end,) = reader("sd", paddings=100).spans("a {}", ["circle"], 0)
    assert at_the_end == Span(1, 2, 3, 4, LIMIT)
    (none,) = reader("sd", paddings=0).spans("a {}", ["circle"], 0)
    assert none == Span(1, 2, 3, 4, 4)


def test_a_phrase_that_melts_into_its_template_is_refused():
    with pytest.raises(ErasureError, match=r"'circle' melt into its template"):
        reader("sd").spans("a semi{}", ["circle"], 0)


def test_a_prompt_that_would_be_cut_off_is_refused():
    with pytest.raises(ErasureError, match=r"tokenizer cuts off after 32"):
        reader("sd").spans("{}", ["circle " * 31], 0)
    with pytest.raises(ErasureError, match=r"tokenizer_2 cuts off after 6"):
        reader("flux", t5_tokens=6).spans("{}", ["a photo of the red circle"], 0)


# --- values ---

POOLED = ("sdxl", "sd3", "sd3-no-t5", "flux")
TEXTS = ("", "a circle", "a photo of a large red heart and a blue star", "dog")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_pipeline_encodes(kind):
    pipe = tiny_text_pipeline(kind)
    route = find_routes(pipe)[0]
    found = RowReader(pipe, route)
    for text in TEXTS:
        rows, _ = encode(pipe, kind, text)
        first = 0
        for section in found.sections:
            (span,) = found.spans("{}", [text], section)
            keys = [(section, text, row) for row in range(span.total)]
            matrix, place = found.values(keys)
            got = matrix[:, [place[key] for key in keys]].T
            torch.testing.assert_close(got, rows[first : first + span.total].double(), rtol=1e-4, atol=1e-5)
            first += LIMIT
        assert float(rows.std()) > 0.1


@pytest.mark.parametrize("kind", POOLED)
def test_pooled_rows_are_what_the_pipeline_encodes(kind):
    pipe = tiny_text_pipeline(kind)
    found = RowReader(pipe, find_routes(pipe)[1])
    keys = [(POOLED_SECTION, text, 0) for text in TEXTS]
    matrix, place = found.values(keys)
    for key, text in zip(keys, TEXTS, strict=True):
        pooled = encode(pipe, kind, text)[1]
        torch.testing.assert_close(matrix[:, place[key]], pooled.double(), rtol=1e-4, atol=1e-5)


def test_words_of_causal_encoders_need_no_paddings():
    found = reader("sd")
    keys = [(0, "a photo of a red heart", row) for row in range(7)]
    with_pads, place_long = found.values([*keys, (0, "a photo of a red heart", LIMIT - 1)])
    without, place = found.values(keys)
    for key in keys:
        torch.testing.assert_close(without[:, place[key]], with_pads[:, place_long[key]], rtol=1e-5, atol=1e-6)


def test_values_do_not_depend_on_the_order_of_the_keys():
    found = reader("sdxl")
    keys = [(0, text, row) for text in TEXTS for row in (1, 2)]
    first, _ = found.values(keys)
    second, _ = found.values(keys[::-1])
    assert torch.equal(first, second)


def test_the_structural_zeros_of_sd3_stay_zero():
    found = reader("sd3")
    clip_rows, _ = found.values([(0, "a circle", 2)])
    t5_rows, _ = found.values([(1, "a circle", 1)])
    assert float(clip_rows[12:].abs().max()) == 0
    assert float(clip_rows[:12].abs().min()) > 0
    assert float(t5_rows[12:].abs().min()) > 0


def test_blocks_of_columns_by_encoder():
    found = reader("sdxl")
    found.values([(0, "a circle", 1)])
    assert found.blocks == ((0, 4), (4, 16))
    for kind in ("sd", "sd3"):
        found = reader(kind)
        found.values([(section, "a circle", 1) for section in found.sections])
        assert found.blocks == ()


def test_an_encoder_that_does_not_fit_is_refused():
    pipe = tiny_sd_with_wider_text()
    with pytest.raises(Unsupported, match="write 24 columns of the sequence text, but the denoiser reads 16"):
        RowReader(pipe, find_routes(pipe)[0]).values([(0, "a circle", 1)])


# --- routes ---


@pytest.mark.parametrize("kind", KINDS)
def test_routes_list_every_layer_that_reads_text(kind):
    pipe = tiny_text_pipeline(kind)
    routes = find_routes(pipe)
    assert [route.name for route in routes] == ["sequence", *(["pooled"] if kind in POOLED else [])]
    root = getattr(pipe, routes[0].projections[0].name.split(".")[0])
    readers = {name for name, module in root.named_modules() if getattr(module, "in_features", None) is not None}
    listed = {p.name.split(".", 1)[1] for route in routes for p in route.projections}
    assert listed <= readers
    if kind in ("sd", "sdxl"):
        cross = {name for name in readers if name.endswith(("attn2.to_k", "attn2.to_v"))}
        assert cross == listed - {"add_embedding.linear_1"}
    for route in routes:
        for projection in route.projections:
            first, past = projection.reader.columns
            assert projection.module is pipe_module(pipe, projection.name)
            assert past - first == route.width == 16


def pipe_module(pipe, name: str):
    home, path = name.split(".", 1)
    return getattr(pipe, home).get_submodule(path)


@pytest.mark.parametrize("kind", ["flux2", "qwen-image", "sana", "hunyuan", "dit", "lumina2", "z-image"])
def test_other_families_are_refused_with_a_reason(kind):
    with pytest.raises(Unsupported, match=r"cannot be erased from .* in closed form: "):
        find_routes(tiny_transformer_pipeline(kind))


@pytest.mark.parametrize("kind", ["cogvideox", "wan", "auraflow", "cogview4"])
def test_unknown_families_are_refused(kind):
    with pytest.raises(Unsupported, match="concept erasure"):
        find_routes(tiny_transformer_pipeline(kind))


def test_missing_encoders_are_named():
    pipe = tiny_unet_pipeline("sd")
    with pytest.raises(Unsupported, match="this StableDiffusionPipeline has no text_encoder"):
        require_encoders(pipe, find_routes(pipe)[0])


def test_leaks_are_told():
    pipe = tiny_text_pipeline("sd3-no-t5")
    assert any("text_encoder_3 was not loaded" in leak for leak in leaks(pipe, find_routes(pipe)))
    control = tiny_unet_pipeline("controlnet")
    assert any("ControlNet" in leak for leak in leaks(control, find_routes(control)))
    assert leaks(tiny_text_pipeline("sd"), find_routes(tiny_text_pipeline("sd"))) == ()

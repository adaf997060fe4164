"""Sparse attention in whole pipelines, against a stock pipeline whose attention is replaced by plain loops in float64."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from tiny import tiny_pipeline as tiny_unet_pipeline
from tiny_transformers import KINDS, SEPARATE, TOKENS, _network, run, tiny_inputs, tiny_pipeline

import diffaccel
from diffaccel import (
    GuidanceInterval,
    RecipeError,
    RegionSampling,
    ResidualCache,
    SparseAttention,
    TokenMerging,
    Unsupported,
)
from diffaccel.kernels.block_selection import select_blocks_oracle, token_blocks
from diffaccel.kernels.triton_support import force_triton
from diffaccel.methods.attention import sparse_attention

GRID = (12, 12)  # 2 blocks of queries and 3 of keys, the last ones not full
SHAPE = {"size": (24, 24), "steps": 5}
ACTS = SparseAttention(keep=0.3, start=2, reuse=2, min_tokens=1)
# without text, with text, with AuraFlow's 8 registers; the decoder attends over other numbers of tokens
SEQUENCES = (144, 144 + TOKENS, 144 + TOKENS + 8)
TEXT_BEFORE = ("flux-dev", "flux-cfg", "auraflow")
WORKS = ("sd3", "sd3.5-medium", "flux-dev", "flux-cfg", "pixart-sigma", "hunyuan", "auraflow", "dit")
SUPPORTED = tuple(kind for kind in KINDS if kind.startswith(("sd3", "pixart", "hunyuan", "auraflow", "dit")) or kind in (
    "flux-dev", "flux-schnell", "flux-cfg", "flux-img2img", "flux-controlnet"))  # fmt: skip


def pipeline(kind):
    """A tiny pipeline that takes 24 x 24 latent cells."""
    pipe = tiny_pipeline(kind)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    if kind == "auraflow":
        more = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 256}
        pipe.register_modules(
            transformer=_network(
                "AuraFlowTransformer2DModel",
                sample_size=8,
                num_mmdit_layers=1,
                num_single_dit_layers=2,
                **heads,
                **more,
            )
        )
    if kind == "dit":
        pipe.register_modules(
            transformer=_network(
                "DiTTransformer2DModel", sample_size=24, out_channels=8, num_layers=2, norm_num_groups=4, **heads
            )
        )
    return pipe


@contextlib.contextmanager
def attention_by_hand(monkeypatch, pipe, kind, config):
    """Stock pipeline, own attention: lists chosen and followed pair by pair in float64. Yields what it counted."""
    seen = {"evaluations": 0, "visited": 0, "dense": 0, "pooled": 0}
    kept, place = {}, [0]
    stock = F.scaled_dot_product_attention

    def begin(module, args, kwargs):
        place[0] = 0
        seen["evaluations"] += 1

    def attend(query, key, value, *args, **kwargs):
        cells = GRID[0] * GRID[1]
        if query.shape != key.shape or query.shape[2] not in SEQUENCES:
            return stock(query, key, value, *args, **kwargs)
        number = seen["evaluations"] - 1
        lane, step = (number % 2, number // 2) if kind in SEPARATE else (0, number)
        place[0] += 1
        if step < config.start:
            return stock(query, key, value, *args, **kwargs)
        text = query.shape[2] - cells
        before = text if kind in TEXT_BEFORE else 0
        blocks = token_blocks(GRID, cells, before, text - before)
        if (step - config.start) % config.reuse == 0:
            kept[lane, place[0]] = select_blocks_oracle(query, key, blocks, config.keep, config.mode, config.similarity)
            rows = query.shape[0] * query.shape[1] * query.shape[3]
            seen["pooled"] += 2 * rows * blocks.picture_queries * blocks.picture_keys
        visible = torch.zeros(*query.shape[:3], query.shape[2], dtype=torch.bool)
        for b, heads in enumerate(kept[lane, place[0]]):
            for h, rows in enumerate(heads):
                for row, numbers in zip(blocks.queries, rows, strict=True):
                    columns = torch.cat([blocks.keys[j][blocks.keys[j] >= 0] for j in sorted(numbers)]).long()
                    visible[b, h, row[row >= 0].long()[:, None], columns[None]] = True
        seen["visited"] += int(visible.sum()) * 4 * query.shape[3]
        seen["dense"] += visible.numel() * 4 * query.shape[3]
        scores = query.double() @ key.double().transpose(2, 3) * (kwargs.get("scale") or query.shape[3] ** -0.5)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ value.double()).to(query.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        handle = pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()


def shape_of(kind):
    return {"steps": SHAPE["steps"]} if kind == "dit" else SHAPE


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def pixart():
    pipe = pipeline("pixart-sigma")
    return pipe, run(pipe, "pixart-sigma", **SHAPE)


# --- off ---


@pytest.mark.parametrize("kind", ["sd3", "flux-dev", "pixart-sigma"])
def test_keeping_everything_is_stock_bit_for_bit(kind):
    pipe = pipeline(kind)
    stock = run(pipe, kind, **SHAPE)
    fast = diffaccel.wrap(pipe, SparseAttention(keep=1.0, min_tokens=1))
    assert torch.equal(run(fast, kind, **SHAPE), stock)
    assert fast.report.flops == fast.report.flops_plain
    assert not fast.report.operators


# --- what it computes ---


@pytest.mark.parametrize("config", [ACTS, ACTS.model_copy(update={"mode": "mass", "similarity": 0.02, "keep": 0.5})])
@pytest.mark.parametrize("kind", WORKS)
def test_it_is_attention_over_the_listed_pairs(monkeypatch, kind, config):
    pipe = pipeline(kind)
    if kind not in ("sd3.5-medium", "flux-cfg") and config is not ACTS:
        config = config.model_copy(update={"reuse": 1})
    stock = run(pipe, kind, **shape_of(kind))
    with attention_by_hand(monkeypatch, pipe, kind, config) as seen:
        wanted = run(pipe, kind, **shape_of(kind))
    fast = diffaccel.wrap(pipe, config)
    got = run(fast, kind, **shape_of(kind))
    assert apart(got, wanted) < 2e-5
    assert apart(got, stock) > 1e-4
    assert torch.equal(run(pipe, kind, **shape_of(kind)), stock)
    assert torch.equal(run(fast, kind, **shape_of(kind)), got)
    plain = diffaccel.wrap(pipe, [])
    run(plain, kind, **shape_of(kind))
    report = fast.report
    assert report.flops_plain == plain.report.flops
    assert report.flops == plain.report.flops - seen["dense"] + seen["visited"] + seen["pooled"]
    assert report.methods["sparse_attention"]["density"] == f"{seen['visited'] / seen['dense']:.3f}"
    assert report.operators["attention_body"] == {"torch": report.methods["sparse_attention"]["sparse attentions"]}
    assert "operator attention_body" in str(report)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev", "hunyuan"])
def test_a_picture_does_not_depend_on_its_batch(kind):
    """Three pictures that are not square: 8 x 20 tokens."""
    pipe = pipeline(kind)
    shape = {"size": (16, 40), "steps": 5} if kind != "sd3" else {"size": (16, 24), "steps": 5}
    fast = diffaccel.wrap(pipe, ACTS)
    batch = run(fast, kind, batch=3, **shape)
    assert fast.report.methods["sparse_attention"]["sparse attentions"] > 0
    assert apart(run(fast, kind, batch=1, first=2, **shape), batch[2:]) < 1e-4
    assert apart(batch[:1], batch[2:]) > 1e-2


def test_the_kernel_draws_the_same_picture():
    pipe = pipeline("sd3")
    few = {"size": (24, 24), "steps": 3}
    fast = diffaccel.wrap(pipe, ACTS)
    by_torch = run(fast, "sd3", **few)
    with force_triton():
        by_triton = run(fast, "sd3", **few)
    assert fast.report.operators["attention_body"] == {
        "triton": fast.report.methods["sparse_attention"]["sparse attentions"]
    }
    assert set(fast.report.operators["pool_blocks"]) == {"triton"}
    assert apart(by_triton, by_torch) < 1e-5


# --- when it acts ---


def test_lists_serve_several_steps_and_the_first_steps_are_dense(pixart):
    pipe, stock = pixart
    for config, sparse, made in ((ACTS, 3, 2), (ACTS.model_copy(update={"reuse": 9, "start": 1}), 4, 1)):
        fast = diffaccel.wrap(pipe, config)
        run(fast, "pixart-sigma", **SHAPE)
        counts = fast.report.methods["sparse_attention"]
        assert (counts["sparse attentions"], counts["lists made"]) == (4 * sparse, 4 * made)
        assert [e.tags != () for e in fast.report.trace] == [False] * (5 - sparse) + [True] * sparse
    late = diffaccel.wrap(pipe, ACTS.model_copy(update={"start": 5}))
    assert torch.equal(run(late, "pixart-sigma", **SHAPE), stock)
    assert "sparse_attention: all 5 evaluations are dense (start=5)." in late.report.notes


def test_a_timing_decides_and_what_loses_stays_dense(monkeypatch, pixart):
    pipe, stock = pixart
    times = {"now": iter(())}
    monkeypatch.setattr(sparse_attention, "median_seconds", lambda function, device: next(times["now"]))
    config = ACTS.model_copy(update={"min_tokens": "measured"})
    loses = diffaccel.wrap(pipe, config)
    times["now"] = iter((0.010, 0.009, 0.004))  # dense, sparse, lists for two steps
    assert torch.equal(run(loses, "pixart-sigma", **SHAPE), stock)
    assert loses.report.notes == (
        "sparse_attention: attentions over 144 tokens stay dense (11.00 ms sparse, 10.00 ms dense).",
    )
    assert loses.report.flops == loses.report.flops_plain
    assert torch.equal(run(loses, "pixart-sigma", **SHAPE), stock)  # no new timing: the iterator is empty
    wins = diffaccel.wrap(pipe, config)
    times["now"] = iter((0.010, 0.007, 0.004))
    assert torch.equal(run(wins, "pixart-sigma", **SHAPE), run(diffaccel.wrap(pipe, ACTS), "pixart-sigma", **SHAPE))
    assert not wins.report.notes


def test_real_timings_decide_without_being_counted(pixart):
    pipe, _ = pixart
    fast = diffaccel.wrap(pipe, SparseAttention(keep=0.3))
    run(fast, "pixart-sigma", **SHAPE)
    acted = fast.report.methods["sparse_attention"]["sparse attentions"] > 0
    assert acted != any("stay dense" in note for note in fast.report.notes)
    assert bool(fast.report.operators) == acted


def test_few_tokens_stay_dense(pixart):
    pipe, stock = pixart
    fast = diffaccel.wrap(pipe, ACTS.model_copy(update={"min_tokens": 145}))
    assert torch.equal(run(fast, "pixart-sigma", **SHAPE), stock)
    assert fast.report.notes == ("sparse_attention: attentions over 144 tokens stay dense (fewer than 145 tokens).",)


@pytest.mark.parametrize(
    ("size", "config", "reason"),
    [
        ((8, 8), ACTS, "attentions over 16 tokens stay dense (of 1 block of 64 keys keep=0.3 leaves out none)"),
        ((8, 8), ACTS.model_copy(update={"mode": "mass"}), "of 1 block of 64 keys keep=0.3 leaves out none"),
        ((24, 24), ACTS.model_copy(update={"keep": 0.9}), "of 3 blocks of 64 keys keep=0.9 leaves out none"),
    ],
)
def test_where_there_is_nothing_to_leave_out_it_stays_dense(pixart, size, config, reason):
    pipe, _ = pixart
    fast = diffaccel.wrap(pipe, config)
    got = run(fast, "pixart-sigma", size=size, steps=5)
    assert torch.equal(got, run(pipe, "pixart-sigma", size=size, steps=5))
    (note,) = fast.report.notes
    assert reason in note
    assert fast.report.flops == fast.report.flops_plain


def test_rows_that_guidance_drops_get_lists_of_their_own(pixart):
    pipe, _ = pixart
    fast = diffaccel.wrap(pipe, [GuidanceInterval(stop_fraction=0.5), ACTS.model_copy(update={"reuse": 9, "start": 1})])
    got = run(fast, "pixart-sigma", **SHAPE)
    assert fast.report.methods["sparse_attention"]["lists made"] == 2 * 4
    assert torch.equal(run(fast, "pixart-sigma", **SHAPE), got)
    assert fast.report.flops < fast.report.flops_plain


def test_the_second_stage_says_where_it_acts(pixart):
    pipe, _ = pixart
    fast = diffaccel.wrap(pipe, ACTS.model_copy(update={"skip": 20.0}))
    assert torch.equal(run(fast, "pixart-sigma", **SHAPE), run(diffaccel.wrap(pipe, ACTS), "pixart-sigma", **SHAPE))
    assert any("skip acts in the GPU kernel only" in note for note in fast.report.notes)


# --- leaving nothing behind ---


def test_an_aborted_run_leaves_nothing(pixart):
    pipe, stock = pixart
    fast = diffaccel.wrap(pipe, ACTS)
    whole = run(fast, "pixart-sigma", **SHAPE)
    before = [vars(module).keys() for module in pipe.transformer.modules()]

    def stop(step, *rest):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fast, "pixart-sigma", callback=stop, callback_steps=1, **SHAPE)
    assert not fast.report.completed
    assert fast.report.methods["sparse_attention"]["sparse attentions"] > 0
    assert [vars(module).keys() for module in pipe.transformer.modules()] == before
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    assert torch.equal(run(pipe, "pixart-sigma", **SHAPE), stock)
    assert torch.equal(run(fast, "pixart-sigma", **SHAPE), whole)


def test_other_attention_in_the_process_is_not_touched(pixart):
    """A hook that attends for itself in the middle of a run gets torch's own attention."""
    pipe, _ = pixart
    q = torch.randn(1, 1, 144, 8)
    wanted, got = F.scaled_dot_product_attention(q, q, q), []
    handle = pipe.transformer.transformer_blocks[0].ff.register_forward_hook(
        lambda *_: got.append(F.scaled_dot_product_attention(q, q, q)) or None
    )
    try:
        run(diffaccel.wrap(pipe, ACTS), "pixart-sigma", **SHAPE)
    finally:
        handle.remove()
    assert len(got) == 5
    assert all(torch.equal(out, wanted) for out in got)


# --- what does not work says so ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_transformer_is_supported_or_refused_with_a_reason(kind):
    pipe = tiny_pipeline(kind)
    if kind in SUPPORTED:
        diffaccel.wrap(pipe, ACTS)
        return
    with pytest.raises(
        Unsupported, match=f"sparse_attention does not work on {type(pipe.transformer).__name__}: its "
    ) as e:
        diffaccel.wrap(pipe, ACTS)
    assert "not known" not in str(e.value)


def test_unets_are_refused():
    with pytest.raises(Unsupported, match="sparse_attention works on diffusion transformers"):
        diffaccel.wrap(tiny_unet_pipeline("sd"), ACTS)


def test_compiled_blocks_are_refused():
    pipe = pipeline("flux-dev")
    assert isinstance(pipe.transformer, FluxTransformer2DModel)
    fast = diffaccel.wrap(pipe, ACTS)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(Unsupported, match="sparse_attention cannot run on this FluxTransformer2DModel: its blocks are"):
        run(fast, "flux-dev", **SHAPE)


def test_another_attention_backend_is_refused():
    class Elsewhere:
        def __call__(self, attn, hidden_states, **kwargs):
            return attn.to_out[0](attn.to_v(hidden_states))

    pipe = pipeline("pixart-sigma")
    pipe.transformer.transformer_blocks[1].attn1.processor = Elsewhere()
    fast = diffaccel.wrap(pipe, ACTS)
    with pytest.raises(Unsupported, match="Elsewhere does not attend by scaled_dot_product_attention"):
        run(fast, "pixart-sigma", **SHAPE)


def test_masks_over_image_tokens_are_refused(pixart):
    pipe, _ = pixart
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": torch.ones(2, 144)}), with_kwargs=True
    )
    try:
        with pytest.raises(Unsupported, match="does not support masks over image tokens"):
            run(diffaccel.wrap(pipe, ACTS), "pixart-sigma", **SHAPE)
    finally:
        handle.remove()


@pytest.mark.parametrize("other", [RegionSampling(), TokenMerging()])
def test_methods_that_take_tokens_away_are_refused_beside_it(pixart, other):
    with pytest.raises(RecipeError, match=f"sparse_attention divides.*{re.escape('use one of them.')}"):
        diffaccel.wrap(pixart[0], [ACTS, other])


def test_a_block_cache_runs_beside_it(pixart):
    pipe, stock = pixart
    fast = diffaccel.wrap(pipe, [ACTS, ResidualCache(interval=2, full_first=3, min_evaluations=1)])
    got = run(fast, "pixart-sigma", **SHAPE)
    assert fast.report.methods["residual_cache"]["cached"] > 0
    assert fast.report.methods["sparse_attention"]["sparse attentions"] > 0
    assert not torch.equal(got, stock)
    assert torch.equal(run(fast, "pixart-sigma", **SHAPE), got)


@pytest.mark.parametrize(
    "settings", [{"keep": 0}, {"keep": 1.1}, {"reuse": 0}, {"start": 0}, {"skip": 0}, {"mode": "all"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SparseAttention(**settings)


def test_inputs_of_the_tiny_pipelines_have_the_grid_of_this_file():
    inputs = tiny_inputs("pixart-sigma", **SHAPE)
    assert (inputs["height"] // 16, inputs["width"] // 16) == GRID

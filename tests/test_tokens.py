"""Token merging and downsampling against slow, obvious versions of the same arithmetic."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tiny import KINDS, run, tiny_pipeline

import diffaccel
from diffaccel import TokenDownsampling, TokenMerging, Unsupported
from diffaccel.methods.tokens.sites import Verdict, grid, measuring_device, median_seconds
from diffaccel.methods.tokens.token_downsampling import average_tokens, nearest_tokens
from diffaccel.methods.tokens.token_maps import SlotMap, matched_map
from diffaccel.methods.tokens.token_matchers import guidance_importance, important_destinations, window_destinations
from diffaccel.models.call import Call
from diffaccel.models.model_map import describe

GRIDS = [(8, 8), (6, 10), (7, 5), (2, 2)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(images, count, channels=12, seed=3):
    return torch.randn(images, count, channels, generator=generator(seed))


def slow_slots(metric, kept, rest, removed, favoured=None):
    """Token by token, image by image, in float64: the group each token belongs to, as sets."""
    groups = []
    for b in range(len(metric)):
        unit = metric[b].double() / metric[b].double().norm(dim=-1, keepdim=True)
        destinations = kept[b % len(kept)].tolist()
        scored = []
        for position, token in enumerate(rest[b % len(rest)].tolist()):
            cosines = [float(unit[token] @ unit[d]) for d in destinations]
            best = max(range(len(cosines)), key=cosines.__getitem__)
            first = favoured is not None and bool(favoured[b, position])
            scored.append((first, cosines[best], token, destinations[best]))
        scored.sort(reverse=True)
        group = {d: {d} for d in destinations}
        for rank, (_, _, token, destination) in enumerate(scored):
            if rank < removed:
                group[destination].add(token)
            else:
                group[token] = {token}
        groups.append({frozenset(members) for members in group.values()})
    return groups


def groups_of(slots):
    return [{frozenset((row == value).nonzero().flatten().tolist()) for value in row.unique()} for row in slots.slot]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("size", GRIDS)
def test_matching_equals_the_slow_version(size, ratio):
    count = size[0] * size[1]
    metric = tokens(3, count)
    kept, rest = window_destinations(*size, generator())
    removed = int(count * ratio)
    slots = matched_map(metric, kept, rest, removed)
    assert groups_of(slots) == slow_slots(metric, kept, rest, removed)
    assert slots.kept == count - removed


def test_important_matching_equals_the_slow_version():
    importance = torch.rand(2, 64, generator=generator(1))
    metric = tokens(2, 64)
    kept, rest, favoured = important_destinations(importance, 40, generator())
    slots = matched_map(metric, kept, rest, 40, favoured)
    assert groups_of(slots) == slow_slots(metric, kept, rest, 40, favoured)
    for b in range(2):
        pool = set(importance[b].argsort(descending=True)[:34].tolist())  # ceil(1.4 * 24)
        assert set(kept[b].tolist()) <= pool
        assert set(rest[b][favoured[b]].tolist()) == set(range(64)) - pool
        merged = {t for group in groups_of(slots)[b] if len(group) > 1 for t in group} - set(kept[b].tolist())
        assert set(range(64)) - pool <= merged  # every unimportant token goes


@pytest.mark.parametrize("size", GRIDS)
def test_destinations_are_one_per_window(size):
    h, w = size
    kept, rest = window_destinations(h, w, generator())
    assert sorted(kept[0].tolist() + rest[0].tolist()) == list(range(h * w))
    windows = {(t // w // 2, t % w // 2) for t in kept[0].tolist()}
    assert len(windows) == kept.shape[1] == (h // 2) * (w // 2)
    other, _ = window_destinations(h, w, generator(1))
    assert (h, w) == (2, 2) or not torch.equal(kept, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_group_mean_and_unmerge_copies_it(dtype):
    count = 48
    kept, rest = window_destinations(6, 8, generator())
    slots = matched_map(tokens(2, count), kept, rest, 24)
    x = tokens(4, count, 5).to(dtype)
    back = slots.unmerge(slots.merge(x))
    for row, groups in enumerate(groups_of(slots) * 2):
        for members in groups:
            mean = x[row, sorted(members)].double().mean(0)
            for member in members:
                assert torch.allclose(back[row, member].double(), mean, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_branches_share_the_map():
    """Rows are ordered branch by branch: row b of the batch uses the map of image b modulo the images."""
    kept, rest = window_destinations(4, 4, generator())
    slots = matched_map(tokens(3, 16), kept, rest, 8)
    x = tokens(6, 16, 5)
    first, second = (slots.unmerge(slots.merge(half)) for half in x.chunk(2))
    assert torch.equal(slots.unmerge(slots.merge(x)), torch.cat([first, second]))
    assert slots.images == 3


def test_without_removal_merging_changes_nothing():
    x = tokens(2, 16)
    slots = matched_map(x, *window_destinations(4, 4, generator()), 0)
    assert torch.equal(slots.unmerge(slots.merge(x)), x)
    assert isinstance(slots, SlotMap)


def test_importance_is_the_mean_guidance_difference():
    output = torch.randn(4, 3, 2, 2)
    want = [
        [sum(abs(float(output[2 + i, c, y, 0] - output[i, c, y, 0])) for c in range(3)) / 3 for y in (0, 1)]
        for i in (0, 1)
    ]
    assert torch.allclose(guidance_importance(output)[:, :, 0], torch.tensor(want), atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_downsampled_tokens_equal_the_slow_version(size, factor):
    h, w = size
    x = tokens(2, h * w, 3)
    near, mean = [], []
    for y in range(0, h, factor):
        for z in range(0, w, factor):
            cell = [i * w + j for i in range(y, min(y + factor, h)) for j in range(z, min(z + factor, w))]
            near.append(x[:, y * w + z])
            mean.append(x[:, cell].mean(1))
    assert torch.equal(nearest_tokens(x, h, w, factor), torch.stack(near, 1))
    assert torch.allclose(average_tokens(x, h, w, factor), torch.stack(mean, 1), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", [TokenMerging(min_tokens=1), TokenDownsampling(min_tokens=1)])
def test_attention_in_a_run_equals_the_slow_version(method):
    """What one self-attention returned inside a run, recomputed from its inputs with explicit softmax attention."""
    pipe = tiny_pipeline("sd")
    seen = []
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    stock = type(attention).forward

    def spy(hidden_states, encoder_hidden_states=None, **kwargs):
        output = stock(attention, hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
        seen.append((hidden_states, encoder_hidden_states, output))
        return output

    attention.forward = spy
    run(diffaccel.wrap(pipe, method), "sd", steps=2)
    hidden, keys, output = seen[-1]
    assert hidden.shape[1] == (128 if isinstance(method, TokenMerging) else 256)
    assert keys is None or keys.shape[1] == 64
    keys = hidden if keys is None else keys
    q, k, v = attention.to_q(hidden), attention.to_k(keys), attention.to_v(keys)
    heads = [
        torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / s_len**0.5, -1) @ v[..., s]
        for s, s_len in (
            (slice(i, i + q.shape[-1] // attention.heads), q.shape[-1] // attention.heads)
            for i in range(0, q.shape[-1], q.shape[-1] // attention.heads)
        )
    ]
    assert torch.allclose(attention.to_out[0](torch.cat(heads, -1)), output, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [TokenMerging(min_tokens=10**6), TokenDownsampling(min_tokens=10**6)])
def test_nothing_shortened_is_bit_identical(kind, method):
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, method)
    assert torch.equal(run(fast, kind), run(pipe, kind))
    assert any("left alone" in note for note in fast.report.notes)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "method",
    [TokenMerging(min_tokens=60), TokenMerging(min_tokens=60, importance=True), TokenDownsampling(min_tokens=60)],
)
def test_shortening_acts_where_it_should_and_flops_are_honest(kind, method):
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, method)
    sizes = set()
    for site in describe(pipe).layout.attention:
        for attention in site.self_attentions:
            attention.to_k.register_forward_hook(lambda m, a, o: sizes.add(o.shape[1]))
    changed = run(fast, kind)
    grids = {256: 128, 64: 32} if isinstance(method, TokenMerging) else {256: 64, 64: 16}
    want = {grids[n] for n in ((256, 64) if kind == "sd" else (64,))} | {16}
    assert sizes - {256, 64} == want - ({64} if kind == "sd" else set()) or sizes >= want
    report = fast.report
    assert report.flops < report.flops_plain
    empty = diffaccel.wrap(pipe, [])
    plain = run(empty, kind)
    assert report.flops_plain == empty.report.flops
    assert (changed - plain).abs().max() > 1e-4


def test_measured_plan_leaves_losing_blocks_alone():
    """The tiny model's attentions are too small for merging to pay; what the timings say decides and is reported."""
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, TokenMerging(ratio=0.5))
    seconds = iter([1.0, 3.0, 2.0, 1.0, 1.0, 9.0, 0.0, 5.0, 4.0])  # preparation, shortened, dense per level
    real = diffaccel.methods.tokens.sites.median_seconds
    diffaccel.methods.tokens.sites.median_seconds = lambda *_: next(seconds)
    try:
        run(fast, "sd")
        first = fast.report
        run(fast, "sd")  # nothing is timed again: the list above is used up
    finally:
        diffaccel.methods.tokens.sites.median_seconds = real
    assert first.methods["token_merging"]["tokens shortened"] == "[64]"
    assert sum("left alone" in note for note in first.notes) == 2
    assert fast.report.methods == first.methods


def test_timing_waits_for_the_device_of_the_tensors(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    second = torch.device("cuda", 1)
    assert median_seconds(lambda: None, second, repeats=2) >= 0
    assert waited == [second] * 4
    assert median_seconds(lambda: None, torch.device("cpu")) >= 0
    assert len(waited) == 4


def test_offloaded_weights_cannot_be_timed():
    """Model offloading keeps weights elsewhere until the network runs; FLOPs are counted where the weights are."""
    attention = torch.nn.Linear(2, 2)
    far = Call({"sample": torch.empty(1, 4, 8, 8, device="meta")}, frozenset())
    near = Call({"sample": torch.empty(1, 4, 8, 8)}, frozenset())
    with pytest.raises(Unsupported, match="give min_tokens a number"):
        measuring_device("token_merging", attention, far, timed=True)
    assert measuring_device("token_merging", attention, far, timed=False).type == "cpu"
    assert measuring_device("token_merging", attention, near, timed=True).type == "cpu"
    assert measuring_device("token_merging", attention.to("meta"), near, timed=True).type == "cpu"


def test_verdict_compares_seconds():
    assert Verdict(64, 8, 2.0, 1.0, 0).pays
    assert not Verdict(64, 8, 1.0, 1.0, 0).pays


def test_window_of_steps():
    fast = diffaccel.wrap(tiny_pipeline("sd"), TokenMerging(min_tokens=1, start_fraction=0.2, stop_fraction=0.7))
    run(fast, "sd", steps=10)
    assert [bool(e.tags) for e in fast.report.trace] == [False] * 2 + [True] * 5 + [False] * 3


@pytest.mark.parametrize(
    "settings", [{"matcher": "tile"}, {"matcher": "agglomerative", "reuse": 3}, {"proportional": True}]
)
def test_other_settings_on_a_unet(settings):
    """The same picture twice, another one than with the default, and honest FLOPs."""
    pipe = tiny_pipeline("sd")
    fast, default, plain = (
        diffaccel.wrap(pipe, m) for m in (TokenMerging(min_tokens=1, **settings), TokenMerging(min_tokens=1), [])
    )
    first = run(fast, "sd", size=(24, 40))
    assert torch.equal(run(fast, "sd", size=(24, 40)), first)
    assert not torch.equal(run(default, "sd", size=(24, 40)), first)
    run(plain, "sd", size=(24, 40))
    assert fast.report.flops < fast.report.flops_plain == plain.report.flops
    assert fast.report.methods["token_merging"]["operators"] == "torch"


def test_pictures_depend_on_the_seed_only_through_the_draws():
    pipe = tiny_pipeline("sd")
    one = run(diffaccel.wrap(pipe, TokenMerging(min_tokens=1, seed=1)), "sd")
    assert torch.equal(one, run(diffaccel.wrap(pipe, TokenMerging(min_tokens=1, seed=1)), "sd"))
    assert not torch.equal(one, run(diffaccel.wrap(pipe, TokenMerging(min_tokens=1, seed=2)), "sd"))


def test_grid_rounds_up():
    assert grid((18, 22), 0) == (18, 22)
    assert grid((18, 22), 2) == (5, 6)
    assert grid((13, 10), 1) == (7, 5)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (TokenMerging, {"ratio": 0.8}),
        (TokenMerging, {"ratio": -0.1}),
        (TokenMerging, {"min_tokens": 0}),
        (TokenDownsampling, {"factor": 0}),
        (TokenMerging, {"min_tokens": "all"}),
    ],
)
def test_wrong_settings_are_refused_not_clamped(cls, settings):
    with pytest.raises(ValidationError):
        cls(**settings)

"""Token merging inside SD3, FLUX and PixArt: against explicit attention in float64, and what a run leaves behind."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from pydantic import ValidationError
from tiny_transformers import KINDS, run, tiny_pipeline

import diffaccel
from diffaccel import GuidanceInterval, RegionSampling, TokenMerging, Unsupported
from diffaccel.methods.tokens import token_matchers
from diffaccel.methods.tokens.token_maps import SlotMap
from diffaccel.methods.tokens.token_matchers import Grid, cluster, tiles, window_destinations

MERGED = ("sd3.5-medium", "sd3-controlnet", "flux-dev", "flux-cfg", "pixart-sigma")
STEPS, SIZE = 3, (8, 12)


def merging(**settings):
    return TokenMerging(**{"min_tokens": 1, **settings})


@pytest.mark.parametrize("kind", MERGED)
def test_nothing_shortened_is_bit_identical(kind):
    pipe = tiny_pipeline(kind)
    stock = run(pipe, kind, steps=STEPS)
    for method in (TokenMerging(ratio=0.0), TokenMerging(min_tokens=10**6), merging(start_fraction=1.0)):
        fast = diffaccel.wrap(pipe, method)
        assert torch.equal(run(fast, kind, steps=STEPS), stock)
    assert torch.equal(run(diffaccel.wrap(pipe, merging()), kind, steps=STEPS), stock) is False


def slow_groups(metric, height, width, removed, seed):
    """Per image the groups that the paper's algorithm makes, token by token: a list of (owner, members)."""
    kept, rest = window_destinations(height, width, torch.Generator().manual_seed(seed))
    found = []
    for tokens in metric.double():
        unit = tokens / tokens.norm(dim=1, keepdim=True)
        scored = []
        for token in rest[0].tolist():
            cosines = [float(unit[token] @ unit[d]) for d in kept[0].tolist()]
            best = max(range(len(cosines)), key=cosines.__getitem__)
            scored.append((-cosines[best], token, int(kept[0, best])))
        target = {token: owner for _, token, owner in sorted(scored)[:removed]}
        group: dict[int, list[int]] = {token: [token] for token in range(len(tokens)) if token not in target}
        for token, owner in target.items():
            group[owner].append(token)
        found.append(sorted(group.items()))
    return found


def turned(x, cos, sin):
    """Rotary positions: neighbouring numbers are pairs."""
    out = torch.empty_like(x)
    out[..., ::2] = x[..., ::2] * cos[:, ::2] - x[..., 1::2] * sin[:, ::2]
    out[..., 1::2] = x[..., 1::2] * cos[:, 1::2] + x[..., ::2] * sin[:, 1::2]
    return out


def slow_attention(attention, image, text, ahead, groups, table, proportional):
    """One row in float64. `text`: tokens with projections of their own; `ahead`: text tokens of the same stream."""
    owners = [owner for owner, _ in groups]
    merged = torch.stack([image[members].double().mean(0) for _, members in groups]).float()
    own = torch.cat([ahead, merged])
    heads = attention.heads

    def split(x, norm):
        x = x.unflatten(-1, (heads, -1)).transpose(0, 1)
        return (x if norm is None else norm(x)).double()

    q, k, v = (
        split(attention.to_q(own), attention.norm_q),
        split(attention.to_k(own), attention.norm_k),
        split(attention.to_v(own), None),
    )
    text_first = table is not None
    if text is not None:
        more = (
            split(attention.add_q_proj(text), attention.norm_added_q),
            split(attention.add_k_proj(text), attention.norm_added_k),
            split(attention.add_v_proj(text), None),
        )
        pairs = zip((q, k, v), more, strict=True)
        q, k, v = (torch.cat([b, a] if text_first else [a, b], dim=1) for a, b in pairs)
    prompt = len(ahead) if text is None else len(text)
    if table is not None:
        rows = torch.cat([torch.arange(prompt), torch.tensor(owners) + prompt])
        cos, sin = (part[rows].double() for part in table)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
    size = torch.tensor([float(len(members)) for _, members in groups]).double().log()
    none = torch.zeros(prompt, dtype=torch.float64)
    bias = torch.cat([none, size] if text_first else [size, none]) if proportional else 0.0
    mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias, -1) @ v
    mixed = mixed.transpose(0, 1).flatten(1).float()
    front, kept = (mixed[:prompt], mixed[prompt:]) if text_first else (mixed[len(owners) :], mixed[: len(owners)])
    if getattr(attention, "to_out", None) is not None and not getattr(attention, "pre_only", False):
        kept = attention.to_out[0](kept)
    full = torch.empty(len(image), kept.shape[1])
    for row, (_, members) in zip(kept, groups, strict=True):
        full[members] = row
    return torch.cat([front, full]) if len(ahead) else full


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("proportional", [False, True], ids=["equal", "proportional"])
@pytest.mark.parametrize("kind", ["sd3.5-medium", "flux-dev", "pixart-sigma"])
def test_attentions_equal_the_slow_version(kind, proportional, adapter):
    """Every attention of the last evaluation, its output recomputed from its own full-size input."""
    pipe = tiny_pipeline(kind)
    if adapter:
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        inject_adapter_in_model(config, pipe.transformer)
    fast = diffaccel.wrap(pipe, merging(proportional=proportional, seed=5))
    seen = {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith((".attn", ".attn1", ".attn2")) and hasattr(module, "processor"):
            module.register_forward_hook(
                lambda m, args, kwargs, out, name=name: seen.update({name: (m, args, kwargs, out)}), with_kwargs=True
            )
    run(fast, kind, steps=2, batch=2, size=SIZE)
    branches, tokens = (1 if kind == "flux-dev" else 2), 24
    groups = None
    checked = 0
    for name, (module, args, kwargs, out) in seen.items():
        number = int(name.split(".")[1]) + (3 if name.startswith("single") else 0)
        last = 5 if kind == "flux-dev" else len(pipe.transformer.transformer_blocks) - 1
        if number in (0, last) or (kind == "pixart-sigma" and name.endswith("attn2")):
            continue
        hidden = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states")
        joint = hidden.shape[1] - tokens
        if groups is None:  # matched on the sum of the branches where the first attention is shortened
            metric = hidden[:, joint:].unflatten(0, (branches, 2)).sum(0)
            groups = slow_groups(metric, SIZE[0] // 2, SIZE[1] // 2, tokens // 2, 5 * 1_000_003 + 1)
        for b in range(len(hidden)):
            want = slow_attention(
                module,
                hidden[b, joint:],
                None if text is None else text[b],
                hidden[b, :joint],
                groups[b % 2],
                kwargs.get("image_rotary_emb"),
                proportional,
            )
            got = out[0] if isinstance(out, tuple) else out
            assert torch.allclose(got[b], want, atol=2e-5), name
            checked += 1
    assert checked == {"sd3.5-medium": 3 * 4, "flux-dev": 4 * 2, "pixart-sigma": 2 * 4}[kind]


def state(pipe):
    """What hangs on the modules, and who answers their forward."""
    return [(set(vars(m)), vars(m).get("forward")) for m in pipe.transformer.modules()]


@pytest.mark.parametrize("kind", MERGED)
def test_a_run_leaves_nothing_behind(kind):
    """The same picture twice, honest FLOPs, single pictures equal to those of a batch, stock afterwards and after an abort."""
    pipe = tiny_pipeline(kind)
    stock, before = run(pipe, kind, steps=STEPS, size=SIZE), state(pipe)
    fast, plain = diffaccel.wrap(pipe, merging()), diffaccel.wrap(pipe, [])
    first = run(fast, kind, steps=STEPS, size=SIZE)
    assert torch.isfinite(first).all()
    assert (first - stock).abs().max() > 1e-3
    assert torch.equal(run(fast, kind, steps=STEPS, size=SIZE), first)
    run(plain, kind, steps=STEPS, size=SIZE)
    assert fast.report.flops_plain == plain.report.flops
    assert fast.report.flops < plain.report.flops
    assert fast.report.methods["token_merging"]["operators"] == "torch"
    batch = run(fast, kind, steps=STEPS, size=SIZE, batch=3)
    assert (batch[:1] - first).abs().max() < 2e-4 * first.abs().max()
    third = run(fast, kind, steps=STEPS, size=SIZE, first=2)
    assert (batch[2:] - third).abs().max() < 2e-4 * third.abs().max()

    count = [0]

    def stop(*_):
        count[0] += 1
        if count[0] > 2:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(fast, kind, steps=STEPS, size=SIZE)
    handle.remove()
    assert state(pipe) == before
    assert torch.equal(run(pipe, kind, steps=STEPS, size=SIZE), stock)


@pytest.mark.parametrize("matcher", ["window", "importance", "tile", "agglomerative"])
def test_matchers(matcher):
    kind = "sd3"
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, merging(matcher=matcher))
    first = run(fast, kind, steps=4, size=(16, 24))
    assert torch.equal(run(fast, kind, steps=4, size=(16, 24)), first)
    assert fast.report.flops < fast.report.flops_plain
    batch = run(fast, kind, steps=4, size=(16, 24), batch=2)
    assert (batch[:1] - first).abs().max() < 2e-4 * first.abs().max()
    if matcher == "importance":
        window = run(diffaccel.wrap(pipe, merging()), kind, steps=4, size=(16, 24))
        assert (window - first).abs().max() > 1e-3
        assert torch.equal(run(diffaccel.wrap(pipe, merging(importance=True)), kind, steps=4, size=(16, 24)), first)


@pytest.mark.parametrize(
    ("kind", "reuse", "maps"), [("sd3", 1, 6), ("sd3", 3, 2), ("flux-cfg", 1, 6), ("flux-cfg", 4, 2)]
)
def test_one_map_serves_all_layers_both_branches_and_several_steps(monkeypatch, kind, reuse, maps):
    made = []
    real = token_matchers.MATCHERS["window"]
    monkeypatch.setitem(token_matchers.MATCHERS, "window", lambda grid: made.append(grid) or real(grid))
    pipe = tiny_pipeline(kind)
    fast, plain = diffaccel.wrap(pipe, merging(reuse=reuse)), diffaccel.wrap(pipe, [])
    run(fast, kind, steps=6)
    run(plain, kind, steps=6)
    assert len(made) - (2 if kind == "flux-cfg" else 1) == maps  # the plan makes one per kind of attention, from noise
    assert fast.report.flops_plain == plain.report.flops


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg", "pixart-sigma"])
def test_with_guidance_on_some_steps(kind):
    pipe = tiny_pipeline(kind)
    methods = [GuidanceInterval(start_fraction=0.3, stop_fraction=0.7), merging(reuse=2)]
    fast = diffaccel.wrap(pipe, methods)
    first = run(fast, kind, steps=6)
    assert torch.equal(run(fast, kind, steps=6), first)
    batch = run(fast, kind, steps=6, batch=3)
    assert (batch[:1] - first).abs().max() < 2e-4 * first.abs().max()


def test_a_measured_plan_leaves_losing_blocks_alone(monkeypatch):
    """SD3.5's two kinds of attention: what the timings say decides, once, and is reported."""
    pipe = tiny_pipeline("sd3.5-medium")
    fast = diffaccel.wrap(pipe, TokenMerging())
    seconds = iter([1.0, 1.0, 9.0, 1.0, 5.0, 4.0])  # preparation, shortened, dense of each kind
    monkeypatch.setattr("diffaccel.methods.tokens.token_blocks.median_seconds", lambda *_: next(seconds))
    run(fast, "sd3.5-medium", steps=2)
    counts = fast.report.methods["token_merging"]
    assert counts["attentions shortened"] == 2
    assert any("transformer_blocks.attn2 on 16 tokens is left alone (5" in note for note in fast.report.notes)
    run(fast, "sd3.5-medium", steps=2)  # nothing is timed again: the list above is used up
    assert fast.report.methods["token_merging"] == counts


def test_what_cannot_work_says_so():
    for kind in KINDS:
        pipe = tiny_pipeline(kind)
        name = type(pipe.transformer).__name__
        if name in ("SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel"):
            continue
        with pytest.raises(Unsupported, match=f"token_merging does not work on {name}: "):
            diffaccel.wrap(pipe, TokenMerging())
    with pytest.raises(Unsupported, match="this pipeline makes no such calls"):
        diffaccel.wrap(tiny_pipeline("flux-dev"), TokenMerging(importance=True))
    with pytest.raises(Unsupported, match=r"dense_blocks \(3, 3\) leave none of the 6 blocks"):
        diffaccel.wrap(tiny_pipeline("flux-dev"), TokenMerging(dense_blocks=(3, 3)))
    with pytest.raises(diffaccel.RecipeError, match="computes only some of them"):
        diffaccel.wrap(tiny_pipeline("sd3"), [TokenMerging(), RegionSampling()])
    compiled = tiny_pipeline("flux-dev")
    compiled.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(Unsupported, match="its blocks are compiled"):
        diffaccel.wrap(compiled, TokenMerging())
    for wrong in (
        {"matcher": "tile", "importance": True},
        {"dense_blocks": (-1, 0)},
        {"reuse": 0},
        {"matcher": "kmeans"},
    ):
        with pytest.raises(ValidationError):
            TokenMerging(**wrong)


# --- matchers on their own ---


def grid_of(height, width, ratio=0.5, images=2, channels=6):
    metric = torch.randn(images, height * width, channels, generator=torch.Generator().manual_seed(1))
    return Grid(metric, height, width, ratio, torch.Generator().manual_seed(0))


def groups_of(slots: SlotMap, image: int):
    row = slots.slot[image]
    return {frozenset((row == value).nonzero().flatten().tolist()) for value in row.unique()}


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (17, 9), (1, 20), (13, 30)])
def test_tiles_cover_the_grid_once(size):
    for side in (4, 8):
        shapes = list(tiles(*size, side))
        assert torch.equal(torch.cat([ids.flatten() for ids in shapes]).sort().values, torch.arange(size[0] * size[1]))


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (17, 9), (1, 20)])
def test_tile_matches_stay_in_their_tile_and_are_the_best_there(size):
    grid = grid_of(*size)
    slots = token_matchers.tile(grid)
    kept, rest = window_destinations(*size, torch.Generator().manual_seed(0))
    home = torch.empty(size[0] * size[1], dtype=torch.long)
    for shape, ids in enumerate(tiles(*size, 8)):
        home[ids] = 1000 * shape + torch.arange(len(ids))[:, None]
    unit = torch.nn.functional.normalize(grid.metric.double(), dim=-1)
    for image in range(2):
        scored = []
        for token in rest[0].tolist():
            near = [d for d in kept[0].tolist() if home[d] == home[token]]
            best = max(near, key=lambda d: float(unit[image, token] @ unit[image, d]))
            scored.append((-float(unit[image, token] @ unit[image, best]), token, best))
        target = {token: owner for _, token, owner in sorted(scored)[: grid.removed]}
        want: dict[int, set[int]] = {t: {t} for t in range(len(home)) if t not in target}
        for token, owner in target.items():
            want[owner].add(token)
        assert groups_of(slots, image) == {frozenset(members) for members in want.values()}


def slow_cluster(similarity, removed):
    """Average linkage by its definition: the mean over all pairs of members, in float64."""
    groups = [[i] for i in range(len(similarity))]
    for _ in range(removed):
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        linkage = {(i, j): float(similarity[groups[i]][:, groups[j]].double().mean()) for i, j in pairs}
        i, j = max(pairs, key=linkage.__getitem__)
        groups[i] += groups.pop(j)
    return {frozenset(group) for group in groups}


def test_clusters_equal_the_slow_version():
    x = torch.nn.functional.normalize(torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(2)), dim=-1)
    similarity = x @ x.transpose(1, 2)
    for removed in (0, 5, 8, 12):
        labels = cluster(similarity, removed)
        for row, matrix in zip(labels, similarity, strict=True):
            got = {frozenset((row == value).nonzero().flatten().tolist()) for value in row.unique()}
            assert got == slow_cluster(matrix, removed)
            assert all(min(group) == int(row[min(group)]) for group in got)


def test_agglomerative_maps_have_the_same_share_in_every_tile():
    slots = token_matchers.agglomerative(grid_of(8, 12, ratio=0.75))
    for ids in tiles(8, 12, 4):
        for tile in ids:
            assert len(slots.slot[0, tile].unique()) == 4
    assert slots.kept == 24

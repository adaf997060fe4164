"""Pooling by blocks and the choice of key blocks, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from ahead_of_time import ARCHITECTURES, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, errors, far_tensor, harden

from diffaccel import Unsupported
from diffaccel.engine.flops import count_flops
from diffaccel.kernels.block_selection import (
    attended_pairs,
    kept_blocks,
    lists_of,
    patch_order,
    pool_blocks,
    pool_blocks_oracle,
    pooled_flops,
    select_blocks,
    select_blocks_oracle,
    token_blocks,
)
from diffaccel.kernels.key_lists import visible_of
from diffaccel.kernels.triton_support import force_triton

BLOCK, PATCH = (32, 16), (4, 8)
LAYOUTS = {  # grid, text before, text after; tail blocks that are full, nearly empty, and of one token
    "picture": ((8, 8), 0, 0),
    "text before": ((7, 9), 5, 0),
    "text after": ((5, 13), 0, 21),
}


def layout(name):
    grid, before, after = LAYOUTS[name]
    return token_blocks(grid, grid[0] * grid[1], before, after, BLOCK, PATCH), before + grid[0] * grid[1] + after


def draw(tokens, size=24, seed=0, batch=2, heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, size, generator=generator).to(dtype) for _ in range(2)]


def chosen(lists):
    """Sets of key blocks, [batch][head][query block]."""
    return [
        [
            [set(row[:count].tolist()) for row, count in zip(rows, counts.tolist(), strict=True)]
            for rows, counts in zip(*heads, strict=True)
        ]
        for heads in zip(lists.blocks, lists.counts, strict=True)
    ]


# --- where tokens stand ---


def test_patches_are_compact():
    assert patch_order(4, 6, (2, 3)).tolist() == [
        *(0, 1, 2, 6, 7, 8), *(3, 4, 5, 9, 10, 11), *(12, 13, 14, 18, 19, 20), *(15, 16, 17, 21, 22, 23)
    ]  # fmt: skip
    assert patch_order(3, 3, (2, 2)).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_stands_once_and_text_apart(name):
    blocks, tokens = layout(name)
    grid, before, _ = LAYOUTS[name]
    picture = range(before, before + grid[0] * grid[1])
    for table, count in ((blocks.queries, blocks.picture_queries), (blocks.keys, blocks.picture_keys)):
        assert sorted(table[table >= 0].tolist()) == list(range(tokens))
        assert sorted(table[:count][table[:count] >= 0].tolist()) == list(picture)
        assert (table >= 0).any(1).all()
    assert blocks.text_keys == -(-(tokens - len(picture)) // BLOCK[1])


def test_reference_pictures_follow_the_grid():
    blocks = token_blocks((4, 8), 40, 3, 0, BLOCK, PATCH)
    assert blocks.queries[:2].flatten()[:40].tolist() == [3 + n for n in patch_order(4, 8, PATCH).tolist()] + [
        *range(35, 43)
    ]
    with pytest.raises(Unsupported, match="a grid of 4 x 8 tokens does not fit 31 tokens"):
        token_blocks((4, 8), 31)


# --- pooling ---


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [8, 40, 128])
def test_pooling_follows_the_oracle(size, kind):
    blocks, tokens = layout("text before")
    x = draw(tokens, size, dtype=DTYPES[kind])[0]
    x[0, 0, 7] = 0  # a token without a direction
    wanted = pool_blocks_oracle(x, blocks.queries)
    for got in (harden(pool_blocks, x, blocks.queries), pool_blocks(x, blocks.queries)):
        for ours, reference in zip(got, wanted, strict=True):
            assert ours.dtype == torch.float32
            assert errors(ours, reference)[0] < 2e-6


def test_alike_tokens_are_alike():
    blocks, tokens = layout("picture")
    x = torch.randn(1, 1, 1, 16).expand(1, 1, tokens, 16) * torch.rand(tokens, 1)
    means, similarity = pool_blocks(x, blocks.keys)
    assert (similarity - 1).abs().max() < 1e-5
    assert (pool_blocks(-x, blocks.keys)[0] + means).abs().max() < 1e-7
    assert (pool_blocks(torch.zeros_like(x), blocks.keys)[1] == 0).all()


def test_far_memory_is_pooled():
    blocks = token_blocks((1, 2), 2, block=BLOCK)
    for dimension in range(3):
        x = far_tensor((2, 2, 2, 16), dimension).copy_(torch.randn(2, 2, 2, 16))
        with force_triton():
            assert errors(pool_blocks(x, blocks.keys)[0], pool_blocks_oracle(x, blocks.keys)[0])[0] < 1e-6


def test_torch_knows_the_operator():
    blocks, tokens = layout("text after")
    x = draw(tokens)[0]
    torch.library.opcheck(torch.ops.diffaccel.pool_blocks, (x, blocks.keys))
    compiled = torch.compile(lambda x: pool_blocks(x, blocks.keys)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), pool_blocks(x, blocks.keys)[0] + 1)


def test_the_kernel_compiles_for_gpus_that_are_not_here():
    types = {"x_ptr": "*bf16", "table_ptr": "*i32", "mean_ptr": "*fp32", "similarity_ptr": "*fp32", "heads": "i32"}
    types |= {"x_batch": "i32:16", "x_head": "i32:16", "x_row": "i32:16"}
    variants = [
        Variant(
            f"{size}",
            "diffaccel.kernels.block_selection",
            "pool_blocks_kernel",
            types,
            {"SIZE": size, "WIDTH": width, "BLOCK": 128},
            arch,
            warps=4,
            stages=3,
        )
        for arch in ARCHITECTURES
        for size, width in ((72, 128), (128, 128))
    ]
    for found in compile_variants(variants):
        assert_fits(found, matrix=False, loops=False)


# --- selection ---


@pytest.mark.parametrize("similarity", [None, 0.04, 1.0])
@pytest.mark.parametrize(("mode", "keep"), [("topk", 0.3), ("topk", 1e-6), ("mass", 0.4), ("mass", 1e-6)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_selection_follows_the_oracle(name, mode, keep, similarity):
    blocks, tokens = layout(name)
    query, key = draw(tokens)
    lists = select_blocks(query, key, blocks, keep, mode, similarity=similarity)
    assert chosen(lists) == select_blocks_oracle(query, key, blocks, keep, mode, similarity)
    rows = lists.blocks.sort(-1).values
    assert torch.equal(rows, torch.arange(blocks.keys.shape[0]).int().expand_as(rows))  # numbers in range, each once
    assert (lists.counts >= 1 + blocks.text_keys).all()


@pytest.mark.parametrize("mode", ["topk", "mass"])
def test_text_sees_all_and_is_seen_by_all(mode):
    for name in ("text before", "text after"):
        blocks, tokens = layout(name)
        _, before, after = LAYOUTS[name]
        visible = visible_of(select_blocks(*draw(tokens), blocks, 0.2, mode), tokens, tokens)
        text = torch.tensor([*range(before), *range(tokens - after, tokens)])
        assert visible[:, :, text].all()
        assert visible[:, :, :, text].all()
        assert not visible.all()


@pytest.mark.parametrize("mode", ["topk", "mass"])
def test_everything_is_kept_when_everything_is_asked_for(mode):
    blocks, tokens = layout("text before")
    lists = select_blocks(*draw(tokens), blocks, 1.0, mode)
    assert (lists.counts == blocks.keys.shape[0]).all()


def test_a_share_costs_the_same_everywhere_and_mass_goes_where_it_is():
    blocks, tokens = layout("picture")
    query, key = draw(tokens, heads=1)
    assert (select_blocks(query, key, blocks, 0.5).counts == 2).all()
    key[1] *= 30  # one row of the batch attends sharply
    counts = select_blocks(4 * query, key, blocks, 0.9, "mass").counts
    assert counts[1].sum() < counts[0].sum()
    assert [kept_blocks(share, 10) for share in (0.01, 0.1, 0.3, 0.31, 1.0)] == [1, 1, 3, 4, 10]


def test_the_blocks_that_matter_are_found():
    """Queries of one quarter of the picture point at the keys of one other quarter."""
    blocks = token_blocks((8, 16), 128, block=(16, 16), patch=(4, 4))
    region = (torch.arange(8)[:, None] // 4 * 4 + torch.arange(16)[None] // 4).flatten()
    directions = 8 * torch.eye(8, 16)
    query, key = directions[region][None, None], directions[(region + 3) % 8][None, None]
    numbers = [int(region[int(block[0])]) for block in blocks.keys]
    for mode in ("topk", "mass"):
        (((*rows,),),) = chosen(select_blocks(query, key, blocks, 0.1, mode))
        for block, kept in zip(blocks.queries, rows, strict=True):
            assert {(numbers[j] + 3) % 8 for j in kept} == {int(region[int(block[0])])}


def test_extreme_scores_stay_finite():
    blocks, tokens = layout("text after")
    query, key = draw(tokens)
    for scale in (0.0, 1e3, 1e18):
        for mode in ("topk", "mass"):
            for similarity in (None, 0.02, 1.0):
                lists = select_blocks(scale * query, scale * key, blocks, 0.3, mode, similarity=similarity)
                assert (lists.counts >= 1).all()
                assert (lists.counts <= blocks.keys.shape[0]).all()


def test_pairs_and_flops_are_counted():
    blocks, tokens = layout("text before")
    query, key = draw(tokens)
    lists = select_blocks(query, key, blocks, 0.4, "mass")
    assert int(attended_pairs(lists)) == int(visible_of(lists, tokens, tokens).sum())
    assert count_flops(lambda: select_blocks(query, key, blocks, 0.4))[1] == pooled_flops(query.shape, blocks)


def test_lists_are_ascending():
    blocks, _ = layout("picture")
    kept = torch.tensor([[False, True, False, True], [True, True, True, True]])[None, None]
    lists = lists_of(kept, blocks)
    assert lists.blocks[0, 0].tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert lists.counts[0, 0].tolist() == [2, 4]
    assert math.isclose(float(kept.float().mean()), 0.75)

"""Slot maps and member lists against their oracles: equal numbers, bit for bit, on every path."""

from __future__ import annotations

import functools

import pytest
import torch
from ahead_of_time import ARCHITECTURES, Variant, assert_fits, compile_variants
from kernel_harness import every_second, far_tensor, harden

from diffaccel.errors import Unsupported
from diffaccel.kernels import slot_map as module
from diffaccel.kernels.slot_map import (
    member_lists,
    member_lists_oracle,
    select_best,
    slot_map,
    slot_map_oracle,
)
from diffaccel.kernels.triton_support import force_triton

# (batch, sources, destinations, removed)
SHAPES = [(1, 1, 1, 0), (1, 1, 1, 1), (2, 48, 16, 32), (3, 77, 23, 77), (1, 130, 64, 1), (1, 2100, 500, 1300)]


def problem(batch, sources, destinations, *, ties=False, favoured=False, seed=0):
    """Scores, the chosen destinations, and shuffled lists of tokens."""
    generator = torch.Generator().manual_seed(seed)
    best = 2 * torch.rand(batch, sources, generator=generator) - 1
    if ties:
        best = (best * 2).round() / 2  # -1, -0.5, -0.0, 0.0, 0.5 and 1
    index = torch.randint(destinations, (batch, sources), generator=generator, dtype=torch.int32)
    lists = [torch.randperm(sources + destinations, generator=generator).int() for _ in range(batch)]
    order = torch.stack(lists)
    first = torch.rand(batch, sources, generator=generator) > 0.7 if favoured else None
    return best, index, order[:, destinations:].contiguous(), order[:, :destinations].contiguous(), first


@pytest.mark.parametrize("favoured", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_maps(shape, ties, favoured):
    *inputs, first = problem(*shape[:3], ties=ties, favoured=favoured)
    want = slot_map_oracle(*inputs, shape[3], first)
    got = slot_map(*inputs, shape[3], first)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if shape[1] < 1000 or (ties and favoured):  # the large one runs over two chunks of the kernel's loops
        hardened = harden(slot_map, *inputs, shape[3], first)
        assert all(torch.equal(a, b) for a, b in zip(hardened, want, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 64, 33), (3, 300, 17), (1, 70, 70)])
def test_lists(shape):
    batch, tokens, kept = shape
    generator = torch.Generator().manual_seed(1)
    slot = torch.cat([torch.arange(kept).expand(batch, -1), torch.randint(kept, (batch, tokens - kept))], dim=1)
    slot = torch.stack([row[torch.randperm(tokens, generator=generator)] for row in slot]).int()
    want = member_lists_oracle(slot, kept)
    for got in (member_lists(slot, kept), harden(member_lists, slot, kept)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_properties():
    """Every token has a row, rows are owned in raster order, sizes add up, and nothing depends on the batch."""
    *inputs, first = problem(3, 90, 30, favoured=True)
    slot, kept = slot_map(*inputs, 60, first)
    assert torch.equal(kept, kept.sort(dim=1).values)
    assert torch.equal(slot.gather(1, kept.long()), torch.arange(60, dtype=torch.int32).expand(3, -1))
    start, members = member_lists(slot, 60)
    assert (start.diff() >= 1).all()
    assert (start[:, -1] == 120).all()
    assert torch.equal(members.sort(dim=1).values, torch.arange(120, dtype=torch.int32).expand(3, -1))
    alone = slot_map(*(x[1:2] for x in inputs), 60, first[1:2])
    assert torch.equal(alone[0], slot[1:2])


def test_selection_is_exact_where_scores_are_equal():
    score = torch.tensor([[0.5, -0.0, 0.0, 0.5, 1.0, -1.0, 0.0]])
    for count, want in ((0, []), (1, [4]), (2, [4, 0]), (3, [4, 0, 3]), (4, [4, 0, 3, 1]), (5, [4, 0, 3, 1, 2])):
        assert sorted(select_best(score, count)[0].nonzero().flatten().tolist()) == sorted(want)
    unloved = torch.tensor([[False, False, False, False, False, True, False]])
    assert select_best(score, 1, unloved)[0].nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("bits", [0x7FC00000, -0x00400000, 0x7F800000, -0x00800000], ids=["nan", "-nan", "inf", "-inf"])
def test_scores_that_overflowed_merge_as_many_as_asked(bits):
    """Otherwise the kernel would write rows behind the end of its output."""
    best, index, sources, destinations, _ = problem(2, 48, 16)
    best[0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    best[1, :40] = best[0, :40]
    for got in (slot_map, functools.partial(harden, slot_map)):
        slot, kept = got(best, index, sources, destinations, 20, None)
        assert kept.diff().min() > 0
        assert torch.equal(slot.gather(1, kept.long()), torch.arange(44, dtype=torch.int32).expand(2, -1))


def test_lists_of_any_stride():
    *inputs, first = problem(2, 48, 16, favoured=True)
    want = slot_map(*inputs, 20, first)
    with force_triton():
        got = slot_map(*(every_second(x) for x in inputs), 20, every_second(first))
        lists = member_lists(every_second(want[0]), 44)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(lists, member_lists(want[0], 44), strict=True))


@pytest.mark.parametrize("count", [1, 7, 30])
def test_both_ways_to_the_nth_largest(count):
    key = torch.randint(-5, 5, (3, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(module._nth_largest(key, count), module._nth_largest_sorted(key, count))


@pytest.mark.parametrize("removed", [-1, 49])
def test_more_than_all_sources_cannot_be_merged(removed):
    *inputs, _ = problem(1, 48, 16)
    with pytest.raises(ValueError, match="cannot merge"):
        slot_map(*inputs, removed, None)


def test_operators():
    *inputs, first = problem(2, 40, 12, favoured=True)
    for favoured in (None, first):
        torch.library.opcheck(slot_map.op, (*inputs, 20, favoured))
    slot, kept = slot_map(*inputs, 20, first)
    torch.library.opcheck(member_lists.op, (slot, kept.shape[1]))
    compiled = torch.compile(
        lambda *x: member_lists(slot_map(*x, 20, None)[0], 32), fullgraph=True, backend="aot_eager"
    )
    want = member_lists(slot_map(*inputs, 20, None)[0], 32)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), want, strict=True))
    with pytest.raises(Unsupported, match="has no gradient"):
        slot_map(inputs[0].clone().requires_grad_(), *inputs[1:], 20, None)


def test_a_batch_beyond_two_billion_elements():
    """Batch strides are 64 bits wide: the second row of every list lies past 2^31 elements."""
    *inputs, _ = problem(2, 20, 12)
    far = [far_tensor(x.shape, 0, x.dtype).copy_(x) for x in inputs[:1]]
    with force_triton():
        got = slot_map(*far, *inputs[1:], 10, None)
    assert all(torch.equal(a, b) for a, b in zip(got, slot_map_oracle(*inputs, 10, None), strict=True))
    lists = far_tensor((2, 32), 0, torch.int32).copy_(got[0])
    with force_triton():
        made = member_lists(lists, 22)
    assert all(torch.equal(a, b) for a, b in zip(made, member_lists_oracle(got[0], 22), strict=True))


def test_compiled_for_gpus_that_are_not_here():
    lists = dict.fromkeys(("index_ptr", "source_ptr", "destination_ptr", "slot_ptr", "kept_ptr"), "*i32")
    counts = ("sources", "tokens", "removed", "best_batch", "index_batch", "source_batch", "destination_batch")
    types = lists | dict.fromkeys((*counts, "favoured_batch"), "i32") | {"best_ptr": "*fp32", "merged_ptr": "*i8"}
    name, variants = "diffaccel.kernels.slot_map", []
    for architecture in ARCHITECTURES:
        for favoured in (False, True):
            tile = module.SLOT_TILE
            constants = {"FAVOURED": favoured, "COLUMNS": tile.columns}
            pointer = {"favoured_ptr": "*i8" if favoured else "*fp32"}
            options = (types | pointer, constants, architecture, tile.warps, tile.stages)
            variants.append(Variant("map", name, "slot_map_kernel", *options))
        tile = module.LIST_TILE
        lists = dict.fromkeys(("slot_ptr", "start_ptr", "member_ptr"), "*i32")
        lists |= dict.fromkeys(("tokens", "kept", "slot_batch"), "i32")
        constants = {"ROWS": tile.rows, "COLUMNS": tile.columns}
        options = (lists, constants, architecture, tile.warps, tile.stages)
        variants.append(Variant("lists", name, "member_lists_kernel", *options))
    for found in compile_variants(variants):
        assert_fits(found, matrix=False, loops=False)

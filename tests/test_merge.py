"""Merge and unmerge against their float64 oracles: torch path, interpreter, ahead-of-time compilation."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import ARCHITECTURES, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, assert_accurate, every_second, far_tensor, harden
from torch.nn import functional as F

from diffaccel.errors import Unsupported
from diffaccel.kernels import merge
from diffaccel.kernels.merge import merge_tokens, merge_tokens_oracle, unmerge_tokens, unmerge_tokens_oracle
from diffaccel.kernels.slot_map import member_lists
from diffaccel.kernels.triton_support import force_triton

# (batch rows, maps, tokens, kept, channels)
SHAPES = [(1, 1, 1, 1, 8), (4, 2, 33, 17, 40), (3, 3, 65, 65, 72), (2, 1, 130, 40, 640)]
OPTIONS = ["plain", "weighted", "norm", "norm, scale and shift", "everything"]


def noise(*shape, seed=0, kind="fp32"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[kind])


def maps(count, tokens, kept, seed=0):
    """Random slots in which every row has a member; one row has most of them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        extra = torch.randint(kept, (tokens - kept,), generator=generator)
        extra[: len(extra) // 3] = 0
        rows.append(torch.cat([torch.arange(kept), extra])[torch.randperm(tokens, generator=generator)])
    slot = torch.stack(rows).int()
    return slot, *member_lists(slot, kept)


def arguments(shape, option, kind):
    batch, count, tokens, kept, channels = shape
    _, start, members = maps(count, tokens, kept)
    x = noise(batch, tokens, channels, kind=kind) + 1
    weight = torch.rand(count, tokens, generator=torch.Generator().manual_seed(2)) + 0.1
    scale, shift = noise(batch, channels, seed=3, kind=kind) + 1, noise(1, channels, seed=4, kind=kind)
    more = {
        "plain": (None, None, None, None),
        "weighted": (weight, None, None, None),
        "norm": (None, None, None, 1e-6),
        "norm, scale and shift": (None, scale, shift, 1e-5),
        "everything": (weight, shift, scale, 1e-5),
    }
    return x, start, members, *more[option]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_merge(shape, option, kind):
    inputs = arguments(shape, option, kind)
    want = merge_tokens_oracle(*inputs)
    assert_accurate(merge_tokens(*inputs), want, kind)
    assert_accurate(harden(merge_tokens, *inputs), want, kind)


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_merge_in_parts_of_the_channels(option):
    """640 channels are two programs, and one program where a whole token must be normalised."""
    inputs = arguments(SHAPES[3], option, "fp16")
    assert_accurate(harden(merge_tokens, *inputs), merge_tokens_oracle(*inputs), "fp16")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("options", ["plain", "residual", "gate", "both"])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_unmerge(shape, options, kind):
    batch, count, tokens, kept, channels = shape
    slot, *_ = maps(count, tokens, kept)
    y, residual = noise(batch, kept, channels, kind=kind), noise(batch, tokens, channels, seed=1, kind=kind)
    residual = residual if options in ("residual", "both") else None
    gate = noise(batch, channels, seed=2, kind=kind) if options in ("gate", "both") else None
    want = unmerge_tokens_oracle(y, slot, residual, gate)
    for got in (unmerge_tokens(y, slot, residual, gate), harden(unmerge_tokens, y, slot, residual, gate)):
        if options == "plain":
            assert torch.equal(got.double(), want)  # a copy
        else:
            assert_accurate(got, want, kind)


def test_merging_twice_is_merging_once():
    """U M is a projection, a map of single tokens changes nothing, and constants stay."""
    slot, start, members = maps(2, 50, 20)
    x = noise(4, 50, 16)
    back = unmerge_tokens(merge_tokens(x, start, members), slot)
    again = unmerge_tokens(merge_tokens(back, start, members), slot)
    assert (again - back).abs().max() < 1e-6
    alone, *lists = maps(2, 20, 20)
    y = noise(4, 20, 16)
    assert torch.equal(unmerge_tokens(merge_tokens(y, *lists), alone), y)
    assert torch.equal(merge_tokens(torch.full((2, 50, 8), 3.0), start, members), torch.full((2, 20, 8), 3.0))


def test_duplicated_tokens_with_the_log_of_their_number_attend_as_before():
    slot, start, members = maps(1, 40, 12)
    base = noise(1, 12, 8).double()
    full = base[:, slot[0].long()]
    bias = start.diff().double().log()[:, None]
    wanted = F.scaled_dot_product_attention(base, full, full)
    assert (F.scaled_dot_product_attention(base, base, base, attn_mask=bias) - wanted).abs().max() < 1e-12
    assert (F.scaled_dot_product_attention(base, base, base) - wanted).abs().max() > 1e-2
    assert (merge_tokens(full.float(), start, members) - base.float()).abs().max() < 1e-6


def test_views():
    """Expanded batches, channel slices and channels-first tokens, on both paths."""
    slot, start, members = maps(1, 30, 12)
    x = noise(1, 30, 16)
    wide = noise(2, 30, 48)
    for view in (x.expand(3, -1, -1), wide[..., 16:32], noise(2, 16, 30).transpose(1, 2)):
        want = merge_tokens_oracle(view, start, members)
        with force_triton():
            kernel = merge_tokens(view, start, members)
            back = unmerge_tokens(view[:, :12], slot, view)
        for got in (kernel, merge_tokens(view, start, members)):
            assert_accurate(got, want, "fp32")
        assert_accurate(back, unmerge_tokens_oracle(view[:, :12], slot, view), "fp32")


def test_lists_and_factors_of_any_stride():
    slot, start, members = maps(2, 30, 12)
    x, weight, scale, shift = noise(2, 30, 16), noise(2, 30).abs() + 0.1, noise(2, 16), noise(2, 16)
    factors = weight, scale, shift
    with force_triton():
        merged = merge_tokens(x, *(every_second(t) for t in (start, members, *factors)), 1e-5)
        back = unmerge_tokens(x[:, :12], every_second(slot), x, every_second(scale))
    assert_accurate(merged, merge_tokens_oracle(x, start, members, *factors, 1e-5), "fp32")
    assert_accurate(back, unmerge_tokens_oracle(x[:, :12], slot, x, scale), "fp32")


@pytest.mark.parametrize("dimension", [0, 1])
def test_rows_beyond_two_billion_elements(dimension):
    shape = [(2, 3, 16), (1, 2, 16)][dimension]
    far = far_tensor(shape, dimension)
    far.copy_(noise(*shape, kind="fp16"))
    tokens = shape[1]
    slot, start, members = maps(1, tokens, 2)
    with force_triton():
        merged = merge_tokens(far, start, members)
        back = unmerge_tokens(far, slot, far if tokens == slot.shape[1] else None)
    assert_accurate(merged, merge_tokens_oracle(far, start, members), "fp16")
    assert_accurate(back, unmerge_tokens_oracle(far, slot, far), "fp16")


def test_operators():
    slot, start, members = maps(2, 33, 17)
    x, y = noise(4, 33, 16), noise(4, 17, 16)
    scale, gate = noise(4, 16, seed=1), noise(4, 16, seed=2)
    torch.library.opcheck(merge_tokens.op, (x, start, members))
    torch.library.opcheck(merge_tokens.op, (x.half(), start, members, torch.rand(2, 33), scale, scale[:1], 1e-5))
    torch.library.opcheck(unmerge_tokens.op, (y, slot, x, gate))
    torch.library.opcheck(unmerge_tokens.op, (y.transpose(1, 2).contiguous().transpose(1, 2), slot))
    compiled = torch.compile(
        lambda x: unmerge_tokens(merge_tokens(x, start, members), slot, x), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), unmerge_tokens(merge_tokens(x, start, members), slot, x))
    with pytest.raises(Unsupported, match="has no gradient"):
        merge_tokens(x.clone().requires_grad_(), start, members)
    with pytest.raises(Unsupported, match="has no gradient"):
        unmerge_tokens(y.clone().requires_grad_(), slot)


def variants(architecture):
    name = "diffaccel.kernels.merge"
    floats = dict.fromkeys(("x_ptr", "scale_ptr", "shift_ptr", "out_ptr"), "*bf16") | {"weight_ptr": "*fp32"}
    types = floats | dict.fromkeys(("start_ptr", "member_ptr"), "*i32") | {"x_row": "i32:16", "x_batch": "i64:16"}
    counts = ("kept", "maps", "start_batch", "member_batch", "weight_batch", "scale_batch", "shift_batch")
    types |= dict.fromkeys(counts, "i32") | {"eps": "fp32"}
    for channels, norm in ((320, False), (3072, False), (640, True), (1536, True), (3072, True)):
        width = channels if norm else min(channels, 512)
        tile = merge.tiles(merge.MERGE_TILES, width, (8, 0))
        columns = 1 << (width - 1).bit_length()
        constants = {"channels": channels, "ROWS": tile.rows, "COLUMNS": columns, "NORM": norm}
        constants |= dict.fromkeys(("WEIGHTED", "SCALED", "SHIFTED"), norm)
        yield Variant("merge", name, "merge_tokens_kernel", types, constants, architecture, tile.warps, tile.stages)
    types = dict.fromkeys(("y_ptr", "residual_ptr", "gate_ptr", "out_ptr"), "*bf16") | {"slot_ptr": "*i32"}
    types |= dict.fromkeys(("tokens", "maps", "slot_batch", "gate_batch"), "i32")
    types |= dict.fromkeys(("y_batch", "residual_batch"), "i64:16") | dict.fromkeys(("y_row", "residual_row"), "i32:16")
    tile = merge.tiles(merge.UNMERGE_TILES, 3072, (8, 0))
    constants = {"channels": 3072, "ROWS": tile.rows, "COLUMNS": tile.columns, "RESIDUAL": True, "GATED": True}
    yield Variant("unmerge", name, "unmerge_tokens_kernel", types, constants, architecture, tile.warps, tile.stages)


def test_compiled_for_gpus_that_are_not_here():
    for found in compile_variants([v for architecture in ARCHITECTURES for v in variants(architecture)]):
        assert_fits(found, matrix=False, loops=False)

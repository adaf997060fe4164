"""Matching against its float64 oracle: torch path, interpreter, ahead-of-time compilation, far-away memory."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import ARCHITECTURES, CONSUMER, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, every_second, far_tensor, harden
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.errors import Unsupported
from diffaccel.kernels import matching
from diffaccel.kernels.matching import inverse_norms, match_tokens, match_tokens_oracle
from diffaccel.kernels.triton_support import force_triton, tiles

# (batch, sources, destinations, channels)
SHAPES = [(1, 1, 1, 8), (2, 17, 15, 40), (3, 129, 130, 72), (1, 77, 333, 160)]
LIMITS = {"fp32": 1e-6, "fp16": 1.5e-3, "bf16": 1e-2}  # of a cosine; the torch path rounds unit vectors and products


def problem(batch, sources, destinations, channels, kind="fp32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = sources + destinations
    tokens = torch.randn(batch, count, channels, generator=generator).to(DTYPES[kind])
    lists = torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)]).int()
    return tokens, lists[:, destinations:].contiguous(), lists[:, :destinations].contiguous()


def assert_matches(got, inputs, kind):
    """Values within the limit, and every index names a destination as good as the best one within it."""
    best, index = got
    want, _ = match_tokens_oracle(*inputs)
    assert best.dtype == torch.float32
    assert index.dtype == torch.int32
    assert (best - want).abs().max() <= LIMITS[kind]
    tokens, sources, destinations = inputs
    for b in range(len(tokens)):
        x = tokens[b].double()
        chosen = x[destinations[b][index[b].long()].long()]
        cosine = torch.cosine_similarity(x[sources[b].long()], chosen, dim=1, eps=1e-30)
        assert (cosine - want[b]).abs().max() <= LIMITS[kind]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path(shape, kind):
    inputs = problem(*shape, kind)
    assert_matches(match_tokens(*inputs), inputs, kind)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, kind):
    """fp16 products accumulate in fp32 and nothing else is rounded, so the kernel is held to the fp32 limit."""
    inputs = problem(*shape, kind)
    got = harden(match_tokens, *inputs)
    assert_matches(got, inputs, "fp32")
    if kind == "fp32":
        assert torch.equal(got[1], match_tokens_oracle(*inputs)[1])


def test_many_small_problems_are_one_product(monkeypatch):
    """Tiles: the batched form and the row by row form agree."""
    inputs = problem(12, 48, 16, 24)
    got = match_tokens(*inputs)
    monkeypatch.setattr(matching, "_SMALL", 0)
    rowwise = match_tokens(*inputs)
    assert torch.equal(got[1], rowwise[1])
    assert (got[0] - rowwise[0]).abs().max() < 1e-6
    assert_matches(got, inputs, "fp32")


def test_parts_of_a_large_problem(monkeypatch):
    inputs = problem(2, 50, 20, 16)
    whole = match_tokens(*inputs)
    monkeypatch.setattr(matching, "_SMALL", 0)
    monkeypatch.setattr(matching, "_SIMILARITIES", 20 * 7)
    parts = match_tokens(*inputs)
    assert torch.equal(whole[1], parts[1])
    assert (whole[0] - parts[0]).abs().max() < 1e-6


def test_ties_take_the_lowest_position_and_zero_tokens_match_nothing():
    tokens = torch.zeros(1, 300, 16)
    tokens[0, :200, 0] = 2.0  # equal destinations in every tile and split
    tokens[0, 290:, 0] = 3.0  # sources like them; tokens 200 to 289 are zero
    destinations, sources = torch.arange(200).int()[None], torch.arange(200, 300).int()[None]
    for got in (match_tokens(tokens, sources, destinations), harden(match_tokens, tokens, sources, destinations)):
        assert torch.equal(got[1], torch.zeros(1, 100, dtype=torch.int32))
        assert torch.equal(got[0], torch.tensor([[0.0] * 90 + [1.0] * 10]))
    assert torch.equal(inverse_norms(torch.zeros(2, 3)), torch.zeros(2))
    only_zero = match_tokens(tokens, torch.tensor([[295]]).int(), torch.tensor([[250, 251]]).int())
    assert only_zero[0].item() == 0.0
    assert only_zero[1].item() == 0


def test_length_does_not_matter_and_order_of_destinations_does_not():
    tokens, sources, destinations = problem(2, 40, 30, 24)
    best, index = match_tokens(tokens, sources, destinations)
    scaled = match_tokens(tokens * torch.logspace(-3, 3, 70)[None, :, None], sources, destinations)
    assert torch.equal(index, scaled[1])
    shuffle = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    other = match_tokens(tokens, sources, destinations[:, shuffle])
    assert torch.equal(destinations.gather(1, index.long()), destinations[:, shuffle].gather(1, other[1].long()))
    assert (best - other[0]).abs().max() < 1e-6


def test_views():
    """Channels-last features, an expanded batch, and lists shared over the batch."""
    tokens, sources, destinations = problem(1, 40, 30, 24)
    want = match_tokens_oracle(tokens, sources, destinations)
    lists = sources.expand(3, -1), destinations.expand(3, -1)
    channels_first = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (tokens.expand(3, -1, -1), channels_first.expand(3, -1, -1), tokens.repeat(3, 1, 2)[..., :24]):
        with force_triton():
            kernel = match_tokens(view, *lists)
        for got in (match_tokens(view, *lists), kernel):
            assert torch.equal(got[1], want[1].expand(3, -1))
    with force_triton():
        assert torch.equal(match_tokens(tokens, every_second(sources), every_second(destinations))[1], want[1])


def test_what_has_no_kernel_takes_the_torch_path():
    tokens = torch.zeros(1, 4, 16)
    with force_triton():
        assert match_tokens.path(tokens) == "triton"
        assert match_tokens.path(tokens.double()) == "torch"
        assert match_tokens.path(tokens.expand(65_536, -1, -1)) == "torch"  # more than an axis of the grid holds


@pytest.mark.parametrize("dimension", [0, 1])
def test_rows_beyond_two_billion_elements(dimension):
    shape = [(2, 2, 16), (1, 2, 16)][dimension]
    tokens = far_tensor(shape, dimension, torch.float16)
    tokens.copy_(torch.arange(1, 1 + tokens.numel()).view(shape).to(torch.float16))
    sources, destinations = (torch.full((shape[0], 1), n, dtype=torch.int32) for n in (0, 1))
    with force_triton():
        best, index = match_tokens(tokens, sources, destinations)
    want = match_tokens_oracle(tokens, sources, destinations)
    assert (best - want[0]).abs().max() < 1e-5
    assert torch.equal(index, want[1])


def test_operator():
    """Torch's own checks, compilation in one graph, the FLOP formula, and the refusal of gradients."""
    inputs = problem(2, 20, 12, 16)
    torch.library.opcheck(match_tokens.op, inputs)
    torch.library.opcheck(match_tokens.op, (inputs[0], *(x[:1].expand(2, -1) for x in inputs[1:])))
    compiled = torch.compile(lambda *x: match_tokens(*x), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), match_tokens(*inputs), strict=True))
    with FlopCounterMode(display=False) as counter:
        match_tokens(*inputs)
    assert counter.get_total_flops() == 2 * 2 * 20 * 12 * 16
    with pytest.raises(Unsupported, match="has no gradient"):
        match_tokens(inputs[0].clone().requires_grad_(), *inputs[1:])


def test_compiled_for_gpus_that_are_not_here():
    pointers = {"inverse_ptr": "*fp32", "source_ptr": "*i32", "destination_ptr": "*i32", "best_ptr": "*fp32"}
    pointers |= {"index_ptr": "*i32", "x_row": "i32:16", "x_batch": "i64:16"}
    counts = ("tokens", "sources", "destinations", "part", "source_batch", "destination_batch")
    types = pointers | dict.fromkeys(counts, "i32")
    module, variants = "diffaccel.kernels.matching", []
    for architecture in (*ARCHITECTURES, CONSUMER):
        shapes = ((2, "*bf16", 320), (2, "*fp16", 3072), (4, "*fp32", 640))
        for size, dtype, channels in shapes[: 2 if architecture == CONSUMER else 3]:
            tile = tiles(matching.TILES, size, divmod(architecture, 10))
            constants = {"channels": channels, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
            constants |= {"PRECISION": "ieee", "UP": False}
            options = (types | {"x_ptr": dtype}, constants, architecture, tile.warps, tile.stages)
            variants.append(Variant(dtype, module, "match_tokens_kernel", *options))
        norms = {"x_ptr": "*bf16", "out_ptr": "*fp32", "count": "i32", "x_batch": "i64:16", "x_row": "i32:16"}
        constants = {"channels": 640, "ROWS": 4, "COLUMNS": 512}
        variants.append(Variant("norms", module, "inverse_norms_kernel", norms, constants, architecture, 4, 1))
    for found in compile_variants(variants):
        assert_fits(found, matrix=found.label in ("*bf16", "*fp16"), loops=found.label != "norms")

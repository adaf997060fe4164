"""Attention with key bias, split heads and block lists, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import ARCHITECTURES, CONSUMER, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, assert_accurate, assert_no_worse, errors, far_tensor, harden

from diffaccel import Unsupported
from diffaccel.engine.flops import count_flops
from diffaccel.kernels import attention_body as attention_module
from diffaccel.kernels.attention_body import (
    DENSE_TILES,
    LIST_TILES,
    attention_body,
    attention_body_lse,
    attention_body_oracle,
    head_pieces,
)
from diffaccel.kernels.key_lists import KeyLists, block_of, visible_of
from diffaccel.kernels.registration import recording
from diffaccel.kernels.triton_support import force_triton, tiles

# batch, heads, queries, keys, head size: blocks that end early, one key, one query, every way to split a head
SHAPES = [
    (1, 1, 1, 16, 8),
    (2, 1, 17, 77, 40),
    (1, 2, 129, 15, 64),
    (1, 1, 64, 333, 160),
    (1, 1, 130, 1, 80),
    (3, 1, 16, 128, 96),
    (1, 1, 33, 65, 256),
    (1, 1, 15, 154, 72),
]
PATHS = {"kernel": harden, "torch": lambda function, *inputs, **options: function(*inputs, **options)}


def draw(batch, heads, queries, keys, size, kind="fp32", seed=0, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens):
        return torch.randn(batch, heads, tokens, size, generator=generator)

    parts = sharpness * normal(queries), normal(keys), normal(keys)
    return [x.to(DTYPES[kind]) for x in parts], torch.randn(batch, keys, generator=generator)


def body(q, k, v, bias=None, lists=None, **options):
    return attention_body_lse(q, k, v, bias=bias, lists=lists, **options)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_paths_follow_the_oracle(shape, kind):
    parts, bias = draw(*shape, kind)
    wanted, lse = attention_body_oracle(*parts, bias=bias)
    kernel, by_torch = harden(body, *parts, bias), body(*parts, bias)
    stock = F.scaled_dot_product_attention(*parts, attn_mask=bias[:, None, None].expand(-1, -1, shape[2], -1))
    for out, sums in (kernel, by_torch):
        assert_accurate(out, wanted, kind)
        assert errors(sums, lse)[0] < 1e-6
    if kind != "bf16":  # the interpreter truncates
        assert_no_worse(kernel[0], stock, wanted)
        assert_no_worse(by_torch[0], stock, wanted)


@pytest.mark.parametrize("path", PATHS)
def test_any_layout_and_no_copy_of_the_heads(path):
    """Fused projections, a batch of stride 0, and keys of another length."""
    fused = torch.randn(2, 20, 3, 3, 24)
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(2))
    shared = torch.randn(1, 3, 31, 24).expand(2, -1, -1, -1)
    options = {"guard": False} if path == "kernel" else {}
    got = PATHS[path](lambda q, k, v: attention_body(q, k, v), q, k, v, **options)
    assert_accurate(got, attention_body_oracle(q, k, v)[0], "fp32")
    assert got.transpose(1, 2).is_contiguous()
    got = PATHS[path](lambda q, k, v: attention_body(q, k, v, scale=0.3), q, shared, shared, **options)
    assert_accurate(got, attention_body_oracle(q, shared, shared, scale=0.3)[0], "fp32")


def test_rows_that_are_not_aligned_are_copied_and_others_are_not(monkeypatch):
    launched = []
    kernel = attention_module.attention_body_kernel

    class Seen:
        def __getitem__(self, grid):
            return lambda *args, **options: (launched.append(args[0].data_ptr()), kernel[grid](*args, **options))

    monkeypatch.setattr(attention_module, "attention_body_kernel", Seen())
    wide = torch.randn(1, 1, 6, 33)
    for q, copied in ((wide[..., :16], True), (wide[..., 1:17], True), (torch.randn(1, 1, 6, 48)[..., 16:32], False)):
        with force_triton():
            assert_accurate(attention_body(q, q, q), attention_body_oracle(q, q, q)[0], "fp32")
        assert (launched[-1] != q.data_ptr()) == copied


@pytest.mark.parametrize("path", PATHS)
def test_properties(path):
    (q, k, v), bias = draw(1, 2, 24, 70, 40)

    def run(*inputs, **options):
        return PATHS[path](body, *inputs, **options)[0]

    plain = run(q, k, v, bias)
    order = torch.randperm(70)
    assert (run(q, k[:, :, order], v[:, :, order], bias[:, order]) - plain).abs().max() < 1e-6
    assert (run(q, k, v, bias + 3) - plain).abs().max() < 2e-6
    assert (run(q, k + torch.randn(40), v, bias) - plain).abs().max() < 5e-6
    assert (run(q, k, torch.ones_like(v), bias) - 1).abs().max() < 1e-6
    hot = run(100 * q, k, v, bias)
    assert hot.isfinite().all()
    assert (hot - attention_body_oracle(100 * q, k, v, bias=bias)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_a_key_with_the_logarithm_of_a_count_counts_so_often(path):
    (q, k, v), _ = draw(1, 1, 10, 12, 16)
    twice = torch.arange(12).repeat_interleave(torch.arange(12) % 3 + 1)
    bias = (torch.arange(12) % 3 + 1).log()[None]
    whole = attention_body_oracle(q, k[:, :, twice], v[:, :, twice])[0]
    assert_accurate(PATHS[path](body, q, k, v, bias)[0], whole, "fp32")


@pytest.mark.parametrize("path", PATHS)
def test_a_query_that_sees_nothing_gets_nothing(path):
    (q, k, v), bias = draw(2, 1, 5, 140, 16)
    bias[0] = -math.inf
    bias[1, :129] = -math.inf  # the first whole block of keys is hidden
    out, lse = PATHS[path](body, q, k, v, bias)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert lse[0].eq(-math.inf).all()
    assert_accurate(
        out[1:], attention_body_oracle(q[1:], k[1:, :, 129:], v[1:, :, 129:], bias=bias[1:, 129:])[0], "fp32"
    )


# --- lists ---


def table(tokens, size, order=None):
    """Blocks of `size` of the tokens in `order`, the last one filled up with -1."""
    order = torch.arange(tokens) if order is None else order
    filled = torch.full((-(-tokens // size) * size,), -1, dtype=torch.int32)
    filled[:tokens] = order.int()
    return filled.view(-1, size)


def random_lists(batch, heads, queries, keys, block, density, seed=0, shuffle=True):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) if shuffle else None for n in (queries, keys)]
    rows, columns = (table(n, size, order) for n, size, order in zip((queries, keys), block, orders, strict=True))
    kept = torch.rand(batch, heads, len(rows), len(columns), generator=generator) < density
    blocks = (~kept).to(torch.int8).argsort(dim=-1, stable=True).int()
    return KeyLists(rows, columns, blocks, kept.sum(-1, dtype=torch.int32))


def with_lists(q, k, v, bias, rows, columns, blocks, counts, **options):
    return body(q, k, v, bias, KeyLists(rows, columns, blocks, counts), **options)


def run_lists(path, parts, bias, lists, function=with_lists):
    return PATHS[path](function, *parts, bias, lists.queries, lists.keys, lists.blocks, lists.counts)


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("path", PATHS)
def test_lists_follow_the_oracle(path, size, density):
    """Shuffled tokens, blocks that are not full, lists of any length and some that are empty."""
    parts, bias = draw(1, 2, 75, 90, size, "fp16")
    lists = random_lists(1, 2, 75, 90, (32, 16), density)
    assert density > 0.5 or bool((lists.counts == 0).any())
    visible = visible_of(lists, 75, 90)
    wanted, lse = attention_body_oracle(*parts, bias=bias, visible=visible)
    out, sums = run_lists(path, parts, bias, lists)
    assert_accurate(out, wanted, "fp16")
    assert torch.equal(sums.isinf(), lse.isinf())
    assert (sums - lse)[~lse.isinf()].abs().max() < 1e-5
    mask = torch.where(visible, bias[:, None, None], -math.inf)
    stock = F.scaled_dot_product_attention(*parts, attn_mask=mask)
    assert_no_worse(out, stock, wanted)


@pytest.mark.parametrize("path", PATHS)
def test_full_lists_are_dense_attention_and_their_order_does_not_matter(path):
    parts, bias = draw(1, 1, 40, 48, 16)
    lists = random_lists(1, 1, 40, 48, (16, 16), 2.0)
    dense = attention_body_oracle(*parts, bias=bias)[0]
    assert_accurate(run_lists(path, parts, bias, lists)[0], dense, "fp32")
    turned = KeyLists(lists.queries, lists.keys, lists.blocks.flip(-1).contiguous(), lists.counts)
    assert_accurate(run_lists(path, parts, bias, turned)[0], dense, "fp32")


def test_keys_that_stand_nowhere_are_not_seen_by_any_path():
    parts, bias = draw(1, 1, 16, 20, 16)
    lists = random_lists(1, 1, 16, 20, (16, 16), 2.0, shuffle=False)
    keys = lists.keys.clone()
    keys[keys == 3] = -1
    lists = KeyLists(lists.queries, keys, lists.blocks, lists.counts)
    wanted = attention_body_oracle(*parts, bias=bias, visible=visible_of(lists, 16, 20))[0]
    for path in PATHS:
        assert_accurate(run_lists(path, parts, bias, lists)[0], wanted, "fp32")
    assert block_of(keys, 20).tolist() == [0] * 3 + [-1] + [0] * 12 + [1] * 4


def test_the_second_stage_leaves_out_only_what_weighs_nothing():
    """A block far below the maximum goes, within the stated error; with a threshold nothing reaches, none goes."""
    parts, _ = draw(1, 1, 16, 48, 16, sharpness=0.5)
    bias = torch.zeros(1, 48)
    bias[:, :16] = 15.0  # about 2^21 times the weight of the other two blocks
    lists = random_lists(1, 1, 16, 48, (16, 16), 2.0, shuffle=False)

    def skipping(threshold):
        def run(q, k, v, bias, *tables):
            return attention_body(q, k, v, bias=bias, lists=KeyLists(*tables), skip=threshold)

        return run_lists("kernel", parts, bias, lists, run)

    whole = run_lists("kernel", parts, bias, lists)[0]
    assert torch.equal(skipping(200.0), whole)
    ours = skipping(16.0)
    assert not torch.equal(ours, whole)
    assert errors(ours, whole.double())[0] < 32 * 2.0**-16


# --- torch ---


def test_torch_knows_the_operator():
    parts, bias = draw(1, 2, 9, 20, 16)
    lists = random_lists(1, 2, 9, 20, (16, 16), 2.0)
    for tables in ((None,) * 4, (lists.queries, lists.keys, lists.blocks, lists.counts)):
        torch.library.opcheck(torch.ops.diffaccel.attention_body, (*parts, bias, *tables, 0.25, None, True), {})
    compiled = torch.compile(
        lambda q, k, v, bias: attention_body(q, k, v, bias=bias) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*parts, bias), 2 * attention_body(*parts, bias=bias))


def test_flops_count_what_lists_have_room_for():
    parts, _ = draw(1, 2, 32, 64, 16)
    assert count_flops(lambda: attention_body(*parts))[1] == 4 * 2 * 32 * 64 * 16
    lists = random_lists(1, 2, 32, 64, (16, 16), 2.0)
    short = KeyLists(lists.queries, lists.keys, lists.blocks[..., :3], lists.counts.clamp_max(3))
    assert count_flops(lambda: attention_body(*parts, lists=short))[1] == 4 * 2 * 32 * (3 * 16) * 16


def test_the_path_is_recorded():
    parts, _ = draw(1, 1, 4, 4, 8)
    counts = {}
    with recording(counts):
        attention_body(*parts)
        with force_triton():
            attention_body(*parts)
            attention_body(*(x.double() for x in parts))  # no kernel for float64
    assert counts == {"attention_body": {"torch": 2, "triton": 1}}


def test_what_does_not_fit_is_refused():
    (q, k, v), bias = draw(1, 2, 4, 6, 16)
    lists = random_lists(2, 2, 4, 6, (16, 16), 2.0)
    for call, sentence in (
        (lambda: attention_body(q, k, v[:, :, :-1]), "do not fit together"),
        (lambda: attention_body(q[..., :12], k[..., :12], v[..., :12]), "head size 12 is not a multiple of 8"),
        (lambda: attention_body(q, k.half(), v), "must share one floating point dtype"),
        (lambda: attention_body(q, k, v, bias=bias.half()), r"must be float32 of shape \(1, 6\)"),
        (lambda: attention_body(q, k, v, lists=lists), r"the lists are for \(2, 2, 1\)"),
    ):
        with pytest.raises(Unsupported, match=sentence):
            call()
    empty = attention_body(q[:, :, :0], k, v)
    assert empty.shape == (1, 2, 0, 16)


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_far_memory_is_reached(which, dimension):
    """Strides past 2^31 elements of queries, keys and values, of rows, heads and tokens."""
    parts, _ = draw(2, 2, 2, 2, 16, "fp16")
    parts[which] = far_tensor((2, 2, 2, 16), dimension).copy_(parts[which])
    with force_triton():
        assert_accurate(attention_body(*parts), attention_body_oracle(*parts)[0], "fp16")


# --- for GPUs that are not here ---


def variant(size, architecture, *, listed=False, biased=False, skips=False):
    tile = tiles(LIST_TILES if listed else DENSE_TILES, size, divmod(architecture, 10))
    optional = {"lse": False, "bias": biased, **dict.fromkeys(("query_table", "key_table", "blocks", "counts"), listed)}
    types = {f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "out")}
    types |= {f"{name}_ptr": "*fp32" if name == "bias" else "*i32" for name, given in optional.items() if given}
    types |= {"scale_log2": "fp32", "skip": "fp32", "bias_batch": "i32"}
    types |= dict.fromkeys(("heads", "queries", "keys", "most"), "i32")  # 4429 tokens divide by nothing
    types |= {f"{name}_{stride}": "i32" for name in ("q", "k", "v", "out") for stride in ("batch", "head", "row")}
    constants = {f"{name}_ptr": None for name, given in optional.items() if not given}
    first, second = head_pieces(size)
    constants |= {"UNIT": 8, "FAR": False, "SIZE": size, "D0": first, "D1": second, "BM": tile.rows, "BN": tile.columns}
    constants |= {"LISTED": listed, "BIASED": biased, "SKIPS": skips, "LSE": False, "UP": False}
    label = f"{size}{' listed' * listed}{' biased' * biased}{' skips' * skips}"
    names = ("diffaccel.kernels.attention_body", "attention_body_kernel")
    return Variant(label, *names, types, constants, architecture, tile.warps, tile.stages)


VARIANTS = [
    *(variant(size, arch, biased=True) for arch in ARCHITECTURES for size in (40, 80, 128, 160, 256)),
    *(variant(size, arch, listed=True) for arch in ARCHITECTURES for size in (64, 128)),
    *(variant(88, arch, listed=True, skips=True) for arch in ARCHITECTURES),
    *(variant(size, CONSUMER, biased=True) for size in (80, 256)),
    variant(128, CONSUMER, listed=True),
]


@pytest.fixture(scope="module")
def compiled():
    return {(found.label, found.architecture): found for found in compile_variants(VARIANTS)}


@pytest.mark.parametrize("which", VARIANTS, ids=lambda v: f"{v.label} sm_{v.architecture}")
def test_every_tile_compiles_without_spills_and_with_tensor_cores(compiled, which):
    assert_fits(compiled[which.label, which.architecture])


def test_heads_are_split_not_padded():
    pieces = {size: head_pieces(size) for size in range(8, 257, 8)}
    assert {size: pieces[size] for size in (8, 16, 40, 64, 80, 96, 128, 160, 256)} == {
        8: (16, 0), 16: (16, 0), 40: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 160: (128, 32),
        256: (256, 0),
    }  # fmt: skip
    for size, (first, second) in pieces.items():
        assert size <= first + second <= 1 << (size - 1).bit_length() or size == 8

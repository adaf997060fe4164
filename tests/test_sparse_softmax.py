"""The operator of sparse cross-attention: torch path and kernel against an oracle that sorts."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import ARCHITECTURES, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, assert_accurate, assert_no_worse, errors, every_second, far_tensor, harden
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.errors import Unsupported
from diffaccel.kernels import sparse_softmax as file
from diffaccel.kernels.sparse_softmax import (
    _operator,
    constants,
    extra_flops,
    pieces,
    sparse_softmax,
    sparse_softmax_oracle,
)
from diffaccel.kernels.triton_support import force_triton

ALPHAS = (1.5, 2.0)


def made(batch, heads, queries, keys, size, kind="fp32", *, spread=2.0, seed=0):
    """Query, key and value whose logits have a standard deviation of `spread`."""
    maker = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, size) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(shape, generator=maker) for shape in shapes)
    return [x.to(DTYPES[kind]) for x in (q * spread, k, v)]


def padded(batch, keys, seed=1, hidden=float("-inf")):
    """A bias that hides a part of the keys, another one in every row, and shifts the others."""
    maker = torch.Generator().manual_seed(seed)
    bias = torch.randn(batch, keys, generator=maker)
    return bias.masked_fill(torch.rand(batch, keys, generator=maker) < 0.4, hidden)


def reference(q, k, v, bias=None, *, weight=2.0, alpha=1.5):
    return sparse_softmax_oracle(q, k, v, bias, scale=q.shape[-1] ** -0.5, weight=weight, alpha=alpha)


SHAPES = [  # batch, heads, queries, keys, size
    (1, 2, 65, 77, 40),
    (2, 1, 17, 154, 64),
    (1, 1, 33, 333, 24),
    (1, 1, 15, 512, 32),
    (2, 3, 1, 1, 16),
    (1, 1, 64, 16, 8),
    (1, 1, 63, 128, 160),
    (1, 1, 16, 129, 80),
    (1, 1, 16, 64, 256),
    (1, 1, 16, 17, 96),
]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, alpha):
    q, k, v = made(*shape)
    with force_triton():
        assert _operator.path(q, k, v, None) == "triton"
    assert_accurate(harden(sparse_softmax, q, k, v, alpha=alpha), reference(q, k, v, alpha=alpha), "fp32")


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES[:2], (1, 1, 17, 333, 72), (1, 1, 16, 200, 128)], ids=str)
def test_kernel_in_half_precision(shape, kind):
    q, k, v = made(*shape, kind)
    bias = padded(shape[0], shape[3])
    assert_accurate(harden(sparse_softmax, q, k, v, bias), reference(q, k, v, bias), kind)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("hidden", [float("-inf"), -10000.0])
def test_hidden_keys_have_no_weight(alpha, hidden):
    q, k, v = made(2, 1, 20, 77, 40)
    bias = padded(2, 77, hidden=hidden)
    wanted = reference(q, k, v, bias, alpha=alpha)
    for path in (sparse_softmax, lambda *inputs, **options: harden(sparse_softmax, *inputs, **options)):
        got = path(q, k, v, bias, alpha=alpha)
        assert_accurate(got, wanted, "fp32")
        other = v.masked_fill((bias < -5000)[:, None, :, None], 1e4)
        assert torch.equal(got, path(q, k, other, bias, alpha=alpha))


@pytest.mark.parametrize("keys", [1, 77, 512, 513, 4429])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_torch_path(kind, alpha, keys):
    q, k, v = made(2, 2, 40, keys, 24, kind, spread=3.0)
    bias = padded(2, keys) if keys > 1 else None
    got, wanted = sparse_softmax(q, k, v, bias, alpha=alpha), reference(q, k, v, bias, alpha=alpha)
    assert errors(got, wanted)[0] < {"fp32": 5e-6, "bf16": 4e-3}[kind]


def test_the_torch_path_cuts_long_pictures_into_parts(monkeypatch):
    q, k, v = made(3, 2, 100, 30, 16)
    bias = padded(3, 30)
    whole = sparse_softmax(q, k, v, bias)
    for rows in (7, 100, 150, 200, 450):  # a part of a head, one, one and a half, all heads, two rows of the batch
        monkeypatch.setattr(file, "_SCORES", 30 * rows)
        torch.testing.assert_close(sparse_softmax(q, k, v, bias), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_dense_part_is_as_exact_as_torch(kind):
    """The smallest extrapolation weight leaves dense attention: no worse than torch's own."""
    q, k, v = made(1, 2, 64, 77, 64, kind)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_no_worse(harden(sparse_softmax, q, k, v, weight=1e-30), F.scaled_dot_product_attention(q, k, v), wanted)
    assert_no_worse(sparse_softmax(q, k, v, weight=1e-30), F.scaled_dot_product_attention(q, k, v), wanted)


def test_weight_zero_is_torch_attention():
    q, k, v = made(2, 2, 40, 77, 40)
    assert torch.equal(sparse_softmax(q, k, v, weight=0.0), F.scaled_dot_product_attention(q, k, v))
    bias = padded(2, 77)
    stock = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :])
    assert torch.equal(sparse_softmax(q, k, v, bias, weight=0.0), stock)


# --- properties, of both paths ---

PATHS = {"torch": sparse_softmax, "kernel": lambda *inputs, **options: harden(sparse_softmax, *inputs, **options)}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_sum_to_one(path, alpha):
    q, k, v = made(1, 2, 30, 77, 40)
    torch.testing.assert_close(path(q, k, torch.ones_like(v), alpha=alpha), torch.ones_like(q), rtol=0, atol=1e-5)


def test_weights_get_negative_and_sparse(path):
    """Sparse attention (weight 1) gives most keys nothing; extrapolation (2) gives these minus their dense weight."""
    q, k, _ = made(1, 1, 20, 32, 32, spread=4.0)
    eye = torch.eye(32).expand(1, 1, 32, 32).contiguous()
    dense, sparse, far = (path(q, k, eye, weight=weight) for weight in (1e-30, 1.0, 2.0))
    assert (sparse == 0).float().mean() > 0.5
    assert (far[sparse == 0] <= 0).all()
    torch.testing.assert_close(far, 2 * sparse - dense, rtol=1e-4, atol=1e-6)


def test_order_and_common_shifts_of_keys_do_not_matter(path):
    q, k, v = made(1, 1, 20, 77, 40)
    bias, order = padded(1, 77), torch.randperm(77, generator=torch.Generator().manual_seed(3))
    plain = path(q, k, v, bias)
    torch.testing.assert_close(path(q, k[:, :, order], v[:, :, order], bias[:, order]), plain, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(path(q, k, v, bias + 4.0), plain, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_huge_logits_pick_one_key(path, alpha):
    q, k, v = made(1, 1, 20, 77, 40)
    got = path(q * 1e4, k, v, alpha=alpha)
    best = v[0, 0, (q[0, 0] @ k[0, 0].T).argmax(dim=1)]
    torch.testing.assert_close(got[0, 0], best, rtol=1e-5, atol=1e-5)


def test_equal_keys_share(path):
    q, _, v = made(1, 1, 20, 300, 40)
    got = path(q, torch.zeros_like(v), v, alpha=2.0)
    torch.testing.assert_close(got, v.mean(dim=2, keepdim=True).expand_as(q), rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_is_zero(path):
    q, k, v = made(2, 1, 20, 77, 40)
    bias = torch.zeros(2, 77)
    bias[1] = float("-inf")
    got = path(q, k, v, bias)
    assert bool((got[1] == 0).all())
    assert_accurate(got, reference(q, k, v, bias), "fp32")


# --- layouts, sizes, torch ---


def test_views_are_read_in_place():
    """Heads inside tokens as attention processors have them, a slice of a fused projection, an expanded batch."""
    maker = torch.Generator().manual_seed(0)
    q = torch.randn(2, 20, 3, 40, generator=maker).transpose(1, 2)
    kv = torch.randn(1, 77, 3, 80, generator=maker).expand(2, -1, -1, -1).transpose(1, 2)
    k, v = kv[..., :40], kv[..., 40:]
    got = harden(sparse_softmax, q, k, v, guard=False)
    assert got.is_contiguous()
    assert_accurate(got, reference(q, k, v), "fp32")
    assert_accurate(sparse_softmax(q, k, v), reference(q, k, v), "fp32")


def test_a_bias_of_any_stride():
    q, k, v = made(2, 1, 9, 33, 16)
    bias = torch.randn(2, 33)
    with force_triton():
        got = sparse_softmax(q, k, v, every_second(bias))
    assert_accurate(got, reference(q, k, v, bias), "fp32")


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_tensors_beyond_2_31_numbers(dimension):
    """Offsets past the range of 32 bits, in every stride of query, key and value."""
    shape = [1, 1, 1, 16]
    shape[dimension] = 2
    query, key, value = (far_tensor(shape, dimension) for _ in range(3))
    for x in (query, key, value):
        x.copy_(torch.randn(shape))
    with force_triton():
        got = sparse_softmax(query, key, value)
    assert_accurate(got, reference(query, key, value), "fp16")


def test_no_queries():
    q, k, v = made(1, 2, 0, 77, 40)
    with force_triton():
        assert sparse_softmax(q, k, v).shape == (1, 2, 0, 40)
    assert sparse_softmax(q, k, v).shape == (1, 2, 0, 40)


@pytest.mark.parametrize(
    ("size", "split"), [(8, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (160, (128, 32))]
)
def test_pieces_of_heads(size, split):
    assert pieces(size) == split


def test_what_has_no_kernel_takes_the_torch_path(monkeypatch):
    q, k, v = made(1, 1, 4, 600, 16)
    with force_triton():
        assert _operator.path(q, k, v, None) == "torch"
        assert _operator.path(q, k[:, :, :512], v[:, :, :512], None) == "triton"
        wide = made(1, 1, 4, 512, 128)
        assert _operator.path(*wide, None) == "torch"  # more than fits a GPU's shared memory
        assert _operator.path(q.transpose(2, 3), k[:, :, :8], v[:, :, :8], None) == "torch"
        monkeypatch.setattr(file, "INTERPRETED", False)  # float32 spills, and needs more shared memory than GPUs have
        assert _operator.path(q, k[:, :, :77], v[:, :, :77], None) == "torch"
        assert _operator.path(*(x[:, :, :77].half() for x in (q, k, v)), None) == "triton"


@pytest.mark.parametrize("biased", [False, True])
def test_the_operator_is_sound(biased):
    q, k, v = made(2, 2, 12, 77, 40)
    options = {"scale": 0.2, "weight": 2.0, "alpha": 1.5}
    torch.library.opcheck(_operator.custom, (q, k, v, padded(2, 77) if biased else None), options)


def test_compiles_whole():
    q, k, v = made(2, 2, 12, 77, 40)

    def attend(q, k, v):
        return sparse_softmax(q * 2, k, v) + 1

    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v))


def test_flops_are_counted():
    q, k, v = made(2, 2, 12, 77, 40)
    with FlopCounterMode(display=False) as counter:
        sparse_softmax(q, k, v)
    assert counter.get_total_flops() == 4 * 2 * 2 * 12 * 77 * 40 + extra_flops(2 * 2 * 12 * 77)


def test_refusals():
    q, k, v = made(1, 1, 4, 8, 16)
    with pytest.raises(ValueError, match=r"alpha is 1\.5 or 2\.0, not 1\.7"):
        sparse_softmax(q, k, v, alpha=1.7)
    with pytest.raises(Unsupported, match="sparse_softmax has no gradient"):
        sparse_softmax(q.requires_grad_(), k, v)


# --- ahead of time ---


def variants():
    strides = "qb qh qn kb kh kn vb vh vn ob oh on".split()
    ints = dict.fromkeys([f"stride_{name}" for name in strides], "i32:16")
    numbers = {"heads": "i32", "queries": "i32", "keys": "i32", "stride_bb": "i32", "scale": "fp32", "weight": "fp32"}
    for architecture in ARCHITECTURES:
        shapes = [(64, 77, 1.5), (88, 333, 1.5)] + [(40, 77, 2.0), (128, 154, 1.5)] * (architecture == 89)
        for size, keys, alpha in shapes:
            fixed, tile = constants(size, keys, alpha, biased=keys > 77, at=divmod(architecture, 10))
            pointers = dict.fromkeys(["query", "key", "value", "out"], "*bf16") | {"bias": "*fp32"}
            yield Variant(
                f"{size} {keys} {alpha}",
                "diffaccel.kernels.sparse_softmax",
                "_sparse_softmax_kernel",
                {**pointers, **numbers, **ints},
                {**fixed, "UP": False},
                architecture,
                tile.warps,
                tile.stages,
            )


def test_compiles_for_gpus():
    """No loop over keys, so no asynchronous copies; tiles of 16 queries take the older matrix instructions on Hopper."""
    for found in compile_variants(variants()):
        assert_fits(found, matrix=False, loops=False)
        assert found.wgmma + found.mma > 0, found

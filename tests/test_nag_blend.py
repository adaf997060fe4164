"""The operator of normalised attention guidance: torch path and kernel against an oracle token by token."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import ARCHITECTURES, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, assert_accurate, errors, far_tensor, harden
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.errors import Unsupported
from diffaccel.kernels import nag_blend as file
from diffaccel.kernels.nag_blend import MOST_CHANNELS, _operator, blend_flops, nag_blend, nag_blend_oracle
from diffaccel.kernels.triton_support import force_triton

STRONG = {"scale": 5.0, "tau": 2.5, "alpha": 0.25}
PATHS = {"torch": nag_blend, "kernel": lambda *inputs, **options: harden(nag_blend, *inputs, **options)}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def made(batch, tokens, channels, kind="fp32", seed=0):
    """Outputs for two texts: a part in common, lengths that differ from token to token, so that tau binds for some."""
    maker = torch.Generator().manual_seed(seed)
    common, first, second = (torch.randn(batch, tokens, channels, generator=maker) for _ in range(3))
    share = torch.rand(batch, tokens, 1, generator=maker)
    return [(common + share * x).to(DTYPES[kind]) for x in (first, 4 * second)]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 15, 40), (1, 17, 320), (3, 5, 333), (1, 2, 3072)], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_accurate(path, kind, shape, order):
    p, n = made(*shape, kind)
    wanted = nag_blend_oracle(p, n, **STRONG, order=order)
    got = path(p, n, **STRONG, order=order)
    assert got.is_contiguous()
    assert_accurate(got, wanted, kind)
    if path is nag_blend:  # one rounding at the end: half a unit in the last place, and the error of fp32 sums
        assert errors(got, wanted)[1] < {"fp32": 4e-6, "fp16": 2**-11, "bf16": 2**-8}[kind]


def test_tau_binds_for_some_tokens_only():
    p, n = made(1, 200, 64)
    bound, free = (nag_blend_oracle(p, n, scale=5.0, tau=tau, alpha=0.25) for tau in (2.5, 1e9))
    changed = (bound != free).any(dim=-1).float().mean()
    assert 0.1 < changed < 0.9


def test_the_norm_is_that_of_a_token_over_all_heads(path):
    """Scaling one head's negative output changes what the other heads get."""
    p, n = made(1, 4, 64)
    louder = n.clone()
    louder[..., 32:] *= 3
    assert not torch.allclose(path(p, n, **STRONG)[..., :32], path(p, louder, **STRONG)[..., :32], atol=1e-3)


def test_no_longer_than_tau_allows(path):
    p, n = made(1, 50, 64)
    got = path(p, n, scale=8.0, tau=2.0, alpha=1.0)
    ratio = got.abs().sum(dim=-1) / p.abs().sum(dim=-1)
    assert float(ratio.max()) < 2.0 + 1e-5
    assert float(ratio.max()) > 2.0 - 1e-5


def test_off_values(path):
    p, n = made(2, 6, 48)
    assert nag_blend(p, n, scale=5.0, alpha=0.0) is p
    torch.testing.assert_close(path(p, n, scale=1.0, alpha=0.5), p, rtol=2e-7, atol=0)
    torch.testing.assert_close(path(p, p, **STRONG), p, rtol=2e-6, atol=1e-6)  # a negative text that says the same


def test_zero_lengths(path):
    """p = 0 gives nothing to lengthen; g = 0 is left as it is; neither divides by zero."""
    p, n = made(1, 3, 16)
    p[0, 0] = 0
    n[0, 1] = p[0, 1] * 1.25  # scale 5: g = 5 p - 4 n = 0
    p[0, 2] = n[0, 2] = 0
    got = path(p, n, **STRONG)
    torch.testing.assert_close(got[0, 0], torch.zeros(16))
    torch.testing.assert_close(got[0, 1], 0.75 * p[0, 1], rtol=1e-5, atol=1e-5)
    assert bool((got[0, 2] == 0).all())
    torch.testing.assert_close(got.double(), nag_blend_oracle(p, n, **STRONG), rtol=1e-5, atol=1e-5)


def test_half_precision_that_overflows_on_the_way(path):
    """g itself is larger than half precision can hold; the blend is not."""
    p, n = made(1, 4, 320, "fp16")
    p, n = p * 2500, n * -2500
    assert float((5 * p.double() - 4 * n.double()).abs().max()) > 65504
    assert_accurate(path(p, n, **STRONG), nag_blend_oracle(p, n, **STRONG), "fp16")


def test_views_are_read_in_place():
    """Halves of a doubled batch, image tokens behind text tokens, an expanded negative text."""
    whole = torch.randn(4, 12, 96, generator=torch.Generator().manual_seed(0))
    p, n = whole[:2, 5:, :64], whole[2:, 5:, 16:80]
    wanted = nag_blend_oracle(p, n, **STRONG)
    for function in (nag_blend, lambda *inputs, **options: harden(nag_blend, *inputs, guard=False, **options)):
        assert_accurate(function(p, n, **STRONG), wanted, "fp32")
        one = n[:1].expand(2, -1, -1)
        assert_accurate(function(p, one, **STRONG), nag_blend_oracle(p, one, **STRONG), "fp32")


def test_long_pictures_in_parts(monkeypatch):
    p, n = made(2, 50, 32)
    whole = nag_blend(p, n, **STRONG)
    monkeypatch.setattr(file, "_TOKENS", 2 * 32 * 7)
    assert torch.equal(nag_blend(p, n, **STRONG), whole)


@pytest.mark.parametrize("dimension", [0, 1])
def test_tensors_beyond_2_31_numbers(dimension):
    shape = [1, 1, 16]
    shape[dimension] = 2
    p, n = (far_tensor(shape, dimension) for _ in range(2))
    for x in (p, n):
        x.copy_(torch.randn(shape))
    with force_triton():
        got = nag_blend(p, n, **STRONG)
    assert_accurate(got, nag_blend_oracle(p, n, **STRONG), "fp16")


def test_what_has_no_kernel_takes_the_torch_path():
    with force_triton():
        assert _operator.path(*made(1, 1, MOST_CHANNELS)) == "triton"
        assert _operator.path(*made(1, 1, MOST_CHANNELS + 8)) == "torch"
        assert _operator.path(*(x.transpose(1, 2) for x in made(1, 4, 8))) == "torch"
        assert nag_blend(torch.empty(1, 0, 8), torch.empty(1, 0, 8), **STRONG).shape == (1, 0, 8)


def test_the_operator_is_sound():
    p, n = made(2, 7, 40)
    torch.library.opcheck(_operator.custom, (p.transpose(0, 1), n.transpose(0, 1)), {**STRONG, "order": 1})


def test_compiles_whole():
    p, n = made(2, 7, 40)

    def blended(p, n):
        return nag_blend(p * 2, n, **STRONG) + 1

    torch.testing.assert_close(torch.compile(blended, fullgraph=True, backend="aot_eager")(p, n), blended(p, n))


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        nag_blend(*made(2, 7, 40), **STRONG)
    assert counter.get_total_flops() == blend_flops(2 * 7 * 40)


def test_refusals():
    p, n = made(1, 2, 8)
    with pytest.raises(ValueError, match="order of the norm is 1 or 2, not 3"):
        nag_blend(p, n, **STRONG, order=3)
    with pytest.raises(Unsupported, match="nag_blend has no gradient"):
        nag_blend(p.requires_grad_(), n, **STRONG)


def test_compiles_for_gpus():
    """Rows and norms only: nothing for tensor cores, no loops."""
    types = dict.fromkeys(["positive", "negative", "out"], "*bf16") | {"tokens": "i32"}
    types |= dict.fromkeys(["scale", "tau", "alpha"], "fp32")
    types |= dict.fromkeys([f"stride_{x}{d}" for x in "pno" for d in "bt"], "i32:16")
    variants = [
        Variant(
            f"{channels}",
            "diffaccel.kernels.nag_blend",
            "_nag_blend_kernel",
            types,
            {"CHANNELS": channels, "BLOCK": file.power_of_two(channels), "ORDER": 1},
            architecture,
            file.tiles(file._TILES, channels, divmod(architecture, 10)).warps,
            1,
        )
        for architecture in ARCHITECTURES
        for channels in (640, MOST_CHANNELS)
    ]
    for found in compile_variants(variants):
        assert_fits(found, matrix=False, loops=False)

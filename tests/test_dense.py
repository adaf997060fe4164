"""The one door to dense attention kernels. Packages that are not here are stood in for by what their pages promise."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from kernel_harness import assert_accurate

from diffaccel import Unsupported
from diffaccel.kernels.attention_body import attention_body_oracle
from diffaccel.kernels.dense import KERNELS, available, choose, dense_attention
from diffaccel.kernels.registration import recording


def inputs(queries=9, keys=13, size=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, size, generator=generator) for tokens in (queries, keys, keys)]


def tokens_first(q, k, v, scale, mask=None):
    """Attention on (batch, tokens, heads, d)."""
    parts = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale).transpose(1, 2)


def install(monkeypatch, name, **functions):
    """A module of this name that has these functions."""
    for part in (name.split(".")[0], name):
        module = types.ModuleType(part)
        module.__spec__ = importlib.machinery.ModuleSpec(part, None, is_package=True)
        monkeypatch.setitem(sys.modules, part, module)
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


STAND_INS = {
    "flash3": {"flash_attn_func": lambda q, k, v, softmax_scale: tokens_first(q, k, v, softmax_scale)},
    "sage": {
        "sageattn": lambda q, k, v, tensor_layout, is_causal, sm_scale: F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale={"HND": sm_scale}[tensor_layout]
        )
    },
    "natten": {"attention": lambda q, k, v, scale: tokens_first(q, k, v, scale)},
    "xformers": {
        "memory_efficient_attention": lambda q, k, v, attn_bias, scale: tokens_first(q, k, v, scale, attn_bias)
    },
}


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", ["sdpa", *STAND_INS])
def test_a_kernel_computes_attention_and_says_that_it_ran(monkeypatch, name, scale):
    if name in STAND_INS:
        install(monkeypatch, KERNELS[name].module, **STAND_INS[name])
    parts, counts = inputs(), {}
    with recording(counts):
        got = dense_attention(*parts, kernel=name, scale=scale)
    assert_accurate(got, attention_body_oracle(*parts, scale=scale)[0], "fp32")
    assert counts == {"dense_attention": {name: 1}}


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("name", ["sdpa", *STAND_INS])
def test_the_layout_of_the_result_is_the_same_for_every_kernel_and_input(monkeypatch, name, heads_first):
    """torch.compile reads the result as the operator's fake describes it; packages store theirs tokens first."""
    if name in STAND_INS:
        install(monkeypatch, KERNELS[name].module, **STAND_INS[name])
    parts = inputs() if heads_first else [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs()]
    torch.library.opcheck(torch.ops.diffaccel.dense_attention, (*parts, None, 0.25, name))
    assert dense_attention(*parts, kernel=name).transpose(1, 2).is_contiguous()


def test_flash3_may_return_its_sums(monkeypatch):
    install(
        monkeypatch,
        "flash_attn_interface",
        flash_attn_func=lambda q, k, v, softmax_scale: (tokens_first(q, k, v, softmax_scale), None),
    )
    parts = inputs()
    assert_accurate(dense_attention(*parts, kernel="flash3"), attention_body_oracle(*parts)[0], "fp32")


def test_a_kernel_that_fails_says_so_in_one_sentence(monkeypatch):
    """Each package has its own errors for a device or a type it was not made for."""

    def fail(*_, **__):
        raise NotImplementedError("no kernel for CPU.\nDetails: ...")

    install(monkeypatch, "sageattention", sageattn=fail)
    with pytest.raises(Unsupported) as caught:
        dense_attention(*inputs(), kernel="sage")
    assert str(caught.value) == (
        "the attention kernel 'sage' does not run here (cpu, torch.float32): no kernel for CPU."
    )

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    install(monkeypatch, "sageattention", sageattn=full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):  # a batch makes fewer pictures at a time
        dense_attention(*inputs(), kernel="sage")


def test_flex_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    stand_in = types.ModuleType("flex")
    stand_in.flex_attention = lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=scale)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.flex_attention", stand_in)
    parts = inputs()
    for _ in range(2):
        assert_accurate(dense_attention(*parts, kernel="flex"), attention_body_oracle(*parts)[0], "fp32")
    assert compiled == [stand_in.flex_attention]


@pytest.mark.parametrize("name", ["sdpa", "xformers"])
def test_a_mask_reaches_the_kernel(monkeypatch, name):
    if name in STAND_INS:
        install(monkeypatch, KERNELS[name].module, **STAND_INS[name])
    parts, bias = inputs(), torch.randn(2, 13)
    got = dense_attention(*parts, kernel=name, mask=bias[:, None, None, :])
    assert_accurate(got, attention_body_oracle(*parts, bias=bias)[0], "fp32")


def test_what_is_not_there_is_refused_with_a_sentence(monkeypatch):
    with pytest.raises(Unsupported, match="there is no attention kernel 'fastest'; the names are sdpa, flash3, sage"):
        dense_attention(*inputs(), kernel="fastest")
    missing = [name for name, version in available().items() if version is None]
    assert "sdpa" not in missing
    for name in missing:
        with pytest.raises(Unsupported, match=f"{name!r} needs the package {KERNELS[name].distribution}, which is not"):
            choose(name)
    install(monkeypatch, "sageattention", **STAND_INS["sage"])
    with pytest.raises(Unsupported, match="the attention kernel 'sage' takes no mask"):
        dense_attention(*inputs(), kernel="sage", mask=torch.zeros(1, 1, 1, 13))
    with pytest.raises(Unsupported, match="the attention kernel 'sage' takes heads up to 128, not 160"):
        dense_attention(*inputs(size=160), kernel="sage")

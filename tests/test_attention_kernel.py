"""wrap(..., attention_kernel=...): who computes dense attention, in whole pipelines. Packages are stood in for."""

from __future__ import annotations

import pytest
import tiny
import tiny_transformers
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from test_dense import install

import diffaccel
from diffaccel import GuidanceInterval, SkipCache, SparseAttention, Unsupported

STEPS = 4


@pytest.fixture
def sage(monkeypatch):
    """SageAttention, stood in for by half of torch's attention, so that it shows where it ran."""

    def sageattn(q, k, v, tensor_layout, is_causal, sm_scale):
        assert (tensor_layout, is_causal) == ("HND", False)
        return 0.5 * F.scaled_dot_product_attention(q, k, v, scale=sm_scale)

    install(monkeypatch, "sageattention", sageattn=sageattn)


def halved(pipe):
    """The same pipeline with every attention in its denoiser halved, without the code under test."""
    for module in (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).modules():
        if hasattr(module, "to_k") and hasattr(module, "to_v"):
            with torch.no_grad():  # values are linear: half of them is half of the attention
                module.to_v.weight.mul_(0.5)
                if module.to_v.bias is not None:
                    module.to_v.bias.mul_(0.5)
                if getattr(module, "add_v_proj", None) is not None:
                    module.add_v_proj.weight.mul_(0.5)
                    module.add_v_proj.bias.mul_(0.5)
    return pipe


def pipeline(kind):
    return tiny.tiny_pipeline(kind) if kind in tiny.KINDS else tiny_transformers.tiny_pipeline(kind)


def picture(pipe, kind, **options):
    module = tiny if kind in tiny.KINDS else tiny_transformers
    return module.run(pipe, kind, steps=STEPS, **options)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux-dev"])
def test_all_attentions_of_the_denoiser_go_to_the_kernel(sage, kind):
    pipe = pipeline(kind)
    stock = picture(pipe, kind)
    fast = diffaccel.wrap(pipe, [], attention_kernel="sage")
    first = picture(fast, kind)
    torch.testing.assert_close(first, picture(halved(pipeline(kind)), kind), rtol=1e-4, atol=1e-5)
    assert torch.equal(picture(fast, kind), first)
    assert not torch.allclose(first, stock, atol=1e-3)
    assert set(fast.report.operators["dense_attention"]) == {"sage"}
    assert fast.report.operators["dense_attention"]["sage"] % STEPS == 0
    assert torch.equal(picture(pipe, kind), stock)
    plain = diffaccel.wrap(pipe, [])
    picture(plain, kind)
    assert fast.report.flops == plain.report.flops  # the operator has a FLOP formula, the foreign kernel has none
    assert plain.report.operators == {}


def test_calls_with_a_mask_stay_with_torch_and_are_counted(sage):
    pipe = pipeline("pixart-alpha")
    fast = diffaccel.wrap(pipe, [], attention_kernel="sage")
    picture(fast, "pixart-alpha")
    ran = fast.report.operators["dense_attention"]
    assert ran["sage"] == ran["sdpa"] > 0  # self-attention, and cross-attention with its mask
    assert "dense_attention" in str(fast.report)


def test_torchs_own_kernel_is_no_change():
    pipe = pipeline("sd")
    assert torch.equal(picture(diffaccel.wrap(pipe, [], attention_kernel="sdpa"), "sd"), picture(pipe, "sd"))


def test_methods_find_it_inside(sage):
    pipe = pipeline("sd")
    fast = diffaccel.wrap(
        pipe, [GuidanceInterval(stop_fraction=0.5), SkipCache(interval=2, min_evaluations=1)], attention_kernel="sage"
    )
    reference = diffaccel.wrap(halved(pipeline("sd")), fast.recipe)
    torch.testing.assert_close(picture(fast, "sd", images=3), picture(reference, "sd", images=3), rtol=1e-4, atol=1e-5)
    assert fast.report.rows == reference.report.rows
    pipe = pipeline("sd3")
    fast = diffaccel.wrap(pipe, [SparseAttention(keep=0.25, min_tokens=1, start=1)], attention_kernel="sage")
    picture(fast, "sd3")
    assert fast.report.operators["dense_attention"]["sage"] > 0


def test_an_abort_leaves_the_stock_pipeline(sage):
    pipe = pipeline("sd")
    stock = picture(pipe, "sd")
    fast = diffaccel.wrap(pipe, [], attention_kernel="sage")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast(**tiny.tiny_inputs("sd", steps=STEPS), callback_on_step_end=stop)
    assert not fast.report.completed
    assert torch.equal(picture(pipe, "sd"), stock)


def test_refusals(sage, monkeypatch):
    pipe = pipeline("sd")
    with pytest.raises(Unsupported, match="there is no attention kernel 'fastest'"):
        diffaccel.wrap(pipe, [], attention_kernel="fastest")
    with pytest.raises(Unsupported, match="needs the package flash_attn_3, which is not installed"):
        diffaccel.wrap(pipe, [], attention_kernel="flash3")
    fast = diffaccel.wrap(pipe, [], attention_kernel="sage")
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(Unsupported, match="found no attention to compute"):
        picture(fast, "sd")
    pipe = pipeline("sd")
    pipe.unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(Unsupported, match="cannot be put into compiled blocks"):
        diffaccel.wrap(pipe, [], attention_kernel="sage")

"""Sparse cross-attention in whole pipelines: against processors written separately, off, restored, refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_transformers
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.models.embeddings import apply_rotary_emb
from independent import network_flops
from test_environment import ip_adapter_weights

import diffaccel
from diffaccel import GuidanceInterval, SkipCache, SparseCrossAttention
from diffaccel.errors import RecipeError, Unsupported
from diffaccel.kernels.sparse_softmax import extra_flops
from diffaccel.methods.attention.sparse_cross_attention import _key_bias
from diffaccel.recipes.recipe import Recipe

KINDS = ("sd", "sdxl", "controlnet", "pixart-alpha", "pixart-sigma", "sana", "hunyuan")
STEPS = 4


def made(kind: str) -> Any:
    return tiny.tiny_pipeline(kind) if kind in tiny.KINDS else tiny_transformers.tiny_pipeline(kind)


def picture(pipe: Any, kind: str, **changes: Any) -> torch.Tensor:
    options = {"steps": STEPS, **changes}
    if kind in tiny.KINDS:
        return tiny.run(pipe, kind, **options)
    if "images" in options:
        options["batch"] = options.pop("images")
    return tiny_transformers.run(pipe, kind, **options)


def network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


# --- an oracle: attention maps by hand, entmax by bisection ---


def bisected(z: torch.Tensor, alpha: float) -> torch.Tensor:
    """entmax by its definition: p = max((alpha - 1) z - tau, 0)^(1 / (alpha - 1)) with the tau that makes the sum 1."""
    z = (alpha - 1) * z
    high = z.amax(dim=-1, keepdim=True)
    low = high - 1
    for _ in range(60):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).pow(1 / (alpha - 1)).sum(dim=-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (z - low).clamp(min=0).pow(1 / (alpha - 1))


class ByHand:
    """A whole attention processor with one softmax replaced, all of it in float64."""

    def __init__(self, scale: float, alpha: float) -> None:
        self.scale, self.alpha = scale, alpha

    def __call__(self, attn: Any, hidden: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
                 image_rotary_emb: Any = None) -> torch.Tensor:  # fmt: skip
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        text = encoder_hidden_states
        q, k, v = heads(attn.to_q(hidden)), heads(attn.to_k(text)), heads(attn.to_v(text))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q = apply_rotary_emb(q, image_rotary_emb)
        q, k, v = q.double(), k.double(), v.double()
        z = q @ k.mT / q.shape[-1] ** 0.5
        if attention_mask is not None:
            z = z + attention_mask.double()[:, None]
        dense = z.softmax(dim=-1)
        weights = dense + self.scale * (bisected(z, self.alpha) - dense)
        out = (weights @ v).transpose(1, 2).flatten(2).float()
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


class Installed:
    """The processor by hand in every cross-attention."""

    def __init__(self, pipe: Any, scale: float, alpha: float) -> None:
        names = [name for name, _ in network(pipe).named_modules() if name.endswith("attn2")]
        self.sites = [network(pipe).get_submodule(name) for name in names]
        self.stock = [site.processor for site in self.sites]
        self.processor = ByHand(scale, alpha)

    def __enter__(self) -> None:
        for site in self.sites:
            site.processor = self.processor

    def __exit__(self, *error: object) -> None:
        for site, processor in zip(self.sites, self.stock, strict=True):
            site.processor = processor


@pytest.mark.parametrize("kind", KINDS)
def test_off_oracle_and_restored(kind: str) -> None:
    """Off is stock, on is what the processor by hand makes, a second run repeats it, and stock returns."""
    pipe = made(kind)
    stock = picture(pipe, kind)
    assert torch.equal(stock, picture(diffaccel.wrap(pipe, SparseCrossAttention(scale=0)), kind))
    alpha = 2.0 if kind == "sdxl" else 1.5
    fast = diffaccel.wrap(pipe, SparseCrossAttention(alpha=alpha))
    got = picture(fast, kind)
    with Installed(pipe, 2.0, alpha):
        wanted = picture(pipe, kind)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert (got - stock).abs().max() > 10 * (got - wanted).abs().max() + 1e-4
    assert torch.equal(got, picture(fast, kind))
    assert torch.equal(stock, picture(pipe, kind))
    assert not any("forward" in vars(module) for module in network(pipe).modules())
    sparse = fast.report.evaluations
    assert fast.report.methods["sparse_cross_attention"] == {"sparse evaluations": sparse}
    assert set(fast.report.operators["sparse_softmax"]) == {"torch"}


@pytest.mark.parametrize("kind", ["sd", "pixart-sigma"])
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    fast = diffaccel.wrap(made(kind), SparseCrossAttention())
    if kind == "sd":
        inputs = tiny.tiny_inputs(kind, images=3, size=(32, 48), steps=STEPS)
        batch = fast(**inputs).images
        single = {name: inputs[name][:1] for name in ("prompt_embeds", "negative_prompt_embeds")}
        alone = fast(**{**inputs, **single, "generator": [torch.Generator().manual_seed(0)]}).images
    else:
        batch, alone = (picture(fast, kind, images=images, size=(8, 12)) for images in (3, 1))
    torch.testing.assert_close(batch[:1], alone, rtol=0, atol=1e-4)
    assert (batch[0] - batch[2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sd", "pixart-sigma"])
def test_the_report_shows_the_cost(kind: str) -> None:
    """More work than plain, by exactly the operations of the sparse part; `flops_plain` is the stock pipeline's count."""
    pipe = made(kind)
    fast = diffaccel.wrap(pipe, SparseCrossAttention(stop_fraction=0.5))
    picture(fast, kind)
    report = fast.report
    plain = diffaccel.wrap(pipe, [])
    picture(plain, kind)
    assert report.flops_plain == plain.report.flops
    if kind == "sd":
        assert plain.report.flops == network_flops(pipe, lambda: picture(pipe, kind))
    attentions = [m for name, m in network(pipe).named_modules() if name.endswith("attn2")]
    tokens = {"sd": [256] * 5 + [64] * 5 + [16], "pixart-sigma": [16] * 4}[kind]
    rows_of_scores = sum(tokens) * attentions[0].heads * 5 * 2  # five text tokens, two guidance branches
    if kind == "sd":
        rows_of_scores = (
            5
            * 2
            * sum(
                a.heads * n
                for a, n in zip(sorted(attentions, key=lambda a: a.inner_dim), sorted(tokens)[::-1], strict=True)
            )
        )
    assert report.flops - report.flops_plain == extra_flops(rows_of_scores) * STEPS // 2
    assert report.flops_ratio < 1
    assert report.methods["sparse_cross_attention"] == {"sparse evaluations": 2, "dense evaluations": 2}


@pytest.mark.parametrize("kind", ["sdxl", "sana", "hunyuan"])
def test_the_plain_cost_is_that_of_the_stock_pipeline(kind: str) -> None:
    pipe = made(kind)
    plain, fast = diffaccel.wrap(pipe, []), diffaccel.wrap(pipe, SparseCrossAttention())
    picture(plain, kind)
    picture(fast, kind)
    assert fast.report.flops_plain == plain.report.flops < fast.report.flops


def test_hidden_text_tokens_stay_hidden() -> None:
    """PixArt's padding: other embeddings there change nothing."""
    pipe = made("pixart-sigma")
    fast = diffaccel.wrap(pipe, SparseCrossAttention())
    inputs = tiny_transformers.tiny_inputs("pixart-sigma", steps=2)
    other = {**tiny_transformers.tiny_inputs("pixart-sigma", steps=2)}
    other["prompt_embeds"] = other["prompt_embeds"].clone()
    other["prompt_embeds"][:, -1] = 7.0
    assert torch.equal(torch.as_tensor(fast(**inputs).images), torch.as_tensor(fast(**other).images))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_window_with_schedulers(scheduler: Any) -> None:
    pipe = made("sd")
    pipe.scheduler = scheduler(beta_schedule="scaled_linear")
    stock = picture(pipe, "sd")
    fast = diffaccel.wrap(pipe, SparseCrossAttention(start_fraction=0.5))
    assert not torch.equal(picture(fast, "sd"), stock)
    counts = fast.report.methods["sparse_cross_attention"]
    assert counts["sparse evaluations"] + counts["dense evaluations"] == fast.report.evaluations
    assert abs(counts["sparse evaluations"] - counts["dense evaluations"]) <= 1
    empty = diffaccel.wrap(pipe, SparseCrossAttention(stop_fraction=0.0))
    assert torch.equal(picture(empty, "sd"), stock)


def test_an_aborted_run_leaves_nothing_behind() -> None:
    pipe = made("sd")
    stock, fast = picture(pipe, "sd"), diffaccel.wrap(pipe, SparseCrossAttention())
    whole = picture(fast, "sd")

    def stop(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast(**tiny.tiny_inputs("sd", steps=STEPS), callback_on_step_end=stop)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    assert torch.equal(picture(pipe, "sd"), stock)
    assert torch.equal(picture(fast, "sd"), whole)


def test_beside_other_methods() -> None:
    """Inside a skip cache and with dropped guidance rows; both still act."""
    pipe = made("sd")
    methods = [SparseCrossAttention(), SkipCache(interval=3, depth=2, min_evaluations=1), GuidanceInterval(low=0.5)]
    fast, without = diffaccel.wrap(pipe, methods), diffaccel.wrap(pipe, methods[1:])
    assert not torch.equal(picture(fast, "sd", steps=9), picture(without, "sd", steps=9))
    assert fast.report.flops_plain == without.report.flops_plain > fast.report.flops > without.report.flops


def test_lora_stays_in_place() -> None:
    peft = pytest.importorskip("peft")
    pipe = made("sd")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    for name, weight in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))
    got = picture(diffaccel.wrap(pipe, SparseCrossAttention()), "sd")
    with Installed(pipe, 2.0, 1.5):
        wanted = picture(pipe, "sd")
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3)  # the adapter makes the logits large
    pipe.unet.disable_adapters()
    assert (picture(diffaccel.wrap(pipe, SparseCrossAttention()), "sd") - got).abs().max() > 1e-2


def test_fused_projections() -> None:
    pipe = made("sd")
    plain = picture(diffaccel.wrap(pipe, SparseCrossAttention()), "sd")
    pipe.fuse_qkv_projections()
    fused = picture(diffaccel.wrap(pipe, SparseCrossAttention()), "sd")
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)


def test_compiled_blocks() -> None:
    torch._dynamo.reset()
    pipe = made("sd")
    plain = picture(diffaccel.wrap(pipe, SparseCrossAttention(stop_fraction=0.5)), "sd")
    stock = picture(pipe, "sd")
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    picture(pipe, "sd")
    fast = diffaccel.wrap(pipe, SparseCrossAttention(stop_fraction=0.5))
    for _ in range(2):  # the first one counts, uncompiled
        torch.testing.assert_close(picture(fast, "sd"), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(picture(pipe, "sd"), stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sd3", "text and image share one softmax there"),
        ("flux-dev", "text and image share one softmax there"),
        ("qwen-image", "text and image share one softmax there"),
        ("lumina-next", "its cross-attention is not covered"),
        ("dit", "it draws class numbers and reads no text"),
    ],
)
def test_refused_models(kind: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=f"sparse_cross_attention does not work on .*: {reason}"):
        diffaccel.wrap(made(kind), SparseCrossAttention())


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_refused_processors(processor: Any) -> None:
    pipe = made("sd")
    pipe.unet.set_attn_processor(processor)
    with pytest.raises(Unsupported, match="called torch's scaled_dot_product_attention 0 times instead of once"):
        picture(diffaccel.wrap(pipe, SparseCrossAttention()), "sd")


def test_refused_beside_an_ip_adapter() -> None:
    pipe = made("sd")
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet, 1)])
    with pytest.raises(Unsupported, match="does not work beside an IP-Adapter"):
        diffaccel.wrap(pipe, SparseCrossAttention())


def test_masks() -> None:
    visible = torch.tensor([[True, False, True]])
    bias = _key_bias(visible[:, None, None, :], 2)
    assert bias.tolist() == [[0.0, float("-inf"), 0.0]] * 2
    with pytest.raises(Unsupported, match="the same for all image tokens"):
        _key_bias(torch.zeros(1, 1, 4, 3), 1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scale": -1}, "greater than"),
        ({"alpha": 1.7}, r"1\.5 or 2\.0"),
        ({"start_fraction": 0.6, "stop_fraction": 0.5}, "must not be above"),
    ],
)
def test_refused_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        Recipe.from_dict({"schema": 1, "methods": [{"method": "sparse_cross_attention", **settings}]})

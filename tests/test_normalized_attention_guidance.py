"""Normalised attention guidance in whole pipelines: against processors written separately, off, restored, refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import tiny_transformers
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, LatentConsistencyModelPipeline
from diffusers.models.attention_processor import SlicedAttnProcessor
from diffusers.models.embeddings import apply_rotary_emb
from test_environment import ip_adapter_weights
from tiny_text import clip, clip_tokenizer, tiny_text_pipeline

import diffaccel
from diffaccel import GuidanceInterval, NormalizedAttentionGuidance, RegionSampling, SkipCache, SparseCrossAttention
from diffaccel.errors import RecipeError, Unsupported
from diffaccel.recipes.recipe import Recipe

NAG = NormalizedAttentionGuidance
STRONG: dict[str, Any] = {"scale": 4.0, "tau": 1.5, "alpha": 0.6}
KINDS = ("sd", "sdxl", "controlnet", "sd-img2img", "pixart-alpha", "pixart-sigma", "sd3", "sd3.5-medium", "flux-dev")
JOINT = ("sd3", "sd3.5-medium", "flux-dev")
STEPS = 3


def made(kind: str) -> Any:
    return tiny.tiny_pipeline(kind) if kind in tiny.KINDS else tiny_transformers.tiny_pipeline(kind)


def inputs(kind: str, images: int = 2, **options: Any) -> dict[str, Any]:
    """Call arguments at guidance scale 1, with negative embeddings, which stock pipelines then ignore."""
    options = {"steps": STEPS, **options}
    if kind in tiny.KINDS:
        given = tiny.tiny_inputs(kind, images=images, **options)
        return {**given, "guidance_scale": 1.0, "output_type": "latent"}
    given = tiny_transformers.tiny_inputs(kind, batch=images, guidance=1.0, **options)
    if kind == "flux-dev":
        given["negative_prompt_embeds"] = 2 * torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(5)).expand(
            images, -1, -1
        )
        given["negative_pooled_prompt_embeds"] = torch.zeros(images, 16)
    return given


def picture(pipe: Any, given: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    fresh = {**given}
    if isinstance(given["generator"], list):
        fresh["generator"] = [torch.Generator().manual_seed(k) for k in range(len(given["generator"]))]
    return torch.as_tensor(pipe(**fresh).images).float()


def network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


# --- an oracle: a processor that does both attentions head by head, and its own way of passing the second text ---


def attended(attn: Any, q: torch.Tensor, text: torch.Tensor, mask: Any) -> torch.Tensor:
    """softmax(q k^T) v with all heads side by side: (rows, tokens, channels)."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    scores = heads(q) @ heads(attn.to_k(text)).mT / math.sqrt(q.shape[-1] // attn.heads)
    if mask is not None:
        scores = scores + mask[:, None]
    return (scores.softmax(dim=-1) @ heads(attn.to_v(text))).transpose(1, 2).flatten(2)


def blended(p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """The paper's formula in float64, for tokens without zeros."""
    p, n = p.double(), n.double()
    g = STRONG["scale"] * p - (STRONG["scale"] - 1) * n
    ratio = g.abs().sum(dim=-1, keepdim=True) / p.abs().sum(dim=-1, keepdim=True)
    g = g * ratio.clamp(max=STRONG["tau"]) / ratio
    return (STRONG["alpha"] * g + (1 - STRONG["alpha"]) * p).float()


class CrossByHand:
    """Cross-attention with a second text that was put here before the run."""

    def __init__(self, text: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.text, self.mask = text, mask

    def __call__(
        self, attn: Any, hidden: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> torch.Tensor:
        q = attn.to_q(hidden)
        positive = attended(attn, q, encoder_hidden_states, attention_mask)
        negative = attended(attn, q, self.text, self.mask)
        out = blended(positive, negative)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


class JointByHand:
    """Joint attention of a batch whose second half has the negative text: image rows of both halves become one."""

    def __init__(self, text_first: bool) -> None:
        self.text_first = text_first

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        def norm(name: str, x: torch.Tensor) -> torch.Tensor:
            module = getattr(attn, name, None)
            return x if module is None else module(x)

        parts = []
        for x, names, norms in (
            (encoder_hidden_states, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
            (hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
        ):
            if x is not None:
                q, k, v = (heads(getattr(attn, name)(x)) for name in names)
                parts.append((norm(norms[0], q), norm(norms[1], k), v))
        if not self.text_first:
            parts.reverse()
        q, k, v = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
        out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v).flatten(2)
        text = 5
        image = out[:, text:] if self.text_first else out[:, : out.shape[1] - text]
        rest = out[:, :text] if self.text_first else out[:, out.shape[1] - text :]
        half = len(image) // 2
        guided = blended(image[:half], image[half:]).repeat(2, 1, 1)
        if encoder_hidden_states is None:  # FLUX's single blocks
            return torch.cat([rest, guided], dim=1)
        if not getattr(attn, "context_pre_only", False):
            rest = attn.to_add_out(rest)
        return attn.to_out[1](attn.to_out[0](guided)), rest


def by_hand(pipe: Any, kind: str, given: dict[str, Any]) -> torch.Tensor:
    """The run with processors by hand; joint models get a doubled batch from a wrapped forward."""
    net = network(pipe)
    text = given["negative_prompt_embeds"]
    if kind in JOINT:
        return _joint_by_hand(pipe, kind, given, text)
    mask = given.get("negative_prompt_attention_mask")
    if mask is not None:
        mask = (1 - mask)[:, None] * -10000.0
        text = net.caption_projection(text)
    names = [name for name, _ in net.named_modules() if name.endswith("attn2")]
    stock = [net.get_submodule(name).processor for name in names]
    try:
        for name in names:
            net.get_submodule(name).processor = CrossByHand(text, mask)
        return picture(pipe, given)
    finally:
        for name, processor in zip(names, stock, strict=True):
            net.get_submodule(name).processor = processor


def _joint_by_hand(pipe: Any, kind: str, given: dict[str, Any], negative: torch.Tensor) -> torch.Tensor:
    net = network(pipe)
    names = [name for name, _ in net.named_modules() if name.endswith(".attn")]
    stock, forward = [net.get_submodule(name).processor for name in names], net.forward

    def doubled(**arguments: Any) -> Any:
        rows = len(arguments["hidden_states"])
        wide = {
            name: torch.cat([x, x]) if isinstance(x, torch.Tensor) and len(x) == rows and "ids" not in name else x
            for name, x in arguments.items()
        }
        wide["encoder_hidden_states"] = torch.cat([arguments["encoder_hidden_states"], negative])
        return (forward(**wide)[0][:rows],)

    try:
        for name in names:
            net.get_submodule(name).processor = JointByHand(kind.startswith("flux"))
        net.forward = doubled
        return picture(pipe, given)
    finally:
        del net.forward
        for name, processor in zip(names, stock, strict=True):
            net.get_submodule(name).processor = processor


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_off_oracle_and_restored(kind: str) -> None:
    """Off is stock, on is what processors by hand make, a second run repeats it, stock returns, the text matters."""
    pipe, given = made(kind), inputs(kind)
    stock = picture(pipe, given)
    for off in (NAG(scale=1), NAG(alpha=0)):
        assert torch.equal(stock, picture(diffaccel.wrap(pipe, off), given))
    fast = diffaccel.wrap(pipe, NAG(**STRONG))
    got = picture(fast, given)
    wanted = by_hand(pipe, kind, given)
    tolerance = 2e-4 * float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    assert (got - stock).abs().max() > 5 * tolerance
    assert torch.equal(got, picture(fast, given))
    assert torch.equal(stock, picture(pipe, given))
    assert not any("forward" in vars(module) for module in network(pipe).modules())
    assert "encode_prompt" not in vars(pipe)
    other = {**given, "negative_prompt_embeds": given["negative_prompt_embeds"].flip(1) + 1}
    assert (picture(fast, other) - got).abs().max() > 5 * tolerance
    assert fast.report.methods["normalized_attention_guidance"] == {"guided": fast.report.evaluations}
    assert set(fast.report.operators["nag_blend"]) == {"torch"}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart-sigma", "sd3", "flux-dev"])
def test_the_report_shows_the_cost(kind: str) -> None:
    """`flops_plain` is what the stock pipeline needs, to the last operation; the guided run needs more."""
    pipe, given = made(kind), inputs(kind)
    plain, fast = diffaccel.wrap(pipe, []), diffaccel.wrap(pipe, NAG(**STRONG))
    picture(plain, given)
    picture(fast, given)
    assert fast.report.flops_plain == plain.report.flops < fast.report.flops
    share = fast.report.flops / plain.report.flops
    assert 1.9 < share < 2.1 if kind in JOINT else share < 1.9


@pytest.mark.parametrize("kind", ["sd", "pixart-sigma", "sd3", "flux-dev"])
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    size = (32, 48) if kind == "sd" else (8, 12)
    pipe, given = made(kind), inputs(kind, images=3, size=size)
    fast = diffaccel.wrap(pipe, NAG(**STRONG))
    batch = picture(fast, given)
    alone = {
        name: value[:1] if isinstance(value, (torch.Tensor, list)) and len(value) == 3 else value
        for name, value in given.items()
    }
    torch.testing.assert_close(batch[:1], picture(fast, alone), rtol=0, atol=1e-4 * float(batch.abs().max()))
    assert (batch[0] - batch[2]).abs().max() > 1e-3


# --- where the negative text comes from ---


def with_text(pipe: Any, kind: str, **changes: Any) -> torch.Tensor:
    side = 32 if kind in ("sd", "sdxl") else 64
    extra = {"use_resolution_binning": False, "clean_caption": False} if kind == "pixart" else {}
    given = {"prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    images = pipe(
        **{**given, **extra, "height": side, "width": side, "generator": torch.manual_seed(0), **changes}
    ).images
    return torch.as_tensor(images)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_texts(kind: str) -> None:
    """The setting, the pipeline's own argument, which wins, lists of prompts, and several pictures of a prompt."""
    pipe = tiny_text_pipeline(kind)
    stock = with_text(pipe, kind)
    blue = with_text(diffaccel.wrap(pipe, NAG(negative_prompt="blue star", **STRONG)), kind)
    assert not torch.equal(blue, stock)
    unset = diffaccel.wrap(pipe, NAG(**STRONG))
    assert torch.equal(blue, with_text(unset, kind, negative_prompt="blue star"))
    assert not torch.equal(blue, with_text(unset, kind))
    other = diffaccel.wrap(pipe, NAG(negative_prompt="heart", **STRONG))
    assert torch.equal(blue, with_text(other, kind, negative_prompt="blue star"))
    two = with_text(other, kind, prompt=["a red circle"] * 2, negative_prompt=["blue star", "heart"])
    torch.testing.assert_close(two[:1], blue, rtol=0, atol=1e-4 * float(blue.abs().max()))
    assert not torch.allclose(two[1:], with_text(unset, kind, negative_prompt="blue star"), atol=1e-3)
    several = with_text(unset, kind, num_images_per_prompt=2, negative_prompt="blue star")
    torch.testing.assert_close(several[:1], blue, rtol=0, atol=1e-4 * float(blue.abs().max()))
    lists = with_text(diffaccel.wrap(pipe, NAG(negative_prompt="heart", **STRONG)), kind, prompt=["a red circle"] * 2)
    assert len(lists) == 2
    assert torch.equal(stock, with_text(pipe, kind))


def test_the_text_is_the_one_of_classifier_free_guidance() -> None:
    """What the pipeline itself would use as negative text: seen at the cross-attentions, behind the prompt's tokens."""
    pipe = tiny_text_pipeline("sd")
    wanted = pipe.encode_prompt("a red circle", "cpu", 1, True, negative_prompt="blue star")
    seen: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    attention = pipe.unet.mid_block.attentions[0]
    inner = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with_text(diffaccel.wrap(pipe, NAG(negative_prompt="blue star")), "sd", num_inference_steps=1)
    hook.remove()
    inner.remove()
    assert torch.equal(seen[0], wanted[0])
    assert torch.equal(seen[1], torch.cat(wanted[:2], dim=1))


@pytest.mark.parametrize("kind", ["sd", "flux-dev"])
def test_without_text_encoder(kind: str) -> None:
    pipe, given = made(kind), inputs(kind)
    for name in [name for name in given if name.startswith("negative")]:
        del given[name]
    with pytest.raises(Unsupported, match="has no text encoder; pass negative_prompt_embeds"):
        picture(diffaccel.wrap(pipe, NAG()), given)


# --- the window, other methods, other things attached ---


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_window_with_schedulers(scheduler: Any) -> None:
    pipe, given = made("sd"), inputs("sd", steps=4)
    pipe.scheduler = scheduler(beta_schedule="scaled_linear")
    fast = diffaccel.wrap(pipe, NAG(stop_fraction=0.5, **STRONG))
    assert not torch.equal(picture(fast, given), picture(pipe, given))
    counts = fast.report.methods["normalized_attention_guidance"]
    assert abs(counts["guided"] - counts["unguided"]) <= 1
    empty = diffaccel.wrap(pipe, NAG(stop_fraction=0.0, **STRONG))
    assert torch.equal(picture(empty, given), picture(pipe, given))


@pytest.mark.parametrize("kind", ["sd", "flux-dev"])
def test_an_aborted_run_leaves_nothing_behind(kind: str) -> None:
    pipe, given = made(kind), inputs(kind)
    fast, stock = diffaccel.wrap(pipe, NAG(**STRONG)), picture(pipe, given)
    whole = picture(fast, given)

    def stop(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(fast, {**given, "callback_on_step_end": stop})
    assert "encode_prompt" not in vars(pipe)
    assert not any("forward" in vars(module) for module in network(pipe).modules())
    assert torch.equal(picture(pipe, given), stock)
    assert torch.equal(picture(fast, given), whole)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("sd", SkipCache(interval=3, depth=2, min_evaluations=1)),
        ("sd", SparseCrossAttention()),
        ("pixart-sigma", RegionSampling(start=2, min_evaluations=1)),
        ("sd3", RegionSampling(start=2, min_evaluations=1)),
        ("flux-dev", RegionSampling(start=2, min_evaluations=1)),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_beside_other_methods(kind: str, method: Any) -> None:
    """Both act; region sampling and caches inside see the second rows as rows of their own."""
    pipe, given = made(kind), inputs(kind, steps=9, size=(32, 32) if kind == "sd" else (8, 12))
    both = diffaccel.wrap(pipe, [NAG(stop_fraction=0.5, **STRONG), method])
    got = picture(both, given)
    assert not torch.equal(got, picture(diffaccel.wrap(pipe, method), given))
    alone = diffaccel.wrap(pipe, NAG(stop_fraction=0.5, **STRONG))
    assert not torch.equal(got, picture(alone, given))
    assert torch.equal(got, picture(both, given))
    assert both.report.flops != alone.report.flops
    assert both.report.methods[method.name]


def test_lora_and_fused_projections_stay_in_place() -> None:
    peft = pytest.importorskip("peft")
    pipe, given = made("sd"), inputs("sd")
    plain = picture(diffaccel.wrap(pipe, NAG(**STRONG)), given)
    pipe.fuse_qkv_projections()
    torch.testing.assert_close(picture(diffaccel.wrap(pipe, NAG(**STRONG)), given), plain, rtol=0, atol=1e-4)
    pipe.unfuse_qkv_projections()
    pipe.unet.set_attn_processor(SlicedAttnProcessor(1))
    torch.testing.assert_close(picture(diffaccel.wrap(pipe, NAG(**STRONG)), given), plain, rtol=0, atol=1e-4)
    pipe.unet.set_default_attn_processor()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, weight in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = by_hand(pipe, "sd", given)
    torch.testing.assert_close(
        picture(diffaccel.wrap(pipe, NAG(**STRONG)), given), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())
    )
    assert (wanted - plain).abs().max() > 1e-2


def test_compiled_blocks() -> None:
    torch._dynamo.reset()
    pipe, given = made("sd"), inputs("sd", steps=4)
    recipe = NAG(stop_fraction=0.5, **STRONG)
    plain, stock = picture(diffaccel.wrap(pipe, recipe), given), picture(pipe, given)
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    picture(pipe, given)
    fast = diffaccel.wrap(pipe, recipe)
    for _ in range(2):  # the first one counts, uncompiled
        torch.testing.assert_close(picture(fast, given), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(picture(pipe, given), stock, rtol=0, atol=1e-5)


def test_a_negative_prompt_that_the_pipeline_swallows():
    """LCM takes it by `**kwargs` and forgets it."""
    pipe = tiny.tiny_lcm(LatentConsistencyModelPipeline)
    pipe.text_encoder, pipe.tokenizer = clip(tiny.WIDTH, 1), clip_tokenizer()
    embeddings = pipe.encode_prompt("star", "cpu", 1, False)[0]

    def call(config: NAG, **given: Any) -> torch.Tensor:
        torch.manual_seed(0)  # its solver draws noise
        options: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
        return torch.as_tensor(diffaccel.wrap(pipe, config)("a red circle", **options, **given).images)

    want = call(NAG(**STRONG, negative_prompt="star"))
    assert not torch.equal(call(NAG(**STRONG)), want)
    assert torch.equal(call(NAG(**STRONG), negative_prompt="star"), want)
    assert torch.equal(call(NAG(**STRONG, negative_prompt="heart"), negative_prompt="star"), want)
    assert torch.equal(call(NAG(**STRONG), negative_prompt_embeds=embeddings), want)


# --- refusals ---


@pytest.mark.parametrize("kind", ["sd", "flux-cfg"])
def test_classifier_free_guidance_is_refused(kind: str) -> None:
    pipe = made(kind)
    given = tiny.tiny_inputs("sd", steps=2) if kind == "sd" else tiny_transformers.tiny_inputs(kind, steps=2)
    fast = diffaccel.wrap(pipe, [NAG(), GuidanceInterval()])
    sentence = "works without classifier-free guidance, which has a negative prompt of its own"
    with pytest.raises(Unsupported, match=sentence):
        fast(**given)


def test_other_text_lengths() -> None:
    """Separate cross-attention takes any length; joint attention needs equal ones."""
    pipe, given = made("sd"), inputs("sd", images=1)
    given["negative_prompt_embeds"] = torch.randn(1, 5, 16)
    picture(diffaccel.wrap(pipe, NAG()), given)
    pipe, given = made("flux-dev"), inputs("flux-dev", images=1)
    given["negative_prompt_embeds"] = torch.randn(1, 7, 16)
    with pytest.raises(Unsupported, match="the negative text has 7 tokens and the prompt 5"):
        picture(diffaccel.wrap(pipe, NAG()), given)
    given["negative_prompt_embeds"] = torch.randn(2, 5, 16)
    with pytest.raises(Unsupported, match="has negative text for 2 pictures; the call makes 1"):
        picture(diffaccel.wrap(pipe, NAG()), given)


@pytest.mark.parametrize("kind", ["hunyuan", "dit", "qwen-image", "sana"])
def test_refused_models(kind: str) -> None:
    with pytest.raises(Unsupported, match=r"normalized_attention_guidance does not work on .*; it works on UNet2D"):
        diffaccel.wrap(made(kind), NAG())


def test_refused_beside_an_ip_adapter() -> None:
    pipe = made("sd")
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet, 1)])
    with pytest.raises(Unsupported, match="does not work beside an IP-Adapter"):
        diffaccel.wrap(pipe, NAG())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scale": 0.5}, "greater than or equal to 1"),
        ({"tau": 0.9}, "greater than or equal to 1"),
        ({"alpha": 1.1}, "less than or equal to 1"),
        ({"start_fraction": 0.6, "stop_fraction": 0.5}, "must not be above"),
    ],
)
def test_refused_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        Recipe.from_dict({"schema": 1, "methods": [{"method": "normalized_attention_guidance", **settings}]})

"""The skip cache on HunyuanDiT's native long skips, against a forward written out by hand, alone and with ControlNets."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanDiT2DMultiControlNetModel,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPipeline,
    SD3Transformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed

import diffaccel
from diffaccel import SkipCache
from diffaccel.engine.flops import count_flops
from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.long_skips import BlockBypass, bypass_blocks, bypass_control, usable_pairs
from diffaccel.models.transformers import describe_control, describe_transformer

BLOCKS = 8
DEPTHS = range(1, BLOCKS // 2)
WIDTH, TEXT = 16, 16


SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH // 2,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": WIDTH,
    "mlp_ratio": 2.0,
    "text_len": 3,
    "text_len_t5": 4,
    "cross_attention_dim": TEXT,
    "cross_attention_dim_t5": TEXT,
    "pooled_projection_dim": TEXT,
}


def tiny_hunyuan(seed=0):
    torch.manual_seed(seed)
    return HunyuanDiT2DModel(num_layers=BLOCKS, **SIZES).eval()


def tiny_control(seed=1):
    torch.manual_seed(seed)
    net = HunyuanDiT2DControlNetModel(transformer_num_layers=BLOCKS, **SIZES)
    for module in [net.input_block, *net.controlnet_blocks]:  # zero at start would hide everything
        torch.nn.init.normal_(module.weight, std=0.3)
    return net.eval()


def inputs(seed=0, rows=2, height=8, width=8):
    g = torch.Generator().manual_seed(seed)
    grid = (height // 2, width // 2)
    text = torch.Generator().manual_seed(9)
    return {
        "hidden_states": torch.randn(rows, 4, height, width, generator=g),
        "timestep": torch.full((rows,), 700.0 - 300.0 * seed),
        "encoder_hidden_states": torch.randn(rows, 3, TEXT, generator=text),
        "text_embedding_mask": torch.ones(rows, 3),
        "encoder_hidden_states_t5": torch.randn(rows, 4, TEXT, generator=text),
        "text_embedding_mask_t5": torch.ones(rows, 4),
        "image_meta_size": torch.full((rows, 6), 64.0),
        "style": torch.zeros(rows, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            WIDTH // 2, ((0, 0), grid), grid, output_type="pt", device=torch.device("cpu")
        ),
    }


def plain_block(block, h, common):
    """A block behind its fuse, from its parts."""
    h = h + block.attn1(block.norm1(h, common["temb"]), image_rotary_emb=common["image_rotary_emb"])
    more = {name: common[name] for name in ("encoder_hidden_states", "image_rotary_emb")}
    h = h + block.attn2(block.norm2(h), **more)
    return h + block.ff(block.norm3(h))


def slow_forward(model, given, depth, feature=None, control=None):
    """Returns (output, F). Given F, runs only the outer pairs; `control` is one residual per skip, outermost first."""
    height, width = (side // 2 for side in given["hidden_states"].shape[-2:])
    text = torch.cat([given["encoder_hidden_states"], model.text_embedder(given["encoder_hidden_states_t5"])], 1)
    about = [given[name] for name in ("timestep", "encoder_hidden_states_t5", "image_meta_size", "style")]
    temb = model.time_extra_emb(*about, hidden_dtype=torch.float32)
    common = {"temb": temb, "encoder_hidden_states": text, "image_rotary_emb": given["image_rotary_emb"]}
    h, skips = model.pos_embed(given["hidden_states"]), {}
    for number, block in enumerate(model.blocks):
        if feature is not None and depth <= number < BLOCKS - depth:
            continue
        if number == BLOCKS - depth:
            feature = h if feature is None else feature
            h = feature
        partner = BLOCKS - 1 - number
        if number <= BLOCKS // 2:
            h = plain_block(block, h, common)
        else:
            skip = skips[partner] if control is None else skips[partner] + control[partner]
            h = plain_block(block, block.skip_linear(block.skip_norm(torch.cat([h, skip], -1))), common)
        skips[number] = h
    h = model.proj_out(model.norm_out(h, temb))
    h = h.reshape(len(h), height, width, 2, 2, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(h), -1, 2 * height, 2 * width), feature


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (12, 6)])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_cached_evaluation_equals_the_written_out_forward(depth, size):
    """Full on one input, cached on another: bit-equal to running only the outer pairs on the stored feature."""
    model, first, second = tiny_hunyuan(), inputs(0, 3, *size), inputs(1, 3, *size)
    whole, feature = slow_forward(model, first, depth)
    want, _ = slow_forward(model, second, depth, feature)
    bypass = BlockBypass()
    with Seams() as seams:
        bypass_blocks(describe_transformer(model), depth, bypass, seams)
        with bypass.active(0, cached=False):
            assert torch.equal(model(**first).sample, whole)
        with bypass.active(0, cached=True):
            assert torch.equal(model(**second).sample, want)
    assert not torch.equal(want, model(**second).sample)
    assert not any("forward" in vars(block) for block in model.blocks)


def residuals(nets, given):
    """Residuals of one or two ControlNets, as the pipeline asks for them."""
    g = torch.Generator().manual_seed(4)
    pictures = [torch.randn(given["hidden_states"].shape, generator=g) for _ in nets]
    net = nets[0] if len(nets) == 1 else HunyuanDiT2DMultiControlNetModel(nets)
    return net(
        controlnet_cond=pictures[0] if len(nets) == 1 else pictures,
        conditioning_scale=0.7 if len(nets) == 1 else [0.7, 0.4],
        return_dict=False,
        **given,
    )[0]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("depth", DEPTHS)
def test_control_residuals_meet_their_skips(depth, count):
    """Fresh residuals of whole ControlNets in the written-out forward; of nets cut short in ours: the same output.

    Had the list been cut, or its entries moved by one, the outermost skip would get another residual.
    """
    model = tiny_hunyuan()
    nets = [tiny_control(seed) for seed in range(1, count + 1)]
    first, second = inputs(0), inputs(1)
    whole, feature = slow_forward(model, first, depth, control=residuals(nets, first))
    control = residuals(nets, second)
    want, _ = slow_forward(model, second, depth, feature, control)
    shifted, _ = slow_forward(model, second, depth, feature, control[1:] + control[:1])
    assert not torch.equal(want, shifted)
    bypass = BlockBypass()
    with Seams() as seams:
        bypass_blocks(describe_transformer(model), depth, bypass, seams)
        for net in nets:
            bypass_control(describe_control(net), depth, bypass, seams)
        with bypass.active(0, cached=False):
            assert torch.equal(model(**first, controlnet_block_samples=residuals(nets, first)).sample, whole)
        with bypass.active(0, cached=True):
            short = residuals(nets, second)
            assert len(short) == BLOCKS // 2 - 1
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(short[:depth], control, strict=False))
            assert torch.equal(model(**second, controlnet_block_samples=short).sample, want)
            assert not short  # every entry was consumed


@torch.no_grad()
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("depth", DEPTHS)
def test_unchanged_inputs_are_bit_equal(depth, order):
    """Three full evaluations, then two cached ones with the same inputs elsewhere in noise."""
    model, given = tiny_hunyuan(), inputs()
    want = model(**given).sample
    bypass = BlockBypass(order)
    with Seams() as seams:
        bypass_blocks(describe_transformer(model), depth, bypass, seams)
        for position in (3.0, 2.0, 1.5):
            with bypass.active(0, cached=False, position=position, fresh=False):
                assert torch.equal(model(**given).sample, want)
        for position in (1.0, 0.5):
            with bypass.active(0, cached=True, position=position):
                assert torch.equal(model(**given).sample, want)


def tiny_pipeline(nets=0):
    """A HunyuanDiT pipeline with random weights; with ControlNets if asked for."""
    transformer = tiny_hunyuan()
    torch.manual_seed(5)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
    )
    parts = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor")
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.02, prediction_type="v_prediction", clip_sample=False)
    parts |= {"vae": vae.eval(), "transformer": transformer, "scheduler": scheduler, "requires_safety_checker": False}
    if nets:
        made = [tiny_control(seed) for seed in range(1, nets + 1)]
        control = made[0] if nets == 1 else HunyuanDiT2DMultiControlNetModel(made)
        pipe = HunyuanDiTControlNetPipeline(controlnet=control, **parts)
    else:
        pipe = HunyuanDiTPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, *, nets=0, images=1, size=(64, 64), steps=12, **options):
    """Final latents of one call; every image has its own generator and prompt."""
    maker = torch.Generator().manual_seed(100)
    prompts = [torch.randn(1, rows, TEXT, generator=maker) for rows in (3, 4) for _ in range(2 * images)]
    rows = {
        "prompt_embeds": prompts[:images],
        "negative_prompt_embeds": [prompts[images]] * images,
        "prompt_embeds_2": prompts[2 * images : 3 * images],
        "negative_prompt_embeds_2": [prompts[3 * images]] * images,
    }
    given = {name: torch.cat(value) for name, value in rows.items()}
    masks = {
        f"{name.replace('embeds', 'attention_mask')}": torch.ones(value.shape[:2]) for name, value in given.items()
    }
    given |= masks | {"height": size[0], "width": size[1], "use_resolution_binning": False}
    given["generator"] = [torch.Generator().manual_seed(i) for i in range(images)]
    if nets:
        picture = torch.rand(1, 3, *size, generator=maker).expand(images, -1, -1, -1)
        given["control_image"] = picture if nets == 1 else [picture, 1 - picture]
        given["controlnet_conditioning_scale"] = 0.7 if nets == 1 else [0.7, 0.4]
        torch.manual_seed(77)  # the pipeline samples the encoded picture without its generator
    return pipe(num_inference_steps=steps, guidance_scale=5.0, output_type="latent", **given, **options).images


@pytest.mark.parametrize("nets", [0, 1, 2])
def test_all_evaluations_full_is_bit_identical(nets):
    pipe = tiny_pipeline(nets)
    fast = diffaccel.wrap(pipe, SkipCache(schedule=tuple(range(20))))
    assert torch.equal(run(fast, nets=nets), run(pipe, nets=nets))
    assert fast.report.methods["skip_cache"]["cached"] == 0


@pytest.mark.parametrize("nets", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_cached_evaluations_skip_the_inner_blocks(nets, depth):
    """Counted by hooks: inner blocks run on full evaluations only, ControlNets stop early; a second run is the same."""
    pipe = tiny_pipeline(nets)
    plain = run(pipe, nets=nets)
    fast = diffaccel.wrap(pipe, SkipCache(interval=3, depth=depth))
    control = [net for net, _ in diffaccel.models.model_map.describe(pipe).controlnets]
    ran = [0] * BLOCKS
    ran_control = [0] * (BLOCKS // 2 - 1)

    def count(module, into, number):
        original = module.forward

        def forward(*args, **kwargs):
            into[number] += 1
            return original(*args, **kwargs)

        module.forward = forward

    for number, block in enumerate(pipe.transformer.blocks):
        count(block, ran, number)
    for net in control:
        for part in (net.blocks, net.controlnet_blocks):
            for number, module in enumerate(part):
                count(module, ran_control, number)
    first = run(fast, nets=nets)
    counts = fast.report.methods["skip_cache"]
    assert (counts["full"], counts["cached"]) == (5, 7)
    assert ran == [12] * depth + [5] * (BLOCKS - 2 * depth) + [12] * depth
    assert ran_control == [2 * nets * (12 if i < depth else 5) for i in range(BLOCKS // 2 - 1)]
    assert fast.report.flops < fast.report.flops_plain
    assert not torch.equal(first, plain)
    assert torch.equal(run(fast, nets=nets), first)
    assert torch.equal(run(pipe, nets=nets), plain)


@pytest.mark.parametrize("nets", [1, 2])
def test_early_exit_of_the_controlnet_changes_nothing(nets, monkeypatch):
    short = run(diffaccel.wrap(tiny_pipeline(nets), SkipCache(depth=2)), nets=nets)
    monkeypatch.setattr("diffaccel.methods.caches.skip_cache.bypass_control", lambda *_: None)
    whole = run(diffaccel.wrap(tiny_pipeline(nets), SkipCache(depth=2)), nets=nets)
    assert torch.equal(short, whole)


def test_a_picture_does_not_depend_on_its_batch_mates():
    """Three non-square images at once; the first one alone."""
    pipe = tiny_pipeline()
    options = {"size": (96, 48)}
    fast = diffaccel.wrap(pipe, SkipCache(interval=3, order=1))
    together = run(fast, images=3, **options)
    assert together.shape == (3, 4, 12, 6)
    single = run_first_alone(fast, options)
    assert torch.allclose(together[0], single[0], atol=1e-4)


def run_first_alone(pipe, options):
    maker = torch.Generator().manual_seed(100)
    clip = [torch.randn(1, 3, TEXT, generator=maker) for _ in range(6)]
    t5 = [torch.randn(1, 4, TEXT, generator=maker) for _ in range(6)]
    chosen = {
        "prompt_embeds": clip[0],
        "negative_prompt_embeds": clip[3],
        "prompt_embeds_2": t5[0],
        "negative_prompt_embeds_2": t5[3],
    }
    masks = {name.replace("embeds", "attention_mask"): torch.ones(value.shape[:2]) for name, value in chosen.items()}
    height, width = options["size"]
    generator = [torch.Generator().manual_seed(0)]
    return pipe(
        **chosen, **masks, height=height, width=width, use_resolution_binning=False, generator=generator,
        num_inference_steps=12, guidance_scale=5.0, output_type="latent",
    ).images  # fmt: skip


def test_extrapolation_is_closer_than_reuse():
    pipe = tiny_pipeline()
    plain = run(pipe, steps=30)
    error = [
        (run(diffaccel.wrap(pipe, SkipCache(interval=3, order=order)), steps=30) - plain).abs().mean()
        for order in (0, 1)
    ]
    assert error[1] < error[0]


def test_window_limits_caching_to_a_noise_range():
    fast = diffaccel.wrap(tiny_pipeline(), SkipCache(interval=4, window=(3.0, 0.5)))
    run(fast, steps=20)
    cached = [e.sigma for e in fast.report.trace if e.tags]
    assert cached
    assert max(cached) <= 3.0
    assert min(cached) >= 0.5


def test_an_abort_leaves_the_stock_pipeline():
    pipe = tiny_pipeline(1)
    before = run(pipe, nets=1)
    fast = diffaccel.wrap(pipe, SkipCache())

    def stop(pipe, step, t, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(fast, nets=1, callback_on_step_end=stop)
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    assert not any("forward" in vars(module) for module in pipe.controlnet.modules())
    assert torch.equal(run(pipe, nets=1), before)


@pytest.mark.parametrize("depth", [0, 4])
def test_a_depth_that_does_not_exist_is_refused(depth):
    with pytest.raises(
        diffaccel.Unsupported, match=f"depth {depth} does not exist; this transformer has depths 1 to 3"
    ):
        diffaccel.wrap(tiny_pipeline(), SkipCache(depth=depth))


def test_the_default_keeps_the_outermost_pair():
    assert SkipCache().depth_for(diffaccel.models.model_map.describe(tiny_pipeline())) == 1


def test_transformers_without_long_skips_are_refused():
    """The sentence names what works there."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    model = SD3Transformer2DModel(
        sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8,
    )  # fmt: skip
    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    with pytest.raises(
        diffaccel.Unsupported, match=r"SD3Transformer2DModel has none; use ResidualCache or Forecast.*add_skip_branches"
    ):
        diffaccel.wrap(pipe, SkipCache())


@pytest.mark.parametrize(("pairs", "usable"), [(((0, 7), (1, 6)), 2), (((0, 7), (2, 5)), 1), (((1, 6),), 0)])
def test_only_nested_pairs_from_the_outside_count(pairs, usable):
    from dataclasses import replace

    layout = describe_transformer(tiny_hunyuan())
    assert usable_pairs(layout) == BLOCKS // 2 - 1
    assert usable_pairs(replace(layout, long_skips=pairs)) == usable


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_report_has_the_flops_that_a_counter_sees(depth):
    """Full and cached calls of a run against the bare model with and without its inner blocks."""
    model, given = tiny_hunyuan(), inputs()
    whole = count_flops(lambda: model(**given))[1]
    fast = diffaccel.wrap(tiny_pipeline(), SkipCache(interval=3, depth=depth))
    run(fast)
    flops = {bool(e.tags): e.flops for e in fast.report.trace}
    assert flops[False] == whole
    skipped = sum(_block_flops(model, given, number) for number in range(depth, BLOCKS - depth))
    assert flops[True] == whole - skipped


def _block_flops(model, given, number):
    """FLOPs of one block inside a whole call."""
    found = []
    block = model.blocks[number]
    original = block.forward

    def counted(*args, **kwargs):
        output, flops = count_flops(lambda: original(*args, **kwargs))
        found.append(flops)
        return output

    block.forward = counted
    try:
        model(**given)
    finally:
        del block.forward
    return found[0]

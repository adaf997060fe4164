"""The skip cache against a UNet forward written out by hand, at every depth and in every situation that must refresh it."""

from __future__ import annotations

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from tiny import KINDS, run, tiny_inputs, tiny_pipeline, tiny_unet

import diffaccel
from diffaccel import SkipCache
from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.bypass import Bypass, Feature, bypass_unet
from diffaccel.methods.caches.cache_plan import full_evaluations
from diffaccel.models.unet import describe_unet

DEPTHS = range(9)  # of the tiny UNets: conv_in, three levels of two layers, two downsamplers


def slow_forward(unet, sample, t, text, depth, feature=None):
    """Returns (output, F) of a plain SD UNet; given F, runs only what lies outside skip `depth`."""
    emb = unet.time_embedding(unet.time_proj(torch.tensor([t])).expand(len(sample), -1))
    h = unet.conv_in(sample)
    skips, layers = [h], []
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        layers += [(r, a) for r, a in zip(block.resnets, attentions, strict=True)]
        layers += [(d, "sampler") for d in block.downsamplers or []]
    for module, attention in layers[: depth if feature is not None else None]:
        h = module(h) if attention == "sampler" else module(h, emb)
        h = h if attention in (None, "sampler") else attention(h, encoder_hidden_states=text, return_dict=False)[0]
        skips.append(h)
    if feature is None:
        h = unet.mid_block(h, emb, encoder_hidden_states=text)
    decoder = []
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        samplers = [None] * (len(block.resnets) - 1) + [block.upsamplers[0] if block.upsamplers else None]
        decoder += list(zip(block.resnets, attentions, samplers, strict=True))
    stored = feature
    for number, (resnet, attention, sampler) in zip(reversed(range(len(decoder))), decoder, strict=True):
        if feature is not None and number > depth:
            continue
        if number == depth:
            stored = h if feature is None else feature
            h = stored
        h = resnet(torch.cat([h, skips[number]], 1), emb)
        h = h if attention is None else attention(h, encoder_hidden_states=text, return_dict=False)[0]
        h = h if sampler is None else sampler(h, skips[number - 1].shape[2:])
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))), stored


def inputs(rows=2, height=16, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, height, width, generator=g), torch.randn(rows, 5, 16, generator=g)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (18, 22), (13, 10)])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_cached_evaluation_equals_the_written_out_forward(depth, size):
    """Full on one input, cached on another: bit-equal to running only the outer layers on the stored feature."""
    unet = tiny_unet()
    (first, text), (second, _) = inputs(2, *size), inputs(2, *size, seed=1)
    whole, feature = slow_forward(unet, first, 700, text, depth)
    want, _ = slow_forward(unet, second, 400, text, depth, feature)
    bypass = Bypass()
    with Seams() as seams:
        bypass_unet(describe_unet(unet), depth, bypass, seams)
        with bypass.active(0, cached=False):
            assert torch.equal(unet(first, 700, text).sample, whole)
        with bypass.active(0, cached=True):
            assert torch.equal(unet(second, 400, text).sample, want)
    assert not torch.equal(want, unet(second, 400, text).sample)


def extras(case, sample):
    """Residuals of a ControlNet or T2I-Adapter for the tiny UNet."""
    g = torch.Generator().manual_seed(5)
    sizes = [8, 8, 8, 8, 16, 16, 16, 16, 16]
    levels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    h, w = sample.shape[2:]
    side = lambda n, k: [-(-n // 2**k)][0]
    down = [torch.randn(2, c, side(h, k), side(w, k), generator=g) for c, k in zip(sizes, levels, strict=True)]
    if case == "controlnet":
        return {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": torch.randn(2, 16, side(h, 2), side(w, 2), generator=g),
        }
    if case == "t2i":
        # the fourth entry is added to the mid block's output in place
        shapes = [(8, 0), (16, 1), (16, 2), (16, 2)]
        return {
            "down_intrablock_additional_residuals": [
                torch.randn(2, c, side(h, k), side(w, k), generator=g) for c, k in shapes
            ]
        }
    return {}


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "sdxl"),
    # the T2I residuals above are made for the SD layout
    [
        ("plain", False),
        ("controlnet", False),
        ("t2i", False),
        ("freeu", False),
        ("plain", True),
        ("controlnet", True),
        ("freeu", True),
    ],
)
@pytest.mark.parametrize("depth", DEPTHS)
def test_unchanged_inputs_are_bit_equal(depth, sdxl, case):
    """Twice cached with the full evaluation's own inputs, in-place additions included."""
    unet = tiny_unet(sdxl=sdxl)
    if case == "freeu":
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    sample, text = inputs(2, 16, 24)
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)} if sdxl else None

    def call():
        more = {key: list(value) for key, value in extras(case, sample).items() if isinstance(value, list)}
        more |= {key: value for key, value in extras(case, sample).items() if not isinstance(value, list)}
        return unet(sample, 500, text, added_cond_kwargs=added, **more).sample

    want = call()
    bypass = Bypass()
    with Seams() as seams:
        bypass_unet(describe_unet(unet), depth, bypass, seams)
        with bypass.active(0, cached=False):
            assert torch.equal(call(), want)
        for _ in range(2):
            with bypass.active(0, cached=True):
                assert torch.equal(call(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_all_evaluations_full_is_bit_identical(kind):
    """Attached but never cached: the pictures of the stock pipeline."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, SkipCache(schedule=tuple(range(20))))
    assert torch.equal(run(fast, kind), run(pipe, kind))
    assert fast.report.methods["skip_cache"]["cached"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_cached_evaluations_skip_the_deep_blocks(kind):
    """Counted by hooks inside the modules: the mid block runs on full evaluations only, ControlNets stop early."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, SkipCache(interval=3, depth=1, min_evaluations=1))
    ran = {"conv_in": 0, "mid": 0, "controlnet mid": 0}

    def counter(name):
        return lambda *_: ran.__setitem__(name, ran[name] + 1)

    pipe.unet.conv_in.register_forward_hook(counter("conv_in"))
    pipe.unet.mid_block.resnets[0].register_forward_hook(counter("mid"))
    nets = [net for net, _ in diffaccel.models.model_map.describe(pipe).controlnets]
    for net in nets:
        net.mid_block.resnets[0].register_forward_hook(counter("controlnet mid"))
    run(fast, kind, steps=12)
    counts = fast.report.methods["skip_cache"]
    assert ran["conv_in"] == fast.report.evaluations == counts["full"] + counts["cached"]
    assert ran["mid"] == counts["full"] < ran["conv_in"]
    assert ran["controlnet mid"] == counts["full"] * len(nets)
    assert fast.report.flops < 0.9 * fast.report.flops_plain


@torch.no_grad()
def test_early_exit_of_the_controlnet_changes_nothing():
    """The residuals that a cached UNet evaluation uses are the ones of a whole ControlNet."""
    pipe = tiny_pipeline("controlnet")
    short = run(diffaccel.wrap(pipe, SkipCache(depth=3)), "controlnet")
    fast = diffaccel.wrap(pipe, SkipCache(depth=3))
    real = diffaccel.methods.caches.skip_cache.bypass_controlnet
    diffaccel.methods.caches.skip_cache.bypass_controlnet = lambda *_: None
    try:
        whole = run(fast, "controlnet")
    finally:
        diffaccel.methods.caches.skip_cache.bypass_controlnet = real
    assert torch.equal(short, whole)


def test_schedules():
    assert full_evaluations(10, 3, "uniform") == {0, 3, 6, 9}
    assert full_evaluations(10, 3, (0, 5)) == {0, 5}
    early, late = full_evaluations(50, 5, "early"), full_evaluations(50, 5, "late")
    assert len(early) == 10
    assert min(early) == min(late) == 0
    assert sum(i < 25 for i in early) > 5 > sum(i < 25 for i in late)
    assert sum(i >= 25 for i in early) < 5


@pytest.mark.parametrize(("scheduler", "evaluations"), [(HeunDiscreteScheduler, 19), (PNDMScheduler, 11)])
def test_repeated_timesteps_do_not_confuse_the_schedule(scheduler, evaluations):
    """Heun and PNDM visit timesteps twice; full evaluations still come every third time."""
    pipe = tiny_pipeline("sd")
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    pipe.scheduler = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    fast = diffaccel.wrap(pipe, SkipCache(interval=3, full_last=0))
    run(fast, "sd", steps=10)
    full = [i for i, e in enumerate(fast.report.trace) if not e.tags]
    assert len(fast.report.trace) == evaluations
    assert full == list(range(0, evaluations, 3))


def test_window_limits_caching_to_a_noise_range():
    fast = diffaccel.wrap(tiny_pipeline("sd"), SkipCache(interval=4, window=(3.0, 0.5)))
    run(fast, "sd", steps=20)
    cached = [e.sigma for e in fast.report.trace if e.tags]
    assert cached
    assert max(cached) <= 3.0
    assert min(cached) >= 0.5


def test_first_and_last_evaluations_are_full():
    fast = diffaccel.wrap(tiny_pipeline("sd"), SkipCache(interval=100, full_first=3, full_last=2))
    run(fast, "sd", steps=12)
    assert [i for i, e in enumerate(fast.report.trace) if not e.tags] == [0, 1, 2, 10, 11]


def test_few_step_runs_are_not_cached_and_say_so():
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, SkipCache())
    with pytest.warns(UserWarning, match="too few"):
        got = run(fast, "sd", steps=8)
    assert torch.equal(got, run(pipe, "sd", steps=8))
    assert any("too few" in note for note in fast.report.notes)


def test_new_prompt_embeddings_force_a_full_evaluation():
    """Also when the new embeddings are written into the old memory."""
    for in_place in (False, True):
        fast = diffaccel.wrap(tiny_pipeline("sd"), SkipCache(interval=5))

        def swap(pipe, step, t, tensors, in_place=in_place):
            if step == 6 and in_place:
                tensors["prompt_embeds"].mul_(0.5)
            elif step == 6:
                return {"prompt_embeds": tensors["prompt_embeds"] * 0.5}
            return {}

        settings = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        fast(**tiny_inputs("sd", steps=12), **settings)
        assert [i for i, e in enumerate(fast.report.trace) if not e.tags] == [0, 5, 7, 11]
        assert fast.report.methods["skip_cache"]["forced by inputs"] == 1


def test_guidance_switches_force_a_full_evaluation():
    fast = diffaccel.wrap(
        tiny_pipeline("sd"), [SkipCache(interval=4), diffaccel.GuidanceInterval(start_fraction=0.1, stop_fraction=0.5)]
    )
    run(fast, "sd", steps=20)
    full = [i for i, e in enumerate(fast.report.trace) if not any(tag[0] == "skip" for tag in e.tags)]
    assert full == [0, 2, 6, 10, 14, 18, 19]
    assert fast.report.methods["skip_cache"]["forced by guidance"] == 1  # at 10 the interval was over anyway


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_reproduces_polynomials_of_its_order(order):
    """Stored values of a polynomial in the position: exact at any other position, bit-exact if nothing changed."""

    def polynomial(x):
        return torch.tensor([1.0 + (2.0 * x if order > 0 else 0.0) + (0.5 * x * x if order > 1 else 0.0)])

    feature = Feature(order)
    for x in (5.0, 3.0, 2.0, 1.5):
        feature.store(polynomial(x), x, keep_previous=True)
    assert len(feature.stored) == order + 1
    assert torch.allclose(feature.at(0.25), polynomial(0.25), atol=1e-5)
    assert torch.equal(feature.at(None), polynomial(1.5))
    same = Feature(order)
    for x in (5.0, 3.0, 1.0):
        same.store(torch.tensor([0.1]), x, keep_previous=True)
    assert torch.equal(same.at(0.3), torch.tensor([0.1]))


def test_one_noise_level_is_stored_once():
    """Two-stage solvers evaluate twice at one sigma; dividing by that distance would be infinite."""
    feature = Feature(2)
    for x, value in ((3.0, 1.0), (2.0, 5.0), (2.0, 7.0)):
        feature.store(torch.tensor([value]), x, keep_previous=True)
    assert [(float(t), x) for t, x in feature.stored] == [(7.0, 2.0), (1.0, 3.0)]


def test_order_one_needs_the_same_conditions():
    """After a guidance switch the feature before it belongs to other rows: no extrapolation across it."""
    recipe = [SkipCache(interval=4, order=1), diffaccel.GuidanceInterval(stop_fraction=0.5)]
    fast = diffaccel.wrap(tiny_pipeline("sd"), recipe)
    assert torch.isfinite(run(fast, "sd", steps=20)).all()


def test_extrapolation_is_closer_than_reuse():
    pipe = tiny_pipeline("sd")
    plain = run(pipe, "sd", steps=30)
    error = [
        (run(diffaccel.wrap(pipe, SkipCache(interval=3, depth=2, order=order)), "sd", steps=30) - plain).abs().mean()
        for order in (0, 1, 2)
    ]
    assert max(error[1:]) < error[0]


def test_a_depth_that_does_not_exist_is_refused():
    with pytest.raises(diffaccel.Unsupported, match="depth 9 does not exist; this UNet has depths 0 to 8"):
        diffaccel.wrap(tiny_pipeline("sd"), SkipCache(depth=9))


def test_stored_tensors_are_one_per_lane():
    """A guided run of one UNet keeps a single feature of the size of the decoder state."""
    kept = []
    real = Feature.store

    def spy(self, value, position, *, keep_previous):
        real(self, value, position, keep_previous=keep_previous)
        kept.append((id(self), tuple(value.shape), len(self.stored) == 1))

    Feature.store = spy
    try:
        run(diffaccel.wrap(tiny_pipeline("sd"), SkipCache(interval=3, order=0)), "sd", steps=12)
    finally:
        Feature.store = real
    assert {(len({k[0] for k in kept})), *{k[1] for k in kept}} == {1, (2, 8, 16, 16)}
    assert all(k[2] for k in kept)


def test_scheduler_config_is_not_needed_for_depth_defaults():
    assert SkipCache().depth_for(diffaccel.models.model_map.describe(tiny_pipeline("sd"))) == 0
    assert SkipCache().depth_for(diffaccel.models.model_map.describe(tiny_pipeline("sdxl"))) == 2


def test_features_survive_the_end_of_adaptive_guidance():
    """When the last image latches, the conditional rows of F stay in use: no full evaluation out of turn."""
    recipe = [SkipCache(interval=4), diffaccel.AdaptiveGuidance(threshold=0.999)]
    fast = diffaccel.wrap(tiny_pipeline("sd"), recipe)
    run(fast, "sd", steps=20)
    rows = [e.rows for e in fast.report.trace]
    full = [i for i, e in enumerate(fast.report.trace) if not e.tags]
    assert full == [0, 4, 8, 12, 16, 19]
    drop = rows.index(1)
    assert drop not in full
    assert set(rows[drop:]) == {1}
    assert not any("forced" in name for name in fast.report.methods["skip_cache"])

"""Every method on every pipeline in every situation; what cannot work refuses with its sentence."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
)
from independent import counted_rows
from tiny import KINDS, run, tiny_inputs, tiny_pipeline, tiny_unet, tiny_vae

import diffaccel
from diffaccel import (
    AdaptiveGuidance,
    BlockCache,
    Forecast,
    GuidanceInterval,
    NormalizedAttentionGuidance,
    RecipeError,
    RegionSampling,
    ResidualCache,
    SkipCache,
    SparseAttention,
    SparseCrossAttention,
    StepReuse,
    StepSchedule,
    TokenDownsampling,
    TokenMerging,
    Unsupported,
)
from diffaccel.methods import Erase, registry
from diffaccel.recipes.recipe import CONFLICTS

# Settings that act in a run of nine steps. Sizes are given where timings would decide, so that nothing depends on load.
METHODS = {
    "guidance_interval": GuidanceInterval(high=6.0, low=0.5),
    "adaptive_guidance": AdaptiveGuidance(threshold=0.999),
    "skip_cache": SkipCache(interval=3, depth=2, min_evaluations=1),
    "token_merging": TokenMerging(min_tokens=1),
    "token_downsampling": TokenDownsampling(min_tokens=1),
    "step_schedule": StepSchedule(fraction=0.75),
    "forecast": Forecast(interval=3, min_evaluations=1),
    "step_reuse": StepReuse(threshold=10.0, max_skips=1, min_evaluations=1, allow_stochastic=True),
}
# These work on diffusion transformers only; tests/test_transformers.py has their table.
TRANSFORMERS_ONLY = {
    "residual_cache": ResidualCache(),
    "region_sampling": RegionSampling(),
    "block_cache": BlockCache(),
    "sparse_attention": SparseAttention(),
}
# These save nothing; each has a file of its own, tests/test_<name>.py (erasure: test_erasure_apply.py).
CHANGES_PICTURES = {
    "erase": Erase(),
    "sparse_cross_attention": SparseCrossAttention(),
    "normalized_attention_guidance": NormalizedAttentionGuidance(),
}
ALL = {
    "all with merging": [
        StepSchedule(fraction=0.9),
        GuidanceInterval(high=6.0, low=0.5),
        SkipCache(interval=3, order=1, min_evaluations=1),
        TokenMerging(min_tokens=1, importance=True),
    ],
    "all with downsampling": [
        AdaptiveGuidance(threshold=0.999),
        SkipCache(interval=4, depth=3, min_evaluations=1),
        TokenDownsampling(min_tokens=1, reduction="average"),
    ],
    "adaptive with importance": [
        AdaptiveGuidance(threshold=0.999),
        SkipCache(interval=3, order=1, min_evaluations=1),
        TokenMerging(min_tokens=1, importance=True),
    ],
}
STEPS = 10
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "pndm": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True),
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "dpm++": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
}


@pytest.fixture(scope="module", params=KINDS)
def cell(request):
    """A pipeline of one kind and its stock pictures."""
    pipe = tiny_pipeline(request.param)
    return pipe, request.param, run(pipe, request.param, steps=STEPS)


@pytest.fixture(scope="module")
def sd():
    return tiny_pipeline("sd")


def acted(report):
    """Each method of the recipe says what it did, and that was not nothing."""
    for name in (entry["method"] for entry in report.recipe["methods"]):
        counts = report.methods[name]
        did = {"guidance_interval": "unguided", "adaptive_guidance": "unguided", "skip_cache": "cached"}
        did |= {"token_merging": "shortened evaluations", "token_downsampling": "shortened evaluations"}
        did |= {"forecast": "cached", "step_reuse": "reused"}
        if name == "step_schedule":
            assert counts["steps run"] < counts["steps asked"]
        else:
            assert counts[did[name]] > 0, name


def truthful(fast, rows):
    report = fast.report
    assert report.completed
    assert report.evaluations == len(rows)
    assert report.rows == sum(rows)
    assert [e.rows for e in report.trace if e.network == "denoiser" and e.rows] == rows  # 0: all images reused
    assert report.flops < report.flops_plain
    assert not any("nothing to drop" in note for note in report.notes)


def test_the_table_names_every_method():
    assert set(METHODS) | set(TRANSFORMERS_ONLY) | set(CHANGES_PICTURES) == set(registry())
    assert all(not method.is_off for method in METHODS.values())


@pytest.mark.parametrize("name", TRANSFORMERS_ONLY)
def test_methods_for_transformers_refuse_unets(sd, name):
    with pytest.raises(Unsupported, match=f"{name} works on diffusion transformers; UNet2DConditionModel is a UNet"):
        diffaccel.wrap(sd, TRANSFORMERS_ONLY[name])


@pytest.mark.parametrize("name", [*METHODS, *ALL])
def test_method_on_pipeline(cell, name):
    """Twice the same picture, another one than stock, counts as hooks see them, and stock again afterwards."""
    pipe, kind, stock = cell
    fast = diffaccel.wrap(pipe, ALL.get(name) or METHODS[name])
    with counted_rows(pipe) as rows:
        first = run(fast, kind, steps=STEPS)
    truthful(fast, rows)
    acted(fast.report)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, stock)
    assert torch.equal(first, run(fast, kind, steps=STEPS))
    if name in ALL:
        assert torch.equal(run(pipe, kind, steps=STEPS), stock)


def one_of(inputs, k):
    """The call that makes image `k` of a batch alone."""
    alone = dict(inputs)
    for name, value in inputs.items():
        if (
            (isinstance(value, torch.Tensor) and value.shape[0] > 1)
            or name == "generator"
            or (name == "image" and isinstance(value, list) and len(value) == 3)
        ):
            alone[name] = value[k : k + 1]
    return alone


@pytest.mark.parametrize("name", ALL)
def test_an_image_does_not_depend_on_its_batch(cell, name):
    pipe, kind, _ = cell
    fast = diffaccel.wrap(pipe, ALL[name])
    batch = run(fast, kind, images=3, steps=STEPS)
    for k in (0, 2):
        alone = fast(**one_of(tiny_inputs(kind, images=3, steps=STEPS), k)).images
        assert alone.shape[0] == 1
        # other batch sizes round differently, and extrapolation amplifies that a little
        assert (torch.as_tensor(alone)[0] - batch[k]).abs().max() < 3e-3
    assert (batch[0] - batch[2]).abs().max() > 1e-2


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_with_every_method(sd, name):
    fast = diffaccel.wrap(sd, METHODS[name])
    batch = run(fast, "sd", images=3, steps=STEPS)
    alone = fast(**one_of(tiny_inputs("sd", images=3, steps=STEPS), 1)).images
    assert (alone[0] - batch[1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_sizes_that_do_not_halve_evenly(cell, name):
    """Deepest token grid 5 x 7; img2img takes any even number of pixels (latents 18 x 22, then 9 x 11)."""
    pipe, kind, _ = cell
    size = (36, 44) if kind == "sd-img2img" else (40, 56)
    fast = diffaccel.wrap(pipe, ALL[name])
    with counted_rows(pipe) as rows:
        got = run(fast, kind, steps=STEPS, size=size)
    assert size in (got.shape[2:], got.shape[1:3])  # the T2I-Adapter pipeline puts channels last
    truthful(fast, rows)
    acted(fast.report)
    assert torch.equal(got, run(fast, kind, steps=STEPS, size=size))


@pytest.mark.parametrize("size", [(8, 8), (8, 32), (16, 8)])
@pytest.mark.parametrize("name", ["token_merging", "token_downsampling", "all with merging"])
def test_tiny_sizes(sd, name, size):
    """Grids of one row of tokens have no window to merge in: they are left alone, the others are not."""
    fast = diffaccel.wrap(sd, ALL.get(name) or METHODS[name])
    assert torch.isfinite(run(fast, "sd", steps=STEPS, size=size)).all()
    acted(fast.report)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", [*METHODS, *ALL])
def test_method_with_scheduler(sd, name, scheduler):
    before, sd.scheduler = sd.scheduler, SCHEDULERS[scheduler]()
    try:
        fast = diffaccel.wrap(sd, ALL.get(name) or METHODS[name])
        with counted_rows(sd) as rows:
            first = run(fast, "sd", steps=STEPS)
        truthful(fast, rows)
        acted(fast.report)
        assert torch.isfinite(first).all()
        assert torch.equal(first, run(fast, "sd", steps=STEPS))
    finally:
        sd.scheduler = before


@pytest.mark.parametrize("kind", ["sd", "controlnet"])
@pytest.mark.parametrize("pair", list(itertools.combinations(METHODS, 2)), ids="+".join)
def test_pairs(pair, kind):
    """Together they run and both act, or they refuse with the declared sentence. Nothing else happens."""
    pipe = tiny_pipeline(kind)
    methods = [METHODS[name] for name in pair]
    if frozenset(pair) in CONFLICTS:
        with pytest.raises(RecipeError) as caught:
            diffaccel.wrap(pipe, methods)
        assert str(caught.value) == CONFLICTS[frozenset(pair)]
        return
    fast = diffaccel.wrap(pipe, methods)
    with counted_rows(pipe) as rows:
        got = run(fast, kind, steps=14)
    truthful(fast, rows)
    acted(fast.report)
    assert torch.equal(got, run(diffaccel.wrap(pipe, methods[::-1]), kind, steps=14))
    for method in methods:
        alone = diffaccel.wrap(pipe, method)
        run(alone, kind, steps=14)
        assert fast.report.flops < alone.report.flops


# --- what is not supported says so ---


def parts(cls, unet=None, **more):
    common = {"vae": tiny_vae(), "text_encoder": None, "tokenizer": None, "unet": unet or tiny_unet()}
    common |= {"scheduler": EulerDiscreteScheduler(steps_offset=1), "safety_checker": None, "feature_extractor": None}
    return cls(**common, requires_safety_checker=False, **more)


@pytest.mark.parametrize("recipe", [[], "balanced"])
def test_refused_pipelines(recipe):
    with pytest.raises(Unsupported, match="StableDiffusionInstructPix2PixPipeline is not supported: it stacks three"):
        diffaccel.wrap(parts(StableDiffusionInstructPix2PixPipeline, tiny_unet(in_channels=8)), recipe)
    with pytest.raises(Unsupported, match="StableDiffusionPAGPipeline is not supported: it adds a third, perturbed"):
        diffaccel.wrap(parts(StableDiffusionPAGPipeline), recipe)


def test_a_refused_base_class_counts():
    class Custom(StableDiffusionInstructPix2PixPipeline):
        pass

    with pytest.raises(Unsupported, match="Custom is not supported: it stacks three"):
        diffaccel.wrap(parts(Custom, tiny_unet(in_channels=8)), [])


@pytest.mark.parametrize("thing", [object(), None, "a prompt", tiny_unet, torch.nn.Linear(1, 1)])
def test_things_without_a_unet(thing):
    with pytest.raises(Unsupported, match="is not supported; supported are pipelines around a UNet2DConditionModel"):
        diffaccel.wrap(thing, [])


def test_a_pipeline_around_another_network():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(Unsupported, match="DDPMPipeline is not supported; supported are"):
        diffaccel.wrap(DDPMPipeline(unet, DDPMScheduler()), [])


def test_a_unet_with_other_blocks():
    from diffusers import UNet2DConditionModel

    pipe = tiny_pipeline("sd")
    pipe.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    )
    with pytest.raises(Unsupported, match="SimpleCrossAttnDownBlock2D are not supported"):
        diffaccel.wrap(pipe, [])


def test_more_rows_than_two_per_image_are_refused_by_guidance_methods():
    """A pipeline nobody has described: three rows per image run without guidance methods, and not with them."""
    from diffusers import StableDiffusionPipeline

    class ThreeRows:
        unet = tiny_unet()
        scheduler = EulerDiscreteScheduler()

        def prepare_latents(self):
            return torch.zeros(1, 4, 16, 16)

        @torch.no_grad()
        def __call__(self):
            self.scheduler.set_timesteps(2)
            latents = self.prepare_latents()
            for t in self.scheduler.timesteps:
                rows = self.scheduler.scale_model_input(torch.cat([latents] * 3), t)
                out = self.unet(rows, t, torch.zeros(3, 5, 16)).sample
                latents = self.scheduler.step(out[:1], t, latents).prev_sample
            return latents

    assert not isinstance(ThreeRows(), StableDiffusionPipeline)
    fast = diffaccel.wrap(ThreeRows(), [])
    assert torch.equal(fast(), ThreeRows()())
    assert fast.report.rows == 6
    with pytest.raises(
        Unsupported, match="cannot tell the guidance branches apart: the network got 3 rows for 1 images"
    ):
        diffaccel.wrap(ThreeRows(), GuidanceInterval(low=0.5))()

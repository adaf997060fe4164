"""Fewer steps as a method: exactly the stock pipeline with other arguments, and honest counts."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    PNDMScheduler,
)
from diffusers.schedulers import AysSchedules
from independent import counted_rows, network_flops
from tiny import DDIM, KINDS, run, tiny_inputs, tiny_lcm, tiny_pipeline
from tiny_transformers import run as transformer_run
from tiny_transformers import tiny_pipeline as tiny_transformer

import diffaccel
from diffaccel import SkipCache, StepSchedule, Unsupported
from diffaccel.methods.schedule.step_schedule import interpolate_timesteps, published_timesteps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("settings", "asked", "steps"),
    [
        ({"fraction": 0.5}, 12, 6),
        ({"fraction": 0.5}, 7, 4),
        ({"fraction": 0.01}, 12, 1),
        ({"fraction": 0.9}, 11, 10),
        ({"steps": 5}, 12, 5),
        ({"steps": 12}, 5, 12),
    ],
)
def test_equals_the_stock_pipeline_with_that_number(settings, asked, steps):
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, StepSchedule(**settings))
    with counted_rows(pipe) as rows:
        got = run(fast, "sd", steps=asked)
    assert len(rows) == steps == fast.report.steps == fast.report.evaluations
    assert torch.equal(got, run(pipe, "sd", steps=steps))
    assert fast.report.methods["step_schedule"] == {"steps asked": asked, "steps run": steps}
    assert fast.report.flops_ratio == pytest.approx(asked / steps)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline(kind):
    """Bit for bit the stock pipeline with half the steps, and `flops_plain` is what the full number costs."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    assert torch.equal(run(fast, kind, steps=8), run(pipe, kind, steps=4))
    assert fast.report.flops == network_flops(pipe, lambda: run(pipe, kind, steps=4))
    assert fast.report.flops_plain == network_flops(pipe, lambda: run(pipe, kind, steps=8))


@pytest.mark.parametrize("kind", ["sd-img2img", "sdxl-img2img", "sd-inpaint"])
@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_strength_is_respected(kind, strength):
    """The share of the noise that a picture gets stays the caller's; savings are counted on what would have run."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    with counted_rows(pipe) as rows:
        got = fast(**tiny_inputs(kind, steps=12) | {"strength": strength}).images
    reduced = len(rows)
    want = pipe(**tiny_inputs(kind, steps=6) | {"strength": strength}).images
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))
    with counted_rows(pipe) as rows:
        pipe(**tiny_inputs(kind, steps=12) | {"strength": strength})
    assert reduced == int(6 * strength) < len(rows)
    assert fast.report.flops_ratio == pytest.approx(len(rows) / reduced)


@pytest.mark.parametrize("kind", ["sd3-img2img", "flux-img2img"])
def test_pipelines_that_round_up(kind):
    """At strength 0.55 they run 6 of 10 steps, and 3 of 5."""
    pipe = tiny_transformer(kind)
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    transformer_run(fast, kind, steps=10, strength=0.55)
    assert fast.report.steps == 3
    assert fast.report.flops_ratio == pytest.approx(2.0)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    transformer_run(pipe, kind, steps=10, strength=0.55)
    handle.remove()
    assert len(calls) == 2 * fast.report.evaluations


def test_a_strength_that_leaves_nothing_is_refused():
    fast = diffaccel.wrap(tiny_pipeline("sd-img2img"), StepSchedule(fraction=0.5))
    with pytest.raises(Unsupported, match="nothing is left of 5 instead of 10 steps"):
        fast(**tiny_inputs("sd-img2img", steps=10) | {"strength": 0.1})


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.3), (8, 0.5), (12, 0.95)])
def test_lcm_gives_strength_to_its_scheduler(steps, strength):
    """It runs all of its steps at any strength."""
    pipe = tiny_lcm(LatentConsistencyModelImg2ImgPipeline)
    inputs = tiny_inputs("sd-img2img", steps=steps) | {"strength": strength}
    del inputs["negative_prompt_embeds"]
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    with counted_rows(pipe) as rows:
        fast(**inputs)
    assert len(rows) == steps // 2
    assert fast.report.flops_ratio == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sdxl", {"denoising_end": 0.7}),
        ("sdxl-controlnet", {"denoising_end": 0.7}),
        ("sdxl-img2img", {"denoising_end": 0.9, "strength": 0.55}),
        ("sdxl-img2img", {"denoising_start": 0.45}),
        ("sdxl-img2img", {"denoising_start": 0.25, "denoising_end": 0.65}),
    ],
)
def test_parts_of_a_run(kind, more):
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    fast(**tiny_inputs(kind, steps=14) | more)
    assert fast.report.flops == network_flops(pipe, lambda: pipe(**tiny_inputs(kind, steps=7) | more))
    assert fast.report.flops_plain == network_flops(pipe, lambda: pipe(**tiny_inputs(kind, steps=14) | more))


def test_the_default_number_of_steps_is_the_pipelines():
    fast = diffaccel.wrap(tiny_pipeline("sd"), StepSchedule(fraction=0.1))
    inputs = tiny_inputs("sd")
    del inputs["num_inference_steps"]
    fast(**inputs)
    assert fast.report.methods["step_schedule"] == {"steps asked": 50, "steps run": 5}


def test_steps_given_by_position_and_extra_keywords_survive():
    """The count may stand anywhere in the call, and arguments caught by **kwargs still reach the pipeline."""
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    inputs = tiny_inputs("sd")
    height, width, steps = (inputs.pop(name) for name in ("height", "width", "num_inference_steps"))
    called = []
    with pytest.warns(FutureWarning, match="callback"):
        fast(None, height, width, steps, callback=lambda *_: called.append(1), callback_steps=1, **inputs)
    assert len(called) == fast.report.evaluations == 5


def test_a_pipeline_of_the_users_that_takes_anything():
    """What it got by position it gets so again."""
    pipe, seen = tiny_pipeline("sd"), []

    class Logging(type(pipe)):
        def __call__(self, *args, **kwargs):
            seen.append((args, kwargs["num_inference_steps"]))
            return super().__call__(*args, **kwargs)

    inputs = tiny_inputs("sd", steps=8)
    want = tiny_pipeline("sd")(**tiny_inputs("sd", steps=4)).images
    height = inputs.pop("height")
    pipe.__class__ = Logging
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    assert torch.equal(fast(None, height, **inputs).images, want)
    assert seen == [((None, height), 4)]


@pytest.mark.parametrize(("cls", "full", "half"), [(HeunDiscreteScheduler, 19, 9), (PNDMScheduler, 11, 6)])
def test_solvers_with_more_evaluations_than_steps(cls, full, half):
    pipe = tiny_pipeline("sd")
    pipe.scheduler = cls(**BETAS, **({"skip_prk_steps": True} if cls is PNDMScheduler else {}))
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    run(fast, "sd", steps=10)
    assert fast.report.evaluations == half
    assert fast.report.flops_ratio == pytest.approx(full / half)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_spacing_equals_a_scheduler_built_that_way(cls, spacing):
    """For one run only; the scheduler's own configuration returns."""
    options = DDIM if cls is DDIMScheduler else BETAS
    pipe = tiny_pipeline("sd")
    pipe.scheduler = cls(**options)
    before = dict(pipe.scheduler.config)
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5, spacing=spacing))
    got = run(fast, "sd", steps=12)
    assert dict(pipe.scheduler.config) == before
    assert "timestep_spacing" in before
    pipe.scheduler = cls(**options | {"timestep_spacing": spacing})
    assert torch.equal(got, run(pipe, "sd", steps=6))
    if before["timestep_spacing"] != spacing:
        pipe.scheduler = cls(**options)
        assert not torch.equal(got, run(pipe, "sd", steps=6))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("steps", [10, 6])
def test_published_lists(kind, steps):
    """The list of the family as it is, or interpolated; the same as handing it to the stock pipeline."""
    pipe = tiny_pipeline(kind)
    pipe.scheduler = EulerDiscreteScheduler(**BETAS)
    fast = diffaccel.wrap(pipe, StepSchedule(steps=steps, spacing="ays"))
    got = run(fast, kind, steps=20)
    listed = list(AysSchedules["StableDiffusionTimesteps" if kind == "sd" else "StableDiffusionXLTimesteps"])
    if steps != len(listed):
        listed = interpolate_timesteps(listed, steps, pipe.scheduler.alphas_cumprod)
    abar = pipe.scheduler.alphas_cumprod.double()
    levels = [float(((1 - abar[t]) / abar[t]).sqrt()) for t in listed]
    assert [e.sigma for e in fast.report.trace] == pytest.approx(levels, rel=1e-3)
    want = pipe(**tiny_inputs(kind, steps=20) | {"timesteps": listed}).images
    assert torch.equal(got, torch.as_tensor(want).float())
    assert fast.report.flops_ratio == pytest.approx(20 / steps)


@pytest.mark.parametrize("family", ["StableDiffusionTimesteps", "StableDiffusionXLTimesteps"])
@pytest.mark.parametrize("count", [2, 5, 9, 10, 11, 25, 50])
def test_interpolation_keeps_the_ends_and_falls(family, count):
    listed = list(AysSchedules[family])
    abar = DDIMScheduler(**DDIM).alphas_cumprod
    got = interpolate_timesteps(listed, count, abar)
    assert len(got) == count
    assert got[0] == listed[0]
    assert got[-1] == listed[-1]
    assert all(a > b for a, b in zip(got, got[1:], strict=False))
    if count == len(listed):
        assert got == listed
    if count == 2 * len(listed) - 1:
        assert got[::2] == listed

    def level(t):
        return math.log(math.sqrt((1 - float(abar[t])) / float(abar[t])))

    if count == 25:  # evenly spaced in log sigma inside each segment
        for k in range(count):
            position = k * (len(listed) - 1) / (count - 1)
            low = min(int(position), len(listed) - 2)
            want = level(listed[low]) + (position - low) * (level(listed[low + 1]) - level(listed[low]))
            assert level(got[k]) == pytest.approx(want, abs=0.02)


def test_combined_with_a_cache():
    """`flops_plain` stays the price of the full call, and the cache sees the shorter run."""
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, [SkipCache(interval=3, full_last=0), StepSchedule(fraction=0.5)])
    run(fast, "sd", steps=24)
    assert [i for i, e in enumerate(fast.report.trace) if not e.tags] == [0, 3, 6, 9]
    assert fast.report.flops_plain == network_flops(pipe, lambda: run(pipe, "sd", steps=24))


# --- refusals ---


@pytest.mark.parametrize("given", [{"timesteps": [900, 500, 100]}, {"sigmas": [10.0, 1.0, 0.1]}])
def test_explicit_timesteps_are_not_overruled(given):
    fast = diffaccel.wrap(tiny_pipeline("sd"), StepSchedule(fraction=0.5))
    with pytest.raises(Unsupported, match="cannot be combined with timesteps or sigmas given in the call"):
        fast(**tiny_inputs("sd") | given)


def test_as_many_sigmas_as_steps():
    """CogView4 makes its timesteps from the number of steps."""
    pipe = tiny_transformer("cogview4")
    fast, sigmas = diffaccel.wrap(pipe, "off"), [1.0, 0.7, 0.3]
    with pytest.raises(Unsupported, match=r"got 3 and 10; .*call it with num_inference_steps=3 too"):
        transformer_run(fast, "cogview4", steps=10, sigmas=sigmas)
    got = transformer_run(fast, "cogview4", steps=3, sigmas=sigmas)
    assert torch.equal(got, transformer_run(pipe, "cogview4", steps=3, sigmas=sigmas))
    assert fast.report.steps == 3


def test_a_scheduler_without_spacing():
    pipe = tiny_pipeline("sd")
    pipe.scheduler = EDMEulerScheduler()
    fast = diffaccel.wrap(pipe, StepSchedule(spacing="trailing"))
    with pytest.raises(Unsupported, match="has no timestep_spacing to change"):
        run(fast, "sd")


def test_a_scheduler_without_timestep_lists():
    fast = diffaccel.wrap(tiny_pipeline("sd"), StepSchedule(spacing="ays"))
    fast.scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True)
    with pytest.raises(Unsupported, match="PNDMScheduler does not accept a list of timesteps"):
        run(fast, "sd")


def test_a_pipeline_without_timestep_lists():
    class Plain:
        scheduler = EulerDiscreteScheduler(**BETAS)

        def __call__(self, prompt, num_inference_steps=50): ...

    with pytest.raises(Unsupported, match="Plain does not accept a list of timesteps"):
        published_timesteps(Plain(), 10)


def test_a_family_without_a_published_list():
    from diffusers import StableDiffusionPipeline

    class Custom(StableDiffusionPipeline):
        """A user's subclass is of the family of its base."""

    pipe = tiny_pipeline("sd")
    pipe.__class__ = Custom
    diffaccel.wrap(pipe, StepSchedule(spacing="ays"))
    Foreign = type("ForeignPipeline", (), {"unet": pipe.unet, "scheduler": pipe.scheduler})
    with pytest.raises(Unsupported, match="no published timestep list is known for ForeignPipeline"):
        diffaccel.wrap(Foreign(), StepSchedule(spacing="ays"))

"""Guidance interval and adaptive guidance against hand-written sampling loops."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler
from pydantic import ValidationError
from tiny import DDIM, KINDS, run, tiny_inputs, tiny_pipeline

import diffaccel
from diffaccel import AdaptiveGuidance, GuidanceInterval
from diffaccel.engine.noise import predicted_x0
from diffaccel.methods.guidance.adaptive_guidance import alignment


def slow_loop(pipe, inputs, guided):
    """Stable Diffusion sampling written out, one image: `guided(i, sigma, c, u, x0_c, x0_u)` decides each step."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(inputs["num_inference_steps"])
    sample = torch.randn(1, 4, 16, 16, generator=inputs["generator"][0]) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, t)
        u = pipe.unet(scaled, t, inputs["negative_prompt_embeds"]).sample
        c = pipe.unet(scaled, t, inputs["prompt_embeds"]).sample
        abar = scheduler.alphas_cumprod[t.long()]
        sigma = float(((1 - abar) / abar).sqrt())
        noise = [(scaled - (1 - abar).sqrt() * e) / abar.sqrt() for e in (c, u)]
        on = guided(i, sigma, *noise)
        sample = scheduler.step(u + inputs["guidance_scale"] * (c - u) if on else c, t, sample).prev_sample
    return pipe.vae.decode(sample / pipe.vae.config.scaling_factor).sample.div(2).add(0.5).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_interval_equals_a_hand_written_loop(scheduler):
    pipe = tiny_pipeline("sd")
    if scheduler == "euler":
        pipe.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    fast = diffaccel.wrap(pipe, GuidanceInterval(high=5.0, low=0.5))
    got = run(fast, "sd")
    want = slow_loop(pipe, tiny_inputs("sd"), lambda i, sigma, *_: 0.5 < sigma <= 5.0)
    assert fast.report.methods["guidance_interval"]["unguided"] > 0
    assert (got - want).abs().max() < 1e-4
    assert (got - run(pipe, "sd")).abs().max() > 1e-2  # the interval matters at all


@torch.no_grad()
def test_adaptive_guidance_equals_a_hand_written_loop():
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, AdaptiveGuidance(threshold=0.999))
    got = run(fast, "sd")
    off = []

    def guided(i, sigma, x0_c, x0_u):
        on = not off
        cosine = (x0_c * x0_u).sum() / (x0_c.norm() * x0_u.norm())
        if on and cosine >= 0.999:
            off.append(i)  # takes effect from the next step on, and stays
        return on

    want = slow_loop(pipe, tiny_inputs("sd"), guided)
    assert fast.report.methods["adaptive_guidance"]["guided"] == off[0] + 1
    assert 0 < off[0] < 8
    assert (got - want).abs().max() < 1e-4


def test_bounds_are_exclusive_below_and_inclusive_above():
    interval = GuidanceInterval(high=5.0, low=1.0)
    assert interval.contains(5.0, 0.0)
    assert not interval.contains(5.0001, 0.0)
    assert not interval.contains(1.0, 0.0)
    assert interval.contains(1.0001, 0.0)
    assert not GuidanceInterval(high=5.0).contains(math.inf, 0.0)
    assert GuidanceInterval().contains(math.inf, 0.0)


def test_fractions_guide_a_share_of_the_steps():
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, GuidanceInterval(start_fraction=0.2, stop_fraction=0.7))
    run(fast, "sd", steps=10)
    assert [e.rows for e in fast.report.trace] == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_fall_and_rise_again(kind):
    """Outside the interval denoiser and ControlNets run one row per image; guidance can switch back on."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, GuidanceInterval(high=4.0, low=0.4))
    seen = {"denoiser": [], "controlnet": []}
    pipe.unet.conv_in.register_forward_hook(lambda m, a, o: seen["denoiser"].append(len(o)))
    for net, _ in diffaccel.models.model_map.describe(pipe).controlnets:
        net.conv_in.register_forward_hook(lambda m, a, o: seen["controlnet"].append(len(o)))
    run(fast, kind, images=2)
    assert sorted(set(seen["denoiser"])) == [2, 4]
    assert seen["denoiser"][0] == seen["denoiser"][-1] == 2
    assert fast.report.rows == sum(seen["denoiser"])
    if seen["controlnet"]:
        assert set(seen["controlnet"]) == ({2} if kind.endswith("guess") else {2, 4})
        assert seen["controlnet"][0] == 2
    assert fast.report.flops < fast.report.flops_plain


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_one_decision_per_solver_step(scheduler):
    """Both evaluations of a two-stage step use the weight of its start, although their noise levels differ."""
    pipe = tiny_pipeline("sd")
    pipe.scheduler = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    fast = diffaccel.wrap(pipe, GuidanceInterval(high=3.0, low=0.3))
    run(fast, "sd", steps=8)
    rows = [e.rows for e in fast.report.trace]
    assert len(rows) == 15
    assert set(rows) == {1, 2}
    assert all(rows[i] == rows[i + 1] for i in range(0, 14, 2))
    assert fast.report.steps == 8


def test_an_interval_that_covers_the_run_is_bit_identical():
    pipe = tiny_pipeline("sdxl")
    assert torch.equal(run(diffaccel.wrap(pipe, GuidanceInterval(high=1e6)), "sdxl"), run(pipe, "sdxl"))


def test_adaptive_guidance_is_per_image():
    """An image next to a slower one gets the picture it gets alone."""
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, AdaptiveGuidance(threshold=0.999))
    batch = run(fast, "sd", images=3)
    inputs = tiny_inputs("sd", images=3)
    for k in range(3):
        one = {
            "prompt_embeds": inputs["prompt_embeds"][k : k + 1],
            "negative_prompt_embeds": inputs["negative_prompt_embeds"][k : k + 1],
            "generator": [torch.Generator().manual_seed(k)],
        }
        alone = fast(**{**inputs, **one}).images
        assert (alone[0] - batch[k]).abs().max() < 1e-4


def test_the_latch_is_forgotten_between_runs():
    fast = diffaccel.wrap(tiny_pipeline("sd"), AdaptiveGuidance(threshold=0.999))
    first, counts = run(fast, "sd"), fast.report.methods
    assert torch.equal(first, run(fast, "sd"))
    assert fast.report.methods == counts


def test_without_guidance_the_report_says_so():
    fast = diffaccel.wrap(tiny_pipeline("sd"), [GuidanceInterval(low=0.3), AdaptiveGuidance()])
    inputs = tiny_inputs("sd") | {"guidance_scale": 1.0}
    stock = fast.pipe(**inputs).images
    assert torch.equal(fast(**(tiny_inputs("sd") | {"guidance_scale": 1.0})).images, stock)
    assert any("without classifier-free guidance" in note for note in fast.report.notes)


def test_interval_and_adaptive_guidance_run_together():
    fast = diffaccel.wrap(tiny_pipeline("sd"), [GuidanceInterval(high=6.0), AdaptiveGuidance(threshold=0.999)])
    run(fast, "sd")
    rows = [e.rows for e in fast.report.trace]
    assert rows[0] == 1
    assert 2 in rows
    assert rows[-1] == 1
    assert not fast.report.notes


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_of_every_prediction_type(prediction_type):
    """Noise a known picture, predict perfectly, and get the picture back up to a factor."""
    scheduler = DDIMScheduler(**DDIM, prediction_type=prediction_type)
    x0, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    abar = scheduler.alphas_cumprod[500]
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    perfect = {"epsilon": eps, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0, "sample": x0}
    sigma = float(((1 - abar) / abar).sqrt())
    got = predicted_x0(x, perfect[prediction_type], sigma, scheduler)
    assert alignment(got, x0).min() > 0.9999


@pytest.mark.parametrize(
    "settings", [{"high": 0.1, "low": 0.2}, {"low": -1.0}, {"start_fraction": 0.8, "stop_fraction": 0.2}]
)
def test_wrong_bounds_are_refused(settings):
    with pytest.raises(ValidationError):
        GuidanceInterval(**settings)

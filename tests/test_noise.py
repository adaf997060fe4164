"""The clock's noise level in real runs, against what each scheduler does with tensors at that moment.

Nothing here reads the lists the engine reads. A scheduler's `add_noise` of pure signal and of pure noise gives both
coefficients, so their ratio is the EDM sigma; schedulers that scale their input show it in that scale as well.
"""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from diffusers import schedulers
from tiny import run, tiny_inputs, tiny_pipeline

import diffaccel
from diffaccel.engine.clock import Clock
from diffaccel.engine.noise import edm_sigma, flow_to_edm, vp_sigma

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PNDM = BETAS | {"skip_prk_steps": True, "steps_offset": 1}
KARRAS = BETAS | {"use_karras_sigmas": True}
# name: class, options, evaluations of a run of N steps, solver steps of it
FAMILIES = {
    "ddim": ("DDIMScheduler", BETAS | {"steps_offset": 1}, lambda n: n, lambda n: n),
    "ddim trailing": ("DDIMScheduler", BETAS | {"timestep_spacing": "trailing"}, lambda n: n, lambda n: n),
    "ddpm": ("DDPMScheduler", BETAS, lambda n: n, lambda n: n),
    "lcm": ("LCMScheduler", BETAS, lambda n: n, lambda n: n),
    "tcd": ("TCDScheduler", BETAS, lambda n: n, lambda n: n),
    "pndm": ("PNDMScheduler", PNDM, lambda n: n + 1, lambda n: n + 1),
    "pndm warm-up": ("PNDMScheduler", BETAS, lambda n: n + 9, lambda n: n + 9),
    "euler": ("EulerDiscreteScheduler", BETAS, lambda n: n, lambda n: n),
    "euler karras": ("EulerDiscreteScheduler", KARRAS, lambda n: n, lambda n: n),
    "euler trailing": ("EulerDiscreteScheduler", BETAS | {"timestep_spacing": "trailing"}, lambda n: n, lambda n: n),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", BETAS, lambda n: n, lambda n: n),
    "lms": ("LMSDiscreteScheduler", BETAS, lambda n: n, lambda n: n),
    "dpm++ multi": ("DPMSolverMultistepScheduler", BETAS, lambda n: n, lambda n: n),
    "dpm++ multi karras": ("DPMSolverMultistepScheduler", KARRAS, lambda n: n, lambda n: n),
    "dpm++ sde": (
        "DPMSolverMultistepScheduler",
        BETAS | {"algorithm_type": "sde-dpmsolver++"},
        lambda n: n,
        lambda n: n,
    ),
    "dpm++ single": ("DPMSolverSinglestepScheduler", BETAS, lambda n: n, lambda n: n),
    "dpm++ flow": ("DPMSolverMultistepScheduler", FLOW, lambda n: n, lambda n: n),
    "unipc": ("UniPCMultistepScheduler", BETAS, lambda n: n, lambda n: n),
    "unipc flow": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}, lambda n: n, lambda n: n),
    "deis": ("DEISMultistepScheduler", BETAS, lambda n: n, lambda n: n),
    "sa": ("SASolverScheduler", BETAS, lambda n: n, lambda n: n),
    "heun": ("HeunDiscreteScheduler", BETAS, lambda n: 2 * n - 1, lambda n: n),
    "heun karras": ("HeunDiscreteScheduler", KARRAS, lambda n: 2 * n - 1, lambda n: n),
    "kdpm2": ("KDPM2DiscreteScheduler", BETAS, lambda n: 2 * n - 1, lambda n: n),
    "kdpm2 karras": ("KDPM2DiscreteScheduler", KARRAS, lambda n: 2 * n - 1, lambda n: n),
    "kdpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", BETAS, lambda n: 2 * n - 1, lambda n: n),
    "edm euler": ("EDMEulerScheduler", {}, lambda n: n, lambda n: n),
    "edm dpm": ("EDMDPMSolverMultistepScheduler", {}, lambda n: n, lambda n: n),
}
N = 8


def build(name):
    cls, options, *_ = FAMILIES[name]
    if cls == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    if name == "dpm++ single":
        options = options | {"lower_order_final": True}
    return getattr(schedulers, cls)(**options)


@pytest.fixture(scope="module", params=["sd", "sd-img2img"])
def fast(request):
    return diffaccel.wrap(tiny_pipeline(request.param), []), request.param


def spy(scheduler):
    """Notes the noise level at every step, from what the scheduler does with tensors."""
    scaled, noised = [], []
    scale, step = scheduler.scale_model_input, scheduler.step
    data = float(scheduler.config.get("sigma_data", 1.0))  # EDM schedulers scale by 1 / sqrt(sigma^2 + data^2)

    @functools.wraps(scale)
    def spied_scale(sample, *args, **kwargs):
        result = scale(sample, *args, **kwargs)
        ratio = float(sample.double().norm() / result.double().norm())
        scaled.append(math.sqrt(max(ratio**2 - data**2, 0.0)))
        return result

    @functools.wraps(step)
    def spied_step(output, timestep, sample, *args, **kwargs):
        one, t = torch.ones(1, 1, dtype=torch.float64), torch.as_tensor(timestep).reshape(1)
        if not t.is_floating_point():
            t = t.long()
        noise = scheduler.add_noise(0 * one, one, t) if hasattr(scheduler, "add_noise") else one
        signal = scheduler.add_noise(one, 0 * one, t) if hasattr(scheduler, "add_noise") else one
        noised.append(float(noise / signal))
        return step(output, timestep, sample, *args, **kwargs)

    scheduler.scale_model_input, scheduler.step = spied_scale, spied_step
    return scaled, noised


@pytest.mark.parametrize("name", FAMILIES)
def test_sigma_of_every_evaluation(fast, name):
    """Text to image, and img2img that starts inside the list."""
    wrapped, kind = fast
    wrapped.scheduler = build(name)
    scaled, noised = spy(wrapped.scheduler)
    more = {"strength": 0.75} if kind == "sd-img2img" else {}
    wrapped(**tiny_inputs(kind, steps=N) | more)
    report = wrapped.report
    sigmas = [e.sigma for e in report.trace]
    asked = N if kind == "sd" else 6
    if kind == "sd" or not name.startswith("pndm"):  # PNDM's warm-up may lie before the start
        assert report.evaluations == FAMILIES[name][2](asked)
        assert report.steps == FAMILIES[name][3](asked)
    assert report.completed
    assert len(sigmas) == len(scaled) == len(noised)
    if name.startswith("kdpm2"):  # its add_noise knows whole steps only
        # with Karras spacing it rounds its timesteps
        assert sigmas == pytest.approx(scaled, rel=3e-3 if "karras" in name else 1e-4)
    else:
        assert sigmas == pytest.approx(noised, rel=1e-4)
    if FAMILIES[name][0].startswith(("Euler", "Heun", "LMS", "EDM")):
        assert sigmas == pytest.approx(scaled, rel=1e-4, abs=1e-3)
    assert sigmas[0] > 3 * sigmas[-1]


@pytest.mark.parametrize("name", ["heun", "pndm"])
def test_repeated_timesteps_share_their_noise_level(name):
    fast = diffaccel.wrap(tiny_pipeline("sd"), [])
    fast.scheduler = build(name)
    run(fast, "sd", steps=N)
    sigmas = [e.sigma for e in fast.report.trace]
    pairs = [i for i in range(len(sigmas) - 1) if sigmas[i] == sigmas[i + 1]]
    assert pairs == ([1] if name == "pndm" else list(range(1, 2 * N - 2, 2)))


def drive(scheduler, **settings):
    """The clock alone in a written-out loop; the network's own timestep is of another unit, as in Flux."""
    clock = Clock(scheduler)
    scheduler.set_timesteps(N, **settings)
    clock.restart()
    seen = []
    for t in scheduler.timesteps:
        clock.timestep = float(t)
        assert clock.enter(float(t) / 1000)
        assert not clock.enter(float(t) / 1000)  # a second network in the same evaluation
        seen.append((clock.step, clock.sigma, clock.step_sigma))
        scheduler.step(torch.zeros(1, 4, 2, 2), t, torch.zeros(1, 4, 2, 2))
        clock.advance()
    assert clock.total == clock.evaluation == len(scheduler.timesteps)
    return seen


@pytest.mark.parametrize("name", ["heun", "kdpm2", "kdpm2 ancestral"])
def test_two_stage_solvers_keep_the_sigma_of_the_step(name):
    seen = drive(build(name))
    assert [step for step, *_ in seen] == [i // 2 for i in range(2 * N - 1)]
    for i in range(0, 2 * N - 2, 2):
        assert seen[i][1] == seen[i][2] == seen[i + 1][2]
        assert seen[i + 1][1] < seen[i][1]


@pytest.mark.parametrize(
    ("cls", "options", "call"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 0.8}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
    ],
)
def test_flow_matching(cls, options, call):
    """timesteps are 1000 s, and sigma is noise over signal, s / (1 - s)."""
    scheduler = getattr(schedulers, cls)(**options)
    seen = drive(scheduler, **call)
    for t, (_, sigma, _) in zip(scheduler.timesteps.double() / 1000, seen, strict=True):
        assert sigma == (math.inf if t == 1 else pytest.approx(float(t / (1 - t)), rel=1e-4))
    assert seen[0][1] == math.inf


def test_zero_terminal_snr_starts_at_infinity():
    ddim = schedulers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    sigmas = [sigma for _, sigma, _ in drive(ddim)]
    assert sigmas[0] == math.inf
    assert all(math.isfinite(sigma) for sigma in sigmas[1:])
    euler = schedulers.EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert drive(euler)[0][1] == pytest.approx(4096, rel=1e-3)


def test_published_values_of_the_stable_diffusion_table():
    abar = schedulers.DDIMScheduler(**BETAS).alphas_cumprod
    for sigma, t in ((0.19, 37), (0.28, 72), (1.61, 498), (2.90, 664), (5.42, 813), (14.61, 999)):
        assert vp_sigma(abar, t) == pytest.approx(sigma, rel=0.02)
    assert vp_sigma(abar, 0) == pytest.approx(0.0292, rel=0.01)
    for sigma, s in ((0.19, 0.160), (0.28, 0.219), (1.61, 0.617), (2.90, 0.744), (5.42, 0.844)):
        assert flow_to_edm(s) == pytest.approx(sigma, rel=0.01)
    assert flow_to_edm(1.0) == math.inf
    assert flow_to_edm(0.0) == 0.0


def test_between_entries_log_sigma_is_linear():
    abar = torch.tensor([0.8, 0.5, 0.1, 0.0])
    table = [0.5, 1.0, 3.0, math.inf]
    for t, want in ((0, 0.5), (0.5, 0.5**0.5), (1, 1.0), (1.25, 3.0**0.25), (2, 3.0), (2.5, math.inf), (3, math.inf)):
        assert vp_sigma(abar, t) == pytest.approx(want)
    assert vp_sigma(abar, -1.0) == pytest.approx(table[0])
    assert vp_sigma(abar[:3], 9.5) == pytest.approx(table[2])


class Levelless(schedulers.IPNDMScheduler):
    """A user's solver whose lists nobody knows."""


def test_an_unknown_scheduler_is_refused_with_a_sentence():
    scheduler = Levelless()
    scheduler.set_timesteps(N)
    with pytest.raises(diffaccel.Unsupported, match="Levelless keeps no noise levels"):
        edm_sigma(scheduler, float(scheduler.timesteps[0]), 0)


def test_a_scheduler_without_noise_levels_runs_with_what_asks_for_none():
    """\"off\" like stock; a method that decides by noise refuses with the sentence."""
    pipe = tiny_pipeline("sd")
    pipe.scheduler = Levelless()
    want = run(pipe, "sd", steps=N)
    fast = diffaccel.wrap(pipe, "off")
    assert torch.equal(run(fast, "sd", steps=N), want)
    assert (fast.report.steps, fast.report.completed) == (N, True)
    assert all(math.isnan(e.sigma) for e in fast.report.trace)
    for method in (diffaccel.GuidanceInterval(low=0.5), diffaccel.SkipCache(min_evaluations=1)):
        with pytest.raises(diffaccel.Unsupported, match="Levelless keeps no noise levels"):
            run(diffaccel.wrap(pipe, method), "sd", steps=N)


def test_levels_of_ipndm():
    """x = alpha x0 + beta eps with alpha^2 + beta^2 = 1, from no signal at all downwards."""
    pipe = tiny_pipeline("sd")
    pipe.scheduler = schedulers.IPNDMScheduler()
    fast = diffaccel.wrap(pipe, "off")
    assert torch.equal(run(fast, "sd", steps=N), run(pipe, "sd", steps=N))
    angles = [math.asin(math.sin((1 - i / N) * math.pi / 2) ** 2) for i in range(N)]
    assert [e.sigma for e in fast.report.trace] == pytest.approx([math.inf, *map(math.tan, angles[1:])], rel=1e-4)
    cached = diffaccel.wrap(pipe, diffaccel.SkipCache(interval=2, min_evaluations=1))
    run(cached, "sd", steps=N)
    assert cached.report.methods["skip_cache"]["cached"] > 0


def test_the_table_of_families_matches_diffusers():
    """Every scheduler named above exists under that name in the supported diffusers."""
    module = importlib.import_module("diffusers.schedulers")
    assert all(hasattr(module, cls) for cls, *_ in FAMILIES.values())

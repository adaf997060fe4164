"""Step reuse against sampling loops written out by hand, image by image; what must be computed is."""

from __future__ import annotations

import pytest
import tiny
import tiny_transformers
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

import diffaccel
from diffaccel import AdaptiveGuidance, GuidanceInterval, StepReuse, Unsupported
from diffaccel.engine.noise import adds_noise
from diffaccel.methods.steps.step_reuse import _Reuse, _Track, mean_move, moves_evenly

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALWAYS = 1e9  # a threshold that every image meets


def pipeline(kind):
    """A tiny pipeline; those whose stock scheduler draws noise get one that does not."""
    if kind in tiny.KINDS:
        return tiny.tiny_pipeline(kind)
    ddim = DDIMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    return tiny_transformers.tiny_pipeline(kind, ddim if kind.startswith("hunyuan") else None)


def picture(pipe, kind, **changes):
    torch.manual_seed(0)  # some ControlNet pipelines draw from the global generator
    if kind in tiny.KINDS:
        return tiny.run(pipe, kind, **changes)
    return tiny_transformers.run(pipe, kind, **changes)


def computed(report):
    """Evaluations in which at least one image was computed."""
    return sorted({e.evaluation for e in report.trace if e.network == "denoiser" and e.rows})


def denoiser_rows(report):
    return [e.rows for e in report.trace if e.network == "denoiser"]


# --- identity ---


@pytest.mark.parametrize(
    "kind",
    ["sd", "sd-inpaint", "multi-controlnet", "sdxl", "sd3", "flux-cfg", "z-image", "dit", "wan-2.2", "cogvideox"],
)
def test_off_and_never_reused_are_bit_identical(kind):
    pipe = pipeline(kind)
    stock = picture(pipe, kind, steps=6)
    off = diffaccel.wrap(pipe, StepReuse(threshold=0))
    never = diffaccel.wrap(pipe, StepReuse(threshold=1e-30, min_evaluations=1))
    assert torch.equal(picture(off, kind, steps=6), stock)
    assert torch.equal(picture(never, kind, steps=6), stock)
    assert off.report.methods == {}
    assert never.report.methods["step_reuse"]["reused"] == 0
    assert torch.equal(picture(pipe, kind, steps=6), stock)


# --- the rule ---


def test_the_rule_on_numbers():
    moves = [torch.tensor(values) for values in ([1.0, 1.0, 2.0], [1.1, 1.0, 1.0], [1.2, 1.0, 2.0])]
    assert moves_evenly(moves, 0.01).tolist() == [True, True, False]
    assert moves_evenly([torch.tensor([float("nan")])] * 3, 0.5).tolist() == [False]
    assert mean_move(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), torch.zeros(2, 2)).tolist() == [2.0, 0.0]


def test_the_path_starts_again_where_noise_does_not_fall():
    """PNDM visits a timestep twice, and its Runge-Kutta stages are no steps of the path."""
    track = _Track()
    for sigma, moves in ((float("inf"), 0), (5.0, 1), (4.0, 2), (4.0, 0), (3.0, 1), (2.0, 2), (1.0, 3), (0.5, 3)):
        track.add(torch.rand(1, 4), sigma)
        assert len(track.moves) == moves
    track.add(torch.rand(1, 5), 0.1)
    assert track.moves == []


def even(path, threshold):
    """The rule on a list of latents, in float64."""
    if len(path) < 4:
        return False
    d = [(path[k].double() - path[k - 1].double()).abs().mean().item() for k in (-3, -2, -1)]
    return abs((d[2] + d[0]) / 2 - d[1]) <= threshold * d[1]


@torch.no_grad()
def by_hand(scheduler, predict, latents, config, steps):
    """One image: returns its latents and the solver steps that were computed. `predict(x, t)` is (uncond, cond)."""
    scheduler.set_timesteps(steps)
    x = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    path, skips, stored, number, done = [], 0, None, -1, []
    for evaluation, t in enumerate(scheduler.timesteps):
        if getattr(scheduler, "state_in_first_order", True) or number < 0:
            number += 1
            path.append(x.clone())
            last = evaluation + scheduler.order - 1 >= len(scheduler.timesteps) - 1
            reuse = number >= 4 and not last and even(path, config.threshold) and skips < config.max_skips
            skips = skips + 1 if reuse else 0
            done += [] if reuse else [number]
        if not reuse:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            stored = predict(scaled, t)
        uncond, cond = stored
        x = scheduler.step(uncond + 5.0 * (cond - uncond), t, x).prev_sample
    return x, done


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "dpm++": lambda: DPMSolverMultistepScheduler(**BETAS),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_three_images_equal_three_loops_by_hand(name):
    """Decisions differ from image to image; latents are unscaled ones, and two-stage solvers decide once per step."""
    kind = "sd3" if name == "flow" else "sd"
    threshold = {"ddim": 0.0045, "euler": 0.1, "heun": 0.09, "dpm++": 0.018, "flow": 0.03}[name]
    pipe, config = pipeline(kind), StepReuse(threshold=threshold, max_skips=2)
    pipe.scheduler = SCHEDULERS[name]()
    inputs = tiny_transformers.tiny_inputs(kind, batch=3) if kind == "sd3" else tiny.tiny_inputs(kind, images=3)
    size = (3, 4, 8, 8) if kind == "sd3" else (3, 4, 16, 16)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(3))
    inputs |= {"latents": latents, "num_inference_steps": 16, "guidance_scale": 5.0, "output_type": "latent"}
    fast = diffaccel.wrap(pipe, config)
    got = fast(**inputs).images

    def predict(x, t, k):
        text = torch.cat([inputs["negative_prompt_embeds"][k : k + 1], inputs["prompt_embeds"][k : k + 1]])
        both = torch.cat([x, x])
        if kind == "sd":
            return pipe.unet(both, t, text).sample.chunk(2)
        names = ("negative_pooled_prompt_embeds", "pooled_prompt_embeds")
        pooled = torch.cat([inputs[name][k : k + 1] for name in names])
        return pipe.transformer(both, text, pooled, t.expand(2)).sample.chunk(2)

    decisions = []
    for k in range(3):
        want, done = by_hand(SCHEDULERS[name](), lambda x, t, k=k: predict(x, t, k), latents[k : k + 1], config, 16)
        assert (got[k] - want[0]).abs().max() <= 1e-4 * want.abs().max()
        decisions.append(done)
    assert len({tuple(done) for done in decisions}) > 1
    assert any(len(done) < 16 for done in decisions)
    counts = fast.report.methods["step_reuse"]
    if name != "heun":
        assert counts["computed"] == sum(len(done) for done in decisions)
        assert sum(denoiser_rows(fast.report)) == 2 * counts["computed"]


# one of each way to call a network, with and without networks beside it
CALLED_DIFFERENTLY = """sd-inpaint controlnet controlnet-guess t2i-adapter sdxl sd3-controlnet flux-controlnet pixart-alpha
hunyuan-controlnet lumina2 auraflow sana dit qwen-image z-image wan""".split()


@pytest.mark.parametrize(
    "kind",
    CALLED_DIFFERENTLY,
)
def test_a_picture_does_not_depend_on_its_batch_mates(kind):
    """Every second step, beside a mate that is always computed: only the rows of one image run."""
    pipe = pipeline(kind)
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, max_skips=1))
    two = {"images": 2} if kind in tiny.KINDS else {"batch": 2}
    stock = picture(pipe, kind, steps=10, **two)
    real = moves_for(_Reuse, lambda even: [even[0], False])
    try:
        mixed = picture(fast, kind, steps=10, **two)
    finally:
        _Reuse._choose = real
    rows = denoiser_rows(fast.report)
    assert min(rows) == max(rows) // 2
    alone = picture(fast, kind, steps=10, **two)  # both reuse on the same steps
    assert min(denoiser_rows(fast.report)) == 0
    scale = stock.abs().max()
    assert (mixed[0] - alone[0]).abs().max() <= 1e-3 * scale
    assert (mixed[1] - stock[1]).abs().max() <= 1e-3 * scale
    assert (mixed[0] - stock[0]).abs().max() > 1e-3 * scale or kind == "dit"


def moves_for(cls, change):
    """Change the decisions of `cls._choose`; returns the original."""
    real = cls._choose

    def choose(self, sample):
        real(self, sample)
        self.reuse = change(self.reuse)
        self.skips = [skips if reuse else 0 for skips, reuse in zip(self.skips, self.reuse, strict=True)]

    cls._choose = choose
    return real


# --- schedule ---


def test_caps_ends_and_short_runs():
    pipe = pipeline("sd3")
    cases = [
        (StepReuse(threshold=ALWAYS, max_skips=2), [0, 1, 2, 3, 6, 9, 12, 13]),
        (StepReuse(threshold=ALWAYS, max_skips=50, full_first=6, full_last=3), [0, 1, 2, 3, 4, 5, 11, 12, 13]),
        (StepReuse(threshold=ALWAYS, max_skips=50, full_first=3, full_last=0), [0, 1, 2]),
    ]
    for method, want in cases:
        fast = diffaccel.wrap(pipe, method)
        picture(fast, "sd3", steps=14)
        assert computed(fast.report) == want
        assert fast.report.flops_ratio == pytest.approx(14 / len(want))
        assert fast.report.methods["step_reuse"] == {"computed": len(want), "reused": 14 - len(want)}
    with pytest.warns(UserWarning, match="step_reuse: 8 evaluations are too few"):
        short = picture(fast, "sd3", steps=8)
    assert torch.equal(short, picture(pipe, "sd3", steps=8))


def test_two_stage_solvers_reuse_whole_steps():
    pipe = pipeline("sd")
    pipe.scheduler = HeunDiscreteScheduler(**BETAS)
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, max_skips=1))
    picture(fast, "sd", steps=8)
    assert computed(fast.report) == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 14]


def test_pndm_waits_for_its_path():
    pipe = pipeline("sd")
    pipe.scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True)
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, max_skips=1))
    picture(fast, "sd", steps=10)
    assert computed(fast.report) == [0, 1, 2, 3, 4, 6, 8, 10]


# --- guidance ---


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux-cfg"])
def test_everything_runs_when_guidance_returns(kind):
    """Its end changes nothing: the conditional predictions stay in use."""
    recipe = [StepReuse(threshold=ALWAYS, max_skips=3), GuidanceInterval(start_fraction=0.4, stop_fraction=0.7)]
    fast = diffaccel.wrap(pipeline(kind), recipe)
    picture(fast, kind, steps=15)
    assert computed(fast.report) == [0, 1, 2, 3, 6, 10, 14]
    rows = {e.evaluation: 0 for e in fast.report.trace}
    for e in fast.report.trace:
        rows[e.evaluation] += e.rows
    assert [rows[i] for i in computed(fast.report)] == [1, 1, 1, 1, 2, 2, 1]
    assert fast.report.methods["step_reuse"]["forced by guidance"] == 1


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg"])
def test_the_end_of_adaptive_guidance_forces_nothing(kind):
    recipe = [StepReuse(threshold=ALWAYS, max_skips=3), AdaptiveGuidance(threshold=0.5)]
    fast = diffaccel.wrap(pipeline(kind), recipe)
    picture(fast, kind, steps=15)
    assert computed(fast.report) == [0, 1, 2, 3, 7, 11, 14]
    assert denoiser_rows(fast.report)[-1] == 0 or kind == "sd3"
    assert not any("forced" in name for name in fast.report.methods["step_reuse"])


# --- changes ---


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg"])
def test_new_prompts_are_computed_at_once(kind):
    fast = diffaccel.wrap(pipeline(kind), StepReuse(threshold=ALWAYS, max_skips=50))

    def swap(pipe, step, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if step == 6 else {}

    changes = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    picture(fast, kind, steps=12, **changes)
    assert computed(fast.report) == [0, 1, 2, 3, 7, 11]
    assert fast.report.methods["step_reuse"]["forced by inputs"] == 1


def test_a_lora_scale_that_changes_is_computed_at_once():
    peft = pytest.importorskip("peft")
    pipe = pipeline("sd3")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, max_skips=50))

    def rescale(pipe, step, t, tensors):
        if step == 5:
            pipe.transformer.set_adapters(["default"], [0.3])
        return {}

    picture(fast, "sd3", steps=12, callback_on_step_end=rescale)
    assert computed(fast.report) == [0, 1, 2, 3, 6, 11]
    assert fast.report.methods["step_reuse"]["forced by adapters"] == 1


def test_the_second_transformer_of_wan_is_computed_at_once():
    pipe = pipeline("wan-2.2")
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    picture(pipe, "wan-2.2", steps=14)
    takeover = len(calls) // 2
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, max_skips=50))
    picture(fast, "wan-2.2", steps=14)
    assert takeover > 4
    assert computed(fast.report) == [0, 1, 2, 3, takeover, 13]


def test_skip_layer_guidance_is_computed_when_it_is_new():
    """SD3's third call begins in the middle of a run: its first prediction cannot be a stored one."""
    changes = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.4, "skip_layer_guidance_stop": 0.7}
    fast = diffaccel.wrap(pipeline("sd3"), StepReuse(threshold=ALWAYS, max_skips=50))
    picture(fast, "sd3", steps=15, **changes)
    third = [e for e in fast.report.trace if e.stock_rows == 1]
    assert third[0].rows == 1
    assert sum(e.rows for e in third) < len(third)


# --- ControlNets ---


@pytest.mark.parametrize(
    "kind", ["controlnet", "multi-controlnet", "sd3-controlnet", "flux-controlnet", "hunyuan-controlnet"]
)
def test_controlnets_rest_with_the_network(kind):
    """They run for the images that are computed, and the pictures are those of ControlNets that always run."""
    pipe = pipeline(kind)
    nets = [net for net, _ in diffaccel.models.model_map.describe(pipe).controlnets]
    ran = []
    for net in nets:
        first = next(m for m in net.modules() if isinstance(m, torch.nn.Linear))
        first.register_forward_hook(lambda *_: ran.append(1))
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, max_skips=1))
    picture(pipe, kind, steps=10)
    stock_calls, ran[:] = len(ran), []
    got = picture(fast, kind, steps=10)
    assert len(ran) / stock_calls == len(computed(fast.report)) / 10
    real, _Reuse.around_controlnet = _Reuse.around_controlnet, lambda self, call, proceed: proceed(call)
    try:
        assert torch.equal(picture(fast, kind, steps=10), got)
    finally:
        _Reuse.around_controlnet = real


# --- samplers that draw noise ---


def test_schedulers_that_add_noise():
    noisy = [
        DDPMScheduler(),
        LCMScheduler(),
        TCDScheduler(),
        EulerAncestralDiscreteScheduler(),
        CogVideoXDPMScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ]
    calm = [make() for make in SCHEDULERS.values()] + [PNDMScheduler(), UniPCMultistepScheduler()]
    assert all(adds_noise(scheduler) for scheduler in noisy)
    assert not any(adds_noise(scheduler) for scheduler in calm)
    assert adds_noise(DDIMScheduler(), eta=0.5)
    assert not adds_noise(UniPCMultistepScheduler(), eta=0.5)  # it takes no eta


def test_noise_is_refused_unless_allowed():
    pipe = pipeline("sd")
    with pytest.raises(
        Unsupported, match=r"step_reuse: with eta=0.5 DDIMScheduler adds noise on every step.*; leave out eta"
    ):
        diffaccel.wrap(pipe, StepReuse())(**tiny.tiny_inputs("sd"), eta=0.5)
    pipe.scheduler = EulerAncestralDiscreteScheduler(**BETAS)
    with pytest.raises(Unsupported, match="EulerAncestralDiscreteScheduler adds noise on every step"):
        diffaccel.wrap(pipe, StepReuse())
    off = diffaccel.wrap(pipe, StepReuse(threshold=0))
    assert torch.equal(picture(off, "sd", steps=4), picture(pipe, "sd", steps=4))
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, allow_stochastic=True))
    picture(fast, "sd", steps=12)
    assert fast.report.methods["step_reuse"]["reused"] > 0


# --- life ---


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux-cfg"])
def test_second_run_abort_and_restore(kind):
    pipe = pipeline(kind)
    size = {"size": (48, 32)} if kind in tiny.KINDS else {"size": (6, 10)}
    fast = diffaccel.wrap(pipe, StepReuse(threshold=ALWAYS, max_skips=2))
    stock = picture(pipe, kind, steps=10, **size)
    got = picture(fast, kind, steps=10, **size)
    assert not torch.equal(got, stock)
    network = diffaccel.models.model_map.describe(pipe).denoiser
    left = [7]

    def stop(module, args, kwargs):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    handle = network.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        picture(fast, kind, steps=10, **size)
    handle.remove()
    assert "scale_model_input" not in vars(pipe.scheduler)
    assert torch.equal(picture(pipe, kind, steps=10, **size), stock)
    assert torch.equal(picture(fast, kind, steps=10, **size), got)

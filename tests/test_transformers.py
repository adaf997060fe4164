"""The shared battery for diffusion transformers: every pipeline kind, with and without the guidance methods."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_transformers import (
    BETAS,
    KINDS,
    NO_INTERRUPT,
    SEPARATE,
    SQUARE_ONLY,
    UNGUIDED,
    guided,
    run,
    tiny_pipeline,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffaccel
from diffaccel import (
    AdaptiveGuidance,
    Forecast,
    GuidanceInterval,
    ResidualCache,
    SkipCache,
    StepReuse,
    TokenDownsampling,
    Unsupported,
)

STEPS = 6
GUIDED = tuple(kind for kind in KINDS if guided(kind))
COND_FIRST = ("lumina-next", "dit", "z-image")
NEGATED = ("lumina-next", "lumina2", "z-image")  # pipelines that turn the sign of the prediction
MIDDLE = GuidanceInterval(start_fraction=0.3, stop_fraction=0.7)

# A part of each network that works once per evaluation, on one row per batch row.
ENTRANCES = {
    "SD3Transformer2DModel": "pos_embed.proj",
    "FluxTransformer2DModel": "x_embedder",
    "Flux2Transformer2DModel": "x_embedder",
    "PixArtTransformer2DModel": "pos_embed.proj",
    "HunyuanDiT2DModel": "pos_embed.proj",
    "LuminaNextDiT2DModel": "patch_embedder",
    "Lumina2Transformer2DModel": "x_embedder",
    "AuraFlowTransformer2DModel": "pos_embed.proj",
    "SanaTransformer2DModel": "patch_embed.proj",
    "DiTTransformer2DModel": "pos_embed.proj",
    "QwenImageTransformer2DModel": "img_in",
    "ZImageTransformer2DModel": "t_embedder",
    "CogView4Transformer2DModel": "patch_embed.proj",
    "WanTransformer3DModel": "patch_embedding",
    "CogVideoXTransformer3DModel": "patch_embed.text_proj",
}


@pytest.fixture(scope="module", params=KINDS)
def cell(request):
    """A pipeline of one kind and its stock latents."""
    pipe = tiny_pipeline(request.param)
    return pipe, request.param, run(pipe, request.param, steps=STEPS)


@pytest.fixture(scope="module", params=GUIDED)
def guided_cell(request):
    """The same for kinds with two guidance branches."""
    pipe = tiny_pipeline(request.param)
    return pipe, request.param, run(pipe, request.param, steps=STEPS)


# --- instruments that owe nothing to the engine ---


def denoisers(pipe):
    return [net for net in (pipe.transformer, getattr(pipe, "transformer_2", None)) if net is not None]


def networks(pipe):
    control = getattr(pipe, "controlnet", None)
    return denoisers(pipe) + ([] if control is None else [control])


@contextmanager
def counted_rows(pipe):
    """Rows of every evaluation of a denoiser that really happens inside."""
    rows: list[int] = []
    handles = [
        net.get_submodule(ENTRANCES[type(net).__name__]).register_forward_hook(
            lambda m, a, out: rows.append(len(out[0] if isinstance(out, tuple) else out))
        )
        for net in denoisers(pipe)
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def network_flops(pipe, call):
    """FLOPs that denoisers and ControlNets execute during `call()`, by torch's counter on plain matrix products."""
    total, counters, handles = [0], [], []

    def begin(module, args):
        counters.append(FlopCounterMode(display=False))
        counters[-1].__enter__()

    def end(module, args, output):
        counter = counters.pop()
        counter.__exit__(None, None, None)
        total[0] += counter.get_total_flops()

    for net in networks(pipe):
        handles += [net.register_forward_pre_hook(begin), net.register_forward_hook(end)]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return total[0]


@contextmanager
def by_hand(pipe, kind, replace):
    """Both branches always run; `replace(i, x, cond, uncond)` gives the unconditional prediction of evaluation i."""
    calls, kept = [0], [None]

    def wrap(net):
        original = net.forward
        names = inspect.signature(type(net).forward)

        def forward(*args, **kwargs):
            x = next(value for name, value in names.bind(net, *args, **kwargs).arguments.items() if name != "self")
            out = original(*args, **kwargs)
            prediction = out[0]
            rows = torch.stack(list(prediction)) if isinstance(prediction, list) else prediction
            x = torch.stack(list(x)) if isinstance(x, list) else x
            number, calls[0] = calls[0], calls[0] + 1
            if kind in SEPARATE:
                if number % 2 == 0:
                    kept[0] = rows
                    return out
                new = replace(number // 2, x, kept[0], rows)
            else:
                halves, half = rows.chunk(2), x.chunk(2)[0]
                cond, uncond = halves if kind in COND_FIRST else halves[::-1]
                changed = replace(number, half, cond, uncond)
                new = torch.cat([cond, changed] if kind in COND_FIRST else [changed, cond])
            new = list(new) if isinstance(prediction, list) else new
            return (new, *out[1:]) if isinstance(out, tuple) else type(out)(sample=new)

        net.forward = forward

    for net in denoisers(pipe):
        wrap(net)
    try:
        yield
    finally:
        for net in denoisers(pipe):
            del net.forward


def noise_level(scheduler, i):
    """(signal, noise) weights of evaluation i, from the scheduler's own lists."""
    i += getattr(scheduler, "begin_index", None) or 0
    if "Flow" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        s = float(scheduler.sigmas[i])
        return 1 - s, s
    abar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])
    return math.sqrt(abar), math.sqrt(1 - abar)


def clean(kind, scheduler, i, x, prediction):
    """The clean picture that a prediction implies."""
    signal, noise = noise_level(scheduler, i)
    y = -prediction if kind in NEGATED else prediction
    channel = 2 if kind == "cogvideox" else 1
    if y.shape != x.shape:  # learned variances
        y = y.narrow(channel, 0, x.shape[channel])
    if "Flow" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        return x - noise * y
    return signal * x - noise * y if scheduler.config.prediction_type == "v_prediction" else (x - noise * y) / signal


def apart(a, b):
    """Largest difference in units of the larger picture."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def close(a, b):
    """Equal but for the rounding of other batch sizes, which a run amplifies."""
    assert torch.isfinite(a).all()
    return apart(a, b) < 2e-4


PLAIN_FLOPS: dict[str, int] = {}


def plain_flops(pipe, kind):
    """FLOPs of the stock networks in a run of STEPS steps; counted once, because counting is slow."""
    if kind not in PLAIN_FLOPS:
        PLAIN_FLOPS[kind] = network_flops(pipe, lambda: run(pipe, kind, steps=STEPS))
    return PLAIN_FLOPS[kind]


def attributes(pipe):
    """What hangs on the pipeline's objects: attribute names everywhere, and who answers forward and step."""
    things = [pipe, pipe.scheduler, *(module for net in networks(pipe) for module in net.modules())]
    if getattr(pipe, "vae", None) is not None:
        things.append(pipe.vae)
    return [(set(vars(thing)), vars(thing).get("forward"), vars(thing).get("step")) for thing in things]


# --- the plain call ---


def test_the_empty_recipe_changes_nothing_and_counts_the_truth(cell):
    pipe, kind, stock = cell
    before = attributes(pipe)
    fast = diffaccel.wrap(pipe, [])
    with counted_rows(pipe) as rows:
        assert torch.equal(run(fast, kind, steps=STEPS), stock)
    report = fast.report
    assert report.completed
    assert not report.notes
    assert report.evaluations == len(rows)
    assert [e.rows for e in report.trace if e.network == "denoiser"] == rows
    assert report.rows == sum(rows)
    assert report.flops == report.flops_plain == plain_flops(pipe, kind)
    assert attributes(pipe) == before


# --- guidance ---


def test_never_guided_is_the_stock_pipeline_without_guidance(guided_cell):
    """Same latents, same rows and the same FLOPs as with guidance scale 1: the other branch really does not run."""
    pipe, kind, stock = guided_cell
    with counted_rows(pipe) as want_rows:
        want = run(pipe, kind, steps=STEPS, guidance=1.0)
    fast = diffaccel.wrap(pipe, GuidanceInterval(start_fraction=1.0))
    with counted_rows(pipe) as rows:
        got = run(fast, kind, steps=STEPS)
    assert close(got, want)
    assert apart(got, stock) > 1e-3
    assert rows == want_rows
    assert fast.report.evaluations == len(rows)
    assert fast.report.rows == sum(rows)
    assert fast.report.flops == network_flops(pipe, lambda: run(pipe, kind, steps=STEPS, guidance=1.0))
    # Lumina 2 cuts padding off inside the network: a shorter negative prompt that never ran is taken for as long
    exact = 1e-9 if kind != "lumina2" else 0.03
    assert fast.report.flops_plain == pytest.approx(plain_flops(pipe, kind), rel=exact)
    assert not fast.report.notes


def expected_rows(kind, batch, on):
    if kind in SEPARATE:
        return [batch for guided in on for _ in range(2 if guided else 1)]
    return [2 * batch if guided else batch for guided in on]


def test_interval_equals_both_branches_by_hand(guided_cell):
    """Off, on and off again, on a grid that is no square, two images at once."""
    pipe, kind, _ = guided_cell
    shape = {"batch": 2, "steps": STEPS} | ({} if kind in SQUARE_ONLY else {"size": (8, 12)})
    stock = run(pipe, kind, **shape)
    evaluations = 5 if kind.endswith(("img2img", "inpaint")) else STEPS
    on = [0.3 <= i / evaluations < 0.7 for i in range(evaluations)]
    with by_hand(pipe, kind, lambda i, x, cond, uncond: uncond if on[i] else cond):
        want = run(pipe, kind, **shape)
    fast = diffaccel.wrap(pipe, MIDDLE)
    with counted_rows(pipe) as rows:
        got = run(fast, kind, **shape)
    report = fast.report
    assert close(got, want)
    assert apart(got, stock) > 1e-4
    assert rows == expected_rows(kind, 2, on)
    assert report.evaluations == len(rows)
    assert report.rows == sum(rows)
    assert report.methods["guidance_interval"] == {"guided": sum(on), "unguided": len(on) - sum(on)}
    assert torch.equal(got, run(fast, kind, **shape))
    assert report.flops == network_flops(pipe, lambda: run(fast, kind, **shape)) < report.flops_plain


def test_adaptive_guidance_equals_both_branches_by_hand(guided_cell):
    """One image; the threshold is taken from the stock run so that guidance ends in the middle."""
    pipe, kind, stock = guided_cell
    scheduler, cosines = pipe.scheduler, []

    def measure(i, x, cond, uncond):
        pair = [clean(kind, scheduler, i, x, branch).flatten() for branch in (cond, uncond)]
        cosines.append(float(torch.nn.functional.cosine_similarity(*pair, dim=0)))
        return uncond

    with by_hand(pipe, kind, measure):
        assert torch.equal(run(pipe, kind, steps=STEPS), stock)
    threshold = max(cosines[:3]) - 1e-5
    last = next(i for i, cosine in enumerate(cosines) if cosine >= threshold)
    with by_hand(pipe, kind, lambda i, x, cond, uncond: uncond if i <= last else cond):
        want = run(pipe, kind, steps=STEPS)
    fast = diffaccel.wrap(pipe, AdaptiveGuidance(threshold=threshold))
    with counted_rows(pipe) as rows:
        got = run(fast, kind, steps=STEPS)
    on = [i <= last for i in range(len(cosines))]
    assert rows == expected_rows(kind, 1, on)
    assert fast.report.rows == sum(rows)
    assert close(got, want)
    assert apart(got, stock) > 1e-4
    assert torch.equal(got, run(fast, kind, steps=STEPS))
    assert fast.report.flops < fast.report.flops_plain


@pytest.mark.parametrize("kind", UNGUIDED)
def test_without_a_second_branch_there_is_nothing_to_drop(kind):
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, [MIDDLE, AdaptiveGuidance()])
    assert torch.equal(run(fast, kind, steps=STEPS), run(pipe, kind, steps=STEPS))
    assert set(fast.report.notes) == {
        f"{name}: this call runs without classifier-free guidance, there is nothing to drop."
        for name in ("guidance_interval", "adaptive_guidance")
    }


@pytest.mark.parametrize("kind", GUIDED)
def test_an_image_does_not_depend_on_its_batch(kind):
    """Neither do three images in their own runs; their guidance ends at different steps."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, [GuidanceInterval(start_fraction=0.2), AdaptiveGuidance(threshold=0.95)])
    batch = run(fast, kind, batch=3, steps=STEPS)
    assert fast.report.rows < plain_rows(kind, 3)
    for k in range(3):
        assert close(batch[k : k + 1], run(fast, kind, first=k, steps=STEPS))
    assert apart(batch[:1], batch[2:]) > 1e-2


def plain_rows(kind, batch):
    """Rows of a plain run."""
    return (5 if kind.endswith(("img2img", "inpaint")) else STEPS) * 2 * batch


# --- runs that do not end well, and pipelines side by side ---


class Stop(BaseException):
    """Like Ctrl-C: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Stop])
def test_everything_is_put_back_after_an_error_in_the_middle(cell, error):
    pipe, kind, stock = cell
    before = attributes(pipe)
    fast = diffaccel.wrap(pipe, [MIDDLE, AdaptiveGuidance()])
    want, calls = run(fast, kind, steps=STEPS), [0]

    def fail(module, args, output):
        calls[0] += 1
        if calls[0] == 4:
            raise error("in the middle")

    handles = [net.get_submodule(ENTRANCES[type(net).__name__]).register_forward_hook(fail) for net in denoisers(pipe)]
    try:
        with pytest.raises(error, match="in the middle"):
            run(fast, kind, steps=STEPS)
    finally:
        for handle in handles:
            handle.remove()
    assert not fast.report.completed
    assert attributes(pipe) == before
    assert torch.equal(run(pipe, kind, steps=STEPS), stock)
    assert torch.equal(run(fast, kind, steps=STEPS), want)


def test_an_interrupt_from_a_callback(cell):
    """Equal to the stock pipeline interrupted at the same place, and nothing is left behind."""
    pipe, kind, stock = cell
    if kind in NO_INTERRUPT:
        assert not hasattr(type(pipe), "interrupt")
        return
    before = attributes(pipe)

    def stop(pipeline, i, t, kwargs):
        pipeline._interrupt = i >= 2
        return kwargs

    fast = diffaccel.wrap(pipe, [])
    with counted_rows(pipe) as rows:
        got = run(fast, kind, steps=STEPS, callback_on_step_end=stop)
    assert torch.equal(got, run(pipe, kind, steps=STEPS, callback_on_step_end=stop))
    assert fast.report.steps == 3
    assert not fast.report.completed
    assert fast.report.rows == sum(rows)
    assert attributes(pipe) == before
    assert torch.equal(run(fast, kind, steps=STEPS), stock)


def test_two_wrapped_pipelines_share_a_transformer(cell):
    pipe, kind, stock = cell
    twin = type(pipe)(**pipe.components, **({"boundary_ratio": 0.7} if kind == "wan-2.2" else {}))
    twin.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    twin.set_progress_bar_config(disable=True)
    one, two = diffaccel.wrap(pipe, []), diffaccel.wrap(twin, MIDDLE)
    want = run(two, kind, steps=STEPS)
    for _ in range(2):
        assert torch.equal(run(one, kind, steps=STEPS), stock)
        assert torch.equal(run(two, kind, steps=STEPS), want)


# --- schedulers ---

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
SCHEDULERS = {
    ("sd3", "heun"): lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    ("sd3", "dpm++"): lambda: DPMSolverMultistepScheduler(**FLOW),
    ("sd3-img2img", "heun"): lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    ("sana", "unipc"): lambda: UniPCMultistepScheduler(**FLOW),
    ("sana", "euler"): lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    ("wan", "euler"): lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    ("wan", "dpm++"): lambda: DPMSolverMultistepScheduler(**FLOW),
    ("pixart-alpha", "ddim"): lambda: DDIMScheduler(**BETAS, clip_sample=False),
    ("pixart-sigma", "karras"): lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    ("pixart-sigma", "euler"): lambda: EulerDiscreteScheduler(**BETAS),
    ("pixart-sigma", "unipc"): lambda: UniPCMultistepScheduler(**BETAS),
    ("dit", "ddim"): lambda: DDIMScheduler(**BETAS, clip_sample=False),
    ("dit", "unipc"): lambda: UniPCMultistepScheduler(**BETAS),
    ("hunyuan", "ddim"): lambda: DDIMScheduler(**BETAS, **V, clip_sample=False),
    ("hunyuan", "dpm++"): lambda: DPMSolverMultistepScheduler(**BETAS, **V),
}


def edm(scheduler, i):
    """EDM sigma of evaluation i, read off the scheduler's lists by hand."""
    i += getattr(scheduler, "begin_index", None) or 0
    if "Flow" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        s = float(scheduler.sigmas[i])
        return s / (1 - s) if s < 1 else math.inf
    t = float(scheduler.timesteps[i])
    low, weight = int(t), t - int(t)
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    return float(table[low] ** (1 - weight) * table[min(low + 1, len(table) - 1)] ** weight)


@pytest.mark.parametrize(("kind", "name"), SCHEDULERS, ids="-".join)
def test_interval_in_sigma_with_other_schedulers(kind, name):
    """Bounds in EDM sigma mean the same on every scheduler; both evaluations of a Heun step get one decision."""
    pipe = tiny_pipeline(kind, SCHEDULERS[kind, name]())
    stock = run(pipe, kind, steps=8)
    assert torch.equal(run(diffaccel.wrap(pipe, []), kind, steps=8), stock)
    fast = diffaccel.wrap(pipe, GuidanceInterval(high=8.0, low=0.6))
    with counted_rows(pipe) as rows:
        got = run(fast, kind, steps=8)
    order = getattr(pipe.scheduler, "order", 1)
    evaluations = len(pipe.scheduler.timesteps) - (getattr(pipe.scheduler, "begin_index", None) or 0)
    on = [0.6 < edm(pipe.scheduler, order * (i // order)) <= 8.0 for i in range(evaluations)]
    assert 0 < sum(on) < len(on)
    assert not on[-1]
    with by_hand(pipe, kind, lambda i, x, cond, uncond: uncond if on[i] else cond):
        want = run(pipe, kind, steps=8)
    assert rows == expected_rows(kind, 1, on)
    assert close(got, want)
    assert apart(got, stock) > 1e-3


# --- caches, one pipeline per way of calling; their own tests say more ---

SPARSE = {
    "residual_cache": [ResidualCache(interval=3, min_evaluations=1)],
    "forecast": [Forecast(interval=3, min_evaluations=1)],
    "step_reuse": [StepReuse(threshold=5.0, min_evaluations=1, max_skips=2)],
    "residual_cache and interval": [ResidualCache(interval=3, min_evaluations=1), MIDDLE],
}


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg", "z-image", "dit", "lumina2", "wan-2.2"])
def test_caches_tell_the_truth(kind):
    """They save what they say, give the same latents twice, leave nothing behind, and know no batch mates."""
    pipe = tiny_pipeline(kind)
    stock = run(pipe, kind, steps=9)
    before = attributes(pipe)
    for name, methods in SPARSE.items():
        fast = diffaccel.wrap(pipe, methods)
        got = run(fast, kind, steps=9)
        with counted_rows(pipe) as rows:
            assert torch.equal(got, run(fast, kind, steps=9)), name
        assert fast.report.rows == sum(rows), name
        assert fast.report.flops < fast.report.flops_plain, name
        assert apart(got, stock) > 1e-4, name
        assert close(run(fast, kind, steps=9, batch=2)[:1], got), name
        assert attributes(pipe) == before


# --- what cannot work says so ---


@pytest.mark.parametrize("method", [TokenDownsampling()], ids=lambda method: method.name)
def test_methods_for_unets_refuse(cell, method):
    pipe, _, _ = cell
    name = type(pipe.transformer).__name__
    with pytest.raises(Unsupported, match=f"{method.name} works on UNets; {name} is a diffusion transformer."):
        diffaccel.wrap(pipe, method)


def test_skip_cache_needs_long_skips(cell):
    pipe, kind, _ = cell
    if kind.startswith("hunyuan"):
        assert diffaccel.wrap(pipe, SkipCache()).recipe.methods == (SkipCache(),)
        return
    with pytest.raises(Unsupported, match=r"skip_cache .*long skip"):
        diffaccel.wrap(pipe, SkipCache())

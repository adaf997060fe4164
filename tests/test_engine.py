"""Outside a call everything is stock, whatever happened inside; inside, the report says what hooks of our own count."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import json
import pickle
import random
import threading
from types import FunctionType, MethodType
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from independent import counted_rows, network_flops
from tiny import KINDS, run, tiny_inputs, tiny_pipeline, tiny_unet
from tiny_transformers import run as run_transformer
from tiny_transformers import tiny_pipeline as tiny_transformer

import diffaccel
from diffaccel import (
    AdaptiveGuidance,
    BlockCache,
    Forecast,
    GuidanceInterval,
    Recipe,
    RegionSampling,
    ResidualCache,
    SkipCache,
    StepReuse,
    StepSchedule,
    TokenDownsampling,
    TokenMerging,
    Unsupported,
)
from diffaccel.engine.seams import Seams

EVERYTHING = [
    StepSchedule(fraction=0.5, spacing="trailing"),
    GuidanceInterval(high=8.0, low=0.5),
    SkipCache(interval=3, depth=2, min_evaluations=1, full_last=0),
    TokenMerging(min_tokens=1, importance=True),
]
STEPS = 10  # half of them run


@pytest.fixture(scope="module")
def sd():
    return tiny_pipeline("sd")


@pytest.fixture(scope="module")
def fast(sd):
    wrapped = diffaccel.wrap(sd, EVERYTHING)
    run(wrapped, "sd", steps=STEPS)
    assert wrapped.report.steps == 5
    return wrapped


def snapshot(pipe):
    """Every instance attribute of every module by name and identity; keys and callables of scheduler and pipeline."""
    seen = {}
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for name, inner in module.named_modules():
                own = {key: id(value) for key, value in vars(inner).items()}
                hooks = {key: list(value) for key, value in vars(inner).items() if "hooks" in key and value}
                seen[f"{part}.{name}"] = (own, hooks, id(getattr(inner, "processor", None)))
    for part in (pipe, pipe.scheduler):
        patched = [key for key, value in vars(part).items() if isinstance(value, (FunctionType, MethodType))]
        seen[type(part).__name__] = (sorted(vars(part)), patched, dict(part.config))
    return seen


# --- outside a call ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_nothing_behind(kind):
    pipe = tiny_pipeline(kind)
    stock = run(pipe, kind)
    before = snapshot(pipe)
    wrapped = diffaccel.wrap(pipe, EVERYTHING)
    assert snapshot(pipe) == before
    changed = []

    def compare(*_):
        now = snapshot(pipe)
        changed.append({name for name in before if now[name] != before[name]})

    handle = pipe.unet.conv_in.register_forward_hook(compare)
    run(wrapped, kind)
    handle.remove()
    assert len(changed[0]) > 10  # the comparison sees what a run attaches
    assert type(pipe.scheduler).__name__ in changed[0]
    assert snapshot(pipe) == before
    assert torch.equal(run(pipe, kind), stock)


class Stop(Exception):
    pass


def failing_callback(step, error):
    def callback(pipe, index, t, tensors):
        if index == step:
            raise error
        return {}

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_in_a_callback_at_every_step(sd, fast, error):
    stock, quick, before = run(sd, "sd"), run(fast, "sd"), snapshot(sd)
    for step in range(5):
        with counted_rows(sd) as rows, pytest.raises(error):
            fast(**tiny_inputs("sd", steps=STEPS), **failing_callback(step, error()))
        assert snapshot(sd) == before
        assert not fast.report.completed
        assert fast.report.evaluations == len(rows) == step + 1
        assert fast.report.rows == sum(rows)
    assert torch.equal(run(sd, "sd"), stock)
    assert torch.equal(run(fast, "sd"), quick)
    assert fast.report.completed


def test_an_exception_inside_the_network_at_every_step(sd, fast):
    """From a module that runs on full and on cached evaluations, half-way through the forward."""
    quick, before = run(fast, "sd"), snapshot(sd)
    for step in range(5):
        calls = []

        def fail(*_, step=step, calls=calls):
            calls.append(1)
            if len(calls) == step + 1:
                raise Stop

        handle = sd.unet.up_blocks[-1].resnets[-1].register_forward_hook(fail)
        with pytest.raises(Stop):
            run(fast, "sd", steps=STEPS)
        handle.remove()
        assert snapshot(sd) == before
        assert not fast.report.completed
    assert torch.equal(run(fast, "sd"), quick)


def test_a_change_is_never_made_without_its_undo(monkeypatch):
    """Ctrl-C may come at any line of it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    seams, owner = Seams(), torch.nn.Linear(1, 1)
    monkeypatch.setattr(seams._undo, "callback", interrupt)
    with pytest.raises(KeyboardInterrupt):
        seams.replace(owner, "forward", print)
    assert "forward" not in vars(owner)


def test_an_error_in_the_arguments(sd, fast):
    before = snapshot(sd)
    with pytest.raises(ValueError, match="divisible by 8"):
        fast(**tiny_inputs("sd") | {"height": 33})
    with pytest.raises(TypeError):
        fast(*range(40))
    assert snapshot(sd) == before
    assert not fast.report.completed
    assert fast.report.evaluations == fast.report.flops == 0


def test_an_interrupt_from_a_callback(sd, fast):
    quick, before = run(fast, "sd"), snapshot(sd)

    def interrupt(pipe, index, t, tensors):
        pipe._interrupt = index == 2
        return {}

    for _ in range(2):
        fast(**tiny_inputs("sd", steps=STEPS), callback_on_step_end=interrupt)
        assert snapshot(sd) == before
        assert fast.report.evaluations == fast.report.steps == 3
        assert not fast.report.completed
        assert "did not finish" in str(fast.report)
    assert torch.equal(run(fast, "sd"), quick)
    assert fast.report.completed


def test_global_random_states_are_untouched(sd):
    recipes = [EVERYTHING, [AdaptiveGuidance(), TokenDownsampling()], [TokenMerging()]]
    states = (torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate())
    for recipe in recipes:
        run(diffaccel.wrap(sd, recipe), "sd", steps=4 if recipe is not EVERYTHING else STEPS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert pickle.dumps(np.random.get_state()) == states[1]
    assert random.getstate() == states[2]


def test_the_global_random_state_has_no_influence(fast):
    torch.manual_seed(1)
    first = run(fast, "sd", steps=STEPS)
    torch.manual_seed(2)
    assert torch.equal(first, run(fast, "sd", steps=STEPS))


def test_copies_and_pickles_of_a_used_pipeline(sd, fast):
    run(fast, "sd", steps=STEPS)
    stock = run(sd, "sd", steps=4)
    twin = copy.deepcopy(sd)
    assert torch.equal(run(twin, "sd", steps=4), stock)
    with torch.no_grad():  # the copy has weights of its own
        twin.unet.conv_out.weight.zero_()
    assert not torch.equal(run(twin, "sd", steps=4), stock)
    assert torch.equal(run(sd, "sd", steps=4), stock)
    back = pickle.loads(pickle.dumps(sd.unet))
    sample, text = torch.ones(1, 4, 16, 16), torch.ones(1, 5, 16)
    with torch.no_grad():
        assert torch.equal(back(sample, 1, text).sample, sd.unet(sample, 1, text).sample)


def test_copies_and_pickles_of_the_wrapper(fast):
    want = run(fast, "sd", steps=STEPS)
    for twin in (copy.deepcopy(fast), copy.copy(fast)):
        assert twin.recipe == fast.recipe
        assert torch.equal(run(twin, "sd", steps=STEPS), want)
    assert copy.deepcopy(fast).pipe is not fast.pipe
    assert copy.copy(fast).pipe is fast.pipe


# --- several wrappers ---


def test_two_wrappers_on_one_unet_alternate(sd):
    other = StableDiffusionPipeline(**sd.components, requires_safety_checker=False)
    other.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    other.set_progress_bar_config(disable=True)
    assert other.unet is sd.unet
    one = diffaccel.wrap(sd, [SkipCache(interval=4), GuidanceInterval(low=0.5)])
    two = diffaccel.wrap(other, [SkipCache(interval=3, depth=3, order=1), TokenMerging(min_tokens=1)])
    sizes = {"size": (32, 48)}
    want = run(one, "sd", steps=9), run(two, "sd", steps=9, images=2, **sizes), run(sd, "sd", steps=9)
    counts = one.report.methods, two.report.methods
    for _ in range(2):
        assert torch.equal(run(one, "sd", steps=9), want[0])
        assert torch.equal(run(two, "sd", steps=9, images=2, **sizes), want[1])
        assert torch.equal(run(sd, "sd", steps=9), want[2])
        assert (one.report.methods, two.report.methods) == counts


def test_nested_calls_are_refused(sd, fast):
    """From a callback, on the same wrapper or on another one around the same UNet; the outer run goes on."""
    want = run(fast, "sd", steps=STEPS)
    refused = []

    def nested(pipe, index, t, tensors):
        if index == 1:
            for inner in (fast, diffaccel.wrap(pipe, [])):
                with pytest.raises(Unsupported, match="already inside an accelerated call") as caught:
                    run(inner, "sd", steps=STEPS)
                refused.append(caught)
        return {}

    got = fast(**tiny_inputs("sd", steps=STEPS), callback_on_step_end=nested).images
    assert len(refused) == 2
    assert torch.equal(got, want)
    assert fast.report.completed
    assert fast.report.evaluations == 5


class Slow(GuidanceInterval):
    """Waits while it attaches itself, until the other call has ended."""

    attaching: ClassVar = threading.Event()
    go_on: ClassVar = threading.Event()

    def attach(self, model, run, seams):
        super().attach(model, run, seams)
        self.attaching.set()
        self.go_on.wait(20)


def test_calls_from_two_threads(sd):
    """One that is attached while the other one ends: it is refused before it changes anything."""
    one, two = diffaccel.wrap(sd, [SkipCache(interval=2)]), diffaccel.wrap(sd, [Slow(low=0.5), SkipCache(interval=2)])
    want, before, caught = run(one, "sd", steps=9), snapshot(sd), []

    def second():
        try:
            run(two, "sd", steps=9)
        except Unsupported as error:
            caught.append(str(error))
        finally:
            Slow.attaching.set()

    thread = threading.Thread(target=second)

    def start(pipe, index, t, tensors):
        if index == 1:
            thread.start()
            assert Slow.attaching.wait(20)
        return {}

    assert torch.equal(one(**tiny_inputs("sd", steps=9), callback_on_step_end=start).images, want)
    Slow.go_on.set()
    thread.join()
    assert len(caught) == 1
    assert "already inside an accelerated call" in caught[0]
    assert snapshot(sd) == before
    assert torch.equal(run(one, "sd", steps=9), want)


def living_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # some lie about __class__


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("sd", SkipCache(interval=2)),
        ("sd", GuidanceInterval(low=0.5)),
        ("sd", AdaptiveGuidance(threshold=0.9)),
        ("sd", StepReuse(threshold=1e9)),
        ("sd3", Forecast()),
        ("sd3", ResidualCache()),
        ("sd3", RegionSampling()),
        ("flux-cfg", BlockCache(kind="pyramid")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_stored_tensors_die_with_the_run(kind, method):
    """At once, and not when the garbage collector comes by: they may be most of a graphics card."""
    pipe = tiny_pipeline(kind) if kind == "sd" else tiny_transformer(kind)
    fast, call = diffaccel.wrap(pipe, [method]), run if kind == "sd" else run_transformer
    inside, calls = [], itertools.count()

    def look(*_):
        if next(calls) == 8:
            inside.append(living_tensors())

    call(fast, kind, steps=12)
    gc.collect()
    gc.disable()
    try:
        before = living_tensors()
        network = pipe.unet if kind == "sd" else pipe.transformer
        handle = network.register_forward_hook(look)
        call(fast, kind, steps=12)
        handle.remove()
        after = living_tensors()
    finally:
        gc.enable()
    assert inside[0] > before
    assert after == before


def test_wrapping_twice_is_refused(fast):
    with pytest.raises(Unsupported, match="wrapped already"):
        diffaccel.wrap(fast, [])


def test_components_may_be_exchanged_between_calls():
    """Another UNet or scheduler: pictures and counts are those of the new one."""
    fast = diffaccel.wrap(tiny_pipeline("sd"), [GuidanceInterval(low=0.5)])
    first = run(fast, "sd", steps=4)
    fast.unet = tiny_unet(seed=9, layers=1)
    assert not torch.equal(run(fast, "sd", steps=4), first)
    assert fast.report.flops == network_flops(fast.pipe, lambda: run(fast, "sd", steps=4))
    assert fast.report.flops_plain == network_flops(fast.pipe, lambda: run(fast.pipe, "sd", steps=4))
    fast.scheduler = EulerDiscreteScheduler()
    run(fast, "sd", steps=4)
    assert fast.report.completed


def test_an_exchanged_network_is_checked_again():
    fast = diffaccel.wrap(tiny_pipeline("sd"), [SkipCache(depth=8)])
    fast.unet = tiny_unet(seed=9, layers=1)
    with pytest.raises(Unsupported, match="depth 8 does not exist; this UNet has depths 0 to 5"):
        run(fast, "sd")


def test_removed_skip_branches_are_noticed():
    """Without them a cached step would know nothing of its latents."""
    pipe = tiny_transformer("sd3")
    diffaccel.add_skip_branches(pipe.transformer)
    fast = diffaccel.wrap(pipe, [SkipCache(depth=1)])
    run_transformer(fast, "sd3", steps=9)
    assert fast.report.methods["skip_cache"]["cached"] > 0
    diffaccel.remove_skip_branches(pipe.transformer)
    for _ in range(2):
        with pytest.raises(Unsupported, match="needs long skips"):
            run_transformer(fast, "sd3", steps=9)


# --- the wrapper itself ---


def test_attributes_pass_through(sd):
    fast = diffaccel.wrap(sd, [])
    assert fast.unet is sd.unet
    assert fast.components.keys() == sd.components.keys()
    scheduler, old = EulerDiscreteScheduler(), sd.scheduler
    fast.scheduler = scheduler
    assert sd.scheduler is scheduler
    assert "scheduler" not in vars(fast)
    fast.scheduler = old
    fast.remark = "kept on the pipeline"
    assert sd.remark == "kept on the pipeline"
    del sd.remark
    assert not hasattr(fast, "remark")
    with pytest.raises(AttributeError):
        _ = fast.no_such_thing
    assert {"report", "recipe", "pipe", "unet", "to", "enable_model_cpu_offload"} <= set(dir(fast))
    assert repr(fast) == "diffaccel: StableDiffusionPipeline with no methods"


def test_the_recipe_is_fixed(sd):
    """It was checked against the pipeline, and resolved for its kind of denoiser."""
    fast = diffaccel.wrap(sd, [SkipCache()])
    with pytest.raises(AttributeError, match="the recipe of an accelerated pipeline is fixed"):
        fast.recipe = "fast"
    assert fast.recipe == Recipe(methods=(SkipCache(),))


def test_the_call_has_the_signature_of_the_pipeline(sd):
    """Programs choose by it which of their settings to pass."""
    fast = diffaccel.wrap(sd, [])
    assert inspect.signature(fast.__call__) == inspect.signature(sd.__call__)
    assert inspect.signature(fast) == inspect.signature(sd)
    given = {"num_inference_steps": 2, "clip_sample": True}
    assert [name for name in given if name in inspect.signature(fast.__call__).parameters] == ["num_inference_steps"]
    assert torch.equal(fast.__call__(**tiny_inputs("sd", steps=2)).images, fast(**tiny_inputs("sd", steps=2)).images)
    twin = copy.copy(fast)
    twin.__call__(**tiny_inputs("sd", steps=3))
    assert (twin.report.steps, fast.report.steps) == (3, 2)


def test_it_passes_for_its_pipeline(sd):
    """Diffusers makes other pipelines from it; those are stock, and can be wrapped."""
    fast = diffaccel.wrap(sd, [GuidanceInterval(stop_fraction=0.5)])
    assert isinstance(fast, StableDiffusionPipeline)
    assert isinstance(fast, diffaccel.AcceleratedPipeline)
    assert type(fast) is diffaccel.AcceleratedPipeline
    for maker in (AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline):
        other = maker.from_pipe(fast)
        assert type(other) is StableDiffusionImg2ImgPipeline
        assert other.unet is sd.unet
        assert run(diffaccel.wrap(other, fast.recipe), "sd-img2img", steps=4).isfinite().all()
    back = pickle.loads(pickle.dumps(fast))
    assert type(back) is diffaccel.AcceleratedPipeline
    assert torch.equal(run(back, "sd", steps=4), run(fast, "sd", steps=4))


def test_to_returns_the_accelerated_pipeline(sd):
    """`fast = fast.to("cuda")` must not lose the recipe."""
    fast = diffaccel.wrap(sd, [])
    assert fast.to("cpu") is fast
    assert fast.to(torch.float64) is fast
    assert sd.unet.dtype == torch.float64
    fast.to(torch.float32)


def test_pipe_recipe_and_report(sd):
    fast = diffaccel.wrap(sd, SkipCache())
    assert fast.pipe is sd
    assert fast.recipe == Recipe(methods=(SkipCache(),))
    assert fast.report is None
    run(fast, "sd", steps=9)
    first = fast.report
    assert first.completed
    run(fast, "sd", steps=10)
    assert first is not fast.report
    assert (first.steps, fast.report.steps) == (9, 10)
    assert not hasattr(sd, "report")


def test_the_report_as_json_and_as_text(sd):
    fast = diffaccel.wrap(sd, [GuidanceInterval(low=0.5), SkipCache(window=(float("inf"), 0.3))])
    run(fast, "sd", steps=12)
    report = fast.report
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["evaluations"] == report.evaluations == 12
    assert data["rows"] == report.rows
    assert data["methods"] == report.methods
    assert data["recipe"] == fast.recipe.to_dict()
    assert "trace" not in data
    text = str(report)
    for number in (f"steps         {report.steps}", "evaluations   12", f"({report.rows} rows)"):
        assert number in text
    for number in (f"{report.flops:.3e}", f"{report.flops_plain:.3e}", f"{report.flops_ratio:.2f}x fewer"):
        assert number in text
    for name, counts in report.methods.items():
        assert name in text
        assert all(f"{key} {value}" in text for key, value in counts.items())


def test_a_note_is_printed(sd):
    fast = diffaccel.wrap(sd, GuidanceInterval(low=0.5))
    fast(**tiny_inputs("sd", steps=4) | {"guidance_scale": 1.0})
    assert "note: guidance_interval: this call runs without" in str(fast.report)
    assert fast.report.to_dict()["notes"] == list(fast.report.notes)


# --- counts ---


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_operators(kind):
    """Against torch's counter around the stock networks, attention written as matrix products."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, [])
    with counted_rows(pipe) as rows:
        run(fast, kind, steps=3, images=2)
    assert fast.report.rows == sum(rows)
    assert fast.report.evaluations == len(rows)
    want = network_flops(pipe, lambda: run(pipe, kind, steps=3, images=2))
    assert fast.report.flops == fast.report.flops_plain == want


METHODS = [
    GuidanceInterval(high=6.0, low=0.5),
    AdaptiveGuidance(threshold=0.999),
    SkipCache(depth=3),
    TokenMerging(min_tokens=1),
    TokenDownsampling(min_tokens=64, reduction="average"),
]


@pytest.mark.parametrize("kind", ["sd", "controlnet", "sdxl"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_flops_with_a_method(kind, method):
    """What was saved is really not executed, and what is called plain is what the stock pipeline costs."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, method)
    run(fast, kind, steps=9)
    first = fast.report
    executed = network_flops(pipe, lambda: run(fast, kind, steps=9))
    assert first.flops == fast.report.flops == executed
    assert first.flops_plain == network_flops(pipe, lambda: run(pipe, kind, steps=9))
    assert first.flops < first.flops_plain


# --- ways of calling ---


@pytest.mark.parametrize("kind", ["sd-img2img", "controlnet"])
@pytest.mark.parametrize("recipe", [[], EVERYTHING], ids=["off", "all"])
def test_images_by_position(kind, recipe):
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, recipe)
    want = run(fast, kind)
    inputs = tiny_inputs(kind)
    image = inputs.pop("image")
    assert torch.equal(fast(None, image, **inputs).images, want)
    if not recipe:
        assert torch.equal(run(pipe, kind), want)


@pytest.mark.parametrize("recipe", [[], EVERYTHING], ids=["off", "all"])
def test_a_forward_that_reads_arguments_by_position(recipe):
    """Another add-on's, or the user's: arguments come by position and by name as the pipeline gave them."""
    pipe = tiny_pipeline("sd")
    fast, seen, forward = diffaccel.wrap(pipe, recipe), [], pipe.unet.forward
    want = run(fast, "sd", steps=STEPS)

    def patched(*args, **kwargs):
        seen.append((len(args), float(args[1]), sorted(kwargs)))
        return forward(*args, **kwargs)

    pipe.unet.forward = patched
    run(pipe, "sd", steps=STEPS)
    stock, seen[:] = seen.copy(), []
    assert torch.equal(run(fast, "sd", steps=STEPS), want)
    assert seen[0][0] == stock[0][0] == 2
    assert seen[0][2] == stock[0][2]
    if not recipe:
        assert seen == stock
    assert pipe.unet.forward is patched


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_several_images_per_prompt(kind):
    pipe = tiny_pipeline(kind)
    inputs = tiny_inputs(kind, steps=4) | {"num_images_per_prompt": 2}

    def generators():
        return {"generator": [torch.Generator().manual_seed(k) for k in range(2)]}

    fast = diffaccel.wrap(pipe, [])
    assert torch.equal(fast(**inputs | generators()).images, pipe(**inputs | generators()).images)
    assert fast.report.rows == 16
    half = diffaccel.wrap(pipe, GuidanceInterval(stop_fraction=0.5))
    with counted_rows(pipe) as rows:
        half(**inputs | generators())
    assert rows == [4, 4, 2, 2]


def test_given_latents(sd):
    """Their odd size (18 x 22) and their memory are left alone."""
    latents = torch.randn(1, 4, 18, 22, generator=torch.Generator().manual_seed(3))
    kept = latents.clone()
    fast = diffaccel.wrap(sd, [])
    inputs = tiny_inputs("sd", steps=5) | {"latents": latents}
    assert torch.equal(fast(**inputs).images, sd(**inputs).images)
    quick = diffaccel.wrap(sd, EVERYTHING)
    first = quick(**inputs).images
    assert torch.equal(first, quick(**inputs).images)
    assert first.shape[-2:] == (36, 44)
    assert torch.equal(latents, kept)


def test_a_tuple_instead_of_an_output(sd, fast):
    want = run(fast, "sd", steps=STEPS)
    got = fast(**tiny_inputs("sd", steps=STEPS), return_dict=False)
    assert torch.equal(got[0], want)

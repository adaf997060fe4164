"""The forecast against hooks that replace the head's input by a polynomial in float64, on every transformer and on UNets."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import run as run_unet
from tiny import tiny_pipeline as tiny_unet_pipeline
from tiny_transformers import KINDS, SEPARATE, run, tiny_pipeline
from transformer_calls import recorded, repeated

import diffaccel
from diffaccel import Forecast, SkipCache, Unsupported
from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.block_bypass import FeatureStore, bypass_to_norm
from diffaccel.methods.caches.cache_plan import default_coordinate, noise_position
from diffaccel.models.transformers import describe_transformer

STEPS = 10
SAME = ("sd3-img2img", "sd3-inpaint", "sd3.5-large", "flux-dev", "flux-img2img", "flux2-klein", "pixart-alpha")
DISTINCT = tuple(kind for kind in KINDS if kind not in SAME)
TARGETS = ("features", "residual")


def seeded(pipe, kind, **changes):
    """Some ControlNet pipelines draw from the global generator."""
    torch.manual_seed(0)
    return run(pipe, kind, **changes)


def full(report):
    return [e.evaluation for e in report.trace if e.network == "denoiser" and not e.tags and e.rows]


def reader(network):
    """The module behind the blocks whose first input is forecast."""
    layout = describe_transformer(network)
    return next(iter(layout.head.values())) if layout.norm is None else layout.norm


# --- identity ---


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "kind", ["sd3-controlnet", "flux-cfg", "pixart-sigma", "hunyuan", "lumina2", "z-image", "wan-2.2"]
)
def test_off_and_never_cached_are_bit_identical(kind, target):
    pipe = tiny_pipeline(kind)
    stock = seeded(pipe, kind, steps=3)
    off = diffaccel.wrap(pipe, Forecast(interval=1, target=target))
    always = diffaccel.wrap(pipe, Forecast(schedule=tuple(range(20)), target=target, min_evaluations=1))
    assert torch.equal(seeded(off, kind, steps=3), stock)
    assert torch.equal(seeded(always, kind, steps=3), stock)
    assert off.report.methods == {}
    assert always.report.methods["forecast"]["cached"] == 0
    assert torch.equal(seeded(pipe, kind, steps=3), stock)


@pytest.mark.parametrize("kind", DISTINCT)
def test_unchanged_inputs_are_bit_equal(kind):
    pipe = tiny_pipeline(kind)
    one = recorded(pipe, kind, 1, batch=2, steps=4)[0]
    network = pipe.transformer
    want = repeated(network, one)
    for order in (1, 2):
        store = FeatureStore(order)
        with Seams() as seams:
            bypass_to_norm(describe_transformer(network), store, seams)
            for position in (3.0, 2.0, 1.0):
                with store.active(0, cached=False, position=position, fresh=position == 3.0):
                    assert torch.equal(repeated(network, one), want)
            with store.active(0, cached=True, position=0.3):
                assert torch.equal(repeated(network, one), want)
    assert torch.equal(repeated(network, one), want)


# --- oracle ---


def lagrange(places, position):
    """Weights of the values at `places` in the polynomial through them, at `position`."""
    return [math.prod((position - p) / (own - p) for p in places if p != own) for own in places]


@pytest.mark.parametrize("kind", [kind for kind in DISTINCT if kind != "wan-2.2"])
def test_the_head_reads_the_polynomial(kind):
    """Stored on three inputs, predicted for the next one, whose time the head still gets; no block runs."""
    pipe = tiny_pipeline(kind)
    stride = 2 if kind in SEPARATE else 1  # calls of one branch
    calls = recorded(pipe, kind, 3 * stride + 1, batch=2, steps=5)[::stride]
    network, places, at, seen = pipe.transformer, [3.0, 2.2, 1.9], 1.1, []
    handle = reader(network).register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    for one in calls[:3]:
        repeated(network, one)
    handle.remove()
    for order in (1, 2):
        weights = lagrange(places[2 - order :], at)
        mix = sum(w * value for w, value in zip(weights, seen[2 - order :], strict=True))
        handle = reader(network).register_forward_pre_hook(lambda m, args, mix=mix: (mix.to(args[0].dtype), *args[1:]))
        want = repeated(network, calls[3])
        handle.remove()
        store = FeatureStore(order)
        with Seams() as seams:
            bypass_to_norm(describe_transformer(network), store, seams)
            for place, one in zip(places, calls[:3], strict=True):
                with store.active("lane", cached=False, position=place, fresh=place == 3.0):
                    repeated(network, one)
            with store.active("lane", cached=True, position=at):
                got = repeated(network, calls[3])
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_a_polynomial_path_is_forecast_exactly():
    """If the features are quadratic in the coordinate, order 2 finds them on any spacing and order 1 does not."""
    path = lambda s: torch.stack([1 + 2 * s - 3 * s**2, s**2], -1)
    places, at = torch.tensor([0.9, 0.7, 0.64], dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    for order, exact in ((1, False), (2, True)):
        store = FeatureStore(order)
        for place in places:
            with store.active(0, cached=False, position=float(place), fresh=False):
                store.read(lambda x: x, (path(place),), {})
        with store.active(0, cached=True, position=float(at)):
            got = store.read(lambda x: x, (torch.zeros(2),), {})
        assert torch.allclose(got, path(at), atol=1e-9) == exact


def test_a_value_from_infinite_noise_has_no_weight():
    """Flow models begin at s = 1, where log sigma is infinite: the line goes through the two values after it."""
    store = FeatureStore(2)
    for place, value in ((None, 100.0), (2.0, 1.0), (1.0, 3.0)):
        with store.active(0, cached=False, position=place, fresh=False):
            store.read(lambda x: x, (torch.tensor([value]),), {})
    with store.active(0, cached=True, position=0.5):
        assert store.read(lambda x: x, (torch.zeros(1),), {}).item() == 4.0


def test_coordinates():
    assert noise_position(math.inf, "flow_time") == 1.0
    assert noise_position(3.0, "flow_time") == 0.75
    assert noise_position(math.inf, "log_sigma") is None
    assert noise_position(math.e, "log_sigma") == pytest.approx(1.0)
    assert default_coordinate(diffaccel.models.model_map.describe(tiny_pipeline("sd3"))) == "flow_time"
    assert default_coordinate(diffaccel.models.model_map.describe(tiny_pipeline("pixart-sigma"))) == "log_sigma"


# --- runs ---


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["sd3", "flux2", "auraflow", "lumina-next", "cogvideox", "qwen-image"])
def test_no_block_runs_between_full_evaluations(kind, target):
    """Counted inside the blocks; three images, no square; the second run is the same and stock returns."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, Forecast(interval=3, target=target))
    options = {"batch": 3, "size": (6, 10), "steps": STEPS}
    stock, ran = run(pipe, kind, **options), [0, 0]
    blocks = describe_transformer(pipe.transformer).blocks
    for i, block in enumerate((blocks[0], blocks[-1])):  # on a child: hooks of the block itself see bypassed calls too
        child = next(m for m in block.modules() if "Attention" in type(m).__name__)
        child.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    got = run(fast, kind, **options)
    branches = 2 if kind in SEPARATE else 1
    assert ran == [6 * branches] * 2
    assert fast.report.methods["forecast"] == {"full": 6 * branches, "cached": 4 * branches}
    assert sorted(set(full(fast.report))) == [0, 1, 2, 5, 8, 9]
    assert fast.report.flops < 0.75 * fast.report.flops_plain
    assert not torch.equal(got, stock)
    assert torch.equal(run(fast, kind, **options), got)
    assert torch.equal(run(pipe, kind, **options), stock)


def test_targets_and_orders_differ():
    """The residual keeps the fresh latents, the features do not: four different pictures."""
    pipe = tiny_pipeline("sd3")
    pictures = [
        run(diffaccel.wrap(pipe, Forecast(interval=4, order=order, target=target)), "sd3", steps=STEPS)
        for order in (1, 2)
        for target in TARGETS
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_picture_does_not_depend_on_its_batch_mates():
    fast = diffaccel.wrap(tiny_pipeline("sd3"), [Forecast(interval=3), diffaccel.AdaptiveGuidance(threshold=0.5)])
    together = run(fast, "sd3", batch=3, steps=STEPS)
    for k in range(3):
        alone = run(fast, "sd3", first=k, steps=STEPS)
        assert (alone[0] - together[k]).abs().max() <= 1e-4 * together.abs().max()


def test_an_aborted_run_leaves_stock_behind():
    pipe = tiny_pipeline("sd3")
    stock, fast = run(pipe, "sd3", steps=STEPS), diffaccel.wrap(pipe, Forecast())
    want = run(fast, "sd3", steps=STEPS)

    def stop(pipe, step, t, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(fast, "sd3", steps=STEPS, callback_on_step_end=stop)
    assert not fast.report.completed
    assert torch.equal(run(pipe, "sd3", steps=STEPS), stock)
    assert torch.equal(run(fast, "sd3", steps=STEPS), want)


# --- UNets and refusals ---


def test_on_unets_it_is_the_skip_cache():
    pipe = tiny_unet_pipeline("sd")
    settings = {"interval": 4, "full_first": 2, "full_last": 2, "window": (10.0, 0.1), "schedule": "late"}
    fast = diffaccel.wrap(pipe, Forecast(order=2, **settings))
    got = run_unet(fast, "sd", steps=12)
    assert torch.equal(got, run_unet(diffaccel.wrap(pipe, SkipCache(order=2, **settings)), "sd", steps=12))
    assert not torch.equal(got, run_unet(pipe, "sd", steps=12))
    assert any("what skip_cache does" in note for note in fast.report.notes)
    assert fast.report.methods["forecast"]["cached"] > 0
    assert "skip_cache" not in fast.report.methods
    off = diffaccel.wrap(pipe, Forecast(interval=1))
    assert torch.equal(run_unet(off, "sd", steps=12), run_unet(pipe, "sd", steps=12))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(Unsupported, match='target "residual" needs a transformer'):
        diffaccel.wrap(tiny_unet_pipeline("sd"), Forecast(target="residual"))
    with pytest.raises(Unsupported, match="on UNets features are extrapolated in log sigma only"):
        diffaccel.wrap(tiny_unet_pipeline("sd"), Forecast(coordinate="flow_time"))
    with pytest.raises(diffaccel.RecipeError, match="order"):
        diffaccel.Recipe.from_dict({"schema": 1, "methods": [{"method": "forecast", "order": 3}]})


def test_short_runs_say_so():
    pipe = tiny_pipeline("sd3")
    fast = diffaccel.wrap(pipe, Forecast())
    with pytest.warns(UserWarning, match="forecast: 4 evaluations are too few"):
        assert torch.equal(run(fast, "sd3", steps=4), run(pipe, "sd3", steps=4))

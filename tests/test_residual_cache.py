"""The residual cache against hooks that put h + d in by hand, on every transformer, and all that must force a full one."""

from __future__ import annotations

from contextlib import contextmanager

import accelerate
import pytest
import torch
from tiny import tiny_pipeline as tiny_unet_pipeline
from tiny_transformers import KINDS, SEPARATE, run, tiny_pipeline
from transformer_calls import recorded, repeated

import diffaccel
from diffaccel import AdaptiveGuidance, GuidanceInterval, ResidualCache, Unsupported
from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.block_bypass import ResidualStore, bypass_part, check_part
from diffaccel.models.transformers import describe_transformer

STEPS = 10
SAME = ("sd3-img2img", "sd3-inpaint", "sd3.5-large", "flux-dev", "flux-img2img", "flux2-klein", "pixart-alpha")
DISTINCT = tuple(kind for kind in KINDS if kind not in SAME)
FAMILIES = ("sd3.5-medium", "flux-cfg", "auraflow", "pixart-sigma", "hunyuan", "z-image", "wan")


def seeded(pipe, kind, **changes):
    """Some ControlNet pipelines draw from the global generator."""
    torch.manual_seed(0)
    return run(pipe, kind, **changes)


def full(report):
    return [e.evaluation for e in report.trace if e.network == "denoiser" and not e.tags and e.rows]


# --- identity ---


@pytest.mark.parametrize("kind", DISTINCT)
def test_off_and_never_cached_are_bit_identical(kind):
    pipe = tiny_pipeline(kind)
    stock = seeded(pipe, kind, steps=4)
    off = diffaccel.wrap(pipe, ResidualCache(interval=1))
    always = diffaccel.wrap(pipe, ResidualCache(schedule=tuple(range(20)), min_evaluations=1))
    assert torch.equal(seeded(off, kind, steps=4), stock)
    assert torch.equal(seeded(always, kind, steps=4), stock)
    assert off.report.methods == {}
    assert always.report.methods["residual_cache"]["cached"] == 0
    assert torch.equal(seeded(pipe, kind, steps=4), stock)


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_inputs_are_bit_equal(kind):
    """Whatever was stored last, order 0 to 2, every way to place the part: what comes out is the full evaluation."""
    pipe = tiny_pipeline(kind)
    one = recorded(pipe, kind, 1, batch=2, steps=4)[0]
    network = pipe.transformer
    layout, want = describe_transformer(network), repeated(network, one)
    last = len(layout.blocks) - 1
    for order, part in [(0, (0, last)), (1, (1, last - 1)), (2, (1, last - 1)), (2, (2, 2)), (1, (1, last))]:
        store = ResidualStore(order)
        with Seams() as seams:
            bypass_part(layout, *part, store, seams)
            for position in (3.0, 2.0, 1.0):
                with store.active(0, cached=False, position=position, fresh=position == 3.0):
                    assert torch.equal(repeated(network, one), want)
            with store.active(0, cached=True, position=0.3):
                assert torch.equal(repeated(network, one), want), (order, part)
    assert torch.equal(repeated(network, one), want)


# --- oracle ---


def joined(stream):
    """(image, text) of a block with two streams, or (sequence,)."""
    return stream if len(stream) == 1 else (torch.cat([stream[1], stream[0]], 1),)


class ByHand:
    """Runs every block, and replaces what the last one of the part returns by (what entered) + d, with forward hooks."""

    def __init__(self, layout, first, last):
        self.outputs = [stack.outputs for stack in layout.stacks for _ in stack.blocks]
        self.blocks, self.first, self.last = layout.blocks, first, last
        self.differences, self.entered, self.weights = [], None, None

    def __enter__(self):
        self.handles = [
            self.blocks[self.first].register_forward_pre_hook(self.enter, with_kwargs=True),
            self.blocks[self.last].register_forward_hook(self.leave),
        ]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def enter(self, block, args, kwargs):
        values = [kwargs.get("hidden_states", args[0] if args else None)]
        if len(self.outputs[self.first]) == 2:
            values.append(kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None))
        self.entered = tuple(value.double() for value in values)

    def leave(self, block, args, output):
        names = self.outputs[self.last]
        came = joined(self.entered) if names == ("joint",) else self.entered
        came = dict(zip(names if len(names) == 1 else ("image", "text"), came, strict=True))
        values = output if isinstance(output, tuple) else (output,)
        if self.weights is None:
            self.differences.append(
                [None if v is None else v.double() - came[n] for n, v in zip(names, values, strict=True)]
            )
            return None
        new = [
            None
            if v is None
            else (came[n] + sum(w * d[i] for w, d in zip(self.weights, self.differences, strict=True))).to(v.dtype)
            for i, (n, v) in enumerate(zip(names, values, strict=True))
        ]
        return tuple(new) if isinstance(output, tuple) else new[0]


def lagrange(places, position):
    """Weights of the values at `places` in the polynomial through them, at `position`."""
    return [
        torch.tensor([(position - p) / (places[k] - p) for i, p in enumerate(places) if i != k]).prod().item()
        for k in range(len(places))
    ]


@pytest.mark.parametrize("kind", [kind for kind in DISTINCT if kind != "wan-2.2"])
def test_cached_evaluations_are_fresh_inputs_plus_d(kind):
    """Full on three inputs, cached on the next one at another noise level, against the hooks."""
    pipe = tiny_pipeline(kind)
    stride = 2 if kind in SEPARATE else 1  # calls of one branch
    calls = recorded(pipe, kind, 3 * stride + 1, batch=2, steps=5)[::stride]
    network, places, at = pipe.transformer, [3.0, 2.2, 1.9], 1.1
    layout, stock = describe_transformer(network), repeated(network, calls[3])
    last = len(layout.blocks) - 2
    for order in (0, 1, 2):
        used = slice(2 - order, 3)
        with ByHand(layout, 1, last) as hand:
            for one in calls[:3][used]:
                repeated(network, one)
            hand.weights = lagrange(places[used], at)
            want = repeated(network, calls[3])
        store = ResidualStore(order)
        with Seams() as seams:
            bypass_part(layout, 1, last, store, seams)
            for place, one in zip(places, calls[:3], strict=True):
                with store.active("lane", cached=False, position=place, fresh=place == 3.0):
                    repeated(network, one)
            with store.active("lane", cached=True, position=at):
                got = repeated(network, calls[3])
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
        assert (got - stock).abs().max() > 1e-4 * stock.abs().max()  # the part did not run


# --- runs ---


@pytest.mark.parametrize("kind", FAMILIES)
def test_inner_blocks_run_on_full_evaluations_only(kind):
    """Counted inside the blocks; second run the same, also after one that was aborted; three images, no square."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, ResidualCache(interval=3))
    layout = describe_transformer(pipe.transformer)
    ran = [0] * len(layout.blocks)
    options = {"batch": 3, "size": (6, 10), "steps": STEPS}
    stock = run(pipe, kind, **options)

    def count(i):
        return lambda *_: ran.__setitem__(i, ran[i] + 1)

    for i, block in enumerate(layout.blocks):  # on a child: hooks of the block itself see bypassed calls too
        next(m for m in block.modules() if "norm" in type(m).__name__.lower()).register_forward_hook(count(i))
    got = run(fast, kind, **options)
    counts = fast.report.methods["residual_cache"]
    once = ran[0] // (counts["full"] + counts["cached"])  # some blocks use that norm twice
    assert ran[1] // once == counts["full"] == ran[-2] // once
    assert ran[-1] // once == counts["full"] + counts["cached"]
    assert len(full(fast.report)) == counts["full"]
    assert not torch.equal(got, stock)
    assert fast.report.flops < fast.report.flops_plain
    with aborted(pipe.transformer), pytest.raises(KeyboardInterrupt):
        run(fast, kind, **options)
    assert torch.equal(run(pipe, kind, **options), stock)
    assert torch.equal(run(fast, kind, **options), got)


@contextmanager
def aborted(network, calls=8):
    """Ctrl-C in the middle of a run."""
    left = [calls]

    def count(module, args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    handle = network.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def test_schedule_window_and_short_runs():
    pipe = tiny_pipeline("sd3")
    cases = [
        (ResidualCache(interval=3), [0, 3, 6, 9, 11]),
        (ResidualCache(interval=50, full_first=3, full_last=2), [0, 1, 2, 10, 11]),
        (ResidualCache(schedule=(0, 5)), [0, 5, 11]),
    ]
    for method, want in cases:
        fast = diffaccel.wrap(pipe, method)
        run(fast, "sd3", steps=12)
        assert full(fast.report) == want
    fast = diffaccel.wrap(pipe, ResidualCache(interval=9, window=(4.0, 0.5)))
    run(fast, "sd3", steps=12)
    cached = [e.sigma for e in fast.report.trace if e.tags]
    assert cached
    assert all(0.5 <= sigma <= 4.0 for sigma in cached)
    fast = diffaccel.wrap(pipe, ResidualCache())
    with pytest.warns(UserWarning, match="8 evaluations are too few"):
        short = run(fast, "sd3", steps=8)
    assert torch.equal(short, run(pipe, "sd3", steps=8))
    assert any("too few" in note for note in fast.report.notes)


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg"])
def test_new_prompts_force_a_full_evaluation(kind):
    """Also of one branch alone, where branches are separate calls: the other one goes on by its age."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, ResidualCache(interval=5))

    def swap(pipe, step, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if step == 6 else {}

    changes = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    run(fast, kind, steps=12, **changes)
    assert sorted(set(full(fast.report))) == [0, 5, 7, 11]
    assert fast.report.methods["residual_cache"]["forced by inputs"] == 1


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg"])
def test_returning_guidance_forces_a_full_evaluation(kind):
    recipe = [ResidualCache(interval=100, full_last=0), GuidanceInterval(start_fraction=0.4)]
    fast = diffaccel.wrap(tiny_pipeline(kind), recipe)
    run(fast, kind, steps=12)
    assert sorted(set(full(fast.report))) == [0, 5]
    assert fast.report.methods["residual_cache"]["forced by guidance"] == 1


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg"])
def test_the_end_of_adaptive_guidance_forces_nothing(kind):
    """What is stored stays in use for the conditional rows; a full evaluation would depend on batch mates."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, [ResidualCache(interval=4), AdaptiveGuidance(threshold=0.5)])
    run(fast, kind, steps=12)
    assert sorted(set(full(fast.report))) == [0, 4, 8, 11]
    assert not any("forced" in name for name in fast.report.methods["residual_cache"])
    assert fast.report.rows < 2 * 12


def test_the_second_transformer_of_wan_starts_with_a_full_evaluation():
    pipe = tiny_pipeline("wan-2.2")
    fast = diffaccel.wrap(pipe, ResidualCache(interval=100, full_last=0))
    calls = {"first": 0, "second": 0}
    pipe.transformer.register_forward_hook(lambda *_: calls.__setitem__("first", calls["first"] + 1))
    pipe.transformer_2.register_forward_hook(lambda *_: calls.__setitem__("second", calls["second"] + 1))
    run(fast, "wan-2.2", steps=12)
    assert all(calls.values())
    assert full(fast.report) == [0, 0, calls["first"] // 2, calls["first"] // 2]


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg"])
def test_a_picture_does_not_depend_on_its_batch_mates(kind):
    fast = diffaccel.wrap(tiny_pipeline(kind), ResidualCache(interval=3))
    together = run(fast, kind, batch=3, steps=STEPS)
    for k in range(3):
        alone = run(fast, kind, first=k, steps=STEPS)
        assert (alone[0] - together[k]).abs().max() <= 1e-4 * together.abs().max()


def test_skip_layer_guidance_is_a_lane_of_its_own():
    """SD3's third call leaves blocks out; at the ends of its interval nothing is mixed up."""
    pipe = tiny_pipeline("sd3")
    changes = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6}
    fast = diffaccel.wrap(pipe, ResidualCache(interval=3))
    run(fast, "sd3", steps=12, **changes)
    third = [e for e in fast.report.trace if e.rows == 1]
    assert {bool(e.tags) for e in third} == {True, False}
    assert sorted({e.evaluation for e in fast.report.trace if e.rows == 2 and not e.tags}) == [0, 3, 6, 9, 11]


# --- what else people attach ---


def test_a_lora_scale_that_changes_forces_a_full_evaluation():
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline("sd3")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    fast = diffaccel.wrap(pipe, ResidualCache(interval=6))

    def rescale(pipe, step, t, tensors):
        if step == 3:
            pipe.transformer.set_adapters(["default"], [0.3])
        return {}

    run(fast, "sd3", steps=12, callback_on_step_end=rescale)
    assert full(fast.report) == [0, 4, 10, 11]
    assert fast.report.methods["residual_cache"]["forced by adapters"] == 1


@pytest.mark.parametrize("kind", ["sd3", "auraflow"])
def test_sequential_offload(kind):
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, ResidualCache(interval=3))
    want = run(fast, kind, steps=STEPS)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert torch.equal(run(fast, kind, steps=STEPS), want)
    assert torch.equal(run(fast, kind, steps=STEPS), want)
    assert {str(p.device) for p in pipe.transformer.parameters()} == {"meta"}


def test_compiled_blocks():
    """Cached evaluations stand around the compiled blocks, which stay compiled."""
    pipe = tiny_pipeline("flux-schnell")
    fast = diffaccel.wrap(pipe, ResidualCache(interval=3))
    want = run(fast, "flux-schnell", steps=STEPS)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    blocks = describe_transformer(pipe.transformer).blocks
    before = [block._compiled_call_impl for block in blocks]
    stock = run(pipe, "flux-schnell", steps=STEPS)
    assert torch.allclose(run(fast, "flux-schnell", steps=STEPS), want, atol=1e-5)
    assert fast.report.methods["residual_cache"] == {"full": 4, "cached": 6}
    assert [block._compiled_call_impl for block in blocks] == before
    assert torch.equal(run(pipe, "flux-schnell", steps=STEPS), stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Stored in the model's type, extrapolated in fp32: unchanged inputs stay bit-equal, others are off by one rounding."""
    store, torch_state = ResidualStore(2), torch.Generator().manual_seed(0)
    states = [50 * torch.randn(1, 4, 8, generator=torch_state).to(dtype) for _ in range(7)]
    for place, before, after in zip((3.0, 2.0, 1.5), states[:3], states[3:6], strict=True):
        with store.active(0, cached=False, position=place, fresh=place == 3.0):
            store.leave(("image",), ("image",), lambda x, after=after: after, (before,), {})
    with store.active(0, cached=True, position=1.2):
        got = store.leave(("image",), ("image",), lambda x: x, (states[6],), {})
    d = [after.double() - before.double() for before, after in zip(states[:3], states[3:6], strict=True)]
    want = states[6].double() + sum(w * value for w, value in zip(lagrange([3.0, 2.0, 1.5], 1.2), d, strict=True))
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
    unchanged = ResidualStore(2)
    for place in (3.0, 2.0, 1.5):
        with unchanged.active(0, cached=False, position=place, fresh=place == 3.0):
            unchanged.leave(("image",), ("image",), lambda x: states[3], (states[0],), {})
    with unchanged.active(0, cached=True, position=1.2):
        assert torch.equal(unchanged.leave(("image",), ("image",), lambda x: x, (states[0],), {}), states[3])


# --- refusals ---


def test_what_cannot_be_done_is_refused():
    with pytest.raises(Unsupported, match="residual_cache works on diffusion transformers; UNet2DConditionModel is a"):
        diffaccel.wrap(tiny_unet_pipeline("sd"), ResidualCache())
    with pytest.raises(Unsupported, match=r"keep_first 2 and keep_last 2 leave nothing to cache; .* 4 blocks"):
        diffaccel.wrap(tiny_pipeline("sd3"), ResidualCache(keep_first=2, keep_last=2))
    with pytest.raises(Unsupported, match="block 4 reads a long skip of block 1, which would not run; keep_last must"):
        diffaccel.wrap(tiny_pipeline("hunyuan"), ResidualCache(keep_first=1, keep_last=2))
    layout = describe_transformer(tiny_pipeline("hunyuan").transformer)
    check_part("residual_cache", layout, 2, 2)
    with pytest.raises(diffaccel.RecipeError, match="interval"):
        diffaccel.Recipe.from_dict({"schema": 1, "methods": [{"method": "residual_cache", "interval": 0}]})

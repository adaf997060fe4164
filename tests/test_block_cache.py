"""Diffusers' own caches under BlockCache: rules against slow oracles, truthful counts, exact restore."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny import tiny_pipeline as tiny_unet_pipeline
from tiny_transformers import KINDS, UNGUIDED, run, tiny_pipeline

from diffaccel import BlockCache, GuidanceInterval, Unsupported, wrap
from diffaccel.engine.flops import count_flops

RATIOS = (1.0, 0.99, 0.97, 0.99, 1.02)
EAGER = {  # settings under which every kind has hits on random weights
    "first_block": {"kind": "first_block", "threshold": 10.0},
    "mag": {"kind": "mag", "threshold": 5.0, "ratios": RATIOS},
    "taylor, attention": {"kind": "taylor"},
    "taylor, output": {"kind": "taylor", "target": "output"},
    "pyramid": {"kind": "pyramid"},
}
OFF = [
    {"kind": "first_block", "threshold": 0},
    {"kind": "mag", "threshold": 0, "ratios": RATIOS},
    {"kind": "taylor", "interval": 1},
    {"kind": "pyramid", "interval": 1},
]


def attributes(network):
    return [dict(vars(module)) for module in network.modules()]


def unchanged(network, before):
    after = attributes(network)
    return all(
        now.keys() == then.keys() and all(now[k] is then[k] for k in now)
        for now, then in zip(after, before, strict=True)
    )


@pytest.mark.parametrize("settings", OFF, ids=lambda s: s["kind"])
def test_off_is_stock_bit_for_bit(settings):
    pipe = tiny_pipeline("flux-cfg")
    accelerated = wrap(pipe, BlockCache(**settings))
    assert torch.equal(run(accelerated, "flux-cfg"), run(pipe, "flux-cfg"))
    assert accelerated.report.methods == {}


# --- slow oracles on Wan: one stack of blocks, one tensor between them, guidance branches in separate calls ---

TOTAL, FIRST, CAP = 12, 3, 4


def may_hit(evaluation, hits):
    return FIRST <= evaluation < TOTAL - 1 and hits < CAP


class Oracle:
    """The rules in plain words; `calls` counts transformer calls, cond and uncond in turn."""

    def __init__(self, network):
        self.network, self.calls, self.full = network, 0, []
        self.branches = [{"hits": 0}, {"hits": 0}]

    @property
    def evaluation(self):
        return (self.calls - 1) // 2

    @property
    def mine(self):
        return self.branches[(self.calls - 1) % 2]

    @contextmanager
    def installed(self):
        changed = []

        def patch(module, function):
            original = module.forward
            module.forward = lambda *a, **k: function(original, *a, **k)
            changed.append(module)

        def count(original, *args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        patch(self.network, count)
        self.install(patch)
        yield
        for module in changed:
            del module.forward

    def decided(self, full):
        self.mine["now_full"] = full
        self.mine["hits"] = 0 if full else self.mine["hits"] + 1
        self.full.append(full)


class FirstBlock(Oracle):
    threshold = 0.3

    def install(self, patch):
        first, *inner, last = self.network.blocks

        def head(original, x, *args):
            out, s = original(x, *args), self.mine
            change = out - x
            full = not may_hit(self.evaluation, s["hits"]) or bool(
                (change - s["change"]).abs().mean() / s["change"].abs().mean() > self.threshold
            )
            self.decided(full)
            if full:
                s["change"], s["head"] = change, out
                return out
            return s["rest"] + out

        def middle(original, x, *args):
            return original(x, *args) if self.mine["now_full"] else x

        def tail(original, x, *args):
            if not self.mine["now_full"]:
                return x
            out = original(x, *args)
            self.mine["rest"] = out - self.mine["head"]
            return out

        patch(first, head)
        for block in inner:
            patch(block, middle)
        patch(last, tail)


class Mag(Oracle):
    threshold = 0.06

    def install(self, patch):
        first, *inner, last = self.network.blocks
        places = [round(e * (len(RATIOS) - 1) / (TOTAL - 1)) for e in range(TOTAL)]

        def head(original, x, *args):
            s = self.mine
            s["product"] = s.get("product", 1.0) * RATIOS[places[self.evaluation]]
            s["error"] = s.get("error", 0.0) + abs(1 - s["product"])
            full = not may_hit(self.evaluation, s["hits"]) or s["error"] > self.threshold
            self.decided(full)
            if full:
                s["product"], s["error"], s["entry"] = 1.0, 0.0, x
                return original(x, *args)
            return x + s["residual"]

        def rest(original, x, *args):
            if not self.mine["now_full"]:
                return x
            out = original(x, *args)
            if original.__self__ is last:
                self.mine["residual"] = out - self.mine["entry"]
            return out

        patch(first, head)
        for block in (*inner, last):
            patch(block, rest)


class Taylor(Oracle):
    """Full at 0, 1, 2, 4, 9, 14, ... and at the end; in between a straight line through the last two full outputs."""

    def install(self, patch):
        def output(original, x):
            s, e = self.mine, self.evaluation
            full = not may_hit(e, s["hits"]) or (e - FIRST - 1) % 5 == 0
            self.decided(full)
            if not full:
                return s["value"] + s["slope"] * (e - s["at"])
            value = original(x)
            if "value" in s:
                s["slope"] = (value - s["value"]) / (e - s["at"])
            s["value"], s["at"] = value, e
            return value

        patch(self.network.proj_out, output)


class Pyramid(Oracle):
    """Every second self-attention of a branch is the last one again."""

    def install(self, patch):
        def attention(original, *args, place, **kwargs):
            s, e = self.mine, self.evaluation
            full = not may_hit(e, s["hits"]) or e % 2 == 0
            if place == len(self.network.blocks) - 1:
                self.decided(full)
            if full:
                s[place] = original(*args, **kwargs)
            return s[place]

        for place, block in enumerate(self.network.blocks):
            patch(block.attn1, lambda original, *a, place=place, **k: attention(original, *a, place=place, **k))


ORACLES = {
    "first_block": (FirstBlock, {"threshold": FirstBlock.threshold}),
    "mag": (Mag, {"threshold": Mag.threshold, "ratios": RATIOS}),
    "taylor": (Taylor, {"target": "output"}),
    "pyramid": (Pyramid, {}),
}


@pytest.mark.parametrize("kind", ORACLES)
def test_against_a_slow_oracle(kind):
    make, settings = ORACLES[kind]
    pipe = tiny_pipeline("wan")
    plain = run(pipe, "wan", steps=TOTAL, size=(8, 12))
    oracle = make(pipe.transformer)
    with oracle.installed():
        expected = run(pipe, "wan", steps=TOTAL, size=(8, 12))
    accelerated = wrap(pipe, BlockCache(kind=kind, **settings))
    found = run(accelerated, "wan", steps=TOTAL, size=(8, 12))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    counts = accelerated.report.methods["block_cache"]
    assert (counts["full"], counts["hits"]) == (sum(oracle.full), len(oracle.full) - sum(oracle.full))
    trace = [("block_cache", "full") in e.tags for e in accelerated.report.trace]
    assert trace == oracle.full
    assert 0 < counts["hits"] < counts["full"] + counts["hits"]


def test_the_threshold_of_the_oracle_is_not_only_the_cap():
    """The first-block oracle above has full evaluations that only its threshold explains."""
    pipe = tiny_pipeline("wan")
    counts = []
    for threshold in (1e-6, FirstBlock.threshold, 10.0):
        accelerated = wrap(pipe, BlockCache(threshold=threshold))
        run(accelerated, "wan", steps=TOTAL, size=(8, 12))
        counts.append(accelerated.report.methods["block_cache"]["hits"])
    assert counts[0] == 0 < counts[1] < counts[2]


# --- where it works ---


def promised(name):
    lines = inspect.getdoc(BlockCache).splitlines()
    line = next(line for line in lines if line.startswith(f"{name}: ") and "flux" in line)
    return set(line.split(": ")[1].split(", "))


def family(kind):
    known = {"flux2": "flux2", "flux": "flux", "wan": "wan"}
    return next((name for start, name in known.items() if kind.startswith(start)), kind)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev", "flux2", "qwen-image", "cogview4", "wan", "cogvideox"])
@pytest.mark.parametrize("name", EAGER)
def test_support_is_as_documented(kind, name):
    pipe = tiny_pipeline(kind)
    before = attributes(pipe.transformer)
    if family(kind) not in promised(name):
        with pytest.raises(Unsupported, match="block_cache"):
            wrap(pipe, BlockCache(**EAGER[name]))
        assert unchanged(pipe.transformer, before)
        return
    accelerated = wrap(pipe, BlockCache(**EAGER[name]))
    latents = run(accelerated, kind, steps=10)
    report = accelerated.report
    assert latents.isfinite().all()
    assert report.methods["block_cache"]["hits"] > 0
    assert report.flops < report.flops_plain
    assert unchanged(pipe.transformer, before)
    torch.testing.assert_close(run(accelerated, kind, steps=10), latents, rtol=0, atol=0)


def test_every_family_without_caches_is_refused():
    known = {"flux", "flux2", "qwen-image", "cogview4", "wan", "cogvideox"}
    others = [kind for kind in KINDS if family(kind) not in known and "-" not in kind]
    assert len(others) >= 6
    for kind in others:
        with pytest.raises(Unsupported, match="diffusers has no caches for"):
            wrap(tiny_pipeline(kind), BlockCache())


def test_unets_are_refused():
    with pytest.raises(Unsupported, match="block_cache works on diffusion transformers"):
        wrap(tiny_unet_pipeline("sd"), BlockCache())


@pytest.mark.parametrize("name", ["first_block", "mag"])
def test_controlnets_are_refused_where_they_would_count_twice(name):
    with pytest.raises(Unsupported, match="added a second time"):
        wrap(tiny_pipeline("flux-controlnet"), BlockCache(**EAGER[name]))


def test_a_cache_of_the_user_is_left_alone():
    pipe = tiny_pipeline("flux-dev")
    accelerated = wrap(pipe, BlockCache())
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    before = attributes(pipe.transformer)
    with pytest.raises(Unsupported, match="enabled on this FluxTransformer2DModel already"):
        wrap(pipe, BlockCache())
    with pytest.raises((Unsupported, ValueError)):
        run(accelerated, "flux-dev")
    assert unchanged(pipe.transformer, before)


def test_compiled_blocks_are_refused():
    pipe = tiny_pipeline("flux-dev")
    pipe.transformer.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(Unsupported, match="compiled blocks"):
        wrap(pipe, BlockCache())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "first_block", "interval": 3}, "interval is a setting of taylor and pyramid"),
        ({"kind": "taylor", "threshold": 0.1}, "threshold is a setting of first_block and mag"),
        ({"kind": "pyramid", "target": "output"}, "target is a setting of taylor"),
        ({"kind": "mag"}, "needs the magnitude ratios"),
        ({"kind": "mag", "ratios": (1.0, -1.0)}, "two positive numbers"),
        ({"kind": "sea"}, "first_block"),
        ({"threshold": -1}, "greater than or equal to 0"),
        ({"window": (1.0, 2.0)}, "high > low"),
        ({"steps": 3}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockCache(**settings)


# --- state: runs, branches, batches, exceptions ---


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", EAGER)
def test_an_aborted_run_leaves_nothing(name):
    pipe = tiny_pipeline("flux-cfg")
    before = attributes(pipe.transformer)
    accelerated = wrap(pipe, BlockCache(**EAGER[name]))
    expected = run(accelerated, "flux-cfg", steps=10)

    def stop(pipe, step, timestep, tensors):
        if step == 6:
            raise Stop
        return tensors

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 6
        return tensors

    with pytest.raises(Stop):
        run(accelerated, "flux-cfg", steps=10, size=(6, 10), callback_on_step_end=stop)
    assert unchanged(pipe.transformer, before)
    run(accelerated, "flux-cfg", steps=10, size=(6, 10), callback_on_step_end=interrupt)
    assert unchanged(pipe.transformer, before)
    assert torch.equal(run(accelerated, "flux-cfg", steps=10), expected)


@pytest.mark.parametrize("name", ["mag", "taylor, attention", "taylor, output", "pyramid"])
def test_a_picture_does_not_depend_on_its_batch(name):
    accelerated = wrap(tiny_pipeline("flux-cfg"), BlockCache(**EAGER[name]))
    together = run(accelerated, "flux-cfg", batch=3, steps=10)
    alone = torch.cat([run(accelerated, "flux-cfg", first=k, steps=10) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_first_block_says_that_it_decides_for_the_batch():
    accelerated = wrap(tiny_pipeline("flux-dev"), BlockCache(threshold=10.0))
    run(accelerated, "flux-dev", batch=2, steps=10)
    assert any("whole batch" in note for note in accelerated.report.notes)


def test_a_branch_that_was_left_out_comes_back_whole():
    """Guidance from 40 % to 70 % of the run only: the first unconditional call is no hit, and none before it exists."""
    accelerated = wrap(
        tiny_pipeline("flux-cfg"), [BlockCache(threshold=10.0), GuidanceInterval(start_fraction=0.4, stop_fraction=0.7)]
    )
    run(accelerated, "flux-cfg", steps=10)
    counts = accelerated.report.methods["block_cache"]
    assert counts["full of uncond"] == 1
    assert counts["hits of uncond"] == 2
    assert counts["forced by inputs"] >= 1


def test_hits_stay_inside_the_window():
    accelerated = wrap(tiny_pipeline("flux-dev"), BlockCache(threshold=10.0, window=(2.0, 0.5)))
    run(accelerated, "flux-dev", steps=16)
    hits = [e.sigma for e in accelerated.report.trace if ("block_cache", "hits") in e.tags]
    assert hits
    assert all(0.5 <= sigma <= 2 for sigma in hits)


@pytest.mark.parametrize("name", EAGER)
def test_flops_are_those_that_ran(name):
    accelerated = wrap(tiny_pipeline("flux-cfg"), BlockCache(**EAGER[name]))
    run(accelerated, "flux-cfg", steps=10)
    first = accelerated.report.flops
    _, counted = count_flops(lambda: run(accelerated, "flux-cfg", steps=10))
    assert first == accelerated.report.flops == counted
    plain = wrap(accelerated.pipe, [])
    run(plain, "flux-cfg", steps=10)
    assert accelerated.report.flops_plain == plain.report.flops


def test_a_run_without_hits_says_so():
    accelerated = wrap(tiny_pipeline("flux-dev"), BlockCache(threshold=1e-9))
    stock = run(accelerated.pipe, "flux-dev", steps=10)
    assert torch.equal(run(accelerated, "flux-dev", steps=10), stock)
    assert accelerated.report.methods["block_cache"]["hits"] == 0
    assert any("never had a hit" in note for note in accelerated.report.notes)


def test_few_evaluations_are_not_cached():
    accelerated = wrap(tiny_pipeline("flux-schnell"), BlockCache(threshold=10.0))
    stock = run(accelerated.pipe, "flux-schnell", steps=4)
    with pytest.warns(UserWarning, match="4 evaluations are too few"):
        found = run(accelerated, "flux-schnell", steps=4)
    assert torch.equal(found, stock)


def test_pipelines_that_open_no_context_work():
    kind = "flux-img2img"
    assert "cache_context" not in inspect.getsource(type(tiny_pipeline(kind)))
    assert kind not in UNGUIDED
    accelerated = wrap(tiny_pipeline(kind), BlockCache(threshold=10.0))
    run(accelerated, kind, steps=14)
    counts = accelerated.report.methods["block_cache"]
    assert counts["hits of cond"] == counts["hits of uncond"] > 0

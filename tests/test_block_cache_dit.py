"""cache-dit's DBCache under BlockCache: the rule against a slow oracle, truthful counts, a network without a trace."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from tiny_transformers import KINDS, run, tiny_pipeline

from benchmarks import peers
from diffaccel import BlockCache, GuidanceInterval, Unsupported, wrap
from diffaccel.engine.flops import count_flops


def dual(threshold=2.0, **settings):
    """Two blocks of every stack in between, at least; from threshold 1 on cache-dit takes everything for similar."""
    return BlockCache(kind="dual_block", threshold=threshold, **{"first_blocks": 1, **settings})


def attributes(pipe):
    modules = [module for network in networks(pipe) for module in network.modules()]
    own = [(dict(vars(module)), list(module._modules.items())) for module in modules]
    return own, dict(vars(type(pipe))), set(vars(pipe))


def networks(pipe):
    return [net for net in (pipe.transformer, getattr(pipe, "transformer_2", None)) if net is not None]


def unchanged(pipe, before):
    modules, *rest = attributes(pipe)
    known, *rest_before = before
    return rest == rest_before and all(
        now.keys() == then.keys() and all(now[k] is then[k] for k in now) and children == children_then
        for (now, children), (then, children_then) in zip(modules, known, strict=True)
    )


@contextmanager
def counted(pipe):
    """How often every block ran, seen by torch's own hooks."""
    ran = {}

    def count(name):
        return lambda *_: ran.update({name: ran.get(name, 0) + 1})

    blocks = [
        (f"{child}.{place}", block)
        for network in networks(pipe)
        for child, blocks in network.named_children()
        if isinstance(blocks, torch.nn.ModuleList)
        for place, block in enumerate(blocks)
    ]
    handles = [block.register_forward_hook(count(name)) for name, block in blocks]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def test_off_is_stock_bit_for_bit():
    pipe = tiny_pipeline("flux-cfg")
    accelerated = wrap(pipe, dual(0))
    assert torch.equal(run(accelerated, "flux-cfg"), run(pipe, "flux-cfg"))
    assert accelerated.report.methods == {}


# --- the rule ---

TOTAL, FULL_FIRST, CAP = 14, 3, 3


class Oracle:
    """The rule in plain words on Wan, whose four blocks are one stack and whose branches are separate calls."""

    def __init__(self, network, threshold, first, last):
        self.network, self.threshold, self.first, self.last = network, threshold, first, last
        self.calls, self.full, self.branches = 0, [], [{"hits": 0}, {"hits": 0}]

    @contextmanager
    def installed(self):
        blocks = list(self.network.blocks)
        for place, block in enumerate(blocks):
            block.forward = lambda x, *a, p=place, f=block.forward, **k: self.block(p, len(blocks), f, x, a, k)
        yield
        for block in blocks:
            del block.forward

    def block(self, place, count, original, x, args, kwargs):
        if place == 0:
            self.calls += 1
            self.mine["entry"] = x
        if place < self.first:
            out = original(x, *args, **kwargs)
            return self.decide(out) if place == self.first - 1 else out
        if place >= count - self.last:
            return original(x, *args, **kwargs)
        if not self.mine["now_full"]:
            return x
        out = original(x, *args, **kwargs)
        if place == count - self.last - 1:
            self.mine["rest"] = out - self.mine["middle"]
        return out

    @property
    def mine(self):
        return self.branches[(self.calls - 1) % 2]

    def decide(self, out):
        s, evaluation = self.mine, (self.calls - 1) // 2
        change = out - s["entry"]
        allowed = FULL_FIRST <= evaluation < TOTAL - 1 and s["hits"] < CAP
        full = not allowed or bool((change - s["change"]).abs().mean() / s["change"].abs().mean() >= self.threshold)
        s["now_full"], s["hits"] = full, 0 if full else s["hits"] + 1
        self.full.append(full)
        if not full:
            return out + s["rest"]
        s["change"], s["middle"] = change, out
        return out


@pytest.mark.parametrize(("threshold", "first", "last"), [(0.3, 1, 0), (0.3, 1, 1), (0.2, 2, 1), (2.0, 2, 0)])
def test_against_a_slow_oracle(threshold, first, last):
    pipe = tiny_pipeline("wan")
    plain = run(pipe, "wan", steps=TOTAL, size=(8, 12))
    oracle = Oracle(pipe.transformer, threshold if threshold < 1 else float("inf"), first, last)
    with oracle.installed():
        expected = run(pipe, "wan", steps=TOTAL, size=(8, 12))
    accelerated = wrap(pipe, dual(threshold, first_blocks=first, last_blocks=last, max_hits=CAP))
    found = run(accelerated, "wan", steps=TOTAL, size=(8, 12))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert [("block_cache", "full") in e.tags for e in accelerated.report.trace] == oracle.full
    counts = accelerated.report.methods["block_cache"]
    assert 0 < counts["hits"] == len(oracle.full) - sum(oracle.full)


def test_the_threshold_matters():
    pipe = tiny_pipeline("wan")
    hits = []
    for threshold in (1e-9, 0.2, 2.0):
        accelerated = wrap(pipe, dual(threshold))
        run(accelerated, "wan", steps=TOTAL)
        hits.append(accelerated.report.methods["block_cache"]["hits"])
    assert hits[0] == 0 < hits[1] < hits[2]


# --- where it works ---


def promised():
    lines = inspect.getdoc(BlockCache).splitlines()
    lists = [line.split(": ")[1] for line in lines if line.startswith(("dual_block: sd3", "dual_block, single"))]
    return set(", ".join(lists).split(", "))


def family(kind):
    starts = ("sd3", "flux2", "flux", "pixart", "wan")
    return next((start for start in starts if kind.startswith(start)), kind)


FAMILIES = [kind for kind in KINDS if not kind.endswith(("img2img", "inpaint", "controlnet"))]


@pytest.mark.parametrize("kind", FAMILIES)
def test_support_is_as_documented(kind, capfd):
    pipe = tiny_pipeline(kind)
    plain = run(pipe, kind, steps=10)  # pipelines leave things on the network at their first call
    before = attributes(pipe)
    if family(kind) not in promised():
        with pytest.raises(Unsupported, match=r"cache-dit (does not know the long skips|rewrites the forward)"):
            wrap(pipe, dual())
        assert unchanged(pipe, before)
        return
    never = wrap(pipe, dual(1e-12))
    assert torch.equal(run(never, kind, steps=10), plain)
    accelerated = wrap(pipe, dual())
    with counted(pipe) as ran:
        latents = run(accelerated, kind, steps=10)
    report = accelerated.report
    counts = report.methods["block_cache"]
    calls = counts["full"] + counts["hits"]
    assert latents.isfinite().all()
    assert 0 < counts["hits"] < calls
    assert counts["full"] in ran.values()
    assert set(ran.values()) == {calls, counts["full"]}
    assert report.flops < report.flops_plain
    assert unchanged(pipe, before)
    assert torch.equal(run(accelerated, kind, steps=10), latents)
    assert torch.equal(run(pipe, kind, steps=10), plain)
    assert "Cache-DiT" not in "".join(capfd.readouterr())


def test_the_kinds_cover_what_is_documented():
    assert promised() == {family(kind) for kind in FAMILIES} - {"hunyuan", "dit"}


def test_batched_pictures_of_other_shapes():
    """At a threshold from 1 on nothing depends on the batch."""
    accelerated = wrap(tiny_pipeline("flux-cfg"), dual(last_blocks=1))
    together = run(accelerated, "flux-cfg", batch=3, steps=10, size=(6, 10))
    assert accelerated.report.methods["block_cache"]["hits"] > 0
    assert any("dual_block decides for the whole batch" in note for note in accelerated.report.notes)
    alone = torch.cat([run(accelerated, "flux-cfg", first=k, steps=10, size=(6, 10)) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# --- counts ---


@pytest.mark.parametrize("threshold", [2.0, 0.4])
def test_flops_are_those_that_ran(threshold):
    """FLUX.2 has two stacks that decide by themselves, so calls may be full, hits or in between."""
    accelerated = wrap(tiny_pipeline("flux2-klein"), dual(threshold))
    with counted(accelerated.pipe) as ran:
        run(accelerated, "flux2-klein", steps=14)
    first, counts = accelerated.report.flops, accelerated.report.methods["block_cache"]
    _, hooked = count_flops(lambda: run(accelerated, "flux2-klein", steps=14))
    assert first == accelerated.report.flops == hooked
    partial = sum(value for name, value in counts.items() if name.startswith("partial of"))
    middles = ran["transformer_blocks.1"], ran["single_transformer_blocks.1"]
    assert sum(middles) == 2 * counts["full"] + partial
    assert counts["full"] + counts["hits"] + partial == 28
    assert (partial > 0) == (threshold < 1)
    plain = wrap(accelerated.pipe, [])
    run(plain, "flux2-klein", steps=14)
    assert accelerated.report.flops_plain == plain.report.flops


def test_hits_stay_inside_the_window_and_the_cap():
    accelerated = wrap(tiny_pipeline("flux-dev"), dual(window=(5.0, 0.2), max_hits=2))
    run(accelerated, "flux-dev", steps=20)
    outcomes = [("block_cache", "hits") in e.tags for e in accelerated.report.trace]
    assert all(0.2 <= e.sigma <= 5 for e, hit in zip(accelerated.report.trace, outcomes, strict=True) if hit)
    runs = "".join("h" if hit else "f" for hit in outcomes).split("f")
    assert max(map(len, runs)) == 2


def test_a_branch_that_was_left_out_comes_back_whole():
    """Guidance from 40 % to 70 % of the run: the first unconditional call is no hit; cache-dit itself counts parities."""
    recipe = [dual(), GuidanceInterval(start_fraction=0.4, stop_fraction=0.7)]
    accelerated = wrap(tiny_pipeline("flux-cfg"), recipe)
    run(accelerated, "flux-cfg", steps=10)
    counts = accelerated.report.methods["block_cache"]
    assert (counts["full of uncond"], counts["hits of uncond"]) == (1, 2)
    assert counts["full of cond"] + counts["hits of cond"] == 10


def test_a_run_without_hits_says_so():
    accelerated = wrap(tiny_pipeline("flux-dev"), dual(1e-12))
    run(accelerated, "flux-dev", steps=10)
    assert any("dual_block never had a hit" in note for note in accelerated.report.notes)


# --- ends of runs ---


class Stop(Exception):
    pass


def stored():
    """Tensors in contexts of cache-dit that are still in memory."""
    from cache_dit.caching.cache_contexts import CachedContext

    kept = [thing for thing in gc.get_objects() if type(thing) is CachedContext]
    return [name for context in kept for name in context.buffers]


def test_contexts_hold_tensors_while_a_run_lasts():
    """What `stored` finds, so that finding nothing after a run means something."""
    found = []

    def look(pipe, step, timestep, tensors):
        found.append(len(stored()))
        return tensors

    run(wrap(tiny_pipeline("flux-cfg"), dual()), "flux-cfg", steps=10, callback_on_step_end=look)
    assert found[0] == 6  # two branches, each with the residuals of the first and of the middle blocks and of the text
    assert stored() == []


@pytest.mark.parametrize("kind", ["flux-cfg", "sd3"])
def test_an_aborted_run_leaves_nothing(kind):
    pipe = tiny_pipeline(kind)
    plain = run(pipe, kind, steps=10)
    before = attributes(pipe)
    accelerated = wrap(pipe, dual())
    expected = run(accelerated, kind, steps=10)

    def stop(pipe, step, timestep, tensors):
        if step == 6:
            raise Stop
        return tensors

    with pytest.raises(Stop):
        run(accelerated, kind, steps=10, size=(6, 10), callback_on_step_end=stop)
    assert unchanged(pipe, before)
    assert stored() == []
    assert torch.equal(run(pipe, kind, steps=10), plain)
    assert torch.equal(run(accelerated, kind, steps=10), expected)
    assert stored() == []


def test_two_wrapped_pipelines_of_a_class_share_nothing():
    first, second = tiny_pipeline("flux-dev"), tiny_pipeline("flux-dev")
    plain = run(second, "flux-dev", steps=10)
    accelerated = wrap(first, dual())

    def other(pipe, step, timestep, tensors):
        if step == 5:
            assert torch.equal(run(second, "flux-dev", steps=10), plain)
        return tensors

    latents = run(accelerated, "flux-dev", steps=10)
    assert torch.equal(run(accelerated, "flux-dev", steps=10, callback_on_step_end=other), latents)


def test_compiled_blocks_and_offload_hooks_stay():
    latents = run(wrap(tiny_pipeline("flux-dev"), dual()), "flux-dev", steps=10)
    pipe = tiny_pipeline("flux-dev")
    add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu"))
    attach_align_device_hook(pipe.transformer, execution_device="cpu", offload=True)
    hooked = wrap(pipe, dual())
    assert torch.equal(run(hooked, "flux-dev", steps=10), latents)
    assert hooked.report.methods["block_cache"]["hits"] == 5
    pipe = tiny_pipeline("flux-dev")
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.compile(backend="eager")
    compiled = wrap(pipe, dual())
    for _ in range(2):  # the first run counts FLOPs, for which it runs uncompiled
        torch.testing.assert_close(run(compiled, "flux-dev", steps=10), latents)
    assert compiled.report.methods["block_cache"]["hits"] == 5


# --- refusals ---


def test_without_cache_dit_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(Unsupported, match="dual_block needs cache-dit; pip install cache-dit"):
        wrap(tiny_pipeline("flux-dev"), dual())


def test_cache_dit_is_imported_only_where_it_is_used():
    code = "import sys, diffaccel, diffaccel.methods; print('cache_dit' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_cache_of_the_user_is_left_alone():
    pipe = tiny_pipeline("flux-dev")
    accelerated = wrap(pipe, dual())
    with peers.cache_dit(pipe, hits=2):
        for use in (lambda: wrap(pipe, dual()), lambda: run(accelerated, "flux-dev")):
            with pytest.raises(Unsupported, match="cache-dit is enabled on FluxPipeline"):
                use()
    run(accelerated, "flux-dev", steps=10)
    assert accelerated.report.methods["block_cache"]["hits"] > 0


@pytest.mark.parametrize("kind", ["sd3-controlnet", "flux-controlnet"])
def test_controlnets_are_refused(kind):
    with pytest.raises(Unsupported, match="residuals of a ControlNet"):
        wrap(tiny_pipeline(kind), dual())


def test_stacks_without_a_middle_are_refused():
    with pytest.raises(Unsupported, match="leave none of the 4 blocks in transformer_blocks"):
        wrap(tiny_pipeline("sd3"), dual(first_blocks=3, last_blocks=1))


def test_single_layers_cannot_be_left_out():
    pipe = tiny_pipeline("sd3")
    before = attributes(pipe)
    with pytest.raises(Unsupported, match="skip_guidance_layers"):
        run(wrap(pipe, dual()), "sd3", steps=10, skip_guidance_layers=[1], skip_layer_guidance_start=0.0)
    assert attributes(pipe)[0] == before[0]


def test_a_network_that_does_not_run_its_lists_is_noticed():
    pipe = tiny_pipeline("wan")
    blocks, network = pipe.transformer.blocks, pipe.transformer
    accelerated = wrap(pipe, dual())
    forward = network.forward

    def own_loop(*args, **kwargs):
        given = vars(network).pop("blocks")
        try:
            return forward(*args, **kwargs)
        finally:
            object.__setattr__(network, "blocks", given)

    network.forward = own_loop
    with pytest.raises(Unsupported, match="does not run the blocks that cache-dit put in its place"):
        run(accelerated, "wan", steps=10)
    assert network.blocks is blocks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "first_block", "first_blocks": 2}, "first_blocks is a setting of dual_block"),
        ({"kind": "pyramid", "last_blocks": 1}, "last_blocks is a setting of dual_block"),
        ({"kind": "dual_block", "interval": 3}, "interval is a setting of taylor and pyramid"),
        ({"kind": "dual_block", "first_blocks": 0}, "greater than or equal to 1"),
        ({"kind": "dual_block", "last_blocks": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockCache(**settings)

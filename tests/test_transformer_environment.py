"""Methods beside what people put on a transformer: caches, quantised and offloaded weights, compilers, wrappers."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from independent import network_flops
from tiny_transformers import run, tiny_inputs, tiny_pipeline
from torch import nn

import diffaccel
from diffaccel import (
    BlockCache,
    Forecast,
    GuidanceInterval,
    NormalizedAttentionGuidance,
    RegionSampling,
    ResidualCache,
    SkipCache,
    SparseAttention,
    StepReuse,
    StepSchedule,
    TokenMerging,
    Unsupported,
)


def close(a, b):
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


@contextmanager
def attention_backend(pipe, name):
    """diffusers sets it for the network and for every network made later."""
    active = _AttentionBackendRegistry._active_backend
    pipe.transformer.set_attention_backend(name)
    try:
        yield
    finally:
        _AttentionBackendRegistry._active_backend = active


# --- counting ---


def _no_counter(module, args):
    torch._assert(not torch._C._len_torch_dispatch_stack(), "this kernel takes no modes")


@pytest.mark.parametrize("recipe", [[], Forecast(interval=3, min_evaluations=1)], ids=["off", "forecast"])
def test_where_flops_cannot_be_counted_the_call_runs_and_the_report_says_so(recipe):
    pipe = tiny_pipeline("flux-dev")
    fast = diffaccel.wrap(pipe, recipe)
    want = run(fast, "flux-dev", steps=5)
    pipe.transformer.single_transformer_blocks[1].register_forward_pre_hook(_no_counter)
    fast = diffaccel.wrap(pipe, recipe)
    assert torch.equal(run(fast, "flux-dev", steps=5), want)
    report = fast.report
    assert (report.flops, report.flops_plain, report.counted) == (0, 0, False)
    assert math.isnan(report.flops_ratio)
    assert "FLOPs         not counted" in str(report)
    failure = "(AssertionError: this kernel takes no modes)"
    assert report.notes == (f"FLOPs are not counted: counting does not work inside this network {failure}.",)


def test_flex_attention_runs_and_is_counted():
    """An operator of higher order, which torch's own counter refuses."""
    pipe = tiny_pipeline("flux-dev")
    fast = diffaccel.wrap(pipe, [])
    want = run(fast, "flux-dev", steps=2)
    flops = fast.report.flops
    fast = diffaccel.wrap(pipe, [])
    with attention_backend(pipe, "flex"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch recommends to compile it
        assert close(run(fast, "flux-dev", steps=2), want)
    assert fast.report.flops in (0, flops)
    assert fast.report.counted == bool(fast.report.flops)


def test_a_block_that_knows_its_network_is_counted():
    """As ParaAttention and cache-dit leave them: the tree of modules has a circle."""
    pipe = tiny_pipeline("flux-dev")
    fast = diffaccel.wrap(pipe, [])
    run(fast, "flux-dev", steps=2)
    want = fast.report.flops
    pipe.transformer.transformer_blocks[0].parent_network = pipe.transformer
    fast = diffaccel.wrap(pipe, [])
    run(fast, "flux-dev", steps=2)
    assert fast.report.flops == want


# --- caches that the user enabled ---

ENABLED = {
    "first block": FirstBlockCacheConfig(threshold=0.5),
    "mag": MagCacheConfig(
        threshold=10.0, num_inference_steps=8, mag_ratios=torch.ones(8), retention_ratio=0.1, max_skip_steps=2
    ),
}


@pytest.mark.parametrize("name", ENABLED)
def test_hits_of_a_cache_that_the_user_enabled_are_counted_as_hits(name):
    pipe = tiny_pipeline("flux-dev")
    off = diffaccel.wrap(pipe, [])
    run(off, "flux-dev")
    whole = off.report.flops
    pipe.transformer.enable_cache(ENABLED[name])
    stock = run(pipe, "flux-dev")
    off = diffaccel.wrap(pipe, [])
    for _ in range(2):
        assert torch.equal(run(off, "flux-dev"), stock)
        assert off.report.flops == off.report.flops_plain < whole
    assert off.report.flops == network_flops(pipe, lambda: run(pipe, "flux-dev"))
    with pytest.raises(Unsupported, match="a cache of diffusers is enabled on this FluxTransformer2DModel already"):
        diffaccel.wrap(pipe, BlockCache(kind="dual_block", first_blocks=1))


# --- calls of different cost ---


@pytest.mark.parametrize("recipe", [Forecast(min_evaluations=1), StepReuse(threshold=1e9)], ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "sd3.5-medium",
            {"skip_guidance_layers": [1, 2], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.6},
        ),
        ("lumina2", {}),  # its negative prompt is a token shorter
    ],
)
def test_the_plain_cost_knows_that_calls_differ(kind, settings, recipe):
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, recipe)
    run(fast, kind, steps=10, **settings)
    plain = network_flops(pipe, lambda: run(pipe, kind, steps=10, **settings))
    assert fast.report.flops_plain == plain > 1.2 * fast.report.flops


# --- packed weights ---


class PackedLinear(nn.Module):
    """As quantisers leave a layer: 8-bit integers, unpacked and multiplied by operators that torch has no FLOPs for."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = float(layer.weight.detach().abs().max()) / 127
        packed = (layer.weight / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def unpacked(self):
        return self.weight.view(torch.int8).float() * self.scale

    def forward(self, x):
        product = (x.unsqueeze(-2) * self.unpacked()).sum(-1)
        return product if self.bias is None else product + self.bias


def quantised(pipe):
    """Packs all linear layers; returns the same pipeline with the same values unpacked."""
    plain = tiny_pipeline("flux-dev")
    for name, layer in list(pipe.transformer.named_modules()):
        if type(layer) is nn.Linear:
            pipe.transformer.set_submodule(name, PackedLinear(layer))
            plain.transformer.get_submodule(name).weight.data = pipe.transformer.get_submodule(name).unpacked()
    assert next(pipe.transformer.parameters()).dtype == torch.uint8
    return plain


@pytest.mark.parametrize(
    "recipe",
    [
        BlockCache(kind="taylor", interval=3, target="output"),
        BlockCache(kind="taylor", interval=3, target="attention"),
        ResidualCache(),
        TokenMerging(min_tokens=1),
    ],
    ids=["taylor output", "taylor attention", "residual", "merging"],
)
def test_packed_weights_compute_and_count_as_plain_ones(recipe):
    pipe = tiny_pipeline("flux-dev")
    plain = quantised(pipe)
    want, got = diffaccel.wrap(plain, recipe), diffaccel.wrap(pipe, recipe)
    assert close(run(got, "flux-dev", steps=10), run(want, "flux-dev", steps=10))
    assert (got.report.flops, got.report.flops_plain) == (want.report.flops, want.report.flops_plain)
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


# --- offloading in groups ---


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("sd3", ResidualCache()),
        ("qwen-image", BlockCache(kind="dual_block", threshold=10.0, first_blocks=1, last_blocks=1)),
        ("hunyuan", SkipCache()),
        ("sd", SkipCache(interval=3, depth=1, min_evaluations=1)),
    ],
)
def test_a_group_is_loaded_though_its_first_block_does_not_run(kind, recipe, tmp_path):
    """Two blocks share a file; the first one loads it, and a cached evaluation leaves just that one out."""
    maker = tiny if kind == "sd" else None
    pipe = tiny.tiny_pipeline(kind) if maker else tiny_pipeline(kind)
    network = pipe.unet if maker else pipe.transformer

    def picture(p):
        return tiny.run(p, kind) if maker else run(p, kind, steps=10)

    want = picture(diffaccel.wrap(pipe, recipe))
    cpu = torch.device("cpu")
    apply_group_offloading(
        network,
        onload_device=cpu,
        offload_device=cpu,
        offload_type="block_level",
        num_blocks_per_group=2,
        offload_to_disk_path=str(tmp_path),
    )
    stock, fast = picture(pipe), diffaccel.wrap(pipe, recipe)
    for _ in range(2):
        assert close(picture(fast), want)
    assert fast.report.flops < fast.report.flops_plain
    assert torch.equal(picture(pipe), stock)
    groups = [
        m._diffusers_hook.get_hook("group_offloading") for m in network.modules() if hasattr(m, "_diffusers_hook")
    ]
    assert not any("onload_" in vars(hook.group) for hook in groups if hook is not None)


# --- torch.compile ---


class Counting:
    """A compiler that leaves graphs as they are and counts."""

    def __init__(self):
        self.compiled = self.ran = 0

    def __call__(self, graph, example_inputs):
        self.compiled += 1

        def forward(*args):
            self.ran += 1
            return graph.forward(*args)

        return forward


def _as_a_module(pipe, backend):
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)


def _in_place(pipe, backend):
    pipe.transformer.compile(backend=backend)


def _its_forward(pipe, backend):
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend=backend)


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [_as_a_module, _in_place, _its_forward])
def test_a_network_compiled_as_a_whole(compiled, backend):
    """Methods that need only its call stand around it; the others are refused, when wrapping and in the call."""
    pipe = tiny_pipeline("sd3")
    recipe = [GuidanceInterval(start_fraction=0.0, stop_fraction=1.0), StepReuse(threshold=1e9, min_evaluations=1)]
    want, early = run(diffaccel.wrap(pipe, recipe), "sd3"), diffaccel.wrap(pipe, ResidualCache())
    compiled(pipe, backend)
    stock = run(pipe, "sd3")
    graphs = backend.compiled
    fast = diffaccel.wrap(pipe, recipe)
    assert close(run(fast, "sd3"), want)
    assert fast.report.methods["step_reuse"]["reused"] > 0
    advice = r"compile its blocks one by one instead \(for block in list\(pipe.transformer.transformer_blocks\)"
    for attempt in (lambda: diffaccel.wrap(pipe, ResidualCache()), lambda: run(early, "sd3")):
        with pytest.raises(Unsupported, match=f"residual_cache acts inside .*, which is compiled as a whole; {advice}"):
            attempt()
    backend.ran = 0
    assert torch.equal(run(pipe, "sd3"), stock)
    assert (backend.compiled, backend.ran) == (graphs, 8 * graphs)


def test_the_advice_fits_the_network():
    pipe = tiny_pipeline("flux-dev")
    pipe.transformer.compile(backend="eager")
    with pytest.raises(Unsupported, match=r"instead \(pipe.transformer.compile_repeated_blocks\(\)\)"):
        diffaccel.wrap(pipe, "balanced")


def test_blocks_compiled_one_by_one(backend):
    """Caches stand around the blocks; what acts within them is refused."""
    pipe = tiny_pipeline("sd3")
    want = run(diffaccel.wrap(pipe, ResidualCache(min_evaluations=1)), "sd3", steps=5)
    blocks = pipe.transformer.transformer_blocks
    for index, block in enumerate(list(blocks)):
        blocks[index] = torch.compile(block, backend=backend)
    stock = run(pipe, "sd3", steps=5)
    graphs, ran = backend.compiled, backend.ran
    fast = diffaccel.wrap(pipe, ResidualCache(min_evaluations=1))
    assert close(run(fast, "sd3", steps=5), want)
    for method in (TokenMerging(min_tokens=1), SparseAttention(), RegionSampling(), BlockCache(kind="pyramid")):
        with pytest.raises(Unsupported, match=r"compiled|no caches"):
            diffaccel.wrap(pipe, method)
    backend.ran = 0
    assert torch.equal(run(pipe, "sd3", steps=5), stock)
    assert (backend.compiled, backend.ran) == (graphs, ran)


# --- what stands around the network ---


def test_a_peft_model_around_the_network():
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline("flux-dev")
    pipe.transformer = peft.get_peft_model(pipe.transformer, peft.LoraConfig(r=2, target_modules=["to_q"]))
    stock = run(pipe, "flux-dev")
    assert torch.equal(run(diffaccel.wrap(pipe, []), "flux-dev"), stock)
    fast = diffaccel.wrap(pipe, Forecast(min_evaluations=1))
    run(fast, "flux-dev")
    assert fast.report.methods["forecast"]["cached"] > 0
    assert torch.equal(run(pipe, "flux-dev"), stock)


def test_data_parallel_is_refused_with_the_reason():
    pipe = tiny_pipeline("flux-dev")
    pipe.transformer = nn.DataParallel(pipe.transformer)
    with pytest.raises(Unsupported, match="this FluxTransformer2DModel is inside a DataParallel, which copies it"):
        diffaccel.wrap(pipe, [])


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (BlockCache(kind="first_block"), "processes could wait for each other for ever"),
        (BlockCache(kind="dual_block", first_blocks=1), "processes could wait for each other for ever"),
        (RegionSampling(), "region_sampling needs all tokens of a picture in one place"),
        (TokenMerging(), "token_merging needs all tokens of a picture in one place"),
        (ResidualCache(keep_first=0), "the first block may be the one that divides the tokens"),
        (Forecast(target="residual"), "the first block may be the one that divides the tokens"),
    ],
)
def test_processes_that_share_a_picture_decide_alike_or_not_at_all(recipe, reason):
    """A rule that sees one process's tokens may say yes here and no there, and then each waits for the other."""
    pipe = tiny_pipeline("flux-dev")
    pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    with pytest.raises(Unsupported, match=reason):
        diffaccel.wrap(pipe, recipe)
    diffaccel.wrap(pipe, ResidualCache())


# --- calls ---


class Passing(diffusers.FluxPipeline):
    """A user's own class, whose signature says nothing."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{"num_inference_steps": 5, **kwargs})


def test_a_step_count_that_only_the_pipeline_knows():
    pipe = tiny_pipeline("flux-dev")
    pipe.__class__ = Passing
    inputs = tiny_inputs("flux-dev")
    steps = inputs.pop("num_inference_steps")
    fast = diffaccel.wrap(pipe, StepSchedule(fraction=0.5))
    with pytest.raises(
        Unsupported, match="Passing does not say how many steps it takes by default; give num_inference"
    ):
        fast(**inputs)
    fast(**inputs, num_inference_steps=steps)
    assert fast.report.steps == steps // 2


def test_one_text_for_several_pictures_under_negative_guidance():
    """FLUX repeats given embeddings inside the network, by its modulations."""
    pipe = tiny_pipeline("flux-dev")
    text = {name: value for name, value in tiny_inputs("flux-cfg").items() if name.startswith("negative")}

    def pictures(p, count, first=0):
        seeds = [torch.Generator().manual_seed(first + k) for k in range(count)]
        return run(p, "flux-dev", steps=3, num_images_per_prompt=count, generator=seeds, **text)

    fast = diffaccel.wrap(pipe, NormalizedAttentionGuidance())
    both = pictures(fast, 2)
    assert close(both, torch.cat([pictures(fast, 1), pictures(fast, 1, first=1)]))
    assert not close(both, pictures(pipe, 2))


@pytest.mark.parametrize("kind", ["sd3", "lumina2"])
@pytest.mark.parametrize(
    "recipe",
    [[], Forecast(min_evaluations=1), ResidualCache(min_evaluations=1), StepReuse(threshold=0.2, min_evaluations=1)],
    ids=["off", "forecast", "residual", "reuse"],
)
def test_one_text_for_several_pictures(kind, recipe):
    """Given embeddings are not repeated by the pipeline; every picture is the one that it is alone."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, recipe)

    def pictures(*seeds):
        makers = [torch.Generator().manual_seed(seed) for seed in seeds]
        return run(fast, kind, guidance=1.0, num_images_per_prompt=len(seeds), generator=makers)

    assert close(pictures(3, 4), torch.cat([pictures(3), pictures(4)]))


def test_a_backend_without_masks_cannot_weigh_merged_tokens():
    pipe = tiny_pipeline("flux-dev")
    fast = diffaccel.wrap(pipe, TokenMerging(proportional=True, min_tokens=1))
    reason = "proportional needs an attention that takes masks, and the backend set on"
    with attention_backend(pipe, "_native_flash"), pytest.raises(Unsupported, match=reason):
        run(fast, "flux-dev", steps=2)


@pytest.mark.slow
def test_two_processes_of_one_picture_decide_alike():
    """Under context parallelism a process that reused what the other one computes would wait for it for ever."""
    folder = Path(__file__).parent
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    done = subprocess.run(
        [sys.executable, *command, "localhost:0", str(folder / "two_processes.py")],
        env=os.environ | {"PYTHONPATH": f"{folder.parent}:{folder}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [name for name, _, _ in found] == ["forecast", "residual_cache", "step_reuse", "mag"], done.stderr
    assert all(first == second for _, first, second in found), found
    assert all(re.search(r'"(cached|reused|hits)": [1-9]', first) for _, first, _ in found), found

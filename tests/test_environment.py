"""Methods beside what else people attach to a pipeline: LoRA, IP-Adapter, FreeU, fused projections, compilers, offloading."""

from __future__ import annotations

import warnings

import accelerate
import pytest
import torch
from diffusers import ControlNetUnionModel, StableDiffusionPipeline, StableDiffusionXLControlNetUnionPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from independent import counted_rows, network_flops
from tiny import WIDTH, run, tiny_inputs, tiny_pipeline

import diffaccel
from diffaccel import (
    AdaptiveGuidance,
    GuidanceInterval,
    SkipCache,
    SparseCrossAttention,
    StepReuse,
    TokenDownsampling,
    TokenMerging,
    Unsupported,
)

METHODS = {
    "guidance_interval": GuidanceInterval(high=6.0, low=0.5),
    "adaptive_guidance": AdaptiveGuidance(threshold=0.999),
    "skip_cache": SkipCache(interval=3, depth=2),
    "token_merging": TokenMerging(min_tokens=1),
    "token_downsampling": TokenDownsampling(min_tokens=1),
}
TOGETHER = [GuidanceInterval(high=6.0, low=0.5), SkipCache(interval=3, order=1), TokenMerging(min_tokens=64)]


def full_evaluations(report):
    return [e.evaluation for e in report.trace if e.network == "denoiser" and not any(t[0] == "skip" for t in e.tags)]


def at_step(step, action):
    """A callback that does something to the pipeline once."""

    def callback(pipe, index, t, tensors):
        if index == step:
            action(pipe)
        return {}

    return {"callback_on_step_end": callback}


# --- LoRA ---


class NoText(torch.nn.Linear):
    """Stands where Stable Diffusion sets a LoRA scale in its text encoder; prompts come as embeddings."""

    dtype = torch.float32
    device = torch.device("cpu")


def with_lora(pipe):
    pipe.text_encoder = NoText(1, 1)
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    for name, weight in pipe.unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return pipe


@pytest.fixture(scope="module")
def lora():
    return with_lora(tiny_pipeline("sd"))


@pytest.mark.parametrize("name", METHODS)
def test_lora(lora, name):
    """LoRA layers stay in place, their scale still counts, and nothing is left behind."""
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    stock = lora(**tiny_inputs("sd") | scaled).images
    fast = diffaccel.wrap(lora, METHODS[name])
    half, whole = fast(**tiny_inputs("sd") | scaled).images, run(fast, "sd")
    assert (half - whole).abs().max() > 1e-3
    assert torch.equal(half, fast(**tiny_inputs("sd") | scaled).images)
    assert torch.equal(stock, lora(**tiny_inputs("sd") | scaled).images)
    plain = diffaccel.wrap(tiny_pipeline("sd"), METHODS[name])
    assert (run(plain, "sd") - whole).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_a_constant_lora_scale_forces_nothing(lora, scale):
    """peft multiplies and divides its scaling in every forward, which rounds."""
    fast = diffaccel.wrap(lora, SkipCache(interval=4))
    fast(**tiny_inputs("sd", steps=12) | {"cross_attention_kwargs": {"scale": scale}})
    assert full_evaluations(fast.report) == [0, 4, 8, 11]
    assert not any("forced" in name for name in fast.report.methods["skip_cache"])


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.unet.set_adapters("default", 0.3),
        lambda pipe: pipe.unet.disable_adapters(),
        lambda pipe: pipe._cross_attention_kwargs.update(scale=0.1),
    ],
    ids=["weight", "off", "scale"],
)
def test_a_lora_change_forces_a_full_evaluation(change):
    pipe = with_lora(tiny_pipeline("sd"))
    fast = diffaccel.wrap(pipe, SkipCache(interval=50, full_last=0))
    fast(**tiny_inputs("sd", steps=12) | {"cross_attention_kwargs": {"scale": 0.8}}, **at_step(4, change))
    assert full_evaluations(fast.report) == [0, 5]


def test_counts_follow_a_lora_that_comes_between_two_calls():
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, [])
    run(fast, "sd", steps=2)
    before = fast.report.flops
    with_lora(pipe)
    run(fast, "sd", steps=2)
    assert fast.report.flops == network_flops(pipe, lambda: run(pipe, "sd", steps=2)) > before
    pipe.unet.disable_adapters()
    run(fast, "sd", steps=2)
    assert fast.report.flops == before


# --- IP-Adapter ---


def ip_adapter_weights(unet, seed):
    """Random weights in the published file format."""
    torch.manual_seed(seed)
    projection = ImageProjection(cross_attention_dim=WIDTH, image_embed_dim=WIDTH, num_image_text_embeds=4).state_dict()
    names = {"image_embeds.weight": "proj.weight", "image_embeds.bias": "proj.bias"}
    weights, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            size = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            made = IPAdapterAttnProcessor2_0(size, WIDTH, num_tokens=(4,)).state_dict()
            weights |= {f"{number}.to_{x}_ip.weight": made[f"to_{x}_ip.0.weight"] for x in "kv"}
            number += 2
    return {"image_proj": {names.get(key, key): value for key, value in projection.items()}, "ip_adapter": weights}


@pytest.fixture(scope="module")
def ip():
    """A pipeline with two image adapters, and the pictures given to them: (negative, positive) rows, one and two each."""
    pipe = tiny_pipeline("sd")
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet, 1), ip_adapter_weights(pipe.unet, 2)])
    maker = torch.Generator().manual_seed(6)
    return pipe, [torch.randn(2, n, WIDTH, generator=maker) for n in (1, 2)]


def ip_inputs(embeds, **options):
    return tiny_inputs("sd", **options) | {"ip_adapter_image_embeds": list(embeds)}


@pytest.mark.parametrize("name", [*METHODS, "together"])
def test_two_ip_adapters(ip, name):
    pipe, embeds = ip
    stock = pipe(**ip_inputs(embeds)).images
    fast = diffaccel.wrap(pipe, METHODS.get(name) or TOGETHER)
    with counted_rows(pipe) as rows:
        first = fast(**ip_inputs(embeds)).images
    assert fast.report.rows == sum(rows)
    assert fast.report.flops < fast.report.flops_plain
    assert torch.equal(first, fast(**ip_inputs(embeds)).images)
    assert (first - fast(**ip_inputs([e.flip(1) * 2 for e in embeds])).images).abs().max() > 1e-4  # they matter
    assert torch.equal(stock, pipe(**ip_inputs(embeds)).images)


def test_dropping_guidance_keeps_the_positive_pictures(ip):
    """Unguided from the start equals the stock pipeline without guidance, which takes the positive rows only."""
    pipe, embeds = ip
    fast = diffaccel.wrap(pipe, GuidanceInterval(stop_fraction=0.0))
    got = fast(**ip_inputs(embeds)).images
    assert {e.rows for e in fast.report.trace} == {1}
    want = pipe(**ip_inputs([e[1:] for e in embeds]) | {"guidance_scale": 1.0}).images
    wrong = pipe(**ip_inputs([e[:1] for e in embeds]) | {"guidance_scale": 1.0}).images
    assert (got - want).abs().max() < 1e-5
    assert (got - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["guidance_interval", "adaptive_guidance", "step_reuse"])
@pytest.mark.parametrize("given", ["one tensor", "a list"])
def test_masks_of_ip_adapters_are_never_cut(ip, name, given):
    """`IPAdapterMaskProcessor` returns one tensor with a row per adapter: as many as there are rows of this call."""
    pipe, embeds = ip
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :, :16] = masks[1, :, :, 16:] = 1
    per_picture = [masks[:1], masks.transpose(0, 1)]  # the second adapter has two pictures
    swapped = [masks[1:], masks.flip(0).transpose(0, 1)]
    fast = diffaccel.wrap(pipe, METHODS.get(name) or StepReuse(threshold=1e9))

    def call(masks):
        inputs = ip_inputs([embeds[0], embeds[0]] if given == "one tensor" else embeds)
        return fast(**inputs | {"cross_attention_kwargs": {"ip_adapter_masks": masks}}).images

    got = call(masks if given == "one tensor" else per_picture)
    assert fast.report.rows < 20
    assert not torch.equal(got, call(masks.flip(0) if given == "one tensor" else swapped))


class Tilting:
    """A user's attention processor with an input of its own, (1, any) or (any, any)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, tilt=None, **more):
        return hidden_states + tilt.sum()


def test_a_tensor_of_unknown_role_is_not_cut_by_its_size():
    """Beside two rows, two of something may be their rows or not."""
    pipe = tiny_pipeline("sd")
    pipe.unet.set_attn_processor(Tilting())
    fast = diffaccel.wrap(pipe, GuidanceInterval(stop_fraction=0.5))

    def call(p, tilt):
        return p(**tiny_inputs("sd", steps=4) | {"cross_attention_kwargs": {"tilt": tilt}}).images

    for shape in ((3, 2), (1, 2, 2)):
        call(fast, torch.ones(shape))
        assert fast.report.rows == 6
    for tilt in (torch.ones(2, 2), torch.ones(2)):
        with pytest.raises(
            Unsupported, match=r"cross_attention_kwargs\['tilt'\] has as many rows as the network got \(2\)"
        ):
            call(fast, tilt)
    cached = diffaccel.wrap(pipe, SkipCache(interval=2, min_evaluations=1))  # computes all rows or none
    assert torch.equal(call(cached, torch.ones(2)), call(cached, torch.ones(2)))


def test_a_new_ip_adapter_scale_forces_a_full_evaluation(ip):
    pipe, embeds = ip

    def scale(value):
        for processor in pipe.unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [value, value]

    fast = diffaccel.wrap(pipe, SkipCache(interval=50, full_last=0))
    fast(**ip_inputs(embeds, steps=12), **at_step(4, lambda _: scale(0.2)))
    scale(1.0)
    assert full_evaluations(fast.report) == [0, 5]


# --- FreeU, prompts, ControlNet ---

FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}


@pytest.mark.parametrize("name", METHODS)
def test_freeu_on_and_off(name):
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, METHODS[name])
    off, stock = run(fast, "sd"), run(pipe, "sd")
    pipe.enable_freeu(**FREEU)
    on = run(fast, "sd")
    assert not torch.equal(on, off)
    assert torch.equal(on, run(fast, "sd"))
    pipe.disable_freeu()
    assert torch.equal(run(fast, "sd"), off)
    assert torch.equal(run(pipe, "sd"), stock)


def test_freeu_toggled_in_a_run_forces_a_full_evaluation():
    fast = diffaccel.wrap(tiny_pipeline("sd"), SkipCache(interval=50, full_last=0))
    fast(**tiny_inputs("sd", steps=12), **at_step(4, lambda pipe: pipe.enable_freeu(**FREEU)))
    assert full_evaluations(fast.report) == [0, 5]


@pytest.mark.parametrize("tensor", ["prompt_embeds", "add_text_embeds", "add_time_ids"])
def test_new_conditions_from_a_callback_force_a_full_evaluation(tensor):
    """SDXL, with every kind of condition its callbacks can exchange; equal values in new memory force nothing."""
    for factor, full in ((0.5, [0, 5]), (1.0, [0])):

        def swap(pipe, index, t, tensors, factor=factor):
            return {tensor: tensors[tensor] * factor} if index == 4 else {}

        fast = diffaccel.wrap(tiny_pipeline("sdxl"), SkipCache(interval=50, full_last=0))
        settings = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": [tensor]}
        fast(**tiny_inputs("sdxl", steps=12), **settings)
        assert full_evaluations(fast.report) == full


@pytest.mark.parametrize("kind", ["controlnet", "multi-controlnet", "sdxl-controlnet"])
def test_controlnets_that_start_late_and_end_early(kind):
    """Their switching forces full evaluations; guidance and tokens do not mind."""
    pipe = tiny_pipeline(kind)
    times = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    inputs = tiny_inputs(kind, steps=12) | times
    stock = pipe(**inputs).images
    fast = diffaccel.wrap(pipe, SkipCache(interval=50, full_last=0))
    inputs = tiny_inputs(kind, steps=12) | times
    fast(**inputs)
    assert full_evaluations(fast.report) == [0, 3, 9]
    every = diffaccel.wrap(pipe, SkipCache(schedule=tuple(range(12))))
    assert torch.equal(every(**tiny_inputs(kind, steps=12) | times).images, stock)
    both = diffaccel.wrap(pipe, [GuidanceInterval(low=0.5), TokenMerging(min_tokens=64)])
    with counted_rows(pipe) as rows:
        both(**tiny_inputs(kind, steps=12) | times)
    assert sum(rows) == both.report.rows < 24


def union_pipeline():
    """SDXL with a ControlNet that serves several kinds of control pictures; every row says of which kind its own is."""
    pipe = tiny_pipeline("sdxl-controlnet")
    small = {"num_trans_channel": 8, "num_trans_head": 2, "num_trans_layer": 1, "num_proj_channel": 8}
    small |= {"conditioning_embedding_out_channels": (8, 8)}
    config = ControlNetUnionModel.from_unet(pipe.unet).config
    torch.manual_seed(3)
    union = ControlNetUnionModel(**{name: config[name] for name in config if name[0] != "_"} | small).eval()
    union.controlnet_cond_embedding = pipe.controlnet.controlnet_cond_embedding
    for block in [*union.controlnet_down_blocks, union.controlnet_mid_block, union.spatial_ch_projs]:
        torch.nn.init.normal_(block.weight, std=0.2)
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    pipe = StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=union)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def union_pictures(pipe, **changes):
    inputs = tiny_inputs("sdxl-controlnet", steps=9, images=2)
    inputs |= {"control_image": [inputs.pop("image")], "control_mode": [1]}
    del inputs["guess_mode"]
    return pipe(**inputs | changes).images


def test_a_union_controlnet_gets_the_kinds_of_its_rows():
    pipe = union_pipeline()
    stock = union_pictures(pipe)
    assert not torch.equal(stock, union_pictures(pipe, control_mode=[2]))
    fast = diffaccel.wrap(pipe, [GuidanceInterval(stop_fraction=0.0)])
    assert torch.allclose(union_pictures(fast), union_pictures(pipe, guidance_scale=1.0), atol=1e-5)
    assert fast.report.rows == 18
    fast = diffaccel.wrap(pipe, [StepReuse(threshold=1e9), AdaptiveGuidance(threshold=0.5)])
    union_pictures(fast)
    assert fast.report.completed
    assert fast.report.methods["step_reuse"]["reused"] > 0
    assert torch.equal(union_pictures(pipe), stock)


# --- fused projections ---


def test_fused_projections():
    """Downsampling needs them apart and says so, before and after wrapping; everything else works."""
    pipe = tiny_pipeline("sd")
    apart = {name: run(diffaccel.wrap(pipe, method), "sd") for name, method in METHODS.items()}
    early = diffaccel.wrap(pipe, METHODS["token_downsampling"])
    pipe.fuse_qkv_projections()
    sentence = "needs separate query and key projections; call unfuse_qkv_projections"
    with pytest.raises(Unsupported, match=sentence):
        diffaccel.wrap(pipe, METHODS["token_downsampling"])
    with pytest.raises(Unsupported, match=sentence):
        run(early, "sd")
    for name in set(METHODS) - {"token_downsampling"}:
        fast = diffaccel.wrap(pipe, METHODS[name])
        assert (run(fast, "sd") - apart[name]).abs().max() < 1e-3
    pipe.unfuse_qkv_projections()
    assert (run(early, "sd") - apart["token_downsampling"]).abs().max() < 1e-5


# --- torch.compile ---


@pytest.fixture
def counting_backend():
    """A compiler that leaves graphs as they are and counts how many it got and how often they ran."""
    torch._dynamo.reset()
    counts = {"compiled": 0, "ran": 0}

    def backend(graph, example_inputs):
        counts["compiled"] += 1

        def forward(*args):
            counts["ran"] += 1
            return graph.forward(*args)

        return forward

    def taken():
        seen = tuple(counts.values())
        counts.update(compiled=0, ran=0)
        return seen

    yield backend, taken
    torch._dynamo.reset()


@pytest.mark.slow
# The cache and adaptive guidance work outside the blocks, where nothing of SDXL differs from SD.
@pytest.mark.parametrize(
    ("kind", "name"),
    [("sd", name) for name in [*METHODS, "together"]]
    + [("sdxl", name) for name in [*METHODS, "together"] if name not in ("adaptive_guidance", "skip_cache")],
)
def test_compiled_blocks(kind, name, counting_backend):
    """Same pictures; graphs are reused over runs; the stock pipeline keeps its own graphs, bit for bit."""
    backend, taken = counting_backend
    pipe = tiny_pipeline(kind)
    recipe = METHODS.get(name) or TOGETHER
    want = run(diffaccel.wrap(pipe, recipe), kind)
    pipe.unet.compile_repeated_blocks(backend=backend)
    stock = run(pipe, kind)
    compiled, ran = taken()
    assert compiled
    assert ran
    fast = diffaccel.wrap(pipe, recipe)
    pictures = [run(fast, kind)]
    assert taken()[1] > 0
    for _ in range(2):
        pictures.append(run(fast, kind))
        compiled, ran_fast = taken()
        assert compiled == 0
        assert ran_fast > 0
    assert (pictures[0] - want).abs().max() < 1e-4
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[1], pictures[2])
    assert torch.equal(run(pipe, kind), stock)
    assert taken() == (0, ran)  # counting FLOPs must not leave the blocks uncompiled


def test_a_counted_call_does_not_keep_blocks_from_being_compiled(counting_backend):
    """Accelerated first, before anything was compiled."""
    backend, taken = counting_backend
    pipe = tiny_pipeline("sd")
    pipe.unet.compile_repeated_blocks(backend=backend)
    run(diffaccel.wrap(pipe, []), "sd", steps=3)
    compiled, ran = taken()
    assert compiled > 0
    run(pipe, "sd", steps=3)
    assert taken() == (0, ran // 2 * 3)  # of three evaluations the first was counted


def test_what_acts_inside_a_network_compiled_as_a_whole_is_refused():
    pipe = tiny_pipeline("sd")
    stock = run(pipe, "sd", steps=2)
    early = diffaccel.wrap(pipe, TOGETHER)
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    sentence = r"compiled as a whole; compile its repeated blocks instead \(pipe.unet.compile_repeated_blocks\(\)\)"
    for attempt in (lambda: diffaccel.wrap(pipe, TOGETHER), lambda: run(early, "sd")):
        with pytest.raises(Unsupported, match=sentence):
            attempt()
    assert torch.allclose(run(diffaccel.wrap(pipe, []), "sd", steps=2), stock, atol=1e-5)
    pipe.unet = unet
    unet.up_blocks[0] = torch.compile(unet.up_blocks[0], backend="eager")
    with pytest.raises(Unsupported, match=r"replaced by torch.compile\(block\).*compile blocks in place instead"):
        diffaccel.wrap(pipe, [])
    unet.up_blocks[0] = unet.up_blocks[0]._orig_mod
    unet.compile(backend="eager")
    with pytest.raises(Unsupported, match=sentence):
        run(early, "sd")
    unet._compiled_call_impl = None
    assert torch.equal(run(pipe, "sd", steps=2), stock)


# --- offloading ---


@pytest.mark.parametrize("name", [*METHODS, "together"])
def test_sequential_offload(name):
    """Every layer's weights come and go during the run; three pictures in a row are those without offloading."""
    pipe = tiny_pipeline("sd")
    recipe = METHODS.get(name) or TOGETHER
    want, stock = run(diffaccel.wrap(pipe, recipe), "sd"), run(pipe, "sd")
    for model in (
        pipe.unet,
        pipe.vae,
    ):  # all of them, as enable_sequential_cpu_offload does: diffusers asks any for the device
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    fast = diffaccel.wrap(pipe, recipe)
    before = {name: vars(m).get("forward") for name, m in pipe.unet.named_modules()}
    for _ in range(3):
        assert torch.equal(run(fast, "sd"), want)
        assert all(p.device.type == "meta" for p in pipe.unet.parameters())
        after = {name: vars(m).get("forward") for name, m in pipe.unet.named_modules()}
        assert all(after[name] is before[name] for name in before)
    assert torch.equal(run(pipe, "sd"), stock)


class OffloadedPipeline(StableDiffusionPipeline):
    """`enable_model_cpu_offload` without a GPU: hooks are removed and installed anew at the end of every call."""

    def enable(self):
        self.remove_all_hooks()
        self._all_hooks = []
        for model in (self.unet, self.vae):
            self._all_hooks.append(accelerate.cpu_offload_with_hook(model, execution_device="cpu")[1])

    def maybe_free_model_hooks(self):
        if getattr(self, "_all_hooks", None):
            self.enable()


@pytest.mark.parametrize("name", [*METHODS, "together"])
def test_model_offload_that_renews_its_hooks(name):
    pipe = tiny_pipeline("sd")
    recipe = METHODS.get(name) or TOGETHER
    want, stock = run(diffaccel.wrap(pipe, recipe), "sd"), run(pipe, "sd")
    pipe.__class__ = OffloadedPipeline
    pipe.enable()
    fast = diffaccel.wrap(pipe, recipe)
    counts = None
    for _ in range(3):
        hook = pipe.unet._hf_hook
        assert torch.equal(run(fast, "sd"), want)
        assert counts in (None, (fast.report.evaluations, fast.report.rows, fast.report.flops))
        counts = (fast.report.evaluations, fast.report.rows, fast.report.flops)
        assert pipe.unet._hf_hook is not hook  # it was renewed during the call
        assert nothing_of_ours(pipe.unet)
        assert torch.equal(run(pipe, "sd"), stock)
    with pytest.raises(ZeroDivisionError):  # an exception skips the renewal
        fast(**tiny_inputs("sd"), **at_step(3, lambda _: 1 / 0))
    assert nothing_of_ours(pipe.unet)
    assert pipe.unet._hf_hook is not None
    assert torch.equal(run(fast, "sd"), want)
    pipe.remove_all_hooks()
    assert torch.equal(run(fast, "sd"), want)
    assert torch.equal(run(pipe, "sd"), stock)


def nothing_of_ours(network):
    """No forward in the network was defined by diffaccel, however often it is wrapped by others."""
    for module in network.modules():
        for function in (vars(module).get("forward"), vars(module).get("_old_forward")):
            while function is not None:
                inner = getattr(function, "func", function)
                if getattr(inner, "__module__", "").startswith("diffaccel"):
                    return False
                function = getattr(function, "__wrapped__", None)
    return True


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_forward_hook_of_the_user_sees_every_call(order):
    """torch's own hooks stand outside `forward`: they see what the pipeline asked for."""
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, METHODS["guidance_interval"])
    seen = []
    if order == "before":
        run(fast, "sd")
    handle = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    run(fast, "sd")
    handle.remove()
    assert seen == [2] * 10
    assert fast.report.rows < 20


def with_deepcache(pipe):
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    return helper.disable


def with_tomesd(pipe):
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5, use_rand=False)
    return lambda: tomesd.remove_patch(pipe)


ADD_ONS = {
    "DeepCache": (
        with_deepcache,
        [GuidanceInterval(low=0.5), StepReuse(), SkipCache(interval=3)],
        [TokenMerging(min_tokens=1)],
    ),
    "tomesd": (
        with_tomesd,
        [TokenDownsampling(min_tokens=1), TokenMerging(min_tokens=1)],
        [GuidanceInterval(low=0.5), SkipCache(interval=3)],
    ),
}


@pytest.mark.parametrize("name", ADD_ONS)
def test_other_add_ons_inside_of_the_network(name):
    """What gets in their way names them, also where they come after the wrapping; all else runs beside them."""
    add, refused, fine = ADD_ONS[name]
    pipe = tiny_pipeline("sd")
    early = diffaccel.wrap(pipe, refused[-1])
    want = run(early, "sd", steps=9)
    take_off = add(pipe)
    for method in refused:
        with pytest.raises(Unsupported, match=f"{method.name} does not go together with {name}, which"):
            diffaccel.wrap(pipe, method)
    with pytest.raises(Unsupported, match=f"{refused[-1].name} does not go together"):
        run(early, "sd", steps=9)
    assert torch.equal(run(diffaccel.wrap(pipe, "off"), "sd", steps=9), run(pipe, "sd", steps=9))
    for method in fine:
        assert run(diffaccel.wrap(pipe, method), "sd", steps=9).isfinite().all()
    take_off()
    assert torch.equal(run(early, "sd", steps=9), want)


@pytest.mark.parametrize("method", [SparseCrossAttention(), TokenMerging(min_tokens=1, proportional=True)])
def test_autocast_reaches_counted_and_other_calls_alike(method):
    pipe = tiny_pipeline("sd")
    fast = diffaccel.wrap(pipe, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second, stock = run(fast, "sd", steps=3), run(fast, "sd", steps=3), run(pipe, "sd", steps=3)
    assert torch.equal(first, second)
    assert (first - run(fast, "sd", steps=3)).abs().mean() < 2 * (stock - run(pipe, "sd", steps=3)).abs().mean()


def test_half_precision():
    """bfloat16 weights and latents; statistics of the methods stay in float32."""
    pipe = tiny_pipeline("sd")
    for network in (pipe.unet, pipe.vae):
        network.to(torch.bfloat16)
    inputs = tiny_inputs("sd")
    inputs |= {name: value.bfloat16() for name, value in inputs.items() if "embeds" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for recipe in [*METHODS.values(), TOGETHER]:
            fast = diffaccel.wrap(pipe, recipe)
            inputs["generator"] = [torch.Generator().manual_seed(0)]
            images = fast(**inputs).images
            assert torch.isfinite(images.float()).all()
            assert fast.report.flops < fast.report.flops_plain

"""State belongs to one run of the scheduler and to one thread, and is used only where it came from."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import diffusers
import pytest
import tiny_transformers
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LDMTextToImagePipeline,
    MarigoldDepthPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.pipelines.pag.pag_utils import PAGMixin
from peft import LoraConfig
from tiny import DDIM, tiny_inputs, tiny_pipeline, tiny_unet, tiny_vae

import diffaccel
from diffaccel import (
    AdaptiveGuidance,
    BlockCache,
    Forecast,
    GuidanceInterval,
    NormalizedAttentionGuidance,
    RegionSampling,
    ResidualCache,
    SkipCache,
    SparseAttention,
    SparseCrossAttention,
    StepReuse,
    TokenDownsampling,
    TokenMerging,
    Unsupported,
)

STEPS = 12


# --- several runs of the scheduler in one call ---


class Variations:
    """A user's pipeline: one picture for each seed, one after the other, as low memory asks for."""

    @torch.no_grad()
    def __call__(self, seeds=(0, 1), **arguments):
        plain = super().__call__
        pictures = [plain(**arguments | {"generator": torch.Generator().manual_seed(seed)})[0] for seed in seeds]
        return [torch.as_tensor(picture[0]).float() for picture in pictures]


def varying(pipe):
    pipe.__class__ = type(f"{type(pipe).__name__}Variations", (Variations, type(pipe)), {})
    return pipe


SD = [
    [SkipCache(interval=4, full_last=0)],
    [Forecast(full_first=1)],
    [AdaptiveGuidance(threshold=0.9)],
    [AdaptiveGuidance(threshold=0.9), SkipCache(interval=4)],
    [GuidanceInterval(low=1.0, high=8.0)],
    [StepReuse(threshold=1e9, max_skips=2)],
    [TokenMerging(min_tokens=1, matcher="importance")],
    [TokenMerging(min_tokens=1, reuse=5)],
    [NormalizedAttentionGuidance()],
]
TRANSFORMERS = [
    ("sd3", RegionSampling(starvation=1)),
    ("sd3", ResidualCache(interval=5)),
    ("sd3", Forecast(interval=5)),
    ("sd3", SparseAttention(min_tokens=1, keep=0.3, reuse=9)),
    ("flux-cfg", BlockCache(threshold=0.4)),
    ("flux-cfg", BlockCache(kind="pyramid")),
    ("flux-cfg", BlockCache(kind="dual_block", first_blocks=1, threshold=0.4)),
]


def check_runs(fast, inputs):
    """The second picture is what it is alone, and all is counted twice."""
    (first,) = fast(seeds=(0,), **inputs)
    counts = [fast.report]
    (second,) = fast(seeds=(1,), **inputs)
    counts.append(fast.report)
    both = fast(seeds=(0, 1), **inputs)
    report = fast.report
    assert torch.equal(both[0], first)
    assert torch.equal(both[1], second)
    assert report.completed
    for name in ("steps", "evaluations", "rows", "flops", "flops_plain"):
        assert getattr(report, name) == sum(getattr(alone, name) for alone in counts), name
    return counts, report


@pytest.mark.parametrize("recipe", SD, ids=lambda recipe: "+".join(method.name for method in recipe))
def test_a_second_run_of_the_scheduler_starts_anew(recipe):
    pipe = varying(tiny_pipeline("sd"))
    inputs = tiny_inputs("sd", steps=STEPS) | {"guidance_scale": 1.0 if "attention" in recipe[0].name else 5.0}
    del inputs["generator"]
    fast = diffaccel.wrap(pipe, recipe)
    counts, report = check_runs(fast, inputs)
    assert report.methods == {
        name: {
            key: sum(alone.methods[name].get(key, 0) for alone in counts) if isinstance(value, int) else value
            for key, value in counter.items()
        }
        for name, counter in report.methods.items()
    }
    assert not torch.equal(fast(seeds=(1,), **inputs)[0], pipe(seeds=(1,), **inputs)[0])  # it does something


@pytest.mark.parametrize(("kind", "method"), TRANSFORMERS, ids=lambda value: getattr(value, "name", value))
def test_a_second_run_of_a_transformer_starts_anew(kind, method):
    size = (24, 24) if isinstance(method, SparseAttention) else (8, 8)  # there has to be more than one block of keys
    pipe = varying(tiny_transformers.tiny_pipeline(kind))
    inputs = tiny_transformers.tiny_inputs(kind, steps=STEPS, size=size)
    del inputs["generator"]
    fast = diffaccel.wrap(pipe, [method])
    check_runs(fast, inputs)
    assert not torch.equal(fast(seeds=(1,), **inputs)[0], pipe(seeds=(1,), **inputs)[0])


class Twice:
    """Goes through the timesteps once more without setting them again, which stateless schedulers allow."""

    @torch.no_grad()
    def __call__(self, seeds=(0, 1), steps=STEPS, text=None):
        self.scheduler.set_timesteps(steps)
        pictures = []
        for seed in seeds:
            latents = self.prepare_latents(1, 4, 32, 32, torch.float32, "cpu", torch.Generator().manual_seed(seed))
            for t in self.scheduler.timesteps:
                prediction = self.unet(latents, t, encoder_hidden_states=text).sample
                latents = self.scheduler.step(prediction, t, latents).prev_sample
            pictures.append(latents)
        return pictures


def test_timesteps_that_are_used_again_are_another_run():
    pipe = tiny_pipeline("sd")
    pipe.__class__ = type("TwicePipeline", (Twice, type(pipe)), {})
    text = torch.ones(1, 5, 16)
    fast = diffaccel.wrap(pipe, [SkipCache(interval=4, full_last=0)])
    alone = fast(seeds=(1,), text=text)[0]
    counts = fast.report.methods["skip_cache"]
    both = fast(seeds=(0, 1), text=text)
    assert torch.equal(both[1], alone)
    assert fast.report.steps == 2 * STEPS
    assert fast.report.completed
    assert fast.report.methods["skip_cache"] == {name: 2 * count for name, count in counts.items()}


def test_a_run_that_was_broken_off_is_not_complete():
    """The first picture is given up after three steps, the second one is made."""
    pipe = varying(tiny_pipeline("sd"))
    inputs = tiny_inputs("sd", steps=STEPS)
    del inputs["generator"]
    seen = []

    def give_up(pipe, index, t, tensors):
        seen.append(index)
        pipe._interrupt = len(seen) == 3
        return {}

    fast = diffaccel.wrap(pipe, [SkipCache()])
    fast(**inputs, callback_on_step_end=give_up)
    assert fast.report.steps == 3 + STEPS
    assert not fast.report.completed


# --- threads ---


class Elsewhere:
    """A stock call of a network in another thread, which waits inside until it is let go.

    Attributes:
        output: its prediction.
    """

    def __init__(self, network, part, arguments):
        self.network, self.arguments, self.output = network, arguments, None
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._call)
        self.hook = part.register_forward_hook(self._wait)

    def _wait(self, *_):
        if threading.current_thread() is self.thread:
            self.inside.set()
            self.go_on.wait(60)

    def _call(self):
        with torch.no_grad():
            self.output = self.network(**self.arguments).sample

    def start(self):
        self.thread.start()
        assert self.inside.wait(60)

    def finish(self):
        self.go_on.set()
        self.thread.join(60)
        self.hook.remove()
        return self.output


UNET = {
    "sample": torch.ones(2, 4, 16, 16),
    "timestep": torch.tensor(500),
    "encoder_hidden_states": torch.ones(2, 5, 16),
}
THREADED = [
    ("sd", SkipCache(interval=3)),
    ("sd", TokenMerging(min_tokens=1)),
    ("sd", TokenDownsampling(min_tokens=1)),
    ("sd", SparseCrossAttention()),
    ("sd", NormalizedAttentionGuidance()),
    ("sd3", RegionSampling()),
    ("sd3", ResidualCache()),
    ("sd3", TokenMerging(min_tokens=1)),
    ("flux-cfg", BlockCache(threshold=0.4)),
    ("flux-cfg", BlockCache(kind="taylor")),
    ("flux-cfg", BlockCache(kind="pyramid")),
    ("flux-cfg", BlockCache(kind="dual_block", first_blocks=1, threshold=0.4)),
]


def threaded(kind, method):
    """A pipeline, how it is called, and a stock call of its network with the module inside which that waits."""
    tiny_family = tiny_transformers if kind in tiny_transformers.KINDS else None
    if tiny_family is None:
        pipe, inputs = tiny_pipeline("sd"), tiny_inputs("sd", steps=STEPS)
        inputs["guidance_scale"] = 1.0 if isinstance(method, NormalizedAttentionGuidance) else 5.0
        return pipe, inputs, pipe.unet, pipe.unet.conv_in, UNET
    pipe, inputs = tiny_family.tiny_pipeline(kind), tiny_family.tiny_inputs(kind, steps=STEPS)
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, a, k: seen.append(k), with_kwargs=True)
    pipe(**inputs)
    hook.remove()
    embed = pipe.transformer.pos_embed if kind == "sd3" else pipe.transformer.x_embedder
    return pipe, inputs, pipe.transformer, embed, {**seen[0], "return_dict": True}


@pytest.mark.parametrize(("kind", "method"), THREADED, ids=lambda value: getattr(value, "name", value))
def test_other_threads_pass_untouched(kind, method):
    """A stock call that is inside the network when the accelerated one starts, and one that comes later."""
    pipe, inputs, network, part, arguments = threaded(kind, method)
    fast = diffaccel.wrap(pipe, [method])
    earlier, later = Elsewhere(network, part, arguments), Elsewhere(network, part, arguments)
    got = []

    def callback(pipe, index, t, tensors):
        if index == 3:
            got.append(earlier.finish())
            later.start()
        if index == 7:
            got.append(later.finish())
        return {}

    def picture(**more):
        generator = [torch.Generator().manual_seed(0)]
        return torch.as_tensor(fast(**inputs | more | {"generator": generator})[0])

    want = picture()
    with torch.no_grad():
        stock = network(**arguments).sample
    earlier.start()
    assert torch.equal(picture(callback_on_step_end=callback), want)
    assert torch.equal(got[0], stock)
    assert torch.equal(got[1], stock)
    assert sum("another thread" in note for note in fast.report.notes) == 1


# --- what forces a full evaluation ---


def full_evaluations(fast):
    return [entry.evaluation for entry in fast.report.trace if entry.network == "denoiser" and not entry.tags]


@pytest.mark.parametrize("steps", [12, 25])
def test_an_idle_guidance_interval_forces_nothing(steps):
    """A call without guidance has no rows that could come and go."""
    pipe, inputs = tiny_pipeline("sd"), tiny_inputs("sd", steps=steps) | {"guidance_scale": 1.0}
    alone, beside = (
        diffaccel.wrap(pipe, SkipCache()),
        diffaccel.wrap(pipe, [SkipCache(), GuidanceInterval(high=5.42, low=0.28)]),
    )
    alone(**inputs)
    beside(**inputs)
    assert beside.report.methods["skip_cache"] == alone.report.methods["skip_cache"]
    assert beside.report.flops == alone.report.flops


def test_an_idle_guidance_interval_forces_nothing_where_branches_are_separate():
    pipe = tiny_transformers.tiny_pipeline("flux-cfg")
    inputs = tiny_transformers.tiny_inputs("flux-cfg", steps=STEPS, guidance=1.0)
    alone, beside = diffaccel.wrap(pipe, Forecast()), diffaccel.wrap(pipe, [Forecast(), GuidanceInterval(high=3.0)])
    alone(**inputs)
    beside(**inputs)
    assert beside.report.methods["forecast"] == alone.report.methods["forecast"]


def other_lora(pipe, seed):
    """Another adapter of the same name and shape."""
    if getattr(pipe.unet, "peft_config", None):
        pipe.unet.delete_adapters("default")
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k"]))
    overwrite_lora(pipe)


def overwrite_lora(pipe):
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora" in name:
                weight.normal_(std=0.5)


def switch_fusers(pipe):
    for module in pipe.unet.modules():
        if isinstance(module, GatedSelfAttentionDense):
            module.enabled = not module.enabled


@pytest.mark.parametrize("change", [lambda pipe: other_lora(pipe, 2), overwrite_lora, switch_fusers])
@pytest.mark.parametrize("method", [SkipCache(interval=50, full_last=0), StepReuse(threshold=1e9, max_skips=50)])
def test_what_changes_inside_the_network_forces_a_full_evaluation(method, change):
    """A LoRA replaced by one of the same name, one whose weights are overwritten, and GLIGEN's layers."""
    pipe = tiny_pipeline("sd")
    if change is switch_fusers:
        config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
        pipe.unet = UNet2DConditionModel(**config | {"attention_type": "gated"}).eval()
    else:
        other_lora(pipe, 1)
    fast = diffaccel.wrap(pipe, method)

    def callback(pipe, index, t, tensors):
        if index == 5:  # seen from the seventh evaluation on
            change(pipe)
        return {}

    fast(**tiny_inputs("sd", steps=STEPS), callback_on_step_end=callback)
    assert 6 in full_evaluations(fast)
    assert not {5, 7, 8} & set(full_evaluations(fast))
    assert fast.report.methods[method.name]["forced by adapters"] == 1


@pytest.mark.parametrize("method", [SkipCache(interval=4), StepReuse(threshold=1e9, max_skips=3)])
def test_controlnets_that_end_at_different_steps(method):
    """The change of the second one's scale is known before the first one is cut short."""
    pipe = tiny_pipeline("multi-controlnet")
    inputs = tiny_inputs("multi-controlnet", steps=20) | {"control_guidance_end": [1.0, 0.5]}
    fast = diffaccel.wrap(pipe, method)
    fast(**inputs)
    assert fast.report.completed
    counts = fast.report.methods[method.name]
    assert counts["forced by inputs"] == 1
    # the first evaluation with the new scale, the eleventh or its neighbour by diffusers' rounding, is full
    assert {10, 11} & set(full_evaluations(fast))
    assert counts.get("cached", 0) + counts.get("reused", 0) > 5


ENDS = ("sdxl", "sdxl-controlnet", "sdxl-img2img")


@pytest.mark.parametrize("kind", ENDS)
def test_a_pipeline_that_hands_over_ends_where_it_says(kind):
    """`denoising_end`: the last evaluation of this pipeline is full, and the run is complete."""
    pipe = tiny_pipeline(kind)
    inputs = tiny_inputs(kind, steps=20) | {"denoising_end": 0.6, "output_type": "latent"}
    fast = diffaccel.wrap(pipe, [SkipCache(interval=50, min_evaluations=1), GuidanceInterval(stop_fraction=0.5)])
    fast(**inputs)
    evaluations = [entry.evaluation for entry in fast.report.trace if entry.network == "denoiser"]
    assert len(evaluations) < 14
    assert evaluations[-1] in full_evaluations(fast) or fast.report.trace[-1].tags == ()
    assert fast.report.completed
    counts = fast.report.methods["guidance_interval"]
    assert abs(counts["guided"] - counts["unguided"]) <= 1
    short = diffaccel.wrap(pipe, SkipCache(min_evaluations=14))
    with pytest.warns(UserWarning, match="evaluations are too few"):
        short(**inputs)


class Mixed(diffusers.StableDiffusionXLPipeline, PAGMixin):
    """A class that nobody has listed, as KolorsPAGPipeline was."""


_LISTED = [getattr(diffusers, name) for name in dir(diffusers) if "PAG" in name]
PERTURBED = [Mixed, *(cls for cls in _LISTED if issubclass(cls, PAGMixin))]


# --- pipelines whose rows follow rules of their own ---


GUIDING = [
    GuidanceInterval(low=1.0),
    AdaptiveGuidance(threshold=0.9),
    StepReuse(threshold=1e9),
    [SkipCache(interval=2), GuidanceInterval(low=1.0)],
]


def latent_diffusion():
    class Tokenizer:
        def __call__(self, texts, **_):
            texts = [texts] if isinstance(texts, str) else texts
            return SimpleNamespace(input_ids=torch.tensor([[len(text), 1, 2] for text in texts]))

    class Bert(torch.nn.Embedding):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, ids):
            return (super().forward(ids),)

    torch.manual_seed(3)
    parts = {"vqvae": tiny_vae(), "bert": Bert(50, 16), "tokenizer": Tokenizer(), "scheduler": DDIMScheduler(**DDIM)}
    pipe = LDMTextToImagePipeline(unet=tiny_unet(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("recipe", GUIDING)
@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "two dogs"]])
def test_latent_diffusion_is_guided_like_the_others(recipe, prompt):
    """It makes its latents itself; how many is known from its prompts."""
    pipe, fast = latent_diffusion(), diffaccel.wrap(latent_diffusion(), recipe)

    def call(pipe):
        generator = torch.Generator().manual_seed(0)
        size = {"height": 128, "width": 128, "num_inference_steps": STEPS}
        return torch.as_tensor(pipe(prompt, generator=generator, guidance_scale=5.0, output_type="np", **size).images)

    assert not torch.equal(call(fast), call(pipe))
    images = 1 if isinstance(prompt, str) else 2
    assert fast.report.rows < 2 * images * STEPS
    assert fast.report.trace[0].rows == 2 * images
    assert fast.report.completed


@pytest.mark.parametrize("recipe", GUIDING)
def test_marigold_goes_through_its_pictures_in_batches(recipe):
    """Three pictures, two at a time: no guidance, and a run of the scheduler for each batch."""
    config = {key: value for key, value in tiny_unet().config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    pipe = MarigoldDepthPipeline(
        unet=UNet2DConditionModel(**config | {"in_channels": 8}).eval(),
        vae=tiny_vae(),
        scheduler=DDIMScheduler(**DDIM),
        text_encoder=None,
        tokenizer=None,
        prediction_type="depth",
        scale_invariant=True,
        shift_invariant=True,
        default_processing_resolution=32,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.empty_text_embedding = torch.ones(1, 2, 16)
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))

    def call(pipe, chosen):
        options = {"num_inference_steps": STEPS, "batch_size": 2, "output_type": "pt"}
        return pipe(pictures[chosen], latents=latents[chosen].clone(), **options).prediction

    fast = diffaccel.wrap(pipe, recipe)
    three = call(fast, slice(0, 3))
    assert [entry.stock_rows for entry in fast.report.trace] == [2] * STEPS + [1] * STEPS
    assert fast.report.steps == 2 * STEPS
    assert fast.report.completed
    if recipe is not GUIDING[1]:  # which has nothing to say there
        assert any("nothing to drop" in note for note in fast.report.notes) or "step_reuse" in fast.report.methods
    assert torch.equal(three[2:], call(fast, slice(2, 3)))


@pytest.mark.parametrize("cls", PERTURBED, ids=lambda cls: cls.__name__)
def test_all_pipelines_with_perturbed_attention_are_refused(cls):
    """Whatever else they are; their class tells."""
    with pytest.raises(Unsupported, match=f"{cls.__name__} is not supported: it adds a third, perturbed"):
        diffaccel.wrap(cls.__new__(cls), [])


# --- tiles ---


class Tiles:
    """A picture of 16 x 24 latents in two overlapping tiles of 16 x 16, as MultiDiffusion; DemoFusion moves them."""

    @torch.no_grad()
    def __call__(self, text, jitter=False, order=(0, 1), steps=STEPS):
        self.scheduler.set_timesteps(steps)
        latents = self.prepare_latents(1, 4, 32, 48, torch.float32, "cpu", torch.Generator().manual_seed(0))
        for k, t in enumerate(self.scheduler.timesteps):
            noise, weight = torch.zeros_like(latents), torch.zeros_like(latents)
            starts = ((k * 3) % 5, 8 - (k * 2) % 4) if jitter else (0, 8)
            for x in (starts[tile] for tile in order):
                part = self.scheduler.scale_model_input(torch.cat([latents[..., x : x + 16]] * 2), t)
                uncond, cond = self.unet(part, t, encoder_hidden_states=text).sample.chunk(2)
                noise[..., x : x + 16] += uncond + 4 * (cond - uncond)
                weight[..., x : x + 16] += 1
            latents = self.scheduler.step(noise / weight.clamp(min=1), t, latents).prev_sample
        return latents


def tiled(scheduler):
    pipe = tiny_pipeline("sd")
    pipe.__class__ = type("TiledPipeline", (Tiles, type(pipe)), {})
    pipe.scheduler = scheduler
    return pipe, torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def euler():
    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("scheduler", [DDIMScheduler(**DDIM), euler()], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("method", [SkipCache(interval=4), StepReuse(threshold=1e9, max_skips=3)])
def test_tiles_that_move_get_nothing_of_each_other(method, scheduler):
    pipe, text = tiled(scheduler)
    fast = diffaccel.wrap(pipe, method)
    assert torch.equal(fast(text, jitter=True), pipe(text, jitter=True))
    assert any("move or cannot be found" in note for note in fast.report.notes)
    assert not torch.equal(fast(text), pipe(text))
    counts = fast.report.methods[method.name]
    assert counts.get("cached", 0) + counts.get("reused", 0) >= STEPS
    assert not fast.report.notes


@pytest.mark.parametrize("matcher", ["window", "importance"])
def test_tiles_are_merged_each_by_itself(matcher):
    """So it does not matter which one comes first."""
    pipe, text = tiled(DDIMScheduler(**DDIM))
    fast = diffaccel.wrap(pipe, TokenMerging(min_tokens=1, matcher=matcher))
    first = fast(text)
    assert torch.equal(fast(text, order=(1, 0)), first)
    assert not torch.equal(first, pipe(text))


# --- batches that a callback cuts, refusals, ControlNets that run whole ---


def keep_the_first(pipe, index, t, tensors):
    """After four steps the second picture is left out."""
    if index != 3:
        return {}
    embeds = tensors["prompt_embeds"]
    return {"latents": tensors["latents"][:1], "prompt_embeds": torch.cat([embeds[:1], embeds[2:3]])}


@pytest.mark.parametrize(
    "recipe",
    [
        GuidanceInterval(low=1.0),
        AdaptiveGuidance(threshold=0.2),
        [SkipCache(interval=3), GuidanceInterval(low=1.0)],
        StepReuse(threshold=1e9, max_skips=2),
        TokenMerging(min_tokens=1, matcher="importance"),
    ],
)
def test_a_batch_that_a_callback_cuts(recipe):
    pipe, inputs = tiny_pipeline("sd"), tiny_inputs("sd", steps=STEPS, images=2)
    inputs |= {"generator": None, "latents": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    tensors = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    fast = diffaccel.wrap(pipe, recipe)
    fast(**inputs, **tensors, callback_on_step_end=keep_the_first)
    assert any("from 2 to 1 pictures" in note for note in fast.report.notes)
    assert fast.report.completed
    if recipe == GuidanceInterval(low=1.0):
        rows = [(entry.rows, entry.sigma > 1) for entry in fast.report.trace]
        assert rows[:4] == [(4, True)] * 4
        assert set(rows[4:]) == {(2, True), (1, False)}


class Edited:
    """Installs attention processors of its own for the time of its call."""

    @torch.no_grad()
    def __call__(self, **arguments):
        before = self.unet.attn_processors
        self.unet.set_attn_processor({name: type(processor)() for name, processor in before.items()})
        result = super().__call__(**arguments)
        self.unet.set_attn_processor(before)
        return result


def test_a_refusal_inside_a_call_takes_the_pipelines_processors_back():
    pipe = tiny_pipeline("sd")
    pipe.__class__ = type("EditedPipeline", (Edited, type(pipe)), {})
    before = pipe.unet.attn_processors
    with pytest.raises(Unsupported, match="works without classifier-free guidance"):
        diffaccel.wrap(pipe, NormalizedAttentionGuidance())(**tiny_inputs("sd", steps=4))
    assert pipe.unet.attn_processors == before


def test_controlnets_that_cannot_stop_early_are_not_counted(monkeypatch):
    monkeypatch.setattr("diffaccel.models.model_map.describe_controlnet", lambda net: None)
    fast = diffaccel.wrap(tiny_pipeline("controlnet"), SkipCache(interval=3))
    fast(**tiny_inputs("controlnet", steps=STEPS))
    assert "skip_cache: ControlNetModel always runs whole." in fast.report.notes
    assert fast.report.methods["skip_cache"]["cached"] > 0
    assert not fast.report.methods["skip_cache"].get("controlnet early exits")
    assert len({entry.flops for entry in fast.report.trace if entry.network == "controlnet"}) == 1

"""The training of the world's models: where the codec starts, what resumes, what files hold."""

from __future__ import annotations

import os
import signal

import numpy
import pytest
import torch
from diffusers import LCMScheduler
from torch import nn

from diffaccel.miniatures import load_folder
from diffaccel.miniatures.world import NAMES
from training.train_text import build_text_encoder, build_tokenizer
from training.world import (
    World,
    assemble,
    checkpoint,
    codec,
    denoise,
    distill,
    latents,
    retext,
    sd3,
    styles,
    train_text,
    unet,
)
from training.world.learner import Learner, Plan, orthogonal, train
from training.world.run_all import SHARES, Order, commands


def soft_pictures(count, size=32):
    """(count, 3, size, size) in [-1, 1]: blots with a little grain."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, size // 8 + 1, size // 8 + 1, generator=generator) * 1.6 - 0.8
    pictures = nn.functional.interpolate(coarse, size, mode="bicubic")
    return (pictures + 0.1 * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    torch.manual_seed(0)


@pytest.fixture
def world(monkeypatch):
    """The world with blots for drawings, so that nothing is fetched."""
    rng = numpy.random.default_rng(0)
    blots = rng.integers(0, 255, (len(NAMES), 2, 4, 4, 4), numpy.uint8).repeat(4, 2).repeat(4, 3)
    monkeypatch.setattr(World, "load", classmethod(lambda cls, cache, core=False: cls(blots)))
    return World.load(None)


@pytest.mark.parametrize("style", styles.FILTERS)
def test_no_style_repeats_with_the_autoencoders_cells(style):
    """Equal cells can only be decoded to an even area, so a style's own pattern has another period than 8 px."""
    flat = numpy.full((64, 64, 3), 90, numpy.uint8)
    inner = styles.apply(flat, style)[8:56, 8:56].astype(int)
    even = numpy.ptp(inner, axis=(0, 1)).max() <= 2
    assert even or numpy.abs(inner[8:] - inner[:-8]).max() > 2 or numpy.abs(inner[:, 8:] - inner[:, :-8]).max() > 2


def test_the_codec_starts_at_the_principal_components():
    """Pictures in, half-whitened components out, through four strided stages, two norms and two activations."""
    pictures = soft_pictures(24)
    mean, components = codec.principal_components(pictures)
    basis = codec.half_whitened(pictures, mean, components)
    started = codec.linear_codec(pictures)
    latents = started.encode(pictures[:4]).latent_dist.mean.permute(0, 2, 3, 1).reshape(-1, codec.LATENTS)
    wanted = (codec.patches(pictures[:4]) - mean) @ basis.T
    assert (latents - wanted).square().mean().sqrt() < 0.02 * wanted.std()


def test_the_codec_starts_with_each_patchs_mean_colour():
    """Even pictures come back as they are; only near the border do zeros leak in."""
    colours = torch.tensor([[0.8, -0.2, 0.1], [-0.7, -0.6, 0.9]])[:, :, None, None]
    answer = codec.reconstruct(codec.linear_codec(soft_pictures(24)), colours.expand(-1, -1, 64, 64))
    assert (answer - colours)[..., 24:40, 24:40].abs().max() < 0.08


def test_normalised_latents_have_spread_1_and_pictures_stay():
    pictures = soft_pictures(24)
    model = codec.linear_codec(pictures)
    with torch.no_grad():
        model.encoder.conv_out.weight.mul_(3.0)
        model.encoder.conv_out.bias[: codec.LATENTS] += 1.0
    before = codec.reconstruct(model, pictures[:4])
    codec.normalise(model, pictures)
    rows = model.encode(pictures).latent_dist.mean.permute(0, 2, 3, 1).reshape(-1, codec.LATENTS)
    assert rows.mean(0).abs().max() < 1e-3
    assert rows.square().mean().sqrt().item() == pytest.approx(1, abs=1e-2)
    spreads = rows.std(0)
    assert (spreads[1:] <= spreads[:-1] * 1.001).all()
    assert (codec.reconstruct(model, pictures[:4]) - before).abs().max() < 1e-3


def test_orthogonal_keeps_directions_and_evens_lengths():
    update = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0))
    lengths = torch.linalg.svdvals(orthogonal(update))
    assert lengths.min() > 0.5
    assert lengths.max() < 1.3
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    assert ((left @ right) * orthogonal(update)).sum((1, 2)).min() > 0.95 * orthogonal(update).norm(
        dim=(1, 2)
    ).max() * 6**0.5 * 0.9


class Small(nn.Module):
    """One matrix for Muon, the rest for AdamW, and a frozen part."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.blocks(x)


def small_learner(path, steps, **options):
    torch.manual_seed(1)
    return Learner(Small(), path, Plan(1000.0, 0.01, steps=steps, hold=1.0, **options))


def small_training(path, *stops):
    """Trained until each of `stops` in turn, from the file each time."""
    for stop in stops:
        learner = small_learner(path, stop)

        def loss(step, model=learner.module):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            return (model(x) - x.flip(1)).square().mean()

        train(learner, loss, "small")
    return learner


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path):
    whole, parts = small_training(tmp_path / "whole.pt", 9), small_training(tmp_path / "parts.pt", 2, 6, 9)
    assert (whole.step, parts.step) == (9, 9)
    for a, b in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.average.values, parts.average.values, strict=True):
        assert torch.equal(a, b)


def test_training_learns_and_leaves_frozen_parts():
    learner = small_learner(None, 60)
    before, frozen = learner.module.blocks[0].weight.clone(), learner.module.frozen.weight.clone()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    while not learner.done:
        loss = (learner.module(x) - x.flip(1)).square().mean()
        learner.learn(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(before, learner.module.blocks[0].weight)
    assert torch.equal(frozen, learner.module.frozen.weight)


def test_a_gradient_that_is_not_finite_is_left_out():
    learner = small_learner(None, 9)
    before = [parameter.clone() for parameter in learner.module.parameters()]
    learner.learn(learner.module(torch.full((2, 16), float("inf"))).square().mean())
    assert (learner.step, learner.skipped) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.module.parameters(), strict=True))


def test_a_termination_signal_saves_before_the_end(tmp_path):
    learner = small_learner(tmp_path / "stopped.pt", 1000)

    def loss(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return learner.module(torch.ones(2, 16)).square().mean()

    train(learner, loss, "small")
    assert learner.step == 4
    assert small_learner(tmp_path / "stopped.pt", 5).step == 4


def test_the_codec_trains_and_its_encoder_is_then_final(tmp_path, world, monkeypatch):
    monkeypatch.setattr(codec, "SHELF", 3)
    monkeypatch.setattr(codec, "BATCH", 6)
    monkeypatch.setattr(codec, "SEEN", 16)
    monkeypatch.setattr(codec, "measure", lambda *args: {"one object, 128 px": 30.0})
    with pytest.raises(FileNotFoundError, match=r"run training\.world\.codec first"):
        codec.load_codec(tmp_path)
    codec.train_both(tmp_path, Plan(60, 1e-3, steps=2))
    first = codec.load_codec(tmp_path)
    codec.train_both(tmp_path, Plan(60, 1e-3, steps=4))  # over: nothing happens
    codec.train_decoder(tmp_path, Plan(60, 1e-3, steps=2))
    further, pictures = codec.load_codec(tmp_path), soft_pictures(2)
    same, other = (model.encode(pictures).latent_dist.mean for model in (first, further))
    assert torch.equal(same, other)
    assert not torch.equal(first.decode(same).sample, further.decode(same).sample)


def make_latents(out, monkeypatch):
    monkeypatch.setattr(latents, "load_codec", lambda out: codec.linear_codec(soft_pictures(16)))
    monkeypatch.setattr(latents, "CHUNK", 2)
    latents._world.cache_clear()
    for size, count, seed in ((128, 3, 1), (128, 2, 2), (256, 2, 1)):
        latents.make(out, latents.Drawn(size, 2, count, seed))


def test_latent_files_add_up_and_hold_captions(tmp_path, world, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no latents of 128 px"):
        latents.load(tmp_path, 128)
    make_latents(tmp_path, monkeypatch)
    rows = latents.load(tmp_path, 128)
    assert rows.values.shape == (5, codec.LATENTS, 16, 16)
    assert rows.values.dtype == torch.float16
    assert [len(row) for row in rows.captions] == [latents.PHRASINGS] * 5
    assert all(isinstance(text, str) and text for row in rows.captions for text in row)
    alone = latents.draw_chunk((tmp_path, latents.Drawn(128, 2, 3, 1), 2))  # the chunk of the third row
    assert alone[1] == [rows.captions[2]]
    assert alone[0].shape == (1, 128, 128, 3)
    again = latents.latents_path(tmp_path, 128, 1)
    stamp = again.stat().st_mtime_ns
    latents.make(tmp_path, latents.Drawn(128, 2, 3, 1))
    assert again.stat().st_mtime_ns == stamp


@pytest.fixture
def parts(tmp_path, world, monkeypatch):
    """A folder of training with latents, an untrained text encoder and codec, and denoisers of a tenth of the size."""
    make_latents(tmp_path, monkeypatch)
    started = codec.linear_codec(soft_pictures(16))
    figures = {"one object, 128 px": 30.0}
    state = {"model": started.state_dict(), "average": {}, "step": 1, "seconds": 1.0, "figures": figures}
    torch.save(state, tmp_path / "codec.pt")
    monkeypatch.setattr(train_text, "WIDTH", 16)
    tokenizer = build_tokenizer(tmp_path / "tokenizer", train_text.vocabulary_words(), train_text.LENGTH)
    both = nn.ModuleList([build_text_encoder(tokenizer, 16), nn.Linear(16, 4)])
    average = list(both.parameters())
    torch.save({"model": both.state_dict(), "average": average, "step": 5, "seconds": 9.0}, tmp_path / "text.pt")
    monkeypatch.setattr(unet, "CHANNELS", (16, 16, 16, 16))
    monkeypatch.setattr(unet, "GROUPS", 4)
    monkeypatch.setattr(unet, "BATCH", 4)
    monkeypatch.setattr(distill, "BATCH", 4)
    monkeypatch.setattr(sd3, "BATCH", 4)
    monkeypatch.setattr(sd3, "LAYERS", 2)
    return tmp_path


SIZES = {128: 1.0, 256: 1.0}
TWO_STEPS = Plan(60, 1e-3, steps=2, hold=1.0)


def test_a_steps_batch_is_the_same_each_time_and_smaller_for_larger_pictures(parts):
    tokenizer, _ = train_text.load_text(parts)
    pools = [denoise.Pool(parts, tokenizer, SIZES, 4, seed=1) for _ in range(2)]
    sides = set()
    for step in range(8):
        first, second = (pool.draw(step) for pool in pools)
        assert torch.equal(first.clean, second.clean)
        assert torch.equal(first.noise, second.noise)
        assert torch.equal(first.ids, second.ids)
        side = first.clean.shape[-1]
        sides.add(side)
        assert len(first.clean) == {16: 4, 32: 1}[side]
    assert sides == {16, 32}


def test_sizes_are_read_with_their_shares():
    assert denoise.parse_shares("128:3,256") == {128: 3.0, 256: 1.0}


@pytest.mark.parametrize(
    ("name", "module", "trainer"), [("unet", unet, "train_unet"), ("sd3", sd3, "train_transformer")]
)
def test_a_denoiser_goes_on_from_its_file_and_from_half_precision_weights(
    parts, name, module, trainer, tmp_path_factory
):
    getattr(module, trainer)(parts, TWO_STEPS, SIZES)
    getattr(module, trainer)(parts, Plan(60, 1e-3, steps=3, hold=1.0), SIZES)
    folder, elsewhere = (tmp_path_factory.mktemp(part) for part in ("weights", "elsewhere"))
    assert checkpoint.save(parts, folder)[name]["step"] == 3
    assert set(checkpoint.restore(folder, elsewhere)) == {"codec", "text", name}
    assert checkpoint.restore(folder, elsewhere) == []
    load = {"unet": unet.load_unet, "sd3": sd3.load_transformer}[name]
    for a, b in zip(load(parts).parameters(), load(elsewhere).parameters(), strict=True):
        assert torch.equal(a.half(), b.half())
    for path in parts.glob("latents_*"):
        path.rename(elsewhere / path.name)
    getattr(module, trainer)(elsewhere, Plan(60, 1e-3, steps=4, hold=1.0), SIZES)
    assert torch.load(elsewhere / f"{name}.pt")["step"] == 4


def test_weights_too_large_for_a_repository_are_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGEST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"codec\.safetensors has"):
        checkpoint.save(parts, tmp_path / "weights")


def test_assembled_models_load_and_answer_in_both_formats(parts, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither unet\.pt nor sd3\.pt"):
        assemble.assemble(parts, tmp_path / "models")
    unet.train_unet(parts, TWO_STEPS, SIZES)
    sd3.train_transformer(parts, TWO_STEPS, SIZES)
    distill.train_lora(parts, TWO_STEPS, SIZES)
    folders = assemble.assemble(parts, tmp_path / "models")
    assert [folder.name for folder in folders] == ["emoji-sd", "emoji-sd3"]
    for folder in folders:
        assert "Apache-2.0" in (folder / "README.md").read_text()
        pipe = load_folder(folder)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
        if pipe.__class__.__name__ == "StableDiffusion3Pipeline":
            options["max_sequence_length"] = 1
        picture = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
        assert picture.shape == (1, 64, 64, 3)
        assert numpy.isfinite(picture).all()


def test_the_few_step_lora_loads_and_changes_answers(parts, tmp_path):
    unet.train_unet(parts, TWO_STEPS, SIZES)
    distill.train_lora(parts, Plan(60, 1e-2, steps=3, hold=1.0), SIZES)
    (folder,) = assemble.assemble(parts, tmp_path / "models")
    pipe = load_folder(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "latent"}
    before = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
    pipe.load_lora_weights(folder / "few_steps")
    after = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
    assert not torch.equal(before, after)


def test_scenes_are_the_same_whoever_draws_them(tmp_path, world):
    latents._world.cache_clear()
    jobs = [(tmp_path, latents.Drawn(32, 1, 40, 1), start) for start in (0, 16)]
    with latents.drawing(jobs, 1) as chunks:
        first = list(chunks)
    for job, (pictures, captions) in zip(jobs, first, strict=True):
        again = latents.draw_chunk(job)
        assert numpy.array_equal(pictures, again[0])
        assert captions == again[1]
    assert not numpy.array_equal(first[0][0], first[1][0])


def test_all_parts_are_run_in_an_order_that_works(tmp_path):
    lines = [line[2:] for line in commands(Order(tmp_path, 100, "cpu", 50), tmp_path / "models")]
    names = [line[0].removeprefix("training.world.") for line in lines]
    assert names.index("codec") < names.index("latents") < names.index("unet") < names.index("distill")
    assert names.count("sd3") == names.count("unet") == 3
    assert names[-3:] == ["assemble", "evaluate", "evaluate"]
    spent = [float(line[line.index("--minutes") + 1]) for line in lines if line[0].endswith(".unet")]
    assert spent == sorted(spent)
    assert sum(SHARES.values()) == pytest.approx(1)


def test_a_unet_reads_another_text_encoder_as_it_read_the_first(parts):
    """The other encoder is the first with its rows rotated and stretched by its last layer norm."""
    unet.train_unet(parts, TWO_STEPS, SIZES)
    before = unet.load_unet(parts)
    tokenizer, old_text = train_text.load_text(parts)
    old = parts / "text_before.pt"
    (parts / "text.pt").rename(old)
    saved = torch.load(old)
    stretched = {**saved["model"], **dict(zip(saved["model"], saved["average"], strict=True))}
    norm = next(name for name in stretched if name.endswith("final_layer_norm.weight"))
    for name in (norm, norm.removesuffix("weight") + "bias"):
        stretched[name] = stretched[name].detach() * torch.linspace(0.5, 2, 16)
    torch.save({**saved, "model": stretched, "average": {}}, parts / "text.pt")
    assert retext.retext(parts, old) < 0.01
    after, new_text = unet.load_unet(parts), train_text.load_text(parts)[1]
    noised, steps, ids = torch.randn(1, 16, 16, 16), torch.tensor([500]), denoise.tokenize(tokenizer, ["a red fox"])
    answers = [
        model(noised, steps, text(ids).last_hidden_state).sample
        for model, text in ((before, old_text), (after, new_text))
    ]
    other = before(noised, steps, new_text(ids).last_hidden_state).sample
    assert (answers[0] - answers[1]).norm() < 0.2 * (answers[0] - other).norm()

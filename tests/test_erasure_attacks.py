"""Attacks: recorded calls repeat, the closed form equals a slow least squares, balls and lengths are kept, all is undone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffaccel.erasure.proof import attacks
from diffaccel.erasure.proof.attacks import Budget, Material, undo_map
from diffaccel.erasure.proof.learned_words import LearnedWord, occurrences, shorten
from diffaccel.erasure.proof.recognition import ProofError
from diffaccel.erasure.proof.recording import (
    SEQUENCE,
    Drawing,
    Encoding,
    batches,
    denoiser_of,
    draw,
    encode,
    live_matrix,
    readers,
    record,
    replay,
)

PROMPTS = ["a cat", "cat on a", "big cat"]
DRAWING = Drawing(steps=4, guidance=3.0, seed=5, batch_size=2)
BUDGET = Budget(iterations=6, moments=2)


@pytest.fixture
def pipe(tiny_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def material(pipe: Any) -> Material:
    return attacks.prepare(pipe, PROMPTS, ["cat"] * 3, [5, 6, 7], DRAWING, BUDGET)


def text_layers(pipe: Any) -> dict[str, nn.Linear]:
    """By name, as one knows them in a UNet: independent of how `readers` finds them."""
    return {
        name: layer
        for name, layer in pipe.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(layer, nn.Linear)
    }


@pytest.fixture
def edited(pipe: Any, material: Material) -> Tensor:
    """An invertible edit W' = W M of every text projection, made after the recording; gives M."""
    generator = torch.Generator().manual_seed(1)
    width = pipe.unet.config.cross_attention_dim
    change = torch.eye(width) + 0.5 * torch.randn(width, width, generator=generator) / width**0.5
    with torch.no_grad():
        for layer in text_layers(pipe).values():
            layer.weight.copy_(layer.weight @ change)
    return change


def state(pipe: Any) -> dict[str, Any]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "weights": {f"{n}.{k}": v.clone() for n, part in parts.items() for k, v in part.state_dict().items()},
        "asked": [p.requires_grad for part in parts.values() for p in part.parameters()],
        "gradients": [p.grad for part in parts.values() for p in part.parameters() if p.grad is not None],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for part in parts.values()
            for name, m in part.named_modules()
        ],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items())
    assert {k: v for k, v in before.items() if k != "weights"} == {k: v for k, v in after.items() if k != "weights"}


# -- recording ---------------------------------------------------------------------------------------------------------


def test_embeddings_draw_the_pictures_of_their_prompts(pipe: Any) -> None:
    with torch.no_grad():
        encoding = encode(pipe, PROMPTS, DRAWING)
    assert torch.equal(draw(pipe, encoding, DRAWING), draw(pipe, PROMPTS, DRAWING))


def test_pictures_depend_on_their_own_seed_only(pipe: Any) -> None:
    both = draw(pipe, PROMPTS, DRAWING, seeds=[9, 3, 4])
    assert torch.allclose(both[2:], draw(pipe, PROMPTS[2:], DRAWING, seeds=[4]), atol=1e-5)
    assert not torch.allclose(both[2:], draw(pipe, PROMPTS[2:], DRAWING, seeds=[5]), atol=1e-2)


def test_a_recorded_call_repeats_and_depends_on_the_text(pipe: Any) -> None:
    with torch.no_grad():
        encoding = encode(pipe, PROMPTS[:2], DRAWING)
    before = state(pipe)
    moments = record(pipe, encoding, DRAWING, moments=3)
    assert_same(before, state(pipe))
    assert len(moments) == 3
    assert moments[0].prediction.shape[0] == 2  # without guidance: one row per prompt
    with torch.no_grad():
        assert all(torch.equal(replay(pipe.unet, moment, encoding), moment.prediction) for moment in moments)
        other = encoding.replaced(prompt_embeds=encoding.texts[SEQUENCE].flip(0))
        assert not torch.allclose(replay(pipe.unet, moments[0], other), moments[0].prediction)


def test_readers_are_the_text_projections(pipe: Any, material: Material) -> None:
    before = state(pipe)
    found = readers(pipe.unet, material.moments[0][0], material.encodings[0])
    assert_same(before, state(pipe))
    assert sorted(name for name, _ in found[SEQUENCE]) == sorted(text_layers(pipe))
    assert len(found[SEQUENCE]) == 8


PLACES = {
    "sdxl": (("attn2.to_k", "attn2.to_v"), "add_embedding.linear_1"),
    "sd3": (("context_embedder",), "time_text_embed.text_embedder.linear_1"),
    "flux-dev": (("context_embedder",), "time_text_embed.text_embedder.linear_1"),
    "pixart-sigma": (("caption_projection.linear_1",), None),
}


@pytest.mark.parametrize("kind", PLACES)
def test_readers_find_every_way_in(kind: str) -> None:
    """Also where a pooled vector has a path of its own, beside other columns in SDXL."""
    tiny = importlib.import_module("tiny" if kind == "sdxl" else "tiny_transformers")
    count = {"images": 2} if kind == "sdxl" else {"batch": 2}
    pipe, inputs = tiny.tiny_pipeline(kind), tiny.tiny_inputs(kind, **count)
    encoding = Encoding({name: value for name, value in inputs.items() if "prompt_" in name and "true" not in name})
    call = {name: value for name, value in inputs.items() if name in ("height", "width", "use_resolution_binning")}
    moment = record(pipe, encoding, Drawing(steps=2, guidance=3.0, call=call), moments=1)[0]
    _, network = denoiser_of(pipe)
    found = readers(network, moment, encoding)
    ends, pooled = PLACES[kind]
    assert found[SEQUENCE]
    assert all(name.endswith(ends) for name, _ in found[SEQUENCE])
    assert [name for name, _ in found.get("pooled_prompt_embeds", [])] == ([pooled] if pooled else [])
    with torch.no_grad():
        assert torch.equal(replay(network, moment, encoding), moment.prediction)
        for name, text in encoding.texts.items():
            other = replay(network, moment, encoding.replaced(**{name: text.flip(0) + 1}))
            assert not torch.allclose(other, moment.prediction, atol=1e-5)


def test_the_live_matrix_sees_weights_and_whatever_stands_before_them() -> None:
    layer = nn.Linear(6, 4)
    assert torch.allclose(live_matrix(layer, 5), layer.weight[:, :5].double(), atol=1e-6)
    change = torch.eye(6) + 0.1 * torch.arange(36).reshape(6, 6)
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] @ change.T,))
    assert torch.allclose(live_matrix(layer, 6), (layer.weight @ change).double(), atol=1e-5)
    handle.remove()


# -- the closed form ---------------------------------------------------------------------------------------------------


def test_the_undo_map_is_regularised_least_squares(pipe: Any, material: Material, edited: Tensor) -> None:
    originals = material.matrices[SEQUENCE]
    found = undo_map(pipe.unet, originals, 1e-2)
    layers = text_layers(pipe)
    stacked = torch.cat([layers[name].weight.detach().double() for name in originals])
    wanted = torch.cat(list(originals.values()))
    ridge = 1e-2 * (stacked.T @ stacked).diagonal().mean()
    rows = torch.cat([stacked, ridge.sqrt() * torch.eye(stacked.shape[1])])
    for text in material.encodings[0].texts[SEQUENCE][0, :4].double():
        answer = torch.linalg.lstsq(rows, torch.cat([wanted @ text, torch.zeros_like(text)])[:, None]).solution[:, 0]
        assert torch.allclose(found @ text, answer, atol=1e-4)


def test_without_an_edit_there_is_nothing_to_undo(pipe: Any, material: Material) -> None:
    found = attacks.closed_form(pipe, material, Budget(regulariser=1e-12), DRAWING)
    before = attacks.join(material.encodings).texts[SEQUENCE]
    assert torch.allclose(found.encoding.texts[SEQUENCE], before, atol=1e-4)
    assert found.lengths == pytest.approx(1, abs=1e-4)


def test_an_invertible_edit_is_undone(pipe: Any, material: Material, edited: Tensor) -> None:
    before = state(pipe)
    found = attacks.closed_form(pipe, material, Budget(regulariser=1e-12, length=100), DRAWING)
    assert_same(before, state(pipe))
    whole = attacks.join(material.encodings)
    assert torch.allclose(found.encoding.texts[SEQUENCE] @ edited.T, whole.texts[SEQUENCE], atol=1e-3)
    assert not torch.allclose(found.encoding.texts[SEQUENCE], whole.texts[SEQUENCE], atol=1e-2)
    first = Encoding({name: value[:2] for name, value in found.encoding.tensors.items()})
    with torch.no_grad():
        attacked = replay(pipe.unet, material.moments[0][0], first)
        erased = replay(pipe.unet, material.moments[0][0], material.encodings[0])
    wanted = material.moments[0][0].prediction
    assert (attacked - wanted).norm() < 1e-3 * (erased - wanted).norm()


def test_the_closed_form_is_shortened_to_lengths_of_real_prompts(pipe: Any, material: Material, edited: Tensor) -> None:
    longest = attacks.join(material.encodings).texts[SEQUENCE].norm(dim=-1).max()
    far = attacks.closed_form(pipe, material, Budget(length=0.5), DRAWING)
    rows = far.encoding.texts[SEQUENCE].norm(dim=-1)
    assert rows.max() <= 0.5 * longest * 1.0001
    assert far.lengths > 0.6  # what it wanted before it was shortened is in the report


def test_shorten_leaves_short_rows_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.equal(shorten(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_the_gradient_attack_descends_inside_its_ball(pipe: Any, material: Material, edited: Tensor) -> None:
    before = state(pipe)
    found = attacks.gradient(pipe, material, Budget(iterations=12, moments=2, radius=0.2), DRAWING)
    assert_same(before, state(pipe))
    start = attacks.join(material.encodings).texts[SEQUENCE]
    moved = (found.encoding.texts[SEQUENCE] - start).flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
    assert bool((moved <= 0.2001).all())
    assert bool((moved > 0.01).all())
    assert found.losses[1] < 0.9 * found.losses[0]


@pytest.mark.parametrize("budget", [Budget(radius=0.0, iterations=3), Budget(iterations=0)])
def test_no_ball_or_no_steps_is_no_attack(pipe: Any, material: Material, edited: Tensor, budget: Budget) -> None:
    found = attacks.gradient(pipe, material, budget, DRAWING)
    assert torch.equal(found.encoding.texts[SEQUENCE], attacks.join(material.encodings).texts[SEQUENCE])
    assert found.losses[0] == found.losses[1] > 0


def test_an_attack_that_fails_leaves_nothing_behind(
    pipe: Any, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(pipe)

    def fail(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attacks, "error", fail)
    for attack in (attacks.gradient, attacks.inversion):
        with pytest.raises(RuntimeError, match="out of memory"):
            attack(pipe, material, BUDGET, DRAWING)
        assert_same(before, state(pipe))


# -- textual inversion -------------------------------------------------------------------------------------------------


def test_occurrences_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (3, 12), generator=generator)
    for word in (torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([1, 0, 1]), torch.ones(13, dtype=torch.int64)):
        size = len(word)
        wanted = [[row[i : i + size].tolist() == word.tolist() for i in range(12)] for row in ids]
        assert occurrences(ids, word).tolist() == wanted


def test_inversion_learns_vectors_of_real_length(
    pipe: Any, material: Material, edited: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[LearnedWord] = []
    make = LearnedWord.__init__

    def remember(self: LearnedWord, *args: Any) -> None:
        make(self, *args)
        learned.append(self)

    monkeypatch.setattr(LearnedWord, "__init__", remember)
    before = state(pipe)
    found = attacks.inversion(pipe, material, Budget(iterations=30, moments=2, percentile=60), DRAWING)
    assert_same(before, state(pipe))
    (word,) = learned
    norms = pipe.text_encoder.get_input_embeddings().weight.norm(dim=1)
    assert word.vectors.shape[0] == 3  # c, a, t: the tiny tokenizer spells
    assert bool((word.vectors.norm(dim=1) <= torch.quantile(norms, 0.6) * 1.0001).all())
    start = attacks.join(material.encodings).texts[SEQUENCE]
    changed = (found.encoding.texts[SEQUENCE] - start).abs().amax(-1) > 1e-6
    ids = pipe.tokenizer(PROMPTS, padding="max_length").input_ids
    for row, tokens in zip(changed, ids, strict=True):
        first = tokens.index(word.ids[0].item())
        assert not bool(row[:first].any())  # a causal encoder: what stands before the word cannot know
        assert bool(row[first:].all())
    assert torch.equal(
        found.encoding.tensors["negative_prompt_embeds"],
        attacks.join(material.encodings).tensors["negative_prompt_embeds"],
    )


def test_inversion_comes_closer_to_the_original(pipe: Any, material: Material, edited: Tensor) -> None:
    budget = Budget(iterations=48, moments=1, percentile=100)
    found = attacks.inversion(pipe, material, budget, DRAWING)
    whole = attacks.join(material.encodings)
    with torch.no_grad():
        losses = []
        for encoding in (whole, found.encoding):
            total = 0.0
            for i, rows in enumerate(batches(3, 2)):
                cut = Encoding({name: value[rows.start : rows.stop] for name, value in encoding.tensors.items()})
                total += float(attacks.error(pipe.unet, material.moments[i][0], cut))
            losses.append(total)
    assert losses[1] < 0.95 * losses[0]


def test_a_word_that_stands_in_no_prompt_cannot_be_learned(pipe: Any) -> None:
    material = attacks.prepare(pipe, PROMPTS[:1], ["dog"], [5], DRAWING, BUDGET)
    before = state(pipe)
    with pytest.raises(ProofError, match="'dog' were found in none"):
        attacks.inversion(pipe, material, BUDGET, DRAWING)
    assert_same(before, state(pipe))


# --- the closed form within a ball ---


def test_shift_within_is_the_best_of_the_ball() -> None:
    """Against projected gradient descent, which needs no bisection; short of the ball it is the plain solution."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    normal = root.T @ root
    slope = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    free = torch.linalg.solve(normal, slope.flatten(0, 1).T).T.reshape(slope.shape)
    limits = free.flatten(1).norm(dim=1) * torch.tensor([0.2, 0.6, 2.0], dtype=torch.float64)
    found = attacks.shift_within(normal, slope, limits)

    slow = torch.zeros_like(slope)
    for _ in range(20_000):
        slow = slow - (slow @ normal - slope) / torch.linalg.eigvalsh(normal).max()
        slow = slow * (limits / slow.flatten(1).norm(dim=1).clamp(min=1e-30)).clamp(max=1)[:, None, None]
    assert torch.allclose(found, slow, atol=1e-6)
    assert torch.allclose(found.flatten(1).norm(dim=1)[:2], limits[:2])
    assert torch.allclose(found[2], free[2])


def test_shift_within_leaves_what_nothing_reads() -> None:
    normal = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    found = attacks.shift_within(normal, torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([5.0]).double())
    assert torch.allclose(found, torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    still = attacks.shift_within(torch.zeros(2, 2).double(), torch.zeros(1, 2).double(), torch.ones(1).double())
    assert not still.any()


def test_the_near_attack_restores_more_the_farther_it_may_go(pipe: Any, material: Material, edited: Tensor) -> None:
    text = attacks.join(material.encodings).texts[SEQUENCE]
    errors = []
    for radius in (0.1, 0.4, 50.0):
        found = attacks.closed_form_near(pipe, material, Budget(radius=radius), DRAWING).encoding.texts[SEQUENCE]
        away = (found - text).flatten(1).norm(dim=1) / text.flatten(1).norm(dim=1)
        assert bool((away <= radius * (1 + 1e-5)).all())
        layers = text_layers(pipe)
        errors.append(
            sum(
                float((layers[path](found) - text @ matrix.T.float()).detach().square().sum())
                for path, matrix in material.matrices[SEQUENCE].items()
            )
        )
    assert errors[0] > 1.2 * errors[1] > 100 * errors[2]

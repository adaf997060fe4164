"""Attacks on an erased concept: what someone who holds the edited weights can do with the embedding of a prompt.

- `closed_form` (RECE, arXiv:2407.12383): the embedding that makes the edited text projections say what the original ones
  said, by regularised least squares over all of them, then shortened to lengths that real prompts have.
- `closed_form_near`: the same without the original's length as a crutch: the best embedding within a ball around the
  prompt's own, so that its radius says how far an attacker has to go.
- `gradient` (as UnlearnDiffAtk and P4D, without their search for words): projected gradient descent in a ball around
  each prompt's embedding, towards the predictions of the original model on its own trajectory.
- `inversion` (textual inversion, as in arXiv:2308.01508): new vectors for the concept's tokens at the input of the text
  encoders, towards the same predictions, never longer than the 99th percentile of the real ones.

None is an upper bound. All aim at the original model's predictions, which a real attacker has only with the original
weights; pictures of the concept would do, more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.erasure.proof.learned_words import LearnedWord, encoders, inserted, shorten
from diffaccel.erasure.proof.recognition import ProofError
from diffaccel.erasure.proof.recording import (
    Drawing,
    Encoding,
    Moment,
    batches,
    denoiser_of,
    encode,
    live_matrix,
    readers,
    record,
    replay,
)

ATTACKS = ("closed_form", "gradient", "inversion")


@dataclass(frozen=True)
class Budget:
    """How hard the attacks try.

    Attributes:
        regulariser: of the closed form, relative to the mean diagonal of its normal matrix.
        length: longest row it may use, in lengths of the longest row of the attacked prompts.
        radius: of the ball of the gradient attack and of `closed_form_near`, relative to the norm of the prompt's embedding.
        iterations: gradient steps of the two other attacks.
        moments: denoising steps whose predictions they aim at.
        percentile: of the real tokens' norms, the longest vector the inversion may learn.
    """

    regulariser: float = 1e-3
    length: float = 1.5
    radius: float = 0.3
    iterations: int = 40
    moments: int = 6
    percentile: float = 99.0


@dataclass(frozen=True)
class Material:
    """What the unedited model did with some prompts: recorded before the edit, one entry per batch.

    Attributes:
        seeds: of the pictures that the prompts were recorded with and are attacked on.
        matrices: what each layer that reads the text did to it, by argument name and path.
    """

    prompts: tuple[str, ...]
    concepts: tuple[str, ...]
    seeds: tuple[int, ...]
    encodings: tuple[Encoding, ...]
    moments: tuple[tuple[Moment, ...], ...]
    matrices: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Attacked:
    """Embeddings to draw from.

    Attributes:
        lengths: norm of the changed embedding over that of the prompt's, largest over the prompts, before shortening.
        losses: mean squared difference to the original predictions before the first and after the last step; () if none.
    """

    encoding: Encoding
    lengths: float
    losses: tuple[float, ...] = ()


def prepare(
    pipe: Any, prompts: Sequence[str], concepts: Sequence[str], seeds: Sequence[int], drawing: Drawing, budget: Budget
) -> Material:
    """Record what attacks aim at; call it while the pipeline is unedited. Prompt i names concept i."""
    _, network = denoiser_of(pipe)
    encodings, moments = [], []
    for rows in batches(len(prompts), drawing.batch_size):
        with torch.no_grad():
            encoding = encode(pipe, [prompts[i] for i in rows], drawing)
        encodings.append(encoding)
        own = [seeds[i] for i in rows]
        moments.append(tuple(record(pipe, encoding, drawing, moments=budget.moments, seeds=own)))
    found = readers(network, moments[0][0], encodings[0])
    matrices = {
        name: {path: live_matrix(layer, encodings[0].texts[name].shape[-1]) for path, layer in layers}
        for name, layers in found.items()
    }
    return Material(tuple(prompts), tuple(concepts), tuple(seeds), tuple(encodings), tuple(moments), matrices)


def closed_form(pipe: Any, material: Material, budget: Budget, drawing: Drawing) -> Attacked:
    """RECE's embedding, e -> (N + r I)^-1 T e with N = sum W'^T W' and T = sum W'^T W over all layers that read the text."""
    _, network = denoiser_of(pipe)
    whole, longest = join(material.encodings), 0.0
    changed = {}
    for name, text in whole.texts.items():
        if not material.matrices[name]:
            continue  # a text that reaches no linear layer unchanged
        undo = undo_map(network, material.matrices[name], budget.regulariser)
        rows = (text.double().cpu() @ undo.T).to(text)
        longest = max(longest, _relative_length(rows, text))
        changed[name] = shorten(rows, budget.length * text.flatten(0, -2).norm(dim=-1).max())
    return Attacked(whole.replaced(**changed), longest)


def closed_form_near(pipe: Any, material: Material, budget: Budget, drawing: Drawing) -> Attacked:
    """The embedding that restores the original projections best within a ball of `radius` norms around each prompt's."""
    _, network = denoiser_of(pipe)
    whole, longest = join(material.encodings), 0.0
    changed = {}
    for name, text in whole.texts.items():
        if not material.matrices[name]:
            continue
        normal, cross = normal_matrices(network, material.matrices[name])
        rows = text.double().cpu()
        limits = budget.radius * rows.flatten(1).norm(dim=1)
        shift = shift_within(normal, rows @ (cross - normal).T, limits)
        longest = max(longest, _relative_length((rows + shift).to(text), text))
        changed[name] = (rows + shift).to(text)
    return Attacked(whole.replaced(**changed), longest)


def shift_within(normal: Tensor, slope: Tensor, limits: Tensor) -> Tensor:
    """The minimiser of <s, N s> - 2 <s, g> with ||s|| <= limit, per prompt: s = (N + r I)^-1 g, r >= 0 by bisection.

    Args:
        normal: N (d, d), positive semidefinite.
        slope: g (n, ..., d).
        limits: (n,) positive; the norm runs over everything of a prompt.
    """
    values, vectors = torch.linalg.eigh((normal + normal.T) / 2)
    floor = max(float(values.max()) * 1e-12, 1e-100)  # directions that no projection reads are left alone
    inside = slope @ vectors
    size = (-1, *[1] * (slope.dim() - 1))

    def at(ridge: Tensor) -> Tensor:
        scaled: Tensor = inside / (values.clamp(min=0) + ridge.reshape(size))
        return scaled

    low = torch.full_like(limits, floor)
    high = inside.flatten(1).norm(dim=1) / limits + floor  # short enough: ||g|| / r
    for _ in range(80):
        middle = (low * high).sqrt()
        long = at(middle).flatten(1).norm(dim=1) > limits
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    shift: Tensor = at(high) @ vectors.T
    return shift


def undo_map(network: nn.Module, originals: Mapping[str, Tensor], regulariser: float) -> Tensor:
    """(d, d) in float64: the map from an embedding to the one that restores its original projections best."""
    normal, cross = normal_matrices(network, originals)
    ridge = regulariser * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(normal + ridge))


def normal_matrices(network: nn.Module, originals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """N = sum W'^T W' and T = sum W'^T W over the layers as they are now and as they were; (d, d) in float64."""
    layers = dict(network.named_modules())
    width = next(iter(originals.values())).shape[1]
    normal, cross = torch.zeros(2, width, width, dtype=torch.float64).unbind(0)
    for path, original in originals.items():
        live = live_matrix(layers[path], width)
        normal = normal + live.T @ live
        cross = cross + live.T @ original
    return normal, cross


def _relative_length(rows: Tensor, text: Tensor) -> float:
    return float((rows.flatten(1).norm(dim=1) / text.flatten(1).norm(dim=1)).max())


def join(encodings: Sequence[Encoding]) -> Encoding:
    """The rows of several encodings as one."""
    names = encodings[0].tensors
    return Encoding({name: torch.cat([encoding.tensors[name] for encoding in encodings]) for name in names})


def gradient(pipe: Any, material: Material, budget: Budget, drawing: Drawing) -> Attacked:
    """Projected gradient descent on each prompt's embeddings, in an L2 ball of `radius` times their norm."""
    _, network = denoiser_of(pipe)
    found, losses, longest = [], [], 0.0
    with frozen(pipe):
        for encoding, moments in zip(material.encodings, material.moments, strict=True):
            ending, loss = _descend(network, encoding, moments, budget)
            found.append(ending)
            losses.append(loss)
            longest = max(longest, *(_relative_length(ending.texts[k], text) for k, text in encoding.texts.items()))
    means = torch.tensor(losses).mean(0).tolist()
    return Attacked(join(found), longest, tuple(means))


def _descend(
    network: nn.Module, start: Encoding, moments: Sequence[Moment], budget: Budget
) -> tuple[Encoding, tuple[float, float]]:
    texts = start.texts
    shifts = {name: torch.zeros_like(text, dtype=torch.float32) for name, text in texts.items()}
    limits = {name: budget.radius * _norms(text.float()) for name, text in texts.items()}
    first = _loss_over(network, start, moments)
    for step in range(budget.iterations):
        for shift in shifts.values():
            shift.requires_grad_(True)
        moment = moments[step % len(moments)]
        error(network, moment, _shifted(start, shifts)).backward()  # type: ignore[no-untyped-call]
        length = 4 / budget.iterations * (1 - step / budget.iterations)  # twice the ball's radius in all
        with torch.no_grad():
            shifts = {name: _step(shift, limits[name], length) for name, shift in shifts.items()}
    ending = _shifted(start, shifts)
    return ending, (first, _loss_over(network, ending, moments))


def _step(shift: Tensor, limit: Tensor, length: float) -> Tensor:
    """One normalised step downhill, of `length` radii, and back into the ball."""
    slope = torch.zeros_like(shift) if shift.grad is None else shift.grad
    direction = slope / _norms(slope).clamp(min=1e-20)
    moved = shift.detach() - length * limit * direction
    return moved * (limit / _norms(moved).clamp(min=1e-20)).clamp(max=1)


def _norms(rows: Tensor) -> Tensor:
    """L2 norm of each prompt's tensor, shaped to multiply it."""
    norms: Tensor = rows.flatten(1).norm(dim=1)
    return norms.reshape(-1, *[1] * (rows.dim() - 1))


def _shifted(start: Encoding, shifts: Mapping[str, Tensor]) -> Encoding:
    texts = start.texts
    return start.replaced(
        **{name: (texts[name].float() + shift).to(texts[name].dtype) for name, shift in shifts.items()}
    )


def error(network: nn.Module, moment: Moment, encoding: Encoding) -> Tensor:
    """Mean squared difference to the recorded prediction, summed over prompts so that they do not share a gradient."""
    difference = replay(network, moment, encoding).float() - moment.prediction.float()
    return difference.square().flatten(1).mean(1).sum()


@torch.no_grad()
def _loss_over(network: nn.Module, encoding: Encoding, moments: Sequence[Moment]) -> float:
    total = sum(float(error(network, moment, encoding)) for moment in moments)
    return total / (len(moments) * len(moments[0].prediction))


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """No parameter asks for a gradient inside; all are as before after it, and hold no gradients of ours."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    asked = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def inversion(pipe: Any, material: Material, budget: Budget, drawing: Drawing) -> Attacked:
    """Textual inversion: other input vectors for the tokens of each concept, shared by all its prompts."""
    _, network = denoiser_of(pipe)
    words = {
        c: [LearnedWord(*pair, c, budget.percentile) for pair in encoders(pipe)]
        for c in dict.fromkeys(material.concepts)
    }
    learned = [word for group in words.values() for word in group]
    losses: list[float] = []
    with frozen(pipe), inserted(learned):
        optimizer = torch.optim.Adam([word.vectors for word in learned], lr=0.1 * min(w.scale for w in learned))
        for step in range(budget.iterations):
            batch = step % len(material.encodings)
            moment = material.moments[batch][step // len(material.encodings) % len(material.moments[batch])]
            encoding = _encode_batch(pipe, material, batch, drawing)
            _check_found(words, step)
            loss = error(network, moment, encoding) / len(moment.prediction)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for word in learned:
                word.shorten()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            encodings = [_encode_batch(pipe, material, i, drawing) for i in range(len(material.encodings))]
    whole, before = join(encodings), join(material.encodings)
    longest = max(_relative_length(whole.texts[name], text) for name, text in before.texts.items())
    return Attacked(whole, longest, (losses[0], losses[-1]) if losses else ())


def _check_found(words: Mapping[str, Sequence[LearnedWord]], step: int) -> None:
    """Refuse to learn vectors that nothing reads: some tokenizers cut a word differently in a sentence."""
    lost = [concept for concept, group in words.items() if not any(word.found for word in group)]
    if step == 0 and len(lost) == len(words):
        raise ProofError(f"The tokens of {lost[0]!r} were found in none of its prompts, so no vectors can be learned.")


def _encode_batch(pipe: Any, material: Material, batch: int, drawing: Drawing) -> Encoding:
    start = batch * drawing.batch_size
    found = encode(pipe, material.prompts[start : start + drawing.batch_size], drawing)
    # negative prompts and masks stay as they were: only what the attacker can type is attacked
    return material.encodings[batch].replaced(**found.texts)


BY_NAME: dict[str, Callable[[Any, Material, Budget, Drawing], Attacked]] = {
    "closed_form": closed_form,
    "closed_form_near": closed_form_near,
    "gradient": gradient,
    "inversion": inversion,
}

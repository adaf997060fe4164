"""Build the world's tokenizer and teach its text encoder to spread a caption's meaning over its tokens.

As for the shapes, the encoder is causal, trained first and then frozen. The end-of-text position and every padding
position learn to tell, through one linear layer, which thing lies at each of nine places, how large it is, in which
style and on what ground the picture is; every word from a thing's last on learns to tell that thing. A synonym so comes
to lie near its noun, and a wider word ("an animal"), which asks for one of its children with equal chances, among them.

Which thing lies where is the hard part: without help it stays at chance for thousands of steps. So every word also learns
to tell how many things were spoken of so far, and the end of text which was first, second, third and fourth.

python -m training.world.train_text --out training/out --minutes 12
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy
import torch
from numpy.random import Generator
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffaccel.miniatures.world.captions import Mention, Truth, caption, held_out_prompts, vocabulary_words
from diffaccel.miniatures.world.nouns import NAMES, NOUN_INDEX
from diffaccel.miniatures.world.scenes import GROUND_COLOURS, GROUNDS, MAX_OBJECTS, PLACES, STYLES, pick, training_scene
from training.common import Trainee, run_script
from training.train_sd3 import LOWER_LAYERS, _lower_part
from training.train_text import build_text_encoder, build_tokenizer, tokenize
from training.world.learner import load_averaged

LENGTH, WIDTH = 32, 192
BATCH = 64
PEAK_RATE = 1.5e-3
EMPTY_SHARE = 0.03
OBJECTS = (1, 1, 1, 2, 2, 2, 2, 3, 4)  # several things are what takes time to learn
# What is told of the whole picture; class 0 of each is "untold".
WHOLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bulk", ("small", "large")),
    ("style", STYLES),
    ("ground_colour", GROUND_COLOURS),
    ("ground_kind", GROUNDS),
)
NOTHING = len(NAMES)  # the class of an empty place


class Heads(nn.Module):
    """Linear read-outs: the thing at each place, things in the order spoken, and what is told of the whole picture."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.places = nn.Linear(width, len(PLACES) * (len(NAMES) + 1))
        self.spoken = nn.Linear(width, len(NAMES))
        self.count = nn.Linear(width, MAX_OBJECTS + 1)
        self.order = nn.Linear(width, MAX_OBJECTS * (len(NAMES) + 1))
        self.whole = nn.Linear(width, sum(len(values) + 1 for _, values in WHOLE))

    def at_places(self, hidden: Tensor) -> Tensor:
        """(..., places, nouns + 1) logits."""
        return self.places(hidden).unflatten(-1, (len(PLACES), -1))

    def in_order(self, hidden: Tensor) -> Tensor:
        """(..., 4, nouns + 1) logits: first, second, third and fourth thing spoken of."""
        return self.order(hidden).unflatten(-1, (MAX_OBJECTS, -1))

    def of_whole(self, hidden: Tensor) -> list[Tensor]:
        return list(self.whole(hidden).split([len(values) + 1 for _, values in WHOLE], -1))


def share_of(mention: Mention) -> Tensor:
    """(nouns + 1,): the chance of each noun that fulfils the word."""
    row = torch.zeros(len(NAMES) + 1)
    row[[NOUN_INDEX[name] for name in mention.names]] = 1 / len(mention.names)
    return row


def place_targets(truth: Truth | None) -> Tensor:
    """(places, nouns + 1): the chance of each thing, or of nothing, at each place; what is untold lies in the middle."""
    rows = torch.zeros(len(PLACES), len(NAMES) + 1)
    rows[:, NOTHING] = 1.0
    for mention in truth.mentions if truth else ():
        rows[PLACES.index(mention.place or "centre")] = share_of(mention)
    return rows


def whole_targets(truth: Truth | None) -> list[int]:
    """One class per row of WHOLE."""
    if truth is None:
        return [0] * len(WHOLE)
    told = {"bulk": truth.mentions[0].bulk}
    told |= {name: getattr(truth, name) for name in ("style", "ground_colour", "ground_kind")}
    return [0 if told[name] is None else values.index(str(told[name])) + 1 for name, values in WHOLE]


def term_end(ids: Sequence[int], term: Sequence[int], taken: set[int]) -> int:
    """Where `term`'s last token stands in `ids`, outside the positions taken, which grow. Raises ValueError if nowhere."""
    for start in range(len(ids) - len(term) + 1):
        span = range(start, start + len(term))
        if list(ids[start : start + len(term)]) == list(term) and taken.isdisjoint(span):
            taken.update(span)
            return span[-1]
    raise ValueError("the caption does not hold its own word")


@dataclass
class Batch:
    """Captions as ids (n, 32) and what their rows should tell.

    places (n, 9, nouns + 1) and whole (n, 4): at the end of text. order (n, 4, nouns + 1): there too, in the order spoken.
    spoken (n, 32, nouns + 1): the thing last spoken of, zeros where there is none. count (n, 32): how many so far.
    """

    ids: Tensor
    places: Tensor
    whole: Tensor
    order: Tensor
    spoken: Tensor
    count: Tensor

    def cut(self, width: int) -> Batch:
        """The first `width` positions."""
        return replace(self, ids=self.ids[:, :width], spoken=self.spoken[:, :width], count=self.count[:, :width])

    def to(self, device: str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Batches:
    """Captions drawn at random with their targets as tensors."""

    def __init__(self, tokenizer: CLIPTokenizer, rng: Generator) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self._terms: dict[str, list[int]] = {}

    def draw(self, count: int) -> Batch:
        rows = [self._one() for _ in range(count)]
        ids = tokenize(self.tokenizer, [text for text, _ in rows])
        order, spoken, counts = zip(
            *(self._spoken(row, truth) for row, (_, truth) in zip(ids.tolist(), rows, strict=True)), strict=True
        )
        places = torch.stack([place_targets(truth) for _, truth in rows])
        whole = torch.tensor([whole_targets(truth) for _, truth in rows])
        return Batch(ids, places, whole, torch.stack(order), torch.stack(spoken), torch.stack(counts))

    def _one(self) -> tuple[str, Truth | None]:
        if self.rng.random() < EMPTY_SHARE:
            return "", None
        objects = pick(self.rng, OBJECTS)
        side = 128 if objects == 1 and self.rng.random() < 0.5 else 256
        style = "random" if self.rng.random() < 0.5 else None
        return caption(training_scene(self.rng, objects, side, style), self.rng)

    def _spoken(self, ids: list[int], truth: Truth | None) -> tuple[Tensor, Tensor, Tensor]:
        """`order`, `spoken` and `count` of one caption."""
        order, rows = torch.zeros(MAX_OBJECTS, len(NAMES) + 1), torch.zeros(len(ids), len(NAMES) + 1)
        count, end = torch.zeros(len(ids), dtype=torch.long), ids.index(self.tokenizer.eos_token_id)
        mentions, taken = (truth.mentions if truth else ()), set[int]()
        longest_first = sorted(mentions, key=lambda mention: -len(self._ids(mention.term)))
        ends = {term_end(ids, self._ids(mention.term), taken): mention for mention in longest_first}
        for index, (at, mention) in enumerate(sorted(ends.items())):
            rows[at:end] = order[index] = share_of(mention)
            count[at:] = index + 1
        return order, rows, count

    def _ids(self, term: str) -> list[int]:
        if term not in self._terms:
            self._terms[term] = self.tokenizer(term, add_special_tokens=False).input_ids
        return self._terms[term]


def text_loss(hidden: Tensor, batch: Batch, heads: Heads, end: int) -> Tensor:
    """Cross entropies at the end of text, at one random position after it, and at the words (see the module)."""
    cross, rows = nn.functional.cross_entropy, torch.arange(len(batch.ids))
    ends = (batch.ids == end).float().argmax(1)
    later = ends + (torch.rand(len(ends)).to(ends.device) * (hidden.shape[1] - ends)).long()
    named = batch.order.sum(-1) > 0
    total = hidden.new_zeros(())
    for at in (ends, later):
        state = hidden[rows, at]
        places = heads.at_places(state).flatten(0, 1)
        total = total + cross(places, batch.places.flatten(0, 1)) * len(PLACES)
        total = total + 2 * cross(heads.in_order(state)[named], batch.order[named])
        for index, part in enumerate(heads.of_whole(state)):
            total = total + cross(part, batch.whole[:, index])
    told = batch.spoken.sum(-1) > 0
    total = total / 2 + cross(heads.spoken(hidden[told]), batch.spoken[told][:, :-1])
    return total + cross(heads.count(hidden).flatten(0, 1), batch.count.flatten())


@torch.no_grad()
def decode_accuracy(
    encoder: CLIPTextModel, heads: Heads, tokenizer: CLIPTokenizer, count: int = 400
) -> dict[str, float]:
    """Share of held-out captions read completely right, by kind, at the end of text and at the last padding."""
    found = {}
    for kind in ("single", "style", "pair", "three", "four"):
        cases = held_out_prompts(kind, count, seed=5)
        ids = tokenize(tokenizer, [case.prompt for case in cases])
        hidden = encoder(ids).last_hidden_state
        ends = (ids == tokenizer.eos_token_id).float().argmax(1)
        places = torch.stack([place_targets(case.truth) for case in cases]).argmax(-1)
        whole = torch.tensor([whole_targets(case.truth) for case in cases])
        for name, at in (("end", ends), ("last", torch.full_like(ends, -1))):
            state = hidden[torch.arange(len(ids)), at]
            right = (heads.at_places(state).argmax(-1) == places).all(1)
            told = torch.stack([part.argmax(-1) for part in heads.of_whole(state)], 1) == whole
            found[f"{kind}_{name}"] = round((right & told.all(1)).float().mean().item(), 4)
    return found


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 2) -> CLIPTextModel:
    """Train or continue; returns the averaged encoder and leaves it in `out/text.pt`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(out / "tokenizer", vocabulary_words(), LENGTH)
    encoder, heads = build_text_encoder(tokenizer, WIDTH).to(device), Heads().to(device)
    encoder.set_attn_implementation("eager")  # fused attention's backward pass is slow in bfloat16 on a CPU
    both = nn.ModuleList([encoder, heads])
    trainee = Trainee(both, out / "text.pt", minutes, rate=PEAK_RATE, decay=0.998, weight_decay=0.01)
    batches = Batches(tokenizer, numpy.random.default_rng([seed, trainee.step]))
    for step in trainee:
        batch = batches.draw(BATCH)
        longest = int((batch.ids != tokenizer.eos_token_id).sum(1).max())
        batch = batch.cut(LENGTH if step % 4 == 0 else longest + 3).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            hidden = encoder(batch.ids).last_hidden_state
        loss = text_loss(hidden.float(), batch, heads, tokenizer.eos_token_id)
        trainee.learn(loss)
        if step % 100 == 0:
            print(f"text {step} {trainee.clock.seconds:.0f} s loss {loss.item():.4f}", flush=True)
        if step % 500 == 499:
            trainee.save()
    trainee.finish()
    encoder.cpu().eval()
    print("held-out captions decoded:", decode_accuracy(encoder, heads.cpu(), tokenizer), flush=True)
    return encoder


def load_text(out: Path, checkpoint: Path | None = None) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer of `out` and the averaged, frozen encoder in `checkpoint`, by default `out/text.pt`.

    Raises FileNotFoundError before they have been trained.
    """
    weights = load_averaged(checkpoint or out / "text.pt", "training.world.train_text")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = build_text_encoder(tokenizer, WIDTH)
    first = {name.removeprefix("0."): value for name, value in weights.items() if name.startswith("0.")}
    encoder.load_state_dict(first)  # the second are the read-outs
    return tokenizer, encoder.eval().requires_grad_(False)


def text_encoders(out: Path) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The tokenizer and both encoders of Stable Diffusion 3, cut from the trained one as for the shapes."""
    tokenizer, trained = load_text(out)
    layers = trained.config.num_hidden_layers
    return tokenizer, _lower_part(trained, layers), _lower_part(trained, LOWER_LAYERS)


if __name__ == "__main__":
    run_script(__doc__, 12, train)

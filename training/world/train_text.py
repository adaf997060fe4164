"""Build the world's tokenizer and teach its text encoder to spread a caption's meaning over its tokens.

As for the shapes, the encoder is causal, trained first and then frozen. The end-of-text position and every padding
position learn to tell, through one linear layer, which thing lies at each of nine places, how large it is, in which
style and on what ground the picture is; every word from a thing's last on learns to tell that thing. A synonym so comes
to lie near its noun, and a wider word ("an animal"), which asks for one of its children with equal chances, among them.

python -m training.world.train_text --out training/out --minutes 12
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from numpy.random import Generator
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffaccel.miniatures.world.captions import Mention, Truth, caption, held_out_prompts, vocabulary_words
from diffaccel.miniatures.world.nouns import NAMES, NOUN_INDEX
from diffaccel.miniatures.world.scenes import GROUND_COLOURS, GROUNDS, PLACES, STYLES, training_scene
from training.common import Trainee, load_checkpoint, run_script
from training.train_sd3 import LOWER_LAYERS, _lower_part
from training.train_text import build_text_encoder, build_tokenizer, tokenize

LENGTH, WIDTH = 32, 192
BATCH = 64
PEAK_RATE = 1.5e-3
EMPTY_SHARE = 0.03
# What is told of the whole picture; class 0 of each is "untold".
WHOLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bulk", ("small", "large")),
    ("style", STYLES),
    ("ground_colour", GROUND_COLOURS),
    ("ground_kind", GROUNDS),
)
NOTHING = len(NAMES)  # the class of an empty place


class Heads(nn.Module):
    """Linear read-outs: the thing at each place, the thing last spoken of, and what is told of the whole picture."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.places = nn.Linear(width, len(PLACES) * (len(NAMES) + 1))
        self.spoken = nn.Linear(width, len(NAMES))
        self.whole = nn.Linear(width, sum(len(values) + 1 for _, values in WHOLE))

    def at_places(self, hidden: Tensor) -> Tensor:
        """(..., places, nouns + 1) logits."""
        return self.places(hidden).unflatten(-1, (len(PLACES), -1))

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


class Batches:
    """Captions drawn at random with their targets as tensors."""

    def __init__(self, tokenizer: CLIPTokenizer, rng: Generator) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self._terms: dict[str, list[int]] = {}

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids (n, 32), places (n, 9, nouns + 1), whole (n, 4) and the noun last spoken of (n, 32, nouns + 1)."""
        rows = [self._one() for _ in range(count)]
        ids = tokenize(self.tokenizer, [text for text, _ in rows])
        spoken = [self._spoken(row, truth) for row, (_, truth) in zip(ids.tolist(), rows, strict=True)]
        places = torch.stack([place_targets(truth) for _, truth in rows])
        return ids, places, torch.tensor([whole_targets(truth) for _, truth in rows]), torch.stack(spoken)

    def _one(self) -> tuple[str, Truth | None]:
        if self.rng.random() < EMPTY_SHARE:
            return "", None
        side = 128 if self.rng.random() < 0.3 else 256
        style = "random" if self.rng.random() < 0.5 else None
        objects = 1 if side == 128 else None
        return caption(training_scene(self.rng, objects, side, style), self.rng)

    def _spoken(self, ids: list[int], truth: Truth | None) -> Tensor:
        """(32, nouns + 1): zeros before the first noun's last token and from the end of text on."""
        rows = torch.zeros(len(ids), len(NAMES) + 1)
        mentions, taken = (truth.mentions if truth else ()), set[int]()
        longest_first = sorted(mentions, key=lambda mention: -len(self._ids(mention.term)))
        ends = {term_end(ids, self._ids(mention.term), taken): mention for mention in longest_first}
        for end, mention in sorted(ends.items()):
            rows[end:] = share_of(mention)
        rows[ids.index(self.tokenizer.eos_token_id) :] = 0
        return rows

    def _ids(self, term: str) -> list[int]:
        if term not in self._terms:
            self._terms[term] = self.tokenizer(term, add_special_tokens=False).input_ids
        return self._terms[term]


def text_loss(hidden: Tensor, ids: Tensor, heads: Heads, targets: tuple[Tensor, Tensor, Tensor], end: int) -> Tensor:
    """Cross entropies at the end of text, at one random position after it, and at the words (see the module)."""
    places, whole, spoken = targets
    rows = torch.arange(len(ids))
    ends = (ids == end).float().argmax(1)
    later = ends + (torch.rand(len(ids)) * (hidden.shape[1] - ends)).long()
    total = hidden.new_zeros(())
    for at in (ends, later):
        state = hidden[rows, at]
        logits = heads.at_places(state).flatten(0, 1)
        total = total + nn.functional.cross_entropy(logits, places.flatten(0, 1)) * len(PLACES)
        for index, part in enumerate(heads.of_whole(state)):
            total = total + nn.functional.cross_entropy(part, whole[:, index])
    told = spoken.sum(-1) > 0
    return total / 2 + nn.functional.cross_entropy(heads.spoken(hidden[told]), spoken[told][:, :-1])


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
        ids, *targets = (part.to(device) for part in batches.draw(BATCH))
        width = LENGTH if step % 4 == 0 else int((ids != tokenizer.eos_token_id).sum(1).max()) + 3
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            hidden = encoder(ids[:, :width]).last_hidden_state
        targets[2] = targets[2][:, :width]
        loss = text_loss(hidden.float(), ids[:, :width], heads, tuple(targets), tokenizer.eos_token_id)
        trainee.learn(loss)
        if step % 100 == 0:
            print(f"text {step} {trainee.clock.seconds:.0f} s loss {loss.item():.4f}", flush=True)
        if step % 500 == 499:
            trainee.save()
    trainee.finish()
    encoder.cpu().eval()
    print("held-out captions decoded:", decode_accuracy(encoder, heads.cpu(), tokenizer), flush=True)
    return encoder


def load_text(out: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the averaged, frozen encoder of `out`. Raises FileNotFoundError before they have been trained."""
    saved = load_checkpoint(out / "text.pt")
    if saved is None:
        raise FileNotFoundError(f"no {out / 'text.pt'}: run training.world.train_text first")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = build_text_encoder(tokenizer, WIDTH)
    for parameter, value in zip(encoder.parameters(), saved["average"], strict=False):
        parameter.data.copy_(value)
    return tokenizer, encoder.eval().requires_grad_(False)


def text_encoders(out: Path) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The tokenizer and both encoders of Stable Diffusion 3, cut from the trained one as for the shapes."""
    tokenizer, trained = load_text(out)
    layers = trained.config.num_hidden_layers
    return tokenizer, _lower_part(trained, layers), _lower_part(trained, LOWER_LAYERS)


if __name__ == "__main__":
    run_script(__doc__, 12, train)

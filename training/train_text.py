"""Build the tokenizer and teach the text encoder to spread a caption's meaning over its tokens.

The encoder is causal. It is trained until the end-of-text position and every padding position tell, through
one linear layer, what lies at each place of the picture; and until each word tells what is known of its own
object so far. The UNet then neither has to learn language nor which colour belongs to which shape.

python -m training.train_text --out training/out --minutes 6
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffaccel.miniatures import scenes as vocabulary
from diffaccel.miniatures.scenes import Scene, SceneObject, Statement
from training.common import Trainee, run_script, seeded

LENGTH, WIDTH, LAYERS = 32, 128, 4
BATCH = 64
PEAK_RATE = 1.5e-3
EMPTY_SHARE = 0.1
PLACES = ("centre", "left", "right", "top", "bottom")
FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shape", vocabulary.SHAPES),
    ("colour", vocabulary.COLOURS),
    ("texture", vocabulary.TEXTURES),
    ("size", vocabulary.SIZES),
)
# Per object: each field's values, then "unstated", then "no object here".
FIELD_CLASSES = tuple(len(values) + 2 for _, values in FIELDS)
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary_words() -> list[str]:
    """Every word a caption can hold."""
    tables: Iterable[dict[str, tuple[str, ...]]] = (
        vocabulary.SHAPE_WORDS,
        vocabulary.COLOUR_WORDS,
        vocabulary.TEXTURE_WORDS,
        vocabulary.SIZE_WORDS,
        vocabulary.RELATION_WORDS,
        vocabulary.BACKGROUND_WORDS,
    )
    words = {word for table in tables for phrases in table.values() for text in phrases for word in text.split()}
    return sorted(words | set("a an one picture of on background".split()))


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes that CLIP's byte-level BPE uses, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each of `words` is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    pairs = Counter(pair for row in pieces for pair in pairwise(row))
    holders: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # only the words that hold a pair change with it
    for index, row in enumerate(pieces):
        _note(holders, row, index)
    merges = []
    while pairs := +pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for index in holders[best]:
            pairs.subtract(pairwise(pieces[index]))
            pieces[index] = _merge(pieces[index], best)
            pairs.update(pairwise(pieces[index]))
        for index in tuple(holders[best]):
            _note(holders, pieces[index], index)
    return merges


def _note(holders: defaultdict[tuple[str, str], set[int]], row: Sequence[str], index: int) -> None:
    for pair in pairwise(row):
        holders[pair].add(index)


def _merge(row: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in row:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_tokenizer(folder: Path, words: Sequence[str] | None = None, length: int = LENGTH) -> CLIPTokenizer:
    """Write vocab.json and merges.txt into `folder` and load them the way a pipeline would.

    `words` (the shapes' if None) become one token each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges, symbols = learn_merges(words or vocabulary_words()), byte_symbols()
    entries = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    table = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=END, model_max_length=length
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextModel:
    """A CLIP text model of 0.9 M parameters (more if wider) for `tokenizer`, as long as it pads to."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """(n, length) token ids, padded with end-of-text."""
    ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.as_tensor(ids)


class AttributeHeads(nn.Module):
    """Linear read-outs: attributes by place (5), by order of mention (2), and the background."""

    def __init__(self) -> None:
        super().__init__()
        per_object = sum(FIELD_CLASSES)
        self.places = nn.Linear(WIDTH, len(PLACES) * per_object)
        self.mentions = nn.Linear(WIDTH, 2 * per_object)
        self.background = nn.Linear(WIDTH, len(vocabulary.BACKGROUNDS) + 1)


def object_classes(item: SceneObject | None, texture: bool, size: bool) -> list[int]:
    """Class of each field; one past the values means unstated, two past means there is no object."""
    if item is None:
        return [count - 1 for count in FIELD_CLASSES]
    stated = (True, True, texture, size)
    return [
        values.index(getattr(item, name)) if told else len(values)
        for (name, values), told in zip(FIELDS, stated, strict=True)
    ]


def targets(scene: Scene | None, stated: Statement | None) -> list[int]:
    """5 places x 4 fields, then 2 mentions x 4 fields, then the background: 29 classes."""
    empty = object_classes(None, False, False)
    if scene is None or stated is None:
        return empty * 7 + [len(vocabulary.BACKGROUNDS)]
    mentioned = [
        object_classes(item, texture, size)
        for item, texture, size in zip(scene.objects, stated.textures, stated.sizes, strict=True)
    ]
    by_place = dict(zip(vocabulary.canonical_slots(scene), mentioned, strict=True))
    rows = [by_place.get(place, empty) for place in PLACES]
    rows += mentioned + [empty] * (2 - len(mentioned))
    background = vocabulary.BACKGROUNDS.index(scene.background) if stated.background else len(vocabulary.BACKGROUNDS)
    return [value for row in rows for value in row] + [background]


def draw(rng: random.Random, count: int) -> tuple[list[str], Tensor]:
    """Captions and their (count, 29) target classes."""
    captions, rows = [], []
    for _ in range(count):
        if rng.random() < EMPTY_SHARE:
            captions.append("")
            rows.append(targets(None, None))
            continue
        scene = vocabulary.training_scene(rng)
        stated = vocabulary.random_statement(scene, rng)
        captions.append(vocabulary.caption(scene, rng, stated))
        rows.append(targets(scene, stated))
    return captions, torch.tensor(rows)


def _split(logits: Tensor, objects: int) -> list[Tensor]:
    """(..., objects * classes) into objects * 4 tensors, in the order of `targets`."""
    return [part for row in logits.chunk(objects, -1) for part in row.split(FIELD_CLASSES, -1)]


def known_mask(ids: Tensor, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Three (n, 32) masks: at or after the first shape word, after the second, at or after the end of text."""
    words = [word for names in vocabulary.SHAPE_WORDS.values() for word in names]
    shape_ids = torch.tensor(tokenizer.convert_tokens_to_ids([word + "</w>" for word in words]))
    seen = torch.isin(ids, shape_ids.to(ids.device)).cumsum(1)
    ended = (ids == tokenizer.eos_token_id).cumsum(1) > 0
    return seen >= 1, seen >= 2, ended


def heads_loss(hidden: Tensor, ids: Tensor, rows: Tensor, heads: AttributeHeads, tokenizer: CLIPTokenizer) -> Tensor:
    """Mean cross entropy of every read-out over the positions where it can be known."""
    first, second, ended = known_mask(ids, tokenizer)
    outputs = [*_split(heads.places(hidden), len(PLACES)), *_split(heads.mentions(hidden), 2)]
    outputs.append(heads.background(hidden))
    masks = [ended] * (4 * len(PLACES)) + [first] * 4 + [second | ended] * 4 + [ended]
    weights = [1.0] * (4 * len(PLACES)) + [0.5] * 8 + [1.0]
    total = hidden.new_zeros(())
    for index, (output, mask, weight) in enumerate(zip(outputs, masks, weights, strict=True)):
        target = rows[:, index, None].expand(-1, hidden.shape[1])
        total = total + weight * nn.functional.cross_entropy(output[mask], target[mask])
    return total / sum(weights)


@torch.no_grad()
def decode_accuracy(
    encoder: CLIPTextModel,
    heads: AttributeHeads,
    tokenizer: CLIPTokenizer,
    cases: Sequence[vocabulary.PromptCase],
) -> dict[str, float]:
    """Share of prompts whose attributes all decode by place, at the end of text and at the last padding."""
    ids = tokenize(tokenizer, [case.prompt for case in cases])
    rows = torch.tensor([targets(case.scene, case.stated) for case in cases])[:, : 4 * len(PLACES)]
    hidden = encoder(ids).last_hidden_state
    ends = (ids == tokenizer.eos_token_id).float().argmax(1)
    at_end, at_last = hidden[torch.arange(len(ids)), ends], hidden[:, -1]
    found = {}
    for name, state in (("end_of_text", at_end), ("last_padding", at_last)):
        classes = torch.stack([part.argmax(-1) for part in _split(heads.places(state), len(PLACES))], 1)
        found[name] = (classes == rows).all(1).float().mean().item()
    return found


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 2) -> CLIPTextModel:
    """Train or continue; returns the averaged encoder and leaves it in `out/text.pt`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(out / "tokenizer")
    encoder, heads = build_text_encoder(tokenizer).to(device), AttributeHeads().to(device)
    both = nn.ModuleList([encoder, heads])
    trainee = Trainee(both, out / "text.pt", minutes, rate=PEAK_RATE, decay=0.998, weight_decay=0.01)
    rng = seeded(seed * 1000 + trainee.step)[0]
    for step in trainee:
        captions, rows = draw(rng, BATCH)
        ids = tokenize(tokenizer, captions).to(device)
        loss = heads_loss(encoder(ids).last_hidden_state, ids, rows.to(device), heads, tokenizer)
        trainee.learn(loss)
        if step % 100 == 0:
            print(f"text {step} {trainee.clock.seconds:.0f} s loss {loss.item():.4f}", flush=True)
    trainee.finish()
    encoder.cpu().eval()
    cases = vocabulary.held_out_prompts("mixed", 512, 7)
    print("held-out captions decoded:", decode_accuracy(encoder, heads.cpu(), tokenizer, cases), flush=True)
    return encoder


if __name__ == "__main__":
    run_script(__doc__, 6, train)

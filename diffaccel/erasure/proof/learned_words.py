"""Vectors that stand in for a word at the input of text encoders, for textual inversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.erasure.proof.recognition import ProofError


def shorten(rows: Tensor, longest: Tensor | float) -> Tensor:
    """Rows (..., d), those longer than `longest` shortened to it."""
    norms = rows.norm(dim=-1, keepdim=True)
    shortened: Tensor = rows * (longest / norms.clamp(min=torch.finfo(rows.dtype).tiny)).clamp(max=1)
    return shortened


def encoders(pipe: Any) -> list[tuple[Any, nn.Module]]:
    """Tokenizer and text encoder pairs of a pipeline."""
    pairs = [(getattr(pipe, f"tokenizer{s}", None), getattr(pipe, f"text_encoder{s}", None)) for s in ("", "_2", "_3")]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]


class LearnedWord:
    """Vectors that stand in for the tokens of a word wherever these follow each other in the input of a text encoder."""

    def __init__(self, tokenizer: Any, encoder: nn.Module, word: str, percentile: float) -> None:
        self.word, self.found = word, False
        self.ids = torch.tensor(tokenizer(word, add_special_tokens=False).input_ids)
        if not len(self.ids):
            raise ProofError(f"{word!r} has no tokens, so no other vectors can be learned for it.")
        table: Any = encoder.get_input_embeddings()  # type: ignore[operator]
        # T5's stack looks up in a module of its own that shares the weight, and never calls this one
        self.tables = [m for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is table.weight]
        weight = table.weight.detach().float()
        norms = weight.norm(dim=1)
        self.longest = torch.quantile(norms, percentile / 100)
        self.scale = float(norms.mean() / weight.shape[1] ** 0.5)  # size of one number
        self.vectors = shorten(weight[self.ids.to(weight.device)].clone(), self.longest).requires_grad_(True)

    def shorten(self) -> None:
        """Back to lengths that real tokens have."""
        with torch.no_grad():
            self.vectors.copy_(shorten(self.vectors, self.longest))

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The looked-up vectors (n, tokens, d) with ours in their places."""
        places = occurrences(args[0], self.ids.to(args[0].device))
        self.found = self.found or bool(places.any())
        for offset in range(len(self.ids)):
            here = torch.roll(places, offset, dims=1)
            output = torch.where(here[..., None], self.vectors[offset].to(output.dtype), output)
        return output


def occurrences(ids: Tensor, word: Tensor) -> Tensor:
    """(n, tokens) True where the word's tokens begin. An occurrence never runs past the end."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    if len(word) <= ids.shape[1]:
        found[:, : ids.shape[1] - len(word) + 1] = (ids.unfold(1, len(word), 1) == word).all(-1)
    return found


@contextmanager
def inserted(words: Sequence[LearnedWord]) -> Iterator[None]:
    handles = [table.register_forward_hook(word.hook) for word in words for table in word.tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""The embeddings that edits are made of: which rows of which prompts, and their values as the denoiser receives them.

A row has a key (section, text, index). The index counts tokens from the start of its section; pooled vectors have index
0. CLIP's text models are causal, so rows do not depend on what follows and prompts are encoded up to the last wanted row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.edits.concepts import ErasureError
from diffaccel.edits.routes import Route, sections
from diffaccel.errors import Unsupported
from diffaccel.models.facts import Source

Policy = Literal["last", "span", "tail", "words", "all", "context"]
Key = tuple[int, str, int]
BATCH_TOKENS = 2048  # encoded at a time; bounds the memory of the encoder's activations
POOLED_SECTION = -1


@dataclass(frozen=True)
class Span:
    """Where a phrase lies among the rows of its prompt.

    Attributes:
        head: rows before the first word (1 for CLIP's start token, 0 for T5).
        start, stop: rows of the phrase, past-the-end style. Both equal `head` for an empty prompt.
        end: rows before the paddings, the end-of-text row included.
        total: rows with the paddings that count; equal to `end` where paddings are masked.
        stands_for: paddings of the prompt per padding that counts.
    """

    head: int
    start: int
    stop: int
    end: int
    total: int
    stands_for: float = 1.0


def chosen_rows(policy: Policy, span: Span) -> list[int]:
    """Rows of a prompt that a policy takes.

    "last": the phrase's last token; "span": all its tokens; "tail": from its last token to the end of the sequence,
    end-of-text and paddings included; "words": everything but start token and paddings; "all": everything but the start
    token; "context": "all" without the phrase.
    """
    phrase = range(span.start, span.stop)
    if policy == "last":
        return [span.stop - 1]
    if policy == "span":
        return list(phrase)
    if policy == "tail":
        return list(range(span.stop - 1, span.total))
    if policy == "words":
        return list(range(span.head, span.end))
    return [row for row in range(span.head, span.total) if policy == "all" or row not in phrase]


def pair_rows(policy: Policy, target: Span, anchor: Span) -> list[tuple[int, int]]:
    """Rows of the target's prompt, each with its counterpart in the anchor's prompt (the same template).

    Words before the phrase pair from the start, the phrase from its end (a longer target's first tokens all meet the
    anchor's first), what follows it by distance from it, paddings by their place. An empty anchor prompt has no phrase:
    its rows pair by their place. Where the anchor is the sentence without the phrase, the phrase pairs with what takes
    its place. Nothing is left out, and nothing wraps around.
    """
    empty = anchor.start == anchor.stop and anchor.end <= anchor.head + 1
    return [(row, _counterpart(row, target, anchor, empty)) for row in chosen_rows(policy, target)]


def _counterpart(row: int, target: Span, anchor: Span, empty: bool) -> int:
    last = anchor.total - 1
    if empty or row < target.start:
        return min(row, last)
    if row < target.stop:
        return max(anchor.stop - (target.stop - row), min(anchor.start, anchor.end - 1))
    if row < target.end:
        return min(anchor.stop + (row - target.stop), anchor.end - 1)
    return min(max(row, anchor.end), last)


Ids = tuple[tuple[int, ...], ...]  # token numbers of one prompt, for each source of its section


class RowReader:
    """Tokenises prompts for one route of a pipeline and computes the rows that are asked for.

    Args:
        t5_tokens: length to which T5 pads where its paddings are not masked; None is the pipeline's default.
        paddings: how many of a prompt's paddings count, the first ones, which then stand for all; None is all. The empty
            prompt keeps all of its.
        gaps: an empty phrase stands for its template without the braces, not for the empty prompt.
    """

    def __init__(
        self,
        pipe: Any,
        route: Route,
        *,
        t5_tokens: int | None = None,
        paddings: int | None = None,
        gaps: bool = False,
    ) -> None:
        self._pipe, self._route, self._t5_tokens, self._paddings = pipe, route, t5_tokens, paddings
        self._gaps = gaps
        self._sections = dict(sections(route))
        self._prompts: dict[tuple[int, str], Ids] = {}
        self._widths: dict[tuple[int, int], int] = {}

    @property
    def sections(self) -> tuple[int, ...]:
        """Numbers of the parts of the sequence; of a pooled route, its only one."""
        return (POOLED_SECTION,) if self._route.name == "pooled" else tuple(self._sections)

    def spans(self, template: str, phrases: Sequence[str], section: int) -> list[Span]:
        """Where each phrase lies in the filled template. An empty phrase lies where the braces were, without a row.

        Raises:
            ErasureError: a prompt is too long for the tokenizer, or its tokens do not separate at the phrase.
        """
        if section == POOLED_SECTION:
            return [Span(0, 0, 1, 1, 1)] * len(phrases)
        return [self._span(template, phrase, section) for phrase in phrases]

    def text(self, template: str, phrase: str) -> str:
        """The filled template; an empty phrase gives the empty prompt, or the sentence without it."""
        if phrase:
            return template.replace("{}", phrase)
        return " ".join(template.replace("{}", " ").split()) if self._gaps else ""

    def empty_span(self, section: int) -> Span:
        """The rows of the empty prompt."""
        return self._span("{}", "", section)

    def _span(self, template: str, phrase: str, section: int) -> Span:
        family = self._sections[section][0].family
        head = 1 if family == "clip" else 0
        whole_text = self.text(template, phrase)
        whole = self._ids(section, whole_text)
        end = len(whole[0])
        total = self._total(section, end)
        if not phrase and not whole_text:
            return Span(head, head, head, end, total)
        before = template.split("{}", 1)[0]
        start = self._common(section, whole, before, phrase)
        stop = self._common(section, whole, before + phrase, phrase)
        if phrase and stop <= start:
            raise ErasureError(f"{phrase!r} has no token of its own in {whole_text!r}.")
        if not self._paddings or total <= end + self._paddings:
            return Span(head, start, stop, end, end if self._paddings == 0 else total)
        return Span(head, start, stop, end, end + self._paddings, (total - end) / self._paddings)

    def _common(self, section: int, whole: Ids, beginning: str, phrase: str) -> int:
        """How many tokens of `whole` its beginning makes; checked for every tokenizer of the section."""
        found = self._ids(section, beginning.rstrip())
        counts = {len(ids) - 1 for ids in found}  # without the end-of-text token
        same = all(part[:-1] == all_ids[: len(part) - 1] for part, all_ids in zip(found, whole, strict=True))
        if len(counts) != 1 or not same:
            raise ErasureError(f"the tokens of {phrase!r} melt into its template; put spaces around the braces.")
        return counts.pop()

    def _ids(self, section: int, text: str) -> Ids:
        key = (section, text)
        if key not in self._prompts:
            self._prompts[key] = tuple(self._tokenise(source, text) for source in self._sources(section))
        return self._prompts[key]

    def _tokenise(self, source: Source, text: str) -> tuple[int, ...]:
        tokenizer = getattr(self._pipe, source.tokenizer)
        if source.family == "clip" and hasattr(self._pipe, "maybe_convert_prompt"):
            text = self._pipe.maybe_convert_prompt(text, tokenizer)  # textual inversion: one word, several tokens
        if source.masked:
            text = text.lower().strip()  # as PixArt's pipelines do
        ids = tuple(int(number) for number in tokenizer(text, add_special_tokens=True).input_ids)
        limit = self._limit(source)
        if len(ids) > limit:
            shown = text if len(text) <= 80 else f"{text[:77]}..."
            raise ErasureError(f"{shown!r} makes {len(ids)} tokens, and {source.tokenizer} cuts off after {limit}.")
        return ids

    def _limit(self, source: Source) -> int:
        if source.family == "clip":
            return int(getattr(self._pipe, source.tokenizer).model_max_length)
        if self._t5_tokens is not None:
            return self._t5_tokens
        return int(inspect.signature(type(self._pipe).__call__).parameters["max_sequence_length"].default)

    def _total(self, section: int, end: int) -> int:
        first = self._sections[section][0]
        return end if first.masked else self._limit(first)

    # --- values ---

    def values(self, keys: Iterable[Key]) -> tuple[Tensor, dict[Key, int]]:
        """Rows as columns of a float64 matrix (width, n) on the CPU, and the column of every key.

        Prompts are encoded in an order of their own, so the values do not depend on the order of the keys.

        Raises:
            Unsupported: the encoders write another number of columns than the denoiser reads.
        """
        ordered = sorted(set(keys))
        place = {key: number for number, key in enumerate(ordered)}
        matrix = torch.zeros(self._route.width, len(ordered), dtype=torch.float64)
        for section in sorted({key[0] for key in ordered}):
            mine = [key for key in ordered if key[0] == section]
            first = 0
            for position, source in enumerate(self._sources(section)):
                width = 0
                for found, rows in self._rows(section, position, source, mine):
                    width = rows.shape[1]
                    self._check_width(section, first + width, at_most=True)
                    matrix[first : first + width, [place[key] for key in found]] = rows.to("cpu", torch.float64).T
                self._widths[section, position] = width
                first += width
            self._check_width(section, first)
        return matrix, place

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Columns that different encoders write side by side, if that is so in every row; known after `values`."""
        found = [width for _, width in sorted(self._widths.items())]
        if len(self.sections) > 1 or len(found) < 2:
            return ()
        return tuple((sum(found[:i]), sum(found[: i + 1])) for i in range(len(found)))

    def _sources(self, section: int) -> tuple[Source, ...]:
        return self._route.sources if section == POOLED_SECTION else self._sections[section]

    def _check_width(self, section: int, width: int, *, at_most: bool = False) -> None:
        # CLIP's rows of SD3 are narrower than T5's; zeros fill them up, as in the pipeline
        filled_up = section != POOLED_SECTION and (len(self._sections) > 1 or "text_encoder_3" in self._route.missing)
        if width > self._route.width or (width < self._route.width and not (at_most or filled_up)):
            raise Unsupported(
                f"the text encoders write {width} columns of the {self._route.name} text, but the denoiser reads "
                f"{self._route.width}."
            )

    def _rows(
        self, section: int, position: int, source: Source, keys: Sequence[Key]
    ) -> Iterator[tuple[list[Key], Tensor]]:
        """Keys of one prompt and the rows (n, width) that a source writes for them, prompt after prompt."""
        wanted: dict[str, list[Key]] = {}
        for key in keys:
            wanted.setdefault(key[1], []).append(key)
        ids = {text: self._ids(section, text)[position] for text in wanted}
        by_length: dict[int, list[str]] = {}
        for text, mine in wanted.items():
            by_length.setdefault(self._length(source, len(ids[text]), mine), []).append(text)
        for length, texts in sorted(by_length.items()):
            size = max(1, BATCH_TOKENS // length)
            for batch in (texts[i : i + size] for i in range(0, len(texts), size)):
                output = self._encode(source, [ids[text] for text in batch], length)
                for text, rows in zip(batch, output, strict=True):
                    mine = wanted[text]
                    yield mine, rows[[key[2] for key in mine]] if rows.dim() == 2 else rows[None]

    def _length(self, source: Source, own: int, keys: Sequence[Key]) -> int:
        """Tokens to encode: nothing behind the last wanted row if the encoder is causal; paddings if they act on words."""
        if source.masked or source.output in ("pooled", "projected"):
            return own
        return self._limit(source) if source.family == "t5" else 1 + max(key[2] for key in keys)

    @torch.no_grad()
    def _encode(self, source: Source, prompts: Sequence[tuple[int, ...]], length: int) -> Tensor:
        """Output (prompts, length, width) of the encoder, or (prompts, width) where it is pooled."""
        encoder: Any = getattr(self._pipe, source.encoder)
        pad = int(getattr(self._pipe, source.tokenizer).pad_token_id)
        ids = torch.tensor([[*prompt[:length], *[pad] * (length - len(prompt))] for prompt in prompts])
        ids = ids.to(self._pipe._execution_device)
        if source.family == "t5":
            # Masked encoders get prompts of one length at a time, so there is no padding to mask.
            return encoder(ids, attention_mask=torch.ones_like(ids) if source.masked else None)[0]  # type: ignore[no-any-return]
        output = encoder(ids, output_hidden_states=source.output == "penultimate")
        if source.output == "penultimate":
            return output.hidden_states[-2]  # type: ignore[no-any-return]
        names = {"last": "last_hidden_state", "pooled": "pooler_output", "projected": "text_embeds"}
        return output[names[source.output]]  # type: ignore[no-any-return]

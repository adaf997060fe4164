"""The seams of region sampling in one transformer: tokens are taken out behind its embedding and put back at its head.

In between, the stock blocks run on fewer image tokens. Every attention still sees the keys and values of all tokens: a
dense pass keeps what the projections returned, a region pass overwrites the rows of the active tokens and hands on all.
The stock processors stay in place, and with them LoRA, attention backends and IP-Adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffaccel.engine.seams import Seams
from diffaccel.kernels.cache_write import cache_write
from diffaccel.methods.regions.history import History
from diffaccel.methods.regions.select import flat_index, gather_rows
from diffaccel.models.facts import Table, rotate_pairs
from diffaccel.models.regions import RegionFacts, Site
from diffaccel.models.transformers import TransformerLayout

Forward = Callable[..., Any]


@dataclass
class Stored:
    """What one lane keeps between its passes.

    Attributes:
        keys, values: per site (rows * all tokens, width), in the model's dtype; text tokens first at joint sites.
        history: the last outputs of every token.
    """

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    history: History = field(default_factory=History)

    @property
    def bytes(self) -> int:
        """Memory of the stored keys and values."""
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def forget_attention(self) -> None:
        """Free the keys and values."""
        self.keys.clear()
        self.values.clear()

    def keep_rows(self, start: int, stop: int, rows: int) -> None:
        """Cut to the batch rows start to stop of `rows`."""
        for stored in (self.keys, self.values):
            for number, tensor in stored.items():
                size = tensor.shape[0] // rows
                stored[number] = tensor[start * size : stop * size]
        self.history.keep_rows(start, stop)


@dataclass
class Pass:
    """One call of the transformer.

    Attributes:
        stored: what its lane keeps.
        index: (rows, active) tokens to compute; None computes all.
        keep: whether a dense pass keeps keys and values, because region passes may follow.
        place: position on the noise axis, for the forecast.
        forecast: whether frozen tokens are extrapolated instead of reused.
        tokens: image tokens of a row, known behind the embedding.
    """

    stored: Stored
    index: torch.Tensor | None
    keep: bool
    place: float
    forecast: bool
    tokens: int = 0
    text_table: Table = ()
    image_table: Table = ()
    _flat: dict[int, torch.Tensor] = field(default_factory=dict)
    _rows: dict[int, torch.Tensor] = field(default_factory=dict)
    _rotations: dict[tuple[bool, bool], Table] = field(default_factory=dict)
    _whole_tables: dict[bool, Table] = field(default_factory=dict)

    @property
    def stands_in(self) -> bool:
        """Whether attention sites do anything in this pass."""
        return self.keep or self.index is not None

    def flat(self, before: int = 0) -> torch.Tensor:
        """Numbers of the computed rows in the flattened sequence with `before` text tokens in front."""
        assert self.index is not None
        if before not in self._flat:
            self._flat[before] = flat_index(self.index, self.tokens, before)
        return self._flat[before]

    def rows(self, before: int) -> torch.Tensor:
        """(rows, computed tokens) int32, their numbers in a row's sequence with `before` text tokens in front."""
        assert self.index is not None
        if before not in self._rows:
            text = torch.arange(before, device=self.index.device).expand(len(self.index), before)
            self._rows[before] = torch.cat([text, before + self.index], dim=1).int()
        return self._rows[before]

    def text_before(self, site: Site, length: int) -> int:
        """Text tokens in front of the image tokens of a sequence of `length` projected tokens."""
        return length - (self.tokens if self.index is None else self.index.shape[1]) if site.joint else 0

    def rotation(self, *, text: bool, image: bool) -> Table:
        """Rows of the position table for the projected text and image tokens, with an axis for the heads."""
        if (text, image) not in self._rotations:
            parts = [self.text_table] * text + [self._image_rotation()] * image
            joined = tuple(_join(columns) for columns in zip(*parts, strict=True))
            self._rotations[text, image] = tuple(column.unsqueeze(2) for column in joined)
        return self._rotations[text, image]

    def whole_table(self, *, text: bool) -> Table:
        """The position table of all tokens, (tokens, size) or (rows, tokens, size), the text's in front if wanted."""
        if text not in self._whole_tables:
            columns = zip(*[self.text_table] * text, self.image_table, strict=True)
            joined = [_join(column) for column in columns]
            self._whole_tables[text] = tuple(table[0] if len(table) == 1 else table for table in joined)
        return self._whole_tables[text]

    def _image_rotation(self) -> Table:
        if self.index is None:
            return self.image_table
        return tuple(column[self.index] for column in self.image_table)


def _join(columns: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Tables (tokens, size) or (rows, tokens, size) one after the other along the tokens, with an axis for the rows."""
    rows = max(column.shape[0] if column.dim() == 3 else 1 for column in columns)
    return torch.cat([column.expand(rows, *column.shape[-2:]) for column in columns], dim=1)


class TokenGate:
    """Stands at both ends of a transformer and at all its attention sites, and acts during a `Pass`."""

    def __init__(self, facts: RegionFacts, layout: TransformerLayout, seams: Seams) -> None:
        self.facts = facts
        self.lanes: dict[Hashable, Stored] = {}
        self._pass: Pass | None = None
        _replace(layout.embed, self._embed, seams)
        _replace(layout.head, self._head, seams)
        for number, site in enumerate(facts.sites):
            _replace(site.keys, functools.partial(self._keys, number, site), seams)
            _replace(_part(site, "to_v"), functools.partial(self._values, number, site), seams)
            if facts.adapt is not None:
                _replace(site.attention, self._attention, seams)
        if facts.rotary is not None:
            _replace(facts.rotary.table, self._table, seams)
            for site in facts.sites:
                self._rotate_at(site, seams)

    def _rotate_at(self, site: Site, seams: Seams) -> None:
        _replace(_part(site, "norm_q"), functools.partial(self._rotated, text=site.joint, image=True), seams)
        for name in ("norm_added_q", "norm_added_k"):
            if getattr(site.attention, name, None) is not None:
                _replace(_part(site, name), functools.partial(self._rotated, text=True, image=False), seams)

    @contextmanager
    def passing(self, now: Pass) -> Iterator[None]:
        """Act for one call of the transformer."""
        self._pass = now
        try:
            yield
        finally:
            self._pass = None

    def _embed(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """Behind the embedding: only the active tokens go on."""
        output, now = original(*args, **kwargs), self._pass
        if now is None:
            return output
        tokens = output[0] if isinstance(output, tuple) else output
        now.tokens = tokens.shape[1]
        if now.index is None:
            return output
        active = gather_rows(tokens, now.flat())
        return self._several(output, active, now) if isinstance(output, tuple) else active

    def _several(self, output: tuple[Any, ...], active: torch.Tensor, now: Pass) -> tuple[Any, ...]:
        """An embedding with further outputs: masks of keys stay whole, positions of queries do not."""
        changed = [active, *output[1:]]
        if self.facts.table_output is not None:
            table = output[self.facts.table_output]  # (1, tokens, size)
            now.image_table = (table,)
            changed[self.facts.table_output] = table[0][now.index]
        return tuple(changed)

    def _head(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """Behind the head: the outputs of all tokens."""
        output, now = original(*args, **kwargs), self._pass
        if now is None:
            return output
        if now.index is not None:
            return now.stored.history.fill(output, now.flat(), now.place, forecast=now.forecast)
        now.stored.history.store(output, now.place)
        return output

    def _keys(self, number: int, site: Site, original: Forward, *args: Any, **kwargs: Any) -> Any:
        key, now = original(*args, **kwargs), self._pass
        if now is None or not now.stands_in:
            return key
        rotary = self.facts.rotary
        table: Table = ()
        if rotary is not None and now.index is not None and rotary.rotate is rotate_pairs:
            table = now.whole_table(text=site.joint)  # the operator rotates while it writes
        elif rotary is not None:
            key = rotary.rotate(key, now.rotation(text=site.joint, image=True))
        key = key.transpose(1, 2) if site.heads_first else key
        if now.index is None:
            _keep(now.stored.keys, number, key)
        else:
            new, whole = _places(now.stored.keys[number], key)
            cache_write(new, None, whole, None, now.rows(now.text_before(site, key.shape[1])), *table)
            key = whole.view(len(key), -1, *key.shape[2:])
        return key.transpose(1, 2) if site.heads_first else key

    def _values(self, number: int, site: Site, original: Forward, *args: Any, **kwargs: Any) -> Any:
        value, now = original(*args, **kwargs), self._pass
        if now is None or not now.stands_in:
            return value
        if now.index is None:
            _keep(now.stored.values, number, value)
            return value
        new, whole = _places(now.stored.values[number], value)
        cache_write(None, new, None, whole, now.rows(now.text_before(site, value.shape[1])))
        return whole.view(len(value), -1, *value.shape[2:])

    def _rotated(self, original: Forward, *args: Any, text: bool, image: bool, **kwargs: Any) -> Any:
        output, now = original(*args, **kwargs), self._pass
        if now is None or not now.stands_in or self.facts.rotary is None:
            return output
        return self.facts.rotary.rotate(output, now.rotation(text=text, image=image))

    def _table(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """The model gets no positions; the norms apply them."""
        table, now = original(*args, **kwargs), self._pass
        if now is None or not now.stands_in or self.facts.rotary is None:
            return table
        now.text_table, now.image_table = self.facts.rotary.split(table, now.tokens)
        return None

    def _attention(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        now = self._pass
        if now is None or now.index is None or self.facts.adapt is None:
            return original(*args, **kwargs)
        return original(*args, **self.facts.adapt(kwargs, now.tokens, now.index.shape[1], now.image_table or None))


def _keep(stored: dict[int, torch.Tensor], number: int, fresh: torch.Tensor) -> None:
    """Keys or values (rows, tokens, ...) of a dense pass; no copy where they can be taken as they are."""
    stored[number] = fresh.reshape(fresh.shape[0] * fresh.shape[1], -1).contiguous()


def _places(stored: torch.Tensor, fresh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What was projected and what is stored, both as (rows, tokens, heads, size); one head where heads are not split."""
    fresh = fresh if fresh.dim() == 4 else fresh.unsqueeze(2)
    return fresh, stored.view(len(fresh), -1, *fresh.shape[2:])


def _part(site: Site, name: str) -> nn.Module:
    module: nn.Module = getattr(site.attention, name)
    return module


def _replace(module: nn.Module, function: Forward, seams: Seams) -> None:
    seams.replace_forward(module, lambda original: functools.partial(function, original))

"""Sparse attention: each region of the picture attends to the regions that matter to it, and to all of the text.

Most of the weight of a self-attention between image tokens lies on few pairs of regions. Following SpargeAttn (Zhang et
al. 2025, arXiv 2502.18137), queries and keys are pooled by compact blocks, the pooled scores choose which key blocks each
query block visits, and attention runs over those only. Neighbouring steps choose nearly alike, so lists serve several
steps (as in AdaSpa, arXiv 2502.21079). Text is always seen and always sees everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from diffaccel.engine.attention_calls import Caught
from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Evaluation, Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.kernels.attention_body import attention_body
from diffaccel.kernels.block_selection import (
    KEY_BLOCK,
    TokenBlocks,
    attended_pairs,
    kept_blocks,
    select_blocks,
)
from diffaccel.kernels.key_lists import KeyLists
from diffaccel.kernels.registration import recording
from diffaccel.methods.attention.sparse_lists import Lane, Made, Shape, Verdict, shape_of
from diffaccel.methods.caches.cache_plan import note_whole_controlnets
from diffaccel.methods.tokens.sites import MinTokens, median_seconds
from diffaccel.models.attention_sites import ImageAttention, image_attentions
from diffaccel.models.call import Call
from diffaccel.models.model_map import ModelMap
from diffaccel.models.transformers import TransformerLayout

Forward = Callable[..., Any]
Stock = Callable[[], torch.Tensor]


@register
class SparseAttention(Method):
    """Attention between image tokens over the key blocks that matter.

    Attributes:
        keep: share of the picture's key blocks that each query block visits ("topk"), or share of the pooled attention
            weight that they hold ("mass"). Off: 1.0.
        mode: "topk" costs the same at every step; "mass" spends more where attention is spread.
        reuse: solver steps that a list serves.
        start: first solver step (from 0) with sparse attention; the steps before fix the layout and stay dense.
        similarity: blocks whose tokens have a mean cosine not above this are never left out; None judges none.
        skip: lets the kernel also leave out listed key blocks whose scores all lie this far below the maximum seen so
            far, in powers of two (20 to 50); None leaves out none. Acts on GPUs only.
        min_tokens: sparse where a sequence has at least so many tokens; "measured" times both forms once per shape and
            device on the run's own tensors, and leaves dense what loses.

    Papers: Zhang et al. (SpargeAttn), arXiv 2502.18137; lists kept over steps: AdaSpa, arXiv 2502.21079.
    """

    name: ClassVar[str] = "sparse_attention"
    layer: ClassVar[Layer] = Layer.ATTENTION
    by_token: ClassVar[bool] = True

    keep: float = Field(default=0.5, gt=0, le=1)
    mode: Literal["topk", "mass"] = "topk"
    reuse: int = Field(default=4, ge=1)
    start: int = Field(default=2, ge=1)
    similarity: float | None = Field(default=None, ge=-1, le=1)
    skip: float | None = Field(default=None, gt=0)
    min_tokens: MinTokens = "measured"

    @property
    def is_off(self) -> bool:
        return self.keep == 1.0

    def check(self, model: ModelMap) -> None:
        model.transformer(self.name)
        for network, _ in model.denoisers:
            image_attentions(self.name, network)

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        self.check(model)  # blocks may have been compiled since the pipeline was wrapped
        sparse = _Sparse(self, model, run, seams)
        run.around("denoiser", Layer.ATTENTION, sparse.around)
        seams.on_close(sparse.settle)
        note_whole_controlnets(model, run, self.name)

    def chooses(self, blocks: int) -> bool:
        """Whether anything can be left out of so many key blocks."""
        return blocks > 1 if self.mode == "mass" else kept_blocks(self.keep, blocks) < blocks

    def lists(self, query: torch.Tensor, key: torch.Tensor, blocks: TokenBlocks, scale: float | None) -> KeyLists:
        """Key blocks of each query block under these settings."""
        return select_blocks(query, key, blocks, self.keep, self.mode, similarity=self.similarity, scale=scale)


@dataclass
class _Pass:
    """One call of the transformer.

    Attributes:
        sparse: sites that run sparse.
        due: those of them that make new lists.
        ran: per shape how many ran sparse, and the pairs they visited; summed on the device, read when the run ends.
        seen: queries, keys and values of the first attention of each shape that nobody has judged yet.
        made: sites that did make new lists.
        picture, grid: tokens of the picture, and their rows and columns.
    """

    lane: Lane
    network: Any
    arguments: Any
    sparse: frozenset[int] = frozenset()
    due: frozenset[int] = frozenset()
    ran: dict[Shape, tuple[int, Any]] = field(default_factory=dict)
    seen: dict[Shape, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    made: int = 0
    picture: int = 0
    grid: tuple[int, int] | None = None


class _Sparse:
    """What one run knows: which attentions have which shape, which of them pay, and the lists of each lane."""

    def __init__(self, config: SparseAttention, model: ModelMap, run: Run, seams: Seams) -> None:
        self.config, self.run = config, run
        self.lanes: dict[Hashable, Lane] = {}
        self.shapes: dict[tuple[int, Hashable], dict[int, Shape]] = {}
        self.verdicts: dict[Shape, Verdict] = {}
        self.done: list[tuple[Evaluation, int, dict[Shape, tuple[int, Any]]]] = []
        self.now: _Pass | None = None
        self.networks: dict[int, Any] = {}
        for network, layout in model.denoisers:
            if isinstance(layout, TransformerLayout):
                self._stand_at(network, layout, seams)

    def _stand_at(self, network: Any, layout: TransformerLayout, seams: Seams) -> None:
        facts = image_attentions(self.config.name, network)
        self.networks[id(network)] = (network, facts)
        _replace(layout.embed, self._embed, seams)
        for number, site in enumerate(facts.sites):
            _replace(site.attention, functools.partial(self._attention, number, site), seams)

    # --- one call of the transformer ---

    def around(self, call: Call, proceed: Proceed) -> Any:
        """Run the transformer with sparse attentions where they are wanted, and learn about those not seen before."""
        network, facts = self.networks[call.lane[0]]
        if not self.run.same_place(call):
            self.lanes.pop(call.lane, None)
        lane = self.lanes.setdefault(call.lane, Lane())
        key = (call.lane[0], _input_size(call))
        shapes = self.shapes.setdefault(key, {})
        now = _Pass(lane, (network, facts, shapes), call.arguments)
        step = self.run.clock.step
        if step >= self.config.start:
            now.sparse = frozenset(site for site, shape in shapes.items() if self._verdict(shape).wanted)
            now.due = frozenset(s for s in now.sparse if lane.due(s, call.rows, step, self.config.reuse))
            saved = sum(shapes[s].saved_flops(call.rows, make=s in now.due) for s in now.sparse)
            call = call.tagged((self.config.name, self.config, now.sparse, now.due), saved_flops=saved)
        with self._passing(now):
            output = proceed(call)
        self._judge(now)
        if now.ran:
            self.done.append((self.run.evaluations[-1], call.rows, now.ran))
        self._count(now)
        return output

    @contextmanager
    def _passing(self, now: _Pass) -> Iterator[None]:
        self.now = now
        try:
            yield
        finally:
            self.now = None

    def _count(self, now: _Pass) -> None:
        sparse = sum(times for times, _ in now.ran.values())
        self.run.count(self.config.name, **{"sparse attentions": sparse, "lists made": now.made})

    def settle(self) -> None:
        """Replace the FLOPs of full lists by those of the pairs that were visited."""
        visited = dense = 0
        for evaluation, rows, ran in self.done:
            for shape, (times, summed) in ran.items():
                pairs = int(summed)
                if evaluation.flops is not None:
                    evaluation.flops -= times * shape.listed_flops(rows) - 4 * shape.size * pairs
                visited += 4 * shape.size * pairs
                dense += times * shape.dense_flops(rows)
        totals = self.run.kept.setdefault(self.config.name, [0, 0])
        totals[0] += visited
        totals[1] += dense
        if totals[1]:
            self.run.counters[self.config.name]["density"] = f"{totals[0] / totals[1]:.3f}"
        elif self.run.clock.total <= self.config.start:
            self.run.note(
                f"{self.config.name}: all {self.run.clock.total} evaluations are dense (start={self.config.start})."
            )
        if self.config.skip is not None and "torch" in self.run.operators.get("attention_body", {}):
            self.run.note(
                f"{self.config.name}: skip acts in the GPU kernel only; the torch path visited all listed blocks."
            )

    # --- inside the transformer ---

    def _embed(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self.now is not None:
            self.now.picture = (output[0] if isinstance(output, tuple) else output).shape[1]
        return output

    def _attention(self, number: int, site: ImageAttention, original: Forward, *args: Any, **kwargs: Any) -> Any:
        if self.now is None:
            return original(*args, **kwargs)
        caught = Caught(functools.partial(self._attend, self.now, number, site))
        with caught:
            output = original(*args, **kwargs)
        if not caught.times:
            raise Unsupported(
                f"{self.config.name}: {type(getattr(site.attention, 'processor', None)).__name__} does not attend by "
                "scaled_dot_product_attention; go back to the default attention backend."
            )
        return output

    def _attend(
        self,
        now: _Pass,
        number: int,
        site: ImageAttention,
        stock: Stock,
        parts: tuple[torch.Tensor, ...],
        options: Any,
    ) -> torch.Tensor:
        """The attention of one site: sparse, or dense and remembered."""
        query, key, value = parts
        network, facts, shapes = now.network
        if query.shape != key.shape:  # image prompts have keys of their own
            return stock()
        if options.get("attn_mask") is not None or options.get("is_causal") or options.get("enable_gqa"):
            raise Unsupported(f"{self.config.name} does not support masks over image tokens or grouped heads.")
        if number not in now.sparse:
            now.grid = now.grid or facts.grid(network, now.arguments)
            shape = shape_of(query, site, now.picture, now.grid)
            shapes[number] = shape
            if shape not in self.verdicts and shape not in now.seen:
                now.seen[shape] = (query, key, value)
            return stock()
        shape, scale = shapes[number], options.get("scale")
        if query.shape[2] != shape.tokens:
            raise Unsupported(
                f"{self.config.name}: an attention changed from {shape.tokens} to {query.shape[2]} tokens."
            )
        if number in now.due:
            lists = self.config.lists(query, key, shape.blocks(), scale)
            now.made += 1
            now.lane.lists[number] = Made(self.run.clock.step, lists, attended_pairs(lists))
        made = now.lane.lists[number]
        times, pairs = now.ran.get(shape, (0, 0))
        now.ran[shape] = (times + 1, pairs + made.pairs)
        return attention_body(query, key, value, scale=scale, lists=made.lists, skip=self.config.skip)

    # --- does it pay? ---

    def _verdict(self, shape: Shape) -> Verdict:
        return self.verdicts.get(shape, Verdict(wanted=False))

    def _judge(self, now: _Pass) -> None:
        """Decide about shapes met for the first time, outside the counted call."""
        for shape, parts in now.seen.items():
            key = (self.config, shape)
            if key not in self.run.measured:
                self.run.measured[key] = self._measure(shape, *parts)
            self.verdicts[shape] = self.run.measured[key]
            self._describe(shape, self.verdicts[shape])

    def _measure(self, shape: Shape, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Verdict:
        if not self.config.chooses(shape.blocks().picture_keys):
            return Verdict(wanted=False, choice=False)
        if self.config.min_tokens != "measured":
            return Verdict(shape.tokens >= self.config.min_tokens)

        def make() -> KeyLists:
            return self.config.lists(query, key, shape.blocks(), None)

        with torch.no_grad(), recording({}):
            lists = make()
            dense = median_seconds(lambda: F.scaled_dot_product_attention(query, key, value), query.device)
            sparse = median_seconds(
                lambda: attention_body(query, key, value, lists=lists, skip=self.config.skip), query.device
            )
            sparse += median_seconds(make, query.device) / self.config.reuse
        return Verdict(sparse < dense, dense=dense, sparse=sparse)

    def _describe(self, shape: Shape, verdict: Verdict) -> None:
        if verdict.wanted:
            return
        why = f"fewer than {self.config.min_tokens} tokens"
        if not verdict.choice:
            blocks = shape.blocks().picture_keys
            why = f"of {blocks} block{'s' * (blocks > 1)} of {KEY_BLOCK} keys keep={self.config.keep:g} leaves out none"
        elif verdict.dense is not None and verdict.sparse is not None:
            why = f"{1e3 * verdict.sparse:.2f} ms sparse, {1e3 * verdict.dense:.2f} ms dense"
        self.run.note(f"{self.config.name}: attentions over {shape.tokens} tokens stay dense ({why}).")


def _input_size(call: Call) -> Hashable:
    """What the shapes of the attentions follow from: the picture's and the text's size, without the rows."""
    text = call.arguments.get("encoder_hidden_states")
    return tuple(call.sample.shape[1:]), None if text is None else tuple(text.shape[1:]), call.sample.dtype


def _replace(module: torch.nn.Module, function: Forward, seams: Seams) -> None:
    seams.replace_forward(module, lambda original: functools.partial(function, original))

"""The cases of operators.py: for each operator and shape, our call and what it is compared with, on the same inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operators_eager import (
    eager_blend,
    eager_cache_write,
    eager_map,
    eager_match,
    eager_mean,
    eager_merge,
    eager_pladis,
    eager_unmerge,
    tomesd_block,
)
from diffaccel.kernels.attention_body import attention_body
from diffaccel.kernels.block_selection import attended_pairs, select_blocks, token_blocks
from diffaccel.kernels.cache_write import cache_write
from diffaccel.kernels.matching import match_tokens
from diffaccel.kernels.merge import merge_tokens, unmerge_tokens
from diffaccel.kernels.nag_blend import nag_blend
from diffaccel.kernels.slot_map import member_lists, slot_map
from diffaccel.kernels.sparse_softmax import sparse_softmax
from diffaccel.methods.tokens.token_matchers import MATCHERS, Grid, window_destinations

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype."""

    device: str
    dtype: torch.dtype
    tiny: bool = False

    def noise(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        make: from a seed to the callables by name.
        own: which of them are ours.
        flops, bytes: useful work of one call; 0 where that says nothing.
        density: gives the share of the query-key pairs that a block-sparse case visits.
        graph: whether the calls can be captured in a CUDA graph; random draws on the host cannot.
    """

    operator: str
    shape: str
    make: Callable[[int], Calls]
    own: tuple[str, ...] = ("own",)
    flops: int = 0
    bytes: int = 0
    density: Callable[[], float] | None = None
    graph: bool = True


@dataclass(frozen=True)
class Shape:
    """A token grid in a model: `rows` of the batch share `images` slot maps; `text` tokens join in attention."""

    name: str
    side: int
    channels: int
    heads: int
    rows: int
    text: int = 0

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.side**2

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads

    def __str__(self) -> str:
        return f"{self.name}: N {self.tokens}, C {self.channels}, B {self.rows}, one map"


SD15 = Shape("SD 1.5 512 px", 64, 320, 8, 2)
SDXL = Shape("SDXL 1024 px", 64, 640, 10, 2)
SD3 = Shape("SD3 1024 px", 64, 1536, 24, 2, 333)
FLUX = Shape("FLUX 1024 px", 64, 3072, 24, 1, 512)
TINY = Shape("tiny", 16, 64, 2, 2, 5)


def all_cases(setting: Setting) -> Iterator[Case]:
    """Every operator at every shape."""
    shapes = (TINY,) if setting.tiny else (SD15, SDXL, FLUX)
    for shape in shapes:
        yield from token_cases(setting, shape)
    for shape in shapes[:1]:
        yield from block_cases(setting, shape)
    for shape in (TINY,) if setting.tiny else (SD15, SDXL, SD3, FLUX):
        yield from attention_cases(setting, shape)
    for shape in shapes:
        yield from guidance_cases(setting, shape)


# --- token merging ---


def token_cases(setting: Setting, shape: Shape) -> Iterator[Case]:
    """Matching, slot map, merge and unmerge, ratio 0.5; one map for all rows of the batch."""
    tokens, kept, width = shape.tokens, shape.tokens // 2, shape.rows * shape.channels
    size = setting.dtype.itemsize

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        targets, sources = window_destinations(shape.side, shape.side, torch.Generator().manual_seed(seed))
        metric = setting.noise(1, tokens, shape.channels, seed=seed)
        return metric, sources.to(setting.device, torch.int32), targets.to(setting.device, torch.int32)

    def matching(seed: int) -> Calls:
        given = inputs(seed)
        return {"own": partial(match_tokens, *given), "normalise, product, max": partial(eager_match, *given)}

    def mapped(seed: int) -> tuple[Tensor, ...]:
        metric, sources, targets = inputs(seed)
        return (*match_tokens(metric, sources, targets), sources, targets)

    def mapping(seed: int) -> Calls:
        given, removed = mapped(seed), tokens - kept
        own = lambda: member_lists(slot_map(*given, removed, None)[0], kept)
        return {"own": own, "sort": partial(eager_map, *given, removed)}

    def lists(seed: int) -> tuple[Tensor, ...]:
        slot, _ = slot_map(*mapped(seed), tokens - kept, None)
        return slot, *member_lists(slot, kept)

    def merging(seed: int) -> Calls:
        x, (slot, *members) = setting.noise(shape.rows, tokens, shape.channels, seed=seed), lists(seed)
        return {"own": partial(merge_tokens, x, *members)} | eager_merge(x, slot, kept)

    def norm_merging(seed: int) -> Calls:
        x, (slot, *members) = setting.noise(shape.rows, tokens, shape.channels, seed=seed), lists(seed)
        mean = eager_mean(slot, shape.rows, kept)
        normed = lambda: mean(F.layer_norm(x, x.shape[-1:]))
        return {"own": partial(merge_tokens, x, *members, None, None, None, 1e-5), "layer_norm, index_add": normed}

    def unmerging(seed: int) -> Calls:
        y, slot = setting.noise(shape.rows, kept, shape.channels, seed=seed), lists(seed)[0]
        return {"own": partial(unmerge_tokens, y, slot)} | eager_unmerge(y, slot)

    def gated(seed: int) -> Calls:
        y, slot = setting.noise(shape.rows, kept, shape.channels, seed=seed), lists(seed)[0]
        x, gate = setting.noise(shape.rows, tokens, shape.channels), setting.noise(shape.rows, shape.channels)
        select = eager_unmerge(y, slot)["index_select"]
        return {"own": partial(unmerge_tokens, y, slot, x, gate), "eager": lambda: x + gate[:, None] * select()}

    sources, targets = tokens * 3 // 4, tokens // 4
    yield Case("match_tokens", str(shape), matching, flops=2 * sources * targets * shape.channels)
    yield Case("slot_map and member_lists", str(shape), mapping)
    moved = (tokens + kept) * width * size
    yield Case("merge_tokens", str(shape), merging, bytes=moved)
    yield Case("merge_tokens with LayerNorm", str(shape), norm_merging, bytes=moved)
    yield Case("unmerge_tokens", str(shape), unmerging, bytes=moved)
    yield Case("unmerge_tokens with residual and gate", str(shape), gated, bytes=moved + tokens * width * size)


def block_cases(setting: Setting, shape: Shape) -> Iterator[Case]:
    """Everything a merged block adds, beside tomesd: one block alone, and the five that share a map."""

    def work(seed: int, layers: int) -> Calls:
        x = setting.noise(shape.rows, shape.tokens, shape.channels, seed=seed)

        def own(matcher: str) -> None:
            grid = Grid(x.sum(0, keepdim=True), shape.side, shape.side, 0.5, torch.Generator().manual_seed(seed))
            slots = MATCHERS[matcher](grid)
            for _ in range(layers):
                slots.unmerge(slots.merge(x))

        calls: Calls = {name: partial(own, name) for name in ("window", "tile", "agglomerative")}
        if importlib.util.find_spec("tomesd") is not None:
            calls["tomesd"] = partial(tomesd_block, x, shape.side, layers)
        return calls

    own = ("window", "tile", "agglomerative")
    for layers, name in ((1, "one block"), (5, "five blocks of a step")):
        yield Case(f"match, merge, unmerge: {name}", str(shape), partial(work, layers=layers), own, graph=False)


# --- attention ---


def sdpa_calls(setting: Setting, given: tuple[Tensor, ...], mask: Tensor | None = None) -> Calls:
    """Torch's own attention: its choice, and on a GPU each kernel by name."""
    calls: Calls = {"SDPA": lambda: F.scaled_dot_product_attention(*given, attn_mask=mask)}
    if setting.device == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            calls[f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}"] = partial(_forced, backend, given, mask)
    return calls


def _forced(backend: SDPBackend, given: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*given, attn_mask=mask)


def attention_cases(setting: Setting, shape: Shape) -> Iterator[Case]:
    """The body without and with a bias per key, block-sparse, and the write into stored keys and values."""
    reduced = setting.device == "cpu" and not setting.tiny
    rows, heads = (1, 2) if reduced else (shape.rows, shape.heads)
    tokens = shape.tokens + shape.text
    name = f"{shape.name}: N {tokens}, H {heads}, d {shape.size}, B {rows}"
    flops = 4 * rows * heads * tokens * tokens * shape.size

    def qkv(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (setting.noise(rows, tokens, heads, shape.size, seed=3 * seed + i).transpose(1, 2) for i in range(3))
        return q, k, v

    def body(seed: int) -> Calls:
        given = qkv(seed)
        return {"own": lambda: attention_body(*given)} | sdpa_calls(setting, given)

    def biased(seed: int) -> Calls:
        given = qkv(seed)
        bias = setting.noise(rows, tokens, seed=seed).abs().float()
        mask = bias.to(setting.dtype)[:, None, None]
        return {"own": lambda: attention_body(*given, bias=bias)} | sdpa_calls(setting, given, mask)

    yield Case("attention_body", name, body, flops=flops)
    yield Case("attention_body with bias", name, biased, flops=flops)
    if shape.size in (64, 128) or setting.tiny:
        yield _sparse_case(setting, shape, qkv, name, heads)
    yield _cache_case(setting, shape, heads, rows)


def _sparse_case(setting: Setting, shape: Shape, qkv: Callable[[int], Any], name: str, heads: int) -> Case:
    blocks = token_blocks((shape.side, shape.side), shape.tokens, after=shape.text).to(torch.device(setting.device))

    def sparse(seed: int) -> Calls:
        q, k, v = qkv(seed)
        lists = select_blocks(q, k, blocks, 0.25)
        calls: Calls = {"own": lambda: attention_body(q, k, v, lists=lists)}
        calls["own with selection"] = lambda: attention_body(q, k, v, lists=select_blocks(q, k, blocks, 0.25))
        calls["own dense"] = lambda: attention_body(q, k, v)
        return calls | sdpa_calls(setting, (q, k, v))

    def density() -> float:
        q, k, _ = qkv(0)
        return int(attended_pairs(select_blocks(q, k, blocks, 0.25))) / (q.shape[0] * heads * q.shape[2] ** 2)

    own = ("own", "own with selection", "own dense")
    return Case("attention_body, a quarter of the blocks", name, sparse, own, density=density)


def _cache_case(setting: Setting, shape: Shape, heads: int, rows: int) -> Case:
    active = shape.tokens // 2

    def work(seed: int) -> Calls:
        key, value = (setting.noise(rows, active, heads, shape.size, seed=seed + i) for i in range(2))
        stored = [setting.noise(rows, shape.tokens, heads, shape.size, seed=seed + i) for i in (2, 3)]
        index = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(seed))[:active].sort().values
        index = index.to(setting.device, torch.int32)
        angle = setting.noise(shape.tokens, shape.size // 2).float().repeat_interleave(2, dim=1)
        given = (key, value, *stored, index, angle.cos(), angle.sin(), setting.noise(shape.size))
        return {"own": lambda: cache_write(*given, eps=1e-6), "eager": partial(eager_cache_write, *given)}

    moved = 4 * rows * active * heads * shape.size * setting.dtype.itemsize
    return Case(
        "cache_write", f"{shape.name}: {active} of {shape.tokens}, H {heads}, d {shape.size}", work, bytes=moved
    )


def guidance_cases(setting: Setting, shape: Shape) -> Iterator[Case]:
    """Cross-attention extrapolated to sparse, and the blend of normalised guidance."""
    reduced = setting.device == "cpu" and not setting.tiny
    heads = 2 if reduced else shape.heads
    name = f"{shape.name}: N {shape.tokens}, 77 keys, H {heads}, d {shape.size}"

    def cross(seed: int) -> Calls:
        q = setting.noise(1, heads, shape.tokens, shape.size, seed=seed)
        k, v = (setting.noise(1, heads, 77, shape.size, seed=seed + i) for i in (1, 2))
        calls: Calls = {
            "own": lambda: sparse_softmax(q, k, v),
            "softmax and sorted entmax": partial(eager_pladis, q, k, v),
        }
        return calls | {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v)}

    def blend(seed: int) -> Calls:
        p, n = (setting.noise(1, shape.tokens, shape.channels, seed=seed + i) for i in range(2))
        return {"own": lambda: nag_blend(p, n, scale=5.0), "eager": partial(eager_blend, p, n, 5.0, 2.5, 0.25)}

    yield Case("sparse_softmax", name, cross)
    moved = 3 * shape.tokens * shape.channels * setting.dtype.itemsize
    yield Case("nag_blend", f"{shape.name}: N {shape.tokens}, C {shape.channels}", blend, bytes=moved)

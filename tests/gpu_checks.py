"""What only hardware shows: every kernel on a GPU against float64, and how torch runs them there.

    python tests/gpu_checks.py                  # all checks, each in its own process
    python tests/gpu_checks.py attention        # one

They need a CUDA device of compute capability 8.0 or higher; older ones take the torch path.
A kernel that reads where it must not ends its process' use of the GPU, so every check has a process of its own. The same
checks run on a CPU, in Triton's interpreter at small sizes (test_gpu.py), so that they are known to work before a GPU
sees them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (0, 1)]

import torch
from kernel_harness import DTYPES, assert_accurate, errors, guarded, poisoned_outputs

from diffaccel.kernels.attention_body import attention_body, attention_body_lse, attention_body_oracle
from diffaccel.kernels.block_selection import pool_blocks, pool_blocks_oracle, select_blocks, token_blocks
from diffaccel.kernels.cache_write import cache_write, cache_write_oracle
from diffaccel.kernels.key_lists import KeyLists, visible_of
from diffaccel.kernels.matching import match_tokens, match_tokens_oracle
from diffaccel.kernels.merge import merge_tokens, merge_tokens_oracle, unmerge_tokens, unmerge_tokens_oracle
from diffaccel.kernels.nag_blend import nag_blend, nag_blend_oracle
from diffaccel.kernels.registration import recording
from diffaccel.kernels.slot_map import member_lists, member_lists_oracle, slot_map, slot_map_oracle
from diffaccel.kernels.sparse_softmax import sparse_softmax, sparse_softmax_oracle
from diffaccel.kernels.triton_support import force_triton


@dataclass(frozen=True)
class Where:
    """A GPU, or a CPU with the interpreter."""

    device: torch.device

    @property
    def real(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Dtypes whose kernels are checked."""
        return ("fp16", "bf16") if self.real else ("fp16",)

    def some(self, shapes: list[Any]) -> list[Any]:
        """All shapes on a GPU; the first, small one where programs run in Python."""
        return shapes if self.real else shapes[:1]

    def noise(self, *shape: int, kind: str = "fp32", seed: int = 0) -> torch.Tensor:
        """Normal numbers, the same on every device, inside a buffer full of NaN."""
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return guarded(drawn.to(self.device, DTYPES[kind]))

    def run(self, operator: str, function: Callable[[], Any]) -> Any:
        """The result of the kernel, which gives the same bits twice and writes every number of its outputs."""
        with self.kernels(), recording({}) as paths, poisoned_outputs():
            first, second = function(), function()
        assert paths[operator] == {"triton": 2}, f"{operator} took {paths[operator]}"
        for one, other in zip(_tensors(first), _tensors(second), strict=True):
            assert torch.equal(one, other), f"{operator} gave two results for one input"
        return first

    def kernels(self) -> contextlib.AbstractContextManager[Any]:
        """Where operators take their kernels."""
        return contextlib.nullcontext() if self.real else force_triton()


def _tensors(result: Any) -> list[torch.Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)]


# --- each operator against float64 ---


def attention(where: Where) -> None:
    """Every way to split a head, keys that end inside a block, projections of a fused layer."""
    shapes = [
        (1, 2, 40, 77, 40), (2, 3, 129, 333, 64), (2, 2, 200, 154, 80), (1, 2, 130, 90, 128), (1, 1, 70, 300, 160),
        (1, 1, 64, 129, 256), (1, 1, 33, 65, 8), (1, 1, 40, 1, 72),
    ]  # fmt: skip
    for kind in where.kinds:
        for batch, heads, queries, keys, size in where.some(shapes):
            q, k, v = (
                where.noise(batch, tokens, heads, size, kind=kind, seed=i).transpose(1, 2)
                for i, tokens in enumerate((queries, keys, keys))
            )
            bias = where.noise(batch, keys, seed=4)
            out, lse = where.run("attention_body", partial(attention_body_lse, q, k, v, bias=bias))
            wanted, sums = attention_body_oracle(q, k, v, bias=bias)
            assert_accurate(out, wanted, kind)
            assert errors(lse, sums)[0] < 1e-5
            assert_accurate(where.run("attention_body", partial(attention_body, q, k, v, scale=0.2)),
                            attention_body_oracle(q, k, v, scale=0.2)[0], kind)  # fmt: skip


def attention_lists(where: Where) -> None:
    """Lists from a selection, with text; and leaving out what weighs nothing."""
    for kind in where.kinds:
        for side, text, heads, size in where.some([(12, 7, 1, 16), (40, 77, 2, 64), (40, 0, 2, 128), (24, 20, 1, 88)]):
            tokens = side * side + text
            q, k, v = (where.noise(1, heads, tokens, size, kind=kind, seed=i) for i in range(3))
            blocks = token_blocks((side, side), side * side, after=text).to(where.device)
            for table in (blocks.queries, blocks.keys):
                pooled = where.run("pool_blocks", partial(pool_blocks, q, table))
                for got, wanted in zip(pooled, pool_blocks_oracle(q, table), strict=True):
                    assert (got - wanted).abs().max() < 1e-4
            lists = select_blocks(q, k, blocks, 0.4)
            visible = visible_of(_on_cpu(lists), tokens, tokens).to(where.device)
            wanted = attention_body_oracle(q, k, v, visible=visible)[0]
            assert_accurate(where.run("attention_body", partial(attention_body, q, k, v, lists=lists)), wanted, kind)
            skipped = where.run("attention_body", partial(attention_body, q, k, v, lists=lists, skip=30.0))
            assert_accurate(skipped, wanted, kind)


def _on_cpu(lists: KeyLists) -> KeyLists:
    return KeyLists(lists.queries.cpu(), lists.keys.cpu(), lists.blocks.cpu(), lists.counts.cpu())


def merging(where: Where) -> None:
    """Matching, slot map, lists, merge and unmerge, with channels in several parts."""
    for kind in (*where.kinds, "fp32"):
        for images, tokens, channels in where.some([(1, 60, 40), (2, 1024, 320), (3, 333, 640), (1, 4096, 3072)]):
            numbers = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).int().to(where.device)
            lists = [part[None].expand(images, -1) for part in numbers.split([tokens - tokens // 4, tokens // 4])]
            x = where.noise(images, tokens, channels, kind=kind)
            best, index = where.run("match_tokens", partial(match_tokens, x, *lists))
            top, _ = match_tokens_oracle(x, *lists) if tokens < 1000 else (_best(x, *lists), None)
            assert (best - top).abs().max() < 2e-5
            chosen = _cosines(x, *lists).gather(2, index.long()[..., None])[..., 0]
            assert (chosen - top).abs().max() < 2e-5
            given = (best, index, *lists, tokens // 2, None)
            slot, kept = where.run("slot_map", partial(slot_map, *given))
            for got, wanted in zip((slot, kept), slot_map_oracle(*(_cpu(g) for g in given)), strict=True):
                assert torch.equal(got.cpu(), wanted)
            start, members = where.run("member_lists", partial(member_lists, slot, kept.shape[1]))
            if tokens < 1000:
                for got, wanted in zip((start, members), member_lists_oracle(slot.cpu(), kept.shape[1]), strict=True):
                    assert torch.equal(got.cpu(), wanted)
            _merge_and_back(where, kind, x, (slot, start, members))


def _merge_and_back(where: Where, kind: str, x: torch.Tensor, maps: tuple[torch.Tensor, ...]) -> None:
    slot, start, members = maps
    images, tokens, channels = x.shape
    weight, gate = where.noise(images, tokens).abs() + 0.1, where.noise(images, channels, kind=kind)
    for factors in ((), (weight, gate, gate, 1e-5)):
        merged = where.run("merge_tokens", partial(merge_tokens, x, start, members, *factors))
        if tokens < 1000:
            wanted = merge_tokens_oracle(x.cpu(), start.cpu(), members.cpu(), *(_cpu(f) for f in factors))
            assert_accurate(merged.cpu(), wanted, kind)
    full = where.run("unmerge_tokens", partial(unmerge_tokens, merged, slot, x, gate))
    assert_accurate(full, unmerge_tokens_oracle(merged, slot, x, gate), kind)
    assert torch.equal(where.run("unmerge_tokens", partial(unmerge_tokens, merged, slot)),
                       merged.gather(1, slot.long()[..., None].expand(-1, -1, channels)))  # fmt: skip


def _cosines(x: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return unit[:, sources[0].long()] @ unit[:, destinations[0].long()].transpose(1, 2)


def _best(x: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> torch.Tensor:
    return _cosines(x, sources, destinations).amax(2)


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def guidance(where: Where) -> None:
    """The blend of normalised guidance, and attention extrapolated to sparse."""
    for kind in where.kinds:
        for shape in where.some([(2, 9, 40), (2, 300, 640), (1, 64, 3072), (1, 5, 8192)]):
            p, n = (where.noise(*shape, kind=kind, seed=i) for i in range(2))
            for order in (1, 2):
                settings = {"scale": 4.0, "tau": 1.5, "alpha": 0.4, "order": order}
                got = where.run("nag_blend", partial(nag_blend, p, n, **settings))
                assert_accurate(got, nag_blend_oracle(p, n, **settings), kind)
        for batch, heads, queries, keys, size in where.some(
            [(1, 1, 40, 77, 40), (2, 4, 300, 77, 64), (1, 2, 70, 154, 128), (1, 2, 33, 512, 64), (1, 1, 20, 333, 88)]
        ):
            q, k, v = (
                where.noise(batch, heads, n, size, kind=kind, seed=i) for i, n in enumerate((queries, keys, keys))
            )
            bias = where.noise(batch, keys, seed=5)
            bias[:, -3:] = -torch.inf
            for alpha in (1.5, 2.0):
                settings = {"scale": size**-0.5, "weight": 2.0, "alpha": alpha}
                got = where.run("sparse_softmax", partial(sparse_softmax, q, k, v, bias, **settings))
                assert_accurate(got, sparse_softmax_oracle(q, k, v, bias, **settings), kind)


def cache(where: Where) -> None:
    """Norm, rotation and write by index."""
    for kind in where.kinds:
        for batch, active, tokens, heads, size in where.some(
            [(2, 5, 12, 2, 16), (1, 700, 1024, 24, 128), (3, 77, 400, 20, 72)]
        ):
            key, value = (where.noise(batch, active, heads, size, kind=kind, seed=i) for i in range(2))
            stored = [where.noise(batch, tokens, heads, size, kind=kind, seed=i) for i in (2, 3)]
            index = torch.randperm(tokens, generator=torch.Generator().manual_seed(3))[:active].int().to(where.device)
            angle = where.noise(tokens, size // 2).repeat_interleave(2, dim=1)
            rest = (index, angle.cos(), angle.sin(), where.noise(size, kind=kind, seed=6))
            before = [x.clone() for x in stored]

            wanted = cache_write_oracle(key, value, *before, *rest, eps=1e-6)
            for got, expected in zip(
                where.run("cache_write", partial(_write, key, value, before, rest)), wanted, strict=True
            ):
                assert_accurate(got, expected, kind)


def _write(key: torch.Tensor, value: torch.Tensor, before: list[torch.Tensor], rest: Any) -> tuple[torch.Tensor, ...]:
    made = [guarded(x) for x in before]
    cache_write(key, value, *made, *rest, eps=1e-6)
    return tuple(made)


# --- how torch runs them ---


def _calls(where: Where) -> list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """Inputs, and what is made of them by several operators."""
    x, y = (where.noise(2, 64, 32, kind="fp16", seed=i) for i in range(2))
    lists = [part.int()[None].expand(2, -1).to(where.device) for part in torch.arange(64).split([48, 16])]

    def blocks(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (2, 16)).transpose(1, 2)
        mixed = attention_body(heads, heads, heads).transpose(1, 2).flatten(2)
        sharp = sparse_softmax(heads, heads[:, :, :20], heads[:, :, :20]).transpose(1, 2).flatten(2)
        return nag_blend(mixed, sharp, scale=3.0)

    def merged(x: torch.Tensor) -> torch.Tensor:
        slot, kept = slot_map(*match_tokens(x, *lists), *lists, 30, None)
        return unmerge_tokens(merge_tokens(x, *member_lists(slot, kept.shape[1])), slot, x)

    return [(x, blocks), (y, merged)]


def compiled(where: Where) -> None:
    """Whole graphs by torch.compile give the results of eager calls."""
    for x, function in _calls(where):
        with where.kernels():
            wanted = function(x)
            whole = torch.compile(function, fullgraph=True, backend="inductor" if where.real else "aot_eager")
            assert torch.equal(whole(x), wanted)


def graphs(where: Where) -> None:
    """A captured CUDA graph gives the results of eager calls for new inputs: nothing waits for the host."""
    for x, function in _calls(where):
        x = x.contiguous()
        with where.kernels(), _captured(where, partial(function, x)) as (output, replay):
            x.copy_(where.noise(*x.shape, kind="fp16", seed=9))
            wanted = function(x)
            replay()
            assert torch.equal(output(), wanted)


@contextlib.contextmanager
def _captured(
    where: Where, function: Callable[[], torch.Tensor]
) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """(reads the output, runs again); without a GPU, plain calls."""
    results = [function()]  # compiles the kernels, which a capture could not
    if not where.real:
        yield results.pop, lambda: results.__setitem__(0, function())
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results[0] = function()
    yield results.pop, graph.replay
    torch.cuda.synchronize()


def last_gpu(where: Where) -> None:
    """Tensors on the last GPU while the first one is current."""
    device = torch.device("cuda", torch.cuda.device_count() - 1) if where.real else where.device
    there = Where(device)
    for x, function in _calls(there):
        with there.kernels():
            on_kernels = function(x)
        on_cpu = function(x.cpu()) if function.__name__ == "blocks" else None
        assert on_kernels.isfinite().all()
        assert on_kernels.device == x.device
        assert on_cpu is None or errors(on_kernels.cpu(), on_cpu)[0] < 5e-3


def far(where: Where) -> None:
    """A second row of the batch that lies past 2^31 elements (4.3 GB; on a CPU virtual)."""
    stride, tokens, channels = 2**31 + 16, 40, 32
    storage = torch.empty(stride + tokens * channels, dtype=torch.float16, device=where.device)
    x = torch.as_strided(storage, (2, tokens, channels), (stride, channels, 1))
    x.copy_(where.noise(2, tokens, channels, kind="fp16"))
    near, heads = x.clone(), lambda x: x.unflatten(2, (2, 16)).transpose(1, 2)
    lists = [part.int()[None].expand(2, -1).to(where.device) for part in torch.arange(tokens).split([30, 10])]
    with where.kernels():
        assert torch.equal(attention_body(*[heads(x)] * 3), attention_body(*[heads(near)] * 3))
        assert torch.equal(match_tokens(x, *lists)[1], match_tokens(near, *lists)[1])
        assert torch.equal(nag_blend(x, x.flip(1), scale=3.0), nag_blend(near, near.flip(1), scale=3.0))


def large(where: Where) -> None:
    """Attention and matching at the sizes of models, a sample of the queries against float64."""
    for tokens, heads, size in [(4429, 24, 64), (4608, 24, 128), (16384, 8, 40)] if where.real else [(300, 2, 40)]:
        for kind in where.kinds:
            q, k, v = (where.noise(2, heads, tokens, size, kind=kind, seed=i) for i in range(3))
            bias = where.noise(2, tokens, seed=3)
            out = where.run("attention_body", partial(attention_body, q, k, v, bias=bias))
            sample = torch.arange(0, tokens, tokens // 37, device=where.device)
            assert_accurate(out[:, :, sample], attention_body_oracle(q[:, :, sample], k, v, bias=bias)[0], kind)


def pipelines(where: Where) -> None:
    """Methods in whole tiny pipelines reach their kernels, and the report says so."""
    import tiny
    import tiny_transformers

    import diffaccel

    cases = [
        (tiny_transformers, "flux-dev", diffaccel.RegionSampling(start=2, min_evaluations=1, end=4), ("cache_write",), {}),
        (tiny, "sd", diffaccel.TokenMerging(min_tokens=1), ("match_tokens", "merge_tokens", "unmerge_tokens"), {}),
        (tiny, "sd", diffaccel.SparseCrossAttention(), ("sparse_softmax",), {}),
        (tiny_transformers, "sd3", diffaccel.TokenMerging(min_tokens=1, proportional=True, dense_blocks=(0, 0)),
         ("attention_body", "slot_map", "member_lists"), {}),
        (tiny_transformers, "flux-dev", diffaccel.SparseAttention(keep=0.3, start=2, min_tokens=1),
         ("attention_body", "pool_blocks"), {"size": (24, 24)}),
    ]  # fmt: skip
    for module, kind, method, operators, options in where.some(cases):
        pipe = module.tiny_pipeline(kind)
        if where.real:
            pipe.to(where.device, torch.float16)
        inputs = {name: _moved(x, where) for name, x in module.tiny_inputs(kind, steps=5, **options).items()}
        fast = diffaccel.wrap(pipe, method)
        with where.kernels():
            pictures = torch.as_tensor(fast(**inputs).images)
        assert pictures.isfinite().all(), type(method).__name__
        for operator in operators:
            assert set(fast.report.operators[operator]) == {"triton"}, (operator, fast.report.operators)


def _moved(value: Any, where: Where) -> Any:
    if not isinstance(value, torch.Tensor) or not where.real:
        return value
    return value.to(where.device, torch.float16 if value.is_floating_point() else value.dtype)


CHECKS: dict[str, Callable[[Where], None]] = {
    check.__name__: check
    for check in (
        attention, attention_lists, merging, guidance, cache, compiled, graphs, last_gpu, far, large, pipelines,
    )
}  # fmt: skip


def in_own_process(name: str) -> subprocess.CompletedProcess[str]:
    """One check on the first GPU, without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, __file__, name], capture_output=True, text=True, env=environment, check=False, timeout=1800
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        CHECKS[sys.argv[1]](Where(torch.device("cuda", 0)))
    else:
        results = {name: in_own_process(name) for name in CHECKS}
        for name, done in results.items():
            print(f"{'passed' if done.returncode == 0 else 'FAILED'}  {name}")
            print(done.stderr[-2000:] if done.returncode else "", end="")
        sys.exit(any(done.returncode for done in results.values()))

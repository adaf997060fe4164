"""What the operators share, on a small example: scale the rows of a matrix.

This is also the shortest template of an operator's tests.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ahead_of_time import ARCHITECTURES, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, assert_accurate, far_tensor, guarded, harden
from kernels_example import row_scale, row_scale_oracle
from torch.utils.flop_counter import FlopCounterMode

from diffaccel import Unsupported
from diffaccel.engine.flops import count_flops
from diffaccel.kernels import triton_support
from diffaccel.kernels.registration import recording
from diffaccel.kernels.triton_support import Tile, force_triton, power_of_two, tiles, tl, triton

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 77), (2, 129)])
def test_kernel_and_torch_path_follow_the_oracle(kind, shape):
    x = torch.randn(shape).to(DTYPES[kind])
    factor = torch.rand(shape[0])
    wanted = row_scale_oracle(x, factor)
    assert_accurate(harden(row_scale, x, factor), wanted, kind, leading=1)
    assert_accurate(row_scale(x, factor), wanted, kind, leading=1)


def test_torch_knows_the_operator():
    x, factor = torch.randn(3, 8), torch.rand(3)
    torch.library.opcheck(row_scale.op, (x, factor))
    compiled = torch.compile(lambda x, factor: row_scale(x, factor) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, factor), row_scale(x, factor) + 1)
    assert count_flops(lambda: row_scale(x, factor))[1] == 24


def test_torchs_wrapper_is_used_where_somebody_traces_or_counts(monkeypatch):
    """It costs the host several times a launch, for each of hundreds of calls of a step."""
    seen = []
    monkeypatch.setattr(row_scale, "op", lambda *inputs: seen.append(inputs) or row_scale._run(*inputs))
    x, factor = torch.randn(3, 8), torch.rand(3)
    plain = row_scale(x, factor)
    assert not seen
    with FlopCounterMode(display=False):
        row_scale(x, factor)
    assert len(seen) == 1
    assert torch.equal(plain, row_scale(x, factor))
    assert len(seen) == 1
    row_scale(x.as_subclass(torch.nn.Buffer), factor)
    assert len(seen) == 2


def test_a_gradient_is_refused():
    with pytest.raises(Unsupported, match="diffaccel::test_row_scale has no gradient"):
        row_scale(torch.randn(2, 2, requires_grad=True), torch.rand(2))
    with torch.no_grad():
        row_scale(torch.randn(2, 2, requires_grad=True), torch.rand(2))


def test_a_recording_counts_the_path_that_ran():
    outer, inner = {}, {}
    x, factor = torch.randn(2, 4), torch.rand(2)
    with recording(outer):
        row_scale(x, factor)
        with recording(inner), force_triton():
            row_scale(x, factor)
            row_scale(torch.randn(1, 2000), torch.rand(1))  # more columns than the kernel covers
    assert (outer, inner) == ({"test_row_scale": {"torch": 1}}, {"test_row_scale": {"triton": 1, "torch": 1}})
    row_scale(x, factor)
    assert outer == {"test_row_scale": {"torch": 1}}


def test_far_rows_are_read():
    x = far_tensor((2, 3), 0)
    x[0], x[1] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    with force_triton():
        assert row_scale(x, torch.tensor([1.0, 2.0])).tolist() == [[1, 2, 3], [8, 10, 12]]


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_tiles_are_found_for_the_nearest_older_architecture(number):
    table = {((8, 0), 64): Tile(1, 1, 1, 1), ((8, 0), 128): Tile(2, 1, 1, 1), ((9, 0), 64): Tile(3, 1, 1, 1)}
    assert tiles(table, 40, divmod(number, 10)).rows == (3 if number == 90 else 1)
    with pytest.raises(KeyError, match="size 200"):
        tiles(table, 200, (8, 0))
    assert [power_of_two(size) for size in (1, 2, 3, 77, 128)] == [1, 2, 4, 128, 128]


def test_kernels_compile_for_gpus_that_are_not_here():
    types = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "out_ptr": "*bf16"}
    types |= {"x_row": "i32:16", "out_row": "i32:16", "columns": "i32"}
    variants = [
        Variant("rows", "kernels_example", "_kernel", types, {"BLOCK": 256}, arch, warps=4, stages=1)
        for arch in ARCHITECTURES
    ]
    for found in compile_variants(variants):
        assert_fits(found, matrix=False, loops=False)
        assert found.registers > 0


def test_which_devices_run_kernels(monkeypatch):
    """NVIDIA's from compute capability 8.0 on; older ones, other makers' and processors take the torch path."""
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    found = {"at": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["at"])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert not triton_support.usable(tensor)  # the interpreter's variable is set, and it is for tests only
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    for at, runs in (((8, 0), True), ((12, 0), True), ((7, 5), False)):
        found["at"] = at
        assert triton_support.usable(tensor) == runs
    found["at"] = (9, 4)  # what an AMD device calls itself
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not triton_support.usable(tensor)
    assert not triton_support.usable(torch.zeros(1))


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    """Triton launches on the current GPU; with a pipeline on the second one that would be another one's memory."""
    entered = []

    @contextlib.contextmanager
    def entering(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", entering)
    second = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    with triton_support.launching_on(second):
        pass
    assert entered == [second.device, "left"]
    monkeypatch.setattr(triton_support, "launching_on", lambda x: entering(tuple(x.shape)))
    monkeypatch.setattr(row_scale, "triton_path", lambda x, factor: entered.append("launched") or x.clone())
    with force_triton():
        row_scale(torch.randn(3, 8), torch.rand(3))
    assert entered[2:] == [(3, 8), "launched", "left"]


# --- the harness finds defects ---


@triton.jit
def _careless(x_ptr, out_ptr, columns, BLOCK: tl.constexpr, STORE: tl.constexpr, STRAY: tl.constexpr):
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, mask=column < columns)  # no other=
    if STRAY:
        x = tl.load(x_ptr + column)  # behind the end of the row
    tl.store(out_ptr + tl.arange(0, 1), tl.sum(x.to(tl.float32), 0)[None])
    if STORE:
        tl.store(out_ptr + 1 + tl.arange(0, 1), tl.full((1,), 1.0, tl.float32))


def _sum(x, *, store=True, stray=False):
    out = torch.empty(2)
    _careless[(1,)](x, out, x.shape[0], BLOCK=triton.next_power_of_2(x.shape[0]), STORE=store, STRAY=stray)
    return out


@pytest.mark.parametrize(
    ("size", "options"),
    [(5, {}), (5, {"stray": True}), (8, {"store": False})],
    ids=["masked load without other", "read beside the input", "output not written"],
)
def test_the_harness_finds(size, options):
    with pytest.raises(AssertionError, match="not written, or a stray value"):
        harden(_sum, torch.ones(size), **options)


def test_the_harness_accepts_what_is_right():
    assert harden(_sum, torch.ones(8)).tolist() == [8, 1]


@triton.jit
def _racing(x_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) + tl.arange(0, BLOCK)
    tl.store(x_ptr + place + 1, tl.load(x_ptr + place) * 2)


def _race(x, *, length):
    _racing[(length - 1,)](x, BLOCK=1)
    return x.clone()


def test_the_harness_finds_writes_and_races():
    x = guarded(torch.ones(6))
    with pytest.raises(AssertionError, match="input 0 was changed"):
        harden(_race, x, length=6)
    with pytest.raises(AssertionError, match="order of the programs"):
        harden(_race, x, mutated=[0], length=6)


def test_operators_load_and_run_without_triton():
    """Where the package is missing every operator takes its torch path, and a kernel says why it cannot run."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from diffaccel.kernels import block_selection, triton_support
from diffaccel.kernels.attention_body import attention_body, attention_body_kernel
from diffaccel.kernels.registration import recording
with recording({}) as counts:
    attention_body(*torch.randn(3, 1, 1, 4, 8))
    block_selection.pool_blocks(torch.randn(1, 1, 4, 8), torch.arange(4, dtype=torch.int32)[None])
assert not triton_support.HAS_TRITON
try:
    attention_body_kernel[1,](None)
except RuntimeError as error:
    print(counts, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "{'attention_body': {'torch': 1}, 'pool_blocks': {'torch': 1}} the kernel attention_body_kernel needs the package "
        "triton, which is not installed."
    )

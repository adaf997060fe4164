"""Compile kernels for GPUs that are not there, and read from the result what would run.

`compile_variants` compiles in one child process without the interpreter (Triton decides at import). Run as a script, this
file is that child: variants as JSON on stdin, findings as JSON on stdout.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 89, 90)
CONSUMER = 120  # newer than 90 with less shared memory; for kernels whose tiles need much of it
# Bytes of one block. An A100 has 166,912, but 8.6 takes the tiles of 8.0 and has less.
SHARED_LIMIT = {80: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Variant:
    """One kernel with fixed types and constants on one architecture.

    Attributes:
        module: e.g. "diffaccel.kernels.attention_body".
        types: per argument in order: "*bf16", "i32", "i64", "fp32"; an integer known to divide by 16 is "i32:16".
            Pointers are taken as aligned to 16 bytes.
        constants: values of the constexpr arguments, and None for pointers that are not given.
    """

    label: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    architecture: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Compiled:
    """What the compiler made. `loop_copies`: asynchronous copies inside each innermost loop."""

    label: str
    architecture: int
    shared: int
    registers: int
    stack: int
    local: int
    wgmma: int
    mma: int
    copies: int
    bulk_copies: int
    fp64: int
    loop_copies: list[int] = field(default_factory=list)

    @property
    def tensor_core(self) -> int:
        """Matrix instructions of the kind that is fast on this architecture."""
        return self.wgmma if self.architecture == 90 else self.mma


def compile_variants(variants: Iterable[Variant]) -> list[Compiled]:
    """Compile all variants in one child process; a compiler error fails with its message."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    paths = [str(Path(__file__).resolve().parents[up]) for up in (0, 1)]
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(variant) for variant in variants]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Compiled(**found) for found in json.loads(done.stdout)]


def assert_fits(found: Compiled, *, matrix: bool = True, loops: bool = True) -> None:
    """Fits the shared memory, spills nothing, uses no fp64; tensor cores and asynchronous copies where expected."""
    assert found.shared <= SHARED_LIMIT[found.architecture], found
    assert found.stack == found.local == 0, found
    assert found.fp64 == 0, found
    if matrix:
        assert found.tensor_core > 0, found
    if loops:
        assert found.loop_copies, found
        assert min(found.loop_copies) > 0, found


def _compile(variant: Variant) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    names = kernel.arg_names
    types = {name: variant.types.get(name, "constexpr").removesuffix(":16") for name in names}
    missing = [name for name in names if types[name] == "constexpr" and name not in variant.constants]
    assert not missing, f"{variant.label}: no type or value for {missing}"
    aligned = [name for name in names if types[name].startswith("*") or variant.types.get(name, "").endswith(":16")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    made = triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=options)
    return _inspect(variant, made)


def _inspect(variant: Variant, made: Any) -> Compiled:
    ptx, usage = made.asm["ptx"], _resources(made.asm["cubin"])
    return Compiled(
        variant.label,
        variant.architecture,
        made.metadata.shared,
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        copies=_copies(ptx),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
        fp64=ptx.count(".f64"),
        loop_copies=[_copies(body) for body in innermost_loops(ptx)],
    )


def _copies(ptx: str) -> int:
    return len(re.findall(r"cp\.async\.c[ag]\.|cp\.async\.bulk\.tensor", ptx))


def innermost_loops(ptx: str) -> list[str]:
    """Bodies of the loops that contain no other loop: from a label to a later branch back to it."""
    places = {match[1]: match.start() for match in re.finditer(r"^(\$L__\w+):", ptx, re.MULTILINE)}
    loops = [
        (places[match[1]], match.start())
        for match in re.finditer(r"bra(?:\.uni)?\s+(\$L__\w+);", ptx)
        if places.get(match[1], len(ptx)) < match.start()
    ]
    inner = [loop for loop in loops if not any(o != loop and o[0] >= loop[0] and o[1] <= loop[1] for o in loops)]
    return [ptx[start:end] for start, end in sorted(set(inner))]


@functools.cache
def _inspector() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([_inspector(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(amount) for name, amount in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout)}


if __name__ == "__main__":
    found = [asdict(_compile(Variant(**variant))) for variant in json.load(sys.stdin)]
    json.dump(found, sys.stdout)

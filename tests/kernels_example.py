"""The shortest operator there is, with every part that an operator has."""

from __future__ import annotations

import torch

from diffaccel.kernels.registration import register
from diffaccel.kernels.triton_support import tl, triton


def row_scale_oracle(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x (n, c) times factor (n), in float64."""
    return x.double() * factor.double()[:, None]


def _torch(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x.float() * factor[:, None]).to(x.dtype)


@triton.jit
def _kernel(x_ptr, factor_ptr, out_ptr, x_row, out_row, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(x_ptr + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + column, x * tl.load(factor_ptr + row), mask=mask)


def _triton(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    _kernel[(x.shape[0],)](x, factor, out, x.stride(0), out.stride(0), x.shape[1], BLOCK=block, num_warps=4)
    return out


def _fake(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


row_scale = register(
    "test_row_scale",
    _torch,
    fake=_fake,
    triton_path=_triton,
    supported=lambda x, factor: x.shape[1] <= 1024,
    flops=lambda x, factor, out_shape: x[0] * x[1],
)

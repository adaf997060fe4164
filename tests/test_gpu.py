"""Kernels on a GPU; and, without one, that the checks for it work, in Triton's interpreter."""

from __future__ import annotations

import gpu_checks
import pytest
import torch
from triton.runtime import interpreter


@pytest.mark.gpu
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_on_a_gpu(name):
    done = gpu_checks.in_own_process(name)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture
def _fusion_is_said(monkeypatch):
    """Triton 3.9 warns about a launch that leaves open whether a * b + c is contracted, and later releases do not."""
    run = interpreter.GridExecutor.__call__

    def checked(self, *args, **options):
        assert "enable_fp_fusion" in options, self.fn
        return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)


@pytest.mark.usefixtures("_fusion_is_said")
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_the_checks_themselves(name):
    gpu_checks.CHECKS[name](gpu_checks.Where(torch.device("cpu")))


def test_a_check_notices_another_path_and_changing_results(monkeypatch):
    where = gpu_checks.Where(torch.device("cpu"))
    x = torch.randn(1, 4, 16)
    with pytest.raises(AssertionError, match="nag_blend took"):
        where.run("nag_blend", lambda: gpu_checks.nag_blend(x.transpose(1, 2), x.transpose(1, 2), scale=2.0))
    turns = iter((1.0, 2.0))
    with pytest.raises(AssertionError, match="two results for one input"):
        where.run("nag_blend", lambda: gpu_checks.nag_blend(x, x, scale=2.0) * next(turns))

"""The operator benchmark at tiny shapes: what is compared is the same thing, and a failing variant does not end it."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import operators, operators_cases, operators_eager
from benchmarks.operators_cases import TINY, Case, Setting, all_cases
from benchmarks.operators_table import judged, markdown

SETTING = Setting("cpu", torch.float32, tiny=True)


def test_it_writes_a_table_with_every_operator(tmp_path, capsys):
    operators.main(["--device", "cpu", "--dtype", "float32", "--tiny", "--repeats", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "operators-cpu.json").read_text())
    table = (tmp_path / "operators-cpu.md").read_text()
    assert table in capsys.readouterr().out
    names = {row["operator"].split(",")[0].split(" with")[0] for row in result["rows"]}
    assert names >= {"match_tokens", "merge_tokens", "unmerge_tokens", "attention_body", "cache_write", "nag_blend"}
    for row in result["rows"]:
        assert not row["failed"], row
        assert row["operator"] in table
        if row["own"]:
            assert row["path"] == "torch"
            assert row["faster"]["median"] > 0
    assert result["ceilings"]["copy_gb_per_s"] > 0


def test_a_failing_variant_is_said_and_the_rest_goes_on(monkeypatch):
    def broken():
        raise RuntimeError("no such kernel\nand a trace")

    case = Case(
        "an operator",
        "a shape",
        lambda seed: {"own": lambda: 1, "rival": broken, "plain": lambda: 2},
        density=lambda: 0.5,
    )
    monkeypatch.setattr(operators, "all_cases", lambda setting: [case])
    monkeypatch.setattr(operators, "_LEAST", 0.0)
    result = operators.benchmark(SETTING, 2)
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows["rival"]["failed"] == "RuntimeError: no such kernel"
    assert rows["own"]["baseline"] == "plain"
    assert "| a shape, density 0.50 | rival |  | failed: RuntimeError: no such kernel |" in markdown(result)


def test_inputs_that_fail_are_said_and_what_was_measured_before_is_kept(monkeypatch):
    def broken(seed):
        raise RuntimeError("no such kernel")

    cases = [Case("good", "a shape", lambda seed: {"own": lambda: 1}), Case("bad", "a shape", broken)]
    monkeypatch.setattr(operators, "all_cases", lambda setting: iter(cases))
    monkeypatch.setattr(operators, "_LEAST", 0.0)
    kept = []
    result = operators.benchmark(SETTING, 1, keep=kept.append)
    assert [row["operator"] for row in result["rows"]] == ["good", "bad"]
    assert "| a shape | inputs |  | failed: RuntimeError: no such kernel |" in markdown(result)
    assert result == kept[-1]
    assert "good" in markdown(kept[0])


class Device:
    """A CUDA device's clock that writes down what it is asked."""

    def __init__(self, monkeypatch):
        self.log, self.stream, device = [], "main", self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.log.append("event")

            def elapsed_time(self, other):
                return 40.0

        class Graph:
            def replay(self):
                device.log.append("replay")

        class Capture:
            def __init__(self, graph):
                pass

            def __enter__(self):
                device.stream = "capture"
                device.log.append("capture")

            def __exit__(self, kind, error, trace):
                if error is None:
                    device.stream = "main"  # as torch does: not after an error

        for name, stand_in in (
            ("Event", Event),
            ("CUDAGraph", Graph),
            ("graph", Capture),
            ("synchronize", lambda: device.log.append("wait")),
            ("current_stream", lambda: device.stream),
            ("set_stream", lambda stream: setattr(device, "stream", stream)),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)


def test_the_gpu_clock(monkeypatch):
    """Cold calls are queued behind the flush without a wait; a capture that fails leaves nothing behind."""
    monkeypatch.setattr(operators, "_FLUSH", 16)
    device = Device(monkeypatch)
    clock = operators.Cuda("cpu", count=2)
    calls = [lambda: device.log.append("a"), lambda: device.log.append("b")]
    assert clock.hot(calls) == pytest.approx(0.02)  # 40 ms for two calls
    assert device.log == ["a", "b", "wait", "event", "a", "b", "event", "wait"]
    device.log.clear()
    assert clock.extras(calls, graph=True) == pytest.approx((0.04, 0.02))
    cold = ["event", "a", "event", "event", "b", "event", "wait"]
    assert device.log == [*cold, "capture", "a", "b", "replay", "wait", "event", "replay", "event", "wait"]
    assert clock.extras(calls, graph=False)[1] is None

    def waiting():
        if device.stream == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    assert clock.extras([waiting], graph=True)[1] is None
    assert device.stream == "main"


@torch.no_grad()
def test_baselines_compute_the_same():
    """Values, not only shapes: whoever is compared with does the same work."""
    seen = set()
    for case in all_cases(SETTING):
        calls = case.make(1)
        if case.operator in ("match_tokens", "cache_write") or case.operator.startswith("match,"):
            continue  # a pair of results, a write in place, and other matchers: below
        own = calls["own"]()
        for name, call in calls.items():
            dense = name in ("SDPA", "own dense") and (case.density is not None or case.operator == "sparse_softmax")
            if isinstance(own, torch.Tensor) and not dense:  # a dense result is what sparse ones are timed against
                assert torch.allclose(call(), own, atol=1e-4), (case.operator, name)
                seen.add(case.operator)
    assert len(seen) >= 7
    matching = next(operators_cases.token_cases(SETTING, TINY)).make(0)
    best, index = matching["own"]()
    values, places = matching["normalise, product, max"]()
    assert torch.allclose(best, values, atol=1e-6)
    assert torch.equal(index.long(), places)
    stored = [torch.zeros(1, 8, 2, 4) for _ in range(4)]
    angle = torch.randn(8, 2).repeat_interleave(2, dim=1)
    given = (torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4))
    rest = (torch.tensor([1, 4, 6], dtype=torch.int32), angle.cos(), angle.sin(), torch.randn(4))
    operators_cases.cache_write(*given, *stored[:2], *rest, eps=1e-6)
    operators_eager.eager_cache_write(*given, *stored[2:], *rest)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(stored[:2], stored[2:], strict=True))


@pytest.mark.parametrize(("figure", "verdict"), [(6.0, "met, 6.00x"), (4.0, "missed, 4.00x")])
def test_targets(figure, verdict):
    row = {"operator": "match, merge, unmerge: five blocks of a step", "shape": "SD 1.5 512 px", "variant": "window"}
    row |= {"own": True, "failed": "", "against": {"tomesd": {"median": figure}}}
    verdicts = [target["verdict"] for target in judged([row], "cpu")]
    assert verdicts == [verdict, "not measured"]
    gpu = [target["verdict"] for target in judged([{**row, "operator": "attention_body"}], "cuda")]
    assert "missed, SDPA did not run" in gpu

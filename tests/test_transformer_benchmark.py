"""The benchmark of diffusion transformers: whole runs on tiny networks, its promises, other people's caches."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny_transformers import run, tiny_pipeline

from benchmarks import dit, dit_models, peers, timing
from diffaccel.measure.timing import Spread

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TINY: dict[str, dict[str, Any]] = {
    "SD3_MEDIUM": _HEADS | {"caption_projection_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16},
    "FLUX_DEV": _HEADS | {"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)},
    "PIXART_ALPHA": {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "norm_num_groups": 4,
    },
    "HUNYUAN_DIT": _HEADS
    | {
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16,
    },
}
REAL_SIZE = {"sd3-medium": 2028, "flux-dev": 11901, "pixart-alpha": 611, "hunyuan-dit": 1517}  # millions of weights


@pytest.fixture
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in TINY.items():
        config = getattr(dit_models, name)
        for key, value in changes.items():
            monkeypatch.setitem(config, key, value)


@pytest.mark.parametrize("name", dit_models.NAMES)
def test_real_size(name):
    import diffusers

    cls, config, _, _ = dit_models._MODELS[name]
    with torch.device("meta"):
        network = getattr(diffusers, cls)(**config)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == REAL_SIZE[name]


def test_depth_cuts_blocks_only():
    assert dit_models.configuration("sd3-medium", 4)["num_layers"] == 4
    flux = dit_models.configuration("flux-dev", 6)
    assert (flux["num_layers"], flux["num_single_layers"]) == (2, 4)
    assert dit_models.configuration("flux-dev", None) == dit_models.FLUX_DEV


@pytest.mark.usefixtures("tiny_widths")
@pytest.mark.parametrize("model", dit_models.NAMES)
def test_end_to_end(model, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "installed", dict.fromkeys)
    options = ["--models", model, "--depth", "6", "--size", "128", "--repeats", "1", "--dtype", "float32"]
    dit.main([*options, "--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / f"dit-{model}-cpu.json").read_text())
    rows = {row["name"]: row for row in result["variants"]}
    assert result["not installed"] == ["cache-dit(3)"]
    assert rows["empty recipe"]["fewer_flops"] == 1.0
    sparse = {name for name in dit.methods(model) if name.startswith("SparseAttention")}
    assert all(rows[name]["fewer_flops"] == 1.0 for name in sparse & set(rows))  # 64 tokens are one block
    for name in set(dit.methods(model)) & set(rows) - sparse:
        assert rows[name]["fewer_flops"] > 1.02, name  # whoever skips nothing is not worth timing
    assert rows["Forecast(3)"]["fewer_flops"] > 2
    assert 1 < rows["ResidualCache(3)"]["fewer_flops"] < rows["Forecast(3)"]["fewer_flops"]
    assert ("guidance half" in rows) == (model in dit_models.GUIDED)
    assert rows["half the steps"]["asked"] == 2 * rows["half the steps"]["steps"]
    assert ("SkipCache(3)" in rows) == (model == "hunyuan-dit")
    assert ("BlockCache(first_block)" in rows) == (model == "flux-dev") == ("diffusers FirstBlockCache" in rows)
    if model == "flux-dev":
        assert rows["BlockCache(first_block)"]["fewer_flops"] > 1.5
        assert rows["BlockCache(pyramid)"]["fewer_flops"] > 1.05
    page = (tmp_path / f"dit-{model}-cpu.md").read_text()
    assert all(f"| {name} |" in page for name in rows)
    assert all(f"- {name} does not apply: " in page for name in result["refused"])
    assert not set(rows) & set(result["refused"])


@pytest.mark.usefixtures("tiny_widths")
def test_only_what_was_asked_for_runs(tmp_path):
    options = ["--depth", "2", "--size", "64", "--repeats", "1", "--dtype", "float32", "--device", "cpu"]
    dit.main([*options, "--only", "half the steps", "--clock", "cpu", "--threads", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "dit-sd3-medium-cpu.json").read_text())
    assert [row["name"] for row in result["variants"]] == ["stock", "half the steps"]
    assert result["settings"]["clock"] == "cpu"


def test_weights_and_tables_are_filled():
    pipe = dit_models.build_pipeline("pixart-alpha", "cpu", torch.float32, 1)
    values = [*pipe.transformer.parameters(), *pipe.transformer.buffers()]
    assert all(value.isfinite().all() for value in values)
    assert pipe.transformer.pos_embed.pos_embed.abs().max() == pytest.approx(1.0, abs=1e-3)


def timed(name: str, seconds: list[float], flops: float) -> timing.Timing:
    return timing.Timing(timing.Variant(name, 1, timing.Ours), seconds, flops)


def test_region_sampling_is_measured_against_its_flops():
    plain = timed("empty recipe", [2.0, 4.0], 100.0)
    region = timed("RegionSampling(0.5)", [1.3, 2.6], 60.0)  # its FLOPs allow 1.2 and 2.4
    (found,) = dit.region_bounds([plain, region])
    assert found["faster"]["median"] == pytest.approx(1.2 / 1.3)
    assert found["verdict"] == "met"
    (found,) = dit.region_bounds([plain, dataclasses.replace(region, seconds=[1.5, 3.0])])
    assert found["verdict"] == "missed"
    assert dit.region_bounds([region]) == []


def test_verdicts():
    assert timing.verdict(Spread(1.0, 0.9, 1.1), 1.0) == "met"
    assert timing.verdict(Spread(0.98, 0.9, 1.1), 1.0) == "no difference beyond the noise"
    assert timing.verdict(Spread(0.9, 0.8, 0.95), 1.0) == "missed"


def attributes(pipe: Any) -> list[tuple[str, set[str]]]:
    return [(name, set(vars(module))) for name, module in pipe.transformer.named_modules()]


def test_the_caches_of_diffusers_leave_a_stock_network():
    pipe = tiny_pipeline("flux-dev")
    stock, before = run(pipe, "flux-dev"), attributes(pipe)
    with peers.diffusers_cache(pipe, FirstBlockCacheConfig(threshold=10.0)):
        changed = run(pipe, "flux-dev")
    assert attributes(pipe) == before
    assert not torch.equal(changed, stock)
    assert torch.equal(run(pipe, "flux-dev"), stock)


def test_cache_dit_acts_and_leaves_a_stock_pipeline():
    if peers.installed(peers.TRANSFORMER_PACKAGES)["cache-dit"] is None:
        return  # nothing to measure; the benchmark says so (test_end_to_end)
    pipe = tiny_pipeline("sd3")
    stock, call, before = run(pipe, "sd3"), type(pipe).__call__, attributes(pipe)
    with peers.cache_dit(pipe, hits=2):
        changed = run(pipe, "sd3")
    assert type(pipe).__call__ is call
    assert attributes(pipe) == before
    assert not torch.equal(changed, stock)
    assert torch.equal(run(pipe, "sd3"), stock)

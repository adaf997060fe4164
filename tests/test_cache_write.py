"""The operator of region sampling: keys with norm and rotary positions, and values, written by index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import ARCHITECTURES, Variant, assert_fits, compile_variants
from kernel_harness import DTYPES, assert_accurate, far_tensor, harden
from tiny_transformers import run, tiny_pipeline

import diffaccel
from diffaccel import RegionSampling
from diffaccel.errors import Unsupported
from diffaccel.kernels import cache_write as file
from diffaccel.kernels.cache_write import MOST_NUMBERS, _operator, cache_write, cache_write_oracle, constants
from diffaccel.kernels.triton_support import force_triton
from diffaccel.models.facts import rotate_pairs

NAMES = ("key", "value", "keys", "values", "index", "cosine", "sine", "weight")


def made(batch, tokens, active, heads, size, kind="fp32", *, each=True, table_rows=0, seed=0) -> dict[str, Any]:
    """All arguments; `each`: another index for every row of the batch; table_rows: 0 for a table without batch."""
    maker = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=maker).to(DTYPES[kind])

    orders = [torch.randperm(tokens, generator=maker)[:active] for _ in range(batch if each else 1)]
    angle = torch.randn(*([table_rows] if table_rows else []), tokens, max(size // 2, 1), generator=maker)
    angle = angle.repeat_interleave(2, dim=-1)[..., :size]
    return {
        "key": noise(batch, active, heads, size),
        "value": noise(batch, active, heads, size),
        "keys": noise(batch, tokens, heads, size),
        "values": noise(batch, tokens, heads, size),
        "index": torch.stack(orders).int() if each else orders[0].int(),
        "cosine": angle.cos(),
        "sine": angle.sin(),
        "weight": 1 + 0.1 * noise(size),
    }


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**inputs, **dict.fromkeys(names)}


def on_kernel(inputs: dict[str, Any], **options: Any) -> None:
    given = tuple(inputs[name] for name in NAMES)
    mutated = [place for place, name in enumerate(NAMES) if name in ("keys", "values") and inputs[name] is not None]
    with force_triton():
        assert _operator.path(*given, eps=0.0, half=False) == "triton"
    harden(cache_write, *given, mutated=mutated, **options)


def on_torch(inputs: dict[str, Any], **options: Any) -> None:
    cache_write(*(inputs[name] for name in NAMES), **options)


PATHS = {"torch": on_torch, "kernel": on_kernel}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def check(path: Any, inputs: dict[str, Any], kind: str = "fp32", **options: Any) -> None:
    """What was written is right, and the other rows have the bytes they had."""
    before = {name: None if inputs[name] is None else inputs[name].clone() for name in ("keys", "values")}
    keys, values = cache_write_oracle(**inputs, **options)
    path(inputs, **options)
    for name, wanted in (("keys", keys), ("values", values)):
        got = inputs[name]
        if got is None:
            continue
        assert_accurate(got, wanted, kind)
        rows = inputs["index"].long().expand(len(got), -1)
        named = torch.zeros(got.shape[:2], dtype=torch.bool).scatter_(1, rows, True)
        assert torch.equal(got[~named], before[name][~named])
        if rows.shape[1] and name == "keys":
            assert not torch.equal(got[named], before[name][named])
    if inputs["value"] is not None:
        for b, rows in enumerate(inputs["index"].long().expand(len(inputs["value"]), -1)):
            assert torch.equal(inputs["values"][b, rows], inputs["value"][b])


SHAPES = [
    (1, 9, 4, 2, 8),
    (2, 17, 16, 3, 40),
    (3, 12, 12, 1, 64),
    (1, 20, 7, 5, 72),
    (2, 6, 1, 2, 256),
    (1, 3, 2, 1, 1152),
]
OPTIONS = {
    "plain": (("cosine", "sine", "weight"), {}),
    "rotary": (("weight",), {}),
    "half": (("weight",), {"half": True}),
    "norm": (("cosine", "sine"), {"eps": 1e-6}),
    "norm and rotary": ((), {"eps": 1e-6}),
    "norm and half": ((), {"eps": 1e-6, "half": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accurate(path, shape, option):
    missing, settings = OPTIONS[option]
    inputs = made(*shape)
    if settings.get("half"):
        for name in ("cosine", "sine"):  # every angle at both channels of its pair
            first = inputs[name][..., ::2]
            inputs[name] = torch.cat([first, first], dim=-1)
    check(path, without(inputs, *missing), **settings)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("each", [True, False])
def test_half_precision(path, kind, each):
    """Norm and rotation in fp32, one rounding; one index for all rows or one for each; tables with a batch."""
    check(path, made(2, 11, 5, 3, 40, kind, each=each, table_rows=0 if each else 2), kind, eps=1e-6)


def test_no_tokens_and_all_tokens(path):
    nothing = made(2, 8, 0, 2, 16)
    before = nothing["keys"].clone()
    path(nothing)
    assert torch.equal(nothing["keys"], before)
    check(path, made(2, 8, 8, 2, 16))


def test_keys_or_values_alone(path):
    """Values come without a norm; each can be written on its own, and that gives what both together give."""
    inputs = made(2, 9, 4, 2, 16)
    both = {name: x.clone() for name, x in inputs.items()}
    path(both)
    path(without(inputs, "value", "values"))
    path(without(inputs, "key", "keys", "cosine", "sine", "weight"))
    assert torch.equal(both["keys"], inputs["keys"])
    assert torch.equal(both["values"], inputs["values"])


def test_rotation_is_that_of_the_models():
    """Bit for bit what diffusers' layout of pairs gives on the torch path."""
    inputs = without(made(2, 9, 9, 3, 16, each=False), "weight", "value", "values")
    rows = inputs["index"].long()
    table = tuple(inputs[name][rows][:, None] for name in ("cosine", "sine"))
    wanted = rotate_pairs(inputs["key"], table)
    on_torch(inputs)
    assert torch.equal(inputs["keys"][:, rows], wanted)


def test_rotation_keeps_lengths_and_zero_angles_change_nothing(path):
    inputs = without(made(1, 9, 9, 3, 16), "weight", "value", "values")
    rows = inputs["index"][0].long()
    path(inputs)
    torch.testing.assert_close(inputs["keys"][0, rows].norm(dim=-1), inputs["key"][0].norm(dim=-1))
    still = {**inputs, "cosine": torch.ones(9, 16), "sine": torch.zeros(9, 16)}
    path(still)
    assert torch.equal(still["keys"][0, rows], inputs["key"][0])


def test_views_are_written_in_place(path):
    """Heads in front of tokens, a slice of a fused projection, a stored tensor inside a larger one."""
    inputs = without(made(2, 9, 4, 3, 16), "weight")
    store = torch.randn(2, 3, 12, 16)
    inputs["keys"] = store[:, :, 2:11].transpose(1, 2)
    fused = torch.randn(2, 4, 3, 32)
    inputs["key"], inputs["value"] = fused[..., :16], fused[..., 16:]
    edges = store[:, :, :2].clone(), store[:, :, 11:].clone()
    if path is on_kernel:
        keys, values = cache_write_oracle(**inputs)
        with force_triton():
            cache_write(*(inputs[name] for name in NAMES))
        assert_accurate(inputs["keys"], keys, "fp32")
        assert_accurate(inputs["values"], values, "fp32")
    else:
        check(path, inputs)
    assert torch.equal(store[:, :, :2], edges[0])
    assert torch.equal(store[:, :, 11:], edges[1])


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_tensors_beyond_2_31_numbers(dimension):
    """Both the new and the stored tensors, in every stride."""
    shape = [1, 2, 1, 8]
    shape[dimension] = 2
    new, stored = far_tensor(shape, dimension), far_tensor(shape, dimension)
    new.copy_(torch.randn(shape))
    stored.zero_()
    index = torch.arange(shape[1] - 1, -1, -1, dtype=torch.int32)
    with force_triton():
        cache_write(new, new, stored, stored.clone(), index)
    assert torch.equal(stored.flip(1), new)


def test_what_has_no_kernel_takes_the_torch_path():
    inputs = made(1, 4, 2, 2, 8)
    inputs["key"] = inputs["key"].transpose(2, 3).contiguous().transpose(2, 3)
    wide = made(1, 2, 1, 1, MOST_NUMBERS + 2)
    with force_triton():
        assert _operator.path(*inputs.values(), eps=0.0, half=False) == "torch"
        assert _operator.path(*wide.values(), eps=0.0, half=False) == "torch"


@pytest.mark.parametrize("missing", [(), ("value", "values"), ("key", "keys")])
def test_the_operator_is_sound(missing):
    inputs = without(made(2, 9, 4, 2, 16), *missing)
    torch.library.opcheck(_operator.custom, tuple(inputs[name] for name in NAMES), {"eps": 1e-6, "half": False})


def test_compiles_whole():
    inputs = made(2, 9, 4, 2, 16)
    eager = {name: x.clone() for name, x in inputs.items()}

    def step(key, value, keys, values, index, cosine, sine, weight):
        cache_write(key * 2, value, keys, values, index, cosine, sine, weight, eps=1e-6)
        return keys.sum() + values.sum()

    wanted = step(*(eager[name] for name in NAMES))
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*(inputs[name] for name in NAMES))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(inputs["keys"], eager["keys"])


def test_refusals():
    inputs = made(1, 4, 2, 2, 8)
    for name in ("keys", "value", "sine"):
        with pytest.raises(ValueError, match="one of such a pair is missing"):
            on_torch(without(inputs, name))
    with pytest.raises(ValueError, match="neither a key nor a value"):
        on_torch(without(inputs, "key", "keys", "value", "values"))
    inputs["key"].requires_grad_()
    with pytest.raises(Unsupported, match="cache_write has no gradient"):
        on_torch(inputs)


def test_compiles_for_gpus():
    """FLUX's keys with everything, PixArt's without; no tensor cores, no loops."""
    strides = ["kb", "kt", "kh", "vb", "vt", "vh", "xb", "xt", "xh", "yb", "yt", "yh", "cb", "ct", "sb", "st"]
    types = dict.fromkeys(["key", "value", "keys", "values", "weight"], "*bf16") | {"index": "*i32", "active": "i32"}
    types |= {"cosine": "*fp32", "sine": "*fp32", "eps": "fp32", "stride_ib": "i32"}
    types |= dict.fromkeys([f"stride_{name}" for name in strides], "i32:16")
    variants = []
    for architecture in ARCHITECTURES:
        for heads, size, everything in ((24, 128, True), (1, 1152, False)):
            sizes = constants(heads, size)
            flags = {"KEYS": True, "VALUES": True, "NORM": everything, "ROTARY": everything, "HALF": False}
            tile = file.tiles(file._TILES, sizes["ALL_HEADS"] * sizes["ALL_SIZE"], divmod(architecture, 10))
            module = "diffaccel.kernels.cache_write"
            fixed = {**sizes, **flags}
            variants.append(
                Variant(f"{heads}", module, "_cache_write_kernel", types, fixed, architecture, tile.warps, tile.stages)
            )
    for found in compile_variants(variants):
        assert_fits(found, matrix=False, loops=False)


@pytest.mark.parametrize("kind", ["flux-dev", "sd3.5-medium"])
def test_region_sampling_on_the_kernel(kind):
    """A whole run whose region steps write by the kernel gives the picture of the torch path; the report tells them apart."""
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, RegionSampling(start=2, min_evaluations=1, end=4))
    wanted = run(fast, kind, steps=5)
    assert set(fast.report.operators["cache_write"]) == {"torch"}
    with force_triton():
        got = run(fast, kind, steps=5)
    assert set(fast.report.operators["cache_write"]) == {"triton"}
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))

"""Attached long skips: no effect before training, exact removal, files that are checked, and the skip cache on them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from tiny_transformers import run as run_unseeded
from tiny_transformers import tiny_pipeline

import diffaccel
from diffaccel import SkipCache, Unsupported
from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.long_skips import BlockBypass, bypass_blocks
from diffaccel.models.transformers import describe_transformer
from training.skip_branches import Example, Recorder, Runs, Student, draw

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # inside diffusers

KINDS = ("sd3", "sd3-controlnet", "sd3.5-medium", "flux-dev", "flux-controlnet", "pixart-sigma", "sana", "dit")
MORE_KINDS = ("qwen-image", "cogview4", "wan", "cogvideox")
REFUSED = {
    "hunyuan": "has long skips of its own",
    "flux2": "joins text and image to one sequence",
    "lumina2": "joins text and image to one sequence",
    "auraflow": "joins text and image to one sequence",
    "z-image": "joins text and image to one sequence",
    "lumina-next": "not of a kind that skip branches fit",
}


def run(pipe, kind, **options):
    """Latents of one call; ControlNet pipelines draw the encoded picture from the global generator."""
    torch.manual_seed(77)
    return run_unseeded(pipe, kind, **options)


def trained(branches, seed=3):
    """Random weights in place of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in branches.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return branches


def tiny_sd3(layers=6):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
    )
    return model.eval()


def inputs(seed=0, rows=3, height=8, width=12):
    g, text = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    return {
        "hidden_states": torch.randn(rows, 4, height, width, generator=g),
        "timestep": torch.full((rows,), 900.0 - 300.0 * seed),
        "encoder_hidden_states": torch.randn(rows, 5, 12, generator=text),
        "pooled_projections": torch.randn(rows, 12, generator=text),
    }


def fused(branch, x, skip):
    """x + A LN([x ; h]), from the formula."""
    joined = torch.cat([x, skip], -1)
    normal = (joined - joined.mean(-1, keepdim=True)) / (joined.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    return x + (normal * branch.norm.weight + branch.norm.bias) @ branch.linear.weight.T + branch.linear.bias


def slow_forward(model, given, branches, depth=None, feature=None):
    """Returns (output, (text, image) in front of block L - depth). Given those, runs only the outer blocks."""
    height, width = (side // 2 for side in given["hidden_states"].shape[-2:])
    image, skips = model.pos_embed(given["hidden_states"]), {}
    temb = model.time_text_embed(given["timestep"], given["pooled_projections"])
    text, stored = model.context_embedder(given["encoder_hidden_states"]), None
    count = len(model.transformer_blocks)
    for number, block in enumerate(model.transformer_blocks):
        if feature is not None and depth <= number < count - depth:
            continue
        if depth is not None and number == count - depth:
            text, image = stored = (text, image) if feature is None else feature
        partner = count - 1 - number
        if partner < len(branches) and partner < number:
            image = fused(branches[partner], image, skips[partner])
        text, image = type(block).forward(block, image, text, temb)
        skips[number] = image
    out = model.proj_out(model.norm_out(image, temb)).reshape(len(image), height, width, 2, 2, -1)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(out), -1, 2 * height, 2 * width), stored


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_new_branches_change_nothing_and_leave_nothing(kind):
    """Bit-equal pictures before, with new branches, and after their removal."""
    pipe = tiny_pipeline(kind)
    network = pipe.transformer
    plain = run(pipe, kind, steps=2)
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    branches = diffaccel.add_skip_branches(network)
    assert torch.equal(run(pipe, kind, steps=2), plain)
    trained(branches)
    assert not torch.equal(run(pipe, kind, steps=2), plain)
    diffaccel.remove_skip_branches(network)
    assert torch.equal(run(pipe, kind, steps=2), plain)
    after = {name: dict(vars(module)) for name, module in network.named_modules()}
    assert list(after) == list(before)
    for name, state in after.items():
        assert set(state) == set(before[name])
        assert not state["_forward_hooks"]
        assert not state["_forward_pre_hooks"]


@torch.no_grad()
def test_trained_branches_compute_the_formula():
    model = tiny_sd3()
    branches = trained(diffaccel.add_skip_branches(model, pairs=2))
    given = inputs()
    assert torch.allclose(model(**given).sample, slow_forward(model, given, branches)[0], atol=1e-5)
    assert not torch.allclose(model(**given).sample, slow_forward(model, given, [])[0], atol=1e-2)


def test_new_branches_learn():
    """A is zero, but its gradient is not; only the branches need one."""
    model = tiny_sd3().requires_grad_(False)
    branches = diffaccel.add_skip_branches(model, pairs=2)
    model(**inputs()).sample.square().mean().backward()
    assert all(bool(branch.linear.weight.grad.abs().sum() > 0) for branch in branches)


@torch.no_grad()
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_cached_evaluation_equals_the_written_out_forward(depth, order):
    """Both streams of SD3 come from the full evaluation; the image stream is joined with the fresh skips."""
    model = tiny_sd3()
    branches = trained(diffaccel.add_skip_branches(model, pairs=2))
    first, second = inputs(0), inputs(1)
    whole, feature = slow_forward(model, first, branches, depth)
    want, _ = slow_forward(model, second, branches, depth, feature)
    bypass = BlockBypass(order)
    with Seams() as seams:
        bypass_blocks(describe_transformer(model), depth, bypass, seams)
        with bypass.active(0, cached=False, position=3.0):
            assert torch.allclose(model(**first).sample, whole, atol=1e-5)
        with bypass.active(0, cached=True, position=2.0):
            assert torch.allclose(model(**second).sample, want, atol=1e-5)
    noise = [torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for value in feature]
    for other in ((feature[0] + noise[0], feature[1]), (feature[0], feature[1] + noise[1])):
        assert not torch.allclose(slow_forward(model, second, branches, depth, other)[0], want, atol=1e-3)
    assert not torch.allclose(model(**second).sample, want, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_unchanged_inputs_are_bit_equal(depth):
    model = tiny_sd3()
    trained(diffaccel.add_skip_branches(model, pairs=2))
    given = inputs()
    want = model(**given).sample
    bypass = BlockBypass(1)
    with Seams() as seams:
        bypass_blocks(describe_transformer(model), depth, bypass, seams)
        for position, cached in ((0.9, False), (0.8, False), (0.7, True), (0.6, True)):
            with bypass.active(0, cached=cached, position=position, fresh=False):
                assert torch.equal(model(**given).sample, want)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS, "flux-cfg", "wan-2.2"])
def test_the_skip_cache_runs_the_outer_blocks(kind):
    """On every family: all evaluations full is stock; cached ones leave the inner blocks and the inner branches out."""
    pipe = tiny_pipeline(kind)
    networks = [net for net in (pipe.transformer, getattr(pipe, "transformer_2", None)) if net is not None]
    ran = []

    def count(module, name):
        original = module.forward
        module.forward = lambda *a, **k: ran.append(name) or original(*a, **k)

    for network in networks:
        branches = trained(diffaccel.add_skip_branches(network))
        blocks = describe_transformer(network).blocks
        for number, name in ((0, "first"), (len(blocks) // 2, "inner"), (-1, "last")):
            count(blocks[number], name)
        count(branches[0], "branch")
    plain = run(pipe, kind, steps=10)
    calls = ran.count("first")
    full = diffaccel.wrap(pipe, SkipCache(schedule=tuple(range(20))))
    assert torch.equal(run(full, kind, steps=10), plain)
    fast = diffaccel.wrap(pipe, SkipCache(interval=3))
    ran.clear()
    cached = run(fast, kind, steps=10)
    counts = fast.report.methods["skip_cache"]
    assert counts["cached"] > counts["full"] > 0
    assert ran.count("first") == ran.count("last") == ran.count("branch") == counts["cached"] + counts["full"] == calls
    assert ran.count("inner") == counts["full"]
    assert fast.report.flops < fast.report.flops_plain
    assert not torch.equal(cached, plain)
    assert torch.equal(run(fast, kind, steps=10), cached)
    assert torch.equal(run(pipe, kind, steps=10), plain)


def test_branches_of_inner_pairs_rest_on_cached_evaluations():
    pipe = tiny_pipeline("sd3")
    pipe.transformer = tiny_wide()
    branches = trained(diffaccel.add_skip_branches(pipe.transformer, pairs=2))
    ran = [0, 0]
    for number, branch in enumerate(branches):

        def counting(*args, number=number, original=branch.forward):
            ran[number] += 1
            return original(*args)

        branch.forward = counting
    fast = diffaccel.wrap(pipe, SkipCache(interval=3, depth=1))
    run(fast, "sd3", steps=12)
    assert ran == [12, fast.report.methods["skip_cache"]["full"]]


def tiny_wide():
    from tiny_transformers import _sd3

    return _sd3(num_layers=6)


def test_depth_needs_as_many_branches():
    pipe = tiny_pipeline("sd3")
    diffaccel.add_skip_branches(pipe.transformer)
    with pytest.raises(Unsupported, match="depth 2 does not exist; this transformer has depths 1 to 1"):
        diffaccel.wrap(pipe, SkipCache(depth=2))


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_take_branches_are_refused(kind):
    network = tiny_pipeline(kind).transformer
    names = list(network.state_dict())
    with pytest.raises(Unsupported, match=REFUSED[kind]):
        diffaccel.add_skip_branches(network)
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("pairs", [0, 3, -1, True, 1.0, "1"])
def test_wrong_numbers_of_pairs_are_refused(pairs):
    with pytest.raises(Unsupported, match="pairs is 1 to 2 for 6 blocks, not"):
        diffaccel.add_skip_branches(tiny_sd3(), pairs=pairs)


def test_misuse_is_refused():
    model = tiny_sd3()
    with pytest.raises(Unsupported, match="has no skip branches"):
        diffaccel.remove_skip_branches(model)
    with pytest.raises(Unsupported, match="has no skip branches"):
        diffaccel.save_skip_branches(model, "nowhere")
    with pytest.raises(Unsupported, match=r"Linear is not a diffusion transformer .* give `pipe.transformer`"):
        diffaccel.add_skip_branches(torch.nn.Linear(2, 2))
    diffaccel.add_skip_branches(model)
    with pytest.raises(Unsupported, match="has skip branches already"):
        diffaccel.add_skip_branches(model)


@torch.no_grad()
def test_a_file_brings_the_branches_back(tmp_path):
    model, given, path = tiny_sd3(), inputs(), tmp_path / "branches.safetensors"
    trained(diffaccel.add_skip_branches(model, pairs=2))
    want = model(**given).sample
    diffaccel.save_skip_branches(model, path)
    diffaccel.remove_skip_branches(model)
    branches = diffaccel.load_skip_branches(model, path)
    assert len(branches) == 2
    assert torch.equal(model(**given).sample, want)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def rewritten(path, change, facts=None):
    """The file with other tensors or other metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        known = json.loads(file.metadata()["skip_branches"])
    tensors = change(dict(load_file(path)))
    text = facts if isinstance(facts, str) else json.dumps({**known, **(facts or {})})
    save_file(tensors, path, metadata={"skip_branches": text})


HOSTILE = {
    "not there": (lambda path: path.unlink(), "cannot read skip branches"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read skip branches"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read skip branches"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "cannot read skip branches"),
    "huge header": (lambda path: path.write_bytes(b"\xff" * 8 + b"{}"), "cannot read skip branches"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot read skip branches"),
    "no metadata": (lambda path: save_file(load_file(path), path), "does not hold skip branches"),
    "no json": (lambda path: rewritten(path, dict, "{"), "does not hold skip branches"),
    "nested": (lambda path: rewritten(path, dict, "[" * 99999), "does not hold skip branches"),
    "a list": (lambda path: rewritten(path, dict, "[]"), "does not hold skip branches"),
    "future": (lambda path: rewritten(path, dict, {"format": "diffaccel skip branches 9"}), "does not hold"),
    "pairs": (lambda path: rewritten(path, dict, {"pairs": 10**9}), "1000000000 pairs, which do not fit 6 blocks"),
    "pairs text": (lambda path: rewritten(path, dict, {"pairs": "2"}), "'2' pairs, which do not fit"),
    "class": (lambda path: rewritten(path, dict, {"class": "X" * 999}), "'XXX.*another configuration than this SD3"),
    "config": (lambda path: rewritten(path, dict, {"config": "0" * 64}), "another configuration than this SD3"),
    "extra key": (lambda path: rewritten(path, dict, {"more": 1}), "another configuration than this SD3"),
    "fewer": (lambda path: rewritten(path, lambda t: {k: v for k, v in t.items() if "0" in k}), "exactly the tensors"),
    "more": (lambda path: rewritten(path, lambda t: {**t, "9.x": torch.ones(1)}), "exactly the tensors"),
    "shape": (
        lambda path: rewritten(path, lambda t: {**t, "0.linear.weight": torch.ones(16, 33)}),
        r"0.linear.weight .* does not have the shape \(16, 32\)",
    ),
    "nan": (
        lambda path: rewritten(path, lambda t: {**t, "1.norm.bias": torch.full((32,), float("nan"))}),
        "1.norm.bias .* finite",
    ),
    "integers": (
        lambda path: rewritten(path, lambda t: {**t, "1.norm.bias": torch.ones(32, dtype=torch.int64)}),
        "1.norm.bias .* finite",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", HOSTILE)
def test_wrong_files_are_refused_and_leave_the_model_alone(case, tmp_path):
    path, given = tmp_path / "branches.safetensors", inputs()
    writer = tiny_sd3()
    trained(diffaccel.add_skip_branches(writer, pairs=2))
    diffaccel.save_skip_branches(writer, path)
    harm, sentence = HOSTILE[case]
    harm(path)
    model = tiny_sd3()
    want, names = model(**given).sample, list(model.state_dict())
    with pytest.raises(Unsupported, match=sentence) as refusal:
        diffaccel.load_skip_branches(model, path)
    assert "\n" not in str(refusal.value)
    assert list(model.state_dict()) == names
    assert not model._forward_pre_hooks
    assert torch.equal(model(**given).sample, want)


def test_a_file_of_another_configuration_is_refused(tmp_path):
    """Also where all shapes agree."""
    writer, reader = tiny_sd3(6), tiny_sd3(5)
    diffaccel.add_skip_branches(writer)
    diffaccel.save_skip_branches(writer, tmp_path / "b.safetensors")
    with pytest.raises(Unsupported, match="another configuration"):
        diffaccel.load_skip_branches(reader, tmp_path / "b.safetensors")


def test_a_file_that_cannot_be_written_is_reported(tmp_path):
    model = tiny_sd3()
    diffaccel.add_skip_branches(model)
    with pytest.raises(Unsupported, match="cannot write skip branches"):
        diffaccel.save_skip_branches(model, tmp_path / "nowhere" / "b.safetensors")


@torch.no_grad()
def test_checkpoints_hold_stock_weights_and_branches(tmp_path):
    """`save_pretrained` loads as the stock model, and with branches added again as the edited one."""
    model, given = tiny_sd3(), inputs()
    stock = model(**given).sample
    trained(diffaccel.add_skip_branches(model, pairs=2))
    edited = model(**given).sample
    model.save_pretrained(tmp_path)
    again = SD3Transformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**given).sample, stock)
    diffaccel.add_skip_branches(again, pairs=2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**given).sample, edited)


@torch.no_grad()
def test_copies_are_independent():
    model, given = tiny_sd3(), inputs()
    stock = model(**given).sample
    trained(diffaccel.add_skip_branches(model))
    edited = model(**given).sample
    other = copy.deepcopy(model)
    for weight in other.skip_branches.parameters():
        weight.zero_()
    assert torch.equal(other(**given).sample, stock)
    assert torch.equal(model(**given).sample, edited)
    diffaccel.remove_skip_branches(other)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
    assert torch.equal(model(**given).sample, edited)


@torch.no_grad()
def test_blocks_left_out_leave_their_branch_out():
    """Skip-layer guidance does not call some blocks: the rest runs as if it had no branch to them."""
    model, given = tiny_sd3(), inputs()
    without = model(**given, skip_layers=[0]).sample
    trained(diffaccel.add_skip_branches(model))
    model(**given, skip_layers=[5])  # block 0 is kept for a partner that never comes
    assert torch.equal(model(**given, skip_layers=[0]).sample, without)


@torch.no_grad()
@pytest.mark.parametrize(("full", "earlier"), [((0, 2, 3, 4), 0), ((0, 1, 2, 4, 5), 1)])
def test_training_examples_are_what_the_cache_computes(full, earlier):
    """A recorded run, and the cached evaluation of a run that is full until then: the same output but for rounding."""
    pipe = tiny_pipeline("sd3")
    trained(diffaccel.add_skip_branches(pipe.transformer))
    recorder = Recorder(pipe.transformer)
    run(pipe, "sd3", steps=6)
    runs = recorder.runs()
    now = min(set(range(6)) - set(full))
    recorder = Recorder(pipe.transformer)
    run(diffaccel.wrap(pipe, SkipCache(schedule=full, full_last=0, min_evaluations=1)), "sd3", steps=6)
    want = recorder.runs().outputs[now]
    index = [torch.full((2,), value) for value in (now, now - 1, earlier)]
    with Seams() as seams:
        got = Student(pipe.transformer, seams)(runs, Example(torch.arange(2), *index))
    assert torch.allclose(got, want, rtol=0.01, atol=0.01)
    assert not torch.allclose(got, runs.outputs[now], rtol=0.01, atol=0.01)


def test_training_batches_stay_inside_the_runs():
    """Every age below the interval occurs, fresh ones too; no full evaluation lies outside the run."""
    runs = Runs(torch.zeros(9, 5, 1, 1, 1), *[torch.zeros(1)] * 5)
    ages = set()
    for seed in range(40):
        batch = draw(runs, torch.Generator().manual_seed(seed))
        ages |= set((batch.now - batch.full).tolist())
        assert batch.now.max() < 9
        assert batch.earlier.min() >= 0
        assert batch.rows.max() < 5
        gap = batch.full - batch.earlier
        assert ((gap == 0) | (gap > batch.now - batch.full)).all()
    assert ages == {0, 1, 2, 3}


@torch.no_grad()
def test_half_precision_and_autocast():
    model, given = tiny_sd3().to(torch.bfloat16), inputs()
    half = {name: value.to(torch.bfloat16) for name, value in given.items()}
    want = model(**half).sample
    branches = diffaccel.add_skip_branches(model)
    assert {weight.dtype for weight in branches.parameters()} == {torch.bfloat16}
    assert torch.equal(model(**half).sample, want)
    whole = tiny_sd3()
    with torch.autocast("cpu", torch.bfloat16):
        want = whole(**given).sample
        diffaccel.add_skip_branches(whole)
        assert torch.equal(whole(**given).sample, want)

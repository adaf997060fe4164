"""Edits on pipelines: both forms against slow oracles, every order of applying and removing, and what others do meanwhile."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import warnings

import accelerate
import pytest
import torch
from tiny import load_lora, run
from tiny_edits import ALL, VALUES, denoiser, mapped, random_edit, same_weights, tiny_of, weights_of
from tiny_text import tiny_text_pipeline

import diffaccel
from diffaccel.edits.apply import applied_edits, apply_edit, remove_edit
from diffaccel.edits.edit import Edit
from diffaccel.edits.parts import EditError, TextMap
from diffaccel.engine import seams
from diffaccel.erasure import ErasureWarning, UneditedControl
from diffaccel.errors import RecipeError, Unsupported
from diffaccel.methods.erase import Erase
from diffaccel.recipes.recipe import Recipe

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ("sd", "sdxl", "sd3", "flux-dev", "pixart-sigma")
torch.set_num_threads(1)


def build(kind):
    return tiny_of(kind).tiny_pipeline(kind)


def draw(pipe, kind="sd", **options):
    return tiny_of(kind).run(pipe, kind, **{"steps": 2, **options})


def call_mapped(pipe, kind, edits, **options):
    """What the stock pipeline makes of prompt embeddings that went through the edits, in the order of their digests."""
    given = tiny_of(kind).tiny_inputs(kind, **{"steps": 2, **options})
    for edit in sorted(edits, key=lambda edit: edit.digest):
        for name in [name for name in given if name.endswith("prompt_embeds")]:
            given[name] = mapped(edit, "pooled" if "pooled" in name else "sequence", given[name])
    result = pipe(**given)
    return result.images if hasattr(result, "images") else result[0]


def close(got, want):
    """Equal but for the rounding of fp32 on another path."""
    return (got - want).abs().max() <= 1e-5 * max(1, want.abs().max())


@torch.no_grad()
def look(pipe, edits=()):
    """What the UNet alone predicts for one text; `edits` act on the text itself."""
    maker = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 4, 8, 8, generator=maker), torch.randn(1, 5, 16, generator=maker)
    for edit in edits:
        text = mapped(edit, "sequence", text)
    return pipe.unet(x, 10, text).sample


def nothing_left(pipe):
    network = denoiser(pipe)
    hooks = [m for m in network.modules() if m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m)]
    return not hooks and "_diffaccel_edits" not in vars(network)


# --- what an edit does ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_the_pipeline_with_mapped_embeddings(kind):
    pipe, edits = build(kind), []
    stock = draw(pipe, kind)
    for seed in (1, 2):
        edits.append(apply_edit(pipe, random_edit(pipe, seed), form="map"))
    got = draw(pipe, kind)
    assert torch.equal(got, draw(pipe, kind))
    for edit in edits:
        remove_edit(pipe, edit)
    want = call_mapped(pipe, kind, edits)
    assert close(got, want)
    assert (got - stock).abs().max() > 1e-3
    assert torch.equal(draw(pipe, kind), stock)
    assert nothing_left(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_the_product(kind):
    pipe = build(kind)
    before, edit, size = weights_of(pipe), random_edit(pipe, 3, roles=VALUES), 0
    apply_edit(pipe, edit)
    after = weights_of(pipe)
    for text_map in edit.maps:
        for module in text_map.modules:
            name = module.name.split(".", 1)[1] + ".weight"
            (first, past), want = module.columns, before[name].double().clone()
            for row in want:  # w' = w + (w L) R, one output at a time
                row[first:past] += (row[first:past] @ text_map.left.double()) @ text_map.right.double()
            assert (after[name] - want).abs().max() <= 1e-6 * want.abs().max()
            assert torch.equal(after[name][:, past:], before[name][:, past:])
            assert not torch.equal(after.pop(name), before[name])
            size += 1
    assert size == len(edit.modules)
    assert all(torch.equal(value, before[name]) for name, value in after.items())  # nothing else changed
    assert set(after) <= set(before)
    remove_edit(pipe, edit)
    assert same_weights(pipe, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("roles", [ALL, VALUES], ids=["all", "values"])
def test_both_forms_agree_to_rounding(dtype, roles):
    """On every projection, with two edits at once; an edit of half a vector's columns is among them."""
    pipe = build("sdxl").to(DTYPES[dtype])
    edits = [random_edit(pipe, 4, roles=roles), random_edit(pipe, 5)]
    probes, maker = {}, torch.Generator().manual_seed(0)
    for module in edits[0].modules:
        probes[module.name] = torch.randn(2, 3, module.shape[1], generator=maker).to(DTYPES[dtype])
    found = {}
    for form in ("weights", "map"):
        for edit in edits:
            apply_edit(pipe, edit, form=form)
        found[form] = {n: pipe.unet.get_submodule(n[5:])(x) for n, x in probes.items()}
        for edit in edits:
            remove_edit(pipe, edit)
    for name, x in probes.items():
        written, hooked, plain = found["weights"][name], found["map"][name], pipe.unet.get_submodule(name[5:])(x)
        scale = written.float().abs().max()
        assert (written - hooked).float().abs().max() <= 6 * torch.finfo(DTYPES[dtype]).eps * scale
        assert (written - plain).float().abs().max() > 0.02 * scale


def test_only_the_text_columns_of_a_shared_projection_are_mapped():
    """SDXL's add_embedding reads the pooled text and, behind it, the sizes."""
    pipe = build("sdxl")
    edit = random_edit(pipe)
    pooled = next(m for m in edit.maps if m.route == "pooled").modules[0]
    assert pooled.columns[1] < pooled.shape[1]
    layer, x = pipe.unet.add_embedding.linear_1, torch.randn(2, pooled.shape[1])
    x[:, : pooled.columns[1]] = 0
    stock = layer(x)
    for form in ("weights", "map"):
        apply_edit(pipe, edit, form=form)
        assert torch.equal(layer(x), stock)
        remove_edit(pipe, edit)


# --- any number, any order ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_do_not_depend_on_the_order(dtype):
    """At every stage the bytes are those of the applied edits alone; in the end the base's."""
    pipe = build("sdxl").to(DTYPES[dtype])
    base = weights_of(pipe)
    edits = [random_edit(pipe, seed, roles=(ALL, VALUES, ("key",))[seed]) for seed in range(3)]
    wanted = {frozenset(): base}
    for count in (1, 2, 3):
        for some in itertools.combinations(edits, count):
            for edit in some:
                apply_edit(pipe, edit)
            wanted[frozenset(some)] = weights_of(pipe)
            for edit in some:
                remove_edit(pipe, edit)
    assert (
        len(
            {
                tuple(w["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][0].tolist())
                for w in wanted.values()
            }
        )
        == 4
    )
    orders = list(itertools.permutations(edits))
    for coming, going in zip(orders, reversed(orders), strict=True):
        on = set()
        for edit in coming:
            apply_edit(pipe, edit)
            assert same_weights(pipe, wanted[frozenset(on := {*on, edit})])
        for edit in going:
            remove_edit(pipe, edit)
            assert same_weights(pipe, wanted[frozenset(on := on - {edit})])
    assert nothing_left(pipe)


def test_both_forms_at_once():
    pipe = build("sd")
    base, stock, edits = weights_of(pipe), draw(pipe), [random_edit(pipe, seed) for seed in range(3)]
    for edit, form in zip(edits, ("weights", "map", "weights"), strict=True):
        apply_edit(pipe, edit, form=form)
    assert set(applied_edits(pipe)) == {(edits[0], "weights"), (edits[2], "weights"), (edits[1], "map")}
    both = draw(pipe)
    remove_edit(pipe, edits[0])
    remove_edit(pipe, edits[1])
    alone = draw(pipe)
    apply_edit(pipe, edits[1], form="map")
    apply_edit(pipe, edits[0])
    assert torch.equal(draw(pipe), both)
    assert (both - alone).abs().max() > 1e-3
    for edit in edits:
        remove_edit(pipe, edit)
    assert same_weights(pipe, base)
    assert torch.equal(draw(pipe), stock)
    assert nothing_left(pipe)


# --- all or nothing ---


class Boom(BaseException):
    """Not an Exception, as a keyboard interrupt is none."""


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("action", ["apply", "remove"])
@pytest.mark.parametrize("at", [1, 5, 12])
def test_an_error_in_the_middle_rolls_back(monkeypatch, others, action, at):
    pipe = build("sd")
    base, edit, other = weights_of(pipe), random_edit(pipe, 1), random_edit(pipe, 2)
    if others:
        apply_edit(pipe, other)
    if action == "remove":
        apply_edit(pipe, edit)
    before, applied, picture = weights_of(pipe), applied_edits(pipe), draw(pipe)
    calls, original = [], seams.overwrite

    def failing(weight, value):
        calls.append(weight)
        if len(calls) == at:
            raise Boom
        original(weight, value)

    monkeypatch.setattr(seams, "overwrite", failing)
    act = {"apply": apply_edit, "remove": remove_edit}[action]
    with pytest.raises(Boom):
        act(pipe, edit)
    monkeypatch.undo()
    assert len(calls) == 2 * at  # so many were begun, and taken back
    assert same_weights(pipe, before)
    assert set(applied_edits(pipe)) == set(applied)
    assert torch.equal(draw(pipe), picture)
    act(pipe, edit)
    for one, _ in applied_edits(pipe):
        remove_edit(pipe, one)
    assert same_weights(pipe, base)
    assert nothing_left(pipe)


def test_weights_that_would_overflow_are_refused():
    pipe = build("sd").to(torch.float16)
    before, edit = weights_of(pipe), random_edit(pipe, size=1e3)
    with pytest.raises(Unsupported, match="would make weights infinite in float16"):
        apply_edit(pipe, edit)
    assert same_weights(pipe, before)
    assert nothing_left(pipe)


# --- refusals ---


@pytest.mark.parametrize("first", ["weights", "map"])
@pytest.mark.parametrize("second", ["weights", "map"])
def test_once_is_enough(first, second):
    pipe = build("sd")
    edit = apply_edit(pipe, random_edit(pipe), form=first)
    picture = draw(pipe)
    with pytest.raises(Unsupported, match=r"edit erasing 'circle 0' \(uce\) is applied already"):
        apply_edit(pipe, edit, form=second)
    assert torch.equal(draw(pipe), picture)
    remove_edit(pipe, edit)
    with pytest.raises(Unsupported, match="is not applied to this StableDiffusionPipeline"):
        remove_edit(pipe, edit)
    assert nothing_left(pipe)


@pytest.mark.parametrize("form", ["weights", "map"])
def test_another_base_is_refused(form):
    pipe = build("sd")
    edit = random_edit(pipe)
    with torch.no_grad():  # one number of one edited weight
        pipe.unet.get_submodule(edit.modules[7].name[5:]).weight[0, 0] += 1e-3
    before = weights_of(pipe)
    with pytest.raises(Unsupported, match=r"was made on other weights than these \(unet\..*differs\)"):
        apply_edit(pipe, edit, form=form)
    with pytest.raises(Unsupported, match=r"does not fit this StableDiffusionXLPipeline, where unet\."):
        apply_edit(build("sdxl"), Edit(**{**vars_of(edit), "maps": (random_edit(build("sd")).maps[0],)}), form=form)
    assert same_weights(pipe, before)
    assert nothing_left(pipe)


def vars_of(edit):
    return {name: getattr(edit, name) for name in edit.__dataclass_fields__}


def test_other_refusals():
    pipe = build("sd")
    edit = random_edit(pipe)
    with pytest.raises(EditError, match="'weights' or 'map', not 'weight'"):
        apply_edit(pipe, edit, form="weight")
    with pytest.raises(EditError, match="cannot read an edit from 'nowhere"):
        apply_edit(pipe, "nowhere.safetensors")
    alien = Edit(
        **{**vars_of(edit), "maps": (TextMap("pooled", edit.maps[0].left, edit.maps[0].right, edit.modules[:1]),)}
    )
    with pytest.raises(Unsupported, match="does not read the pooled text"):
        apply_edit(pipe, alien)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(Unsupported, match="compiled as a whole"):
        apply_edit(pipe, edit, form="map")


# --- dtypes ---


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_edit_made_in_fp32_fits_the_half_precision_load(dtype, tmp_path):
    edit = random_edit(build("sd"))
    edit.save(tmp_path / "e.safetensors")
    pipe = build("sd").to(DTYPES[dtype])
    before = weights_of(pipe)
    apply_edit(pipe, tmp_path / "e.safetensors")
    assert not same_weights(pipe, before)
    remove_edit(pipe, edit)
    assert same_weights(pipe, before)


@pytest.mark.parametrize("way", [("fp16",), ("bf16",), ("fp16", "fp32"), ("bf16", "fp32")])
def test_a_cast_in_between(way):
    pipe, twin = build("sd"), build("sd")
    edits = [apply_edit(pipe, random_edit(twin, seed)) for seed in (1, 2)]
    for step in way:
        pipe, twin = pipe.to(DTYPES[step]), twin.to(DTYPES[step])
    for edit in edits:
        remove_edit(pipe, edit)
    assert same_weights(pipe, weights_of(twin))
    assert nothing_left(pipe)


# --- LoRA and fused projections ---


LORA = {
    "load": load_lora,
    "merge": lambda pipe: pipe.unet.fuse_lora(),
    "unmerge": lambda pipe: pipe.unet.unfuse_lora(),
    "unload": lambda pipe: pipe.unet.unload_lora(),
    "edit": lambda pipe: apply_edit(pipe, random_edit(build("sd")), form="map"),
}


@pytest.mark.parametrize(
    "story",
    ["load edit", "edit load", "load merge edit", "load edit merge", "edit load merge", "edit load merge unmerge",
     "edit load unload", "edit load merge unload", "load edit merge unload", "load edit unload load"],
)  # fmt: skip
def test_maps_hold_with_lora_in_any_order(story):
    """What the LoRA adds reads the mapped text too."""
    pipe, twin, edit = build("sd"), build("sd"), random_edit(build("sd"))
    plain = look(twin)
    for step in story.split():
        LORA[step](pipe)
        look(pipe)
        if step != "edit":
            LORA[step](twin)
    want = look(twin, [edit])
    got, stock = look(pipe), look(twin)
    assert close(got, want)
    assert (got - stock).abs().max() > 1e-3
    remove_edit(pipe, edit)
    assert torch.equal(look(pipe), stock)
    assert nothing_left(pipe)
    assert torch.equal(plain, stock) == story.endswith("load unload")


def test_written_weights_and_lora():
    pipe = build("sd")
    base, edit = weights_of(pipe), random_edit(pipe)
    apply_edit(pipe, edit)
    load_lora(pipe)
    with pytest.raises(Unsupported, match=r"a LoRA was loaded on .* remove the edit and apply it with form='map'"):
        look(pipe)
    with pytest.raises(Unsupported, match=r"a LoRA is loaded on .* unload it"):
        remove_edit(pipe, edit)
    pipe.unet.unload_lora()
    look(pipe)
    remove_edit(pipe, edit)
    assert same_weights(pipe, base)
    load_lora(pipe)
    with pytest.raises(Unsupported, match=r"a LoRA is loaded on .* form='map'"):
        apply_edit(pipe, edit)
    pipe.unet.unload_lora()
    assert same_weights(pipe, base)
    assert nothing_left(pipe)


def test_weights_that_something_else_changed_are_not_taken_back():
    pipe = build("sd")
    base, edit = weights_of(pipe), random_edit(pipe)
    apply_edit(pipe, edit)
    edited = weights_of(pipe)
    load_lora(pipe)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    merged = weights_of(pipe)
    for action in (lambda: remove_edit(pipe, edit), lambda: apply_edit(pipe, random_edit(build("sd"), 1))):
        with pytest.raises(Unsupported, match="was changed by something else since"):
            action()
        assert same_weights(pipe, merged)
    pipe.unet.load_state_dict(edited)
    remove_edit(pipe, edit)
    assert same_weights(pipe, base)


def test_weights_that_were_loaded_again_need_no_taking_back():
    pipe = build("sd")
    base, edit = weights_of(pipe), random_edit(pipe)
    apply_edit(pipe, edit)
    pipe.unet.load_state_dict(base)
    remove_edit(pipe, edit)
    assert same_weights(pipe, base)
    assert nothing_left(pipe)


FUSE = {
    "fuse": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "unfuse": lambda pipe: pipe.unet.unfuse_qkv_projections(),
}


@pytest.mark.parametrize("roles", [ALL, VALUES, ("key",)], ids=["all", "values", "keys"])
@pytest.mark.parametrize(
    "story", ["fuse edit", "edit fuse", "fuse edit unfuse", "edit fuse unfuse", "fuse unfuse edit fuse"]
)
@pytest.mark.parametrize("form", ["map", "weights"])
def test_fused_projections_in_any_order(story, roles, form):
    """The concept stays erased, or a sentence says what to do."""
    pipe = build("sd")
    base, stock, edit = weights_of(pipe), look(pipe), random_edit(pipe, roles=roles)
    apply_edit(pipe, edit)
    want = look(pipe)
    remove_edit(pipe, edit)
    for step in story.split():
        if step != "edit":
            FUSE[step](pipe)
        elif form == "weights" and story.startswith("fuse edit"):
            with pytest.raises(Unsupported, match=r"projections are fused.*unfuse them first"):
                apply_edit(pipe, edit)
            return
        else:
            apply_edit(pipe, edit, form=form)
        got = look(pipe)
        if edit in dict(applied_edits(pipe)):
            assert close(got, want)
    if form == "weights" and not story.endswith("unfuse"):
        with pytest.raises(Unsupported, match=r"projections are fused.*unfuse them first"):
            remove_edit(pipe, edit)
        FUSE["unfuse"](pipe)
    remove_edit(pipe, edit)
    assert close(look(pipe), stock)
    assert same_weights(pipe, base)


def test_quantised_weights_take_the_map_only():
    pipe = build("sd")
    edit = random_edit(pipe)

    class Int8Linear(torch.nn.Module):
        """A linear layer of integers, as quantisation libraries put them in place."""

        def __init__(self, layer):
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.scale = layer.weight.detach().abs().max() / 127
            self.register_buffer("weight", (layer.weight.detach() / self.scale).round().to(torch.int8))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)

    for module in edit.modules:
        path = module.name[5:]
        pipe.unet.set_submodule(path, Int8Linear(pipe.unet.get_submodule(path)))
    stock = draw(pipe)
    with pytest.raises(Unsupported, match=r"no weight in fp32, fp16 or bf16 \(quantised.*form='map'"):
        apply_edit(pipe, edit)
    assert torch.equal(draw(pipe), stock)
    apply_edit(pipe, edit, form="map")
    got = draw(pipe)
    remove_edit(pipe, edit)
    assert close(got, call_mapped(pipe, "sd", [edit]))
    assert (got - stock).abs().max() > 1e-3


# --- copies, sharing, offloading, saving, compiling ---


@pytest.mark.parametrize("form", ["weights", "map"])
def test_a_deepcopy_is_undone_by_itself(form):
    pipe = build("sdxl")
    base, stock, edit = weights_of(pipe), draw(pipe, "sdxl"), random_edit(pipe)
    apply_edit(pipe, edit, form=form)
    erased, twin = draw(pipe, "sdxl"), build("sdxl")
    twin.unet = copy.deepcopy(pipe.unet)
    remove_edit(twin, edit)
    assert torch.equal(draw(twin, "sdxl"), stock)
    assert same_weights(twin, base)
    assert nothing_left(twin)
    assert torch.equal(draw(pipe, "sdxl"), erased)
    apply_edit(twin, edit, form="map")
    remove_edit(pipe, edit)
    assert torch.equal(draw(pipe, "sdxl"), stock)
    assert close(draw(twin, "sdxl"), erased)


@pytest.mark.parametrize("form", ["weights", "map"])
def test_two_pipelines_share_a_network(form):
    one, two = build("sd"), build("sd-img2img")
    two.unet = one.unet
    base, edit = weights_of(one), random_edit(one)
    apply_edit(one, edit, form=form)
    with pytest.raises(Unsupported, match="applied already"):
        apply_edit(two, edit, form=form)
    got = draw(two, "sd-img2img")
    remove_edit(two, edit)
    assert (got - draw(two, "sd-img2img")).abs().max() > 1e-3
    with pytest.raises(Unsupported, match="is not applied"):
        remove_edit(one, edit)
    assert same_weights(one, base)
    assert nothing_left(one)


@pytest.mark.parametrize("form", ["weights", "map"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_sequential_offload(form, when):
    """The weights that the hooks keep are the ones that are edited."""
    pipe, twin = build("sd"), build("sd")
    stock, edit = draw(pipe), random_edit(pipe)
    apply_edit(twin, edit, form=form)
    want = draw(twin)
    if when == "before":
        apply_edit(pipe, edit, form=form)
    for model in (pipe.unet, pipe.vae):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if when == "after":
        apply_edit(pipe, edit, form=form)
    assert all(p.is_meta for p in pipe.unet.parameters())
    assert torch.equal(draw(pipe), want)
    remove_edit(pipe, edit)
    assert torch.equal(draw(pipe), stock)
    assert all(p.is_meta for p in pipe.unet.parameters())


@pytest.mark.parametrize("form", ["weights", "map"])
def test_model_offload(form):
    pipe = build("sd")
    stock, edit = draw(pipe), random_edit(pipe)
    hooks = [accelerate.cpu_offload_with_hook(model, execution_device="cpu")[1] for model in (pipe.unet, pipe.vae)]
    apply_edit(pipe, edit, form=form)
    got = draw(pipe)
    for hook in hooks:
        hook.offload()
        hook.remove()
    assert torch.equal(draw(pipe), got)
    remove_edit(pipe, edit)
    assert torch.equal(draw(pipe), stock)


def test_a_map_is_not_saved_with_the_model(tmp_path):
    pipe = build("sd")
    names, edit = list(pipe.unet.state_dict()), random_edit(pipe)
    apply_edit(pipe, edit, form="map")
    assert list(pipe.unet.state_dict()) == names
    pipe.unet.save_pretrained(tmp_path)
    assert same_weights(build("sd"), type(pipe.unet).from_pretrained(tmp_path).state_dict())


def test_compiled_blocks_see_edits_come_and_go():
    pipe = build("sd")
    stock, edit = draw(pipe), random_edit(pipe)
    apply_edit(pipe, edit, form="map")
    want = draw(pipe)
    remove_edit(pipe, edit)
    pipe.unet.compile_repeated_blocks(backend="eager")
    assert torch.equal(draw(pipe), stock)
    for form in ("map", "weights"):
        apply_edit(pipe, edit, form=form)
        assert close(draw(pipe), want)
        remove_edit(pipe, edit)
        assert torch.equal(draw(pipe), stock)
    torch.compiler.reset()


# --- in a recipe ---


@pytest.fixture
def saved(tmp_path):
    """The file of an edit for the tiny pipeline, and the edit."""
    edit = random_edit(build("sd"), roles=VALUES)
    edit.save(tmp_path / "no-circle.safetensors")
    return tmp_path / "no-circle.safetensors", edit


def test_off_changes_nothing(saved):
    pipe = build("sd")
    stock = draw(pipe)
    for off in (Erase(), Erase(file=saved[0], strength=0), Erase(strength=0.5)):
        assert off.is_off
        assert torch.equal(draw(diffaccel.wrap(pipe, off)), stock)
    assert not Erase(file=saved[0]).is_off


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_recipe_erases_during_calls_only(kind, strength, tmp_path):
    pipe = build(kind)
    stock, edit = draw(pipe, kind), random_edit(pipe)
    edit.save(tmp_path / "e.safetensors")
    weaker = [TextMap(m.route, m.left * strength, m.right, m.modules) for m in edit.maps]
    want = call_mapped(pipe, kind, [Edit(**{**vars_of(edit), "maps": tuple(weaker)})])
    fast = diffaccel.wrap(pipe, [Erase(file=tmp_path / "e.safetensors", strength=strength)])
    got = draw(fast, kind)
    assert close(got, want)
    assert (got - stock).abs().max() > 1e-3
    assert fast.report.methods["erase"] == {"projections": len(edit.modules), "concepts": 1}
    assert nothing_left(pipe)
    assert torch.equal(draw(pipe, kind), stock)
    assert torch.equal(draw(fast, kind), got)


def test_a_recipe_with_three_pictures_that_are_not_square(saved):
    pipe = build("sd")
    fast = diffaccel.wrap(pipe, [Erase(file=saved[0])])
    got = draw(fast, images=3, size=(32, 48))
    apply_edit(pipe, saved[1])
    assert close(got, draw(pipe, images=3, size=(32, 48)))


def test_a_call_that_breaks_leaves_nothing(saved):
    pipe = build("sd")
    stock, fast = draw(pipe), diffaccel.wrap(pipe, [Erase(file=saved[0])])
    want = draw(fast)
    with pytest.raises(ZeroDivisionError):
        fast(**tiny_of("sd").tiny_inputs("sd"), callback_on_step_end=lambda *_: 1 / 0)
    assert nothing_left(pipe)
    assert torch.equal(draw(pipe), stock)
    assert torch.equal(draw(fast), want)


@pytest.mark.parametrize("what", ["lora", "fuse"])
def test_a_recipe_follows_lora_and_fused_projections(saved, what):
    pipe = build("sd")
    fast = diffaccel.wrap(pipe, [Erase(file=saved[0])])
    draw(fast)
    (load_lora if what == "lora" else FUSE["fuse"])(pipe)
    got = draw(fast)
    apply_edit(pipe, saved[0], form="map")
    assert torch.equal(draw(pipe), got)
    with pytest.raises(Unsupported, match="applied already"):
        draw(fast)
    remove_edit(pipe, saved[1])
    assert torch.equal(draw(fast), got)


def test_a_recipe_sees_that_the_weights_were_exchanged(saved):
    pipe = build("sd")
    fast = diffaccel.wrap(pipe, [Erase(file=saved[0])])
    draw(fast)
    with torch.no_grad():
        pipe.unet.get_submodule(saved[1].modules[0].name[5:]).weight.mul_(2)
    with pytest.raises(Unsupported, match="was made on other weights"):
        draw(fast)
    with pytest.raises(Unsupported, match="was made on other weights"):
        diffaccel.wrap(pipe, [Erase(file=saved[0])])


def test_a_recipe_file_names_edits_beside_it(saved, tmp_path, monkeypatch):
    pipe, folder = build("sd"), saved[0].parent
    monkeypatch.chdir("/")
    want = draw(diffaccel.wrap(pipe, [Erase(file=saved[0])]))
    Recipe(methods=(Erase(file=saved[0], strength=1.0),)).save(folder / "r.json")
    assert '"no-circle.safetensors"' in (folder / "r.json").read_text()
    loaded = Recipe.load(folder / "r.json")
    assert torch.equal(draw(diffaccel.wrap(pipe, loaded)), want)
    assert torch.equal(draw(diffaccel.wrap(pipe, folder / "r.json")), want)
    loaded.save(folder / "again.json")
    assert (folder / "again.json").read_text() == (folder / "r.json").read_text()
    assert Recipe.load(folder / "again.json") == loaded
    (folder / "inner").mkdir()
    for recipe in (loaded, Recipe(methods=(Erase(file=saved[0]),))):  # it would not find the edit any more
        with pytest.raises(RecipeError, match="save the recipe beside"):
            recipe.save(folder / "inner" / "r.json")
    with pytest.raises(RecipeError, match="only name edits in its own folder or below"):
        Recipe(methods=(Erase(file="/elsewhere/e.safetensors"),)).save(folder / "r.json")


@pytest.mark.parametrize("name", ["/etc/passwd", "../e.safetensors", "a/../../e.safetensors", "link/e.safetensors"])
def test_a_recipe_file_reaches_no_other_files(name, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link").symlink_to(tmp_path)
    data = {"schema": 1, "methods": [{"method": "erase", "file": name}]}
    path = tmp_path / "inner" / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match="only name edits in its own folder or below"):
        Recipe.load(path)


# --- a ControlNet beside it ---


def beside(pipe):
    """A ControlNet pipeline around the same UNet."""
    twin = tiny_of("sd").tiny_pipeline("controlnet")
    twin.unet = pipe.unet
    return twin


def test_a_controlnet_beside_an_edited_network_is_told_once():
    """It reads the prompt by projections of its own."""
    pipe = build("sd")
    twin = beside(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UneditedControl)
        edit = apply_edit(pipe, random_edit(pipe), form="map")
        draw(pipe)
    with pytest.warns(UneditedControl, match="reads the prompt by projections of its own"):
        run(twin, "controlnet", steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UneditedControl)
        run(twin, "controlnet", steps=2)
    remove_edit(pipe, edit)
    with pytest.warns(UneditedControl):
        apply_edit(twin, edit)


def test_a_recipe_that_erases_says_in_its_report_that_a_controlnet_is_not_edited(tmp_path):
    for kind, told in (("sd", False), ("controlnet", True)):
        pipe = tiny_of("sd").tiny_pipeline(kind)
        random_edit(pipe).save(tmp_path / "e.safetensors")
        fast = diffaccel.wrap(pipe, Erase(file=tmp_path / "e.safetensors"))
        run(fast, kind, steps=2)
        assert any("The ControlNet reads the prompt" in note for note in fast.report.notes) == told


# --- a look at what it does ---


def test_a_check_tells_an_edit_that_does_nothing_from_one_that_acts():
    pipe = tiny_text_pipeline("sd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ErasureWarning)
        edit = diffaccel.erase(pipe, "circle", anchor="dog", keep=["heart"], general=False)
    before = weights_of(pipe)
    empty = dataclasses.replace(
        edit, maps=tuple(dataclasses.replace(one, left=torch.zeros_like(one.left)) for one in edit.maps)
    )
    seen, nothing = edit.check(pipe), empty.check(pipe)
    assert seen == edit.effect
    assert seen.changed["circle"] > 0.01
    assert nothing.changed["circle"] == 0
    assert (nothing.weak, str(nothing)) == (
        ("circle",),
        "Checked on 2 predictions of the denoiser: 'circle' does not move, 'heart' (kept) 0% as far.",
    )
    assert same_weights(pipe, before)
    assert applied_edits(pipe) == ()


def test_a_check_that_cannot_run_says_so():
    pipe = tiny_text_pipeline("sd")
    edit = random_edit(pipe)
    assert edit.effect is None  # made by hand, or by an older version
    pipe.scheduler = None
    assert edit.check(pipe).note
    assert str(edit.check(pipe)).startswith("The effect was not checked: ")

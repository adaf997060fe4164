"""What somebody does who uses concept erasure for the first time: odd requests, offloading, LoRA, casts, threads."""

from __future__ import annotations

import pickle
import threading

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from tiny import load_lora, run, tiny_pipeline
from tiny_edits import random_edit, same_weights, weights_of
from tiny_text import clip, clip_tokenizer, t5, t5_tokenizer, tiny_text_pipeline

import diffaccel
from diffaccel.cli.erase import _file_name, _lines
from diffaccel.edits.apply import applied_edits
from diffaccel.engine import seams
from diffaccel.erasure import EditError, ErasureError
from diffaccel.erasure.proof.learned_words import LearnedWord, inserted
from diffaccel.errors import DiffaccelError, Unsupported
from diffaccel.methods.guidance.guidance_interval import GuidanceInterval

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text_pipe():
    return tiny_text_pipeline("sd")


def draw(pipe):
    return run(pipe, "sd", steps=2)


# --- requests ---


@pytest.mark.parametrize(
    ("concepts", "options", "sentence"),
    [
        (None, {}, "concepts is a list of texts, not NoneType."),
        (["circle"], {"keep": None}, "keep is a list of texts, not NoneType."),
        (["circle"], {"prompts": 3}, "prompts is a list of texts, not int."),
        (["circle"], {"prompts": [3]}, "a prompt is a text, not int."),
        (["circle"], {"anchor": 3}, "an anchor is a text, not int."),
        (["circle"], {"anchor": "a\x07b"}, r"'a\x07b' has control characters."),
        (["cir\x1b[31mcle"], {}, r"target: 'cir\x1b[31mcle' has control characters."),
        (["a\ud800"], {}, r"target: 'a\ud800' has control characters."),
        ([""], {}, "target: a target needs at least one word, and '' has none."),
        (["cafe\u0301"], {"keep": ["a caf\u00e9"]}, "'a café' cannot be kept while 'cafe\u0301' is erased"),
        (["cafe\u0301", "caf\u00e9"], {}, "is to be erased twice"),
        (["word " * 200], {}, "...' makes 802 tokens, and tokenizer cuts off after 32."),
    ],
)
def test_odd_requests_are_answered_by_one_short_sentence(text_pipe, concepts, options, sentence):
    with pytest.raises(ErasureError) as caught:
        diffaccel.erase(text_pipe, concepts, method="uce", **options)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_list_of_concepts_with_no_list_of_keeps(text_pipe):
    wanted = diffaccel.erasure.ConceptList(concepts=("circle",))
    with pytest.raises(ErasureError, match="keep is a list of texts, not NoneType"):
        diffaccel.erase(text_pipe, wanted, keep=None)


def test_an_edit_made_on_a_wrapped_pipeline_is_the_same_edit(text_pipe):
    fast = diffaccel.wrap(text_pipe, GuidanceInterval(low=0.3, high=5.0))
    options = {"method": "uce", "general": False, "keep": ["dog"], "check": False}
    first, second = (diffaccel.erase(pipe, "circle", **options) for pipe in (text_pipe, fast))
    assert first == second
    assert second.pipeline == "StableDiffusionPipeline"


@pytest.mark.parametrize("thing", [None, 3, b"no-circle.safetensors"])
def test_what_is_neither_an_edit_nor_a_file_is_refused(thing):
    pipe = tiny_pipeline("sd")
    for act in (diffaccel.apply_edit, diffaccel.remove_edit):
        with pytest.raises(EditError, match="an edit is what erase returned, or the file of one, not"):
            act(pipe, thing)


def test_the_file_is_gone_when_the_edit_is_taken_back(tmp_path):
    pipe, path = tiny_pipeline("sd"), tmp_path / "e.safetensors"
    base = weights_of(pipe)
    random_edit(pipe).save(path)
    diffaccel.apply_edit(pipe, path)
    path.unlink()
    with pytest.raises(
        EditError, match=r"No such file.*; diffaccel.erasure.applied_edits lists the edits to take back\.$"
    ):
        diffaccel.remove_edit(pipe, path)
    for edit, _ in applied_edits(pipe):
        diffaccel.remove_edit(pipe, edit)
    assert same_weights(pipe, base)
    with pytest.raises(EditError, match=r"No such file or directory\.$"):
        diffaccel.remove_edit(pipe, path)


# --- weights that are elsewhere ---


def to_disk(pipe, folder):
    for name in ("unet", "vae"):
        accelerate.disk_offload(getattr(pipe, name), str(folder / name), execution_device=torch.device("cpu"))


def test_weights_on_disk_are_not_written_in_vain(tmp_path):
    """accelerate reads them from there at each call, so what is written into them is lost."""
    pipe, twin = tiny_pipeline("sd"), tiny_pipeline("sd")
    edit, stock = random_edit(pipe), draw(pipe)
    diffaccel.apply_edit(twin, edit, form="map")
    to_disk(pipe, tmp_path)
    with pytest.raises(Unsupported, match=r"is offloaded to disk; load it into memory, or apply .* form='map'\.$"):
        diffaccel.apply_edit(pipe, edit)
    assert torch.equal(draw(pipe), stock)
    diffaccel.apply_edit(pipe, edit, form="map")
    assert torch.equal(draw(pipe), draw(twin))
    diffaccel.remove_edit(pipe, edit)
    assert torch.equal(draw(pipe), stock)


def test_written_weights_that_went_to_disk_are_not_taken_back_in_vain(tmp_path):
    pipe = tiny_pipeline("sd")
    edit = diffaccel.apply_edit(pipe, random_edit(pipe))
    erased = draw(pipe)
    to_disk(pipe, tmp_path)
    with pytest.raises(
        Unsupported, match=r"cannot take the edit back: .* is offloaded to disk; load it into memory\.$"
    ):
        diffaccel.remove_edit(pipe, edit)
    assert torch.equal(draw(pipe), erased)
    assert dict(applied_edits(pipe)) == {edit: "weights"}


@pytest.mark.parametrize(
    "how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading_to_disk_leaves_no_weights_to_read(how, tmp_path):
    """What is in memory then is whatever was there: an edit must not be computed from it, nor compared with it."""
    pipe, cpu = tiny_text_pipeline("sd"), torch.device("cpu")
    edit = random_edit(pipe)
    options = {"onload_device": cpu, "offload_device": cpu, "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(pipe.unet, **how, **options)
    with pytest.raises(Unsupported, match="offloaded to disk"):
        diffaccel.erase(pipe, "circle", method="uce", general=False)
    with pytest.raises(Unsupported, match=r"cannot write the weights: .* offloaded to disk"):
        diffaccel.apply_edit(pipe, edit)
    diffaccel.apply_edit(pipe, edit, form="map")
    diffaccel.remove_edit(pipe, edit)


class Packed(torch.Tensor):
    """A quantised weight as torchao makes them: it says that it is bf16."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.bfloat16)

    def __init__(self, weight):
        self.packed = weight.to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a packed weight")


def test_a_quantised_weight_of_a_class_of_its_own():
    pipe = tiny_pipeline("sd").to(torch.bfloat16)
    edit = random_edit(pipe)
    for module in edit.modules:
        layer = pipe.unet.get_submodule(module.name[5:])
        del layer.weight
        layer.weight = Packed(torch.zeros(layer.out_features, layer.in_features))
    with pytest.raises(Unsupported, match=r"no weight in fp32, fp16 or bf16 \(quantised"):
        diffaccel.apply_edit(pipe, edit)
    diffaccel.apply_edit(pipe, edit, form="map")
    diffaccel.remove_edit(pipe, edit)


FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("way", [(FP16, BF16, FP32), (BF16, FP16, FP32), (BF16, FP16, BF16), (FP16, BF16, FP16, FP32)])
def test_casts_by_detours(way):
    pipe, twin = tiny_pipeline("sd"), tiny_pipeline("sd")
    with torch.no_grad():
        for net in (pipe, twin):  # numbers that fp16 cannot hold
            net.unet.get_submodule(random_edit(net).modules[0].name[5:]).weight[0] *= 1e-6
    edit = diffaccel.apply_edit(pipe, random_edit(twin))
    for dtype in way:
        pipe, twin = pipe.to(dtype), twin.to(dtype)
        draw_nothing(pipe)
    diffaccel.remove_edit(pipe, edit)
    assert same_weights(pipe, weights_of(twin))


@torch.no_grad()
def draw_nothing(pipe, text=None):
    """One call of the UNet alone."""
    dtype = pipe.unet.dtype
    text = torch.ones(1, 5, 16, dtype=dtype) if text is None else text
    return pipe.unet(torch.ones(1, 4, 8, 8, dtype=dtype), 10, encoder_hidden_states=text).sample


# --- weights that others write ---


@pytest.mark.parametrize("called_before", [False, True])
def test_a_lora_merged_and_unloaded_between_two_calls_is_noticed(called_before):
    """Its share of the weights reads the prompt as it was; the usual way to merge one leaves no other trace."""
    pipe = tiny_pipeline("sd")
    edit = diffaccel.apply_edit(pipe, random_edit(pipe))
    if called_before:
        draw(pipe)
    load_lora(pipe)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    for _ in range(2):
        with pytest.raises(Unsupported, match=r"was changed by something else since .*\(a LoRA that was merged"):
            draw(pipe)
    with pytest.raises(Unsupported, match="was changed by something else"):
        diffaccel.remove_edit(pipe, edit)


@pytest.mark.parametrize("how", ["merge", "load"])
def test_a_text_that_is_used_again_hides_nothing(how):
    """Pipelines of FLUX hand embeddings that were computed once to the network as they are, call after call."""
    pipe, text = tiny_pipeline("sd"), torch.ones(1, 5, 16)
    base = weights_of(pipe)
    diffaccel.apply_edit(pipe, random_edit(pipe))
    draw_nothing(pipe, text)
    if how == "merge":
        load_lora(pipe)
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    else:
        pipe.unet.load_state_dict(base)
    with pytest.raises(Unsupported, match=r"was changed by something else|the edit is gone"):
        draw_nothing(pipe, text)


def test_weights_that_were_loaded_again_do_not_pass_for_erased():
    pipe = tiny_pipeline("sd")
    base, stock = weights_of(pipe), draw(pipe)
    edit = diffaccel.apply_edit(pipe, random_edit(pipe))
    erased = draw(pipe)
    pipe.unet.load_state_dict(base)
    with pytest.raises(Unsupported, match=r"was loaded again .* the edit is gone: remove it, and apply it again\.$"):
        draw(pipe)
    diffaccel.remove_edit(pipe, edit)
    assert torch.equal(draw(pipe), stock)
    diffaccel.apply_edit(pipe, edit)
    assert torch.equal(draw(pipe), erased)


def test_written_weights_are_looked_at_once_for_each_text(monkeypatch):
    pipe, looks = tiny_pipeline("sd"), []
    diffaccel.apply_edit(pipe, random_edit(pipe))
    home = type(pipe.unet._diffaccel_edits)
    original = home._look
    monkeypatch.setattr(home, "_look", lambda *args: looks.append(1) or original(*args))
    text, other = torch.ones(1, 5, 16), torch.zeros(1, 5, 16)
    for one, count in ((text, 1), (text, 1), (other, 2), (text, 3)):
        draw_nothing(pipe, one)
        assert len(looks) == count


def test_a_pickled_network_is_undone_by_itself():
    pipe, twin = tiny_pipeline("sd"), tiny_pipeline("sd")
    base = weights_of(pipe)
    edit = diffaccel.apply_edit(pipe, random_edit(pipe))
    erased = draw(pipe)
    twin.unet = pickle.loads(pickle.dumps(pipe.unet))
    assert torch.equal(draw(twin), erased)
    diffaccel.remove_edit(twin, edit)
    assert same_weights(twin, base)
    assert torch.equal(draw(pipe), erased)


# --- two at once ---


def test_two_threads_apply_one_after_the_other(monkeypatch):
    pipe = tiny_pipeline("sd")
    base, edits, original = weights_of(pipe), [random_edit(pipe, seed) for seed in (1, 2)], seams.overwrite
    other = threading.Thread(target=diffaccel.apply_edit, args=(pipe, edits[1]))

    def slow(weight, value):
        original(weight, value)
        if other.ident is None:  # the first of the writes: let the other one in, if it may
            other.start()
            other.join(0.3)

    monkeypatch.setattr(seams, "overwrite", slow)
    diffaccel.apply_edit(pipe, edits[0])
    other.join()
    monkeypatch.undo()
    assert dict(applied_edits(pipe)) == dict.fromkeys(edits, "weights")
    for edit in edits:
        diffaccel.remove_edit(pipe, edit)
    assert same_weights(pipe, base)


# --- proofs ---


def prove(pipe, edit, **options):
    return edit.prove(pipe, **{"prompts": 1, "attacks": (), "steps": 2, **options})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": 2}, "sets prompt itself; its phrases are in templates"),
        ({"guidance_scale": 2.0}, "sets guidance_scale itself; give guidance"),
        ({"num_inference_steps": 4}, "sets num_inference_steps itself; give steps"),
        (
            {"kept_phrases": ["dog"]},
            "There is no option 'kept_phrases', of a proof or of a call of StableDiffusionPipeline",
        ),
        ({"attacks": "closed"}, "There is no attack 'closed'; choose"),
        ({"form": "weight"}, "'weights' or 'map', not 'weight'"),
    ],
)
def test_misspelt_options_of_a_proof_are_refused_before_drawing(text_pipe, monkeypatch, options, sentence):
    edit = random_edit(text_pipe)
    monkeypatch.setattr(type(text_pipe.unet), "forward", lambda *args, **kwargs: pytest.fail("it drew"))
    with pytest.raises(ValueError, match=sentence):
        prove(text_pipe, edit, **options)


def test_an_edit_of_another_model_is_refused_before_drawing(text_pipe, monkeypatch):
    edit, alien = random_edit(text_pipe), random_edit(tiny_pipeline("sdxl"))
    monkeypatch.setattr(type(text_pipe.unet), "forward", lambda *args, **kwargs: pytest.fail("it drew"))
    with pytest.raises(Unsupported, match=r"does not fit this StableDiffusionPipeline"):
        prove(text_pipe, alien)
    with pytest.raises(Unsupported, match="NoneType is not supported"):
        prove(None, edit)
    with pytest.raises(DiffaccelError, match=r"prove on the pipeline inside, fast\.pipe"):
        prove(diffaccel.wrap(text_pipe, GuidanceInterval(low=0.3, high=5.0)), edit)


# --- what the caller's program is doing ---

PLAIN = {"method": "rece", "general": False, "keep": ["dog"], "check": False}


@pytest.mark.parametrize(
    "inside",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
    ],
    ids=["default device", "autocast", "inference mode"],
)
def test_the_edit_is_the_same_inside_of_any_context(text_pipe, inside, tmp_path):
    wanted = diffaccel.erase(text_pipe, "circle", **PLAIN)
    with inside():
        edit = diffaccel.erase(text_pipe, "circle", **PLAIN)
        edit.save(tmp_path / "e.safetensors")
        again = diffaccel.load_edit(tmp_path / "e.safetensors")
    assert edit == again == wanted
    for one in (edit, again):
        diffaccel.apply_edit(text_pipe, one, form="map")
        text = torch.ones(1, 5, 16, requires_grad=True)
        text_pipe.unet(torch.ones(1, 4, 8, 8), 10, encoder_hidden_states=text).sample.sum().backward()
        assert text.grad.abs().max() > 0
        diffaccel.remove_edit(text_pipe, one)


def test_written_weights_act_inside_of_an_open_autocast():
    pipe, found = tiny_pipeline("sd"), []
    edit = random_edit(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for act in (None, diffaccel.apply_edit, diffaccel.remove_edit):
            if act:
                act(pipe, edit)
            found.append(draw_nothing(pipe))
    assert (found[1] - found[0]).abs().max() > 1e-2
    assert torch.equal(found[2], found[0])


def test_dropout_stays_out_of_an_edit():
    pipe = tiny_text_pipeline("pixart")
    wanted = diffaccel.erase(pipe, "circle", **PLAIN)
    pipe.text_encoder.train()
    with pytest.raises(Unsupported, match=r"in training mode, .* call pipe\.text_encoder\.eval\(\) first\.$"):
        diffaccel.erase(pipe, "circle", **PLAIN)
    pipe.text_encoder.eval()
    assert diffaccel.erase(pipe, "circle", **PLAIN) == wanted


def test_a_missing_tokenizer_is_named():
    pipe = tiny_text_pipeline("sd")
    pipe.tokenizer = None
    with pytest.raises(Unsupported, match="this StableDiffusionPipeline has text_encoder, but no tokenizer for it"):
        diffaccel.erase(pipe, "circle", **PLAIN)


def test_a_concept_file_says_everything_once(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"concepts": ["dog"], "concepts": ["circle"]}')
    with pytest.raises(ErasureError, match="is not a concept file"):
        diffaccel.erasure.read_concepts(path)


# --- command line ---


def test_files_of_concepts_in_other_scripts_have_names_of_their_own():
    names = [_file_name([text]) for text in ("圆", "方", "Circle", "круг")]
    assert len(set(names)) == 4
    assert names[2] == "no-circle.safetensors"
    assert all(name.isascii() and "image" not in name for name in names)


def test_a_prompt_list_from_a_windows_editor(tmp_path):
    (tmp_path / "p.txt").write_bytes("a red circle\r\n\r\na blue star\r\n".encode("utf-8-sig"))
    assert _lines(tmp_path / "p.txt") == ["a red circle", "a blue star"]


@pytest.mark.parametrize("make", [lambda: t5(16, 3), lambda: clip(16, 1)], ids=["t5", "clip"])
def test_learned_vectors_reach_what_the_text_encoder_reads(make):
    """Text encoders may look their tokens up in another module than the one they name."""
    encoder, tokenizer = make().double(), t5_tokenizer() if "T5" in type(make()).__name__ else clip_tokenizer()
    word = LearnedWord(tokenizer, encoder, "circle", 100)
    ids = tokenizer("a red circle", return_tensors="pt").input_ids
    stock = encoder(ids)[0]
    maker = torch.Generator().manual_seed(0)  # behind a layer norm a plain sum depends on nothing
    seen = torch.randn(stock.shape, generator=maker, dtype=torch.float64)
    way = torch.randn(word.vectors.shape, generator=maker, dtype=torch.float64).to(word.vectors)
    with inserted([word]):
        assert torch.allclose(encoder(ids)[0], stock, atol=1e-5)  # to begin with, the word's own vectors
        assert word.found
        with torch.no_grad():
            word.vectors.mul_(-1)
        changed = encoder(ids)[0]
        (changed * seen).sum().backward()
        slope = float((word.vectors.grad * way).sum())
        with torch.no_grad():
            word.vectors.add_(1e-3 * way)
            further = float((encoder(ids)[0] * seen).sum())
            word.vectors.sub_(2e-3 * way)
            nearer = float((encoder(ids)[0] * seen).sum())
    assert abs(slope) > 1e-2
    assert (further - nearer) / 2e-3 == pytest.approx(slope, rel=1e-2)  # the vectors are single precision
    assert (changed - stock).abs().max() > 1e-2
    assert torch.equal(encoder(ids)[0], stock)

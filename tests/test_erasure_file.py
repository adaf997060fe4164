"""The file of an edit: exact round trips, and files made to do harm, each refused with a sentence before anything happens."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
import zipfile
from dataclasses import fields

import pytest
import torch
from tiny import run, tiny_pipeline
from tiny_edits import random_edit, same_weights, weights_of

from diffaccel.edits.apply import apply_edit, remove_edit
from diffaccel.edits.concepts import Concept
from diffaccel.edits.edit import Edit, load_edit
from diffaccel.edits.parts import EditedModule, EditError, TextMap
from diffaccel.errors import DiffaccelError, Unsupported

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd")


@pytest.fixture(scope="module")
def edit(pipe):
    return random_edit(pipe)


# --- good files ---


def with_other(edit, **changes):
    return Edit(**{**{field.name: getattr(edit, field.name) for field in fields(edit)}, **changes})


def test_a_file_brings_the_edit_back(edit, tmp_path):
    odd = Concept(target="Muybridge, Eadweard", synonyms=(("früh\u00e4 \U0001f3a8", 0.1),))
    edit = with_other(
        edit, concepts=(*edit.concepts, odd), parameters={"pi": math.pi, "tiny": 5e-324, "deep": [[None, True]]}
    )
    path = tmp_path / "e.safetensors"
    edit.save(path)
    first = path.read_bytes()
    found = load_edit(path)
    assert found == edit
    assert found.digest == edit.digest
    assert found.to_dict() == edit.to_dict()
    for got, want in zip(found.maps, edit.maps, strict=True):
        assert torch.equal(got.left, want.left)
        assert torch.equal(got.right, want.right)
        assert got.modules == want.modules
    found.save(path)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_digest_names_everything_but_diagnostics(edit):
    left = edit.maps[0].left.clone()
    left[0, 0] = torch.nextafter(left[0, 0], torch.tensor(math.inf))
    others = [
        with_other(edit, method="rece"),
        with_other(edit, concepts=(Concept(target="disc"),)),
        with_other(edit, keep=()),
        with_other(edit, parameters={"scale": 0.5000001}),
        with_other(edit, maps=(TextMap("sequence", left, edit.maps[0].right, edit.maps[0].modules),)),
        with_other(edit, maps=(TextMap("sequence", edit.maps[0].left, edit.maps[0].right, edit.maps[0].modules[1:]),)),
    ]
    assert len({edit.digest, *(other.digest for other in others)}) == 7
    assert with_other(edit, diagnostics={"seconds": 9.0}) == edit


def test_the_file_is_small(pipe, edit, tmp_path):
    """At most rank x (d_in + sum of d_out) numbers, and metadata of a few hundred bytes per module."""
    edit.save(tmp_path / "e.safetensors")
    numbers = sum(m.left.numel() + m.right.numel() for m in edit.maps)
    assert numbers <= 2 * (16 + sum(module.shape[0] for module in edit.modules))
    assert (tmp_path / "e.safetensors").stat().st_size < 4 * numbers + 400 * len(edit.modules) + 1500


def test_a_file_that_cannot_be_written_is_reported(edit, tmp_path):
    with pytest.raises(EditError, match=r"cannot write an edit to .*: No such file"):
        edit.save(tmp_path / "nowhere" / "e.safetensors")
    (tmp_path / "e.safetensors").mkdir()
    with pytest.raises(EditError, match="cannot write an edit"):
        edit.save(tmp_path / "e.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["e.safetensors"]  # no half-written file stays


# --- hostile files ---


class Parts:
    """A file taken apart: the JSON of the edit, the header's entries, and the bytes of the tensors."""

    def __init__(self, path):
        blob = path.read_bytes()
        length = struct.unpack("<Q", blob[:8])[0]
        self.entries, self.data = json.loads(blob[8 : 8 + length]), blob[8 + length :]
        self.metadata = self.entries.pop("__metadata__")
        self.facts = json.loads(self.metadata["diffaccel.edit"])

    def write(self, path, header=None):
        metadata = {**self.metadata, "diffaccel.edit": json.dumps(self.facts)}
        text = json.dumps({"__metadata__": metadata, **self.entries}).encode() if header is None else header
        path.write_bytes(struct.pack("<Q", len(text)) + text + self.data)


def harm_facts(change):
    """Change the JSON of the edit."""

    def harm(path):
        parts = Parts(path)
        change(parts.facts)
        parts.write(path)

    return harm


def harm_module(**changes):
    return harm_facts(lambda facts: facts["maps"][0]["modules"][3].update(changes))


def harm_entry(**changes):
    """Change what the header says of one matrix."""

    def harm(path):
        parts = Parts(path)
        parts.entries["map.0.left"].update(changes)
        parts.write(path)

    return harm


def harm_parts(change):
    def harm(path):
        parts = Parts(path)
        change(parts)
        parts.write(path)

    return harm


def harm_header(make):
    """Replace the header by the bytes that `make(parts)` gives."""

    def harm(path):
        parts = Parts(path)
        parts.write(path, make(parts))

    return harm


def harm_json(text):
    """Replace the JSON of the edit by a text."""

    def make(parts):
        return json.dumps({"__metadata__": {"diffaccel.edit": text}, **parts.entries}).encode()

    return harm_header(make)


def harm_number(bits, name="map.0.right"):
    """Overwrite one float of a matrix."""

    def change(parts):
        begin = parts.entries[name]["data_offsets"][0]
        parts.data = parts.data[: begin + 8] + struct.pack("<I", bits) + parts.data[begin + 12 :]

    return harm_parts(change)


def harm_edit(change):
    """A sound edit with a right digest that no pipeline should take."""

    def harm(path):
        change(load_edit(path)).save(path)

    return harm


def with_module(edit, number, module):
    text_map = edit.maps[0]
    modules = (*text_map.modules[:number], module, *text_map.modules[number + 1 :])
    return with_other(edit, maps=(TextMap(text_map.route, text_map.left, text_map.right, modules),))


def renamed(name):
    def change(edit):
        old = edit.modules[0]
        return with_module(edit, 0, EditedModule(name, old.columns, old.shape, old.digests))

    return harm_edit(change)


class Evil:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def pickled(path):
    path.write_bytes(pickle.dumps(Evil(path.parent / "trace")))


def torch_saved(path):
    torch.save({"map.0.left": Evil(path.parent / "trace")}, path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Evil(path.parent / "trace")))


def sparse(path):
    with path.open("r+b") as file:
        file.truncate(2**29 + 1)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def link_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def more_tensors(parts):
    end = len(parts.data)
    parts.entries["map.1.left"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    parts.data += bytes(4)


def swapped(parts):
    left, right = parts.entries["map.0.left"], parts.entries["map.0.right"]
    left["shape"], right["shape"] = right["shape"], left["shape"]


def overlapping(parts):
    parts.entries["map.0.right"]["data_offsets"] = parts.entries["map.0.left"]["data_offsets"]


def as_half(parts):
    parts.data = bytes(len(parts.data))
    for entry in parts.entries.values():
        entry["dtype"], entry["shape"] = "F16", [entry["shape"][0], 2 * entry["shape"][1]]


def other_digests(edit):
    old = edit.modules[5]
    return with_module(edit, 5, EditedModule(old.name, old.columns, old.shape, edit.modules[6].digests))


def other_shape(edit):
    old = edit.modules[5]
    return with_module(edit, 5, EditedModule(old.name, old.columns, (old.shape[0] + 1, old.shape[1]), old.digests))


def other_columns(edit):
    old = edit.modules[5]
    return with_module(edit, 5, EditedModule(old.name, (4, 20), (old.shape[0], 20), old.digests))


def other_route(edit):
    text_map = edit.maps[0]
    return with_other(edit, maps=(TextMap("pooled", text_map.left, text_map.right, text_map.modules),))


HUGE = 2**40
HOSTILE = {
    # what is no file of tensors
    "missing": (lambda path: path.unlink(), "No such file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory|not a regular file"),
    "named pipe": (fifo, "not a regular file"),
    "link to itself": (link_loop, "symbolic links"),
    "endless device": (device, "not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), "cut off"),
    "seven bytes": (lambda path: path.write_bytes(b"\x08" * 7), "cut off"),
    "noise": (lambda path: path.write_bytes(random.Random(0).randbytes(5000)), "not a safetensors file"),
    "pickle": (pickled, "not a safetensors file"),
    "torch.save": (torch_saved, "not a safetensors file"),
    "zipped pickle": (zipped, "not a safetensors file"),
    "script": (lambda path: path.write_text("import os; os.mkdir('trace')\n" * 9), "not a safetensors file"),
    # damaged
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:300]), "header cannot have the length"),
    "cut in the tensors": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "place it states"),
    "bytes behind": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "belong to no tensor"),
    "too large": (sparse, "bytes, and 536870912 are the most"),
    "bit of a matrix": (harm_number(0x3E800000), "do not have the digest"),
    # the header
    "header of 2^64 - 1 bytes": (
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        "header cannot have",
    ),
    "header beyond the file": (
        lambda path: path.write_bytes(struct.pack("<Q", 10**6) + path.read_bytes()[8:]),
        "header cannot have",
    ),
    "oversized header": (harm_header(lambda parts: b"{" + b" " * 2**23 + b"}"), "header cannot have"),
    "empty header": (harm_header(lambda parts: b""), "header cannot have"),
    "header that is no JSON": (harm_header(lambda parts: b"{'map.0.left': 1}"), "not valid JSON"),
    "header that is no UTF-8": (harm_header(lambda parts: b'{"\xff\xfe": 1}'), "not valid JSON"),
    "header that is a list": (harm_header(lambda parts: b"[1, 2]"), "not an object"),
    "deep header": (harm_header(lambda parts: b"[" * 10**5), "not valid JSON"),
    "a tensor twice": (
        harm_header(lambda parts: json.dumps(parts.entries).replace("map.0.right", "map.0.left").encode()),
        "not valid JSON",
    ),
    "huge integers": (harm_header(lambda parts: b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "metadata of numbers": (harm_parts(lambda parts: parts.metadata.update(x=1)), "metadata are not texts"),
    "no metadata": (harm_header(lambda parts: json.dumps(parts.entries).encode()), "does not hold an edit"),
    "more metadata": (harm_parts(lambda parts: parts.metadata.update(x="1")), "does not hold an edit"),
    # the tensors
    "entry that is a text": (
        harm_parts(lambda parts: parts.entries.update({"map.0.left": "x"})),
        "not one of a tensor",
    ),
    "entry with more": (harm_entry(pickle="gASVIAAAAAAAAAC"), "not one of a tensor"),
    "offsets beyond": (harm_entry(data_offsets=[0, HUGE]), "place it states"),
    "negative offsets": (harm_entry(data_offsets=[-128, 0]), "not one of a tensor"),
    "offsets of another size": (harm_entry(data_offsets=[0, 4]), "place it states"),
    "offsets that overlap": (harm_parts(overlapping), "place it states"),
    "shape that overflows": (harm_entry(shape=[HUGE, HUGE]), "place it states"),
    "negative shape": (harm_entry(shape=[-16, -2]), "not one of a tensor"),
    "fractional shape": (harm_entry(shape=[16.0, 2]), "not one of a tensor"),
    "shape of a hundred dimensions": (harm_entry(shape=[1] * 98 + [16, 2]), "not one of a tensor"),
    "integers": (harm_entry(dtype="I32"), "not made of finite floating-point numbers"),
    "unknown dtype": (harm_entry(dtype="OBJECT"), "not made of finite floating-point numbers"),
    "dtype that is a list": (harm_entry(dtype=["F32"]), "not made of finite floating-point numbers"),
    "half precision": (harm_parts(as_half), "two float32 matrices"),
    "NaN": (harm_number(0x7FC00000), "not made of finite floating-point numbers"),
    "infinity": (harm_number(0xFF800000, "map.0.left"), "not made of finite floating-point numbers"),
    "extra tensor": (harm_parts(more_tensors), "exactly the matrices of its maps"),
    "missing tensor": (harm_facts(lambda facts: facts["maps"].append(facts["maps"][0])), "exactly the matrices"),
    "tensor with a path for a name": (
        harm_parts(lambda parts: parts.entries.update({"../../x": parts.entries.pop("map.0.left")})),
        "exactly the matrices",
    ),
    "swapped shapes": (harm_parts(swapped), "another number of columns"),
    # the JSON of the edit
    "text that is no JSON": (harm_json("{"), "does not hold an edit"),
    "deep text": (harm_json("[" * 10**5), "does not hold an edit"),
    "a name twice": (
        harm_json('{"format": "diffaccel edit 1", "format": "diffaccel edit 1"}'),
        "does not hold an edit",
    ),
    "a list": (harm_json("[]"), "does not hold an edit"),
    "NaN in the text": (harm_json('{"format": "diffaccel edit 1", "x": NaN}'), "does not hold an edit"),
    "another version": (harm_facts(lambda facts: facts.update(format="diffaccel edit 9")), "this version can read"),
    "unknown part": (harm_facts(lambda facts: facts.update(post_init="os.system")), "'post_init' is unknown"),
    "missing part": (harm_facts(lambda facts: facts.pop("keep")), "'keep' is missing"),
    "concepts of another form": (
        harm_facts(lambda facts: facts.update(concepts=[{"target": 3}])),
        "form that a concept",
    ),
    "concept with more": (harm_facts(lambda facts: facts["concepts"][0].update(code="x")), "form that a concept"),
    "no concepts": (harm_facts(lambda facts: facts.update(concepts=[])), "at least one concept"),
    "no maps": (
        harm_parts(lambda parts: (parts.facts.update(maps=[]), parts.entries.clear(), setattr(parts, "data", b""))),
        "at least one concept and one map",
    ),
    "overflowing number": (
        harm_header(
            lambda parts: json.dumps(
                {
                    "__metadata__": {"diffaccel.edit": json.dumps(parts.facts).replace("0.25", "1e999")},
                    **parts.entries,
                }
            ).encode()
        ),
        "not a finite number",
    ),
    "number for a text": (harm_facts(lambda facts: facts.update(keep=[1])), "'keep' is not text"),
    "escape sequences": (
        harm_facts(lambda facts: facts.update(leaks=["\x1b[2J\x1b]0;owned\x07"])),
        "control characters",
    ),
    "half a character": (harm_facts(lambda facts: facts.update(keep=["\ud800"])), "control characters"),
    "endless text": (harm_facts(lambda facts: facts.update(keep=["a" * 10**5])), "a text of 100000 characters"),
    "deep parameters": (
        harm_facts(lambda facts: facts.update(parameters={"a": json.loads("[" * 99 + "]" * 99)})),
        "nested too deeply",
    ),
    "method that is a path": (harm_facts(lambda facts: facts.update(method="../uce")), "not the name of a method"),
    "digest of another edit": (harm_facts(lambda facts: facts.update(digest="0" * 64)), "do not have the digest"),
    "another concept under the digest": (
        harm_facts(lambda facts: facts["concepts"][0].update(target="square")),
        "do not have the digest",
    ),
    # modules
    "module with a private name": (harm_module(name="unet.__class__.to_v"), "not a path to a part of a pipeline"),
    "module with a path": (harm_module(name="../../unet.to_v"), "not a path to a part of a pipeline"),
    "module with a slash": (harm_module(name="unet/conv_in"), "not a path to a part of a pipeline"),
    "module with an empty part": (harm_module(name="unet..to_v"), "not a path to a part of a pipeline"),
    "module with a newline": (harm_module(name="unet.to_v\n"), "not a path to a part|control characters"),
    "module with a long name": (harm_module(name="unet." + "a" * 10**4), "not a path to a part|a text of"),
    "module twice": (
        harm_facts(lambda facts: facts["maps"][0]["modules"].append(facts["maps"][0]["modules"][0])),
        "more than once",
    ),
    "no modules": (harm_facts(lambda facts: facts["maps"][0].update(modules=[])), "no modules to act on"),
    "a million modules": (
        harm_facts(lambda facts: facts["maps"][0].update(modules=[0] * 10**6)),
        "1000000 modules are more",
    ),
    "unknown route": (harm_facts(lambda facts: facts["maps"][0].update(route="image")), "no route 'image'"),
    "columns outside": (harm_module(columns=[8, 24]), "are not in a weight of shape"),
    "columns backwards": (harm_module(columns=[16, 0]), "are not in a weight of shape"),
    "columns of another number": (harm_module(columns=[0, 8]), "another number of columns"),
    "columns of truth": (harm_module(columns=[False, 16]), "two whole numbers"),
    "short digest": (harm_module(digests={"float32": "0"}), "one SHA-256 for each"),
    # sound edits that do not belong here
    "part that reads no text": (renamed("unet.conv_in"), "does not read the sequence text"),
    "another network": (renamed("text_encoder.text_model.embeddings"), "does not read the sequence text|does not fit"),
    "part of the pipeline": (renamed("scheduler.config"), "does not read the sequence text|does not fit"),
    "self-attention": (
        renamed("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v"),
        "does not read the sequence text",
    ),
    "another route": (harm_edit(other_route), "does not read the pooled text"),
    "another base": (harm_edit(other_digests), "made on other weights"),
    "another shape": (harm_edit(other_shape), "made on other weights|does not fit"),
    "other columns": (harm_edit(other_columns), "does not read the sequence text in columns"),
    "infinite weights": (
        harm_edit(
            lambda edit: with_other(
                edit, maps=(TextMap("sequence", 1e38 * edit.maps[0].left, 1e38 * edit.maps[0].right, edit.modules),)
            )
        ),
        "would make weights infinite",
    ),
}
assert len(HOSTILE) >= 30


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_leave_the_model_alone(kind, pipe, edit, tmp_path):
    path = tmp_path / "e.safetensors"
    edit.save(path)
    before, names = weights_of(pipe), list(pipe.unet.state_dict())
    harm, sentence = HOSTILE[kind]
    harm(path)
    for form in ("weights", "map"):
        with pytest.raises(DiffaccelError, match=sentence) as refusal:
            apply_edit(pipe, path, form=form)
        text = str(refusal.value)
        assert isinstance(refusal.value, EditError | Unsupported)
        assert text.endswith(".")
        assert text.isprintable()
        assert len(text) < 500
        assert same_weights(pipe, before)
        assert list(pipe.unet.state_dict()) == names
        assert "_diffaccel_edits" not in vars(pipe.unet)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.unet.modules())
    assert not (tmp_path / "trace").exists()
    with pytest.raises(DiffaccelError, match=r"is not applied|cannot read|does not hold|do not have the digest"):
        remove_edit(pipe, path)


def test_a_flipped_bit_is_noticed_wherever_it_is(pipe, edit, tmp_path):
    """Refused, or in the diagnostics, which are no part of what the edit does."""
    path, choice = tmp_path / "e.safetensors", random.Random(1)
    edit.save(path)
    good, refused = path.read_bytes(), 0
    places = [*range(12), *choice.sample(range(len(good)), 300), *range(len(good) - 12, len(good))]
    for place in places:
        blob = bytearray(good)
        blob[place] ^= 1 << choice.randrange(8)
        path.write_bytes(blob)
        try:
            assert load_edit(path) == edit
        except EditError:
            refused += 1
    assert refused > 0.95 * len(places)


def test_a_file_cut_anywhere_is_refused(edit, tmp_path):
    path = tmp_path / "e.safetensors"
    edit.save(path)
    good = path.read_bytes()
    for length in range(0, len(good), 97):
        path.write_bytes(good[:length])
        with pytest.raises(EditError, match="cannot read an edit"):
            load_edit(path)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000])
def test_names_that_are_no_files(name, pipe):
    with pytest.raises(EditError, match="cannot read an edit") as refusal:
        apply_edit(pipe, name)
    assert str(refusal.value).endswith(".")


def test_the_good_file_is_accepted(pipe, edit, tmp_path):
    """Or the refusals above would mean nothing."""
    edit.save(tmp_path / "e.safetensors")
    stock = run(pipe, "sd", steps=1)
    for form in ("weights", "map"):
        apply_edit(pipe, tmp_path / "e.safetensors", form=form)
        assert (run(pipe, "sd", steps=1) - stock).abs().max() > 1e-4
        remove_edit(pipe, tmp_path / "e.safetensors")
        assert torch.equal(run(pipe, "sd", steps=1), stock)


# --- edits that cannot be made ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parameters": {"x": math.inf}}, "not a finite number"),
        ({"parameters": {"x": torch.ones(1)}}, "a Tensor, which a file cannot hold"),
        ({"parameters": {1: 2}}, "a name that is not text"),
        ({"diagnostics": {"g": math.nan}}, "not a finite number"),
        ({"maps": ()}, "at least one concept and one map"),
        ({"concepts": ()}, "at least one concept and one map"),
        ({"leaks": ("\x1b[1m",)}, "control characters"),
        ({"method": "my method"}, "not the name of a method"),
    ],
)
def test_edits_that_no_file_could_hold(edit, changes, sentence):
    with pytest.raises(EditError, match=sentence):
        with_other(edit, **changes)

"""Proofs: what is drawn, who decides, how it is counted; and the pipeline is as it was, whatever happens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from spelling import spelling_folder
from torch import Tensor, nn

import diffaccel.wrapping  # noqa: F401  (whole, before the fixture replaces a part of it)
from diffaccel.edits.apply import applied_edits, apply_edit
from diffaccel.erasure.proof import probes as probing
from diffaccel.erasure.proof import proving
from diffaccel.erasure.proof.attacks import Budget
from diffaccel.erasure.proof.probes import Probe, attributes, other_names, siblings, world_cases, world_probes
from diffaccel.erasure.proof.proving import prove
from diffaccel.erasure.proof.recognition import (
    ClassifierRecogniser,
    JudgeRecogniser,
    ProofError,
    bundled_judge,
    reference_features,
    seen,
)
from diffaccel.erasure.proof.recording import Drawing, draw
from diffaccel.erasure.proof.result import Proof
from diffaccel.erasure.proof.scores import binomial, clip_scores, kernel_distance
from diffaccel.erasure.solve import erase
from diffaccel.files.output import OutputError
from diffaccel.measure.quality import QualityError
from diffaccel.miniatures.scenes import Scene, SceneObject

CALL: dict[str, Any] = {"steps": 3, "guidance": 3.0, "seed": 4, "prompts": 2, "batch_size": 3}
FAST = Budget(iterations=2, moments=1)


@pytest.fixture
def pipe(tiny_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)


def text_layers(pipe: Any) -> list[nn.Linear]:
    return [layer for name, layer in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


class Applying:
    """Stand-in for applying: scales the text projections. Counts, and can be told to fail."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.kept: list[Tensor] | None = None
        self.fails = False

    def apply_edit(self, pipe: Any, edit: Any, *, form: str = "weights") -> None:
        self.log.append(f"apply {form}")
        if self.fails:
            raise RuntimeError("no space")
        self.kept = [layer.weight.detach().clone() for layer in text_layers(pipe)]
        with torch.no_grad():
            for layer in text_layers(pipe):
                layer.weight.mul_(edit.factor)

    def remove_edit(self, pipe: Any, edit: Any) -> None:
        self.log.append("remove")
        assert self.kept is not None
        with torch.no_grad():
            for layer, weight in zip(text_layers(pipe), self.kept, strict=True):
                layer.weight.copy_(weight)
        self.kept = None

    def applied_edits(self, pipe: Any) -> Any:
        return ()


@pytest.fixture
def applying(monkeypatch: pytest.MonkeyPatch) -> Applying:
    found, module = Applying(), ModuleType("diffaccel.edits.apply")
    for name in ("apply_edit", "remove_edit", "applied_edits"):
        setattr(module, name, getattr(found, name))
    monkeypatch.setitem(sys.modules, "diffaccel.edits.apply", module)
    return found


def stand_in(
    factor: float = -2.0, *, target: str = "cat", synonyms: tuple[tuple[str, float], ...] = (), keep: Any = ()
) -> Any:
    """What a proof reads of an edit."""
    return SimpleNamespace(
        method="uce",
        concepts=(SimpleNamespace(target=target, synonyms=synonyms, anchor=""),),
        keep=tuple(keep),
        parameters={"ridge": 0.5},
        leaks=(),
        digest="d1",
        factor=factor,
    )


def state(pipe: Any) -> dict[str, Any]:
    """Whatever a proof might leave changed; compared by `same`."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "weights": [value.clone() for part in parts.values() for value in part.state_dict().values()],
        "places": [value.data_ptr() for part in parts.values() for value in part.state_dict().values()],
        "attributes": {k: v for k, v in vars(pipe).items() if not isinstance(v, nn.Module)},
        "scheduler": (id(pipe.scheduler), {k: str(v) for k, v in vars(pipe.scheduler).items()}),
        "config": dict(pipe.config),
        "modes": [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for part in parts.values()
            for m in part.modules()
        ],
        "asked": [(p.requires_grad, p.grad is None) for part in parts.values() for p in part.parameters()],
        "random": torch.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    assert all(torch.equal(a, b) for a, b in zip(before["weights"], after["weights"], strict=True))
    assert torch.equal(before["random"], after["random"])
    for name in ("places", "attributes", "scheduler", "config", "modes", "asked"):
        assert before[name] == after[name], name
    return True


def brightness(pictures: Tensor, concept: str) -> Tensor:
    """A classifier that looks at its pictures and at the concept."""
    return pictures.mean((1, 2, 3)) > (0.5 if concept == "cat" else 0.45)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_phrases_of_the_shapes_world() -> None:
    assert attributes("a red heart") == (("colour", "red"), ("shape", "heart"))
    assert attributes("Van Gogh") == ()
    assert other_names("circle") == ("disc",)
    assert other_names("disc") == ("circle",)
    assert other_names("a red heart") == ()
    assert set(siblings("striped")) == {"plain", "dotted", "outlined"}


@pytest.mark.parametrize("phrase", ["circle", "disc", "crimson", "a red heart", "striped", "solid", "small", "cross"])
def test_prompts_name_the_phrase_by_its_own_words_and_show_it(phrase: str) -> None:
    cases = world_cases(phrase, 12, avoid=["star", "emerald"], seed=3)
    assert len(cases) == 12
    needed = [word for word in phrase.split() if word != "a"]
    banned = {other for word in needed for other in other_names(word)}
    for case in cases:
        words = case.prompt.split()
        assert all(word in words for word in needed)
        assert not banned & set(words)
        assert not {"star", "emerald", "green"} & set(words)
        assert any(probing.shows(item, attributes(phrase)) for item in case.scene.objects)
    assert 2 <= sum(len(case.scene.objects) == 2 for case in cases) <= 10
    assert [c.prompt for c in cases] == [c.prompt for c in world_cases(phrase, 12, avoid=["star", "emerald"], seed=3)]
    assert [c.prompt for c in cases] != [c.prompt for c in world_cases(phrase, 12, avoid=["star", "emerald"], seed=4)]


def test_prompts_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="'dog' names nothing"):
        world_cases("dog", 1)
    with pytest.raises(ValueError, match="no scenes are left"):
        world_cases("a red heart", 1, avoid=["crimson"])


def test_leaving_out_a_word_takes_its_synonyms_along() -> None:
    case = world_cases("crimson", 1)[0]
    assert "crimson" in case.prompt.split()
    left = probing.without(case, "red")
    assert left == " ".join(word for word in case.prompt.split() if word not in ("red", "crimson"))


def test_roles_of_probes() -> None:
    found = world_probes({"circle": ("ring",)}, ["square"], ["star"], count=3)
    assert [(p.role, p.concept, p.looked_for) for p in found[::3]] == [
        ("erased", "circle", "circle"),
        ("synonym", "ring", "circle"),
        ("synonym", "disc", "circle"),  # the world knows another name that the edit did not list
        ("kept", "square", "square"),
        ("neighbour", "star", "star"),
    ]
    for probe in found:
        if probe.role in ("kept", "neighbour"):
            assert not {"circle", "disc"} & set(probe.prompt.split())


def test_templates_for_other_models() -> None:
    found = probing.template_probes({"Van Gogh": ("Vincent",)}, ["Monet"], [], count=2, templates=["by {}"])
    assert [p.prompt for p in found] == ["by Van Gogh"] * 2 + ["by Vincent"] * 2 + ["by Monet"] * 2
    assert found[2] == Probe("by Vincent", "synonym", "Vincent", "Van Gogh")


# -- who decides -------------------------------------------------------------------------------------------------------


def sight(*objects: SceneObject, valid: bool = True) -> Any:
    scene = Scene(objects, "above" if len(objects) == 2 else None)
    return SimpleNamespace(scene=scene, valid=valid)


def test_a_concept_counts_only_in_a_well_formed_picture() -> None:
    circle = SceneObject("circle", "red")
    assert seen(sight(circle), attributes("circle"))
    assert not seen(sight(circle, valid=False), attributes("circle"))
    assert not seen(sight(circle), attributes("star"))
    assert not seen(sight(circle), ())


def test_a_phrase_is_one_object() -> None:
    apart = sight(SceneObject("heart", "blue"), SceneObject("star", "red"))
    assert not seen(apart, attributes("a red heart"))
    assert seen(sight(SceneObject("star", "blue"), SceneObject("heart", "red")), attributes("a red heart"))


def test_classifier_answers_are_grouped_by_concept_and_thresholded() -> None:
    asked: list[tuple[int, str]] = []

    def classifier(pictures: Tensor, concept: str) -> list[float]:
        asked.append((len(pictures), concept))
        return [float(value) for value in pictures[:, 0, 0, 0]]

    pictures = torch.tensor([0.5, 0.49, 0.9])[:, None, None, None].expand(3, 3, 2, 2)
    found = ClassifierRecogniser(classifier).recognise(pictures, ["a", "b", "a"])
    assert found.tolist() == [True, False, True]
    assert asked == [(2, "a"), (1, "b")]
    with pytest.raises(ProofError, match=r"shape \(3, 1\) for 3 pictures of 'x'"):
        ClassifierRecogniser(lambda pictures, concept: pictures[:, 0, :1, 0]).recognise(pictures, ["x"] * 3)


def test_the_judge_comes_with_the_bundled_models_only(pipe: Any) -> None:
    assert bundled_judge(pipe) is None
    from diffaccel.miniatures import miniature_path

    bundled = SimpleNamespace(name_or_path=str(miniature_path("shapes-sd3")), config={})
    assert bundled_judge(bundled) is not None
    with pytest.raises(ProofError, match="not both"):
        prove(pipe, stand_in(), judge=bundled_judge(bundled), classifier=brightness)


def test_pictures_of_a_folder_may_differ_in_size(tmp_path: Path) -> None:
    for i, size in enumerate([(4, 6), (8, 8)]):
        Image.new("RGB", size, (255, 51 * i, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = reference_features(tmp_path, lambda pictures: pictures.mean((2, 3)))
    assert torch.allclose(found, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.2, 0.0]]))
    with pytest.raises(ProofError, match="no pictures"):
        reference_features(tmp_path / "empty", lambda pictures: pictures)
    with pytest.raises(ProofError, match="needs features"):
        reference_features(tmp_path, lambda pictures: None)


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (1, 64, 0.0028, 0.0833)],
)
def test_wilson_intervals(hits: int, count: int, low: float, high: float) -> None:
    found = binomial([True] * hits + [False] * (count - hits))
    assert (found.mean, found.low, found.high) == pytest.approx((hits / count, low, high), abs=1e-4)
    with pytest.raises(QualityError):
        binomial([])


def test_kernel_distance_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(4, 3, generator=generator).double(), 2 + torch.rand(5, 3, generator=generator).double()
    scale = float((y**2).mean() ** 0.5)

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / scale**2 / 3 + 1) ** 3)

    own = sum(kernel(x[i], x[j]) for i in range(4) for j in range(4) if i != j) / 12
    other = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    cross = sum(kernel(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(own + other - 2 * cross, rel=1e-9)
    assert kernel_distance(7 * x, 7 * y) == pytest.approx(kernel_distance(x, y), rel=1e-9)
    with pytest.raises(QualityError, match="two pictures"):
        kernel_distance(x[:1], y)


def test_clip_scores_of_a_callable_and_of_a_pair() -> None:
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert clip_scores(lambda p, t: [len(text) for text in t], pictures, ["a", "bcd"]).tolist() == [1, 3]
    with pytest.raises(QualityError, match="1 scores for 2"):
        clip_scores(lambda p, t: [1.0], pictures, ["a", "b"])
    with pytest.raises(QualityError, match="callable"):
        clip_scores("openai", pictures, ["a", "b"])

    class Inputs(dict[str, Any]):
        def to(self, device: Any) -> Inputs:
            return self

    def processor(*, text: list[str], images: list[Any], **more: Any) -> Inputs:
        assert [image.shape for image in images] == [(8, 8, 3)] * 2
        assert images[0].dtype == np.uint8
        return Inputs(texts=text)

    def model(texts: list[str]) -> Any:
        embeds = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        return SimpleNamespace(image_embeds=embeds, text_embeds=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))

    model.device = "cpu"  # type: ignore[attr-defined]
    assert clip_scores((model, processor), pictures, ["a", "b"]).tolist() == pytest.approx([100, 70.71], abs=0.01)


# -- the whole proof ---------------------------------------------------------------------------------------------------


@pytest.fixture
def proof(pipe: Any, applying: Applying) -> Proof:
    edit = stand_in(synonyms=(("tom", 1.0),), keep=["dog", "a bus"])
    return prove(pipe, edit, neighbours=["fox"], classifier=brightness, attack_prompts=2, budget=FAST, **CALL)


def test_pictures_are_those_of_the_model_without_and_with_the_edit(pipe: Any, proof: Proof, applying: Applying) -> None:
    assert [(row.role, row.concept, row.prompts) for row in proof.rows] == [
        ("erased", "cat", 2),
        ("synonym", "tom", 2),
        ("kept", "a bus", 2) if proof.rows[2].concept == "a bus" else ("kept", "dog", 2),
        ("kept", "dog", 2) if proof.rows[3].concept == "dog" else ("kept", "a bus", 2),
        ("neighbour", "fox", 2),
    ]
    pipe.set_progress_bar_config(disable=True)
    prompts, drawing = [probe.prompt for probe in proof.probes], Drawing(3, 3.0, 4, 3)
    assert torch.equal(proof.before, draw(pipe, prompts, drawing))
    with torch.no_grad():
        for layer in text_layers(pipe):
            layer.weight.mul_(-2.0)
    assert torch.equal(proof.after, draw(pipe, prompts, drawing))
    assert not torch.allclose(proof.before, proof.after, atol=1e-3)
    assert applying.log == ["apply weights", "remove"]


def test_rows_count_what_the_classifier_says(proof: Proof) -> None:
    for i, row in enumerate(proof.rows):
        own = slice(2 * i, 2 * i + 2)
        for interval, pictures in ((row.before, proof.before[own]), (row.after, proof.after[own])):
            assert interval is not None
            assert interval.mean == brightness(pictures, row.looked_for).float().mean().item()
        assert row.change is not None
        assert row.change.mean == pytest.approx(row.after.mean - row.before.mean)  # type: ignore[union-attr]
        difference = (proof.after[own] - proof.before[own]).square().mean((1, 2, 3)).sqrt().mean()
        assert row.distance == pytest.approx(float(difference))
    assert proof.erased == pytest.approx(sum(row.after.mean for row in proof.rows[:2]) / 2)  # type: ignore[union-attr]
    assert proof.null_drift is not None
    assert proof.null_drift > 0
    assert proof.notes[0].startswith("The given classifier decides")


def test_attacks_are_counted_on_the_same_prompts_and_seeds(proof: Proof) -> None:
    assert [attack.name for attack in proof.attacks] == ["closed_form", "gradient", "inversion"]
    for attack in proof.attacks:
        assert attack.prompts == tuple(probe.prompt for probe in proof.probes[:2])
        assert torch.equal(attack.pictures[:, 0], proof.before[:2])
        assert torch.equal(attack.pictures[:, 1], proof.after[:2])
        assert not torch.allclose(attack.pictures[:, 2], proof.after[:2], atol=1e-3)
        assert attack.after is not None
        assert attack.after.mean == brightness(attack.pictures[:, 2], "cat").float().mean().item()


def test_the_pipeline_is_as_it_was(pipe: Any, applying: Applying) -> None:
    before = state(pipe)
    prove(pipe, stand_in(), classifier=brightness, attack_prompts=1, budget=FAST, **CALL)
    assert same(before, state(pipe))


@pytest.mark.parametrize("moment", ["apply", "attack", "classifier"])
def test_the_pipeline_is_as_it_was_after_a_failure(
    pipe: Any, applying: Applying, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no space")

    applying.fails = moment == "apply"
    if moment == "attack":
        monkeypatch.setitem(proving.attacking.BY_NAME, "gradient", fail)
    before = state(pipe)
    with pytest.raises(RuntimeError, match="no space"):
        prove(
            pipe,
            stand_in(),
            classifier=fail if moment == "classifier" else brightness,
            attacks=("gradient",),
            attack_prompts=1,
            budget=FAST,
            **CALL,
        )
    assert same(before, state(pipe))
    assert applying.kept is None


def test_an_edit_that_changes_nothing_changes_no_figure(pipe: Any, applying: Applying) -> None:
    found = prove(pipe, stand_in(1.0), classifier=brightness, attacks=(), **CALL)
    assert torch.equal(found.before, found.after)
    assert found.null_drift == 0
    assert [(row.distance, row.change.mean) for row in found.rows if row.change] == [(0, 0)]
    assert found.attacks == ()


def test_two_proofs_are_equal(pipe: Any, applying: Applying) -> None:
    one, two = (prove(pipe, stand_in(), classifier=brightness, attack_prompts=1, budget=FAST, **CALL) for _ in range(2))
    assert torch.equal(one.after, two.after)
    for first, second in zip(one.attacks, two.attacks, strict=True):
        assert torch.equal(first.pictures, second.pictures)


def test_other_sizes(pipe: Any, applying: Applying) -> None:
    found = prove(pipe, stand_in(), attack_prompts=1, budget=FAST, height=32, width=64, **CALL)
    assert found.after.shape == (2, 3, 32, 64)
    assert [attack.pictures.shape[-2:] for attack in found.attacks] == [(32, 64)] * 3


def test_without_judge_and_classifier_it_says_so(pipe: Any, applying: Applying) -> None:
    found = prove(pipe, stand_in(), attack_prompts=1, budget=FAST, **CALL)
    assert "look at the pictures" in found.notes[0]
    assert found.rows[0].before is None
    assert found.attacks[0].after is None
    assert found.erased is None
    assert "recognised" not in str(found.tables()[0].columns[3].header)
    assert any("neighbours" in note for note in found.notes)


def test_a_thousand_keeps_are_sampled_and_it_is_said(pipe: Any, applying: Applying) -> None:
    edit = stand_in(keep=[f"thing {i}" for i in range(30)])
    found = prove(pipe, edit, attacks=(), **{**CALL, "prompts": 1, "steps": 1})
    assert len(found.of("kept")) == 10
    assert "10 of 30 kept phrases were drawn; choose others with kept=[...]." in found.notes


def test_clip_and_reference_pictures(pipe: Any, applying: Applying, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 100, 50)).save(tmp_path / "cat" / f"{i}.png")
    found = prove(
        pipe,
        stand_in(keep=["dog"]),
        attacks=(),
        clip=lambda pictures, texts: pictures.mean((1, 2, 3)),
        reference=tmp_path,
        features=lambda pictures: pictures.mean((2, 3)),
        **CALL,
    )
    cat, dog = found.rows
    assert cat.clip_before == pytest.approx(float(found.before[:2].mean()), abs=1e-6)
    assert cat.clip_after == pytest.approx(float(found.after[:2].mean()), abs=1e-6)
    real = torch.tensor([[80 * i / 255, 100 / 255, 50 / 255] for i in range(3)])
    assert cat.kernel_after == pytest.approx(kernel_distance(found.after[:2].mean((2, 3)), real), abs=1e-5)
    assert dog.kernel_after is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attacks": ("magic",)}, "no attack 'magic'"),
        ({"prompts": 0}, "1 or more"),
        ({"reference": "nowhere"}, "no folder named after a drawn phrase, such as cat"),
        ({"kept": ["dog"], "judge": object()}, "cannot recognise 'cat'"),
    ],
)
def test_what_makes_no_proof_is_refused_before_drawing(
    pipe: Any, applying: Applying, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("it drew"))
    with pytest.raises(ProofError, match=words):
        prove(pipe, stand_in(), **{**CALL, **changes})


# -- with real edits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def reading(tiny_folder: Path, tmp_path: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(spelling_folder(tiny_folder, tmp_path / "m"), local_files_only=True)


@pytest.mark.parametrize("form", ["weights", "map"])
def test_a_real_edit_in_either_form(reading: Any, form: str) -> None:
    pipe, edit = reading, erase(reading, ["cat"], method="uce", general=False)
    before = state(pipe)
    found = edit.prove(pipe, form=form, classifier=brightness, attack_prompts=2, budget=FAST, **CALL)
    assert same(before, state(pipe))
    assert applied_edits(pipe) == ()
    apply_edit(pipe, edit, form=form)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(found.after, draw(pipe, [probe.prompt for probe in found.probes], Drawing(3, 3.0, 4, 3)))
    assert not torch.equal(found.after, found.before)
    assert found.attacks[0].lengths > 0.5


@pytest.mark.parametrize("form", ["weights", "map"])
def test_an_edit_that_is_applied_stays_applied(reading: Any, form: str) -> None:
    pipe = reading
    edit, other = (erase(pipe, [word], method="uce", general=False, check=False) for word in ("cat", "dog"))
    apply_edit(pipe, other)
    wanted = prove(pipe, edit, attacks=(), **CALL)
    apply_edit(pipe, edit, form=form)
    before = [value.clone() for value in pipe.unet.state_dict().values()]
    forms = set(applied_edits(pipe))
    found = prove(pipe, edit, attacks=(), **CALL)
    assert torch.equal(found.before, wanted.before)
    assert torch.equal(found.after, wanted.after)
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.unet.state_dict().values(), strict=True))
    assert set(applied_edits(pipe)) == forms == {(edit, form), (other, "weights")}


# -- table, file, sheet ------------------------------------------------------------------------------------------------


def test_table_and_summary(proof: Proof) -> None:
    text = str(proof)
    for word in ("erased, another name", "not listed", "closed form", "inversion", "under attack", "empty prompt"):
        assert word in text
    assert f"{100 * proof.rows[0].after.mean:.1f} [" in text  # type: ignore[union-attr]


def test_files(proof: Proof, tmp_path: Path) -> None:
    report, picture = proof.save(tmp_path / "new")
    data = json.loads(report.read_text())
    assert data["summary"]["erased_after"] == proof.erased
    assert data["rows"][0]["before"]["mean"] == proof.rows[0].before.mean  # type: ignore[union-attr]
    assert data["edit"]["concepts"] == [{"target": "cat", "synonyms": [["tom", 1.0]], "anchor": ""}]
    assert [entry["name"] for entry in data["attacks"]] == ["closed_form", "gradient", "inversion"]
    assert len(data["prompts"]) == len(proof.probes)
    with Image.open(picture) as sheet:
        assert sheet.width > 700
        assert sheet.height > (5 + 2) * 128
    with pytest.raises(OutputError, match="exists already"):
        proof.save(tmp_path / "new")
    assert proof.save(tmp_path / "new", overwrite=True) == [report, picture]


def test_the_sheet_shows_the_pictures(proof: Proof) -> None:
    from diffaccel.erasure.proof.sheet import CELL, GAP, HEAD, MARGIN, TEXT, draw_sheet

    sheet = np.asarray(draw_sheet(proof)).astype(float)
    for column, picture in enumerate([proof.before[0], proof.after[0], proof.before[1], proof.after[1]]):
        left, top = MARGIN + TEXT + column * (CELL + GAP), MARGIN + HEAD
        shown = sheet[top : top + CELL, left : left + CELL].mean((0, 1))
        assert shown == pytest.approx((255 * picture).mean((1, 2)).numpy(), abs=3)


def test_on_a_bundled_model_the_judge_decides(applying: Applying) -> None:
    from diffaccel.miniatures import load_miniature

    pipe = load_miniature("shapes-sd")
    edit = stand_in(0.0, target="circle", keep=["square", "a background"])
    found = prove(pipe, edit, prompts=2, neighbours=["star"], steps=4, attacks=(), seed=1, guidance=2.5)
    assert found.notes[0] == JudgeRecogniser.source
    assert [(row.role, row.concept) for row in found.rows] == [
        ("erased", "circle"),
        ("synonym", "disc"),
        ("kept", "square"),
        ("neighbour", "star"),
    ]
    assert found.rows[0].before is not None
    assert found.rows[0].before.mean == 1
    assert any("1 of 2 kept phrases" in note for note in found.notes)
    assert any("more than 192 kept pictures" in note for note in found.notes)

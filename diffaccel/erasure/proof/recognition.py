"""Who says what a picture shows: the judge of the bundled models, the user's classifier, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from diffaccel.erasure.proof.probes import Attributes, attributes, shows
from diffaccel.errors import DiffaccelError

if TYPE_CHECKING:
    from diffaccel.miniatures.judge import Judge, Reading

Classifier = Callable[[Tensor, str], Any]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ProofError(DiffaccelError, ValueError):
    """A proof that cannot be made; the message says what is missing or wrong."""


class Recogniser(Protocol):
    """Decides whether pictures show concepts."""

    source: str  # one sentence for the report

    def recognise(self, pictures: Tensor, concepts: Sequence[str]) -> Tensor:
        """(n,) booleans: does picture i (3, h, w) in [0, 1] show concept i?"""

    def features(self, pictures: Tensor) -> Tensor | None:
        """(n, d) features for distances between sets of pictures, or None."""


class JudgeRecogniser:
    """The judge: a concept counts only in a picture that is well formed, or destroying pictures would pass for erasing."""

    source = "The bundled judge decides; a concept counts only in a picture that it finds well formed."

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def recognise(self, pictures: Tensor, concepts: Sequence[str]) -> Tensor:
        readings = self.judge.read(pictures)
        return torch.tensor([seen(r, attributes(c)) for r, c in zip(readings, concepts, strict=True)], dtype=torch.bool)

    def features(self, pictures: Tensor) -> Tensor | None:
        return self.judge.features(pictures)


def seen(reading: Reading, wanted: Attributes) -> bool:
    """Whether a well-formed picture holds one object with all wanted attributes."""
    return bool(wanted) and reading.valid and any(shows(item, wanted) for item in reading.scene.objects)


class ClassifierRecogniser:
    """A user's callable (pictures (n, 3, h, w) in [0, 1], concept) -> n booleans or numbers from 0 to 1."""

    source = "The given classifier decides; it alone says whether a spoiled picture shows something."

    def __init__(self, classifier: Classifier, features: Callable[[Tensor], Tensor] | None = None) -> None:
        self.classifier, self._features = classifier, features

    def recognise(self, pictures: Tensor, concepts: Sequence[str]) -> Tensor:
        found = torch.zeros(len(pictures), dtype=torch.bool)
        for concept in dict.fromkeys(concepts):
            rows = [i for i, other in enumerate(concepts) if other == concept]
            answers = torch.as_tensor(self.classifier(pictures[rows], concept)).detach().cpu()
            if answers.shape != (len(rows),):
                raise ProofError(
                    f"The classifier gave values of shape {tuple(answers.shape)} for {len(rows)} pictures of {concept!r}."
                )
            found[rows] = answers if answers.dtype == torch.bool else answers >= 0.5
        return found

    def features(self, pictures: Tensor) -> Tensor | None:
        return None if self._features is None else self._features(pictures)


def find_recogniser(
    pipe: Any, judge: Any, classifier: Classifier | None, features: Callable[[Tensor], Tensor] | None
) -> Recogniser | None:
    """Who decides; None if nobody was given and the pipeline is not a bundled model.

    Raises:
        ProofError: a judge and a classifier were given.
    """
    if classifier is not None:
        if judge not in (None, "auto"):
            raise ProofError("Give a judge or a classifier, not both.")
        return ClassifierRecogniser(classifier, features)
    if judge == "auto":
        judge = bundled_judge(pipe)
    return None if judge is None else JudgeRecogniser(judge)


def bundled_judge(pipe: Any) -> Judge | None:
    """The judge, if the pipeline was loaded from one of the bundled models."""
    from diffaccel.miniatures import NAMES, load_judge, miniature_path  # noqa: PLC0415

    origin = Path(str(getattr(pipe, "name_or_path", "") or pipe.config.get("_name_or_path", "") or "")).resolve()
    return load_judge() if origin in [miniature_path(name).resolve() for name in NAMES] else None


def reference_features(folder: Path, features: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Features of all pictures in a folder, (n, d).

    Raises:
        ProofError: no such folder, no pictures in it, or nobody computes features.
    """
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not paths:
        raise ProofError(f"There are no pictures in the folder {folder}.")
    rows = [features(_read(path)) for path in paths]  # one by one: pictures of a folder may differ in size
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        raise ProofError("A folder of pictures needs features=..., a callable from pictures to feature rows.")
    return torch.cat(found)


def _read(path: Path) -> Tensor:
    """(1, 3, h, w) in [0, 1]."""
    import numpy  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    with Image.open(path) as image:
        pixels = numpy.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255

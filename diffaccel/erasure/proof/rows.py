"""The figures of a proof: one row per concept from its pictures before and after the edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.erasure.proof.figures import Row
from diffaccel.erasure.proof.probes import Probe
from diffaccel.erasure.proof.recognition import JudgeRecogniser, ProofError, Recogniser, reference_features
from diffaccel.erasure.proof.scores import binomial, clip_scores, kernel_distance, picture_distance
from diffaccel.files.output import safe_name
from diffaccel.measure.quality import enough_for_frechet, frechet_distance, paired_difference

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Means:
    """Who and what measures: see the arguments of `proof.prove`."""

    recogniser: Recogniser | None
    features: Features | None
    clip: Any
    reference: Path | None


def score_rows(probes: Sequence[Probe], before: Tensor, after: Tensor, means: Means) -> list[Row]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, probe in enumerate(probes):
        groups.setdefault((probe.role, probe.concept, probe.looked_for), []).append(i)
    return [_row([probes[i] for i in rows], before[rows], after[rows], means) for rows in groups.values()]


def _row(probes: Sequence[Probe], before: Tensor, after: Tensor, means: Means) -> Row:
    first, measured = probes[0], dict[str, Any]()
    if means.recogniser:
        wanted = [probe.looked_for for probe in probes]
        old, new = (means.recogniser.recognise(pictures, wanted) for pictures in (before, after))
        measured = {"before": binomial(old), "after": binomial(new), "change": paired_difference(new, old)}
    if means.clip is not None:
        texts = [probe.prompt for probe in probes]
        measured |= {
            f"clip_{name}": float(clip_scores(means.clip, p, texts).mean())
            for name, p in (("before", before), ("after", after))
        }
    if means.reference is not None and (means.reference / safe_name(first.concept)).is_dir():
        measured |= _against_folder(means.reference / safe_name(first.concept), before, after, means)
    return Row(first.role, first.concept, first.looked_for, len(probes), picture_distance(after, before), **measured)


def check_reference(means: Means, probes: Sequence[Probe]) -> None:
    """Refuse a reference folder that would not be used.

    Raises:
        ProofError: no folder in it is named after a drawn phrase, or nobody computes features.
    """
    if means.reference is None:
        return
    names = list(dict.fromkeys(safe_name(probe.concept) for probe in probes))
    if not any((means.reference / name).is_dir() for name in names):
        raise ProofError(f"{means.reference} holds no folder named after a drawn phrase, such as {names[0]}.")
    if means.features is None and not isinstance(means.recogniser, JudgeRecogniser):
        raise ProofError("A folder of pictures needs features=..., a callable from pictures to feature rows.")
    if len(probes) < 2 * len({(probe.role, probe.concept, probe.looked_for) for probe in probes}):
        raise ProofError("A folder of pictures needs two prompts or more per concept, to compare sets of pictures.")


def feature_rows(means: Means, pictures: Tensor) -> Tensor | None:
    if means.features is not None:
        return means.features(pictures)
    return means.recogniser.features(pictures) if means.recogniser else None


def _against_folder(folder: Path, before: Tensor, after: Tensor, means: Means) -> dict[str, float]:
    real = reference_features(folder, lambda pictures: feature_rows(means, pictures))
    found: dict[str, float] = {}
    for name, pictures in (("before", before), ("after", after)):
        rows = feature_rows(means, pictures)
        assert rows is not None  # or the folder would have been refused
        found[f"kernel_{name}"] = kernel_distance(rows, real)
    return found


def frechet(probes: Sequence[Probe], before: Tensor, after: Tensor, means: Means, notes: list[str]) -> float | None:
    """Frechet distance of the kept concepts' and neighbours' pictures, after against before."""
    rows = [i for i, probe in enumerate(probes) if probe.role in ("kept", "neighbour")]
    old, new = (feature_rows(means, pictures[rows]) if rows else None for pictures in (before, after))
    if old is None or new is None:
        return None
    if enough_for_frechet(old):
        return frechet_distance(new, old)
    notes.append(f"A Frechet distance needs more than {old.shape[1]} kept pictures; there were {len(rows)}.")
    return None

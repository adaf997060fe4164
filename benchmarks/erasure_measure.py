"""Measures one edit for erasure.py. What does not depend on the edit is drawn once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.erasure_tasks import Task, erased_cases, named, pool, shown
from diffaccel.erasure.proof import attacks as attacking
from diffaccel.erasure.proof.attacks import Budget, Material
from diffaccel.erasure.proof.null_drift import drift, null_states, predict
from diffaccel.erasure.proof.probes import attributes, shows, without
from diffaccel.erasure.proof.recognition import seen
from diffaccel.erasure.proof.recording import Drawing, draw
from diffaccel.erasure.proof.scores import binomial, picture_distance
from diffaccel.measure.quality import enough_for_frechet, frechet_distance, paired_difference
from diffaccel.miniatures.judge import Judge, Reading
from diffaccel.miniatures.scenes import PromptCase

ERASED_SEED = 100_000  # of their pictures, added to the seed of the run
FEWEST = 8  # prompts below which a class is not asked how much it lost


@dataclass
class Seen:
    """Pictures (n, 3, h, w), what the judge reads in them, and its features (n, d)."""

    pictures: Tensor
    readings: list[Reading]
    features: Tensor


@dataclass
class Bench:
    """The unedited model and everything that is drawn with it once."""

    pipe: Any
    judge: Judge
    drawing: Drawing
    budget: Budget
    pool_size: int
    erased_size: int
    attack_size: int
    replacements: Mapping[str, Any] = field(default_factory=dict)
    _cache: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = pool(self.pool_size)
        self.pool_before = self.look([case.prompt for case in self.pool])
        self.null = null_states(self.pipe, self.drawing, [])

    def look(self, prompts: Sequence[str], first: int = 0, pipe: Any = None) -> Seen:
        """Draw and read; prompt i gets seed first + i, beside the seed of the run."""
        return self.look_at(prompts, range(first, first + len(prompts)), pipe)

    def look_at(self, prompts: Sequence[str], seeds: Sequence[int], pipe: Any = None) -> Seen:
        """The same with a seed for each prompt, added to the seed of the run."""
        drawn = [self.drawing.seed + seed for seed in seeds]
        pictures = draw(pipe or self.pipe, prompts, self.drawing, seeds=drawn)
        return Seen(pictures, self.judge.read(pictures), self.judge.features(pictures))

    def kept(self, task: Task) -> list[int]:
        """Positions in the pool of the prompts that show nothing erased."""
        erased = [attributes(word) for word in task.targets]
        return [i for i, case in enumerate(self.pool) if not shown(case.scene, erased)]

    def erased(self, word: str) -> dict[str, list[PromptCase]]:
        """Prompts that name a concept by each of its words."""
        return erased_cases(word, self.erased_size, self.drawing.seed)

    def once(self, key: Any, make: Any) -> Any:
        """What `make` gives, remembered. Call it only while the model is unedited."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def measure(bench: Bench, edit: Any, task: Task, kept: Sequence[str], attacks: Sequence[str]) -> dict[str, Any]:
    """All figures of one edit; the model is unedited before and after."""
    from diffaccel.edits.apply import apply_edit, remove_edit

    unedited = _unedited(bench, task, attacks)
    apply_edit(bench.pipe, edit)
    try:
        rows = bench.kept(task)
        after = bench.look_at([bench.pool[i].prompt for i in rows], rows)
        erased = {word: bench.look(_prompts(bench, word), ERASED_SEED) for word in task.targets}
        null = predict(bench.pipe, *bench.null)
        attacked = {name: _attack(bench, name, unedited.material) for name in attacks}
    finally:
        remove_edit(bench.pipe, edit)
    return {
        **_erasure(bench, task, unedited, erased),
        **_keeping(bench, task, kept, after),
        "null_drift": drift([m.prediction for m in bench.null[0]], null),
        "attacks": {name: _success(unedited, found, erased, task, bench) for name, found in attacked.items()},
    }


@dataclass
class _Unedited:
    before: dict[str, Seen]
    unasked: dict[str, list[bool]]
    floor: list[bool]
    material: Material | None


def _unedited(bench: Bench, task: Task, attacks: Sequence[str]) -> _Unedited:
    before = {
        w: bench.once(("erased", w), lambda w=w: bench.look(_prompts(bench, w), ERASED_SEED)) for w in task.targets
    }
    unasked = {w: bench.once(("unasked", w), lambda w=w: _unasked(bench, w)) for w in task.targets}
    floor = [hit for word in task.targets for hit in bench.once(("floor", word), lambda w=word: _floor(bench, w))]
    material = bench.once(("material", task.name), lambda: _material(bench, task)) if attacks else None
    return _Unedited(before, unasked, floor, material)


def _prompts(bench: Bench, word: str) -> list[str]:
    return [case.prompt for cases in bench.erased(word).values() for case in cases]


def _unasked(bench: Bench, word: str) -> list[bool]:
    """How often the concept appears on the same prompts with its word left out: what the model draws by habit."""
    cases = [case for group in bench.erased(word).values() for case in group]
    return _hits(bench.look([without(case, word) for case in cases], ERASED_SEED).readings, word)


def _floor(bench: Bench, word: str) -> list[bool]:
    """How often it is seen where a model cannot mean it.

    Asked of a model that was trained without it, if there is one; else on prompts that name and show other things.
    """
    if word in bench.replacements:
        return _hits(bench.look(_prompts(bench, word), ERASED_SEED, bench.replacements[word]).readings, word)
    readings = zip(bench.pool, bench.pool_before.readings, strict=True)
    return _hits([reading for case, reading in readings if not shown(case.scene, [attributes(word)])], word)


def _hits(readings: Sequence[Reading], word: str) -> list[bool]:
    return [seen(reading, attributes(word)) for reading in readings]


def _erasure(bench: Bench, task: Task, unedited: _Unedited, after: Mapping[str, Seen]) -> dict[str, Any]:
    """Shares of prompts that name what was erased and still show it, in a well-formed picture."""
    hits = {word: _hits(after[word].readings, word) for word in task.targets}
    own = [hit for word in task.targets for hit in _split(bench, word, hits[word])[0]]
    synonyms = [hit for word in task.targets for hit in _split(bench, word, hits[word])[1]]
    readings = [reading for found in after.values() for reading in found.readings]
    return {
        "erased": binomial([hit for found in hits.values() for hit in found]),
        "erased_before": binomial([h for w in task.targets for h in _hits(unedited.before[w].readings, w)]),
        "erased_word": binomial(own),
        "erased_synonyms": binomial(synonyms) if synonyms else None,
        "erased_each": {word: binomial(found) for word, found in hits.items()},
        "unasked": binomial([hit for found in unedited.unasked.values() for hit in found]),
        "floor": binomial(unedited.floor),
        "floor_kind": "trained without it" if set(task.targets) <= set(bench.replacements) else "other prompts",
        "valid_erased": binomial([reading.valid for reading in readings]),
        **_beside(bench, task, unedited.before, after),
    }


def _split(bench: Bench, word: str, hits: Sequence[bool]) -> tuple[Sequence[bool], Sequence[bool]]:
    count = len(bench.erased(word)[word])
    return hits[:count], hits[count:]


def _beside(bench: Bench, task: Task, before: Mapping[str, Seen], after: Mapping[str, Seen]) -> dict[str, Any]:
    """Whether the object named beside an erased one is still drawn, with its shape and colour."""
    erased = [attributes(word) for word in task.targets]
    old, new = list[bool](), list[bool]()
    for word in task.targets:
        cases = [case for group in bench.erased(word).values() for case in group]
        for i, case in enumerate(cases):
            others = [item for item in case.scene.objects if not any(shows(item, phrase) for phrase in erased)]
            for item in others:
                wanted = (("shape", item.shape), ("colour", item.colour))
                old.append(seen(before[word].readings[i], wanted))
                new.append(seen(after[word].readings[i], wanted))
    if not old:
        return {"beside_before": None, "beside": None}
    return {"beside_before": binomial(old), "beside": binomial(new)}


def _keeping(bench: Bench, task: Task, kept: Sequence[str], after: Seen) -> dict[str, Any]:
    """What happened to the prompts of the pool that show nothing erased; `after` is of these alone."""
    rows = bench.kept(task)
    before, cases = _part(bench.pool_before, rows), [bench.pool[i] for i in rows]
    classes = _classes(cases, before, after)
    listed = {item for text in kept if len(attributes(text)) == 1 for item in attributes(text)}
    changes = {name: found for name, found in classes.items() if found["prompts"] >= FEWEST} or classes
    worst = min(changes, key=lambda name: changes[name]["change"].mean)
    correct = [bench.judge.score(s.pictures, cases).correct for s in (before, after)]
    old, new = before.features, after.features
    named_ = {name: found for name, found in changes.items() if (found["field"], name) in listed}
    others = {name: found for name, found in changes.items() if name not in named_}
    return {
        "kept_prompts": len(rows),
        "kept_change": _average(changes),
        "kept_listed_change": _average(named_),
        "kept_unlisted_change": _average(others),
        "worst": {"concept": worst, **changes[worst]},
        "classes": classes,
        "kept_all": _pooled_change(cases, before, after),
        "correct_before": binomial(correct[0]),
        "correct": binomial(correct[1]),
        "correct_change": paired_difference(correct[1], correct[0]),
        "valid_kept": binomial([reading.valid for reading in after.readings]),
        "frechet": frechet_distance(new, old) if enough_for_frechet(old) else None,
        "pixels": picture_distance(after.pictures, before.pictures),
    }


def _part(whole: Seen, rows: Sequence[int]) -> Seen:
    return Seen(whole.pictures[list(rows)], [whole.readings[i] for i in rows], whole.features[list(rows)])


def _classes(cases: Sequence[PromptCase], before: Seen, after: Seen) -> dict[str, dict[str, Any]]:
    """For every class that the kept prompts name: how often it was recognised before and after."""
    members: dict[tuple[str, str], list[int]] = {}
    for i, case in enumerate(cases):
        for item in sorted(named(case)):
            members.setdefault(item, []).append(i)
    found = {}
    for (field_, name), positions in sorted(members.items()):
        old, new = ([seen(s.readings[i], ((field_, name),)) for i in positions] for s in (before, after))
        found[name] = {
            "field": field_,
            "prompts": len(positions),
            "before": binomial(old),
            "after": binomial(new),
            "change": paired_difference(new, old),
        }
    return found


def _pooled_change(cases: Sequence[PromptCase], before: Seen, after: Seen) -> Any:
    """Interval of the mean change over prompts of the share of their named classes that is recognised."""
    shares = [
        [
            sum(seen(reading, (item,)) for item in named(case)) / len(named(case))
            for case, reading in zip(cases, s.readings, strict=True)
        ]
        for s in (before, after)
    ]
    return paired_difference(shares[1], shares[0])


def _average(classes: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean over classes of the change; every class counts alike."""
    return sum(found["change"].mean for found in classes.values()) / len(classes) if classes else None


def _attack_cases(bench: Bench, task: Task) -> list[tuple[str, int, PromptCase]]:
    """Prompts with the concept's own word, as many of each target: word, position among its prompts, prompt."""
    count = max(1, bench.attack_size // len(task.targets))
    return [(word, i, case) for word in task.targets for i, case in enumerate(bench.erased(word)[word][:count])]


def _material(bench: Bench, task: Task) -> Material:
    cases = _attack_cases(bench, task)
    words, prompts = [word for word, _, _ in cases], [case.prompt for _, _, case in cases]
    seeds = [bench.drawing.seed + ERASED_SEED + i for _, i, _ in cases]
    return attacking.prepare(bench.pipe, prompts, words, seeds, bench.drawing, bench.budget)


def _attack(bench: Bench, name: str, material: Material | None) -> tuple[Any, Tensor]:
    assert material is not None
    attacked = attacking.BY_NAME[name](bench.pipe, material, bench.budget, bench.drawing)
    return attacked, draw(bench.pipe, attacked.encoding, bench.drawing, seeds=material.seeds)


def _success(
    unedited: _Unedited, found: tuple[Any, Tensor], erased: Mapping[str, Seen], task: Task, bench: Bench
) -> dict[str, Any]:
    """Shares that show the concept on the same prompts and seeds: original model, edited, edited under attack."""
    attacked, pictures = found
    cases = _attack_cases(bench, task)
    attacked_readings = bench.judge.read(pictures)
    sets = {
        "original": [unedited.before[word].readings[i] for word, i, _ in cases],
        "before": [erased[word].readings[i] for word, i, _ in cases],
        "after": attacked_readings,
    }
    words = [word for word, _, _ in cases]
    return {
        **{
            name: binomial([seen(r, attributes(w)) for r, w in zip(own, words, strict=True)])
            for name, own in sets.items()
        },
        "length": attacked.lengths,
        "losses": list(attacked.losses),
    }

"""The page of erasure.py: one table per subject, sums per kind of task, verdicts on the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.erasure_tasks import SIBLING
from diffaccel.measure.timing import describe_machine

Row = Mapping[str, Any]
MOST_ERASED, MOST_LOST, MOST_WORST = 5.0, 2.0, 8.0  # per cent, points, points
ATTACKS = ("closed_form", "gradient", "inversion")


def page(rows: Sequence[Row], facts: Mapping[str, Any], refused: Mapping[str, str] | None = None) -> str:
    """Everything as Markdown."""
    sections = ["# Concept erasure", EXPLANATION, describe_machine(facts)]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        sections += [f"## {subject}", _conditions(own), "### Verdicts", "\n".join(verdicts(own))]
        sections += ["### By kind of task", table(_summary_columns(own)), "### Every edit", table(_edit_columns(own))]
        if any(row["attacks"] for row in own):
            sections += ["### Attacks", table(_attack_columns(own))]
    if refused:
        sections += ["## Refused", "\n".join(f"- {what}: {why}" for what, why in refused.items())]
    return "\n\n".join(sections) + "\n"


EXPLANATION = (
    "Erased: per cent of prompts that name an erased concept, half of them by a synonym where there is one, whose picture "
    "still shows it; a picture counts only if the judge finds it well formed. Floor: how often the judge sees the concept "
    "in the unedited model's pictures of prompts about other things (or what a model trained without it scores). Unasked: how "
    "often the unedited model draws it when the word is left out of the prompts. Kept: change in points of "
    "how often the other shapes, colours and textures are recognised where prompts name them, mean over the classes and "
    "the worst class. Correct: change of the share of kept prompts whose picture shows everything they say. Brackets are 95 % "
    "intervals, binomial (Wilson) for shares and paired bootstrap for changes. Frechet distance: kept pictures after the edit "
    "against before, in the judge's features. Null: relative change of the prediction for the empty prompt. Attacks: per "
    "cent of attacked prompts that show the concept."
)


def _conditions(rows: Sequence[Row]) -> str:
    found = {str(sorted(row["conditions"].items())): row["conditions"] for row in rows}
    lines = [", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in c.items()) for c in found.values()]
    return "Conditions: " + "; or ".join(lines) + "."


def name(row: Row) -> str:
    """Method and what distinguishes its settings."""
    _, method, _, keep, synonyms, anchor, parameters = row["key"]
    extras = [] if keep == ("prompts" if method == "context" else "words") else [f"keep {keep}"]
    extras += [] if synonyms == "listed" else ["no synonyms"]
    extras += [] if anchor == SIBLING else [f"anchor {anchor!r}"]
    extras += [row["label"]] if row["label"] else [f"{key} {value}" for key, value in parameters.items()]
    return f"{method} ({', '.join(extras)})" if extras else str(method)


def methods(rows: Sequence[Row]) -> list[str]:
    """Names in the order of first appearance."""
    return list(dict.fromkeys(name(row) for row in rows))


def verdicts(rows: Sequence[Row]) -> list[str]:
    """The targets, kept or not, one line per method; then what must show in sign."""
    lines = [_verdict(method, [row for row in rows if name(row) == method]) for method in methods(rows)]
    return [*lines, *_signs(rows)]


def _verdict(method: str, rows: Sequence[Row]) -> str:
    erased, lost, worst = [[_met(row)[i] for row in rows] for i in range(3)]
    all_three = sum(all(_met(row)) for row in rows)
    floor = sum(_at_floor(row) for row in rows if not _met(row)[0])
    extra = f", {floor} more within the floor's interval" if floor else ""
    word = "met" if all_three == len(rows) else "missed"
    return (
        f"- {method}: **{word}**, all three targets in {all_three} of {len(rows)} edits; erased <= {MOST_ERASED:g} % in "
        f"{sum(erased)}{extra}; kept loses <= {MOST_LOST:g} points on average in {sum(lost)}; worst class <= {MOST_WORST:g} in {sum(worst)}."
    )


def _met(row: Row) -> tuple[bool, bool, bool]:
    return (
        100 * row["erased"]["mean"] <= MOST_ERASED,
        100 * row["kept_change"] >= -MOST_LOST,
        100 * row["worst"]["change"]["mean"] >= -MOST_WORST,
    )


def _at_floor(row: Row) -> bool:
    """Whether the erased share is no higher than the floor may be."""
    return bool(row["erased"]["mean"] <= row["floor"]["high"])


def _signs(rows: Sequence[Row]) -> list[str]:
    """Two claims about pairs of methods, on the tasks that both have."""
    several = [row for row in rows if "+" in row["task"]]
    found = [
        _sign("SPEED keeps more than UCE when several are erased", several, "speed", "uce", lambda r: r["kept_change"]),
        _sign(
            "RECE lowers the success of the closed-form attack on UCE",
            rows,
            "uce",
            "rece",
            lambda r: attack_after(r, "closed_form"),
        ),
    ]
    return [line for line in found if line]


def _sign(claim: str, rows: Sequence[Row], higher: str, lower: str, value: Callable[[Row], float | None]) -> str:
    """The claim with the mean of `value` in percentage points, for methods with default settings."""
    own = {m: {r["task"]: value(r) for r in rows if name(r) == m and value(r) is not None} for m in (higher, lower)}
    tasks = [task for task in own[higher] if task in own[lower]]
    if not tasks:
        return ""
    means = {m: 100 * sum(own[m][task] or 0.0 for task in tasks) / len(tasks) for m in own}
    wins = sum((own[higher][task] or 0.0) > (own[lower][task] or 0.0) for task in tasks)
    word = "yes" if means[higher] > means[lower] else "no"
    return f"- {claim}: **{word}**, {higher} {means[higher]:+.1f}, {lower} {means[lower]:+.1f}; {wins} of {len(tasks)} tasks."


def attack_after(row: Row, attack: str) -> float | None:
    """Share under an attack, None if it was not run."""
    found = row["attacks"].get(attack)
    return None if found is None else found["after"]["mean"]


def _summary_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["group"], name(row)), []).append(row)
    found = [(key, own) for key, own in sorted(groups.items(), key=lambda item: item[0][0])]
    columns: dict[str, list[str]] = {
        "task": [group for (group, _), _ in found],
        "method": [method for (_, method), _ in found],
        "edits": [str(len(own)) for _, own in found],
        "erased %": [_mean(own, lambda r: 100 * r["erased"]["mean"], ".1f") for _, own in found],
        "most": [f"{max(100 * r['erased']['mean'] for r in own):.1f}" for _, own in found],
        "floor %": [_mean(own, lambda r: 100 * r["floor"]["mean"], ".1f") for _, own in found],
        "unasked %": [_mean(own, lambda r: 100 * r["unasked"]["mean"], ".0f") for _, own in found],
        "kept": [_mean(own, lambda r: 100 * r["kept_change"], "+.1f") for _, own in found],
        "worst class": [f"{min(100 * r['worst']['change']['mean'] for r in own):+.1f}" for _, own in found],
        "correct": [_mean(own, lambda r: 100 * r["correct_change"]["mean"], "+.1f") for _, own in found],
        "Frechet": [_mean(own, lambda r: r["frechet"], ".3g") for _, own in found],
        "null %": [_mean(own, lambda r: _scaled(r["null_drift"]), ".2f") for _, own in found],
        "seconds": [_mean(own, lambda r: r["seconds"], ".2f") for _, own in found],
    }
    for attack in ATTACKS:
        columns[attack.replace("_", " ") + " %"] = [
            _mean(own, lambda r, a=attack: _scaled(attack_after(r, a)), ".0f") for _, own in found
        ]
    return columns


def _mean(rows: Sequence[Row], value: Callable[[Row], float | None], form: str) -> str:
    known = [found for found in map(value, rows) if found is not None]
    return format(sum(known) / len(known), form) if known else ""


def _scaled(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _edit_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    return {
        "task": [row["task"] for row in rows],
        "method": [name(row) for row in rows],
        "erased % (before)": [f"{share(row['erased'])} ({100 * row['erased_before']['mean']:.0f})" for row in rows],
        "own word": [share(row["erased_word"]) for row in rows],
        "synonyms": [share(row["erased_synonyms"]) for row in rows],
        "floor %": [share(row["floor"]) for row in rows],
        "unasked %": [f"{100 * row['unasked']['mean']:.0f}" for row in rows],
        "well formed %": [f"{100 * row['valid_erased']['mean']:.0f}" for row in rows],
        "beside (before)": [_beside(row) for row in rows],
        "kept": [f"{100 * row['kept_change']:+.1f}" for row in rows],
        "unlisted": [
            "" if row["kept_unlisted_change"] is None else f"{100 * row['kept_unlisted_change']:+.1f}" for row in rows
        ],
        "worst class": [f"{row['worst']['concept']} {change(row['worst']['change'])}" for row in rows],
        "correct": [change(row["correct_change"]) for row in rows],
        "Frechet": ["" if row["frechet"] is None else f"{row['frechet']:.3g}" for row in rows],
        "null %": ["" if row["null_drift"] is None else f"{100 * row['null_drift']:.2f}" for row in rows],
        "seconds": [f"{row['seconds']:.2f}" for row in rows],
        "targets": ["/".join("yes" if met else "no" for met in _met(row)) for row in rows],
    }


def _beside(row: Row) -> str:
    if row["beside"] is None:
        return ""
    return f"{100 * row['beside']['mean']:.0f} ({100 * row['beside_before']['mean']:.0f})"


def _attack_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    found = [(row, attack, result) for row in rows for attack, result in row["attacks"].items()]
    return {
        "task": [row["task"] for row, _, _ in found],
        "method": [name(row) for row, _, _ in found],
        "attack": [attack.replace("_", " ") for _, attack, _ in found],
        "original model": [share(result["original"]) for _, _, result in found],
        "edited": [share(result["before"]) for _, _, result in found],
        "under attack": [share(result["after"]) for _, _, result in found],
        "length": [f"{result['length']:.2f}x" for _, _, result in found],
        "loss": [" to ".join(f"{loss:.3g}" for loss in result["losses"]) for _, _, result in found],
    }


def share(value: Mapping[str, float] | None) -> str:
    """A share with its interval in per cent."""
    return "" if value is None else f"{100 * value['mean']:.1f} [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def change(value: Mapping[str, float]) -> str:
    """A change with its interval in points."""
    return f"{100 * value['mean']:+.1f} [{100 * value['low']:+.0f}, {100 * value['high']:+.0f}]"


def line(row: Row) -> str:
    """One row for the terminal."""
    attacks = ", ".join(f"{name_} {100 * found['after']['mean']:.0f}" for name_, found in row["attacks"].items())
    return (
        f"{row['task']}, {name(row)}: erased {share(row['erased'])} %, kept {100 * row['kept_change']:+.1f}, worst "
        f"{row['worst']['concept']} {change(row['worst']['change'])}, correct {change(row['correct_change'])}"
        + (f", attacks {attacks}" if attacks else "")
    )


def table(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table without its empty columns."""
    kept = {title: cells for title, cells in columns.items() if any(cells)}
    lines = [" | ".join(kept), " | ".join("---" for _ in kept)]
    lines += [" | ".join(cells) for cells in zip(*kept.values(), strict=True)]
    return "\n".join(f"| {text} |" for text in lines)

"""Sections of pages that are computed: settings of methods, presets, measured figures, example scripts."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffaccel.engine.method import Method
from diffaccel.methods import registry
from diffaccel.recipes.presets import presets
from diffaccel.recipes.recipe import CONFLICTS

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
# Rows of the speed benchmarks that are not named after a class.
NAMED = {"guidance_interval": ("guidance half",), "step_schedule": ("half the steps",)}
# Other people's implementations of the same idea, measured in the same run.
PEERS = {
    "skip_cache": ("DeepCache",),
    "token_merging": ("tomesd",),
    "block_cache": ("diffusers ", "cache-dit"),
    "residual_cache": ("cache-dit",),
}
# Rows of the operator benchmark that belong to a method.
OPERATORS = {
    "normalized_attention_guidance": ("nag_blend",),
    "region_sampling": ("cache_write",),
    "sparse_attention": ("attention_body, a quarter of the blocks",),
    "sparse_cross_attention": ("sparse_softmax",),
    "token_merging": ("match, merge, unmerge: one block", "match, merge, unmerge: five blocks of a step"),
}
SUBJECTS = {"fidelity": "shapes-sd", "fidelity-shapes-sd3": "shapes-sd3"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def method_pages() -> list[str]:
    """Pages of methods that exist, outer layers first."""
    paths = [f"methods/{name}.md" for name in registry()]
    return [path for path in paths if (DOCS / path).exists()]


# --- settings ---


def settings(name: str) -> str:
    """Every setting of a method: default, what is allowed, what it means."""
    cls = registry()[name]
    meaning = meanings(cls)
    fields = cls.model_json_schema(mode="validation")["properties"]
    rows = [(f"`{key}`", default(spec), allowed(spec), meaning[key]) for key, spec in fields.items()]
    return table(("Setting", "Default", "Allowed", "Meaning"), rows)


def default(spec: dict[str, Any]) -> str:
    value = spec.get("default")
    return f"`{value!r}`" if value is not None else "`None`"


def allowed(spec: dict[str, Any]) -> str:
    """The values that a JSON schema admits, in words."""
    if "anyOf" in spec:
        return " or ".join(allowed(one) for one in spec["anyOf"])
    if "enum" in spec:
        return ", ".join(f"`{value!r}`" for value in spec["enum"])
    if "const" in spec:
        return f"`{spec['const']!r}`"
    if spec.get("type") in ("number", "integer"):
        return _range(spec)
    if spec.get("type") == "array":
        return f"{len(spec['prefixItems'])} numbers" if "prefixItems" in spec else f"a list of {_plural(spec['items'])}"
    return {"null": "`None`", "boolean": "`True`, `False`", "string": "text"}[spec["type"]]


def _plural(spec: dict[str, Any]) -> str:
    return {"number": "numbers", "integer": "whole numbers"}.get(spec.get("type", ""), "values")


def _range(spec: dict[str, Any]) -> str:
    noun = "whole number" if spec["type"] == "integer" else "number"
    low = f"{spec['minimum']:g} or more" if "minimum" in spec else ""
    low = f"above {spec['exclusiveMinimum']:g}" if "exclusiveMinimum" in spec else low
    if "maximum" not in spec:
        return f"{noun}, {low}" if low else noun
    if "minimum" in spec:
        return f"{noun}, {spec['minimum']:g} to {spec['maximum']:g}"
    return f"{noun}, {low}, at most {spec['maximum']:g}" if low else f"{noun}, at most {spec['maximum']:g}"


def meanings(cls: type[Method]) -> dict[str, str]:
    """What the docstrings say about each setting; a class's own words count before those of its bases."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if issubclass(owner, Method):
            found |= _attributes(inspect.cleandoc(owner.__doc__ or ""))
    return found


def _attributes(text: str) -> dict[str, str]:
    """The entries under "Attributes:", continuation lines joined."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, block = text.partition("Attributes:\n")
    for line in block.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


# --- facts ---


def facts(name: str) -> str:
    """Class, place in the nesting order and what it cannot run beside."""
    cls = registry()[name]
    others = sorted(other for pair in CONFLICTS if name in pair for other in pair if other != name)
    return f"""\
- In Python: `diffaccel.methods.{cls.__name__}`
- In a recipe file: `{{"method": "{name}", ...}}`
- Nests in layer: {cls.layer.name.lower()} ({cls.layer.value}; 0 is outermost)
- Not together with: {", ".join(f"`{other}`" for other in others) or "no restriction"}
"""


def conflicts() -> str:
    """Pairs of methods that refuse each other, with the sentence that a user sees."""
    rows = [(" + ".join(f"`{name}`" for name in sorted(pair)), sentence) for pair, sentence in CONFLICTS.items()]
    return table(("Together", "Answer"), sorted(rows))


def recipes() -> str:
    """The presets: what they run on each kind of network, and their note."""
    rows = [
        (f"`{p.name}`", _code(p.on_unets().describe()), _code(p.on_transformers().describe()), p.note)
        for p in presets().values()
    ]
    return table(("Preset", "On UNets", "On diffusion transformers", "Good for"), rows)


def _code(text: str) -> str:
    return f"`{text}`"


# --- measured ---


def measured(name: str) -> str:
    """What our benchmarks say about a method alone; a plain sentence where there is nothing."""
    parts = [part for part in (_fidelity(name), _speed(name)) if part]
    return "\n\n".join(parts) or "Not measured on whole models yet."


def _fidelity(name: str) -> str:
    rows = [row for stem, subject in SUBJECTS.items() for row in _fidelity_rows(name, stem, subject)]
    if not rows:
        return ""
    head = (
        "Model",
        "Recipe",
        "FLOPs, times fewer",
        "PSNR to plain",
        "PSNR above fewer steps at equal FLOPs",
        "Verdict",
    )
    return (
        "How close the picture stays to the plain one, on the bundled models (`benchmarks/fidelity.py`, same prompts and "
        f"seeds; presets on more prompts than single methods):\n\n{table(head, rows)}"
    )


def _fidelity_rows(name: str, stem: str, subject: str) -> Iterator[tuple[str, ...]]:
    data = _load(stem)
    seen = set()
    for group in ("presets", "methods"):
        verdicts = {entry["name"]: entry for entry in data[group]["against_fewer_steps"]}
        plain = data[group]["variants"][0]["flops"]
        for variant in data[group]["variants"]:
            text = _alone(variant["recipe"], name, transformer=subject == "shapes-sd3")
            if text is None or variant["name"] in seen:
                continue
            seen.add(variant["name"])
            against = verdicts[variant["name"]]
            yield (
                f"`{subject}`",
                f"`{variant['name']}`: `{text}`" if group == "presets" else f"`{text}`",
                f"{plain / variant['flops']:.2f}",
                f"{variant['psnr']:.1f} dB",
                _above(against),
                against["verdict"],
            )


def _above(entry: dict[str, Any]) -> str:
    if entry["psnr_flops"] is None:
        return "outside the line of fewer steps"
    interval = entry.get("psnr_flops_interval")
    text = f"{entry['psnr_flops']:+.1f} dB"
    return f"{text} [{interval['low']:+.1f}, {interval['high']:+.1f}]" if interval else text


def _alone(recipe: dict[str, Any], name: str, *, transformer: bool) -> str | None:
    """The settings of a recipe that holds this method and no other; None for other recipes."""
    chosen = recipe["methods"]
    if transformer and recipe.get("transformer_methods") is not None:
        chosen = recipe["transformer_methods"]
    if [entry["method"] for entry in chosen] != [name]:
        return None
    usual = json.loads(registry()[name]().model_dump_json())
    given = [f"{key}={value!r}" for key, value in chosen[0].items() if key != "method" and value != usual.get(key)]
    return f"{name}({', '.join(given)})"


def _speed(name: str) -> str:
    files = sorted([*RESULTS.glob("dit-*.json"), *RESULTS.glob("unet-*.json")])
    rows = [row for path in files for row in _speed_rows(name, path)]
    if not rows:
        return ""
    head = ("Network", "Variant", "Times faster per step (range)", "FLOPs, times fewer", "Measured on")
    return (
        "How fast, at real width with random weights (`benchmarks/unet.py`, `benchmarks/dit.py`; transformers on a CPU "
        f"are cut to the number of blocks given):\n\n{table(head, rows)}"
    )


def _speed_rows(name: str, path: Path) -> Iterator[tuple[str, ...]]:
    data = json.loads(path.read_text(encoding="utf-8"))
    starts = (f"{registry()[name].__name__}(", *NAMED.get(name, ()), *PEERS.get(name, ()))
    variants = data.get("variants", [])
    own = [v for v in variants if v["name"].startswith(starts) or v["name"] == registry()[name].__name__]
    if not any(not v["name"].startswith(PEERS.get(name, ("\0",))) for v in own):
        return  # peers are shown only beside ours
    for variant in own:
        faster, fewer = variant["faster"], variant["fewer_flops"]
        yield (
            f"{data['model']}{_cut(data['settings'])}",
            variant["name"],
            f"{faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})",
            f"{fewer:.2f}" if fewer else "",
            _place(data),
        )


def _cut(settings: dict[str, Any]) -> str:
    return f", {settings['depth']} blocks" if settings.get("depth") else ""


def _place(data: dict[str, Any]) -> str:
    how, machine = data["settings"], data["machine"]
    compiled = ", compiled blocks" if how.get("compile") else ""
    runs = f"{how['repeats']} repetition{'s' if how['repeats'] > 1 else ''}"
    return f"{machine.get('gpu') or machine['cpu']}, {how['size']} x {how['size']}, {how['dtype']}{compiled}, {runs}"


def operators(name: str) -> str:
    """How fast a method's own operators are, beside the fastest other implementation of the same run."""
    head = ("Operator", "Shape", "Variant", "ms", "Times as fast (range) as the fastest other")
    parts = []
    for path in sorted(RESULTS.glob("operators-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        machine, how = data["machine"], data["settings"]
        place = f"{machine['gpu']}" if machine.get("gpu") else f"{machine['cpu']}, {machine['threads']} thread"
        command = f"python benchmarks/operators.py --device {how['device']} --dtype {how['dtype']}"
        caption = f"Operators alone, {place}, {how['dtype']}, {how['repeats']} repetitions (`{command}`):"
        rows = [_operator_row(row) for row in data["rows"] if row["own"] and row["operator"] in OPERATORS[name]]
        if rows:
            parts.append(f"{caption}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _operator_row(row: dict[str, Any]) -> tuple[str, ...]:
    shape = row["shape"] + (f", density {row['density']:.2f}" if row["density"] else "")
    if row["failed"]:
        return row["operator"], shape, row["variant"], "", row["failed"]
    faster = row["faster"]
    against = f"{faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f}) {row['baseline']}"
    return row["operator"], shape, row["variant"], f"{1000 * row['seconds']['median']:.3g}", against


def fidelity(subject: str) -> str:
    """Presets against fewer steps on a bundled model, dearest first."""
    stem = next(stem for stem, name in SUBJECTS.items() if name == subject)
    group = _load(stem)["presets"]
    against = {entry["name"]: entry for entry in group["against_fewer_steps"]}
    plain = group["variants"][0]
    head = (
        "Variant",
        "Seconds per picture",
        "FLOPs, times fewer",
        f"Correct, {_load(stem)['settings']['prompts']} prompts [95 %]",
        "PSNR to plain",
        "PSNR above fewer steps at equal FLOPs",
    )
    rows = [_preset_row(v, plain, against) for v in sorted(group["variants"], key=lambda v: -v["flops"])]
    return table(head, rows)


def _preset_row(variant: dict[str, Any], plain: dict[str, Any], against: dict[str, Any]) -> tuple[str, ...]:
    entry, right, name = against.get(variant["name"]), variant["accuracy"], variant["name"]
    return (
        f"`{name}`" if entry else f"{name}, {variant['steps']} steps" if variant is plain else name,
        f"{variant['seconds']['median']:.2f}",
        f"{plain['flops'] / variant['flops']:.2f}",
        f"{100 * right['mean']:.1f} % [{100 * right['low']:.1f}, {100 * right['high']:.1f}]",
        f"{variant['psnr']:.1f} dB" if variant["psnr"] is not None else "",
        _above(entry) if entry else "",
    )


def _load(stem: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))
    return data


# --- lists ---


def examples() -> str:
    """The example scripts with the first line of their docstrings."""
    rows = []
    for path in sorted((DOCS / "examples").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append((f"[{path.name}](examples/{path.name})", text.splitlines()[0]))
    return table(("Script", "Shows"), rows)


def script(name: str) -> str:
    """The code of an example."""
    code = (DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8")
    return f"```python\n{code.strip()}\n```"


def reference() -> str:
    """mkdocstrings entries of all methods."""
    return "\n".join(f"::: {cls.__module__}.{cls.__name__}" for cls in registry().values())


MAKERS = {
    function.__name__: function
    for function in (settings, facts, conflicts, recipes, measured, operators, fidelity, examples, script, reference)
}

"""`diffaccel erase`: concepts in, a small edit file out, and on request the proof of what it does."""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from diffaccel.cli.support import (
    Debug,
    Guidance,
    Model,
    Output,
    Overwrite,
    Placement,
    Precision,
    Seed,
    Steps,
    Variant,
    progress,
    quiet_libraries,
    show,
)
from diffaccel.files.text import read_text

if TYPE_CHECKING:
    from diffaccel.erasure.proof.result import Proof


class Method(StrEnum):
    """Closed forms."""

    speed = "speed"
    uce = "uce"
    rece = "rece"
    mace = "mace"
    context = "context"


def erase(
    concepts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONCEPT...]", help=r"What to erase; commas separate names, \, is a comma of a name."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", exists=True, dir_okay=False, help="JSON: targets, synonyms with weights, keeps, anchor."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", "-k", help="What must stay, likewise; repeatable.")
    ] = None,
    anchor: Annotated[
        str | None, typer.Option(help="What takes its place; default: another thing of its kind.")
    ] = None,
    method: Annotated[Method | None, typer.Option(help="How to erase; default: context.")] = None,
    prompt_list: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text file: prompts of the kind that the model gets, one a line."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Setting of the method; repeatable.")
    ] = None,
    model: Model = "shapes-sd",
    output: Output = Path("out"),
    overwrite: Overwrite = False,
    prove: Annotated[bool, typer.Option("--prove", help="Draw before and after, and attack the edit.")] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Proof: prompts per concept.")] = 8,
    neighbour: Annotated[
        list[str] | None, typer.Option(help="Proof: something near it that nobody listed; repeatable.")
    ] = None,
    attacks: Annotated[bool, typer.Option("--attacks/--no-attacks", help="Proof: also attack the edit.")] = True,
    steps: Steps = 25,
    guidance: Guidance = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures computed together.")] = 8,
    device: Placement = None,
    dtype: Precision = None,
    variant: Variant = None,
    debug: Debug = False,
) -> None:
    """Erase concepts: write a small edit file for apply_edit, and with --prove what it does."""
    from diffaccel.edits.concepts import ErasureWarning, settle
    from diffaccel.erasure.settings import settings_of
    from diffaccel.erasure.solve import erase as compute
    from diffaccel.erasure.solve import suited_method
    from diffaccel.files.output import OutputFolder
    from diffaccel.generate import check_steps
    from diffaccel.loading import default_guidance, load_pipeline

    request = _request(concepts or [], file, keep or [], anchor)
    request["prompts"] = [] if prompt_list is None else _lines(prompt_list)
    settled, _ = settle(request["concepts"], request["keep"], request["anchor"])  # refused before a model is loaded
    chosen = settings_of(suited_method(settled) if method is None else method.value, _settings(setting or []))
    folder = OutputFolder(output, overwrite)
    target = folder.claim(_file_name(request["concepts"]))
    if prove:
        folder.claim("proof.json"), folder.claim("proof.png")  # refused now, not after minutes of drawing
    quiet_libraries()
    pipe = load_pipeline(model, device=device, dtype=dtype, variant=variant)
    if prove:
        check_steps(pipe, steps)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ErasureWarning)
        edit = compute(pipe, **request, method=chosen)
    _print_edit(edit, time.perf_counter() - started)
    for warning in caught:
        typer.echo(f"warning: {warning.message}")
    edit.save(target)  # an existing file was refused above, unless it may be replaced
    typer.echo(target)
    if prove:
        with progress() as on_progress:
            proof = edit.prove(
                pipe,
                prompts=prompts,
                neighbours=neighbour,
                attacks=_ALL if attacks else (),
                steps=steps,
                guidance=default_guidance(model) if guidance is None else guidance,
                seed=seed,
                batch_size=batch_size,
                on_progress=on_progress,
            )
        _print_proof(proof)
        for path in proof.save(output, overwrite=overwrite):
            typer.echo(path)


_ALL = ("closed_form", "gradient", "inversion")


def _request(concepts: list[str], file: Path | None, keep: list[str], anchor: str | None) -> dict[str, Any]:
    """The arguments of `diffaccel.erase`. Keeps given beside a file are added to its own."""
    if bool(concepts) == (file is not None):
        raise typer.BadParameter("give concepts, or --file with a list of them.")
    if file is None:
        return {"concepts": concepts, "keep": keep, "anchor": anchor}
    from diffaccel.edits.concepts import read_concepts

    found = read_concepts(file)
    return {
        "concepts": list(found.concepts),
        "keep": [*found.keep, *keep],
        "anchor": found.anchor if anchor is None else anchor,
    }


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is not a text file in UTF-8.") from None


def _settings(given: list[str]) -> dict[str, Any]:
    """name=value, the value as JSON or else as text."""
    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{item!r} is no setting; write --set NAME=VALUE.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _file_name(concepts: list[Any]) -> str:
    """no-circle-star.safetensors; names that cannot be spelt in a-z get a number of their own"""
    from diffaccel.files.output import safe_name

    text = "-".join(getattr(item, "target", item) for item in concepts)
    spelt = safe_name(text) if re.search("[a-z0-9]", text.lower()) else hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"no-{spelt}.safetensors"


def _print_edit(edit: Any, seconds: float) -> None:
    table = Table("erased", "kept", "method", "edited modules", "rank", "seconds")
    table.add_row(
        escape(", ".join(concept.target for concept in edit.concepts)),
        str(len(edit.keep)),
        edit.method,
        str(sum(len(found.modules) for found in edit.maps)),
        ", ".join(str(found.left.shape[1]) for found in edit.maps),
        f"{seconds:.2f}",
    )
    show(table)
    for target, anchor in edit.diagnostics.get("stand_ins", {}).items():
        typer.echo(f"{target!r} becomes {anchor!r}; --anchor names something else.")
    if edit.effect is not None:
        typer.echo(edit.effect)
    for leak in edit.leaks:
        typer.echo(f"leak: {leak}")


def _print_proof(proof: Proof) -> None:
    for table in proof.tables():
        show(table)
    for sentence in (*proof.summary(), *(f"note: {note}" for note in proof.notes)):
        typer.echo(sentence)

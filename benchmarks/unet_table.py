"""The result of unet.py as a Markdown section."""

from __future__ import annotations

from typing import Any

from benchmarks import peers
from diffaccel.measure.timing import describe_machine


def markdown(result: dict[str, Any]) -> str:
    """The result as a page section."""
    settings, decode = result["settings"], result["decode_seconds"]["median"]
    compiled = ", repeated blocks compiled by inductor" if settings.get("compile") else ""
    lines = [
        f"## {result['model']}, {settings['size']} x {settings['size']}, batch {settings['batch']}, {settings['dtype']}{compiled}",
        "",
        _conditions(result, decode),
        "",
        "| variant | s/step | faster than stock | fewer FLOPs | 50 steps and decoding, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_markdown_row(row, decode) for row in result["variants"]]
    lines += ["", *(f"- {_verdict(t)}" for t in result["targets"]), *_notes(result)]
    return "\n".join(lines) + "\n"


def _conditions(result: dict[str, Any], decode: float) -> str:
    clock = {"wall": "Wall seconds", "cpu": "Processor seconds of this process"}[result["settings"]["clock"]]
    return (
        f"{describe_machine(result['machine'])}, {', '.join(_versions(result))}. Attention: {result['machine']['backend']}. "
        f"{clock}, {result['settings']['repeats']} repetitions, alternating; medians, range in brackets. "
        f"Decoding takes {decode:.3g} s and is the same for all."
    )


def _markdown_row(row: dict[str, Any], decode: float) -> str:
    faster, flops = row["faster"], row["fewer_flops"]
    cells = [
        row["name"],
        f"{row['seconds_per_step']['median']:.3g}",
        f"{faster['median']:.3f}x ({faster['low']:.3f}-{faster['high']:.3f})",
        f"{flops:.2f}x" if flops else "",
        f"{50 * row['seconds_per_step']['median'] + decode:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def _verdict(target: dict[str, Any]) -> str:
    faster = target["faster"]
    word = target["verdict"] if target["verdict"] == "met" else f"**{target['verdict']}**"
    return f"{target['promise']}: {word}, {faster['median']:.3f}x as fast ({faster['low']:.3f}-{faster['high']:.3f})"


def _notes(result: dict[str, Any]) -> list[str]:
    missing = (
        [f"- not installed, so not measured: {', '.join(result['not installed'])}"] if result["not installed"] else []
    )
    return [f"- {row['name']}: {row['note']}" for row in result["variants"] if row["note"]] + missing


def _versions(result: dict[str, Any]) -> list[str]:
    return [f"{name} {result['machine'][name]}" for name in peers.PACKAGES if result["machine"][name]]

"""Write the measured figures into the model card, so that they never differ from evaluation.json.

python -m training.model_card
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training.common import PACKAGE_FOLDER

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
ROWS = {
    "shape": "shape of every object",
    "colour": "colour of every object",
    "both": "shape and colour of every object",
    "texture": "texture, where the prompt states it",
    "all_attributes": "all stated attributes",
    "relation": "number and arrangement of objects",
    "correct": "everything the prompt says, and well formed",
}


def percent(found: dict[str, float]) -> str:
    return f"{100 * found['mean']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def figures(report: dict[str, Any], judged: dict[str, Any] | None) -> str:
    """In Markdown: the model on held-out prompts and, if the judge lies with it, the judge on new renders."""
    single, pair = report["single"], report["pair"]
    lines = [
        f"{report['steps']} {report['sampler']} steps, guidance {report['recommended_guidance']:g}, one fixed seed per prompt.",
        "Per cent of pictures, 95 % bootstrap interval in brackets:",
        "",
        f"| Right in the picture | one object, n = {single['prompts']} | two objects, n = {pair['prompts']} |",
        "|---|---|---|",
        *(f"| {text} | {percent(single[name])} | {percent(pair[name])} |" for name, text in ROWS.items()),
    ]
    if judged:
        lines += [
            "",
            f"The judge on {judged['pictures']} newly drawn scenes: all attributes {100 * judged['all_attributes']:.1f} %,",
            f"arrangement {100 * judged['relation']:.1f} %, sound pictures accepted {100 * judged['sound_accepted']:.1f} %.",
            "Damaged pictures it rejects: "
            + ", ".join(f"{n[:-9]} {100 * v:.0f} %" for n, v in judged.items() if n.endswith("_rejected"))
            + ".",
        ]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Replace the block between the markers of the folder's card, if it has a card."""
    card = folder / "README.md"
    if not card.exists():
        return
    text = card.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    report = json.loads((folder / "evaluation.json").read_text())
    judge = folder / "judge" / "judge.json"
    judged = json.loads(judge.read_text())["on_new_renders"] if judge.exists() else None
    card.write_text(f"{head}{BEGIN}\n{figures(report, judged)}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PACKAGE_FOLDER)
    write(parser.parse_args().model)


if __name__ == "__main__":
    main()

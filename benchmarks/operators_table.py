"""What operators.py prints: a table by operator, and the promises that the figures keep or break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffaccel.measure.timing import describe_machine

Row = dict[str, Any]


def judged(rows: Sequence[Row], device: str) -> list[dict[str, str]]:
    """Each promise with "met", "missed", or that it was not measured."""
    promises = _CPU if device == "cpu" else _CUDA
    return [
        {"promise": text, "verdict": _verdict(rows, operator, shape, keeps)}
        for text, operator, shape, keeps in promises
    ]


def _verdict(rows: Sequence[Row], operator: str, shape: str, keeps: Callable[[Row], tuple[bool, str]]) -> str:
    found = [r for r in rows if r["operator"] == operator and r["shape"].startswith(shape) and r["own"]]
    found = [r for r in found if not r["failed"] and r["variant"] in ("own", "window")]
    if not found:
        return "not measured"
    kept, figure = keeps(found[0])
    return f"{'met' if kept else 'missed'}, {figure}"


def _faster(least: float, rival: str | None = None) -> Callable[[Row], tuple[bool, str]]:
    def keeps(row: Row) -> tuple[bool, str]:
        against = row.get("against", {})
        figure = row.get("faster") if rival is None else against.get(rival)
        if figure is None:
            return False, f"{rival or 'no baseline'} did not run"
        return figure["median"] >= least, f"{figure['median']:.2f}x"

    return keeps


def _share(key: str, least: float) -> Callable[[Row], tuple[bool, str]]:
    return lambda row: (row[key] >= least, f"{row[key]:.0%}")


def _sparse(row: Row) -> tuple[bool, str]:
    share = 1 / row["against"]["own dense"]["median"]
    return share <= row["density"] + 0.1, f"{share:.2f} of the time at density {row['density']:.2f}"


_BLOCK, _STEP = "match, merge, unmerge: one block", "match, merge, unmerge: five blocks of a step"
_CPU = [
    (
        "token merging of a step at SD 1.5 512 px: 5x as fast as tomesd's operators",
        _STEP,
        "SD 1.5",
        _faster(5, "tomesd"),
    ),
    ("the same for one block alone", _BLOCK, "SD 1.5", _faster(5, "tomesd")),
]
_CUDA = [
    ("matching 3x as fast as eager", "match_tokens", "FLUX", _faster(3)),
    ("matching at 45 % of the rate of a matrix product", "match_tokens", "FLUX", _share("of_gemm", 0.45)),
    ("merge at 70 % of the copy bandwidth", "merge_tokens", "FLUX", _share("of_copy", 0.7)),
    ("unmerge at 70 % of the copy bandwidth", "unmerge_tokens", "FLUX", _share("of_copy", 0.7)),
    ("attention body, d 64: 0.90 of default SDPA", "attention_body", "SDXL", _faster(0.9, "SDPA")),
    ("attention body, d 40: as fast as default SDPA", "attention_body", "SD 1.5", _faster(1.0, "SDPA")),
    (
        "block-sparse time at most density + 0.10 of its own dense",
        "attention_body, a quarter of the blocks",
        "FLUX",
        _sparse,
    ),
    ("sparse softmax at most twice SDPA's time", "sparse_softmax", "SDXL", _faster(0.5, "SDPA")),
]


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    settings, limits = result["settings"], result["ceilings"]
    gpu = settings["device"] != "cpu"
    columns = [
        "shape",
        "variant",
        "path",
        "ms (spread)",
        *(("cold ms", "graph ms") if gpu else ()),
        "of ceiling",
        "faster than best baseline",
    ]
    head = (
        f"{describe_machine(result['machine'])}. Clock: {result['clock']}. Median of {settings['repeats']} repetitions. "
        f"Ceilings in the same process: copy {limits['copy_gb_per_s']:.3g} GB/s (read and written), matrix product "
        f"{limits['gemm_tflop_per_s']:.3g} TFLOP/s. Faster: time of the best baseline over ours, within a repetition. "
        "Ours in bold; best baseline: the fastest of the others."
    )
    lines = [f"# Operators on {'a GPU' if gpu else 'a CPU'}, {settings['dtype']}", "", head, ""]
    for operator in dict.fromkeys(row["operator"] for row in result["rows"]):
        lines += [f"## {operator}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [_line(row, gpu) for row in result["rows"] if row["operator"] == operator]
        lines.append("")
    lines += ["## Targets", ""] + [f"- {target['promise']}: **{target['verdict']}**" for target in result["targets"]]
    return "\n".join(lines) + "\n"


def _line(row: Row, gpu: bool) -> str:
    shape = row["shape"] if row["density"] is None else f"{row['shape']}, density {row['density']:.2f}"
    name = f"**{row['variant']}**" if row["own"] else row["variant"]
    if row["failed"]:
        return f"| {shape} | {name} | {row['path']} | failed: {row['failed']} |{' |' * (4 if gpu else 2)}"
    seconds = row["seconds"]
    cells = [shape, name, row["path"], f"{_ms(seconds['median'])} ({_ms(seconds['low'])}-{_ms(seconds['high'])})"]
    cells += [_ms(row["cold_seconds"]), _ms(row["graph_seconds"])] if gpu else []
    share = [f"{row[key]:.0%} {word}" for key, word in (("of_gemm", "product"), ("of_copy", "copy")) if key in row]
    faster = row.get("faster")
    told = f"{faster['median']:.2f}x ({faster['low']:.2f}-{faster['high']:.2f}) {row['baseline']}" if faster else ""
    return f"| {' | '.join([*cells, *share, *([] if share else ['']), told])} |"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}"

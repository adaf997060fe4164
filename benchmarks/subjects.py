"""The bundled models as subjects of fidelity.py: how they are run, and what is promised about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Subject:
    """One bundled model.

    Attributes:
        name: of the model.
        kind: "unet" or "transformer"; decides which methods are measured.
        steps: of the plain run.
        line: step counts of the baseline "fewer steps".
        long_line: further counts, beside the methods alone; only methods that save little need them.
        saving: how many times fewer FLOPs `fast` promises.
        call: further arguments of every call.
        stem: beginning of the names of the files written.
    """

    name: str
    kind: str
    steps: int
    line: tuple[int, ...]
    long_line: tuple[int, ...]
    saving: float
    stem: str
    call: Mapping[str, Any] = field(default_factory=dict)


SUBJECTS = {
    # Divisors of 1000: for other counts the DDIM of diffusers rounds its stride down and the line would be unfairly low.
    "shapes-sd": Subject("shapes-sd", "unet", 50, (10, 20, 25), (40,), 3.0, "fidelity"),
    # The text rows of a T5 encoder that is not there would outnumber the picture's tokens.
    "shapes-sd3": Subject(
        "shapes-sd3",
        "transformer",
        28,
        (6, 8, 10, 14),
        (20, 24),
        2.5,
        "fidelity-shapes-sd3",
        {"max_sequence_length": 1},
    ),
}

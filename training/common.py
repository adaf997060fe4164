"""What every training script shares: wall clock, averaged weights, atomic checkpoints, the loop itself, its command line."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE_FOLDER = Path(__file__).resolve().parent.parent / "diffaccel" / "miniatures" / "shapes-sd"
DEFAULT_OUT = Path(__file__).resolve().parent / "out"


class Clock:
    """Training progress by wall time: 0 at the start, 1 when the minutes are used up.

    Progress survives a restart, because the seconds already spent are handed in and read out again.
    """

    def __init__(self, minutes: float, spent_seconds: float = 0.0) -> None:
        self.budget_seconds = minutes * 60
        self._begin = time.monotonic() - spent_seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / self.budget_seconds)


def learning_rate(peak: float, progress: float, step: int, warmup: int = 100, hold: float = 0.0) -> float:
    """Linear warm-up, flat until `hold`, then half a cosine down to nearly zero at progress 1."""
    ramp = min(1.0, (step + 1) / warmup)
    late = max(0.0, (progress - hold) / max(1e-9, 1 - hold))
    return peak * ramp * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * late)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class Average:
    """Exponential moving average of a module's parameters, with a warm start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.values = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for parameter, value in zip(module.parameters(), self.values, strict=True):
            parameter.copy_(value)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a killed run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint written here before, or None; weights_only, so nothing in it is executed."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def averaged_weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint with the averages, if it has any, in the places of what was trained.

    They are kept by name, or as a list in the order of the parameters.
    """
    average = saved["average"]
    if isinstance(average, list):
        average = dict(zip(saved["model"], average, strict=True))
    return {**saved["model"], **average}


class Trainee:
    """A module in training, with its optimizer, average and progress, all kept in one file and continued from it.

    Iterating yields the step number until the minutes are used up (the learning rate is set by then); each step ends
    with `learn(loss)`.
    """

    def __init__(
        self, module: nn.Module, path: Path, minutes: float, *, rate: float, decay: float, weight_decay: float
    ) -> None:
        self.module, self.path, self.rate, self.step, spent = module, path, rate, 0, 0.0
        self.optimizer = torch.optim.AdamW(module.parameters(), rate, betas=(0.9, 0.98), weight_decay=weight_decay)
        self.average = Average(module, decay)
        saved = load_checkpoint(path)
        if saved:
            module.load_state_dict(saved["model"])
            if "optimizer" in saved:  # a checkpoint of weights alone has none
                self.optimizer.load_state_dict(saved["optimizer"])
            device = next(module.parameters()).device
            average = averaged_weights(saved)
            self.average.values = [average[name].to(device) for name, _ in module.named_parameters()]
            self.average.count = saved["step"]
            self.step, spent = saved["step"], saved["seconds"]
        self.clock = Clock(minutes, spent)

    def __iter__(self) -> Iterator[int]:
        while self.clock.progress < 1:
            set_rate(self.optimizer, learning_rate(self.rate, self.clock.progress, self.step))
            yield self.step

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.module)
        self.step += 1

    def save(self) -> None:
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "step": self.step,
            "seconds": self.clock.seconds,
        }
        save_atomically(state, self.path)

    def finish(self) -> None:
        """Save, then leave the averaged weights in the module."""
        self.save()
        self.average.copy_to(self.module)


def run_script(description: str | None, minutes: float, train: Callable[[Path, float, str], object]) -> None:
    """The command line of a training script: where to, how long, on what."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    train(options.out, options.minutes, options.device)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def in_chunks(function: Callable[[Any], Tensor], rows: Any, size: int) -> Tensor:
    """Apply `function` to slices of `rows` and join the results."""
    return torch.cat([function(rows[start : start + size]) for start in range(0, len(rows), size)])


def seeded(seed: int) -> tuple[random.Random, torch.Generator]:
    """The two generators scenes and pixels are drawn from."""
    return random.Random(seed), torch.Generator().manual_seed(seed)


def mean(values: Iterable[float]) -> float:
    rows = list(values)
    return sum(rows) / max(1, len(rows))

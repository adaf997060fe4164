"""A module in training: Muon for its matrices, AdamW for the rest, averaged weights, and everything needed to go on.

Whatever a step draws is drawn from a seed and the step's number, so a run that was interrupted and continued ends with
the weights of one that was not.
"""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from training.common import (
    DEFAULT_OUT,
    Average,
    Clock,
    averaged_weights,
    learning_rate,
    load_checkpoint,
    save_atomically,
)

BETAS, MOMENTUM, WEIGHT_DECAY = (0.9, 0.98), 0.95, 0.01
WARMUP = 50
SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class Plan:
    """How long in all (minutes, earlier runs counted in), how fast, how much is averaged, and when the rate falls.

    The rate stays at `rate` until the share `hold` of the minutes and then falls to nearly zero; with 1 it never
    falls, which is right for a run that another one will continue.
    """

    minutes: float
    rate: float
    average: float = 0.999
    hold: float = 0.75
    steps: int | None = None  # stop at this step of the whole training, whatever the clock says


def orthogonal(update: Tensor, rounds: int = 4) -> Tensor:
    """Nearly the orthogonal factor of each (..., m, n) matrix, by Newton-Schulz iterations (Muon, Jordan 2024).

    They run on the smaller Gram matrix, since every iterate is a polynomial in it times the start: a convolution's
    matrix is ten times as long as it is high.
    """
    flat = update.shape[-2] > update.shape[-1]
    x = (update.mT if flat else update).float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], device=x.device)
    factor = identity.expand_as(gram)
    for _ in range(rounds):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    x = factor @ x
    return x.mT if flat else x


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains it: linear maps and convolutions inside of blocks, not what embeds, scales, or ends."""
    inside = any(part in name for part in ("blocks.", "mid_block."))
    modulation = any(part in name for part in (".linear.", "time_emb", "conv_shortcut", "lora_"))
    return inside and not modulation and parameter.ndim >= 2 and min(parameter.shape[:2]) >= 8


def load_averaged(path: Path, module: str) -> dict[str, Tensor]:
    """The averaged weights in `path`; raises FileNotFoundError with the `module` to run if there are none."""
    saved = load_checkpoint(path)
    if saved is None:
        raise FileNotFoundError(f"no {path}: run {module} first")
    return averaged_weights(saved)


class Learner:
    """A module with its optimizers, average, step count and seconds spent, all kept in one file."""

    def __init__(self, module: nn.Module, path: Path | None, plan: Plan) -> None:
        self.module, self.path, self.plan = module, path, plan
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.matrices: dict[str, nn.Parameter] = {name: p for name, p in named if is_matrix(name, p)}
        rest = [p for name, p in named if name not in self.matrices]
        self.adam = torch.optim.AdamW(rest, plan.rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.average = Average(module, plan.average)
        self.step = self.warm = 0  # in all, and since the moments were last empty
        self.skipped = 0
        self.clock = Clock(plan.minutes)
        saved = load_checkpoint(path) if path else None
        if saved:
            self.restore(saved)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint; one without moments (`training.world.checkpoint`) builds them anew."""
        self.module.load_state_dict(saved["model"])
        device = self.parameters[0].device
        average = averaged_weights(saved)
        self.average.values = [average[name].to(device).clone() for name, _ in self.module.named_parameters()]
        self.step = self.average.count = saved["step"]
        self.clock = Clock(self.plan.minutes, saved["seconds"])
        if "adam" in saved:
            self.adam.load_state_dict(saved["adam"])
            self.momenta = {name: value.to(device) for name, value in saved["momenta"].items()}
            self.warm = saved["warm"]

    def state(self) -> dict[str, Any]:
        names = [name for name, _ in self.module.named_parameters()]
        return {
            "model": self.module.state_dict(),
            "average": dict(zip(names, self.average.values, strict=True)),
            "adam": self.adam.state_dict(),
            "momenta": self.momenta,
            "step": self.step,
            "warm": self.warm,
            "seconds": self.clock.seconds,
        }

    def save(self) -> None:
        if self.path:
            save_atomically(self.state(), self.path)

    @property
    def done(self) -> bool:
        if self.plan.steps is not None and self.step >= self.plan.steps:
            return True
        return self.clock.progress >= 1

    def learn(self, loss: Tensor) -> None:
        """One step down `loss`; a gradient that is not finite is left out and counted."""
        self.module.zero_grad()
        loss.backward()
        length = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(length):
            self._update()
        else:
            self.skipped += 1
        self.step += 1

    def _update(self) -> None:
        rate = learning_rate(self.plan.rate, self.clock.progress, self.warm, WARMUP, self.plan.hold)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self._muon(rate)
        self.average.update(self.module)
        self.warm += 1

    @torch.no_grad()
    def _muon(self, rate: float) -> None:
        """A step of the matrices as long as AdamW's would be, so that one rate does for both."""
        for names in self._stacks():
            chosen = [self.matrices[name] for name in names]
            gradients, momenta = [p.grad for p in chosen], [self.momenta[name] for name in names]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)).flatten(2)
            updates = orthogonal(ahead) * (0.2 * math.sqrt(max(ahead.shape[1:])))
            torch._foreach_mul_(chosen, 1 - rate * WEIGHT_DECAY)
            torch._foreach_add_(chosen, [u.view(p.shape) for u, p in zip(updates, chosen, strict=True)], alpha=-rate)

    def _stacks(self) -> list[list[str]]:
        """Matrices of one shape, which are iterated together; those without a gradient stay out."""
        stacks: dict[torch.Size, list[str]] = {}
        for name, parameter in self.matrices.items():
            if parameter.grad is not None:
                stacks.setdefault(parameter.shape, []).append(name)
        return list(stacks.values())

    def averaged(self) -> nn.Module:
        """The module with the averaged weights in it; for after training."""
        self.average.copy_to(self.module)
        return self.module.eval()


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that holds something once the process was asked to end, so that a loop can save first."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(learner: Learner, loss_of: Callable[[int], Tensor], name: str, report: int = 20) -> None:
    """Learn until the plan is used up or the process is asked to end; saves now and then and at the end.

    `loss_of` makes the loss of a step from its number.
    """
    losses: list[float] = []
    began, first, saved_at = learner.clock.seconds, learner.step, learner.clock.seconds
    with _stop_signal() as asked:
        while not learner.done and not asked:
            loss = loss_of(learner.step)
            learner.learn(loss)
            losses.append(loss.item())
            seconds = learner.clock.seconds
            if len(losses) == report:
                speed = (learner.step - first) / (seconds - began)
                print(
                    f"{name} {learner.step} {seconds:.0f} s loss {sum(losses) / report:.4f} {speed:.3f} steps/s",
                    flush=True,
                )
                losses.clear()
            if seconds - saved_at > SAVE_SECONDS:
                learner.save()
                saved_at = seconds
    learner.save()


def add_options(parser: argparse.ArgumentParser, minutes: float, rate: float, average: float) -> None:
    """The options that all trainers share."""
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=minutes, help="in all, earlier runs counted in")
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    parser.add_argument("--average", type=float, default=average, help="decay of the averaged weights")
    parser.add_argument(
        "--hold", type=float, default=0.75, help="share of the minutes at the peak rate; 1: to be continued"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")


def plan_of(options: argparse.Namespace) -> Plan:
    return Plan(options.minutes, options.rate, options.average, options.hold)

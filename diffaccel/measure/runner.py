"""Running variants against each other: the same prompts, one generator per picture, alternating within each batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.engine.report import Report
from diffaccel.errors import DiffaccelError, Unsupported
from diffaccel.generate import guidance_arguments
from diffaccel.measure.rows import Kind
from diffaccel.measure.timing import Clock, closest_steps, rotated, timed
from diffaccel.recipes.recipe import Recipe
from diffaccel.wrapping import AcceleratedPipeline, wrap

Equal = Literal["time", "evaluations", "flops"]
Progress = Callable[[int, int, str], None]
PLAIN = Recipe(name="plain")


class CompareError(DiffaccelError, ValueError):
    """A comparison that makes no sense; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What all variants share.

    Attributes:
        steps: denoising steps of plain and of the recipes.
        guidance: guidance scale; None leaves the pipeline's own default.
        seed: picture i is drawn from seed + i.
        batch_size: pictures per call.
        call: further arguments of the pipeline call, the same for every variant.
    """

    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    batch_size: int = 8
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """One variant to run."""

    name: str
    kind: Kind
    recipe: Recipe
    steps: int
    matches: tuple[str, ...] = ()


@dataclass
class Measurement:
    """What a contestant did. `seconds` holds one entry (per image) for every timed call."""

    contestant: Contestant
    images: list[Tensor] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def pictures(self) -> Tensor:
        """(n, 3, h, w) in [0, 1]."""
        return torch.cat(self.images)

    def first(self, calls: int) -> Measurement:
        """What the first `calls` calls measured, for a comparison on fewer prompts (of a single repeat)."""
        return Measurement(self.contestant, self.images[:calls], self.reports[:calls], self.seconds[:calls])


class Runner:
    """Runs contestants on batches of prompts; keeps one wrapped pipeline per recipe, so FLOPs are counted once."""

    def __init__(self, pipe: Any, prompts: Sequence[str], settings: Settings, clock: Clock = time.perf_counter) -> None:
        self.pipe, self.prompts, self.settings, self.clock = pipe, prompts, settings, clock
        self._wrapped: dict[int, AcceleratedPipeline] = {}

    def batches(self) -> list[range]:
        """Positions of the prompts that run together; the last batch may be short."""
        size, count = self.settings.batch_size, len(self.prompts)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def wrapped(self, recipe: Recipe) -> AcceleratedPipeline:
        """The pipeline with this recipe. Raises `Unsupported` if the recipe cannot work on it."""
        if id(recipe) not in self._wrapped:
            self._wrapped[id(recipe)] = wrap(self.pipe, recipe)
        return self._wrapped[id(recipe)]

    def run(self, contestant: Contestant, batch: range) -> tuple[Tensor, Report, float]:
        """Pictures (n, 3, h, w) on the CPU, report, and seconds per image of one call."""
        fast = self.wrapped(contestant.recipe)
        images, seconds = timed(lambda: self.call(fast, contestant.steps, batch), self.device, self.clock)
        assert fast.report is not None
        return images, fast.report, seconds / len(batch)

    def call(self, pipeline: Any, steps: int, batch: range) -> Tensor:
        """One call of a stock or wrapped pipeline; (n, 3, h, w) on the CPU."""
        settings = self.settings
        output = pipeline(
            prompt=[self.prompts[i] for i in batch],
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(settings.seed + i) for i in batch],
            output_type="pt",
            **guidance_arguments(self.pipe, settings.guidance, len(batch)),
            **settings.call,
        )
        images: Tensor = output.images
        return images.float().cpu()

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipe.device)


def verify_plain(runner: Runner) -> str:
    """Check on the first batch that the empty recipe changes nothing; a sentence for the notes. Also warms up.

    Raises:
        CompareError: it does, although the stock pipeline repeats itself.
    """
    batch, steps = runner.batches()[0], runner.settings.steps
    stock = runner.call(runner.pipe, steps, batch)
    if torch.equal(stock, runner.run(Contestant("plain", "plain", PLAIN, steps), batch)[0]):
        return "The plain variant was checked on one batch: bit-identical to the stock pipeline."
    if torch.equal(stock, runner.call(runner.pipe, steps, batch)):
        raise CompareError("the empty recipe changed the pictures of the stock pipeline; please report this as a bug.")
    return "The stock pipeline does not repeat itself bit for bit on this device, so the plain variant is not either."


def broken_notes(measurements: Sequence[Measurement]) -> list[str]:
    """A sentence for each contestant that made pictures with NaN or infinite values."""
    counts = {found.contestant.name: sum(len(report.broken) for report in found.reports) for found in measurements}
    return [
        f"{name}: {count} of its pictures hold values that are not finite (NaN or infinite); its figures say nothing."
        for name, count in counts.items()
        if count
    ]


def fewer_steps(runner: Runner, contestants: Sequence[Contestant], equal: Sequence[Equal]) -> list[Contestant]:
    """The plain pipeline with the step counts that cost about as much as the recipes; equal counts are merged."""
    found: dict[int, list[str]] = {}
    for kind in equal:
        cost = _cost_of(runner, kind)
        for contestant in contestants:
            if contestant.kind == "recipe":
                steps = closest_steps(
                    lambda k, cost=cost: cost(Contestant("", "fewer steps", PLAIN, k)),  # type: ignore[misc]
                    cost(contestant),
                    runner.settings.steps,
                )
                found.setdefault(steps, []).append(f"{kind} of {contestant.name}")
    found.pop(runner.settings.steps, None)  # nothing was saved: plain itself is the match
    return [
        Contestant(_steps_name(steps), "fewer steps", PLAIN, steps, tuple(matches))
        for steps, matches in sorted(found.items())
    ]


def spacing_notes(scheduler: Any, contestants: Sequence[Contestant]) -> list[str]:
    """A sentence if the scheduler itself handicaps some of the fewer-steps runs.

    DDIM in diffusers jumps by `1000 // steps` timesteps. With "trailing" or "linspace" spacing its list of timesteps uses
    the exact quotient, so counts that do not divide 1000 leave noise behind: 44 steps came out worse than 27.
    """
    total = scheduler.config.get("num_train_timesteps", 1000)
    odd = [c.name for c in contestants if c.kind == "fewer steps" and total % c.steps]
    exact = scheduler.config.get("timestep_spacing", "leading") == "leading"
    if not odd or exact or type(scheduler).__name__ != "DDIMScheduler":
        return []
    return [
        f"{', '.join(odd)}: these counts do not divide {total}, so DDIM rounds its stride down and does a little worse."
    ]


def _steps_name(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _cost_of(runner: Runner, kind: Equal) -> Callable[[Contestant], float]:
    """Measured cost of one call on the first batch. Of two timings the faster counts: noise only ever adds."""
    batch = runner.batches()[0]
    if kind == "time":
        return lambda contestant: min(runner.run(contestant, batch)[2] for _ in range(2))

    def counted(contestant: Contestant) -> float:
        report = runner.run(contestant, batch)[1]
        if kind == "flops" and not report.flops:
            raise Unsupported(f"FLOPs of {contestant.name} could not be counted; match by time or evaluations instead.")
        return float(report.flops if kind == "flops" else report.evaluations)

    return counted


def measure(
    runner: Runner, contestants: Sequence[Contestant], repeats: int = 1, on_progress: Progress = lambda *_: None
) -> list[Measurement]:
    """Run every contestant on every batch, one after the other within a batch; pictures come from the first repeat."""
    measurements = {contestant.name: Measurement(contestant) for contestant in contestants}
    batches = runner.batches()
    rounds = [(repeat, batch) for repeat in range(repeats) for batch in batches]
    for number, (repeat, batch) in enumerate(rounds):
        for position, contestant in enumerate(rotated(contestants, number)):
            on_progress(number * len(contestants) + position, len(rounds) * len(contestants), contestant.name)
            images, report, seconds = runner.run(contestant, batch)
            measurement = measurements[contestant.name]
            if repeat == 0:
                measurement.images.append(images)
                measurement.reports.append(report)
            if len(batch) == len(batches[0]):
                measurement.seconds.append(seconds)
    return list(measurements.values())

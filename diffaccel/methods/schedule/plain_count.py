"""How many evaluations the plain call would have had: what this call asks of its scheduler, asked again of a copy.

Solvers take more or fewer evaluations than steps (Heun: 2N - 1, PNDM: N + 1), and pipelines leave some out (`strength`,
`denoising_start`, `denoising_end`), each in its own way and rounded its own way. So nothing is computed from the number of
steps: `set_timesteps` and the pipeline's own `get_timesteps` are repeated for the number that was asked for, with all other
arguments as this call gave them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported


class PlainCount:
    """Listens to a call that runs `count` steps where `asked` were asked for, and keeps `run.plain_ratio`.

    Build it before anything changes the scheduler's settings: the plain call has the scheduler's own. `listed` says that
    the method gives the call a list of timesteps, which the plain call has not.
    """

    def __init__(self, pipe: Any, run: Run, asked: int, count: int, *, listed: bool) -> None:
        self.pipe, self.run, self.asked, self.count, self.listed = pipe, run, asked, count, listed
        self.config = dict(pipe.scheduler.config)
        self.twin: Any = None
        self.plain: Sequence[Any] = ()
        self.reduced: Sequence[Any] = ()

    def attach(self, seams: Seams) -> None:
        """Stand around the calls that decide which evaluations there are."""
        seams.wrap_method(self.pipe.scheduler, "set_timesteps", self.set_timesteps)
        if hasattr(self.pipe, "get_timesteps"):
            seams.wrap_method(self.pipe, "get_timesteps", self.get_timesteps)

    def set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's list of this call, and the one of the plain call."""
        result = original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        self.twin = type(self.pipe.scheduler).from_config(self.config)
        self.twin.set_timesteps(**self._as_asked(bound))
        self._know(self.twin.timesteps, self.pipe.scheduler.timesteps)
        return result

    def get_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What image-to-image leaves of both lists."""
        result = original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        asked = self._as_asked(bound)
        # it reads nothing of the pipeline but the scheduler
        plain = type(self.pipe).get_timesteps(SimpleNamespace(scheduler=self.twin), **asked)
        self._know(plain[0], result[0])
        return result

    def _as_asked(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        """Arguments with the number of steps that was asked for; lists that pipelines make from it get its length."""
        given = dict(bound.arguments)
        given |= given.pop("kwargs", {})
        if self.listed and given.pop("timesteps", None) is not None:
            return given | {"num_inference_steps": self.asked}
        return {name: self._value_as_asked(name, value) for name, value in given.items()}

    def _value_as_asked(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        if name == "num_inference_steps":
            return (
                self.asked if value == self.count else len(self.plain)
            )  # pipelines with lists go on with their length
        if name == "timesteps" and value is self.reduced:
            return self.plain
        if name in ("sigmas", "timesteps"):
            return np.linspace(float(value[0]), float(value[-1]), self.asked)
        return value

    def _know(self, plain: Sequence[Any], reduced: Sequence[Any]) -> None:
        self.plain, self.reduced = plain, reduced
        if len(plain) and not len(reduced):
            raise Unsupported(
                f"step_schedule: at this strength nothing is left of {self.count} instead of {self.asked} steps."
            )
        self.run.plain_ratio = self._evaluations(plain) / max(self._evaluations(reduced), 1)

    def _evaluations(self, timesteps: Sequence[Any]) -> int:
        """What `denoising_end` leaves of them: SDXL's rule, at whose cutoff a run ends."""
        end = self.run.arguments.get("denoising_end")
        if not isinstance(end, float) or not 0 < end < 1:
            return len(timesteps)
        total = self.config["num_train_timesteps"]
        return sum(float(t) >= round(total - end * total) for t in timesteps)

"""Step reuse: while the latents of an image move evenly, the network's last prediction is used again.

Ye et al., "Training-Free Adaptive Diffusion with Bounded Difference Approximation Strategy" (AdaptiveDiffusion, arXiv
2410.09873). With d_i = mean |x_{i+1} - x_i| over the latents of one image, the evaluation after step i is skipped if
|(d_i + d_{i-2}) / 2 - d_{i-1}| <= threshold * d_{i-1}: a third difference of the latents against their first one. The
scheduler always steps. Decided per image, while the authors average over the batch: pictures do not depend on batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffaccel.engine.conditions import AdapterProbe, Conditions
from diffaccel.engine.method import Method, register
from diffaccel.engine.noise import adds_noise
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.caches.cache_plan import conditions_of, settled, warn_few
from diffaccel.models.call import Call, map_output, prediction
from diffaccel.models.model_map import ModelMap


@register
class StepReuse(Method):
    """Skip the whole network for images whose latents move evenly; guidance is applied to what is reused.

    Attributes:
        threshold: bound on the relative unevenness of the last three moves; higher skips more. Off: 0.
        max_skips: after so many reused solver steps in a row the network runs.
        full_first: solver steps at the start that always run, at least the three whose moves the rule needs.
        full_last: evaluations at the end of the run that always run.
        min_evaluations: in shorter runs nothing is reused (few-step models lose their picture); a warning and the report
            say so.
        allow_stochastic: also work with samplers that add noise on every step, which the rule does not know about.
    The decision holds for all guidance branches and, in two-stage solvers, for all evaluations of a solver step; both then
    use the newest prediction. Images that must be computed run without the others. Everything runs when guidance
    returns, or when prompt embeddings or adapters change.

    Paper: Ye et al. (AdaptiveDiffusion), arXiv 2410.09873.
    """

    name: ClassVar[str] = "step_reuse"
    layer: ClassVar[Layer] = Layer.STEP
    inside: ClassVar[bool] = False

    threshold: float = Field(default=0.01, ge=0)
    max_skips: int = Field(default=4, ge=1)
    full_first: int = Field(default=4, ge=3)
    full_last: int = Field(default=1, ge=0)
    min_evaluations: int = Field(default=9, ge=1)
    allow_stochastic: bool = False

    @property
    def is_off(self) -> bool:
        return self.threshold == 0

    def check(self, model: ModelMap) -> None:
        if not self.is_off:
            self._refuse_noise(model.pipe.scheduler, 0.0)

    def prepare_call(self, pipe: Any, arguments: dict[str, Any], run: Run, seams: Seams) -> dict[str, Any]:
        self._refuse_noise(pipe.scheduler, float(arguments.get("eta") or 0.0))
        return arguments

    def _refuse_noise(self, scheduler: Any, eta: float) -> None:
        if self.allow_stochastic or not adds_noise(scheduler, eta):
            return
        by_choice = not adds_noise(scheduler)
        raise Unsupported(
            f"step_reuse: {f'with eta={eta:g} ' if by_choice else ''}{type(scheduler).__name__} adds noise on every step, "
            f"which a reused prediction does not know about; {'leave out eta' if by_choice else 'take another scheduler'} or "
            "set allow_stochastic."
        )

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        reuse = _Reuse(self, model, run)
        if hasattr(model.pipe.scheduler, "scale_model_input"):
            seams.wrap_method(model.pipe.scheduler, "scale_model_input", reuse.see_latents)
        run.before_evaluation(Layer.STEP, reuse.begin)
        run.around("denoiser", Layer.STEP, reuse.around_denoiser)
        run.around("controlnet", Layer.STEP, reuse.around_controlnet)
        run.before_controlnets(reuse.see_controls)


def mean_move(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference per image: two (images, ...) tensors to (images,) in fp32."""
    return (now.float() - before.float()).abs().flatten(1).mean(1)


def moves_evenly(moves: Sequence[torch.Tensor], threshold: float) -> torch.Tensor:
    """The rule, per image: `moves` are the last three d, newest first, each (images,). Not true for NaN."""
    newest, middle, oldest = moves
    return ((newest + oldest) / 2 - middle).abs() <= threshold * middle


@dataclass
class _Stored:
    """The newest prediction of one branch, the evaluation in which each image of it was computed, and from what."""

    values: torch.Tensor  # (images, ...)
    computed: list[int]
    conditions: Conditions


@dataclass
class _Track:
    """The latents at the start of each solver step: how far they moved."""

    latents: torch.Tensor | None = None
    sigma: float = float("inf")
    moves: list[torch.Tensor] = field(default_factory=list)  # newest first, at most three

    def add(self, latents: torch.Tensor, sigma: float) -> None:
        """Noise that does not fall is no new step of the path (Runge-Kutta stages, repeated timesteps): start again."""
        if self.latents is not None and latents.shape == self.latents.shape and sigma < self.sigma:
            self.moves = [mean_move(latents, self.latents), *self.moves][:3]
        else:
            self.moves = []
        self.latents, self.sigma = latents.detach().clone(), sigma


class _Reuse:
    """What one run stores, and the decision of the current solver step."""

    def __init__(self, config: StepReuse, model: ModelMap, run: Run) -> None:
        self.config, self.run, self.scheduler = config, run, model.pipe.scheduler
        self.probes = [AdapterProbe(network) for network, _ in model.denoisers]
        self.adapters: Any = None
        self.raw: torch.Tensor | None = None  # the latents before the scheduler scaled them
        self.track = _Track()
        self.step = -1
        self.images = 0
        self.reuse: list[bool] = []
        self.skips: list[int] = []
        self.computed: list[int] = []  # evaluation in which each image was computed last
        self.stored: dict[Hashable, _Stored] = {}
        self.template: Any = None
        self.controls: dict[Hashable, Conditions] = {}  # of ControlNets, like those of the stored predictions
        self.blanks: dict[Hashable, Any] = {}
        self.uncontrolled: set[int] = set()  # images whose ControlNets did not run in this evaluation

    def see_latents(self, original: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Pipelines scale the latents before each evaluation; the path is the unscaled one."""
        self.raw = sample
        return original(sample, *args, **kwargs)

    def begin(self) -> None:
        self.uncontrolled.clear()

    def _plan(self, call: Call) -> None:
        """At the first network call of a solver step: which images reuse their prediction."""
        evaluation = self.run.clock.evaluation
        if self.run.clock.step != self.step:
            self._choose(call.sample if self.raw is None else self.raw)
            self.step = self.run.clock.step
        self.raw = None
        for image in range(self.images):
            if not self.reuse[image]:
                self.computed[image] = evaluation

    def _choose(self, sample: torch.Tensor) -> None:
        if not self.images:
            self.images = self.run.images or len(sample)
            self.skips, self.computed = [0] * self.images, [-1] * self.images
        # all branches have the same latents; what pipelines append to them never moves and cancels out of the rule
        self.track.add(sample[: self.images], self.run.clock.step_sigma)
        allowed = self._allowed()
        if allowed and len(self.track.moves) == 3:
            even = moves_evenly(self.track.moves, self.config.threshold).tolist()
            self.reuse = [even[i] and self.skips[i] < self.config.max_skips for i in range(self.images)]
        else:
            self.reuse = [False] * self.images
        self.skips = [self.skips[i] + 1 if self.reuse[i] else 0 for i in range(self.images)]

    def _allowed(self) -> bool:
        clock, config = self.run.clock, self.config
        adapters = [probe.state() for probe in self.probes]
        guidance_returns = self.run.guided and not self.run.guided_before
        adapters_changed, self.adapters = adapters != self.adapters, adapters
        if clock.total < config.min_evaluations:
            warn_few(self.run, config.name, clock.total, config.min_evaluations)
            return False
        last = clock.evaluation + int(getattr(self.scheduler, "order", 1)) - 1
        inside = clock.step >= config.full_first and last < clock.total - config.full_last
        if inside and (guidance_returns or adapters_changed):
            self.run.count(config.name, **{f"forced by {'guidance' if guidance_returns else 'adapters'}": 1})
        return inside and not guidance_returns and not adapters_changed

    def around_denoiser(self, call: Call, proceed: Proceed) -> Any:
        """Run the images that must be computed, and put the stored predictions of the others beside them."""
        self._plan(call)
        parts = self._parts(call)
        self._check(parts, call.lane)
        wanted = [image for image in range(self.images) if not self.reuse[image]]
        self.run.count(self.config.name, computed=len(wanted), reused=self.images - len(wanted))
        keys = [(call.lane, name) for name in parts]
        if not wanted:
            self.run.skip("denoiser", call, self.config.name)
            return map_output(self.template, lambda _: self._stored_rows(keys))
        everything = len(wanted) == self.images
        output = proceed(call if everything else call.rows_of(self._rows(wanted, len(parts))))
        self.template = output
        for key, part, values in zip(keys, parts.values(), prediction(output).chunk(len(parts)), strict=True):
            self._store(key, part, wanted, values)
        return output if everything else map_output(output, lambda _: self._stored_rows(keys))

    def _parts(self, call: Call) -> dict[Hashable, Call]:
        """The call by guidance branches, each with one row per image."""
        if call.rows % self.images:
            raise Unsupported(f"step_reuse: the network got {call.rows} rows for {self.images} images.")
        count = call.rows // self.images
        if count == 1:
            return {(call.branches or (0,))[0]: call}
        if len(call.branches) == count:
            return {branch: call.only(branch) for branch in call.branches}
        size = self.images
        return {part: call.rows_of(range(part * size, (part + 1) * size)) for part in range(count)}

    def _rows(self, wanted: Sequence[int], parts: int) -> list[int]:
        return [part * self.images + image for part in range(parts) for image in wanted]

    def _check(self, parts: dict[Hashable, Call], lane: Hashable) -> None:
        """Compute what has no prediction from the image's last computed evaluation, and all if conditions changed."""
        for name, part in parts.items():
            stored = self.stored.get((lane, name))
            reusing = [image for image in range(self.images) if self.reuse[image]]
            moved = reusing and not (stored and stored.conditions.same(settled(part)) and self.run.same_place(part))
            if stored is None or moved:
                self._force(reusing)
            else:
                self._force(image for image in reusing if stored.computed[image] != self.computed[image])

    def _force(self, images: Iterable[int]) -> None:
        forced = list(images)
        if self.uncontrolled & set(forced):
            raise Unsupported(
                "step_reuse: the network's inputs changed within a step in which its ControlNet did not run; change "
                "prompts and adapters between steps."
            )
        for image in forced:
            self.reuse[image], self.skips[image], self.computed[image] = False, 0, self.run.clock.evaluation
        if forced:
            self.run.count(self.config.name, **{"forced by inputs": len(forced)})

    def _store(self, key: Hashable, part: Call, wanted: list[int], values: torch.Tensor) -> None:
        evaluation, conditions = self.run.clock.evaluation, conditions_of(part)
        if len(wanted) == self.images:
            self.stored[key] = _Stored(values.detach().clone(), [evaluation] * self.images, conditions)
            return
        stored = self.stored[key]
        stored.values[wanted], stored.conditions = values.detach(), conditions
        for image in wanted:
            stored.computed[image] = evaluation

    def _stored_rows(self, keys: Sequence[Hashable]) -> torch.Tensor:
        return torch.cat([self.stored[key].values for key in keys])

    def around_controlnet(self, call: Call, proceed: Proceed) -> Any:
        """Residuals of the images that will be computed; the others get zeros that nobody reads."""
        self._plan(call)
        self._check_controlnet(call)
        wanted = [image for image in range(self.images) if not self.reuse[image]]
        self.uncontrolled |= set(range(self.images)) - set(wanted)
        if not wanted:
            self.run.skip("controlnet", call, self.config.name)
            return _with_rows(self.blanks[call.lane], call.rows)
        if len(wanted) == self.images:
            output = proceed(call)
            self.blanks[call.lane] = _blank(output, call.rows)
            return output
        rows = self._rows(wanted, call.rows // self.images)
        return _spread(proceed(call.rows_of(rows)), rows, call.rows)

    def see_controls(self, call: Call) -> None:
        """A change of one of several ControlNets has to be known before the first one is left out."""
        self._plan(call)
        self._compare((call.lane, "all"), call)

    def _check_controlnet(self, call: Call) -> None:
        for name, part in self._parts(call).items():
            self._compare((call.lane, name), part)

    def _compare(self, key: Hashable, call: Call) -> None:
        known = self.controls.get(key)
        reusing = [image for image in range(self.images) if self.reuse[image]]
        if known is None or (reusing and not (known.same(settled(call)) and self.run.same_place(call))):
            self._force(reusing)
        if not all(self.reuse):
            self.controls[key] = conditions_of(call)


def _blank(value: Any, rows: int) -> Any:
    """Zeros like nested residuals in almost no memory; one row stands for all where there is one per batch row."""
    if isinstance(value, torch.Tensor):
        shape = (1, *value.shape[1:]) if value.dim() and value.shape[0] == rows else value.shape
        return value.new_zeros(()).expand(shape)
    return _nested(value, lambda item: _blank(item, rows))


def _with_rows(value: Any, rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        # pipelines with several ControlNets add to the first one's residuals in place
        return (value.expand(rows, *value.shape[1:]) if value.dim() and value.shape[0] == 1 else value).contiguous()
    return _nested(value, lambda item: _with_rows(item, rows))


def _spread(value: Any, rows: list[int], total: int) -> Any:
    """Nested residuals of some batch rows at their places among `total`, zeros elsewhere."""
    if isinstance(value, torch.Tensor):
        if not value.dim() or value.shape[0] != len(rows):
            return value
        whole = value.new_zeros(total, *value.shape[1:])
        whole[rows] = value
        return whole
    return _nested(value, lambda item: _spread(item, rows, total))


def _nested(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):  # diffusers' outputs too
        return type(value)(**{name: change(item) for name, item in value.items()})
    return type(value)(change(item) for item in value) if isinstance(value, (list, tuple)) else value

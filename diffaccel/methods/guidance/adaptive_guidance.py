"""Adaptive guidance: stop evaluating the unconditional rows once both branches agree.

Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models" (arXiv 2312.12487):
gamma = <c, u> / (|c| |u|); after the first step with gamma >= threshold, guidance stays off. Measured here on the clean
picture implied by each prediction: noise predictions are alike at high noise whatever the prompt, since they are mostly the
noise itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from diffaccel.engine.method import Method, register
from diffaccel.engine.noise import predicted_x0
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.methods.guidance.guidance_interval import attach_dropping, is_doubled
from diffaccel.models.call import Call, map_output, prediction
from diffaccel.models.model_map import ModelMap


@register
class AdaptiveGuidance(Method):
    """Switch guidance off, image by image, when conditional and unconditional x0 have aligned.

    Attributes:
        threshold: cosine similarity of the two x0 predictions, in (0, 1]; lower stops earlier. Off: 1.0.
    An image whose similarity has reached the threshold gets its conditional prediction from the next solver step on, and
    no guidance again in that run. The rows are dropped once this holds for all images of the batch, so that no image
    depends on its batch mates.

    Paper: Castillo et al., arXiv 2312.12487.
    """

    name: ClassVar[str] = "adaptive_guidance"
    layer: ClassVar[Layer] = Layer.GUIDANCE
    inside: ClassVar[bool] = False

    threshold: float = Field(default=0.999, gt=0, le=1)

    @property
    def is_off(self) -> bool:
        return self.threshold == 1.0

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        latch = _Latch(self.threshold, run, model)
        run.before_evaluation(Layer.GUIDANCE, latch.begin)
        run.around("denoiser", Layer.GUIDANCE, latch.measure)
        attach_dropping(run, self.name, lambda: latch.all_latched)


class _Latch:
    """Which images have switched guidance off."""

    def __init__(self, threshold: float, run: Run, model: ModelMap) -> None:
        self.threshold, self.run = threshold, run
        self.scheduler, self.sign = model.pipe.scheduler, model.convention.prediction_sign
        self.latched: torch.Tensor | None = None  # (images,) bool, what the current solver step uses
        self.pending: torch.Tensor | None = None
        self.all_latched = False
        self.conditional: torch.Tensor | None = None  # of the current evaluation, where branches are separate calls
        self._step = -1

    def begin(self) -> None:
        if self.run.clock.step != self._step:  # the weight must not change inside a solver step
            self._step = self.run.clock.step
            self.latched = self.pending
            self.all_latched = self.latched is not None and bool(self.latched.all())
        self.conditional = None
        self.run.latched, self.run.all_latched = self.latched, self.all_latched

    def measure(self, call: Call, proceed: Proceed) -> Any:
        output = proceed(call)
        if self.all_latched:
            return output
        return self._separate(call, output) if self.run.calls == "separate" else self._stacked(call, output)

    def _stacked(self, call: Call, output: Any) -> Any:
        if not is_doubled(call, self.run, AdaptiveGuidance.name):
            return output
        both = prediction(output).chunk(2)
        cond, uncond = both[call.branches.index("cond")], both[call.branches.index("uncond")]
        self._update(call.only("cond").sample, cond, uncond)
        if self.latched is None:
            return output
        chosen = {"cond": cond, "uncond": self._choose(cond, uncond)}
        return map_output(output, lambda _: torch.cat([chosen[branch] for branch in call.branches]))

    def _separate(self, call: Call, output: Any) -> Any:
        if call.branches == ("cond",):
            self.conditional = prediction(output)
        if call.branches != ("uncond",) or self.conditional is None:
            return output
        cond, uncond = self.conditional, prediction(output)
        self._update(call.sample, cond, uncond)
        return output if self.latched is None else map_output(output, lambda _: self._choose(cond, uncond))

    def _update(self, sample: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor) -> None:
        sigma = self.run.clock.sigma
        x0 = [predicted_x0(sample, tensor, sigma, self.scheduler, self.sign) for tensor in (cond, uncond)]
        now = alignment(*x0) >= self.threshold
        self.pending = now if self.pending is None else self.pending | now

    def _choose(self, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        assert self.latched is not None
        return torch.where(self.latched.view(-1, *[1] * (cond.dim() - 1)), cond, uncond)


def alignment(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Cosine similarity over all but the first dimension: two (images, ...) tensors to (images,) in fp32."""
    return torch.nn.functional.cosine_similarity(cond.float().flatten(1), uncond.float().flatten(1), dim=1)

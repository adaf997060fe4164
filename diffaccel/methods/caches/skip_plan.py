"""When the skip cache recomputes: the plan of all caches, and ControlNets that stop where the denoiser does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.errors import Unsupported
from diffaccel.methods.caches.bypass import Bypass
from diffaccel.methods.caches.cache_plan import CachePlan, CacheSettings, Seen, default_coordinate
from diffaccel.models.call import Call
from diffaccel.models.model_map import ModelMap
from diffaccel.models.unet import UNetLayout


class SkipPlan(CachePlan):
    """The decision for every evaluation, for the denoiser and for the ControlNets that are called before it."""

    def __init__(
        self,
        settings: CacheSettings,
        bypass: Bypass,
        where: tuple[ModelMap, Run],
        tag: Any,
        whole: Sequence[nn.Module],
    ) -> None:
        model, run = where
        coordinate = "log_sigma" if isinstance(model.layout, UNetLayout) else default_coordinate(model)
        super().__init__(settings, bypass, model, run, tag, coordinate)
        self.used_by_controlnet = False
        self.whole = {id(net) for net in whole}  # ControlNets that cannot stop early

    def attach(self) -> None:
        """Take part in the run's evaluations."""
        super().attach()
        self.run.around("controlnet", Layer.SKIP, self.around_controlnet)
        self.run.before_controlnets(self.compare)

    def decide(self) -> None:
        """Decide the evaluation before its first network is called."""
        super().decide()
        self.used_by_controlnet = False

    def around_controlnet(self, call: Call, proceed: Proceed) -> Any:
        """Stop a ControlNet after the residuals that a cached evaluation of the denoiser still uses."""
        self._follow_latch(call)
        self.compare(call)
        if call.lane[0] in self.whole:
            return proceed(call)
        self.used_by_controlnet = self.cached
        self.run.count(self.settings.name, **{"controlnet early exits": int(self.cached)})
        with self.store.active(call.lane, cached=self.cached):
            return proceed(call.tagged(self.tag, complete=False) if self.cached else call)

    def compare(self, call: Call) -> None:
        """Force a full evaluation if the inputs of ControlNets have changed since the last one."""
        if self.cached and not self.knows(call):
            self._force_full(call)
        if not self.cached:
            self.seen[call.lane] = Seen.of(call)

    def _force_full(self, call: Call) -> None:
        if self.used_by_controlnet:
            raise Unsupported(
                f"{self.settings.name}: the denoiser's inputs changed within a step in which its ControlNet was cut short; "
                "change prompts and adapters between steps."
            )
        super()._force_full(call)

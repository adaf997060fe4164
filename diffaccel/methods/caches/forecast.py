"""Forecast: predict the end of the block stack from the last full evaluations instead of running the blocks.

Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers" (arXiv 2503.06923), on ONE tensor
instead of every attention and feed-forward output: Newton's polynomial of degree 1 or 2 through the values of the last full
evaluations, over noise and not over steps, so that uneven schedules need no care. The embedding, the time and the head
still run on every evaluation. On UNets the tensor is the one of the skip cache.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from diffaccel.engine.method import register
from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.caches.block_bypass import FeatureStore, bypass_to_norm
from diffaccel.methods.caches.cache_plan import (
    CachePlan,
    CacheSettings,
    Coordinate,
    note_whole_controlnets,
)
from diffaccel.methods.caches.residual_cache import attach_residual, refuse_divided
from diffaccel.methods.caches.skip_cache import SkipCache, attach_skip
from diffaccel.models.model_map import ModelMap
from diffaccel.models.transformers import TransformerLayout
from diffaccel.models.unet import UNetLayout


@register
class Forecast(CacheSettings):
    """Run the blocks only on full evaluations; between them their end result is extrapolated. Off: interval 1.

    Attributes:
        order: degree of the polynomial, through the last two (1) or three (2) full evaluations. After fewer, what there
            is decides: one alone is reused as it is.
        target: "features" predicts what the output norm reads and ignores the latents of the evaluation; "residual"
            predicts what the whole stack adds to the embedded latents, which are fresh. UNets know "features" only.
        coordinate: axis of the extrapolation, "log_sigma" or "flow_time" (s = sigma / (1 + sigma)). UNets always use log
            sigma; on the bundled flow model it is 3 dB closer at interval 3. There order 2 is 2 dB closer than order 1 at
            interval 2.
        full_first: evaluations at the start that are always full; order + 1 of them make the first forecast a full one.
    The other settings are those of every cache on a schedule; an evaluation is one denoiser call of the schedule. A full
    one is forced when guidance rows, prompt embeddings, adapters or the picture size change. ControlNets run whole; what
    they add between the blocks is predicted with the rest.

    Paper: Liu et al. (TaylorSeer), arXiv 2503.06923.
    """

    name: ClassVar[str] = "forecast"

    order: Literal[1, 2] = 1
    target: Literal["features", "residual"] = "features"
    coordinate: Coordinate = "log_sigma"
    full_first: int = Field(default=3, ge=1)

    def check(self, model: ModelMap) -> None:
        if not isinstance(model.layout, UNetLayout):
            if self.target == "residual":
                refuse_divided(self.name, model, 0)
            return
        if self.target == "residual":
            raise Unsupported('forecast: target "residual" needs a transformer; on UNets only "features" exists.')
        if self.coordinate == "flow_time":
            raise Unsupported("forecast: on UNets features are extrapolated in log sigma only.")
        self._on_unet().check(model)

    def _on_unet(self) -> SkipCache:
        shared = CacheSettings.model_fields.keys()
        return SkipCache(order=self.order, **{name: getattr(self, name) for name in shared})

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        if isinstance(model.layout, UNetLayout):
            run.note("forecast: on a UNet this is what skip_cache does with the same order.")
            attach_skip(self, self._on_unet().depth_for(model), self.order, (model, run, seams))
        elif self.target == "residual":
            attach_residual(self, (0, 0), self.order, self.coordinate, (model, run, seams))
        else:
            self._attach_features(model, run, seams)

    def _attach_features(self, model: ModelMap, run: Run, seams: Seams) -> None:
        store = FeatureStore(self.order)
        CachePlan(self, store, model, run, (self.name,), self.coordinate).attach()
        for _, layout in model.denoisers:
            if isinstance(layout, TransformerLayout):
                bypass_to_norm(layout, store, seams)
        note_whole_controlnets(model, run, self.name)

"""Skip cache: deep features change slowly, so most steps recompute only the outer skip branches.

UNets: Ma et al., "DeepCache" (arXiv 2312.00858). A full step stores one tensor F, the hidden state entering decoder layer
`depth` before its concatenation with skip `depth`; a cached step runs the encoder up to that skip, sets h = F and runs
the decoder layers depth, ..., 0. Transformers with long skips: Chen et al., "Skip-DiT" (arXiv 2411.17616). F is what
enters block L-k before its fuse; a cached step runs blocks 0..k-1, sets h = F and runs blocks L-k..L-1.
With order 1 or 2, F is extrapolated along the noise level from the last full steps (the idea of TaylorSeer, arXiv
2503.06923, on this one tensor). The network's own forward always runs: deeper blocks are bypassed, so time embeddings,
IP-Adapter, ControlNet residuals, LoRA scales and offload hooks need no special care.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from diffaccel.engine.method import register
from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.caches.bypass import Bypass, bypass_controlnet, bypass_unet
from diffaccel.methods.caches.cache_plan import CacheSettings
from diffaccel.methods.caches.long_skips import BlockBypass, bypass_blocks, bypass_control, usable_pairs
from diffaccel.methods.caches.skip_plan import SkipPlan
from diffaccel.models.model_map import Layout, ModelMap
from diffaccel.models.transformers import TransformerLayout, describe_control
from diffaccel.models.unet import UNetLayout


@register
class SkipCache(CacheSettings):
    """Recompute the deep part of the network only on full evaluations.

    Attributes:
        interval: a full evaluation at least every `interval` evaluations. Off: 1.
        depth: how much stays fresh. UNets: the number of a skip, 0 (outermost, cheapest) to the number of skips - 1.
            Transformers: how many outer pairs of blocks run, 1 (cheapest) to the number of long skips. None takes the
            default of the model family, 1 on transformers.
        schedule: "uniform"; "early" or "late" for the same number of full evaluations, denser at that end; or the
            evaluation indices that are full.
        window: (high, low) EDM sigma; cached evaluations only while low <= sigma <= high.
        order: 0 reuses F; 1 and 2 extrapolate it from the last two or three full evaluations, which are kept: along
            log sigma, on flow transformers along s = sigma / (1 + sigma). On the bundled UNet 1 is
            14 dB closer to the plain picture than 0 at interval 3.
        full_first, full_last: evaluations at the start and end of the run that are always full.
        min_evaluations: shorter runs are not cached (few-step models lose their picture); a warning and the report say so.
    An evaluation is one denoiser call of the schedule: two-stage solvers have two per step. A full one is forced when
    guidance rows, prompt embeddings, ControlNet inputs, adapters, LoRA scales, FreeU or the picture size change; when
    adaptive guidance ends for good, the conditional rows of F stay in use instead.

    Papers: Ma et al. (DeepCache), arXiv 2312.00858; Chen et al. (Skip-DiT), arXiv 2411.17616.
    """

    name: ClassVar[str] = "skip_cache"

    depth: int | None = Field(default=None, ge=0)
    order: Literal[0, 1, 2] = 1

    def check(self, model: ModelMap) -> None:
        depth, kind = self.depth_for(model), "UNet" if isinstance(model.layout, UNetLayout) else "transformer"
        for network, layout in model.denoisers:
            depths = _depths(network, layout)
            if depth not in depths:
                raise Unsupported(
                    f"skip_cache: depth {depth} does not exist; this {kind} has depths {depths[0]} to {depths[-1]}."
                )

    def depth_for(self, model: ModelMap) -> int:
        """The depth used on this model."""
        if self.depth is not None:
            return self.depth
        depths = _depths(model.denoiser, model.layout)
        return max(depths[0], min(model.convention.default_depth, depths[-1]))

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        attach_skip(self, self.depth_for(model), self.order, (model, run, seams))


def attach_skip(settings: CacheSettings, depth: int, order: int, where: tuple[ModelMap, Run, Seams]) -> None:
    """Cache one tensor at `depth` by the schedule of `settings`, under whose name everything is counted."""
    model, run, seams = where
    if isinstance(model.layout, UNetLayout):
        bypass = Bypass(order)
        whole = _attach_to_unet(model, depth, bypass, seams)
    else:
        bypass = BlockBypass(order)
        whole = _attach_to_transformers(model, depth, bypass, seams)
    for net in whole:
        run.note(f"{settings.name}: {type(net).__name__} always runs whole.")
    SkipPlan(settings, bypass, (model, run), ("skip", depth), whole).attach()


def _attach_to_unet(model: ModelMap, depth: int, bypass: Bypass, seams: Seams) -> list[nn.Module]:
    """Returns the ControlNets that cannot stop early."""
    bypass_unet(model.unet(SkipCache.name), depth, bypass, seams)
    for net, layout in model.controlnets:
        if layout is not None:
            bypass_controlnet(net, layout, depth, bypass, seams)
    return [net for net, layout in model.controlnets if layout is None]


def _attach_to_transformers(model: ModelMap, depth: int, bypass: BlockBypass, seams: Seams) -> list[nn.Module]:
    """Returns the ControlNets that cannot stop early."""
    for _, layout in model.denoisers:
        if isinstance(layout, TransformerLayout):
            bypass_blocks(layout, depth, bypass, seams)
    described = [(net, describe_control(net)) for net, _ in model.controlnets]
    for _, control in described:
        if control is not None:
            bypass_control(control, depth, bypass, seams)
    return [net for net, control in described if control is None]


def _depths(network: nn.Module, layout: Layout) -> range:
    """Depths that a skip cache can use on this network."""
    if isinstance(layout, UNetLayout):
        return range(layout.depths)
    if not layout.long_skips:
        raise Unsupported(
            f"skip_cache needs long skips and {type(network).__name__} has none; use ResidualCache or Forecast, or give it "
            "trained ones with diffaccel.add_skip_branches."
        )
    return range(1, usable_pairs(layout) + 1)

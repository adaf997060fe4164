"""Residual cache: what the inner blocks of a transformer add to the hidden state changes slowly, so it is stored.

Transformers without long skips have no shallow path for a fresh input, but the residual stream is one: on cached
evaluations the first and last blocks run, and the inner ones become h + d, with d = (what left them) - (what entered) of
the last full evaluation, for the image and the text stream. Known as residual-delta or dual-block caching (Chen et al.,
Delta-DiT, arXiv 2406.01125, on ranges of blocks). With order 1 or 2, d is extrapolated over the last full evaluations.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from diffaccel.engine.method import register
from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.caches.block_bypass import ResidualStore, bypass_part, check_part
from diffaccel.methods.caches.cache_plan import (
    CachePlan,
    CacheSettings,
    Coordinate,
    default_coordinate,
    note_whole_controlnets,
)
from diffaccel.models.model_map import ModelMap, is_spread
from diffaccel.models.transformers import TransformerLayout


@register
class ResidualCache(CacheSettings):
    """Recompute the inner blocks of a diffusion transformer only on full evaluations. Off: interval 1.

    Attributes:
        keep_first, keep_last: main blocks at both ends that run on every evaluation, counted over all stacks.
        order: 0 reuses d; 1 and 2 extrapolate it from the last two or three full evaluations, which are kept.
        coordinate: axis of the extrapolation, "log_sigma" or "flow_time" (s = sigma / (1 + sigma)); None takes flow time
            on flow models and log sigma on the others.
    The other settings are those of every cache on a schedule; an evaluation is one denoiser call of the schedule. A full
    one is forced when guidance rows, prompt embeddings, adapters or the picture size change. ControlNets run whole; what
    they add inside the inner blocks is cached with d. Memory: 2 * (order + 1) hidden states per network call and stream.

    Paper: Chen et al. (Delta-DiT), arXiv 2406.01125.
    """

    name: ClassVar[str] = "residual_cache"

    keep_first: int = Field(default=1, ge=0)
    keep_last: int = Field(default=1, ge=0)
    order: Literal[0, 1, 2] = 1
    coordinate: Coordinate | None = None

    def check(self, model: ModelMap) -> None:
        model.transformer(self.name)
        for _, layout in model.denoisers:
            if isinstance(layout, TransformerLayout):
                check_part(self.name, layout, self.keep_first, self.keep_last)
        refuse_divided(self.name, model, self.keep_first)

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        attach_residual(self, (self.keep_first, self.keep_last), self.order, self.coordinate, (model, run, seams))


def refuse_divided(name: str, model: ModelMap, keep_first: int) -> None:
    """Raise `Unsupported` if what enters the cached part may be whole while what leaves it is one process's share."""
    if keep_first == 0 and any(is_spread(network) for network, _ in model.denoisers):
        raise Unsupported(
            f"{name}: under context parallelism the first block may be the one that divides the tokens between processes, "
            "so it cannot be part of what a residual stands for."
        )


def attach_residual(
    settings: CacheSettings,
    keep: tuple[int, int],
    order: int,
    coordinate: Coordinate | None,
    where: tuple[ModelMap, Run, Seams],
) -> None:
    """Cache all blocks but the first `keep[0]` and the last `keep[1]` by the schedule of `settings`."""
    model, run, seams = where
    store = ResidualStore(order)
    tag = (settings.name, *keep)
    CachePlan(settings, store, model, run, tag, coordinate or default_coordinate(model)).attach()
    for _, layout in model.denoisers:
        if isinstance(layout, TransformerLayout):
            bypass_part(layout, keep[0], len(layout.blocks) - keep[1] - 1, store, seams)
    note_whole_controlnets(model, run, settings.name)

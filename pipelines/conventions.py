"""How pipelines call their networks: data, one entry per family.

Entries with a `refusal` are known not to work; the sentence says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Convention:
    """Calling convention of a pipeline family.

    Attributes:
        family: name used in reports and presets.
        denoiser: attribute of the pipeline that holds the denoiser.
        others: attributes of further denoisers that take over during a run (Wan 2.2); they may be None.
        sample: argument of the denoiser with the noisy latents.
        calls: "stacked": one call with the guidance branches stacked along the batch; "separate": one call per branch,
            conditional first.
        row_order: guidance branches in the order they are stacked along the batch; ("cond",) for families without
            classifier-free guidance, whose calls hold some of the pictures at a time.
        batched: arguments of the denoiser and ControlNet that have one row per batch row; "a.b" is entry "b" of a dictionary "a".
        shared: dictionary entries, named in the same way, that are the same for all rows whatever their size.
        listed: arguments that are lists with one entry per batch row. If `sample` is among them, so is the prediction.
        lengths: masks whose number of ones, not only whose shape, decides how much the network computes.
        scheduler_time: True if the `timestep` argument is in the scheduler's own units.
        prediction_sign: -1 if the pipeline negates the prediction before the scheduler sees it.
        images: number of pictures from the pipeline call's arguments, for pipelines without `prepare_latents`.
        pipelines: class names; base classes count too.
        mixins: names of base classes that decide, whatever the other ones are.
        schedule: key of the published timestep lists in diffusers' `AysSchedules` that fit this family.
        default_depth: depth at which a skip cache starts, chosen by the FLOP shares of the family.
        refusal: if set, the family is not supported and this is the reason.
    """

    family: str
    denoiser: str
    others: tuple[str, ...] = ()
    sample: str = "sample"
    calls: Literal["stacked", "separate"] = "stacked"
    row_order: tuple[str, ...] = ("uncond", "cond")
    batched: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset(
        {"cross_attention_kwargs.ip_adapter_masks", "joint_attention_kwargs.ip_adapter_masks"}
    )
    listed: frozenset[str] = frozenset()
    lengths: frozenset[str] = frozenset()
    scheduler_time: bool = True
    prediction_sign: int = 1
    images: Callable[[Mapping[str, Any]], int] | None = None
    pipelines: tuple[str, ...] = ()
    mixins: tuple[str, ...] = ()
    schedule: str | None = None
    default_depth: int = 0
    refusal: str | None = None

"""How pipelines call their networks: data, one entry per family.

A pipeline is found by its class name or by the names of its base classes, then by its denoiser. Entries with a `refusal`
are known not to work; the sentence says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffaccel.errors import Unsupported


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
        row_order: guidance branches in the order they are stacked along the batch.
        batched: arguments of the denoiser and ControlNet that have one row per batch row.
        listed: arguments that are lists with one entry per batch row. If `sample` is among them, so is the prediction.
        lengths: masks whose number of ones, not only whose shape, decides how much the network computes.
        scheduler_time: True if the `timestep` argument is in the scheduler's own units.
        prediction_sign: -1 if the pipeline negates the prediction before the scheduler sees it.
        images: number of pictures from the pipeline call's arguments, for pipelines without `prepare_latents`.
        pipelines: class names; base classes count too.
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
    listed: frozenset[str] = frozenset()
    lengths: frozenset[str] = frozenset()
    scheduler_time: bool = True
    prediction_sign: int = 1
    images: Callable[[Mapping[str, Any]], int] | None = None
    pipelines: tuple[str, ...] = ()
    schedule: str | None = None
    default_depth: int = 0
    refusal: str | None = None


def find_convention(pipe: Any) -> Convention:
    """Convention of a pipeline.

    Raises:
        Unsupported: the family is refused, or nothing matches.
    """
    from diffaccel.pipelines import diffusion_transformers as transformers  # noqa: PLC0415  (they import this file)
    from diffaccel.pipelines.stable_diffusion import CONVENTIONS, GENERIC_UNET  # noqa: PLC0415

    names = [cls.__name__ for cls in type(pipe).__mro__]
    for name in names:
        for convention in (*CONVENTIONS, *transformers.CONVENTIONS):
            if name in convention.pipelines:
                return _accepted(convention, type(pipe).__name__)
    if type(getattr(pipe, "unet", None)).__name__ in ("UNet2DConditionModel", "OptimizedModule"):
        return GENERIC_UNET
    raise Unsupported(
        f"{type(pipe).__name__} is not supported; supported are pipelines around a UNet2DConditionModel and the "
        f"diffusion transformers {', '.join(c.family for c in transformers.CONVENTIONS if not c.refusal)}."
    )


def _accepted(convention: Convention, name: str) -> Convention:
    if convention.refusal:
        raise Unsupported(f"{name} is not supported: {convention.refusal}")
    return convention

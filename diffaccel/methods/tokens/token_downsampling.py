"""Token downsampling: self-attention with all queries but only every f-th key and value per axis.

Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images" (arXiv 2402.13573). The
reduced tokens are passed as `encoder_hidden_states` of the self-attention, so its own processor, LoRA layers included,
stays in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.methods.tokens.sites import MinTokens, TokenSites
from diffaccel.models.call import Call
from diffaccel.models.model_map import ModelMap


@register
class TokenDownsampling(Method):
    """Shorten keys and values of self-attention.

    Attributes:
        factor: stride per axis; keys and values shrink by its square. Off: 1.
        reduction: "nearest" takes the first token of each cell, "average" the mean of its tokens.
        min_tokens: shorten self-attentions on at least so many tokens, or "measured": those where a timing on this
            machine says it pays.
        start_fraction, stop_fraction: shares of the run between which keys are shortened.

    Paper: Smith et al. (ToDo), arXiv 2402.13573.
    """

    name: ClassVar[str] = "token_downsampling"
    layer: ClassVar[Layer] = Layer.TOKENS
    by_token: ClassVar[bool] = True

    factor: int = Field(default=2, ge=1, le=8)
    reduction: Literal["nearest", "average"] = "nearest"
    min_tokens: MinTokens = Field(default="measured")
    start_fraction: float = Field(default=0.0, ge=0, le=1)
    stop_fraction: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> TokenDownsampling:
        if self.start_fraction > self.stop_fraction:
            raise ValueError("start_fraction must not be above stop_fraction")
        return self

    @property
    def is_off(self) -> bool:
        return self.factor == 1

    def check(self, model: ModelMap) -> None:
        attention = model.unet(self.name).attention
        if not attention:
            raise Unsupported("token_downsampling: this denoiser has no self-attention to shorten.")
        # the processor tells: unfuse_qkv_projections() leaves the attention's own flag set
        processors = (getattr(a, "processor", None) for s in attention for a in s.self_attentions)
        if any(type(processor).__name__.startswith("Fused") for processor in processors):
            raise Unsupported(
                "token_downsampling needs separate query and key projections; call unfuse_qkv_projections() first."
            )

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        self.check(model)  # projections may have been fused since wrap()
        settings = (self.factor, self.reduction)
        sites = TokenSites(self.name, model, run, lambda: _Downsampler(self), settings, self.min_tokens)
        sites.attach(seams)

        def around(call: Call, proceed: Proceed) -> Any:
            return sites.around(call, proceed, enabled=self.start_fraction <= run.clock.fraction < self.stop_fraction)

        run.around("denoiser", Layer.TOKENS, around)


class _Downsampler:
    """Keys of one token grid."""

    def __init__(self, config: TokenDownsampling) -> None:
        self.config = config
        self.height, self.width = 0, 0

    def prepare(self, features: torch.Tensor, branches: int) -> None:
        """Learn the grid."""
        self.height, self.width = features.shape[-2:]

    def attend(self, original: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Self-attention with short keys."""
        reduce = nearest_tokens if self.config.reduction == "nearest" else average_tokens
        keys = reduce(hidden, self.height, self.width, self.config.factor)
        output: torch.Tensor = original(hidden, encoder_hidden_states=keys, **kwargs)
        return output


def nearest_tokens(tokens: torch.Tensor, height: int, width: int, factor: int) -> torch.Tensor:
    """Every `factor`-th token of each axis: (rows, h * w, c) to (rows, ceil(h / f) * ceil(w / f), c)."""
    rows, _, channels = tokens.shape
    return tokens.reshape(rows, height, width, channels)[:, ::factor, ::factor].flatten(1, 2)


def average_tokens(tokens: torch.Tensor, height: int, width: int, factor: int) -> torch.Tensor:
    """Mean of each factor x factor cell, cells at the border being smaller; shapes as `nearest_tokens`."""
    rows, _, channels = tokens.shape
    image = tokens.transpose(1, 2).reshape(rows, channels, height, width)
    pooled = torch.nn.functional.avg_pool2d(image, factor, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2)

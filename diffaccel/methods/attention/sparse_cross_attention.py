"""Sparse cross-attention: text attention extrapolated from dense to sparse, without another network pass.

Kim and Sim, "Pushing the Limits of Attention in Diffusion Models at Inference Time by Leveraging Sparsity" (PLADIS, arXiv
2503.07677). softmax(z) becomes softmax(z) + scale (entmax(z) - softmax(z)): weights that sum to 1 and may be negative,
which sharpens what each image token takes from the prompt. Better pictures, not faster ones: the report shows the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.kernels.sparse_softmax import extra_flops, sparse_softmax
from diffaccel.models.call import Call
from diffaccel.models.cross_attention import CrossSite, cross_sites, text_tokens
from diffaccel.models.model_map import ModelMap


@register
class SparseCrossAttention(Method):
    """Extrapolate the cross-attention to text towards a sparse one.

    Attributes:
        scale: 1 is the sparse attention itself, the authors use 2, above 3 texture gets smooth. Off: 0.
        alpha: which sparse attention: 1.5 is entmax as in the paper, 2.0 is sparsemax, which drops more words.
        start_fraction, stop_fraction: shares of the run between which attention is extrapolated.
    Works on UNets and on transformers with separate cross-attention (PixArt, Sana, HunyuanDiT).

    Paper: Kim and Sim (PLADIS), arXiv 2503.07677.
    """

    name: ClassVar[str] = "sparse_cross_attention"
    layer: ClassVar[Layer] = Layer.ATTENTION
    by_token: ClassVar[bool] = True

    scale: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    alpha: float = Field(default=1.5, ge=1.5, le=2)
    start_fraction: float = Field(default=0.0, ge=0, le=1)
    stop_fraction: float = Field(default=1.0, ge=0, le=1)

    @field_validator("alpha")
    @classmethod
    def _known(cls, alpha: float) -> float:
        if alpha not in (1.5, 2.0):
            raise ValueError("alpha is 1.5 or 2.0")
        return alpha

    @model_validator(mode="after")
    def _ordered(self) -> SparseCrossAttention:
        if self.start_fraction > self.stop_fraction:
            raise ValueError("start_fraction must not be above stop_fraction")
        return self

    @property
    def is_off(self) -> bool:
        return self.scale == 0

    def check(self, model: ModelMap) -> None:
        for network, layout in model.denoisers:
            cross_sites(self.name, network, layout)

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        sites = {id(network): cross_sites(self.name, network, layout) for network, layout in model.denoisers}
        state = _State(self, run, sites)
        for found in sites.values():
            for site in found:
                seams.replace_forward(site.attention, lambda forward: _Patch(state, forward).forward)
        run.around("denoiser", Layer.ATTENTION, state.around)


class _State:
    """Whether the current call is extrapolated."""

    def __init__(self, config: SparseCrossAttention, run: Run, sites: dict[int, tuple[CrossSite, ...]]) -> None:
        self.config, self.run, self.sites = config, run, sites
        self.active = False

    def around(self, call: Call, proceed: Proceed) -> Any:
        """Run one denoiser call, extrapolated inside the window."""
        config = self.config
        active = config.start_fraction <= self.run.clock.fraction < config.stop_fraction
        self.run.count(config.name, **{"sparse evaluations" if active else "dense evaluations": 1})
        if not active:
            return proceed(call)
        self.active = True
        try:
            return proceed(call.tagged((config.name, config.scale, config.alpha), saved_flops=-self._extra(call)))
        finally:
            self.active = False

    def _extra(self, call: Call) -> int:
        """FLOPs on top of dense cross-attention."""
        queries = sum(site.attention.heads * site.queries(call) for site in self.sites[call.lane[0]])
        return extra_flops(call.rows * queries * text_tokens(call))


class _Patch:
    """One cross-attention. All instances share one forward function, so compiled blocks share their graphs."""

    def __init__(self, state: _State, original: Callable[..., Any]) -> None:
        self.state, self.original = state, original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, whose softmax attention is replaced while it runs."""
        if not self.state.active:
            return self.original(*args, **kwargs)
        calls: list[int] = []
        with _Extrapolation(self.state.config, calls):
            output = self.original(*args, **kwargs)
        if len(calls) != 1:
            raise Unsupported(
                f"sparse_cross_attention: a cross-attention called torch's scaled_dot_product_attention {len(calls)} times "
                "instead of once; use diffusers' default attention processors, without slicing or xformers."
            )
        return output


class _Extrapolation(TorchFunctionMode):
    """Stands in for `scaled_dot_product_attention` inside one module; projections, norms and LoRA stay its own."""

    def __init__(self, config: SparseCrossAttention, calls: list[int]) -> None:
        super().__init__()
        self.config, self.calls = config, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls.append(1)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Arguments as torch's function has them."""
        if dropout_p or is_causal or any(kwargs.values()):
            raise Unsupported("sparse_cross_attention does not know attention with dropout, causal or grouped heads.")
        bias = None if attn_mask is None else _key_bias(attn_mask, query.shape[0])
        return sparse_softmax(query, key, value, bias, scale=scale, weight=self.config.scale, alpha=self.config.alpha)


def _key_bias(mask: torch.Tensor, rows: int) -> torch.Tensor:
    """A mask over keys, broadcast over heads and queries, as what is added to their scores: (rows, keys) fp32."""
    if mask.dim() != 4 or mask.shape[2] != 1:
        raise Unsupported("sparse_cross_attention knows masks over text tokens only, the same for all image tokens.")
    keys = mask[:, 0, 0]
    if keys.dtype == torch.bool:
        keys = torch.zeros_like(keys, dtype=torch.float32).masked_fill_(~keys, float("-inf"))
    return keys.float().expand(rows, -1)

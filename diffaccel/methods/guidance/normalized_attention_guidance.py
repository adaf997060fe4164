"""Normalised attention guidance: a negative prompt without classifier-free guidance, inside the attention to the text.

Chen et al., "Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models" (arXiv 2505.21179). What image
tokens take from the prompt is pushed away from what they would take from the negative prompt, and kept from growing
(kernels/nag_blend.py). So few-step and distilled models, which run at guidance scale 1, get negative prompts.

Two ways to the second attention. Separate cross-attention: the negative text follows the prompt along the token axis of the
denoiser's text input, and each cross-attention splits it again; only this attention is done twice. Joint attention (SD3,
FLUX): the text changes from block to block, so each image gets a second row, whose text is the negative one; after every
attention both rows get the same guided image tokens. Of the pooled text both rows see the prompt's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from diffaccel.engine.method import Method, register
from diffaccel.engine.run import Layer, Proceed, Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.kernels.nag_blend import blend_flops, nag_blend
from diffaccel.methods.guidance.negative_text import Negative
from diffaccel.models.call import Call, map_output
from diffaccel.models.cross_attention import (
    CrossSite,
    JointSite,
    caption_flops,
    cross_sites,
    joint_sites,
    negative_text,
)
from diffaccel.models.model_map import ModelMap

Forward = Callable[..., Any]


@register
class NormalizedAttentionGuidance(Method):
    """Negative prompts at guidance scale 1.

    Attributes:
        negative_prompt: what to keep out of the pictures, used if the pipeline's own `negative_prompt` is empty.
        scale: how far attention is pushed away from the negative text. Off: 1.
        tau: how many times longer than before the attention output of a token may become.
        alpha: share of the pushed output in the result. Off: 0.
        start_fraction, stop_fraction: shares of the run between which attention is guided; an early stop is cheaper.
    Works on UNets, PixArt, SD3 and FLUX. Classifier-free guidance must be off: it has a negative prompt of its own.

    Paper: Chen et al. (NAG), arXiv 2505.21179.
    """

    name: ClassVar[str] = "normalized_attention_guidance"
    layer: ClassVar[Layer] = Layer.GUIDANCE
    by_token: ClassVar[bool] = True

    negative_prompt: str = ""
    scale: float = Field(default=3.0, ge=1, allow_inf_nan=False)
    tau: float = Field(default=2.5, ge=1)
    alpha: float = Field(default=0.375, ge=0, le=1)
    start_fraction: float = Field(default=0.0, ge=0, le=1)
    stop_fraction: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> NormalizedAttentionGuidance:
        if self.start_fraction > self.stop_fraction:
            raise ValueError("start_fraction must not be above stop_fraction")
        return self

    @property
    def is_off(self) -> bool:
        return self.scale == 1 or self.alpha == 0

    def check(self, model: ModelMap) -> None:
        for network, layout in model.denoisers:
            negative_text(self.name, network, layout)
            if not joint_sites(self.name, network):
                cross_sites(self.name, network, layout)
        if not hasattr(model.pipe, "encode_prompt"):
            raise Unsupported(
                f"{self.name}: {type(model.pipe).__name__} has no encode_prompt to ask for a negative text."
            )

    def attach(self, model: ModelMap, run: Run, seams: Seams) -> None:
        self.check(model)  # adapters may have come since the pipeline was wrapped
        network, layout = model.denoisers[0]
        where = negative_text(self.name, network, layout)
        # kept, because a pipeline encodes its prompt once for all runs of the scheduler, or before the next one begins
        text = run.kept.setdefault(self.name, Negative(self.name, self.negative_prompt, model.pipe, run, where))
        seams.wrap_method(model.pipe, "encode_prompt", text.encode)
        joint = joint_sites(self.name, network)
        guided: _Guided
        if joint:
            guided = _JointGuided(self, run, text, model.transformer(self.name).patch, joint, seams)
        else:
            guided = _CrossGuided(self, run, text, network, cross_sites(self.name, network, layout), seams)
        # guidance methods stand outside (they cut rows); whatever stores something per row stands inside
        run.around("denoiser", Layer.STEP, guided.around)
        run.around("denoiser", Layer.ATTENTION, guided.account)


class _Guided:
    """Decides for every call of the denoiser, and counts."""

    def __init__(self, config: NormalizedAttentionGuidance, run: Run, text: Negative) -> None:
        self.config, self.run, self.text = config, run, text
        self.blend = functools.partial(nag_blend, scale=config.scale, tau=config.tau, alpha=config.alpha)
        self.active = False

    def around(self, call: Call, proceed: Proceed) -> Any:
        """One call of the denoiser: guided inside the window."""
        if call.branches != ("cond",):
            raise Unsupported(
                f"{self.config.name} works without classifier-free guidance, which has a negative prompt of its own; call "
                "the pipeline with guidance_scale=1 (true_cfg_scale=1)."
            )
        inside = self.config.start_fraction <= self.run.clock.fraction < self.config.stop_fraction
        self.run.count(self.config.name, **{"guided" if inside else "unguided": 1})
        return self.guide(call, proceed) if inside else proceed(call)

    def guide(self, call: Call, proceed: Proceed) -> Any:
        """The call with both texts."""
        raise NotImplementedError

    def account(self, call: Call, proceed: Proceed) -> Any:
        """Innermost, where other methods have cut rows already: what the guidance costs on top of a plain call."""
        return proceed(call.tagged(saved_flops=-call.rows * self.extra(call)) if self.active else call)

    def extra(self, call: Call) -> int:
        """FLOPs for each row that a plain call would not have needed."""
        raise NotImplementedError

    def settings(self) -> tuple[Any, ...]:
        """Tag of guided calls."""
        return self.config.name, self.config.scale, self.config.tau, self.config.alpha

    def running(self, proceed: Proceed, call: Call) -> Any:
        """Run the call with guided attention."""
        self.active = True
        try:
            return proceed(call)
        finally:
            self.active = False


class _CrossGuided(_Guided):
    """Separate cross-attention: both texts one after the other along the tokens."""

    def __init__(
        self,
        config: NormalizedAttentionGuidance,
        run: Run,
        text: Negative,
        network: nn.Module,
        sites: tuple[CrossSite, ...],
        seams: Seams,
    ) -> None:
        super().__init__(config, run, text)
        self.sites, self.caption_flops = sites, caption_flops(network)
        self.tokens = 0  # of the prompt
        for site in sites:
            patch = _CrossPatch(self)
            seams.replace_forward(site.attention, patch.at_attention)
            seams.replace_forward(site.attention.to_q, patch.at_query)
            seams.replace_forward(site.attention.to_out[0], patch.at_projection)

    def guide(self, call: Call, proceed: Proceed) -> Any:
        prompt, negative = call.arguments["encoder_hidden_states"], self.text.of(call)
        self.tokens = prompt.shape[1]
        changed = {"encoder_hidden_states": torch.cat([prompt, negative], dim=1)}
        mask = call.arguments.get("encoder_attention_mask")
        if mask is not None:
            other = mask.new_ones(negative.shape[:2]) if self.text.mask is None else self.text.mask.to(mask)
            changed["encoder_attention_mask"] = torch.cat([mask, other], dim=1)
        return self.running(proceed, replace(call.tagged(self.settings()), arguments={**call.arguments, **changed}))

    def extra(self, call: Call) -> int:
        """The second attentions, their keys and values, the blends, and the layers that the text passes before."""
        negative = call.arguments["encoder_hidden_states"].shape[1] - self.tokens
        total: int = 0
        for site in self.sites:
            queries, width = site.queries(call), site.attention.inner_dim
            read = site.attention.cross_attention_dim
            total += 4 * queries * negative * width + 4 * negative * read * width + blend_flops(queries * width)
        return int(total + negative * self.caption_flops)


class _CrossPatch:
    """One cross-attention: queries are made once, both attentions run in its own processor, and the outputs are blended.

    All instances share three forward functions, so compiled blocks share their graphs.
    """

    def __init__(self, guided: _CrossGuided) -> None:
        self.guided = guided
        self.phase = ""  # "negative" and "positive" while a guided attention runs
        self.query: torch.Tensor | None = None
        self.negative: torch.Tensor | None = None
        self.attention: Forward
        self.to_q: Forward
        self.to_out: Forward

    def at_attention(self, original: Forward) -> Forward:
        """Seam of the whole module."""
        self.attention = original
        return self.attend

    def at_query(self, original: Forward) -> Forward:
        """Seam of `to_q`."""
        self.to_q = original
        return self.make_query

    def at_projection(self, original: Forward) -> Forward:
        """Seam of the output projection, whose input are the outputs of all heads side by side."""
        self.to_out = original
        return self.project

    def attend(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The module's forward."""
        if not self.guided.active or encoder_hidden_states is None:
            return self.attention(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        split = self.guided.tokens
        prompt, other = encoder_hidden_states[:, :split], encoder_hidden_states[:, split:]
        masks = (None, None) if attention_mask is None else (attention_mask[..., :split], attention_mask[..., split:])
        try:
            self.phase = "negative"
            self.attention(hidden_states, other, masks[1], **kwargs)
            self.phase = "positive"
            return self.attention(hidden_states, prompt, masks[0], **kwargs)
        finally:
            self.phase, self.query, self.negative = "", None, None

    def make_query(self, *args: Any, **kwargs: Any) -> Any:
        """The queries of both attentions are the same."""
        if self.phase == "positive" and self.query is not None:
            return self.query
        query = self.to_q(*args, **kwargs)
        if self.phase == "negative":
            self.query = query
        return query

    def project(self, merged: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Only the blend is projected."""
        if self.phase == "negative":
            self.negative = merged
            return merged
        if self.phase == "positive" and self.negative is not None:
            merged = self.guided.blend(merged, self.negative)
        return self.to_out(merged, *args, **kwargs)


class _JointGuided(_Guided):
    """Joint attention: a second row for each picture, with the negative text."""

    def __init__(
        self,
        config: NormalizedAttentionGuidance,
        run: Run,
        text: Negative,
        patch: int,
        sites: tuple[JointSite, ...],
        seams: Seams,
    ) -> None:
        super().__init__(config, run, text)
        self.sites, self.patch = sites, patch
        self.tokens = 0  # of a text
        for site in sites:
            seam = _JointPatch(self)
            if site.text_first:
                seams.replace_forward(site.attention, seam.at_attention)
            else:
                seams.replace_forward(site.attention.to_out[0], seam.at_projection)

    def guide(self, call: Call, proceed: Proceed) -> Any:
        prompt, negative = call.arguments["encoder_hidden_states"], self.text.of(call)
        if negative.shape != prompt.shape:
            raise Unsupported(
                f"{self.config.name}: the negative text has {negative.shape[1]} tokens and the prompt {prompt.shape[1]}; in "
                "joint attention both need the same number."
            )
        self.tokens, rows = prompt.shape[1], call.rows
        # one row of text may stand for several pictures: the network's modulations repeat it
        prompt, negative = (text.expand(rows, -1, -1) for text in (prompt, negative))
        doubled = call.rows_of([*range(rows), *range(rows)]).tagged(self.settings())
        arguments = {**doubled.arguments, "encoder_hidden_states": torch.cat([prompt, negative])}
        output = self.running(proceed, replace(doubled, arguments=arguments, branches=("cond", "negative")))
        return map_output(output, lambda prediction: prediction[:rows])

    def extra(self, call: Call) -> int:
        """The blends; the second rows count as rows."""
        packed = call.sample.dim() == 3  # (rows, tokens, channels)
        tokens = call.sample.shape[1] if packed else math.prod(side // self.patch for side in call.sample.shape[-2:])
        return blend_flops(tokens * sum(site.attention.inner_dim for site in self.sites)) // 2

    def blended(self, image: torch.Tensor) -> torch.Tensor:
        """Both rows of every picture get the same guided image tokens."""
        positive, negative = image.chunk(2)
        guided: torch.Tensor = self.blend(positive, negative)
        return torch.cat([guided, guided])


class _JointPatch:
    """One joint attention."""

    def __init__(self, guided: _JointGuided) -> None:
        self.guided = guided
        self.original: Forward

    def at_attention(self, original: Forward) -> Forward:
        """Seam of a module that returns text and image tokens in one sequence."""
        self.original = original
        return self.attend

    def at_projection(self, original: Forward) -> Forward:
        """Seam of the output projection of the image tokens."""
        self.original = original
        return self.project

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        output = self.original(*args, **kwargs)
        if not self.guided.active:
            return output
        text = self.guided.tokens
        return torch.cat([output[:, :text], self.guided.blended(output[:, text:])], dim=1)

    def project(self, merged: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The projection's forward."""
        return self.original(self.guided.blended(merged) if self.guided.active else merged, *args, **kwargs)

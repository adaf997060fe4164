"""What token merging must know about a diffusion transformer: where image tokens attend, and how positions enter.

Everything here was read in diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.call import Call
from diffaccel.models.compiled import is_compiled
from diffaccel.models.transformers import describe_transformer

Bias = Literal["rows", "heads", "none"]


@dataclass(frozen=True)
class MergeSite:
    """One attention among image tokens.

    Attributes:
        attention: the module, called with `hidden_states`.
        block: number of its block, counted over all stacks.
        kind: sites of one kind have the same shapes.
        joint: its sequence holds the text tokens in front of the image tokens; else `hidden_states` are image tokens.
    """

    attention: Any
    block: int
    kind: str
    joint: bool


@dataclass(frozen=True)
class MergeFacts:
    """Token merging's view of one transformer.

    Attributes:
        sites: in call order.
        blocks: number of main blocks.
        rotary: argument of the attention with a table (cos, sin) of one row per token of the sequence; None if positions
            are in the tokens.
        bias: how a number per key reaches the scores: as `attention_mask` (rows, 1, keys), as `attention_mask` (rows, 1, 1,
            keys), or not at all with the stock processor.
        packed: the latents are tokens already.
        grid: token grid (height, width) of a call.
    """

    sites: tuple[MergeSite, ...]
    blocks: int
    rotary: str | None
    bias: Bias
    packed: bool
    grid: Callable[[Call], tuple[int, int]]


@dataclass(frozen=True)
class _Entry:
    """Names of one class. `attentions`: (list of blocks, attribute of the block, joint)."""

    attentions: tuple[tuple[str, str, bool], ...]
    bias: Bias
    rotary: str | None = None
    packed: bool = False


_ENTRIES = {
    "SD3Transformer2DModel": _Entry(
        (("transformer_blocks", "attn", False), ("transformer_blocks", "attn2", False)), bias="none"
    ),
    "FluxTransformer2DModel": _Entry(
        (("transformer_blocks", "attn", False), ("single_transformer_blocks", "attn", True)),
        bias="heads",
        rotary="image_rotary_emb",
        packed=True,
    ),
    "PixArtTransformer2DModel": _Entry((("transformer_blocks", "attn1", False),), bias="rows"),
}
_LINEAR = "its self-attention is linear in the tokens already, so there is next to nothing to save."
_PROCESSOR = "its attention rotates tokens by tables that its processors keep per row, which has not been worked out."
_VIDEO = "which tokens of a video may be merged over time has not been worked out."
_REFUSALS = {
    "SanaTransformer2DModel": _LINEAR,
    "HunyuanDiT2DModel": _PROCESSOR,
    "LuminaNextDiT2DModel": _PROCESSOR,
    "Lumina2Transformer2DModel": _PROCESSOR,
    "ZImageTransformer2DModel": _PROCESSOR,
    "QwenImageTransformer2DModel": "its attention takes the masks and the rotary tables of text and image apart.",
    "CogView4Transformer2DModel": "its attention projects text and image together, which has not been worked out.",
    "Flux2Transformer2DModel": "its single blocks make queries, keys, values and the MLP in one projection.",
    "WanTransformer3DModel": _VIDEO,
    "CogVideoXTransformer3DModel": _VIDEO,
}


def merge_facts(method: str, network: nn.Module) -> MergeFacts:
    """Where tokens can be merged in this transformer.

    Raises:
        Unsupported: in this transformer, or the way it is set up now, they cannot.
    """
    name = type(network).__name__
    entry, layout = _ENTRIES.get(name), describe_transformer(network)
    if entry is None or layout is None:
        why = _REFUSALS.get(name, "where its image tokens attend has not been worked out.")
        raise Unsupported(f"{method} does not work on {name}: {why}")
    reason = _refuse_setup(network)
    if reason:
        raise Unsupported(f"{method} cannot run on this {name}: {reason}")
    number = {id(block): i for i, block in enumerate(layout.blocks)}
    sites = [
        MergeSite(attention, number[id(block)], f"{blocks}.{attribute}", joint)
        for blocks, attribute, joint in entry.attentions
        for block in getattr(network, blocks)
        if (attention := getattr(block, attribute)) is not None
    ]
    sites.sort(key=lambda site: site.block)

    def grid(call: Call) -> tuple[int, int]:
        if entry.packed:
            ids = call.arguments["img_ids"]
            tokens = call.sample.shape[1]
            height = int(ids.reshape(-1, ids.shape[-1])[:tokens, 1].max()) + 1
            return height, tokens // height
        height, width = call.sample.shape[-2:]
        return height // layout.patch, width // layout.patch

    return MergeFacts(tuple(sites), len(layout.blocks), entry.rotary, entry.bias, entry.packed, grid)


def _refuse_setup(network: Any) -> str | None:
    if any(hasattr(module, "to_k_ip") for module in network.modules()):
        return "an IP-Adapter is loaded, whose processors need the image tokens one by one; unload it."
    if any(is_compiled(module) for module in network.modules()):
        return "its blocks are compiled, and the maps of a step would be traced into their graphs."
    return None

"""What token merging must know about a diffusion transformer: where image tokens attend, and how positions enter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.call import Call
from diffaccel.models.compiled import is_compiled
from diffaccel.models.facts import Bias, Merging
from diffaccel.models.known import family_of
from diffaccel.models.transformers import describe_transformer


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


def merge_facts(method: str, network: nn.Module) -> MergeFacts:
    """Where tokens can be merged in this transformer.

    Raises:
        Unsupported: in this transformer, or the way it is set up now, they cannot.
    """
    name = type(network).__name__
    entry, layout = family_of(network).merging, describe_transformer(network)
    if not isinstance(entry, Merging) or layout is None:
        why = entry or "where its image tokens attend has not been worked out."
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
        if entry.grid is not None:
            return entry.grid(call.arguments, call.sample.shape[1])
        height, width = call.sample.shape[-2:]
        return height // layout.patch, width // layout.patch

    return MergeFacts(tuple(sites), len(layout.blocks), entry.rotary, entry.bias, entry.grid is not None, grid)


def _refuse_setup(network: Any) -> str | None:
    if any(hasattr(module, "to_k_ip") for module in network.modules()):
        return "an IP-Adapter is loaded, whose processors need the image tokens one by one; unload it."
    if any(is_compiled(module) for module in network.modules()):
        return "its blocks are compiled, and the maps of a step would be traced into their graphs."
    return None

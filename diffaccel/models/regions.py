"""What region sampling must know about a diffusion transformer: where keys and values are made, and how positions enter.

An attention site is an attention in which image tokens see image tokens. Keys
are taken behind their norm where there is one, so that a norm is never applied twice to a stored key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.compiled import is_compiled
from diffaccel.models.facts import Regions, Table
from diffaccel.models.known import family_of


@dataclass(frozen=True)
class Site:
    """One attention among image tokens.

    Attributes:
        attention: the attention module; `to_v` makes its values.
        joint: whether the sequence it projects holds text tokens before the image tokens.
        keys: the module whose output are the keys to store: the norm of the keys, or `to_k`.
        heads_first: whether keys leave that module as (rows, heads, tokens, size) and not as (rows, tokens, ...).
    """

    attention: nn.Module
    joint: bool
    keys: nn.Module
    heads_first: bool


@dataclass(frozen=True)
class Rotary:
    """Rotary positions that the stock processor applies to queries and keys from one table.

    Region steps have fewer queries than keys, so the rotation moves into the norms of queries and keys: `table` then
    returns None to the model, and its processors rotate nothing.

    Attributes:
        table: the module that makes the table.
        split: (what it made, number of image tokens) to the tables of the text and of the image tokens.
        rotate: (x, table) to the rotated x; x (rows, tokens, heads, size), tables (rows or 1, tokens, 1, ...).
    """

    table: nn.Module
    split: Callable[[Any, int], tuple[Table, Table]]
    rotate: Callable[[torch.Tensor, Table], torch.Tensor]


@dataclass(frozen=True)
class RegionFacts:
    """Region sampling's view of one transformer.

    Attributes:
        sites: all attention sites in call order.
        rotary: how positions enter; None where they are added to the tokens or come out of the embedding.
        table_output: which output of the embedding is a table of rotary positions; None if there is none.
        adapt: changes an attention's keyword arguments on region steps: (arguments, tokens, active, table of all keys).
        residuals: arguments of the transformer that are lists with one row per image token.
        cells: latent cells in a token of packed latents (rows, tokens, channels * cells); 1 for unpacked latents.
        grid: token grid (height, width) of packed latents, from the arguments of a call and the number of tokens.
    """

    sites: tuple[Site, ...]
    rotary: Rotary | None
    table_output: int | None
    adapt: Callable[[Mapping[str, Any], int, int, Table | None], dict[str, Any]] | None
    residuals: tuple[str, ...]
    cells: int
    grid: Callable[[Mapping[str, Any], int], tuple[int, int]] | None


def region_facts(method: str, network: nn.Module) -> RegionFacts:
    """Where a region step acts in this transformer.

    Raises:
        Unsupported: this transformer, or the way it is set up now, cannot compute a subset of its tokens.
    """
    name = type(network).__name__
    entry = family_of(network).regions
    if not isinstance(entry, Regions):
        raise Unsupported(f"{method} does not work on {name}: {entry or 'it is not known.'}")
    sites = tuple(
        _site(attention, joint, entry.heads_first)
        for blocks, attribute, joint in entry.attentions
        for block in getattr(network, blocks)
        if (attention := getattr(block, attribute)) is not None
    )
    reason = entry.refuses(network) or _refuse_setup(network, sites)
    if reason:
        raise Unsupported(f"{method} cannot run on this {name}: {reason}")
    rotary = None if entry.rotary is None else Rotary(_module(network, "pos_embed"), *entry.rotary)
    return RegionFacts(sites, rotary, entry.table_output, entry.adapt, entry.residuals, entry.cells, entry.grid)


def _module(owner: nn.Module, name: str) -> nn.Module:
    module: nn.Module = getattr(owner, name)
    return module


def _site(attention: Any, joint: bool, heads_first: bool) -> Site:
    norm = attention.norm_k
    # the processors of an IP-Adapter (SD3) read the keys before their norm as well
    if norm is None or hasattr(attention.processor, "to_k_ip"):
        return Site(attention, joint, attention.to_k, heads_first=False)
    return Site(attention, joint, norm, heads_first)


def _refuse_setup(network: Any, sites: tuple[Site, ...]) -> str | None:
    if any(getattr(site.attention, "fused_projections", False) for site in sites):
        return "its projections are fused; undo that with `unfuse_qkv_projections()`."
    if any(is_compiled(module) for module in network.modules()):
        return "its blocks are compiled, and stored keys and values would be traced into their graphs."
    return None

"""What region sampling must know about a diffusion transformer: where keys and values are made, and how positions enter.

Everything here was read in diffusers 0.42. An attention site is an attention in which image tokens see image tokens. Keys
are taken behind their norm where there is one, so that a norm is never applied twice to a stored key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.compiled import is_compiled

Table = tuple[torch.Tensor, ...]  # position table: tensors with one row per token


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


@dataclass(frozen=True)
class _Entry:
    """Names and functions of one class. `attentions`: (list of blocks, attribute of the block, joint)."""

    attentions: tuple[tuple[str, str, bool], ...]
    heads_first: bool = False
    rotary: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    table_output: int | None = None
    adapt: Callable[..., dict[str, Any]] | None = None
    residuals: tuple[str, ...] = ()
    cells: int = 1
    grid: Callable[..., tuple[int, int]] | None = None
    refuses: Callable[[Any], str | None] = lambda network: None


def rotate_pairs(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Rotate neighbouring pairs by angles given as (cos, sin), in fp32: x cos + (-x1, x0) sin."""
    cos, sin = table
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def rotate_complex(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Rotate neighbouring pairs, read as complex numbers, by unit complex numbers, in fp32."""
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * table[0]).flatten(-2).to(x.dtype)


def _split_joined(table: Any, tokens: int) -> tuple[Table, Table]:
    """(cos, sin) of text tokens followed by image tokens."""
    return tuple(part[:-tokens] for part in table), tuple(part[-tokens:] for part in table)


def _split_streams(table: Any, tokens: int) -> tuple[Table, Table]:
    """Separate complex tables, image first."""
    return (table[1],), (table[0],)


def _image_ids_grid(arguments: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    ids = arguments["img_ids"]
    height = int(ids.reshape(-1, ids.shape[-1])[:tokens, 1].max()) + 1
    return height, tokens // height


def _image_shapes_grid(arguments: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    first: Any = arguments["img_shapes"][0]
    _, height, width = first[0] if isinstance(first, list) else first
    return int(height), int(width)


def _keys_of_all_tokens(arguments: Mapping[str, Any], tokens: int, active: int, table: Table | None) -> dict[str, Any]:
    """Lumina-Next: keys are rotated by the whole table, and attention is scaled by the length of the whole picture.

    The processor takes log(queries) / log(base) as scale; another base makes that log(tokens) / log(base).
    """
    changed = dict(arguments)
    if table is not None and changed.get("key_rotary_emb") is not None:
        changed["key_rotary_emb"] = table[0]
    base = changed.get("base_sequence_length")
    if base is not None:
        changed["base_sequence_length"] = math.exp(math.log(active) * math.log(base) / math.log(tokens))
    return changed


def _mask_of_all_tokens(arguments: Mapping[str, Any], tokens: int, active: int, table: Table | None) -> dict[str, Any]:
    """Qwen-Image: the processor adds one entry per query to the mask of the text; there are more keys than queries."""
    mask = arguments.get("encoder_hidden_states_mask")
    if mask is None:
        return dict(arguments)
    rest = mask.new_ones((mask.shape[0], tokens - active))
    return {**arguments, "encoder_hidden_states_mask": torch.cat([mask, rest], dim=1)}


def _refuse_adapters(network: Any) -> str | None:
    if any(hasattr(module, "to_k_ip") for module in network.modules()):
        return "an IP-Adapter is loaded, whose processors use queries before they are rotated; unload it."
    return None


def _refuse_second_time(network: Any) -> str | None:
    if getattr(network, "zero_cond_t", False):
        return "this checkpoint modulates the tokens of its reference pictures by another time, token by token."
    return None


_SD3 = _Entry(
    (("transformer_blocks", "attn", False), ("transformer_blocks", "attn2", False)),
    heads_first=True,
    residuals=("block_controlnet_hidden_states",),
)
_FLUX = _Entry(
    (("transformer_blocks", "attn", False), ("single_transformer_blocks", "attn", True)),
    rotary=(_split_joined, rotate_pairs),
    residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    cells=4,
    grid=_image_ids_grid,
    refuses=_refuse_adapters,
)
_ENTRIES: dict[str, _Entry] = {
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
    "PixArtTransformer2DModel": _Entry((("transformer_blocks", "attn1", False),)),
    "DiTTransformer2DModel": _Entry((("transformer_blocks", "attn1", False),)),
    "AuraFlowTransformer2DModel": _Entry(
        (("joint_transformer_blocks", "attn", False), ("single_transformer_blocks", "attn", True))
    ),
    "LuminaNextDiT2DModel": _Entry((("layers", "attn1", False),), table_output=3, adapt=_keys_of_all_tokens),
    "QwenImageTransformer2DModel": _Entry(
        (("transformer_blocks", "attn", False),),
        rotary=(_split_streams, rotate_complex),
        adapt=_mask_of_all_tokens,
        residuals=("controlnet_block_samples",),
        cells=4,
        grid=_image_shapes_grid,
        refuses=_refuse_second_time,
    ),
}

_VIDEO = "a video token depends on its neighbours in time, and how old they may get has not been worked out."
_REFUSALS: dict[str, str] = {
    "SanaTransformer2DModel": (
        "its linear attention keeps one sum over all tokens and its feed-forward part convolves the token grid, so tokens "
        "cannot be computed on their own."
    ),
    "Lumina2Transformer2DModel": (
        "its refiner blocks and its joint sequence of text and image depend on the caption length of each row."
    ),
    "ZImageTransformer2DModel": (
        "its refiner blocks and its joint sequence of image and text depend on the padding of each row."
    ),
    "HunyuanDiT2DModel": (
        "its attention rotates queries and keys by one table that its blocks hand on, and its long skips join tokens of "
        "the full grid; this has not been worked out."
    ),
    "Flux2Transformer2DModel": "its single blocks make queries, keys, values and the MLP in one projection.",
    "CogView4Transformer2DModel": "its attention projects text and image together, which has not been worked out.",
    "WanTransformer3DModel": _VIDEO,
    "CogVideoXTransformer3DModel": _VIDEO,
}


def region_facts(method: str, network: nn.Module) -> RegionFacts:
    """Where a region step acts in this transformer.

    Raises:
        Unsupported: this transformer, or the way it is set up now, cannot compute a subset of its tokens.
    """
    name = type(network).__name__
    entry = _ENTRIES.get(name)
    if entry is None:
        raise Unsupported(f"{method} does not work on {name}: {_REFUSALS.get(name, 'it is not known.')}")
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

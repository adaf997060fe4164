"""What can be known about a network class and cannot be seen by running it: the vocabulary of the files in `families/`.

A `Family` holds all facts of one class. Where something does not work on it, the fact is the reason, a sentence that a user
reads behind "... does not work on <class>:".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

# --- blocks ---


def _patch_size(config: Any) -> int:
    return int(config.patch_size)


def packed(config: Any) -> int:
    """The patch of pipelines that pack the latents themselves."""
    return 1


def _no_skips(blocks: int) -> tuple[tuple[int, int], ...]:
    return ()


@dataclass(frozen=True)
class Blocks:
    """Where the main blocks and the two ends of a transformer are, by attribute names.

    Attributes:
        stacks: lists of main blocks in execution order, each with the streams that a block returns: "image" and "text", or
            both as one "joint" sequence.
        embed: makes the image tokens from the latents.
        norm: first module after the last block that reads its image tokens; None if there is no such module.
        head: makes the output patches.
        patch: side of a token in latent cells, from the config.
        long_skips: from the number of blocks: pairs (i, j), block j reads what block i returned, from the outside in.
    """

    stacks: tuple[tuple[str, tuple[str, ...]], ...]
    embed: str
    norm: str | None = "norm_out"
    head: str = "proj_out"
    patch: Callable[[Any], int] = _patch_size
    long_skips: Callable[[int], tuple[tuple[int, int], ...]] = _no_skips


@dataclass(frozen=True)
class Control:
    """A ControlNet class whose residuals go to long skips: its blocks, and the modules that make the residuals."""

    network: str
    blocks: str
    outputs: str


# --- attention among image tokens ---

Text = Literal["none", "before", "after"]
Grid = Callable[[Any, Mapping[str, Any]], tuple[int, int]]
Bias = Literal["rows", "heads", "none"]
Table = tuple[torch.Tensor, ...]  # position table: tensors with one row per token


@dataclass(frozen=True)
class ImageAttention:
    """Attentions whose processor makes one call of `scaled_dot_product_attention` over all image tokens.

    Attributes:
        places: (list of blocks, attribute of the block, where text tokens stand in its queries and keys).
        grid: token rows and columns of the picture, from the transformer and the arguments of a call; reference pictures
            may follow those tokens.
    """

    places: tuple[tuple[str, str, Text], ...]
    grid: Grid


@dataclass(frozen=True)
class Merging:
    """Where tokens may be merged.

    Attributes:
        attentions: (list of blocks, attribute of the block, whether its sequence holds the text in front of the image).
        bias: how a number per key reaches the scores: as `attention_mask` (rows, 1, keys), as `attention_mask` (rows, 1, 1,
            keys), or not at all with the stock processor.
        rotary: argument of the attention with a table (cos, sin) of one row per token of the sequence.
        grid: token grid (height, width) of packed latents, from the arguments of a call and the number of tokens; None
            for unpacked latents.
    """

    attentions: tuple[tuple[str, str, bool], ...]
    bias: Bias
    rotary: str | None = None
    grid: Callable[[Mapping[str, Any], int], tuple[int, int]] | None = None


def _always(network: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Regions:
    """How a subset of the image tokens is computed.

    Attributes:
        attentions: (list of blocks, attribute of the block, joint), every attention in which image tokens see image tokens.
        heads_first: whether keys leave their norm as (rows, heads, tokens, size) and not as (rows, tokens, ...).
        rotary: how one table of rotary positions is split into those of text and image, and how it rotates.
        table_output: which output of the embedding is a table of rotary positions; None if there is none.
        adapt: changes an attention's keyword arguments on region steps: (arguments, tokens, active, table of all keys).
        residuals: arguments of the transformer that are lists with one row per image token.
        cells: latent cells in a token of packed latents; 1 for unpacked latents.
        grid: as in `Merging`.
        refuses: why it does not work the way the network is set up now; None if it does.
    """

    attentions: tuple[tuple[str, str, bool], ...]
    heads_first: bool = False
    rotary: tuple[Callable[[Any, int], tuple[Table, Table]], Callable[[torch.Tensor, Table], torch.Tensor]] | None = (
        None
    )
    table_output: int | None = None
    adapt: Callable[..., dict[str, Any]] | None = None
    residuals: tuple[str, ...] = ()
    cells: int = 1
    grid: Callable[[Mapping[str, Any], int], tuple[int, int]] | None = None
    refuses: Callable[[Any], str | None] = _always


# --- text ---


@dataclass(frozen=True)
class NegativeText:
    """Where the negative text is among the outputs of a pipeline's `encode_prompt`.

    Attributes:
        embeddings: number of the output with one row per token; None if `encode_prompt` knows no negative prompts and is
            called a second time (FLUX), when it is the first output.
        mask: number of the output with its attention mask.
    """

    embeddings: int | None
    mask: int | None = None


@dataclass(frozen=True)
class TextAttention:
    """Where image tokens attend to the text: separate cross-attentions, or joint attention of text and image.

    Attributes:
        blocks: (list of blocks, attribute of the block).
        negative: how a negative prompt is encoded; None where that has not been worked out.
    """

    kind: Literal["cross", "joint"]
    blocks: tuple[tuple[str, str], ...]
    negative: NegativeText | None = None


RouteName = Literal["sequence", "pooled"]
Role = Literal["key", "value", "both"]
Output = Literal["last", "penultimate", "pooled", "projected"]


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads text.

    Attributes:
        name: dotted name inside the denoiser.
        columns: [first, past) columns of its weight that meet the text; the others meet something else.
        role: makes keys, makes values, or everything ("both").
    """

    name: str
    columns: tuple[int, int]
    role: Role = "both"


@dataclass(frozen=True)
class Source:
    """A text encoder's share of a route.

    Attributes:
        encoder, tokenizer: attributes of the pipeline.
        family: "clip" (causal, begins with a start token) or "t5" (every token sees every other).
        output: which output the denoiser is given.
        section: sources of one section fill the same rows side by side, in the order listed; sections follow each
            other along the sequence (SD3: T5's rows after CLIP's).
        masked: whether paddings are hidden from the encoder and from the denoiser.
        optional: whether pipelines run without it, giving zeros instead.
    """

    encoder: str
    tokenizer: str
    family: Literal["clip", "t5"]
    output: Output
    section: int = 0
    masked: bool = False
    optional: bool = False


@dataclass(frozen=True)
class TextRoute:
    """One place where text enters: its name, the width of a row, who reads it and who writes it."""

    name: RouteName
    width: int
    readers: tuple[Reader, ...]
    sources: tuple[Source, ...]


def embedded_routes(
    transformer: Any, entry: str, sources: tuple[Source, ...], pooled: str, pooled_sources: tuple[Source, ...]
) -> tuple[TextRoute, ...]:
    """Text that enters by one linear layer for the tokens and one for the pooled vector."""
    first = transformer.get_submodule(entry).in_features
    second = f"time_text_embed.{pooled}.linear_1"
    width = transformer.get_submodule(second).in_features
    return (
        TextRoute("sequence", first, (Reader(entry, (0, first)),), sources),
        TextRoute("pooled", width, (Reader(second, (0, width)),), pooled_sources),
    )


# --- a family ---


@dataclass(frozen=True)
class Family:
    """All facts of one network class; a sentence stands for what does not work on it, None for what nobody worked out.

    Attributes:
        network: name of the class.
        blocks: its main blocks; None for UNets, whose blocks `models/unet.py` reads from their structure.
        image_attention, merging, regions: attention among image tokens, for sparse attention, token merging and region
            sampling.
        text: attention to the text.
        routes: where text enters, from a network.
        control: the class of its ControlNets, where that is known.
    """

    network: str
    blocks: Blocks | None = None
    image_attention: ImageAttention | str | None = None
    merging: Merging | str | None = None
    regions: Regions | str | None = None
    text: TextAttention | str | None = None
    routes: Callable[[Any], tuple[TextRoute, ...]] | str | None = None
    control: Control | None = None


# --- what several families share ---


def latent_grid(network: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Unpacked latents (rows, channels, h, w), cut into patches."""
    height, width = arguments["hidden_states"].shape[-2:]
    patch = int(network.config.patch_size)
    return height // patch, width // patch


def rotate_pairs(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Rotate neighbouring pairs by angles given as (cos, sin), in fp32: x cos + (-x1, x0) sin."""
    cos, sin = table
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


IMAGE, TEXT_IMAGE, IMAGE_TEXT, JOINT = ("image",), ("text", "image"), ("image", "text"), ("joint",)

MASKED = "its attention masks the padding of the text row by row, which lists of blocks would have to follow."
THIRD_AXIS = "its tokens have a third axis, for which no order of blocks has been worked out."
MERGED_OVER_TIME = "which tokens of a video may be merged over time has not been worked out."
NEIGHBOURS_IN_TIME = (
    "a video token depends on its neighbours in time, and how old they may get has not been worked out."
)
OWN_TABLES = "its attention rotates tokens by tables that its processors keep per row, which has not been worked out."
PROJECTED_TOGETHER = "its attention projects text and image together, which has not been worked out."
LANGUAGE_MODEL = (
    "its text comes from a language model whose chat template surrounds every prompt; this is not covered yet"
)

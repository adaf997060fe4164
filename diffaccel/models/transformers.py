"""Where things are in diffusers' diffusion transformers: one entry per class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

ATTACHED_BRANCHES = "skip_branches"  # attribute of a transformer that holds attached long skips


@dataclass(frozen=True)
class Stack:
    """One list of main blocks.

    Attributes:
        name: attribute of the transformer.
        blocks: the blocks in call order.
        outputs: what a block returns, in order: "image" and "text" streams, or both as one "joint" sequence. A block
            with one output returns a tensor, else a tuple.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class TransformerLayout:
    """Main blocks, long skips and the two ends of a diffusion transformer.

    Attributes:
        stacks: main blocks in execution order; refiner blocks that see only text or only the picture are not among them.
        embed: makes the image tokens from the latents.
        norm: first module after the last block that reads its image tokens; None if there is no such module.
        head: makes the output patches.
        patch: side of a token in latent cells; 1 where the pipeline packs the latents itself.
        long_skips: pairs (i, j) of block numbers: block j reads what block i returned, from the outside in.
        fuses: modules that join the long skips to the stream, in the order of `long_skips`, where they lie outside the
            blocks (`diffaccel.add_skip_branches`); empty for native long skips.
    """

    stacks: tuple[Stack, ...]
    embed: nn.Module
    norm: nn.Module | None
    head: nn.Module
    patch: int
    long_skips: tuple[tuple[int, int], ...] = ()
    fuses: tuple[nn.Module, ...] = ()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All main blocks in execution order."""
        return tuple(block for stack in self.stacks for block in stack.blocks)


@dataclass(frozen=True)
class ControlLayout:
    """A ControlNet that follows the first blocks of a transformer with long skips.

    Attributes:
        blocks: its blocks in call order; block i stands for block i of the transformer.
        outputs: module i makes the residual of long skip i from what block i returned.
    """

    blocks: tuple[nn.Module, ...]
    outputs: tuple[nn.Module, ...]


@dataclass(frozen=True)
class _Entry:
    """Attribute names of one transformer class."""

    stacks: tuple[tuple[str, tuple[str, ...]], ...]
    embed: str
    norm: str | None = "norm_out"
    head: str = "proj_out"
    patch: Callable[[Any], int] = lambda config: int(config.patch_size)
    long_skips: Callable[[int], tuple[tuple[int, int], ...]] = lambda blocks: ()


def _hunyuan_skips(blocks: int) -> tuple[tuple[int, int], ...]:
    """Blocks after the middle one read the outputs of the first ones; the two innermost blocks are unpaired."""
    return tuple((i, blocks - 1 - i) for i in range(blocks // 2 - 1))


def _single(config: Any) -> int:
    return 1


def _last(config: Any) -> int:
    return int(config.patch_size[-1])


def _first_listed(config: Any) -> int:
    return int(config.all_patch_size[0])


_IMAGE = ("image",)
_TEXT_IMAGE = ("text", "image")
_JOINT = ("joint",)

_ENTRIES: dict[str, _Entry] = {
    "SD3Transformer2DModel": _Entry((("transformer_blocks", _TEXT_IMAGE),), "pos_embed"),
    "FluxTransformer2DModel": _Entry(
        (("transformer_blocks", _TEXT_IMAGE), ("single_transformer_blocks", _TEXT_IMAGE)), "x_embedder", patch=_single
    ),
    "Flux2Transformer2DModel": _Entry(
        (("transformer_blocks", _TEXT_IMAGE), ("single_transformer_blocks", _JOINT)), "x_embedder", patch=_single
    ),
    "PixArtTransformer2DModel": _Entry((("transformer_blocks", _IMAGE),), "pos_embed"),
    "HunyuanDiT2DModel": _Entry((("blocks", _IMAGE),), "pos_embed", long_skips=_hunyuan_skips),
    "LuminaNextDiT2DModel": _Entry((("layers", _IMAGE),), "patch_embedder", head="norm_out"),
    "Lumina2Transformer2DModel": _Entry((("layers", _JOINT),), "x_embedder", head="norm_out"),
    "AuraFlowTransformer2DModel": _Entry(
        (("joint_transformer_blocks", _TEXT_IMAGE), ("single_transformer_blocks", _JOINT)), "pos_embed"
    ),
    "SanaTransformer2DModel": _Entry((("transformer_blocks", _IMAGE),), "patch_embed"),
    "DiTTransformer2DModel": _Entry((("transformer_blocks", _IMAGE),), "pos_embed", head="proj_out_2"),
    "QwenImageTransformer2DModel": _Entry((("transformer_blocks", _TEXT_IMAGE),), "img_in", patch=_single),
    "ZImageTransformer2DModel": _Entry(
        (("layers", _JOINT),), "all_x_embedder", norm=None, head="all_final_layer", patch=_first_listed
    ),
    "CogView4Transformer2DModel": _Entry((("transformer_blocks", ("image", "text")),), "patch_embed"),
    "WanTransformer3DModel": _Entry((("blocks", _IMAGE),), "patch_embedding", patch=_last),
    "CogVideoXTransformer3DModel": _Entry(
        (("transformer_blocks", ("image", "text")),), "patch_embed", norm="norm_final"
    ),
}


def describe_transformer(network: nn.Module) -> TransformerLayout | None:
    """Layout of a known diffusion transformer; None for any other class."""
    entry = _ENTRIES.get(type(network).__name__)
    if entry is None:
        return None
    stacks = tuple(Stack(name, _blocks(network, name), outputs) for name, outputs in entry.stacks)
    stacks = tuple(stack for stack in stacks if stack.blocks)
    norm = None if entry.norm is None else getattr(network, entry.norm)
    count = sum(len(stack.blocks) for stack in stacks)
    skips, fuses = entry.long_skips(count), _attached_branches(network)
    return TransformerLayout(
        stacks,
        getattr(network, entry.embed),
        norm,
        getattr(network, entry.head),
        entry.patch(network.config),
        skips or tuple((i, count - 1 - i) for i in range(len(fuses))),
        fuses,
    )


def describe_control(net: nn.Module) -> ControlLayout | None:
    """Layout of a ControlNet whose residuals go to long skips; None for any other network."""
    if type(net).__name__ != "HunyuanDiT2DControlNetModel":
        return None
    return ControlLayout(_blocks(net, "blocks"), _blocks(net, "controlnet_blocks"))


def _attached_branches(network: nn.Module) -> tuple[nn.Module, ...]:
    """Skip branches that the user attached, from the outside in (diffaccel/methods/caches/skip_branches.py)."""
    branches: Any = getattr(network, ATTACHED_BRANCHES, ())
    return tuple(branches)


def _blocks(network: nn.Module, name: str) -> tuple[nn.Module, ...]:
    blocks: Any = getattr(network, name)
    return tuple(blocks)

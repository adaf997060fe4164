"""Where things are in a diffusion transformer: its layout, from the facts of its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.models.known import KNOWN, family_of

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


def describe_transformer(network: nn.Module) -> TransformerLayout | None:
    """Layout of a known diffusion transformer; None for any other class."""
    entry = family_of(network).blocks
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
    known = {family.control.network: family.control for family in KNOWN.values() if family.control}
    entry = known.get(type(net).__name__)
    return None if entry is None else ControlLayout(_blocks(net, entry.blocks), _blocks(net, entry.outputs))


def _attached_branches(network: nn.Module) -> tuple[nn.Module, ...]:
    """Skip branches that the user attached, from the outside in (diffaccel/methods/caches/skip_branches.py)."""
    branches: Any = getattr(network, ATTACHED_BRANCHES, ())
    return tuple(branches)


def _blocks(network: nn.Module, name: str) -> tuple[nn.Module, ...]:
    blocks: Any = getattr(network, name)
    return tuple(blocks)

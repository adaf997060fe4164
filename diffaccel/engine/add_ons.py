"""Other add-ons inside a network: which of them do not go together with what a recipe does there.

They replace `forward` of blocks, or the class of a block, and are told by the package in which the replacement was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.engine.run import Layer
from diffaccel.errors import Unsupported


@dataclass(frozen=True)
class AddOn:
    """A package that works inside networks.

    Attributes:
        does: what it does there.
        layers: the layers whose methods get in its way.
        undo: how its users take it off.
    """

    does: str
    layers: frozenset[Layer]
    undo: str


ADD_ONS = {
    "DeepCache": AddOn(
        "keeps what blocks of this network computed for all rows",
        frozenset({Layer.GUIDANCE, Layer.STEP, Layer.SKIP}),
        "helper.disable()",
    ),
    "tomesd": AddOn("merges tokens of this network", frozenset({Layer.TOKENS}), "tomesd.remove_patch(pipe)"),
}


def add_ons(network: nn.Module) -> frozenset[str]:
    """Names of the add-ons above that have replaced something inside a network."""
    return frozenset(name for module in network.modules() for name in _packages(module)) & ADD_ONS.keys()


def _packages(module: nn.Module) -> Iterator[str]:
    """Where the forward of a module was written, and the forward that its instance has instead."""
    for function in (type(module).forward, vars(module).get("forward")):
        # `functools.wraps` copies a function's `__module__`, not its globals
        names: dict[str, Any] = getattr(getattr(function, "__func__", function), "__globals__", {})
        yield str(names.get("__name__", "")).partition(".")[0]


def refuse_add_ons(networks: Iterable[nn.Module], methods: Iterable[Any]) -> None:
    """Raise `Unsupported` if an add-on inside the networks and one of the methods get in each other's way."""
    found = sorted({name for network in networks for name in add_ons(network)})
    for method in methods:
        for name in found:
            if method.layer in ADD_ONS[name].layers and not method.is_off:
                raise Unsupported(
                    f"{method.name} does not go together with {name}, which {ADD_ONS[name].does}; take that off "
                    f"({ADD_ONS[name].undo})."
                )

"""Where an edit meets the live modules of a pipeline: the projections that are really called, and their stored weights.

Between a module's path and what runs stand peft (a LoRA layer wraps the projection), diffusers' fused projections (a copy
`to_kv` runs, the stale `to_k` and `to_v` stay) and accelerate (sequential offload keeps the weights elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.edits.edit import Edit
from diffaccel.edits.parts import DTYPES, EditedModule, tensor_digest
from diffaccel.edits.routes import find_routes
from diffaccel.errors import Unsupported
from diffaccel.models.compiled import is_compiled

FUSED = "to_kv"
NO_WEIGHT = "no weight in fp32, fp16 or bf16 (quantised, not loaded, or offloaded to disk)"


@dataclass(eq=False)
class LowRank:
    """The map x -> x + L (R x) on the columns [first, past) of x.

    Attributes:
        left: (d, n) float32.
        right: (n, d) float32.
    """

    left: Tensor
    right: Tensor
    columns: tuple[int, int]
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both matrices on a device, kept there."""
        if device not in self._moved:
            self._moved[device] = self.left.to(device), self.right.to(device)
        return self._moved[device]

    def weight(self, weight: Tensor) -> Tensor:
        """W (I + L R) for a weight (d_out, d_in) in float64."""
        first, past = self.columns
        weight = weight.clone()
        weight[:, first:past] += (weight[:, first:past] @ self.left.double()) @ self.right.double()
        return weight


def map_text(x: Tensor, maps: Iterable[LowRank]) -> Tensor:
    """Rows (..., d_in) after the maps, first one first; computed in fp32 or better and cast once."""
    with torch.autocast(x.device.type, enabled=False):
        y = x if x.dtype == torch.float64 else x.float()
        for one in maps:
            (first, past), (left, right) = one.columns, one.on(x.device)
            part = y[..., first:past]
            part = part + (part @ right.to(y.dtype).T) @ left.to(y.dtype).T
            y = part if part.shape == y.shape else torch.cat([y[..., :first], part, y[..., past:]], dim=-1)
    return y.to(x.dtype)


def render(base: Tensor, maps: Iterable[LowRank]) -> Tensor:
    """The weight whose product with x is that of `base` with the mapped x; float64 inside, cast once."""
    weight = base.double()
    for one in reversed(list(maps)):  # W (I + L2 R2)(I + L1 R1) x: the map that x meets first stands at the right
        weight = one.weight(weight)
    return weight.to(base.dtype)


def maps_of(edits: Iterable[Edit]) -> dict[str, list[LowRank]]:
    """Maps by module path, in an order that depends on the edits alone and not on when they were applied."""
    found: dict[str, list[LowRank]] = {}
    for edit in sorted(edits, key=lambda edit: edit.digest):
        for text_map in edit.maps:
            low = dict[tuple[int, int], LowRank]()  # one object per map, so that a device holds one copy
            for module in text_map.modules:
                columns = module.columns
                low.setdefault(columns, LowRank(text_map.left, text_map.right, columns))
                found.setdefault(module.name, []).append(low[columns])
    return found


def network_of(pipe: Any, edit: Edit) -> tuple[str, nn.Module]:
    """Name and network that an edit changes, after a check that each of its modules reads text there.

    Raises:
        Unsupported: the pipeline has no such parts, or no closed form applies to it.
    """
    name = edit.modules[0].name.split(".")[0]
    network = getattr(pipe, name, None)
    if network is not None and is_compiled(network):
        raise Unsupported(
            f"pipe.{name} is compiled as a whole; compile its repeated blocks instead "
            f"(pipe.{name}.compile_repeated_blocks())."
        )
    routes = {route.name: route for route in find_routes(pipe)}
    for text_map in edit.maps:
        route = routes.get(text_map.route)  # type: ignore[call-overload]
        known = {} if route is None else {item.name: item.reader.columns for item in route.projections}
        for module in text_map.modules:
            first, past = known.get(module.name, (0, 0))
            if not first <= module.columns[0] < module.columns[1] <= past:
                raise Unsupported(
                    f"the {edit} was made for a {edit.pipeline} and does not fit this {type(pipe).__name__}, where "
                    f"{module.name} does not read the {text_map.route} text in columns {list(module.columns)}."
                )
    return name, getattr(pipe, name)


def live(network: nn.Module, path: str) -> nn.Module:
    """The module at a path inside a network, as it is called: a LoRA layer if there is one.

    Raises:
        Unsupported: there is nothing at this path (any more).
    """
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        raise Unsupported(f"this {type(network).__name__} has no {path} any more, which an edit maps.") from error


def unwrapped(module: nn.Module) -> nn.Module:
    """The projection inside LoRA layers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def stored_weight(module: nn.Module) -> Tensor | None:
    """The floating-point weight (d_out, d_in) of a plain linear layer where it really is; None if there is none.

    Sequential offload leaves an empty tensor on the module and keeps the weight in a map of its hook.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return None
    if weight.is_meta:
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", [hook])
        kept = [places["weight"] for one in hooks if (places := getattr(one, "weights_map", None)) is not None]
        weight = kept[-1] if kept else None
    if not isinstance(weight, Tensor) or weight.is_meta or weight.dtype not in DTYPES.values():
        return None
    # a quantised weight may be a tensor of a class of its own that claims to be bf16
    return weight.detach() if type(weight) in (Tensor, nn.Parameter) else None


def weight_at(network: nn.Module, path: str) -> Tensor | None:
    """`stored_weight` of the projection at a path, inside LoRA layers; None also where group offloading keeps it on disk.

    Then the tensor on the module is there, but holds whatever was in memory.
    """
    module, holder = unwrapped(live(network, path)), network
    on_disk = _group_on_disk(network) or _group_on_disk(module)
    for name in path.split(".")[:-1]:
        holder = getattr(holder, name)
        on_disk = on_disk or _group_on_disk(holder)
    return None if on_disk else stored_weight(module)


def _group_on_disk(module: nn.Module) -> bool:
    """Whether diffusers offloads a group of modules that begins here to disk."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None


def _is_copy(module: nn.Module) -> bool:
    """Whether the weight is read from disk (accelerate) each time it is asked for, so that writing to it is lost."""
    first, second = stored_weight(module), stored_weight(module)  # both alive, or they might share an address
    return first is not None and second is not None and first.data_ptr() != second.data_ptr()


def is_fused(network: nn.Module, path: str) -> bool:
    """Whether a fused copy of this projection runs in its place."""
    parent, leaf = parent_of(network, path)
    # diffusers never forgets `to_kv` when it unfuses; what counts is the processor
    processor = type(getattr(parent, "processor", None)).__name__
    return leaf in ("to_k", "to_v") and hasattr(parent, FUSED) and processor.startswith("Fused")


def parent_of(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a path, and the last part of the path."""
    parent, _, leaf = path.rpartition(".")
    return network.get_submodule(parent), leaf


def require_plain(network: nn.Module, path: str, doing: str, instead: str = "") -> nn.Linear:
    """The projection whose weight may be written.

    Raises:
        Unsupported: a LoRA, fused projections, quantisation or offloading to disk are in the way; `instead` ends the
            sentence.
    """
    module = live(network, path)
    if unwrapped(module) is not module:
        raise Unsupported(f"cannot {doing}: a LoRA is loaded on {path}; unload it{instead}.")
    if is_fused(network, path):
        raise Unsupported(
            f"cannot {doing}: the projections are fused, so that {path} does not run; unfuse them first "
            f"(unfuse_qkv_projections){instead}."
        )
    if weight_at(network, path) is None or not isinstance(module, nn.Linear):
        raise Unsupported(f"cannot {doing}: {path} has {NO_WEIGHT}; load it as such{instead}.")
    if _is_copy(module):
        raise Unsupported(f"cannot {doing}: the weight of {path} is offloaded to disk; load it into memory{instead}.")
    return module


def check_base(weight: Tensor, module: EditedModule, edit: Edit) -> None:
    """Raises Unsupported unless this is the weight (d_out, d_in) on which the edit was made."""
    name = next(name for name, dtype in DTYPES.items() if dtype == weight.dtype)
    if tuple(weight.shape) != module.shape or tensor_digest(weight) != module.digests[name]:
        raise Unsupported(
            f"the {edit} was made on other weights than these ({module.name} differs): load the model it was made on, take "
            "back what changed it since, or make a new edit."
        )


@dataclass(eq=False)
class FusedMaps:
    """Maps for the two halves of a fused projection [K; V]."""

    key: list[LowRank]
    value: list[LowRank]

    def __call__(self, x: Tensor, plain: Callable[[Tensor], Tensor], unmapped: Tensor | None = None) -> Tensor:
        """(..., d_out) of the fused layer `plain`, each half computed from its own mapped input."""
        if self.key == self.value:
            return plain(map_text(x, self.key))
        if unmapped is None:
            unmapped = plain(x)
        key, value = (plain(map_text(x, maps)) if maps else unmapped for maps in (self.key, self.value))
        half = key.shape[-1] // 2
        return torch.cat([key[..., :half], value[..., half:]], dim=-1)


Site = list[LowRank] | FusedMaps


def sites(network: nn.Module, plan: Mapping[str, list[LowRank]]) -> dict[nn.Module, Site]:
    """Every module whose input must be mapped: the live projections, and fused copies whether they run or not."""
    found: dict[nn.Module, Site] = {}
    for path, maps in plan.items():
        found[live(network, path)] = maps
        parent, leaf = parent_of(network, path)
        if leaf in ("to_k", "to_v") and isinstance(copy := getattr(parent, FUSED, None), nn.Module):
            both = found.setdefault(copy, FusedMaps([], []))
            assert isinstance(both, FusedMaps)
            (both.key if leaf == "to_k" else both.value).extend(maps)
    return found


def fits(network: nn.Module, module: EditedModule) -> bool:
    """Whether a live projection reads as many numbers as the edited one did."""
    inner = unwrapped(live(network, inside(module.name)))
    return int(getattr(inner, "in_features", -1)) == module.shape[1]


def inside(name: str) -> str:
    """A module's path inside its network: without the network's name."""
    return name.split(".", 1)[1]

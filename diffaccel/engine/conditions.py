"""What a cached feature depends on besides the noisy latents: prompts, adapters, sizes. Used to force a full step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffaccel.models.call import Call, describe_shapes

# These change on every step by nature: the latents themselves, the time, and residuals computed from them.
_VARYING = frozenset(
    {
        "sample",
        "timestep",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    }
)


@dataclass(frozen=True)
class Conditions:
    """The conditioning inputs of one call; tensors are kept so that their memory cannot be reused for others."""

    plain: Any
    tensors: tuple[torch.Tensor, ...]
    versions: tuple[int | None, ...]

    @classmethod
    def of(cls, call: Call) -> Conditions:
        """Conditions of a call: everything but latents, time and residuals, whose presence and shapes still count."""
        steady = {name: value for name, value in call.arguments.items() if name not in _VARYING}
        shapes = {name: value for name, value in call.arguments.items() if name in _VARYING and name != "timestep"}
        tensors = tuple(_tensors(steady))
        plain = (describe_shapes(shapes), call.branches, tuple(_settings(steady)))
        return cls(plain, tensors, tuple(_version(tensor) for tensor in tensors))

    def same(self, call: Call) -> bool:
        """Whether a later call has the same conditions: unchanged memory, or other memory with equal values."""
        other = Conditions.of(call)
        if self.plain != other.plain or len(self.tensors) != len(other.tensors):
            return False
        return all(
            now == then if _same_place(a, b) else _equal(a, b)
            for a, b, then, now in zip(self.tensors, other.tensors, self.versions, other.versions, strict=True)
        )


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _settings(value[key], f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _settings(item, f"{name}.{index}")
    else:
        yield name, describe_shapes(value) if isinstance(value, torch.Tensor) else value


class AdapterProbe:
    """Reads what changes a network's features from inside: LoRA adapters, scales and weights, IP-Adapter, FreeU, GLIGEN."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._loads = 0
        self._find()

    def _find(self) -> None:
        modules = list(self.network.modules())
        self._loras = [m for m in modules if isinstance(vars(m).get("scaling"), dict)]
        processors: list[Any] = [getattr(m, "processor", None) for m in modules]
        self._scaled = [p for p in processors if getattr(p, "scale", None) is not None]
        self._blocks = [m for m in modules if hasattr(m, "resolution_idx")]
        self._fusers = [m for m in modules if isinstance(vars(m).get("enabled"), bool)]
        self._adapters = self._adapters_now()

    def _adapters_now(self) -> dict[str, Any]:
        return dict(getattr(self.network, "peft_config", None) or {})

    def _find_again(self) -> None:
        """An adapter may have been replaced by another one of the same name, which has a config of its own."""
        now = self._adapters_now()
        if now.keys() != self._adapters.keys() or any(now[name] is not self._adapters[name] for name in now):
            self._loads += 1
            self._find()

    def state(self) -> tuple[Any, ...]:
        """A value that changes whenever one of these settings does."""
        self._find_again()
        loras = tuple(_lora_state(module) for module in self._loras)
        freeu = tuple(tuple(getattr(b, key, None) for key in ("s1", "s2", "b1", "b2")) for b in self._blocks)
        fusers = tuple(m.enabled for m in self._fusers)
        return self._loads, loras, tuple(repr(p.scale) for p in self._scaled), freeu, fusers


def _lora_state(module: nn.Module) -> tuple[Any, ...]:
    own: dict[str, Any] = vars(module)
    merged = tuple(own.get("merged_adapters") or ())
    # peft multiplies and divides by the call's scale in every forward, which may change the last bits
    scaling = tuple((name, float(f"{value:.6g}")) for name, value in own["scaling"].items())
    versions = tuple(_version(weight) for weight in module.parameters())  # weights may be swapped in place
    return scaling, str(own.get("_active_adapter")), own.get("_disable_adapters"), merged, versions

"""The only file that assigns to other people's objects. Every change is undone by the `Seams` that made it.

The exceptions are `Addition`, `Residence` and `overwrite`: edits that the user asked for and that stay until the user
takes them back.

Facts this file relies on (checked against diffusers 0.42 and accelerate 1.15):
- `nn.Module.__call__` looks up `self.forward`, so an instance attribute `forward` takes precedence over the class.
- accelerate's offload hooks also live in the instance attribute `forward`. `enable_model_cpu_offload` is run again at
  the end of each pipeline call and rebuilds that attribute from `_old_forward`; a replacement that is gone by then must
  not be "restored", or the old hook would come back.
- `retrieve_timesteps` and `prepare_extra_step_kwargs` inspect the signatures of `set_timesteps` and `step`, so
  replacements there carry the original's signature (`functools.wraps`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffaccel.errors import Unsupported

_MISSING = object()
_CLAIM = "diffaccel_run"
_CLAIMING = threading.Lock()


class Seams:
    """Collects changes to foreign objects and takes them back in reverse order, also when a run ends by an exception."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, trace)

    def close(self) -> None:
        """Take all changes back; more may follow."""
        self._undo.close()

    def claim(self, owners: Sequence[Any]) -> None:
        """Take objects for one run, all or none of them, before anything on them is changed.

        Two runs that change and restore the same objects at once would each put back what the other one had installed.

        Raises:
            Unsupported: one of them belongs to a run that has not ended.
        """
        with _CLAIMING:
            for owner in owners:
                if _CLAIM in vars(owner):
                    raise Unsupported(
                        f"this {type(owner).__name__} is already inside an accelerated call; nested or concurrent calls "
                        "cannot share it."
                    )
            for owner in owners:
                self.replace(owner, _CLAIM, True)

    def replace_forward(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace `module.forward` by `make(current forward)`.

        Raises:
            Unsupported: the whole module is compiled, so a Python replacement would be traced into its graph.
        """
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise Unsupported(
                f"{type(module).__name__} is compiled as a whole; compile its repeated blocks instead "
                f"(pipe.unet.compile_repeated_blocks())."
            )
        self.replace(module, "forward", make(module.forward))

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` as an instance attribute; undone only if it is still ours when the run ends."""
        before = vars(owner).get(name, _MISSING)
        self._undo.callback(_put_back, owner, name, value, before)  # first: Ctrl-C may come between the two
        # object.__setattr__ keeps pipelines and configs from registering the value as a component of theirs
        object.__setattr__(owner, name, value)

    def wrap_method(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace the method `owner.name` by `around(original, *args, **kwargs)`, keeping its signature visible."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self.replace(owner, name, wrapped)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the run ends, in reverse order with the other undo steps."""
        self._undo.callback(callback)


class Addition:
    """A child module and hooks added to a network, and how to take exactly them away again.

    Torch's own hooks are used because they outlive what others do to `forward` (offload hooks, methods of a run), are
    copied with the network by `copy.deepcopy`, and leave nothing behind.
    """

    def __init__(self, owner: nn.Module, name: str, child: nn.Module) -> None:
        owner.add_module(name, child)
        self._name, self._handles = name, list[RemovableHandle]()

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before `module`; it may return other (args, kwargs)."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, output)` after `module`."""
        self._handles.append(module.register_forward_hook(hook))

    def take_back(self, owner: nn.Module) -> None:
        """Remove the hooks, and the child from the network it was added to (or from that network's copy)."""
        for handle in self._handles:
            handle.remove()
        delattr(owner, self._name)


class Residence:
    """Base of plain objects that live on a network under a name, with hooks, and are copied with it by `copy.deepcopy`.

    Unlike a child module it holds no parameters and never appears in a state dict.
    """

    def __init__(self) -> None:
        self._handles = dict[nn.Module, list[RemovableHandle]]()

    def move_in(self, owner: nn.Module, name: str) -> None:
        """Live on `owner` as `owner.name`."""
        object.__setattr__(owner, name, self)

    def move_out(self, owner: nn.Module, name: str) -> None:
        """Remove all hooks, and this object from its owner (or from the owner's copy)."""
        for module in list(self._handles):
            self.unhook(module)
        object.__delattr__(owner, name)

    @property
    def hooked(self) -> tuple[nn.Module, ...]:
        """The modules that carry hooks of this object."""
        return tuple(self._handles)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before `module`; it may return other (args, kwargs)."""
        self._handles.setdefault(module, []).append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, output)` after `module`; it may return another output."""
        self._handles.setdefault(module, []).append(module.register_forward_hook(hook))

    def unhook(self, module: nn.Module) -> None:
        """Remove the hooks from a module."""
        for handle in self._handles.pop(module, ()):
            handle.remove()


@torch.no_grad()
def overwrite(weight: Tensor, value: Tensor) -> None:
    """Write `value` into the storage of `weight`, so that compiled graphs and offload hooks see it."""
    weight.copy_(value)


def _put_back(owner: Any, name: str, ours: Any, before: Any) -> None:
    if vars(owner).get(name, _MISSING) is not ours:
        return  # somebody rebuilt the attribute during the run (accelerate's offload hooks do)
    if before is _MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, before)

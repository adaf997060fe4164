"""The only file that assigns to other people's objects. Every change is undone by the `Seams` that made it.

The exceptions are `Addition`, `Residence` and `overwrite`: edits that the user asked for and that stay until the user
takes them back.

Facts this file relies on (checked against diffusers 0.42 and accelerate 1.15):
- `nn.Module.__call__` looks up `self.forward`, so an instance attribute `forward` takes precedence over the class.
- accelerate's offload hooks also live in the instance attribute `forward`. `enable_model_cpu_offload` is run again at
  the end of each pipeline call and rebuilds that attribute from `_old_forward`; a replacement that is gone by then must
  not be "restored", or the old hook would come back.
- A network may be inside a stock call of another thread when a run attaches to it, or get one meanwhile; whatever replaces
  a function here lets other threads through to the function before it (`_InThread`).
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
        self._processors: list[tuple[Any, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, trace)
        if kind is not None and issubclass(kind, Unsupported):
            for module, processor in self._processors:
                if module.processor is not processor:
                    module.set_processor(processor)

    def keep_processors(self, networks: Sequence[nn.Module]) -> None:
        """Put these attention processors back if the run ends by a refusal.

        Pipelines that install their own take them back at the end of their call, to which a refusal does not let them come.
        """
        modules = (module for network in networks for module in network.modules() if hasattr(module, "set_processor"))
        self._processors = [(module, module.processor) for module in modules if hasattr(module, "processor")]

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

    def replace_forward(
        self,
        module: nn.Module,
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        passed: Callable[[], None] = lambda: None,
    ) -> None:
        """Replace `module.forward` by `make(current forward)`, for calls from this thread.

        Args:
            passed: called when another thread has called the module meanwhile.

        Raises:
            Unsupported: the module is compiled, so a Python replacement would be traced into its graph.
        """
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise Unsupported(f"this {type(module).__name__} is compiled, and a change would be traced into its graph.")
        self.replace(module, "forward", _InThread(make(module.forward), module.forward, passed).call)

    def replace_call(
        self,
        module: nn.Module,
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        passed: Callable[[], None] = lambda: None,
    ) -> None:
        """As `replace_forward`, but outside of the module's graph if it is compiled."""
        compiled: Any = getattr(module, "_compiled_call_impl", None)
        if compiled is None:
            self.replace_forward(module, make, passed)
        else:
            self.replace(module, "_compiled_call_impl", _InThread(make(compiled), compiled, passed).call)

    def stand_aside(self, network: nn.Module) -> None:
        """Let other threads run the compiled blocks of a network uncompiled: graphs cannot tell threads apart."""
        for block in network.modules():
            compiled: Any = getattr(block, "_compiled_call_impl", None)
            if compiled is not None:
                self.replace(block, "_compiled_call_impl", _InThread(compiled, block._call_impl).call)

    def let_others_through(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Keep what others put in place of `forward` for this thread, and let all other threads call `forward`."""
        self.replace(module, "forward", _InThread(module.forward, forward).call)

    def replace_blocks(self, network: nn.Module, name: str, blocks: Sequence[nn.Module]) -> None:
        """Hide the list of blocks `network.name` behind another one, for this thread."""
        self.replace(network, name, _BlocksInThread(blocks, getattr(network, name)))

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` as an instance attribute; undone only if it is still ours when the run ends."""
        before = vars(owner).get(name, _MISSING)
        self._undo.callback(_put_back, owner, name, value, before)  # first: Ctrl-C may come between the two
        # object.__setattr__ keeps pipelines and configs from registering the value as a component of theirs
        object.__setattr__(owner, name, value)

    def wrap_method(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace the method `owner.name` by `around(original, *args, **kwargs)`, for calls from this thread.

        The signature stays visible.
        """
        original = getattr(owner, name)
        ours = _InThread(functools.partial(around, original), original)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return ours.call(*args, **kwargs)

        self.replace(owner, name, wrapped)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the run ends, in reverse order with the other undo steps."""
        self._undo.callback(callback)


class _InThread:
    """A function for the thread that made this, another one for all others.

    A bound method of one shared function stands in place of the original, so that compiled blocks share their graphs.
    """

    def __init__(
        self, ours: Callable[..., Any], others: Callable[..., Any], passed: Callable[[], None] = lambda: None
    ) -> None:
        self.ours, self.others, self.passed, self.thread = ours, others, passed, threading.get_ident()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The function of the calling thread."""
        # while a graph is traced: `stand_aside` keeps other threads away from it
        if torch.compiler.is_compiling() or threading.get_ident() == self.thread:
            return self.ours(*args, **kwargs)
        self.passed()
        return self.others(*args, **kwargs)


class _BlocksInThread(nn.ModuleList):
    """Blocks for the thread that made this, others for all others."""

    def __init__(self, ours: Sequence[nn.Module], others: nn.ModuleList) -> None:
        object.__setattr__(self, "_thread", threading.get_ident())  # which the list's own __init__ asks for
        super().__init__(ours)
        self._others = [others]  # in a list: they are no children of this one

    def __iter__(self) -> Any:
        return super().__iter__() if threading.get_ident() == self._thread else iter(self._others[0])

    def __len__(self) -> int:
        return super().__len__() if threading.get_ident() == self._thread else len(self._others[0])

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if threading.get_ident() == self._thread else self._others[0][index]


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

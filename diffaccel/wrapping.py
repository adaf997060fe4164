"""wrap(pipe, recipe): a pipeline that behaves like `pipe`, sooner. Opens a run, calls the pipeline, closes the run."""

from __future__ import annotations

import functools
import inspect
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffaccel.engine.add_ons import add_ons, refuse_add_ons
from diffaccel.engine.attention_calls import check_kernel, use_kernel
from diffaccel.engine.clock import Clock
from diffaccel.engine.conditions import AdapterProbe
from diffaccel.engine.finite import watch_pictures, watch_result
from diffaccel.engine.flops import FlopLedger
from diffaccel.engine.method import Method
from diffaccel.engine.others import live_with_others
from diffaccel.engine.places import stepped
from diffaccel.engine.report import Report, build_report
from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.kernels.registration import recording
from diffaccel.models.compiled import is_compiled
from diffaccel.models.model_map import ModelMap, describe, is_spread
from diffaccel.models.transformers import TransformerLayout
from diffaccel.recipes.recipe import Recipe
from diffaccel.recipes.resolve import resolve_recipe

_OWN = frozenset({"pipe", "recipe", "report", "attention_kernel", "_ledger", "_measured", "_networks"})


class _AsThePipeline:
    """`__call__` of an instance, with the signature of its pipeline: programs read it to choose their arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        if instance is None:
            return self.function
        bound = functools.partial(self.function, instance)
        functools.update_wrapper(bound, self.function)
        bound.__signature__ = inspect.signature(instance.pipe.__call__)  # type: ignore[attr-defined]
        return bound


class AcceleratedPipeline:
    """A diffusers pipeline with a recipe around its denoiser while it runs.

    Call it exactly like the pipeline. All other attributes are read from and written to the pipeline, which stays stock
    outside a call. It passes for an instance of the pipeline's class; what diffusers makes from it (`from_pipe`) is a stock
    pipeline, to be wrapped again.

    Attributes:
        pipe: the stock pipeline.
        recipe: the recipe, fixed at construction.
        report: what the last call did; None before the first one.
        attention_kernel: who computes dense attention in the denoiser.
    """

    pipe: Any
    recipe: Recipe
    report: Report | None
    attention_kernel: str

    def __init__(self, pipe: Any, recipe: Recipe, attention_kernel: str = "sdpa") -> None:
        model = describe(pipe)
        recipe = recipe.on_transformers() if isinstance(model.layout, TransformerLayout) else recipe.on_unets()
        _check(model, recipe, attention_kernel)
        if attention_kernel != "sdpa":
            check_kernel(attention_kernel, model)
        self.pipe, self.recipe, self.report = pipe, recipe, None
        self.attention_kernel = attention_kernel
        self._ledger = FlopLedger()
        self._measured: dict[Hashable, Any] = {}
        self._networks: Hashable = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline with the recipe; arguments and result are the pipeline's own."""
        model = describe(self.pipe)  # again: components may have been exchanged since the last call
        convention = model.convention
        networks = _describe_work(model)
        if networks != self._networks:
            _check(model, self.recipe, self.attention_kernel)
            self._ledger, self._measured, self._networks = FlopLedger(), {}, networks
        clock = Clock(
            self.pipe.scheduler,
            lambda: getattr(self.pipe, "num_timesteps", None),
            scheduler_time=convention.scheduler_time,
        )
        run = Run(
            clock,
            self._ledger,
            convention.row_order,
            convention.calls,
            convention.sample,
            convention.listed,
            convention.lengths,
            shared=convention.shared,
            measured=self._measured,
            guides=functools.partial(_guides, self.pipe),
        )
        methods = [method for method in self.recipe.methods if not method.is_off]
        started, completed = time.perf_counter(), False
        try:
            with Seams() as seams, recording(run.operators):
                seams.claim([*_networks(model), self.pipe.scheduler])
                seams.keep_processors(_networks(model))
                arguments = _prepare(self.pipe, methods, run, seams, args, kwargs)
                run.arguments = _by_name(self.pipe, *arguments)
                clock.lowest = _lowest_timestep(self.pipe, run.arguments)
                if convention.images is not None:
                    run.images = convention.images(run.arguments)
                _bracket(model, run, seams)
                _Attachment(model, methods, self.attention_kernel, run).hold(seams)
                watch_pictures(self.pipe, run, seams)
                result = self.pipe(*arguments[0], **arguments[1])
            watch_result(run, result)
            completed = True
        finally:
            seconds = time.perf_counter() - started
            self.report = build_report(run, self.recipe.to_dict(), seconds, completed=completed)
            run.release()
        return result

    if not TYPE_CHECKING:  # a type checker reads the method as it is written
        __call__ = _AsThePipeline(__call__)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The pipeline's: AutoPipeline goes by its name, and programs ask what a pipeline is an instance of."""
        pipe = vars(self).get("pipe")
        return AcceleratedPipeline if pipe is None else type(pipe)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bare, (), vars(self)  # pickle compares `__class__` with what it would build

    def to(self, *args: Any, **kwargs: Any) -> AcceleratedPipeline:
        """Move or cast the pipeline; as `pipe.to` returns the pipeline, so this returns the accelerated one."""
        self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:  # not set yet: copy and pickle ask before __init__ has run
            raise AttributeError(name)
        if name == "__signature__":
            return inspect.signature(self.pipe.__call__)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "recipe" and "recipe" in vars(self):
            raise AttributeError("the recipe of an accelerated pipeline is fixed; wrap its `.pipe` with another one.")
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipe, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.pipe)})

    def __repr__(self) -> str:
        return f"diffaccel: {type(self.pipe).__name__} with {self.recipe.describe()}"


def _bare() -> AcceleratedPipeline:
    return object.__new__(AcceleratedPipeline)


def wrap(
    pipe: Any,
    recipe: Recipe | str | os.PathLike[str] | Method | Sequence[Method],
    *,
    attention_kernel: str = "sdpa",
) -> AcceleratedPipeline:
    """Accelerate a diffusers pipeline without touching it.

    Args:
        pipe: any supported diffusers pipeline.
        recipe: methods, a preset name, a `Recipe`, or the path of a JSON recipe.
        attention_kernel: who computes dense attention in the denoiser: "sdpa" is torch's own choice; "flash3", "sage",
            "natten", "flex" and "xformers" need their packages (`diffaccel doctor` lists them). It belongs to the
            machine and not to the recipe. The report counts what ran.
    Raises:
        RecipeError: the recipe is wrong.
        Unsupported: the pipeline is unknown, a method cannot work on it, or the kernel is not installed.
    """
    if isinstance(pipe, AcceleratedPipeline):
        raise Unsupported("this pipeline is wrapped already; wrap its `.pipe` with all methods in one recipe.")
    return AcceleratedPipeline(pipe, resolve_recipe(recipe), attention_kernel)


def _describe_work(model: ModelMap) -> Hashable:
    """What the work of a network call depends on besides its arguments: weights, adapters, add-ons, where they are."""
    return tuple(
        (
            is_compiled(net),
            id(model.seat(net)),
            AdapterProbe(net).state(),
            add_ons(net),
            tuple((p.shape, p.dtype, p.device) for p in net.parameters()),
        )
        for net in _networks(model)
    )


def _check(model: ModelMap, recipe: Recipe, attention_kernel: str) -> None:
    """Raise `Unsupported` if a method, or the kernel, cannot work on this model as it is now."""
    inside = [method.name for method in recipe.methods if method.inside and not method.is_off]
    if attention_kernel != "sdpa":
        inside.append(f"the attention kernel {attention_kernel!r}")
    if inside:
        model.refuse_compiled(inside[0])
    tokens = next((method.name for method in recipe.methods if method.by_token and not method.is_off), None)
    spread = next((type(network).__name__ for network, _ in model.denoisers if is_spread(network)), None)
    if tokens and spread:
        raise Unsupported(
            f"{tokens} needs all tokens of a picture in one place, and context parallelism divides those of this {spread} "
            "between processes."
        )
    refuse_add_ons(_networks(model), recipe.methods)
    for method in recipe.methods:
        method.check(model)


def _networks(model: ModelMap) -> list[Any]:
    return [*(net for net, _ in model.denoisers), *(net for net, _ in model.controlnets)]


def _prepare(
    pipe: Any, methods: list[Method], run: Run, seams: Seams, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The pipeline's call arguments after the schedule methods changed them."""
    before = _by_name(pipe, args, kwargs)
    after = functools.reduce(lambda given, method: method.prepare_call(pipe, given, run, seams), methods, before)
    return (args, kwargs) if after == before else _placed(pipe, args, dict(after))


def _placed(pipe: Any, args: Any, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Changed arguments by position and by name as the caller gave them: a user's pipeline may read `*args`."""
    parameters = [*inspect.signature(type(pipe).__call__).parameters.values()][1:]
    names = [p.name if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else None for p in parameters]
    names += [None] * len(args)
    return tuple(named.pop(name) if name in named else value for name, value in zip(names, args, strict=False)), named


def _by_name(pipe: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(type(pipe).__call__).bind_partial(pipe, *args, **kwargs)
    given = dict(list(bound.arguments.items())[1:])
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            given.pop(name, None)  # they have no names
    return given


def _guides(pipe: Any) -> bool | None:
    """Whether the pipeline guides; None if it does not say, or lets guidance end by itself (`cfg_truncation`)."""
    if getattr(pipe, "_cfg_truncation", None) is not None:
        return None
    said: bool | None = getattr(pipe, "do_classifier_free_guidance", None)
    return said


def _lowest_timestep(pipe: Any, arguments: Mapping[str, Any]) -> float:
    """Below this the pipeline hands over (`denoising_end`); some note the length of their list before they cut it."""
    end = arguments.get("denoising_end")
    if not isinstance(end, float) or not 0 < end < 1:
        return -math.inf
    trained: int = pipe.scheduler.config.num_train_timesteps
    return round(trained - end * trained)


def _bracket(model: ModelMap, run: Run, seams: Seams) -> None:
    """Let the clock and the number of images follow the pipeline."""
    scheduler = model.pipe.scheduler
    seams.wrap_method(scheduler, "set_timesteps", functools.partial(_then, run.restart))
    seams.wrap_method(scheduler, "set_timesteps", _with_lists_of_one_length)
    seams.wrap_method(scheduler, "step", functools.partial(_advance, run))
    if hasattr(scheduler, "scale_model_input"):
        seams.wrap_method(scheduler, "scale_model_input", functools.partial(_note_timestep, run))
    if hasattr(model.pipe, "prepare_latents"):
        seams.wrap_method(model.pipe, "prepare_latents", functools.partial(_note_images, run))


class _Attachment:
    """The methods around the networks of a call, attached anew for every run of its scheduler."""

    def __init__(self, model: ModelMap, methods: list[Method], kernel: str, run: Run) -> None:
        self.model, self.methods, self.kernel, self.run = model, methods, kernel, run
        self.seams = Seams()

    def hold(self, seams: Seams) -> None:
        """Attach until `seams` close."""
        seams.on_close(self.seams.close)
        self.run.attach_again = self.renew
        self.attach()

    def renew(self) -> None:
        """Take the methods off with all they know, and attach them again."""
        self.seams.close()
        self.run.forget()
        self.attach()

    def attach(self) -> None:
        """Install methods and network seams, inner layers first so that outer ones wrap them."""
        model, run = self.model, self.run
        if self.kernel != "sdpa":
            use_kernel(self.kernel, model, run)
        live_with_others(model, run, self.seams)
        for network in _networks(model):
            self.seams.stand_aside(network)
        for method in reversed(self.methods):
            method.attach(model, run, self.seams)
        for denoiser, _ in model.denoisers:
            _stand_around(model, "denoiser", denoiser, run, self.seams)
        for net, _ in model.controlnets:
            _stand_around(model, "controlnet", net, run, self.seams)
        if model.group is not None:
            self.seams.replace_forward(model.group, functools.partial(functools.partial, run.announce, model.group))


def _stand_around(model: ModelMap, network: str, module: Any, run: Run, seams: Seams) -> None:
    batched = model.convention.batched

    def make(original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run.handle(network, module, original, batched, args, kwargs)

        return forward

    def passed() -> None:
        run.note(f"another thread called this {type(module).__name__} meanwhile; that call ran without the recipe.")

    seams.replace_call(model.seat(module), make, passed)


def _then(after: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    after()
    return result


def _advance(run: Run, original: Any, *args: Any, **kwargs: Any) -> Any:
    before = args[2] if len(args) > 2 else kwargs.get("sample")
    if isinstance(before, torch.Tensor):
        run.places.finish(before)
    result = original(*args, **kwargs)
    run.clock.advance()
    after = stepped(result)
    if isinstance(after, torch.Tensor):
        run.places.begin(after)
    return result


def _with_lists_of_one_length(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Some pipelines (CogView4) make timesteps from the number of steps beside the sigmas that the call gives."""
    sigmas, timesteps = kwargs.get("sigmas"), kwargs.get("timesteps")
    if sigmas is not None and timesteps is not None and len(sigmas) != len(timesteps):
        raise Unsupported(
            f"this pipeline takes as many sigmas as timesteps, and got {len(sigmas)} and {len(timesteps)}; where you give the "
            f"sigmas only, call it with num_inference_steps={len(sigmas)} too."
        )
    return original(*args, **kwargs)


def _note_timestep(run: Run, original: Any, sample: Any, timestep: Any = None, **kwargs: Any) -> Any:
    result = original(sample, timestep, **kwargs)
    if timestep is not None:
        run.clock.timestep = float(timestep)
    run.places.scaled(sample, result)
    return result


def _note_images(run: Run, original: Any, *args: Any, **kwargs: Any) -> Any:
    latents = original(*args, **kwargs)
    first = latents[0] if isinstance(latents, tuple) else latents
    run.images = int(first.shape[0])
    run.places.begin(first)
    return latents

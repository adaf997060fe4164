"""Other people's packages in the same run: tomesd, DeepCache and cache-dit from PyPI, and the caches of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("tomesd", "DeepCache")
TRANSFORMER_PACKAGES = ("cache-dit",)


def installed(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Version of each package, None where it is missing."""
    return {name: _version(name) for name in packages}


@contextmanager
def tomesd(pipe: Any, ratio: float) -> Iterator[Any]:
    """The pipeline with tomesd's token merging at its defaults (self-attention of the largest grid only)."""
    import tomesd as package

    package.apply_patch(pipe, ratio=ratio)
    try:
        yield pipe
    finally:
        package.remove_patch(pipe)
        _remove_leftovers(pipe.unet, "_tome_info")


@contextmanager
def deepcache(pipe: Any, interval: int) -> Iterator[Any]:
    """The pipeline with DeepCache's helper, branch 0, uniform."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield pipe
    finally:
        helper.disable()
        _remove_leftovers(pipe.unet, "forward")


@contextmanager
def diffusers_cache(pipe: Any, config: Any) -> Iterator[Any]:
    """The pipeline with a cache of diffusers itself, as its documentation says."""
    before = _attributes(pipe.transformer)
    pipe.transformer.enable_cache(config)
    try:
        yield pipe
    finally:
        pipe.transformer.disable_cache()
        _remove_additions(before)


@contextmanager
def cache_dit(pipe: Any, hits: int) -> Iterator[Any]:
    """The pipeline with cache-dit's DBCache: one warm-up step, first block always, then `hits` cached steps per full one."""
    import cache_dit as package

    call, before = type(pipe).__call__, _attributes(pipe.transformer)  # it replaces the method of the class
    config = package.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        max_continuous_cached_steps=hits,
        residual_diff_threshold=1.0,  # from 1 on every step that may be cached is
    )
    package.enable_cache(pipe, cache_config=config)
    try:
        yield pipe
    finally:
        package.disable_cache(pipe)
        type(pipe).__call__ = call
        _remove_additions(before)


def _attributes(network: Any) -> list[tuple[Any, set[str], list[str]]]:
    """Of every module its attributes and its children in order."""
    return [(module, set(vars(module)), list(module._modules)) for module in network.modules()]


def _remove_additions(before: list[tuple[Any, set[str], list[str]]]) -> None:
    """Caches leave hooks, statistics and another order of children; the next variant must meet a stock network."""
    for module, names, children in before:
        for name in set(vars(module)) - names:
            del vars(module)[name]
        for name in children:
            module._modules[name] = module._modules.pop(name)


def _remove_leftovers(unet: Any, name: str) -> None:
    """Both packages leave an instance attribute behind; the next variant must meet a stock network."""
    for module in unet.modules():
        vars(module).pop(name, None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

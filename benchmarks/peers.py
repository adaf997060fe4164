"""Other people's packages in the same run: tomesd and DeepCache from PyPI, used as their documentation says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("tomesd", "DeepCache")


def installed() -> dict[str, str | None]:
    """Version of each package, None where it is missing."""
    return {name: _version(name) for name in PACKAGES}


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


def _remove_leftovers(unet: Any, name: str) -> None:
    """Both packages leave an instance attribute behind; the next variant must meet a stock network."""
    for module in unet.modules():
        vars(module).pop(name, None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

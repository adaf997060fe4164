"""diffaccel: the same picture sooner, for Hugging Face diffusers pipelines.

Names are loaded on first use, so that `import diffaccel` and `diffaccel --help` stay fast. No public name equals the name
of a submodule, because importing the submodule would replace it (`wrap` therefore lives in `wrapping.py`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffaccel.version import __version__ as __version__

if TYPE_CHECKING:
    from diffaccel.engine.report import Report as Report
    from diffaccel.erasure import Edit as Edit
    from diffaccel.erasure import apply_edit as apply_edit
    from diffaccel.erasure import load_edit as load_edit
    from diffaccel.erasure import remove_edit as remove_edit
    from diffaccel.erasure.solve import erase as erase
    from diffaccel.errors import DiffaccelError as DiffaccelError
    from diffaccel.errors import RecipeError as RecipeError
    from diffaccel.errors import Unsupported as Unsupported
    from diffaccel.methods import AdaptiveGuidance as AdaptiveGuidance
    from diffaccel.methods import BlockCache as BlockCache
    from diffaccel.methods import Erase as Erase
    from diffaccel.methods import Forecast as Forecast
    from diffaccel.methods import GuidanceInterval as GuidanceInterval
    from diffaccel.methods import NormalizedAttentionGuidance as NormalizedAttentionGuidance
    from diffaccel.methods import RegionSampling as RegionSampling
    from diffaccel.methods import ResidualCache as ResidualCache
    from diffaccel.methods import SkipCache as SkipCache
    from diffaccel.methods import SparseAttention as SparseAttention
    from diffaccel.methods import SparseCrossAttention as SparseCrossAttention
    from diffaccel.methods import StepReuse as StepReuse
    from diffaccel.methods import StepSchedule as StepSchedule
    from diffaccel.methods import TokenDownsampling as TokenDownsampling
    from diffaccel.methods import TokenMerging as TokenMerging
    from diffaccel.methods.caches.skip_branches import add_skip_branches as add_skip_branches
    from diffaccel.methods.caches.skip_branches import load_skip_branches as load_skip_branches
    from diffaccel.methods.caches.skip_branches import remove_skip_branches as remove_skip_branches
    from diffaccel.methods.caches.skip_branches import save_skip_branches as save_skip_branches
    from diffaccel.miniatures import load_judge as load_judge
    from diffaccel.miniatures import load_miniature as load_miniature
    from diffaccel.recipes.presets import presets as presets
    from diffaccel.recipes.recipe import Recipe as Recipe
    from diffaccel.wrapping import AcceleratedPipeline as AcceleratedPipeline
    from diffaccel.wrapping import wrap as wrap

_HOME = {
    "wrap": "wrapping",
    "AcceleratedPipeline": "wrapping",
    "Recipe": "recipes.recipe",
    "presets": "recipes.presets",
    "Report": "engine.report",
    "GuidanceInterval": "methods",
    "AdaptiveGuidance": "methods",
    "SkipCache": "methods",
    "RegionSampling": "methods",
    "ResidualCache": "methods",
    "BlockCache": "methods",
    "Forecast": "methods",
    "Erase": "methods",
    "NormalizedAttentionGuidance": "methods",
    "SparseCrossAttention": "methods",
    "TokenMerging": "methods",
    "TokenDownsampling": "methods",
    "SparseAttention": "methods",
    "StepReuse": "methods",
    "StepSchedule": "methods",
    "add_skip_branches": "methods.caches.skip_branches",
    "load_skip_branches": "methods.caches.skip_branches",
    "remove_skip_branches": "methods.caches.skip_branches",
    "save_skip_branches": "methods.caches.skip_branches",
    "load_miniature": "miniatures",
    "load_judge": "miniatures",
    "erase": "erasure.solve",
    "apply_edit": "erasure",
    "remove_edit": "erasure",
    "load_edit": "erasure",
    "Edit": "erasure",
    "DiffaccelError": "errors",
    "Unsupported": "errors",
    "RecipeError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffaccel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffaccel.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

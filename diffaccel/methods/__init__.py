"""The methods, one file each. Importing this package registers them all."""

from diffaccel.engine import method as base
from diffaccel.methods.attention.sparse_attention import SparseAttention as SparseAttention
from diffaccel.methods.attention.sparse_cross_attention import SparseCrossAttention as SparseCrossAttention
from diffaccel.methods.block_cache.block_cache import BlockCache as BlockCache
from diffaccel.methods.caches.forecast import Forecast as Forecast
from diffaccel.methods.caches.residual_cache import ResidualCache as ResidualCache
from diffaccel.methods.caches.skip_cache import SkipCache as SkipCache
from diffaccel.methods.erase import Erase as Erase
from diffaccel.methods.guidance.adaptive_guidance import AdaptiveGuidance as AdaptiveGuidance
from diffaccel.methods.guidance.guidance_interval import GuidanceInterval as GuidanceInterval
from diffaccel.methods.guidance.normalized_attention_guidance import (
    NormalizedAttentionGuidance as NormalizedAttentionGuidance,
)
from diffaccel.methods.regions.region_sampling import RegionSampling as RegionSampling
from diffaccel.methods.schedule.step_schedule import StepSchedule as StepSchedule
from diffaccel.methods.steps.step_reuse import StepReuse as StepReuse
from diffaccel.methods.tokens.token_downsampling import TokenDownsampling as TokenDownsampling
from diffaccel.methods.tokens.token_merging import TokenMerging as TokenMerging


def registry() -> dict[str, type[base.Method]]:
    """All methods by name, in the order of their layers."""
    return dict(sorted(base.REGISTERED.items(), key=lambda item: (item[1].layer, item[0])))

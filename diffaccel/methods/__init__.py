"""The methods, one file each. Importing this package registers them all."""

from diffaccel import method as base
from diffaccel.methods.adaptive_guidance import AdaptiveGuidance as AdaptiveGuidance
from diffaccel.methods.block_cache import BlockCache as BlockCache
from diffaccel.methods.erase import Erase as Erase
from diffaccel.methods.forecast import Forecast as Forecast
from diffaccel.methods.guidance_interval import GuidanceInterval as GuidanceInterval
from diffaccel.methods.normalized_attention_guidance import NormalizedAttentionGuidance as NormalizedAttentionGuidance
from diffaccel.methods.region_sampling import RegionSampling as RegionSampling
from diffaccel.methods.residual_cache import ResidualCache as ResidualCache
from diffaccel.methods.skip_cache import SkipCache as SkipCache
from diffaccel.methods.sparse_attention import SparseAttention as SparseAttention
from diffaccel.methods.sparse_cross_attention import SparseCrossAttention as SparseCrossAttention
from diffaccel.methods.step_reuse import StepReuse as StepReuse
from diffaccel.methods.step_schedule import StepSchedule as StepSchedule
from diffaccel.methods.token_downsampling import TokenDownsampling as TokenDownsampling
from diffaccel.methods.token_merging import TokenMerging as TokenMerging


def registry() -> dict[str, type[base.Method]]:
    """All methods by name, in the order of their layers."""
    return dict(sorted(base.REGISTERED.items(), key=lambda item: (item[1].layer, item[0])))

"""FLOP counts on the real architectures, on the meta device: no weights, no arithmetic, exact shapes.

Expected figures: SD 1.5 at 512 px and SDXL at 1024 px cost 401.6 and 3380.6 GMAC per row, and a cached evaluation at depth
b the shares below (matrix products, convolutions and attention products; independent measurement on the same models).
"""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.models import SD15_UNET, SDXL_UNET
from diffaccel.flops import count_flops
from diffaccel.methods.bypass import Bypass, bypass_unet
from diffaccel.models.unet import describe_unet
from diffaccel.seams import Seams

SHARES = {
    "sd15": (SD15_UNET, 64, 401.6, [7.9, 22.4, 38.0, 47.0, 56.4, 67.3, 76.0, 84.8, 94.1]),
    "sdxl": (SDXL_UNET, 128, 3380.6, [1.5, 3.8, 6.6, 12.9, 21.4, 30.6, 43.7, 65.9, 88.2]),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("model", SHARES)
def test_cached_evaluations_cost_the_known_share(model):
    config, side, gmac, shares = SHARES[model]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        sample, text = torch.empty(1, 4, side, side), torch.empty(1, 77, config["cross_attention_dim"])
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        step = torch.tensor(1)

    def call():
        return unet(sample, step, text, added_cond_kwargs=added).sample

    whole = count_flops(call)[1]
    assert whole / 2e9 == pytest.approx(gmac, rel=0.005)
    for depth, share in enumerate(shares):
        bypass = Bypass()
        with Seams() as seams:
            bypass_unet(describe_unet(unet), depth, bypass, seams)
            with bypass.active(0, cached=False):
                assert count_flops(call)[1] == whole
            with bypass.active(0, cached=True):
                assert 100 * count_flops(call)[1] / whole == pytest.approx(share, abs=0.1)

"""FLOP counts on the real architectures, on the meta device: no weights, no arithmetic, exact shapes.

Expected figures: SD 1.5 at 512 px and SDXL at 1024 px cost 401.6 and 3380.6 GMAC per row, and a cached evaluation at depth
b the shares below (matrix products, convolutions and attention products; independent measurement on the same models).
HunyuanDiT at 1024 px costs 7.18 TMAC per row.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanDiT2DModel, UNet2DConditionModel

from benchmarks.models import SD15_UNET, SDXL_UNET
from diffaccel.engine.flops import count_flops
from diffaccel.engine.seams import Seams
from diffaccel.methods.caches.bypass import Bypass, bypass_unet
from diffaccel.methods.caches.long_skips import BlockBypass, bypass_blocks
from diffaccel.models.transformers import describe_transformer
from diffaccel.models.unet import describe_unet

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


# HunyuanDiT v1.2; the shares by number of outer pairs that run
HUNYUAN = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 128,
    "hidden_size": 1408,
    "num_layers": 40,
    "mlp_ratio": 4.3637,
    "use_style_cond_and_image_meta_size": False,
}
HUNYUAN_SHARES = {1: 5.1, 2: 10.1, 4: 20.1, 8: 40.2, 14: 70.2, 19: 95.2}


@torch.no_grad()
def test_cached_evaluations_of_hunyuan_dit_cost_the_known_share():
    with torch.device("meta"):
        model = HunyuanDiT2DModel(**HUNYUAN)
        arguments = {
            "hidden_states": torch.empty(1, 4, 128, 128),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 77, 1024),
            "text_embedding_mask": torch.empty(1, 77),
            "encoder_hidden_states_t5": torch.empty(1, 256, 2048),
            "text_embedding_mask_t5": torch.empty(1, 256),
            "image_rotary_emb": (torch.empty(4096, 88), torch.empty(4096, 88)),
        }

    def call():
        return model(**arguments).sample

    whole = count_flops(call)[1]
    assert whole / 2e12 == pytest.approx(7.18, abs=0.005)
    bypass, layout = BlockBypass(), describe_transformer(model)
    for depth, share in HUNYUAN_SHARES.items():
        with Seams() as seams:
            bypass_blocks(layout, depth, bypass, seams)
            if not bypass.holds(0):  # F has one shape at every depth
                with bypass.active(0, cached=False):
                    assert count_flops(call)[1] == whole
            with bypass.active(0, cached=True):
                assert 100 * count_flops(call)[1] / whole == pytest.approx(share, abs=0.05)

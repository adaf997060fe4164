"""Train emoji-sd's denoiser: a UNet2DConditionModel with v-prediction on the codec's latents.

python -m training.world.unet --minutes 90 --sizes 128
python -m training.world.unet --minutes 200 --sizes 128:1,256:3        # goes on from there

The text encoder is frozen. Attention, to itself and to the text, is at every level but the deepest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from training.train_unet import Noising, build_scheduler
from training.world.codec import LATENTS
from training.world.denoise import Pool, parse_shares
from training.world.learner import Learner, Plan, add_options, load_averaged, plan_of, train
from training.world.train_text import load_text

CHANNELS, HEADS, GROUPS = (32, 96, 160, 192), (1, 2, 3, 4), 16
NATIVE = 256
BATCH = 64
RATE, AVERAGE = 1.5e-3, 0.998
NOISE_MEAN, NOISE_SPREAD = 0.1, 1.2


def build_unet(width: int) -> UNet2DConditionModel:
    """A denoiser of about 11 M parameters; `width` is the text encoder's. diffusers' `attention_head_dim` counts heads."""
    return UNet2DConditionModel(
        sample_size=NATIVE // 8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=width,
        attention_head_dim=HEADS,
        norm_num_groups=GROUPS,
    )


class UnetLoss:
    """The squared error of v, from the step's number."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel, pool: Pool, device: str) -> None:
        self.unet, self.text, self.pool, self.device = unet, text.to(device), pool, device
        self.noising = Noising.of(build_scheduler())

    def steps(self, normal: Tensor) -> Tensor:
        """Training steps by a logit-normal law that leans to the noisy side."""
        count = len(self.noising.signal)
        return (torch.sigmoid(NOISE_MEAN + NOISE_SPREAD * normal) * count).long().clamp(max=count - 1)

    def __call__(self, step: int) -> Tensor:
        batch = self.pool.draw(step)
        steps = self.steps(batch.normal())
        noised, target = self.noising.mix(batch.clean, batch.noise, steps)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            with torch.no_grad():
                words = self.text(batch.ids.to(self.device)).last_hidden_state
            output = self.unet(noised.to(self.device), steps.to(self.device), words).sample
        return nn.functional.mse_loss(output.float(), target.to(self.device))


def use_plain_attention(model: nn.Module, device: str) -> None:
    """On a CPU, attention as two matrix products: the fused one's backward pass is slow in bfloat16."""
    if device == "cpu":
        model.set_attn_processor(AttnProcessor())


def train_unet(out: Path, plan: Plan, shares: dict[int, float], device: str = "cpu", seed: int = 4) -> None:
    """Train or continue; kept in `out/unet.pt`."""
    torch.manual_seed(seed)
    tokenizer, text = load_text(out)
    unet = build_unet(text.config.hidden_size).to(device)
    use_plain_attention(unet, device)
    pool = Pool(out, tokenizer, shares, BATCH, seed)
    train(Learner(unet, out / "unet.pt", plan), UnetLoss(unet, text, pool, device), "unet")


def load_unet(out: Path) -> UNet2DConditionModel:
    """The averaged UNet of `out`."""
    weights = load_averaged(out / "unet.pt", "training.world.unet")
    unet = build_unet(weights["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1])
    unet.load_state_dict(weights)
    return unet.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, minutes=90, rate=RATE, average=AVERAGE)
    parser.add_argument("--sizes", type=parse_shares, default={128: 1.0}, help="pixels and shares, as 128:1,256:3")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_unet(options.out, plan_of(options), options.sizes, options.device)


if __name__ == "__main__":
    main()

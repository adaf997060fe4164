"""Train emoji-sd3's denoiser: an SD3Transformer2DModel by flow matching, on the codec's latents.

python -m training.world.sd3 --minutes 90 --sizes 128
python -m training.world.sd3 --minutes 200 --sizes 128:1,256:3

Both CLIP encoders that Stable Diffusion 3 reads are cut from the one trained encoder, and its rows of zeros for T5
count as one (`training.train_sd3`). Positions are crops of a table for 512 px, so a model trained at 128 px already
knows the middle of the table that larger pictures use.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from training.train_sd3 import MOST_EMPTY_ROWS, OneEmptyRow, TextRows
from training.world.codec import LATENTS
from training.world.denoise import Pool, parse_shares
from training.world.learner import Learner, Plan, add_options, load_averaged, plan_of, train
from training.world.train_text import text_encoders

HEADS, HEAD_WIDTH, LAYERS, PATCH = 5, 48, 6, 2
NATIVE, LARGEST = 256, 512
BATCH = 64
RATE, AVERAGE = 1e-3, 0.998
NOISE_MEAN, NOISE_SPREAD = 0.4, 1.1


def build_transformer(width: int) -> SD3Transformer2DModel:
    """A denoiser of about 12 M parameters; `width` is the text encoder's.

    Every block starts as the identity (its gates are zero), as does the output, so training begins calmly.
    """
    model = SD3Transformer2DModel(
        sample_size=NATIVE // 8,
        patch_size=PATCH,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * width,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=LARGEST // 8 // PATCH,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".linear", "proj_out")):  # what scales, shifts and gates; and the output
                nn.init.zeros_(module.weight)
    return model


class FlowLoss:
    """The squared error of the velocity, noise minus latents, from the step's number."""

    def __init__(self, model: SD3Transformer2DModel, rows: TextRows, pool: Pool, device: str) -> None:
        self.model, self.rows, self.pool, self.device = model, rows, pool, device
        self.attention = OneEmptyRow()
        model.set_attn_processor(self.attention)
        for encoder in rows.encoders:
            encoder.to(device)

    def counts(self, step: int, count: int) -> Tensor:
        """(count,) how many empty rows to stand for: half the pipeline's default, half log-uniform down to 1."""
        generator = torch.Generator().manual_seed(step)
        spread, usual = torch.rand(2, count, generator=generator)
        return torch.where(usual < 0.5, float(MOST_EMPTY_ROWS), MOST_EMPTY_ROWS**spread).round()

    def __call__(self, step: int) -> Tensor:
        batch = self.pool.draw(step)
        level = torch.sigmoid(NOISE_MEAN + NOISE_SPREAD * batch.normal())
        mix = level.view(-1, 1, 1, 1)
        noised = (1 - mix) * batch.clean + mix * batch.noise
        self.attention.log_count = self.counts(step, len(level)).log().to(self.device)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            rows, pooled = self.rows(batch.ids.to(self.device))
            output = self.model(noised.to(self.device), rows, pooled, 1000 * level.to(self.device)).sample
        return nn.functional.mse_loss(output.float(), (batch.noise - batch.clean).to(self.device))


def train_transformer(out: Path, plan: Plan, shares: dict[int, float], device: str = "cpu", seed: int = 7) -> None:
    """Train or continue; kept in `out/sd3.pt`."""
    torch.manual_seed(seed)
    tokenizer, first, second = text_encoders(out)
    model = build_transformer(first.config.hidden_size).to(device)
    pool = Pool(out, tokenizer, shares, BATCH, seed)
    loss = FlowLoss(model, TextRows(first, second), pool, device)
    train(Learner(model, out / "sd3.pt", plan), loss, "sd3")


def load_transformer(out: Path) -> SD3Transformer2DModel:
    """The averaged transformer of `out`, with diffusers' own attention."""
    weights = load_averaged(out / "sd3.pt", "training.world.sd3")
    model = build_transformer(weights["context_embedder.weight"].shape[1] // 2)
    model.load_state_dict(weights)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, minutes=90, rate=RATE, average=AVERAGE)
    parser.add_argument("--sizes", type=parse_shares, default={128: 1.0}, help="pixels and shares, as 128:1,256:3")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_transformer(options.out, plan_of(options), options.sizes, options.device)


if __name__ == "__main__":
    main()

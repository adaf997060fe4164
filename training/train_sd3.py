"""Train a small SD3Transformer2DModel by flow matching, on the latents and the text encoder made for the UNet.

python -m training.train_sd3 --out training/out --minutes 85

Stable Diffusion 3 reads two CLIP encoders, each one layer before its last, and pads their rows with rows of zeros
where a T5 encoder would be. Both encoders here are cut from the one that `training.train_text` made.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import train_unet
from training.common import DEFAULT_OUT, Clock, learning_rate, load_checkpoint, save_atomically
from training.train_text import WIDTH as TEXT_WIDTH
from training.train_unet import BATCH, Run, load_text

HEADS, HEAD_WIDTH, LAYERS, PATCH = 4, 48, 6, 2
TEXT_ROWS_DIM = 2 * TEXT_WIDTH
LOWER_LAYERS = 1  # the second encoder's rows: single words, mixed once
MOST_EMPTY_ROWS = 256  # the pipeline's max_sequence_length unless told
PEAK_RATE, HOLD, WARMUP = 1e-3, 0.2, 100
AVERAGE_DECAY, WEIGHT_DECAY, BETAS = 0.998, 0.01, (0.9, 0.98)
MOMENTUM = 0.95
NOISE_MEAN, NOISE_SPREAD = 0.4, 1.1
SAVE_SECONDS = 120.0


def build_transformer() -> SD3Transformer2DModel:
    """A denoiser for 16 x 16 latents in patches of 2 x 2: 64 image tokens beside the text rows.

    Every block starts as the identity (its gates are zero), as does the output, so training begins calmly.
    """
    width = HEADS * HEAD_WIDTH
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_ROWS_DIM,
        caption_projection_dim=width,
        pooled_projection_dim=TEXT_ROWS_DIM,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".linear", "proj_out")):  # what scales, shifts and gates; and the output
                nn.init.zeros_(module.weight)
    return model


def build_flow_scheduler(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """Straight paths from noise to latents; `shift` above 1 spends more of the steps on noisy latents."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


def _lower_part(trained: CLIPTextModel, layers: int) -> CLIPTextModelWithProjection:
    """The first `layers` layers of `trained` and one more, with a pooled output as it is before any projection.

    The layer more is the trained one's next, or passes everything on where the trained one ends.
    """
    config = {**trained.config.to_dict(), "num_hidden_layers": layers + 1, "projection_dim": trained.config.hidden_size}
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    own, given = model.state_dict(), trained.state_dict()
    given = {(key if key in own else f"text_model.{key}"): value for key, value in given.items()}
    model.load_state_dict({**own, **{key: value for key, value in given.items() if key in own}})
    last = model.text_model.encoder.layers[-1]
    if layers == trained.config.num_hidden_layers:
        for part in (last.self_attn.out_proj, last.mlp.fc2):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    nn.init.eye_(model.text_projection.weight)
    return model.eval().requires_grad_(False)


def text_encoders(out: Path) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The tokenizer and both encoders that Stable Diffusion 3 asks for, cut from the trained one of `out`.

    The pipeline reads the rows one layer before the last: the whole trained encoder's from the first, what the
    trained one's lowest layer makes of the words from the second. Both pool the end-of-text position.
    """
    tokenizer, trained = load_text(out)
    return tokenizer, _lower_part(trained, trained.config.num_hidden_layers), _lower_part(trained, LOWER_LAYERS)


class TextRows:
    """Token ids to what the pipeline feeds the transformer, but with one row of zeros for all those of T5."""

    def __init__(self, first: CLIPTextModelWithProjection, second: CLIPTextModelWithProjection) -> None:
        self.encoders = (first, second)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n, 33, 256) and pooled (n, 256) of ids (n, 32)."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        rows = torch.cat([output.hidden_states[-2] for output in outputs], -1).float()
        pooled = torch.cat([output.text_embeds for output in outputs], -1).float()
        return torch.cat([rows, rows.new_zeros(len(rows), 1, rows.shape[-1])], 1), pooled


class OneEmptyRow:
    """Joint attention in which the last text row counts as many.

    Stable Diffusion 3 gives text rows no position, so equal rows stay equal through every block, and n of them act
    on the others like one whose attention score is raised by log n. Training so costs 33 text rows instead of 288.
    Set `log_count`, shape (batch,), before each forward.
    """

    def __init__(self) -> None:
        self.log_count = torch.zeros(1)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Image rows (n, i, width) and text rows (n, t, width) after attention over both."""
        images = hidden_states.shape[1]

        def heads(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        own = [heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        text = [heads(layer(encoder_hidden_states)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        if attn.norm_q is not None:
            own[0], own[1] = attn.norm_q(own[0]), attn.norm_k(own[1])
            text[0], text[1] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
        query, key, value = (torch.cat(pair, 2) for pair in zip(own, text, strict=True))
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        bias = scores.new_zeros(len(scores), 1, 1, scores.shape[-1])
        bias[..., -1] = self.log_count.to(bias).view(-1, 1, 1)
        mixed = ((scores + bias).softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for_images, for_text = mixed[:, :images], mixed[:, images:]
        if not attn.context_pre_only:
            for_text = attn.to_add_out(for_text)
        return attn.to_out[0](for_images), for_text


def orthogonal(update: Tensor, rounds: int = 4) -> Tensor:
    """Nearly the orthogonal factor of each (..., m, n) matrix, by Newton-Schulz iterations (Muon, Jordan 2024)."""
    flat = update.shape[-2] > update.shape[-1]
    x = (update.mT if flat else update).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if flat else x).float()


class Weights(train_unet.Weights):
    """The transformer in shared memory; the matrices inside its blocks are trained with Muon, the rest with AdamW.

    Muon's moment is kept among AdamW's first moments; it has no second.
    """

    def __init__(self, device: str) -> None:
        self.unet = build_transformer().to(device)
        self.processor = OneEmptyRow()
        self.unet.set_attn_processor(self.processor)
        parameters = list(self.unet.parameters())
        self.moments = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(2)]
        self.average = [parameter.detach().clone() for parameter in parameters]
        self.step = torch.zeros((), dtype=torch.long)
        self.matrices: dict[tuple[int, ...], list[int]] = {}  # shape -> which parameters; one stack for each shape
        self.rest: list[int] = []
        for index, (name, parameter) in enumerate(self.unet.named_parameters()):
            modulation = ".linear." in name
            if "transformer_blocks" in name and parameter.ndim == 2 and not modulation:
                self.matrices.setdefault(tuple(parameter.shape), []).append(index)
            else:
                self.rest.append(index)

    def muon(self, rate: float) -> None:
        """One step of the blocks' matrices; as long as one of AdamW's would be, so that one rate does for both."""
        parameters = list(self.unet.parameters())
        for shape, members in self.matrices.items():
            chosen = [parameters[index] for index in members]
            gradients, moments = [p.grad for p in chosen], [self.moments[0][index] for index in members]
            torch._foreach_lerp_(moments, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, moments, MOMENTUM))
            torch._foreach_mul_(chosen, 1 - rate * WEIGHT_DECAY)
            steps = orthogonal(ahead) * (0.2 * math.sqrt(max(shape)))
            torch._foreach_add_(chosen, list(steps.unbind()), alpha=-rate)

    @torch.no_grad()
    def apply(self, rate: float) -> None:
        """One step of both optimizers with the gradients at hand, and one of the average."""
        everything = list(self.unet.parameters())
        parameters = [everything[index] for index in self.rest]
        gradients = [parameter.grad for parameter in parameters]
        first, second = ([moments[index] for index in self.rest] for moments in self.moments)
        self.step += 1
        count = int(self.step)
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        scale = torch._foreach_div(second, 1 - BETAS[1] ** count)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(parameters, first, scale, -rate / (1 - BETAS[0] ** count))
        self.muon(rate)
        decay = min(AVERAGE_DECAY, (1 + count) / (10 + count))
        torch._foreach_lerp_(self.average, everything, 1 - decay)


class Data(train_unet.Data):
    """Scaled latents with their captions, as for the UNet, and this model's loss."""

    def __init__(self, out: Path, scale: float | None, seed: int) -> None:
        super().__init__(out, scale, seed)
        self.rows = TextRows(*text_encoders(out)[1:])

    def levels(self, count: int) -> Tensor:
        """(count,) noise levels in (0, 1): logit-normal, leaning to the noisy side, stratified over the batch."""
        place = (torch.arange(count) + torch.rand(count, generator=self.generator)) / count
        normal = math.sqrt(2) * torch.erfinv((2 * place - 1).clamp(-0.9999, 0.9999))
        return torch.sigmoid(NOISE_MEAN + NOISE_SPREAD * normal)

    def counts(self, count: int) -> Tensor:
        """(count,) how many empty rows to stand for: half the pipeline's default, half log-uniform down to 1."""
        spread = torch.rand(count, generator=self.generator)
        usual = torch.rand(count, generator=self.generator) < 0.5
        return torch.where(usual, float(MOST_EMPTY_ROWS), MOST_EMPTY_ROWS**spread).round()

    def flow_loss(self, model: SD3Transformer2DModel, processor: OneEmptyRow, device: str) -> Tensor:
        """Squared error of the velocity, noise minus latents, on the next batch."""
        index = self.next_index()
        ids = self.captions.batch(index, self.generator).to(device)
        clean = self.latents[index].to(device)
        noise = torch.randn(clean.shape, generator=self.generator).to(device)
        level = self.levels(len(clean)).to(device)
        processor.log_count = self.counts(len(clean)).log().to(device)
        mix = level.view(-1, 1, 1, 1)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            rows, pooled = self.rows(ids)
            output = model((1 - mix) * clean + mix * noise, rows, pooled, 1000 * level).sample
        return nn.functional.mse_loss(output.float(), noise - clean)


def work(number: int, weights: Weights, lock: Any, run: Run) -> None:
    """Train until the time is up. Worker 0 also reports and saves."""
    if run.device == "cpu":
        torch.set_num_threads(1)
    clock = Clock(run.minutes, run.spent)
    data = Data(run.out, run.scale, run.seed * 100_000 + 2 * int(weights.step) + number)
    for encoder in data.rows.encoders:
        encoder.to(run.device)
    model, losses, saved_at = weights.unet, [], clock.seconds

    def save() -> None:
        with lock:
            state = {**weights.state(), "seconds": clock.seconds, "scale": data.scale}
            save_atomically(state, run.out / "sd3.pt")

    while clock.progress < 1:
        loss = data.flow_loss(model, weights.processor, run.device)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with lock:
            weights.apply(learning_rate(PEAK_RATE, clock.progress, int(weights.step), WARMUP, HOLD))
        losses.append(loss.item())
        if number == 0 and len(losses) == 20:
            step, mean = int(weights.step), sum(losses) / len(losses)
            speed = step * BATCH / clock.seconds
            print(f"sd3 {step} {clock.seconds:.0f} s loss {mean:.4f} {speed:.0f}/s", flush=True)
            losses = []
        if number == 0 and clock.seconds - saved_at > SAVE_SECONDS:
            save()
            saved_at = clock.seconds
    if number == 0:
        save()


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 7, workers: int = 2) -> None:
    """Train or continue until `minutes` in total are used; the model is kept in `out/sd3.pt`."""
    torch.manual_seed(seed)
    weights, saved = Weights(device), load_checkpoint(out / "sd3.pt")
    if saved:
        weights.restore(saved)
    run = Run(out, minutes, saved["seconds"] if saved else 0.0, device, seed, saved["scale"] if saved else None)
    context = torch.multiprocessing.get_context("spawn")
    lock = context.Lock()
    if device == "cpu":
        weights.share()
    others = range(1, workers if device == "cpu" else 1)
    processes = [context.Process(target=work, args=(number, weights, lock, run)) for number in others]
    for process in processes:
        process.start()
    work(0, weights, lock, run)
    for process in processes:
        process.join()


def load_transformer(out: Path) -> tuple[SD3Transformer2DModel, float]:
    """The averaged transformer of `out`, with diffusers' own attention, and the factor its latents were scaled by."""
    saved = load_checkpoint(out / "sd3.pt")
    if saved is None:
        raise FileNotFoundError(f"no {out / 'sd3.pt'}: run training.train_sd3 first")
    model = build_transformer()
    for parameter, value in zip(model.parameters(), saved["average"], strict=True):
        parameter.data.copy_(value)
    return model.eval(), saved["scale"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=85)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each, on a CPU")
    options = parser.parse_args()
    train(options.out, options.minutes, options.device, workers=options.workers)


if __name__ == "__main__":
    main()

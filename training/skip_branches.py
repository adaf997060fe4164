"""Train skip branches for the bundled transformer, so that the skip cache works on it; then measure them.

python -m training.skip_branches --out training/out --minutes 20

The model stays as it is; only the branches learn. Nothing but the model is needed: it makes pictures, and all its
features on the way are kept. A training example is a later evaluation t of such a run, computed by the outer blocks alone
with a feature F of earlier ones, as the skip cache would do it; its target is what the whole model said there. Examples
with a fresh F keep full evaluations as they are.

Branches are worth having only if the pictures come out closer to the uncached ones than with a residual cache, which
costs as much and needs no training. The last lines say so, and `skip-branches.json` keeps the figures.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import diffaccel
from diffaccel import ResidualCache, SkipCache
from diffaccel.engine.method import Method
from diffaccel.engine.seams import Seams
from diffaccel.measure.quality import mean_psnr, psnr
from diffaccel.methods.caches.bypass import Feature
from diffaccel.methods.caches.long_skips import BlockBypass, bypass_blocks
from diffaccel.miniatures import miniature_path
from diffaccel.miniatures.scenes import caption, held_out_prompts, training_scene
from diffaccel.models.transformers import describe_transformer
from training.common import Trainee, load_checkpoint, run_script, save_atomically, write_json
from training.evaluate import load_pipeline

PAIRS, ORDER = 1, 1
STEPS, GUIDANCE = 28, 3.0
LONGEST = 4  # evaluations from one full one to the next: the branches see ages 0 to 3
PROMPTS, BATCH = 48, 32
RATE, DECAY = 1e-3, 0.995
SEED, TEST_SEED = 8, 9
INTERVALS, TEST_PROMPTS = (2, 3, 4), 32


@dataclass
class Runs:
    """What the model saw and said on plain runs; r rows (pictures times guidance branches), s steps.

    Attributes:
        latents, outputs: (s, r, channels, h, w).
        features: per stream (s, r, tokens, width) in half precision, the input of the first block that always runs.
        times: (s,) model time; 1000 times the flow time.
        text, pooled: (r, rows, dim) and (r, dim), the prompts.
    """

    latents: Tensor
    outputs: Tensor
    features: list[Tensor]
    times: Tensor
    text: Tensor
    pooled: Tensor

    def to(self, device: str) -> Runs:
        return Runs(**{name: _moved(value, device) for name, value in vars(self).items()})


def _moved(value: Any, device: str) -> Any:
    return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)


class Recorder:
    """Hooks that keep what goes through the network while a pipeline runs."""

    def __init__(self, network: nn.Module) -> None:
        self.kept: dict[str, list[Any]] = {name: [] for name in ("latents", "outputs", "features", "times")}
        self.prompt: dict[str, Tensor] = {}
        blocks = describe_transformer(network).blocks
        self.handles = [
            network.register_forward_hook(self._whole, with_kwargs=True),
            blocks[len(blocks) - PAIRS - 1].register_forward_hook(self._feature),
        ]

    def _whole(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.kept["latents"].append(kwargs["hidden_states"].cpu())
        self.kept["outputs"].append(output[0].cpu())
        self.kept["times"].append(kwargs["timestep"][0].float().cpu())
        self.prompt = {"text": kwargs["encoder_hidden_states"].cpu(), "pooled": kwargs["pooled_projections"].cpu()}

    def _feature(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept["features"].append([stream.half().cpu() for stream in output])

    def runs(self) -> Runs:
        """Everything since the start; the hooks are taken away."""
        for handle in self.handles:
            handle.remove()
        streams = [torch.stack(stream) for stream in zip(*self.kept["features"], strict=True)]
        stacked = {name: torch.stack(self.kept[name]) for name in ("latents", "outputs", "times")}
        return Runs(features=streams, **stacked, **self.prompt)


def generate(pipe: Any, prompts: list[str], seed: int, output_type: str = "pt") -> Tensor:
    """Pictures (n, 3, h, w) in [0, 1] or latents; picture i depends on its prompt and on seed + i only."""
    images: Tensor = pipe(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type=output_type,
        max_sequence_length=1,  # the attention that load_pipeline put in counts one empty row as all of them
    ).images
    return images.cpu()


def record(pipe: DiffusionPipeline, prompts: list[str]) -> Runs:
    """Plain runs of the pipeline, picture i with seed i, 16 at a time."""
    parts = []
    for start in range(0, len(prompts), 16):
        recorder = Recorder(pipe.transformer)
        generate(pipe, prompts[start : start + 16], SEED * 100_000 + start, "latent")
        parts.append(recorder.runs())
        print(f"recorded {min(start + 16, len(prompts))} of {len(prompts)}", flush=True)
    joined = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in ("latents", "outputs")}
    streams = [torch.cat(stream, 1) for stream in zip(*(part.features for part in parts), strict=True)]
    prompt = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("text", "pooled")}
    return Runs(features=streams, times=parts[0].times, **joined, **prompt)


def recorded(pipe: DiffusionPipeline, path: Path) -> Runs:
    """The runs kept in `path`, or new ones."""
    saved = load_checkpoint(path)
    if saved is None:
        rng = random.Random(SEED)
        runs = record(pipe, [caption(training_scene(rng), rng) for _ in range(PROMPTS)])
        save_atomically(vars(runs), path)
        return runs
    return Runs(**saved)


@dataclass
class Example:
    """Indices of one batch: rows, the evaluation to compute, the full one before it and the full one before that.

    Where there is none before, `earlier` equals `full` and F is copied; else it is extrapolated along flow time.
    """

    rows: Tensor
    now: Tensor
    full: Tensor
    earlier: Tensor


def draw(runs: Runs, generator: torch.Generator) -> Example:
    """A random batch: any interval from 2 up to the longest, any age within it, fresh ones included."""
    steps, rows = runs.latents.shape[:2]
    interval = torch.randint(2, LONGEST + 1, (BATCH,), generator=generator)
    age = (torch.rand(BATCH, generator=generator) * interval).long()
    full = (torch.rand(BATCH, generator=generator) * (steps - age)).long()
    earlier = torch.where(full >= interval, full - interval, full) if ORDER else full
    return Example(torch.randint(rows, (BATCH,), generator=generator), full + age, full, earlier)


def features_at(runs: Runs, batch: Example) -> list[Tensor]:
    """F of each row as the skip cache has it at evaluation `now`: (rows, tokens, width) per stream."""
    device = runs.times.device
    rows, now, full, earlier = (index.to(device) for index in vars(batch).values())
    gap = runs.times[full] - runs.times[earlier]
    weight = torch.where(gap != 0, (runs.times[now] - runs.times[full]) / gap, 0.0)[:, None, None]
    made = []
    for stream in runs.features:
        newest, before = stream[full, rows].float(), stream[earlier, rows].float()
        made.append(newest + weight * (newest - before))
    return made


class Student:
    """The transformer with branches, computing cached evaluations by the code of the skip cache."""

    def __init__(self, network: nn.Module, seams: Seams) -> None:
        self.network, self.bypass = network, BlockBypass()
        bypass_blocks(describe_transformer(network), PAIRS, self.bypass, seams)

    def __call__(self, runs: Runs, batch: Example) -> Tensor:
        """Outputs (rows, channels, h, w) with gradients to the branches."""
        features = []
        for value in features_at(runs, batch):
            features.append(Feature())
            features[-1].store(value, None, keep_previous=False)
        self.bypass.streams[0] = tuple(features)
        rows, now = batch.rows.to(runs.times.device), batch.now.to(runs.times.device)
        with self.bypass.active(0, cached=True):
            return self.network(
                hidden_states=runs.latents[now, rows],
                timestep=runs.times[now],
                encoder_hidden_states=runs.text[rows],
                pooled_projections=runs.pooled[rows],
            ).sample


def train(out: Path, minutes: float, device: str = "cpu", model: Path | None = None) -> None:
    """Train or continue, then measure; everything is kept in `out` under the name of the model's weights."""
    pipe = load_pipeline(model or miniature_path("shapes-sd3"), device)
    network = pipe.transformer.requires_grad_(False)
    name = f"skip-branches-{_digest(network)}"
    runs = recorded(pipe, out / f"{name}-runs.pt").to(device)
    branches = diffaccel.add_skip_branches(network, PAIRS)
    trainee = Trainee(branches, out / f"{name}.pt", minutes, rate=RATE, decay=DECAY, weight_decay=0.0)
    recent: list[float] = []
    with Seams() as seams:
        student = Student(network, seams)
        for step in trainee:
            batch = draw(runs, torch.Generator().manual_seed(SEED * 1_000_000 + step))
            target = runs.outputs[batch.now.to(device), batch.rows.to(device)]
            loss = nn.functional.mse_loss(student(runs, batch), target)
            trainee.learn(loss)
            recent.append(loss.item())
            if trainee.step % 50 == 0:
                seconds, loss_now = trainee.clock.seconds, sum(recent) / len(recent)
                print(f"branches {trainee.step} {seconds:.0f} s loss {loss_now:.6f}", flush=True)
                recent.clear()
            if trainee.step % 250 == 0:
                trainee.save()
        trainee.finish()
    diffaccel.save_skip_branches(network, out / f"{name}.safetensors")
    write_json(out / f"{name}.json", {"updates": trainee.step, "figures": measure(pipe)})


def _digest(network: nn.Module) -> str:
    total = hashlib.sha256()
    for value in network.state_dict().values():
        total.update(value.cpu().float().numpy().tobytes())
    return total.hexdigest()[:8]


def measure(pipe: DiffusionPipeline) -> list[dict[str, Any]]:
    """PSNR to the stock model's pictures of unseen prompts, at equal intervals, with and without the branches.

    The branches are in place for the skip caches only; they are measured, taken away for the others, and put back.
    """
    prompts = [case.prompt for case in held_out_prompts("mixed", TEST_PROMPTS, seed=TEST_SEED)]
    network = pipe.transformer
    weights = {key: value.clone() for key, value in network.skip_branches.state_dict().items()}
    variants: list[tuple[str, Method | None]] = [("branches, all evaluations full", None)]
    variants += [(f"skip_cache({i}), branches", SkipCache(interval=i, order=ORDER)) for i in INTERVALS]
    with_branches = [_pictures(pipe, prompts, method) for _, method in variants]
    network.skip_branches.load_state_dict({key: torch.zeros_like(value) for key, value in weights.items()})
    untrained = [(f"skip_cache({i}), untrained", SkipCache(interval=i, order=ORDER)) for i in INTERVALS]
    others = [_pictures(pipe, prompts, method) for _, method in untrained]
    diffaccel.remove_skip_branches(network)
    stock = _pictures(pipe, prompts, None)[0]
    residual = [
        (
            f"residual_cache({i}, order={order})",
            ResidualCache(interval=i, order=order, keep_first=PAIRS, keep_last=PAIRS),
        )
        for i in INTERVALS
        for order in (0, 1)
    ]
    others += [_pictures(pipe, prompts, method) for _, method in residual]
    diffaccel.add_skip_branches(network, PAIRS).load_state_dict(weights)
    rows = []
    for (label, _), (pictures, share) in zip(variants + untrained + residual, with_branches + others, strict=True):
        rows.append({"variant": label, "psnr": mean_psnr(psnr(pictures, stock)), "flops_share": share})
        print(f"{label}: {rows[-1]['psnr']:.2f} dB at {100 * share:.1f} % of the FLOPs", flush=True)
    return rows


def _pictures(pipe: DiffusionPipeline, prompts: list[str], method: Method | None) -> tuple[Tensor, float]:
    """Pictures (n, 3, h, w) and the share of the plain FLOPs."""
    fast = diffaccel.wrap(pipe, [method] if method else [])
    starts = range(0, len(prompts), 16)
    made = [generate(fast, prompts[start : start + 16], TEST_SEED * 100_000 + start) for start in starts]
    report = fast.report
    assert report is not None
    return torch.cat(made), report.flops / report.flops_plain


if __name__ == "__main__":
    run_script(__doc__, 20, train)

"""Train the judge on freshly drawn scenes, and its validity output on damaged ones.

python -m training.train_judge --out training/out --minutes 6
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.miniatures.judge import FIELDS, LAYOUTS, SIDE, Judge, JudgeNetwork, _compare
from diffaccel.miniatures.scenes import (
    BACKGROUNDS,
    PromptCase,
    Scene,
    Statement,
    canonical_slots,
    random_scene,
)
from training.common import Trainee, count_parameters, run_script, seeded, write_json
from training.finetune_decoder import apply_finetuned
from training.make_latents import encode, load_autoencoder
from training.scenes_render import render

CHANNELS = (16, 32, 64, 96)
BATCH = 64
POOL = 512
PEAK_RATE = 3e-3
Damage = Callable[[Tensor, Tensor, random.Random], Tensor]


def class_rows(scene: Scene) -> list[int]:
    """Two slots x 4 fields (-100 where there is no second object), the layout, the background."""
    slots = canonical_slots(scene)
    layout = "single" if "centre" in slots else ("horizontal" if "left" in slots else "vertical")
    first = [slots[place] for place in ("centre", "left", "top") if place in slots]
    second = [slots[place] for place in ("right", "bottom") if place in slots]
    rows = [[values.index(getattr(item, name)) for name, values in FIELDS] for item in first + second]
    rows += [[-100] * len(FIELDS)] * (2 - len(rows))
    return [value for row in rows for value in row] + [
        LAYOUTS.index(layout),
        BACKGROUNDS.index(scene.background),
    ]


def blend(picture: Tensor, other: Tensor, rng: random.Random) -> Tensor:
    """Two scenes on top of each other."""
    return torch.lerp(picture, other, rng.uniform(0.3, 0.7))


def graft(picture: Tensor, other: Tensor, rng: random.Random) -> Tensor:
    """One half of each picture."""
    cut, axis = rng.randint(54, 74), rng.choice((1, 2))
    return torch.cat([picture.narrow(axis, 0, cut), other.narrow(axis, cut, SIDE - cut)], axis)


def smear(picture: Tensor, other: Tensor, rng: random.Random) -> Tensor:
    """Too blurred to have a shape."""
    small = nn.functional.adaptive_avg_pool2d(picture[None], rng.choice((8, 10, 12)))
    return nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic")[0].clamp(0, 1)


def warp(picture: Tensor, other: Tensor, rng: random.Random, low: float = 5.0, high: float = 9.0) -> Tensor:
    """Bent out of shape: each point moves by about `low` to `high` pixels."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    field = torch.randn(1, 2, 5, 5, generator=generator)
    field = field / field.std() * rng.uniform(low, high) * 2 / SIDE
    shift = nn.functional.interpolate(field, (SIDE, SIDE), mode="bicubic")[0].permute(1, 2, 0)
    line = torch.linspace(-1, 1, SIDE)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + shift
    return nn.functional.grid_sample(picture[None], grid[None], padding_mode="border", align_corners=True)[0]


def bite(picture: Tensor, other: Tensor, rng: random.Random) -> Tensor:
    """A piece of the middle replaced by the picture's own corner, which is background."""
    size = rng.randint(20, 30)
    top, left = (rng.randint(34, SIDE - 34 - size) for _ in range(2))
    out = picture.clone()
    patch = picture[:, 2:12, 2:12].mean((1, 2), keepdim=True)
    out[:, top : top + size, left : left + size] = patch
    return out


def intruder(picture: Tensor, other: Tensor, rng: random.Random) -> Tensor:
    """Another scene, shrunk, in a corner: at least one object too many."""
    out, size = picture.clone(), rng.randint(30, 46)
    small = nn.functional.interpolate(other[None], (size, size), mode="bilinear", antialias=True)[0]
    row, column = rng.choice((2, SIDE - size - 2)), rng.choice((2, SIDE - size - 2))
    out[:, row : row + size, column : column + size] = small
    return out


def empty(picture: Tensor, other: Tensor, rng: random.Random) -> Tensor:
    """Nothing but background."""
    edge = picture[:, :, :6].mean(2, keepdim=True)
    return edge.expand(-1, -1, SIDE) + 0.008 * torch.randn(1, SIDE, SIDE)


DAMAGES: tuple[Damage, ...] = (blend, graft, smear, warp, warp, bite, intruder, empty)


def soften(picture: Tensor, rng: random.Random) -> Tensor:
    """What a good generator may do to a sound picture: a little blur, bending and tint."""
    if rng.random() < 0.5:
        picture = warp(picture, picture, rng, 0.1, 0.9)
    if rng.random() < 0.4:
        small = nn.functional.interpolate(picture[None], scale_factor=rng.uniform(0.4, 0.8), mode="bilinear")
        picture = nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")[0]
    return (picture * rng.uniform(0.93, 1.07) + rng.uniform(-0.02, 0.02)).clamp(0, 1)


def batch(rng: random.Random, generator: torch.Generator, count: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 3, 128, 128), classes (n, 10) and whether each is sound (n,); a third are damaged."""
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = render(scenes, generator)
    sound = torch.tensor([rng.random() > 0.3 for _ in scenes])
    out = [
        soften(pictures[i], rng) if good else rng.choice(DAMAGES)(pictures[i], pictures[i - 1], rng)
        for i, good in enumerate(sound.tolist())
    ]
    return torch.stack(out), torch.tensor([class_rows(scene) for scene in scenes]), sound.float()


@dataclass
class Pool:
    """Pictures that went through the autoencoder: as sound as drawn ones, but with its handwriting."""

    pictures: Tensor
    classes: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, out: Path, count: int, seed: int) -> Pool:
        """`count` scenes encoded, disturbed a little and decoded again; none without a trained autoencoder."""
        if not (out / "autoencoder.pt").exists():
            return cls(torch.empty(0, 3, SIDE, SIDE), torch.empty(0, 10, dtype=torch.long))
        vae, (rng, generator) = load_autoencoder(out), seeded(seed)
        apply_finetuned(vae, out)
        scenes = [random_scene(rng) for _ in range(count)]
        rows = []
        for start in range(0, count, 32):
            latents = encode(vae, render(scenes[start : start + 32], generator))
            latents += rng.uniform(0, 0.15) * latents.std() * torch.randn(latents.shape, generator=generator)
            rows.append((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
        return cls(torch.cat(rows), torch.tensor([class_rows(scene) for scene in scenes]))

    def replace(self, batch: tuple[Tensor, Tensor, Tensor], rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """`batch` with an eighth of its pictures taken from the pool."""
        pictures, classes, sound = batch
        for row in range(0, len(pictures) if len(self.pictures) else 0, 8):
            pick = rng.randrange(len(self.pictures))
            pictures[row], classes[row], sound[row] = self.pictures[pick], self.classes[pick], 1.0
        return pictures, classes, sound


def judge_loss(logits: dict[str, Tensor], classes: Tensor, sound: Tensor) -> Tensor:
    """Cross entropy of all read-outs on sound pictures plus that of validity on all."""
    good = sound.bool()
    total = nn.functional.binary_cross_entropy_with_logits(logits["validity"], sound)
    for slot in range(2):
        for index, (name, _) in enumerate(FIELDS):
            column = classes[good, slot * len(FIELDS) + index]
            total = total + nn.functional.cross_entropy(logits[name][good, slot], column)
    total = total + nn.functional.cross_entropy(logits["layout"][good], classes[good, 8])
    return total + nn.functional.cross_entropy(logits["background"][good], classes[good, 9])


def fully_stated(scene: Scene) -> PromptCase:
    """A case that asks for every attribute of `scene`."""
    told = (True,) * len(scene.objects)
    return PromptCase("", scene, Statement(told, told, True))


@torch.no_grad()
def evaluate(network: JudgeNetwork, count: int = 1000, seed: int = 99) -> dict[str, float]:
    """On new renders: share read right in every attribute, validity of sound and of damaged pictures."""
    judge, (rng, generator) = Judge(network), seeded(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = torch.cat([render(scenes[start : start + 50], generator) for start in range(0, count, 50)])
    readings = judge.read(pictures)
    rows = [_compare(reading, fully_stated(scene)) for reading, scene in zip(readings, scenes, strict=True)]
    share = torch.tensor(rows).float().mean(0).tolist()
    names = ("shape", "colour", "texture", "both", "all_attributes", "relation", "correct")
    found = dict(zip(names, share, strict=True))
    found["sound_accepted"] = sum(reading.valid for reading in readings) / count
    for damage in dict.fromkeys(DAMAGES):
        damaged = torch.stack([damage(pictures[i], pictures[i - 1], rng) for i in range(200)])
        found[f"{damage.__name__}_rejected"] = 1 - sum(r.valid for r in judge.read(damaged)) / 200
    return {**{name: round(value, 4) for name, value in found.items()}, "pictures": count}


def save_judge(network: JudgeNetwork, folder: Path, report: dict[str, float], channels: Sequence[int]) -> None:
    """judge.safetensors (half precision) and judge.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in network.state_dict().items()},
        folder / "judge.safetensors",
    )
    config = {"channels": list(channels), "parameters": count_parameters(network), "on_new_renders": report}
    write_json(folder / "judge.json", config)


def train(out: Path, minutes: float, device: str = "cpu", seed: int = 5) -> JudgeNetwork:
    """Train or continue; writes `out/judge.pt` and the finished files in `out/judge`."""
    torch.manual_seed(seed)
    network = JudgeNetwork(CHANNELS).to(device)
    pool = Pool.of(out, POOL, seed)  # first: its minutes are not the training's
    trainee = Trainee(network, out / "judge.pt", minutes, rate=PEAK_RATE, decay=0.995, weight_decay=0.01)
    rng, generator = seeded(seed * 1000 + trainee.step)
    for step in trainee:
        pictures, classes, sound = (part.to(device) for part in pool.replace(batch(rng, generator), rng))
        loss = judge_loss(network(pictures), classes, sound)
        trainee.learn(loss)
        if step % 50 == 0:
            print(f"judge {step} {trainee.clock.seconds:.0f} s loss {loss.item():.3f}", flush=True)
    trainee.finish()
    network = network.cpu().eval()
    report = evaluate(network)
    print(json.dumps(report), flush=True)
    save_judge(network, out / "judge", report, CHANNELS)
    return network


if __name__ == "__main__":
    run_script(__doc__, 6, train)

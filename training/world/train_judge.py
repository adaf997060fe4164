"""Train the world's judge on freshly drawn scenes, and its validity output on damaged ones.

python -m training.world.train_judge --out training/out --minutes 40

The scenes that the models never see are no secret to the judge: it has to read them. What it is measured on is drawn anew.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL
from numpy.random import Generator
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.miniatures.world.captions import Mention, Truth
from diffaccel.miniatures.world.judge import (
    CELL,
    CHANNELS,
    VERDICT_FIELDS,
    WHOLE,
    WorldJudge,
    WorldJudgeNetwork,
    compare,
)
from diffaccel.miniatures.world.nouns import NAMES, NOUN_INDEX
from diffaccel.miniatures.world.scenes import (
    CLOSE_SIDE,
    COLOURLESS_STYLES,
    GROUND_COLOURS,
    GROUNDS,
    OUTLINE_STYLES,
    STYLES,
    Scene,
    between,
    pick,
)
from training.common import count_parameters, write_json
from training.world import World
from training.world.damage import DAMAGES, Drawn, as_tensor, empty, soften
from training.world.learner import Learner, Plan, add_options, plan_of
from training.world.learner import train as learn

DEPTH = 2
PEAK_RATE = 3e-3
# (side, pictures, the side scenes are sampled for): equal work a step
MENU = ((128, 32, 128), (128, 32, 128), (256, 8, 256), (256, 8, 512))
SPREAD = 0.8  # cells: how far from a centre a cell still claims to hold it
NEAR, NEAREST = 0.25, 1.5  # of a thing's size and in cells: those no further from its centre learn its name
IGNORED = -100
WHOLE_WEIGHTS = (1.0, 0.4, 0.4)  # style, the ground's colour and kind
DAMAGED_SHARE, POOL_SHARE = 0.2, 0.25
POOL = {128: 480, 256: 144}  # pictures through the codec, by side; two of three sound
SLIGHT, HEAVY = (0.0, 0.15), (0.45, 1.3)  # noise on latents in their standard deviation


class Targets:
    """What the network should say of a batch of scenes; cells are `CELL` pixels."""

    def __init__(self, scenes: Sequence[Scene], side: int) -> None:
        cells = side // CELL
        line = torch.arange(cells) + 0.5
        self.heat = torch.zeros(len(scenes), cells, cells)
        self.noun = torch.full((len(scenes), cells, cells), IGNORED)
        self.artwork = torch.full_like(self.noun, IGNORED)
        self.box = torch.zeros(len(scenes), 3, cells, cells)
        for row, scene in enumerate(scenes):
            for item in scene.objects:
                across, down = item.x * cells - line, item.y * cells - line
                distance = torch.hypot(down[:, None], across[None, :])
                heat = torch.exp(-((distance / SPREAD) ** 2) / 2)
                near = distance <= max(NEAREST, NEAR * item.size * cells)
                self.heat[row] = torch.maximum(self.heat[row], heat)
                self.noun[row][near], self.artwork[row][near] = NOUN_INDEX[item.noun], item.artwork
                self.box[row, 0][near] = across[None, :].expand_as(near)[near]
                self.box[row, 1][near] = down[:, None].expand_as(near)[near]
                self.box[row, 2][near] = math.log(item.size * cells)
        self.whole = torch.tensor([whole_classes(scene) for scene in scenes])


def whole_classes(scene: Scene) -> list[int]:
    """Style (0: none), the ground's colour (ignored where the style hides it) and kind (likewise)."""
    colour = IGNORED if scene.style in COLOURLESS_STYLES else GROUND_COLOURS.index(scene.ground.colour)
    kind = IGNORED if scene.style in OUTLINE_STYLES else GROUNDS.index(scene.ground.kind)
    return [STYLES.index(scene.style) + 1 if scene.style else 0, colour, kind]


def judge_loss(logits: dict[str, Tensor], targets: Targets, sound: Tensor, bare: Tensor) -> Tensor:
    """Of sound pictures everything, of bare grounds that nothing is there, of all whether they are sound."""
    cross, binary = nn.functional.cross_entropy, nn.functional.binary_cross_entropy_with_logits
    good, clear = sound.bool(), sound.bool() | bare
    heat = torch.where(bare[:, None, None], torch.zeros(()), targets.heat)
    told = (targets.noun >= 0) & good[:, None, None]
    total = binary(logits["heat"][clear, 0], heat[clear], reduction="sum") / max(1.0, heat[clear].sum().item())
    total = total + 2 * cross(logits["noun"].permute(0, 2, 3, 1)[told], targets.noun[told])
    total = total + 0.3 * cross(logits["artwork"].permute(0, 2, 3, 1)[told], targets.artwork[told])
    shift = (logits["box"] - targets.box).abs().permute(0, 2, 3, 1)[told]
    total = total + 0.5 * shift[:, :2].mean() + shift[:, 2].mean()
    for index, (name, _) in enumerate(WHOLE):
        column, weight = targets.whole[good, index], WHOLE_WEIGHTS[index]
        total = total + weight * cross(logits[name][good], column, reduction="sum") / max(1, int((column >= 0).sum()))
    return total + binary(logits["validity"], sound)


def any_scene(world: World, rng: Generator, side: int) -> Scene:
    """A scene for pictures of `side`, mostly in a style, held out from the models or not."""
    style = "random" if rng.random() < 0.55 else None
    return world.sample(rng, 1 if side == CLOSE_SIDE else None, side, style, held_out=True)


@dataclass
class Row:
    """A scene, its picture, whether that is well drawn, and whether it is nothing but ground."""

    scene: Scene
    picture: Tensor
    sound: bool = True
    bare: bool = False


class Pool:
    """Pictures that went through the autoencoder. Most are as sound as drawn ones, but with its handwriting; the others
    were noisy as latents, as those of a generator that has not learnt enough are, and decode to coloured crumbs.
    """

    def __init__(self, rows: dict[int, list[Row]]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, world: World, out: Path, rng: Generator) -> Pool:
        """Some scenes of each side of POOL encoded, disturbed and decoded; none before there is a codec."""
        if not (out / "codec.pt").exists():
            print("judge: no codec.pt yet, so it sees no pictures of the autoencoder", flush=True)
            return cls({side: [] for side in POOL})
        from training.world.codec import load_codec

        codec = load_codec(out).eval()
        return cls({side: [cls._row(world, codec, rng, side, i % 3 > 0) for i in range(n)] for side, n in POOL.items()})

    @staticmethod
    @torch.no_grad()
    def _row(world: World, codec: AutoencoderKL, rng: Generator, side: int, sound: bool) -> Row:
        scene = any_scene(world, rng, side if rng.random() < 0.5 or side == CLOSE_SIDE else 2 * side)
        picture = as_tensor(world.draw(scene, side))[None] * 2 - 1
        latents = codec.encode(picture).latent_dist.mean
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
        latents += between(rng, *(SLIGHT if sound else HEAVY)) * latents.std() * noise
        return Row(scene, (codec.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1), sound)

    def pick(self, rng: Generator, side: int) -> Row | None:
        return pick(rng, self.rows[side]) if self.rows[side] and rng.random() < POOL_SHARE else None


class Batches:
    """Pictures drawn as training goes on; three in ten are damaged, some of the sound ones come from the pool."""

    def __init__(self, world: World, pool: Pool, rng: Generator) -> None:
        self.world, self.pool, self.rng = world, pool, rng

    def draw(self, step: int) -> tuple[Tensor, Targets, Tensor, Tensor]:
        """Pictures (n, 3, s, s), their targets, whether each is sound (n,) and whether it is bare ground (n,)."""
        side, count, sampled = MENU[step % len(MENU)]
        rows = [self._one(side, sampled) for _ in range(count)]
        sound, bare = torch.tensor([float(row.sound) for row in rows]), torch.tensor([row.bare for row in rows])
        return torch.stack([row.picture for row in rows]), Targets([row.scene for row in rows], side), sound, bare

    def _one(self, side: int, sampled: int) -> Row:
        if row := self.pool.pick(self.rng, side):
            return row
        scene = any_scene(self.world, self.rng, sampled)
        drawn = Drawn.of(self.world, scene, side, self.rng)
        if self.rng.random() < DAMAGED_SHARE:
            damage = pick(self.rng, DAMAGES)
            return Row(scene, damage(drawn), False, damage is empty)
        return Row(scene, soften(drawn))


def fully_told(scene: Scene) -> Truth:
    """A truth that tells all of `scene` that can be seen."""
    mentions = [
        Mention(
            item.noun, (item.noun,), item.place, None if len(scene.objects) > 1 or item.bulk == "medium" else item.bulk
        )
        for item in scene.objects
    ]
    _, colour, kind = whole_classes(scene)
    ground = (scene.ground.colour if colour >= 0 else None, scene.ground.kind if kind >= 0 else None)
    return Truth(tuple(mentions), scene.layout, scene.style, *ground)


@torch.no_grad()
def evaluate(network: WorldJudgeNetwork, world: World, count: int = 150, seed: int = 99) -> dict[str, float]:
    """On new pictures: share read right in each respect by number of things and size, and share of damaged ones rejected."""
    judge, rng = WorldJudge(network), numpy.random.default_rng(seed)
    found: dict[str, float] = {"pictures_per_row": count}
    for name, objects, side in (
        ("close", 1, 128),
        ("single", 1, 256),
        ("pair", 2, 256),
        ("four", 4, 256),
        ("wide_pair", 2, 512),
    ):
        scenes = [world.sample(rng, objects, side, "random" if row % 2 else None, True) for row in range(count)]
        drawn = [Drawn.of(world, scene, side, rng) for scene in scenes]
        readings = [judge.read(item.picture[None])[0] for item in drawn]
        rows = [compare(reading, fully_told(scene)) for reading, scene in zip(readings, scenes, strict=True)]
        share = torch.tensor(rows).float().mean(0).tolist()
        found |= {f"{name}_{key}": round(value, 4) for key, value in zip(VERDICT_FIELDS, share, strict=True)}
        if name in ("close", "pair"):
            found |= {f"{name}_{key}": value for key, value in _rejected(judge, drawn).items()}
    return found


def evaluate_pool(network: WorldJudgeNetwork, pool: Pool) -> dict[str, float]:
    """The same of pictures that went through the codec, which is what a model's pictures look like at best."""
    found: dict[str, float] = {}
    for side, rows in pool.rows.items():
        seen = [WorldJudge(network).read(row.picture[None])[0] for row in rows]
        good = [compare(reading, fully_told(row.scene)) for reading, row in zip(seen, rows, strict=True) if row.sound]
        noisy = [not reading.valid for reading, row in zip(seen, rows, strict=True) if not row.sound]
        share = torch.tensor(good).float().mean(0).tolist() if good else []
        found |= {f"codec_{side}_{key}": round(value, 4) for key, value in zip(VERDICT_FIELDS, share, strict=False)}
        if noisy:
            found[f"codec_{side}_noisy_latents_rejected"] = round(sum(noisy) / len(noisy), 4)
    return found


def _rejected(judge: WorldJudge, drawn: Sequence[Drawn]) -> dict[str, float]:
    rows = {}
    for damage in DAMAGES:
        readings = [judge.read(damage(item)[None])[0] for item in drawn[:100]]
        rows[f"{damage.__name__}_rejected"] = 1 - sum(reading.valid for reading in readings) / len(readings)
    return {name: round(value, 4) for name, value in rows.items()}


def save_judge(network: WorldJudgeNetwork, folder: Path, report: dict[str, float]) -> None:
    """judge.safetensors (half precision) and judge.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "judge.safetensors")
    config = {"channels": list(CHANNELS), "depth": DEPTH, "nouns": len(NAMES), "parameters": count_parameters(network)}
    write_json(folder / "judge.json", {**config, "on_new_pictures": report})


class JudgeLoss:
    """The loss of a step, drawn from the seed and the step's number."""

    def __init__(self, network: WorldJudgeNetwork, batches: Batches, seed: int, device: str) -> None:
        self.network, self.batches, self.seed, self.device = network, batches, seed, device

    def __call__(self, step: int) -> Tensor:
        self.batches.rng = numpy.random.default_rng([self.seed, step])
        pictures, targets, sound, bare = self.batches.draw(step)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            logits = self.network(pictures.to(self.device))
        return judge_loss({name: part.float().cpu() for name, part in logits.items()}, targets, sound, bare)


def train(out: Path, plan: Plan, device: str = "cpu", seed: int = 5) -> None:
    """Train or continue; writes `out/world_judge.pt` and, once over, the finished files in `out/world_judge`."""
    torch.manual_seed(seed)
    world, network = World.load(out), WorldJudgeNetwork(CHANNELS, DEPTH).to(device)
    pool = Pool.of(world, out, numpy.random.default_rng(seed))  # first: its minutes are not the training's
    learner = Learner(network, out / "world_judge.pt", plan)
    learn(learner, JudgeLoss(network, Batches(world, pool, numpy.random.default_rng(seed)), seed, device), "judge")
    if learner.done:
        finish(learner.averaged().cpu(), world, out)


def finish(network: WorldJudgeNetwork, world: World, out: Path) -> None:
    report = evaluate(network, world) | evaluate_pool(network, Pool.of(world, out, numpy.random.default_rng(98)))
    print(json.dumps(report), flush=True)
    save_judge(network, out / "world_judge", report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, minutes=40, rate=PEAK_RATE, average=0.998)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, plan_of(options), options.device)


if __name__ == "__main__":
    main()

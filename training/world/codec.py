"""The autoencoder of both models: 8x down, 16 channels, in diffusers' AutoencoderKL.

A network of this kind that starts from noise needs hours to beat what linear algebra has for nothing. So it starts
there: the encoder begins as the projection of each 8 x 8 patch on its 16 principal components, exact but for 1 %, and
the decoder begins as that patch's mean colour. All residual branches begin at zero.

python -m training.world.codec --minutes 30                # encoder and decoder
python -m training.world.codec --minutes 60 --decoder      # the decoder alone, further: latents stay as they are
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from numpy.typing import NDArray
from torch import Tensor, nn

from diffaccel.miniatures.world.scenes import Scene
from training.common import save_atomically
from training.train_autoencoder import reconstruction_loss
from training.world import World
from training.world.learner import Learner, Plan, add_options, load_averaged, plan_of, train

CHANNELS, GROUPS, LATENTS, PATCH = (16, 32, 64, 96), 4, 16, 8
CROP, BATCH, SHELF = 64, 24, 384
RATE, AVERAGE = 3e-3, 0.995
LATENT_NOISE = 0.05  # of a spread of about 1: what the denoiser hands over is never exact
LOG_VARIANCE = -6.0
SPREAD_WEIGHT = 1e-3
COMPONENTS_SEED, SEEN = 10, 192
# A group's scale is fixed by two constant channels, plus and minus this, beside which its signals are small.
ENCODER_ANCHOR, DECODER_ANCHOR = 32.0, 8.0


def build_codec(channels: tuple[int, int, int, int] = CHANNELS) -> AutoencoderKL:
    """An AutoencoderKL of 1.7 M parameters without attention."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=GROUPS,
        sample_size=256,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def patches(pictures: Tensor) -> Tensor:
    """(n, 3, h, w) to (n * h/8 * w/8, 192): each 8 x 8 patch as a row, in the order channel, row, column."""
    cells = pictures.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return cells.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH * PATCH)


def principal_components(pictures: Tensor, count: int = LATENTS) -> tuple[Tensor, Tensor]:
    """The mean patch (192) and the first orthonormal components (count, 192) of pictures in [-1, 1]."""
    rows = patches(pictures)
    mean = rows.mean(0)
    vectors: Tensor = torch.linalg.svd((rows - mean).T @ (rows - mean))[0][:, :count]
    return mean, vectors.T.contiguous()


def half_whitened(pictures: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Components scaled half-way (by the root of their spread) to unit variance, and all of them to it on average."""
    spread = ((patches(pictures) - mean) @ components.T).std(0)
    scale = spread.rsqrt()
    return components * (scale / (spread * scale).square().mean().sqrt())[:, None]


def decibel(output: Tensor, target: Tensor) -> float:
    """Peak signal to noise ratio of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (output - target).square().mean()))


def linear_decibel(pictures: Tensor, mean: Tensor, components: Tensor) -> float:
    """What orthonormal components alone reach: the floor that a codec has to beat."""
    rows = patches(pictures)
    return decibel((rows - mean) @ components.T @ components + mean, rows)


@torch.no_grad()
def _set_rows(conv: nn.Conv2d, rows: slice, weight: Tensor, bias: Tensor | float = 0.0) -> None:
    """Let `rows` of a convolution's outputs read `weight` (rows, first inputs, k, k) and nothing else.

    A weight of 2 x 2 lies at the first two places, where a strided convolution finds its cell; others in the middle.
    """
    kernel, size = conv.weight.shape[-1], weight.shape[-1]
    at = 0 if size == 2 else (kernel - size) // 2
    conv.weight[rows] = 0
    conv.weight[rows, : weight.shape[1], at : at + size, at : at + size] = weight
    conv.bias[rows] = bias


def _pick(rows: Tensor) -> Tensor:
    """A matrix as the weight of a 1 x 1 convolution."""
    return rows[:, :, None, None]


def _silence_residuals(module: nn.Module) -> None:
    for block in module.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)


def _split_pixels() -> Tensor:
    """(12, 3, 2, 2): 2 x 2 pixels of three colours side by side, in the order colour, row, column."""
    return torch.eye(12).view(12, 3, 2, 2)


@torch.no_grad()
def start_encoder(codec: AutoencoderKL, mean: Tensor, basis: Tensor) -> None:
    """Make the encoder's mean `basis` (16, 192) times (patch - mean).

    Three strided convolutions gather 2 x 2, 4 x 4 and 8 x 8 pixels. Of the 48 values of a 4 x 4 block only the
    directions the basis asks for are kept. The last normalisation is held still by constant channels, and
    silu(z) - silu(-z) = z undoes the last activation.
    """
    encoder = codec.encoder
    _silence_residuals(encoder)
    down = [block.downsamplers[0].conv for block in encoder.down_blocks[:3]]
    shortcuts = [block.resnets[0].conv_shortcut for block in encoder.down_blocks[1:]]
    _set_rows(encoder.conv_in, slice(0, 3), _pick(torch.eye(3)))
    _set_rows(down[0], slice(0, 12), _split_pixels())
    _set_rows(shortcuts[0], slice(0, 12), _pick(torch.eye(12)))
    # (quarter row, quarter column, component) x (colour, row, row in pair, column, column in pair)
    cells = basis.view(-1, 3, 2, 4, 2, 4).permute(2, 4, 0, 1, 3, 5)
    quarters = cells.reshape(-1, 48)
    kept = torch.linalg.svd(quarters)[2][: min(48, down[1].weight.shape[0])]
    pairs = kept.view(-1, 3, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(len(kept), 12, 2, 2)
    _set_rows(down[1], slice(0, len(kept)), pairs)
    _set_rows(shortcuts[1], slice(0, len(kept)), _pick(torch.eye(len(kept))))
    gather = (quarters @ kept.T).view(2, 2, LATENTS, len(kept)).permute(2, 3, 0, 1)
    _set_rows(down[2], slice(0, LATENTS), gather, -(basis @ mean))
    _end_encoder(codec, shortcuts[2])


@torch.no_grad()
def _end_encoder(codec: AutoencoderKL, shortcut: nn.Conv2d) -> None:
    """From 16 channels through normalisation and activation to 16 means and a constant variance."""
    norm, out = codec.encoder.conv_norm_out, codec.encoder.conv_out
    width, each = shortcut.weight.shape[0] // GROUPS, LATENTS // GROUPS
    nn.init.zeros_(shortcut.weight)
    nn.init.zeros_(shortcut.bias)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    out.bias[LATENTS:] = LOG_VARIANCE
    for group in range(GROUPS):
        begin, own = group * width, torch.eye(LATENTS)[group * each : (group + 1) * each]
        _set_rows(shortcut, slice(begin, begin + 2 * each), _pick(torch.cat([own, -own])))
        anchors = slice(begin + 2 * each, begin + 2 * each + 2)
        shortcut.bias[anchors] = torch.tensor([ENCODER_ANCHOR, -ENCODER_ANCHOR])
        norm.weight[begin : begin + 2 * each] = ENCODER_ANCHOR * math.sqrt(2 / width)
        for index in range(each):
            out.weight[group * each + index, begin + index, 1, 1] = 1
            out.weight[group * each + index, begin + each + index, 1, 1] = -1
    _set_rows(codec.quant_conv, slice(0, 2 * LATENTS), _pick(torch.eye(2 * LATENTS)))


@torch.no_grad()
def start_decoder(codec: AutoencoderKL, mean: Tensor, basis: Tensor) -> None:
    """Let the decoder answer with each patch's mean colour, a little smoothed; the rest of it is as drawn."""
    decoder = codec.decoder
    _silence_residuals(decoder)
    _set_rows(codec.post_quant_conv, slice(0, LATENTS), _pick(torch.eye(LATENTS)))
    colours = basis.view(LATENTS, 3, -1).mean(2) / basis.square().sum(1, keepdim=True)
    _set_rows(decoder.conv_in, slice(0, 3), _pick(colours.T), mean.view(3, -1).mean(1))
    tent = torch.tensor([0.25, 0.5, 0.25])
    smooth = _pick(torch.eye(3)) * tent[:, None] * tent
    for block in decoder.up_blocks[:-1]:
        _set_rows(block.upsamplers[0].conv, slice(0, 3), smooth)
        if block.resnets[0].conv_shortcut is not None:
            _set_rows(block.resnets[0].conv_shortcut, slice(0, 3), _pick(torch.eye(3)))
    _end_decoder(codec)


@torch.no_grad()
def _end_decoder(codec: AutoencoderKL) -> None:
    """Three groups of the last normalisation hold plus and minus a colour and their constants; the others are free."""
    decoder = codec.decoder
    shortcut, norm, out = decoder.up_blocks[-1].resnets[0].conv_shortcut, decoder.conv_norm_out, decoder.conv_out
    width = shortcut.weight.shape[0] // GROUPS
    out.weight.mul_(0.1)
    nn.init.zeros_(out.bias)
    for colour in range(3):
        begin, own = colour * width, _pick(torch.eye(3)[colour : colour + 1])
        nn.init.zeros_(shortcut.weight[begin : begin + width])
        nn.init.zeros_(shortcut.bias[begin : begin + width])
        _set_rows(shortcut, slice(begin, begin + 2), torch.cat([own, -own]))
        shortcut.bias[begin + 2 : begin + 4] = torch.tensor([DECODER_ANCHOR, -DECODER_ANCHOR])
        norm.weight[begin : begin + 2] = DECODER_ANCHOR * math.sqrt(2 / width)
        out.weight[:, begin : begin + width] = 0
        out.weight[colour, begin, 1, 1], out.weight[colour, begin + 1, 1, 1] = 1, -1


def linear_codec(pictures: Tensor) -> AutoencoderKL:
    """A codec that begins at the principal components of `pictures` (n, 3, h, w) in [-1, 1]."""
    codec = build_codec()
    mean, components = principal_components(pictures)
    basis = half_whitened(pictures, mean, components)
    start_encoder(codec, mean, basis)
    start_decoder(codec, mean, basis)
    return codec


def to_tensor(pictures: Sequence[NDArray[numpy.uint8]] | NDArray[numpy.uint8]) -> Tensor:
    """(n, 3, h, w) in [-1, 1] of uint8 pictures (h, w, 3)."""
    return torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_scene(world: World, rng: numpy.random.Generator, size: int, most: int) -> Scene:
    """A scene of one to `most` objects; half have no style, the others any."""
    style = None if rng.random() < 0.5 else "random"
    return world.sample(rng, objects=int(rng.integers(1, most + 1)), size=size, style=style)


def draw_pictures(world: World, rng: numpy.random.Generator, count: int, size: int, most: int = 1) -> Tensor:
    """(count, 3, size, size) in [-1, 1]: scenes of one to `most` objects."""
    return to_tensor([world.draw(draw_scene(world, rng, size, most), size) for _ in range(count)])


class Shelf:
    """Pictures to cut crops from. Drawing costs more than a step, so each step draws one and drops the oldest.

    At step s it holds pictures s to s + `SHELF`, each drawn from its own number, whatever happened before.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed
        self.held: dict[int, Tensor] = {}

    def picture(self, number: int) -> Tensor:
        """(3, s, s): two of three show one object at 128 px, the third up to four at 256 px."""
        size, most = (256, 4) if number % 3 == 2 else (128, 1)
        return draw_pictures(self.world, numpy.random.default_rng([self.seed, number]), 1, size, most)[0]

    def at(self, step: int) -> list[Tensor]:
        wanted = range(step, step + SHELF)
        self.held = {number: self.held[number] if number in self.held else self.picture(number) for number in wanted}
        return list(self.held.values())


def crops(pictures: Sequence[Tensor], rng: numpy.random.Generator) -> Tensor:
    """(BATCH, 3, 64, 64): two crops each of some of the pictures, near the middle."""
    out = []
    for index in rng.choice(len(pictures), BATCH // 2, replace=False):
        picture = pictures[index]
        side = picture.shape[-1]
        for _ in range(2):
            middle = (side - CROP) / 2
            top, left = (int(numpy.clip(rng.normal(middle, side / 6), 0, side - CROP)) for _ in range(2))
            out.append(picture[:, top : top + CROP, left : left + CROP])
    return torch.stack(out)


class CodecLoss:
    """The loss of one step from the step's number, for both halves or the decoder alone."""

    def __init__(self, codec: AutoencoderKL, world: World, seed: int, device: str) -> None:
        self.codec, self.shelf, self.seed, self.device = codec, Shelf(world, seed), seed, device

    def __call__(self, step: int) -> Tensor:
        batch = crops(self.shelf.at(step), numpy.random.default_rng([self.seed, step])).to(self.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            latent = self.codec.encode(batch).latent_dist.mean
            noise = torch.randn(latent.shape, generator=generator).to(latent)
            output = self.codec.decode(latent + LATENT_NOISE * noise).sample.float()
        return reconstruction_loss(output, batch) + SPREAD_WEIGHT * latent.float().square().mean()


@torch.no_grad()
def reconstruct(codec: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures through the codec and back, in float32."""
    return torch.cat([codec.decode(codec.encode(part).latent_dist.mean).sample for part in pictures.split(8)])


@torch.no_grad()
def normalise(codec: AutoencoderKL, pictures: Tensor) -> None:
    """Give the latents of `pictures` mean 0, uncorrelated channels in falling order and spread 1, half-way whitened.

    What the last 1 x 1 convolution of the encoder does, the first of the decoder undoes; pictures stay as they are.
    """
    latents = torch.cat([codec.encode(part).latent_dist.mean for part in pictures.split(8)])
    rows = latents.permute(0, 2, 3, 1).reshape(-1, LATENTS).double()
    mean = rows.mean(0)
    vectors, variance, _ = torch.linalg.svd(rows.T.cov())
    scale = variance.pow(-0.25)
    forward = (scale / (variance * scale.square()).mean().sqrt())[:, None] * vectors.T
    backward = torch.linalg.inv(forward)
    first, last = codec.quant_conv, codec.post_quant_conv
    mixed = forward.float() @ first.weight[:LATENTS, :, 0, 0]
    first.weight[:LATENTS] = _pick(mixed)
    first.bias[:LATENTS] = (forward @ (first.bias[:LATENTS].double() - mean)).float()
    last.bias += last.weight[:, :, 0, 0] @ mean.float()
    last.weight.copy_(_pick(last.weight[:, :, 0, 0] @ backward.float()))


def decoder_half(codec: AutoencoderKL) -> nn.ModuleList:
    """What turns latents into pictures."""
    return nn.ModuleList([codec.post_quant_conv, codec.decoder])


def load_codec(out: Path) -> AutoencoderKL:
    """The codec of `out` with its latest decoder; raises FileNotFoundError before its first training is over."""
    codec = build_codec()
    codec.load_state_dict(load_averaged(out / "codec.pt", "training.world.codec"))
    if (out / "decoder.pt").exists():
        decoder_half(codec).load_state_dict(load_averaged(out / "decoder.pt", "training.world.codec --decoder"))
    return codec.eval()


def measure(codec: AutoencoderKL, world: World, seed: int = 77, count: int = 48) -> dict[str, float]:
    """PSNR of codec and of 16 linear components on scenes that no training draws, by kind."""
    rng = numpy.random.default_rng(seed)
    seen = draw_pictures(world, numpy.random.default_rng(COMPONENTS_SEED), SEEN, 128)
    mean, components = principal_components(seen)
    found = {}
    for name, size, most in (("one object, 128 px", 128, 1), ("up to four, 256 px", 256, 4)):
        pictures = draw_pictures(world, rng, count, size, most)
        found[name] = decibel(reconstruct(codec, pictures), pictures)
        found[f"{name}, linear"] = linear_decibel(pictures, mean, components)
    return {name: round(value, 2) for name, value in found.items()}


def train_both(out: Path, plan: Plan, device: str = "cpu", seed: int = 1) -> None:
    """Train or continue encoder and decoder; once over, `out/codec.pt` holds the codec, and its encoder is final."""
    if (out / "codec.pt").exists():
        return
    torch.manual_seed(seed)
    world = World.load(out)
    seen = draw_pictures(world, numpy.random.default_rng(COMPONENTS_SEED), SEEN, 128)
    learner = Learner(linear_codec(seen).to(device), out / "codec_training.pt", plan)
    train(learner, CodecLoss(learner.module, world, seed, device), "codec")
    if learner.done:
        finish(learner, world, out)


def finish(learner: Learner, world: World, out: Path) -> None:
    """Write `out/codec.pt`: averaged weights, latents of mean 0 and spread 1."""
    codec = learner.averaged().cpu()
    normalise(codec, draw_pictures(world, numpy.random.default_rng(COMPONENTS_SEED + 1), SEEN // 2, 128))
    figures = measure(codec, world)
    print("codec", figures, flush=True)
    state = {"model": codec.state_dict(), "average": {}, "step": learner.step, "seconds": learner.clock.seconds}
    save_atomically({**state, "figures": figures}, out / "codec.pt")


def train_decoder(out: Path, plan: Plan, device: str = "cpu", seed: int = 2) -> None:
    """Train or continue the decoder with the encoder frozen; kept in `out/decoder.pt`."""
    torch.manual_seed(seed)
    world, codec = World.load(out), load_codec(out).to(device)
    codec.encoder.requires_grad_(False)
    codec.quant_conv.requires_grad_(False)
    learner = Learner(decoder_half(codec), out / "decoder.pt", plan)
    train(learner, CodecLoss(codec, world, seed, device), "decoder")
    learner.averaged()
    print("decoder", measure(codec.cpu().eval(), world), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, minutes=30, rate=RATE, average=AVERAGE)
    parser.add_argument("--decoder", action="store_true", help="the decoder alone, with the latents as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (train_decoder if options.decoder else train_both)(options.out, plan_of(options), options.device)


if __name__ == "__main__":
    main()

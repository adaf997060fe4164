"""Region sampling: identity after a dense step, selection and starvation, full runs against a slow oracle, refusals.

The oracle is written separately: plain loops over images, tokens and attention heads, on full-length tensors.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from tiny_transformers import BETAS, TEXT, run, tiny_inputs, tiny_pipeline
from torch.nn import functional as F

import diffaccel
from diffaccel import AdaptiveGuidance, GuidanceInterval, RegionSampling
from diffaccel.engine.seams import Seams
from diffaccel.errors import RecipeError, Unsupported
from diffaccel.methods.regions.history import History
from diffaccel.methods.regions.select import active_count, flat_index, gather_rows, longest_wait, select, split_cells
from diffaccel.methods.regions.tokens import Pass, Stored, TokenGate
from diffaccel.models.regions import region_facts
from diffaccel.models.transformers import describe_transformer

WORKS = (
    "sd3",
    "sd3-img2img",
    "sd3-inpaint",
    "sd3-controlnet",
    "sd3.5-medium",
    "sd3.5-large",
    "flux-dev",
    "flux-cfg",
    "flux-controlnet",
    "pixart-alpha",
    "pixart-sigma",
    "lumina-next",
    "auraflow",
    "dit",
    "qwen-image",
)
REGIONS = RegionSampling(ratio=0.4, start=3, resets=5)


def size_of(kind: str) -> tuple[int, int]:
    return (8, 8) if kind == "dit" else (8, 12)


def picture(pipe: Any, kind: str, **changes: Any) -> torch.Tensor:
    torch.manual_seed(0)  # ControlNet pipelines draw from the global generator
    return run(pipe, kind, **{"batch": 2, "size": size_of(kind), "steps": 10, **changes})


# --- off, restored, repeatable: every model ---


@pytest.mark.parametrize(
    "kind", ["sd3.5-medium", "flux-cfg", "pixart-sigma", "lumina-next", "auraflow", "dit", "qwen-image"]
)
def test_off_is_stock_and_a_run_leaves_nothing_behind(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    stock = picture(pipe, kind)
    assert torch.equal(stock, picture(diffaccel.wrap(pipe, RegionSampling(ratio=1.0)), kind))
    fast = diffaccel.wrap(pipe, REGIONS)
    first = picture(fast, kind)
    assert not torch.equal(first, stock)
    assert torch.equal(first, picture(fast, kind))
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(stock, picture(pipe, kind))


def test_an_aborted_run_leaves_nothing_behind() -> None:
    pipe = tiny_pipeline("sd3")
    fast = diffaccel.wrap(pipe, REGIONS)
    whole = picture(fast, "sd3")

    def stop(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        picture(fast, "sd3", callback_on_step_end=stop)
    assert not fast.report.completed
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    assert torch.equal(whole, picture(fast, "sd3"))


# --- identity: a region pass on the inputs of the dense pass before it ---


def inputs_of_a_call(pipe: Any, kind: str, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pipeline hands to its transformer on the first step."""
    seen: list[Any] = []
    stock = pipe.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return stock(*args, **kwargs)

    pipe.transformer.forward = forward
    picture(pipe, kind, steps=2, batch=3, **changes)
    del pipe.transformer.forward
    return seen[0]


class Bare:
    """A transformer with the seams of region sampling and no run around them."""

    def __init__(self, transformer: Any, seams: Seams) -> None:
        layout = describe_transformer(transformer)
        assert layout is not None
        self.transformer, self.facts = transformer, region_facts("region_sampling", transformer)
        self.gate, self.stored = TokenGate(self.facts, layout, seams), Stored()

    def __call__(self, args: Any, kwargs: Any, index: torch.Tensor | None = None, *, forecast: bool = False) -> Any:
        if index is not None:
            flat = flat_index(index, self.stored.history.tokens)
            cut = {
                name: [gather_rows(part.expand(len(index), -1, -1), flat) for part in kwargs[name]]
                for name in self.facts.residuals
                if kwargs.get(name) is not None
            }
            kwargs = {**kwargs, **cut}
        with torch.no_grad(), self.gate.passing(Pass(self.stored, index, index is None, 0.5, forecast)):
            return self.transformer(*args, **kwargs)[0]


def some_tokens(rows: int, tokens: int, active: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(tokens, generator=generator)[:active].sort().values for _ in range(rows)])


@pytest.mark.parametrize("kind", WORKS)
def test_a_region_pass_repeats_the_dense_one_on_active_tokens(kind: str) -> None:
    """5 active tokens: as many as text tokens; 13: as many as text and registers (AuraFlow)."""
    pipe = tiny_pipeline(kind)
    args, kwargs = inputs_of_a_call(pipe, kind)
    with torch.no_grad():
        stock = pipe.transformer(*args, **kwargs)[0]
    with Seams() as seams:
        bare = Bare(pipe.transformer, seams)
        dense = bare(args, kwargs)
        assert torch.equal(dense, stock)
        rows, tokens = len(dense), bare.stored.history.tokens
        everything = torch.arange(tokens).expand(rows, tokens)
        assert torch.equal(bare(args, kwargs, everything), stock)  # equal shapes round equally: not a bit differs
        before = split_cells(dense, 2, 4)
        error = 1e-6 * float(before.abs().max())
        for active in (2, 5, 13):
            index = some_tokens(rows, tokens, active)
            bare.stored.history._kept.newest.fill_(99.0)  # no active token may come from what is stored
            after = split_cells(bare(args, kwargs, index), 2, 4)
            for row in range(rows):
                frozen = sorted(set(range(tokens)) - set(index[row].tolist()))
                torch.testing.assert_close(after[row, index[row]], before[row, index[row]], atol=error, rtol=0)
                assert torch.equal(after[row, frozen], torch.full_like(after[row, frozen], 99.0))


@pytest.mark.parametrize("kind", ["sd3.5-medium", "flux-dev", "lumina-next"])
def test_active_tokens_see_the_stale_tokens(kind: str) -> None:
    """Other latents in the frozen tokens change nothing; other stored keys and values change the active ones."""
    pipe = tiny_pipeline(kind)
    args, kwargs = inputs_of_a_call(pipe, kind)
    name = "hidden_states"
    latents = kwargs[name] if name in kwargs else args[0]
    with Seams() as seams:
        bare = Bare(pipe.transformer, seams)
        dense = bare(args, kwargs)
        index = some_tokens(len(dense), bare.stored.history.tokens, 6)
        region = bare(args, kwargs, index)
        cells = split_cells(latents.clone(), 2, 4)
        kept = cells.clone()
        cells[:] = 5.0
        for row in range(len(cells)):
            cells[row, index[row]] = kept[row, index[row]]
        changed = unsplit(cells, latents)
        again = bare(
            (changed, *args[1:]) if args else (), {**kwargs, name: changed} if name in kwargs else kwargs, index
        )
        assert torch.equal(region, again)
        for tensor in bare.stored.values.values():
            tensor.mul_(1.5)
        other = bare(args, kwargs, index)
        assert not torch.allclose(region, other, atol=1e-3)


def unsplit(cells: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if like.dim() == 3:
        return cells.flatten(2)
    images, channels, height, width = like.shape
    tiles = cells.view(images, height // 2, width // 2, channels, 2, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def test_identity_with_masks_of_different_prompts_in_qwen() -> None:
    pipe = tiny_pipeline("qwen-image")
    _, kwargs = inputs_of_a_call(pipe, "qwen-image")
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    kwargs = {**kwargs, "encoder_hidden_states_mask": mask}
    with Seams() as seams:
        bare = Bare(pipe.transformer, seams)
        dense = bare((), kwargs)
        index = some_tokens(3, bare.stored.history.tokens, 5)
        region = bare((), kwargs, index)
    torch.testing.assert_close(region, dense, atol=1e-6, rtol=1e-6)  # frozen tokens are reused


@pytest.mark.parametrize("kind", ["sd3.5-medium", "flux-dev"])
def test_adapters_stay_in_place(kind: str) -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline(kind)
    args, kwargs = inputs_of_a_call(pipe, kind)
    with torch.no_grad():
        plain = pipe.transformer(*args, **kwargs)[0]
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    with Seams() as seams:
        bare = Bare(pipe.transformer, seams)
        dense = bare(args, kwargs)
        region = bare(args, kwargs, some_tokens(len(dense), bare.stored.history.tokens, 5))
    assert not torch.allclose(dense, plain, atol=1e-3)
    torch.testing.assert_close(region, dense, atol=1e-6, rtol=1e-6)


def test_residuals_of_controlnets_follow_their_tokens() -> None:
    """One region step; which tokens it computed is read from the counts of the report."""
    pipe = tiny_pipeline("sd3-controlnet")
    made, used = [], []
    control, denoise = pipe.controlnet.forward, pipe.transformer.forward

    def controlnet(**kwargs: Any) -> Any:
        made.append(control(**kwargs))
        return made[-1]

    def transformer(**kwargs: Any) -> Any:
        used.append(kwargs["block_controlnet_hidden_states"])
        return denoise(**kwargs)

    pipe.controlnet.forward, pipe.transformer.forward = controlnet, transformer
    fast = diffaccel.wrap(pipe, RegionSampling(ratio=0.4, start=4, end=5))
    picture(fast, "sd3-controlnet", batch=3)
    assert any("always runs whole" in note for note in fast.report.notes)
    counts = torch.from_numpy(fast.report.region_counts()).flatten(1)
    for whole, part in zip(made[4][0], used[4], strict=True):
        for row in range(6):
            assert torch.equal(part[row], whole[row][counts[row % 3] == 10])


# --- selection ---


def slow_select(score: list[float], dropped: list[int], active: int, high: float, starvation: float) -> list[int]:
    """One image, with Python's own sort."""
    tokens = len(score)
    order = sorted(range(tokens), key=lambda token: (score[token], token))
    frozen = tokens - active
    low = frozen - int(frozen * high)
    middle = low + (active - 1) / 2
    rank = {token: place for place, token in enumerate(order)}
    wish = sorted(range(tokens), key=lambda t: (abs(rank[t] - middle) / tokens - starvation * dropped[t], t))
    return sorted(wish[:active])


@pytest.mark.parametrize("high", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("active", [3, 16, 31])
def test_selection_is_that_of_the_slow_one(high: float, active: int) -> None:
    generator = torch.Generator().manual_seed(3)
    score = torch.randn(3, 32, generator=generator)
    for dropped in (torch.zeros(3, 32), torch.randint(0, 9, (3, 32), generator=generator)):
        chosen = select(score, dropped, active, high_share=high, starvation=0.25)
        for image in range(3):
            expected = slow_select(score[image].tolist(), dropped[image].tolist(), active, high, 0.25)
            assert chosen[image].tolist() == expected


def test_without_starvation_the_frozen_tokens_are_the_two_ends() -> None:
    """The published rule: int((1 - high) * frozen) from the low end, the rest from the high end."""
    score = torch.arange(20.0)[None]
    chosen = select(score, torch.zeros(1, 20), 10, high_share=0.3, starvation=0.25)
    assert chosen[0].tolist() == list(range(7, 17))
    assert select(score, torch.zeros(1, 20), 10, high_share=1.0, starvation=0.25)[0].tolist() == list(range(10))
    assert select(score, torch.zeros(1, 20), 10, high_share=0.0, starvation=0.25)[0].tolist() == list(range(10, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("high", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("starvation", [0.05, 0.25, 3.0])
@pytest.mark.parametrize("active", [2, 30])
@pytest.mark.parametrize("changing", [False, True])
def test_no_token_starves(dtype: torch.dtype, high: float, starvation: float, active: int, changing: bool) -> None:
    """Static scores, and scores that change at random, of a size that underflows or ties in half precision."""
    tokens = 45
    bound = longest_wait(tokens, active, starvation)
    generator = torch.Generator().manual_seed(5)
    scale = 1e-7 if dtype is torch.float16 else 1.0
    score = (scale * torch.randn(2, tokens, generator=generator)).to(dtype).float()
    dropped, worst = torch.zeros(2, tokens), 0
    for _ in range(2 * bound + 10):
        if changing:
            score = (scale * torch.randn(2, tokens, generator=generator)).to(dtype).float()
        chosen = select(score, dropped, active, high_share=high, starvation=starvation)
        assert all(len(set(row.tolist())) == active for row in chosen)
        dropped = (dropped + 1).scatter(1, chosen, 0)
        worst = max(worst, int(dropped.max()))
    assert 0 < worst <= bound


def test_number_of_active_tokens() -> None:
    assert active_count(4096, 0.25) == 1024
    assert active_count(10, 0.25) == 3
    assert active_count(10, 0.01) == 2
    assert active_count(1, 0.5) == 1


# --- frozen tokens ---


def test_the_forecast_follows_a_line_token_by_token() -> None:
    torch.manual_seed(0)
    offset, slope = torch.randn(2, 6, 4), torch.randn(2, 6, 4)

    def line(place: float) -> torch.Tensor:
        return offset + place * slope

    history = History()
    history.store(line(1.0), 1.0)
    torch.testing.assert_close(history.forecast(0.3), line(1.0))  # one evaluation says nothing about a slope
    history.store(line(1.0) + 7, 0.9)
    history.store(line(0.9), 0.9)  # a second evaluation at the same place replaces the first
    index = torch.tensor([[0, 2], [3, 5]])
    flat = flat_index(index, 6)
    for place in (0.8, 0.5, 0.2):
        whole = history.fill(gather_rows(line(place), flat), flat, place, forecast=True)
        torch.testing.assert_close(whole, line(place), atol=1e-5, rtol=1e-5)
    history.store(line(0.1), 0.1)
    torch.testing.assert_close(history.forecast(0.0), line(0.0), atol=1e-5, rtol=1e-5)


def test_reuse_keeps_the_last_evaluation() -> None:
    history = History()
    history.store(torch.ones(1, 4, 2), 1.0)
    history.store(2 * torch.ones(1, 4, 2), 0.5)
    whole = history.fill(5 * torch.ones(1, 1, 2), torch.tensor([2]), 0.25, forecast=False)
    assert whole[0, :, 0].tolist() == [2, 2, 5, 2]
    assert history.fill(6 * torch.ones(1, 1, 2), torch.tensor([0]), 0.2, forecast=False)[0, :, 0].tolist() == [
        6,
        2,
        5,
        2,
    ]


# --- full runs against the oracle ---


class Oracle:
    """Stands in for a transformer inside its stock pipeline: every token, head and stored key by loops."""

    def __init__(self, pipe: Any, config: RegionSampling, images: int, *, flow: bool, guidance: float) -> None:
        self.pipe, self.net, self.config, self.images = pipe, pipe.transformer, config, images
        self.flow, self.guidance = flow, guidance
        self.step, self.since_dense = 0, 0
        self.keys: dict[Any, torch.Tensor] = {}
        self.past: dict[tuple[int, int], list[tuple[float, torch.Tensor]]] = {}
        self.dropped: list[list[int]] = []
        self.guided: torch.Tensor | None = None
        self.guided_past: dict[tuple[int, int], list[tuple[float, list[torch.Tensor]]]] = {}
        self.chosen: list[list[list[int]] | None] = []

    def place(self) -> float:
        sigma = float(self.pipe.scheduler.sigmas[self.step])
        if not self.flow:
            return math.log(sigma)
        return math.log(sigma / (1 - sigma)) if sigma < 1 else math.inf

    def choose(self, tokens: int) -> list[list[int]] | None:
        total = len(self.pipe.scheduler.timesteps)
        self.since_dense += 1
        dense = self.step < self.config.start or self.step == total - 1 or self.since_dense >= self.config.resets
        if dense:
            self.since_dense = 0
            self.dropped = [[0] * tokens for _ in range(self.images)]
            return None
        assert self.guided is not None
        result = []
        for image in range(self.images):
            score = []
            for token in range(tokens):
                score.append(self.score(image, token))
            active = math.ceil(self.config.ratio * tokens)
            chosen = slow_select(score, self.dropped[image], active, self.config.high_share, self.config.starvation)
            for token in range(tokens):
                self.dropped[image][token] = 0 if token in chosen else self.dropped[image][token] + 1
            result.append(chosen)
        return result

    def score(self, image: int, token: int) -> float:
        if self.config.metric == "std":
            assert self.guided is not None
            cells = self.cells_of(self.guided[image], token)
            return sum(float(cell.std()) for cell in cells) / len(cells)
        (t0, before), (t1, after) = self.guided_past[image, token][-2:]
        return sum(float((b - a).norm()) for a, b in zip(before, after, strict=True)) / len(after) / abs(t1 - t0)

    @staticmethod
    def cells_of(prediction: torch.Tensor, token: int) -> list[torch.Tensor]:
        columns = prediction.shape[2] // 2
        row, column = divmod(token, columns)
        return [prediction[:, 2 * row + dy, 2 * column + dx] for dy in (0, 1) for dx in (0, 1)]

    def stale(self, name: str, row: int, fresh: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        """Keys or values of all tokens: the stored ones with the fresh rows of the chosen tokens."""
        whole = self.keys.get((name, row), torch.zeros(self.tokens, fresh.shape[-1], dtype=fresh.dtype)).clone()
        for place, token in enumerate(chosen):
            whole[token] = fresh[place]
        self.keys[name, row] = whole
        return whole

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: Any = 0.0) -> Any:
        size = query.shape[-1] // heads
        parts = []
        for head in range(heads):
            span = slice(head * size, (head + 1) * size)
            weight = (query[:, span] @ key[:, span].T / size**0.5 + mask).softmax(-1)
            parts.append(weight @ value[:, span])
        return torch.cat(parts, dim=-1)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        embedded = self.net.pos_embed(hidden_states)
        self.tokens = embedded.shape[1]
        chosen = self.choose(self.tokens)
        self.chosen.append(chosen)
        outputs = []
        for row in range(len(embedded)):
            tokens = list(range(self.tokens)) if chosen is None else chosen[row % self.images]
            fresh = self.row(row, embedded[row, tokens], tokens, kwargs)
            outputs.append(self.fill(row, fresh, tokens))
        height, width = hidden_states.shape[2] // 2, hidden_states.shape[3] // 2
        whole = torch.stack(outputs).view(len(embedded), height, width, 2, 2, -1)
        result = whole.permute(0, 5, 1, 3, 2, 4).reshape(len(embedded), -1, 2 * height, 2 * width)
        uncond, cond = result[:, : hidden_states.shape[1]].chunk(2)
        self.guided = uncond + self.guidance * (cond - uncond)
        for image in range(self.images):
            for token in range(self.tokens) if chosen is None else chosen[image]:
                past = self.guided_past.setdefault((image, token), [])
                past.append((self.place(), self.cells_of(self.guided[image], token)))
        self.step += 1
        return (result,)

    def fill(self, row: int, fresh: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """Chosen tokens are remembered; the others lie on the line through what is remembered of them."""
        place, result = self.place(), []
        for token in range(self.tokens):
            past = self.past.setdefault((row, token), [])
            if token in tokens:
                past.append((place, fresh[tokens.index(token)]))
                result.append(past[-1][1])
            elif self.config.frozen == "reuse":
                result.append(past[-1][1])
            else:
                (t0, v0), (t1, v1) = past[-2:]
                result.append(v1 + (place - t1) / (t1 - t0) * (v1 - v0))
        return torch.stack(result)

    def row(self, row: int, x: torch.Tensor, tokens: list[int], given: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError


class SD3Oracle(Oracle):
    def row(self, row: int, x: torch.Tensor, tokens: list[int], given: dict[str, Any]) -> torch.Tensor:
        net, one = self.net, slice(row, row + 1)
        time = net.time_text_embed(given["timestep"][one], given["pooled_projections"][one])
        text = net.context_embedder(given["encoder_hidden_states"][row])
        for number, block in enumerate(net.transformer_blocks):
            x, text = self.block(f"{number}", row, block, x, text, time, tokens)
        shift_scale = net.norm_out.linear(F.silu(time))[0].chunk(2)
        return net.proj_out(net.norm_out.norm(x) * (1 + shift_scale[0]) + shift_scale[1])

    def block(self, name: str, row: int, block: Any, x: Any, text: Any, time: Any, tokens: list[int]) -> Any:
        attn, count = block.attn, len(x)
        mods = block.norm1.linear(F.silu(time))[0].chunk(9 if block.use_dual_attention else 6)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mods[:6]
        seen = block.norm1.norm(x) * (1 + scale) + shift
        text_mods = block.norm1_context.linear(F.silu(time))[0]
        if block.context_pre_only:
            text_scale, text_shift = text_mods.chunk(2)
        else:
            text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = text_mods.chunk(6)
        seen_text = block.norm1_context.norm(text) * (1 + text_scale) + text_shift
        key = self.stale(name + "k", row, normed(attn.norm_k, attn.to_k(seen), attn.heads), tokens)
        value = self.stale(name + "v", row, attn.to_v(seen), tokens)
        query = torch.cat(
            [
                normed(attn.norm_q, attn.to_q(seen), attn.heads),
                normed(attn.norm_added_q, attn.add_q_proj(seen_text), attn.heads),
            ]
        )
        key = torch.cat([key, normed(attn.norm_added_k, attn.add_k_proj(seen_text), attn.heads)])
        value = torch.cat([value, attn.add_v_proj(seen_text)])
        out = self.attend(query, key, value, attn.heads)
        result = x + gate * attn.to_out[0](out[:count])
        if block.use_dual_attention:
            shift2, scale2, gate2 = mods[6:]
            seen2, attn2 = block.norm1.norm(x) * (1 + scale2) + shift2, block.attn2
            key = self.stale(name + "k2", row, normed(attn2.norm_k, attn2.to_k(seen2), attn2.heads), tokens)
            value = self.stale(name + "v2", row, attn2.to_v(seen2), tokens)
            query = normed(attn2.norm_q, attn2.to_q(seen2), attn2.heads)
            result = result + gate2 * attn2.to_out[0](self.attend(query, key, value, attn2.heads))
        result = result + gate_mlp * block.ff(block.norm2(result) * (1 + scale_mlp) + shift_mlp)
        if block.context_pre_only:
            return result, text
        text = text + text_gate * attn.to_add_out(out[count:])
        seen_text = block.norm2_context(text) * (1 + text_scale_mlp) + text_shift_mlp
        return result, text + text_gate_mlp * block.ff_context(seen_text)


def normed(norm: Any, x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if norm is None else norm(x.unflatten(-1, (heads, -1))).flatten(1)


class PixArtOracle(Oracle):
    def row(self, row: int, x: torch.Tensor, tokens: list[int], given: dict[str, Any]) -> torch.Tensor:
        net, one = self.net, slice(row, row + 1)
        kinds = {"resolution": None, "aspect_ratio": None}
        time, embedded = net.adaln_single(given["timestep"][one], kinds, batch_size=1, hidden_dtype=x.dtype)
        text = net.caption_projection(given["encoder_hidden_states"][row])
        mask = (1 - given["encoder_attention_mask"][row].to(x.dtype)) * -10000.0
        for number, block in enumerate(net.transformer_blocks):
            mods = block.scale_shift_table + time.reshape(6, -1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mods
            attn, cross = block.attn1, block.attn2
            seen = block.norm1(x) * (1 + scale) + shift
            key = self.stale(f"{number}k", row, attn.to_k(seen), tokens)
            value = self.stale(f"{number}v", row, attn.to_v(seen), tokens)
            x = x + gate * attn.to_out[0](self.attend(attn.to_q(seen), key, value, attn.heads))
            out = self.attend(cross.to_q(x), cross.to_k(text), cross.to_v(text), cross.heads, mask)
            x = x + cross.to_out[0](out)
            x = x + gate_mlp * block.ff(block.norm2(x) * (1 + scale_mlp) + shift_mlp)
        shift, scale = net.scale_shift_table + embedded
        return net.proj_out(net.norm_out(x) * (1 + scale) + shift)


@pytest.mark.parametrize(
    "settings",
    [{}, {"frozen": "reuse"}, {"metric": "std", "high_share": 0.3}, {"high_share": 0.5, "starvation": 1.0}],
    ids=["defaults", "reuse", "std", "high share"],
)
@pytest.mark.parametrize(
    ("kind", "oracle"), [("sd3", SD3Oracle), ("sd3.5-medium", SD3Oracle), ("pixart-sigma", PixArtOracle)]
)
def test_a_full_run_is_that_of_the_oracle(kind: str, oracle: Any, settings: dict[str, Any]) -> None:
    """Three images of 2 x 8 tokens: with 16 tokens all priorities are exact, so equal ones tie everywhere."""
    config = RegionSampling(ratio=0.4, start=3, resets=4, **settings)
    pipe = tiny_pipeline(kind)
    fast = diffaccel.wrap(pipe, config)
    got = run(fast, kind, batch=3, size=(4, 16), steps=12)
    slow = oracle(pipe, config, 3, flow=kind != "pixart-sigma", guidance=4.0)
    pipe.transformer.forward = slow.forward
    expected = run(pipe, kind, batch=3, size=(4, 16), steps=12)
    assert [chosen is None for chosen in slow.chosen] == [bool(not entry.tags) for entry in fast.report.trace]
    torch.testing.assert_close(got, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
    counts = torch.zeros(3, 16, dtype=torch.long)
    for chosen in slow.chosen:
        for image in range(3):
            counts[image, list(range(16)) if chosen is None else chosen[image]] += 1
    assert torch.equal(torch.from_numpy(fast.report.region_counts()), counts.view(3, 2, 8))
    assert len({tuple(row.tolist()) for row in counts}) == 3  # each image has its own regions


# --- what a run does ---


@pytest.mark.parametrize("kind", ["sd3", "qwen-image"])
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    fast = diffaccel.wrap(tiny_pipeline(kind), REGIONS)
    together = picture(fast, kind, batch=3)
    alone = picture(fast, kind, batch=1, first=1)
    torch.testing.assert_close(together[1:2], alone, atol=1e-3, rtol=1e-3)


def test_the_report_counts_tokens_and_flops() -> None:
    fast = diffaccel.wrap(tiny_pipeline("sd3"), RegionSampling(ratio=0.5, start=2, resets=(5,)))
    picture(fast, "sd3", batch=3)
    report = fast.report
    kinds = [entry.tags for entry in report.trace]
    region = (("regions", 12),)
    assert kinds == [(), (), region, region, region, (), region, region, region, ()]
    counts = report.methods["region_sampling"]
    assert (counts["dense"], counts["region"]) == (4, 6)
    assert counts["tokens"] == 3 * 24 * 10
    assert counts["tokens computed"] == 3 * (24 * 4 + 12 * 6)
    # keys and values of 4 blocks, 6 rows of 24 tokens, width 16, 4 bytes
    assert counts["key and value bytes"] == 2 * 4 * 6 * 24 * 16 * 4
    flops = [entry.flops for entry in report.trace]
    assert 0.4 * flops[0] < flops[2] < 0.85 * flops[0]
    assert report.flops_plain == 10 * flops[0]
    json.dumps(report.to_dict())
    assert report.region_counts().sum() == counts["tokens computed"]
    assert report.region_counts().shape == (3, 4, 6)


def test_the_map_of_regions() -> None:
    fast = diffaccel.wrap(tiny_pipeline("flux-dev"), REGIONS)
    picture(fast, "flux-dev", size=(8, 12))
    counts, shown = fast.report.region_counts(), fast.report.region_map(1, size=60)
    assert shown.size == (60, 40)
    for row in range(4):
        for column in range(6):
            expected = round(255 * int(counts[1, row, column]) / 10)
            assert abs(shown.getpixel((10 * column + 5, 10 * row + 5)) - expected) <= 1
    assert counts.min() < counts.max() <= 10
    with pytest.raises(Unsupported, match="no picture 2"):
        fast.report.region_map(2)
    plain = diffaccel.wrap(tiny_pipeline("flux-dev"), RegionSampling(ratio=1.0))
    picture(plain, "flux-dev", steps=2)
    with pytest.raises(Unsupported, match="no region sampling took place"):
        plain.report.region_map()


@pytest.mark.parametrize("metric", ["std", "norm", "change"])
def test_metrics_choose_differently(metric: Any) -> None:
    base = {"ratio": 0.4, "start": 3, "resets": ()}
    fast = diffaccel.wrap(tiny_pipeline("sd3"), RegionSampling(**base, metric=metric))
    picture(fast, "sd3")
    counts = fast.report.region_counts()
    others = []
    for other in {"std", "norm", "change"} - {metric}:
        wrapped = diffaccel.wrap(tiny_pipeline("sd3"), RegionSampling(**base, metric=other))
        picture(wrapped, "sd3")
        others.append((wrapped.report.region_counts() != counts).any())
    assert all(others)


def test_the_end_of_the_regions() -> None:
    fast = diffaccel.wrap(tiny_pipeline("sd3"), RegionSampling(start=2, end=5, resets=()))
    picture(fast, "sd3")
    assert [bool(entry.tags) for entry in fast.report.trace] == [False] * 2 + [True] * 3 + [False] * 5
    fast = diffaccel.wrap(tiny_pipeline("sd3"), RegionSampling(start=8, end=99, resets=()))
    picture(fast, "sd3")
    assert [bool(entry.tags) for entry in fast.report.trace] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("kind", ["sd3", "flux-cfg"])
def test_a_branch_that_comes_back_forces_a_dense_step(kind: str) -> None:
    """Unguided from the start, guided in the middle: the unconditional branch has nothing stored when it comes in."""
    interval = GuidanceInterval(start_fraction=0.5, stop_fraction=0.7)
    regions = RegionSampling(ratio=0.4, start=2, resets=())
    fast = diffaccel.wrap(tiny_pipeline(kind), [interval, regions])
    picture(fast, kind, steps=10)
    per_step = [[e for e in fast.report.trace if e.evaluation == step and e.rows] for step in range(10)]
    dense = [step for step, entries in enumerate(per_step) if not any(("regions", 10) in e.tags for e in entries)]
    assert dense == [0, 1, 5, 9]  # not where the branch leaves (7)
    assert not any("regions" in str(e.tags) for e in per_step[5])
    assert fast.report.methods["region_sampling"]["forced by guidance"] == 1


@pytest.mark.parametrize("kind", ["sd3", "qwen-image"])
def test_guidance_that_ends_for_good_keeps_the_regions(kind: str) -> None:
    """The rows that stay go on with what is stored; a picture must not notice when its batch mates follow."""
    methods = [AdaptiveGuidance(threshold=0.2), RegionSampling(ratio=0.4, start=2, resets=())]
    fast = diffaccel.wrap(tiny_pipeline(kind), methods)
    picture(fast, kind, guidance=1.5)
    rows = [sum(e.rows for e in fast.report.trace if e.evaluation == step) for step in range(10)]
    assert rows[0] == 4
    assert rows[-1] == 2
    assert "forced by guidance" not in fast.report.methods["region_sampling"]
    assert "forced by inputs" not in fast.report.methods["region_sampling"]
    assert sum(any("regions" in str(tag) for tag in e.tags) for e in fast.report.trace if e.rows) >= 7


def test_two_stage_solvers_use_one_set_for_both_calls() -> None:
    pipe = tiny_pipeline("sd3", FlowMatchHeunDiscreteScheduler(shift=3.0))
    fast = diffaccel.wrap(pipe, RegionSampling(ratio=0.4, start=2, resets=(4,)))
    picture(fast, "sd3", steps=7)
    tags = [bool(entry.tags) for entry in fast.report.trace]
    assert tags == [False] * 4 + [True] * 4 + [False] * 2 + [True] * 2 + [False]
    counts = fast.report.region_counts().reshape(2, -1)
    assert ((counts - 7) % 2 == 0).all()  # both calls of a step compute the same tokens


def test_new_prompts_force_a_dense_step() -> None:
    def other_prompt(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": values["prompt_embeds"] + 1} if step == 5 else {}

    fast = diffaccel.wrap(tiny_pipeline("sd3"), RegionSampling(start=2, resets=()))
    picture(fast, "sd3", callback_on_step_end=other_prompt, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert [step for step, entry in enumerate(fast.report.trace) if not entry.tags] == [0, 1, 6, 9]
    assert fast.report.methods["region_sampling"]["forced by inputs"] == 1


def test_short_runs_stay_dense() -> None:
    pipe = tiny_pipeline("sd3")
    fast = diffaccel.wrap(pipe, RegionSampling(start=2))
    stock = picture(pipe, "sd3", steps=8)
    with pytest.warns(UserWarning, match="8 evaluations are too few"):
        result = picture(fast, "sd3", steps=8)
    assert torch.equal(result, stock)
    assert any("too few" in note for note in fast.report.notes)


def test_half_precision() -> None:
    pipe = tiny_pipeline("sd3.5-medium")
    pipe.transformer.to(torch.bfloat16)
    changes = {
        name: value.bfloat16()
        for name, value in tiny_inputs("sd3.5-medium", batch=2).items()
        if isinstance(value, torch.Tensor)
    }
    fast = diffaccel.wrap(pipe, REGIONS)
    assert picture(fast, "sd3.5-medium", **changes).isfinite().all()
    # 4 blocks, of which 2 have a second attention; 4 rows of 24 tokens, width 16, 2 bytes
    assert fast.report.methods["region_sampling"]["key and value bytes"] == 2 * 6 * 4 * 24 * 16 * 2


# --- refusals ---

REFUSED = {
    "sana": "linear attention",
    "lumina2": "caption length",
    "z-image": "padding of each row",
    "hunyuan": "has not been worked out",
    "flux2": "one projection",
    "cogview4": "text and image together",
    "wan": "neighbours in time",
    "cogvideox": "neighbours in time",
}


@pytest.mark.parametrize(("kind", "reason"), REFUSED.items())
def test_other_transformers_are_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        diffaccel.wrap(tiny_pipeline(kind), RegionSampling())


def test_unets_are_refused() -> None:
    from tiny import tiny_pipeline as tiny_unet_pipeline  # noqa: PLC0415

    with pytest.raises(Unsupported, match="diffusion transformers"):
        diffaccel.wrap(tiny_unet_pipeline("sd"), RegionSampling())


def test_noise_on_every_step_is_refused_unless_allowed() -> None:
    noisy = EulerAncestralDiscreteScheduler(**BETAS)
    with pytest.raises(Unsupported, match="fresh noise"):
        diffaccel.wrap(tiny_pipeline("pixart-sigma", noisy), RegionSampling())
    allowed = diffaccel.wrap(tiny_pipeline("pixart-sigma", noisy), RegionSampling(start=2, allow_stochastic=True))
    assert picture(allowed, "pixart-sigma").isfinite().all()
    flow = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(Unsupported, match="fresh noise"):
        diffaccel.wrap(tiny_pipeline("sd3", flow), RegionSampling())
    fast = diffaccel.wrap(tiny_pipeline("pixart-sigma", DDIMScheduler(**BETAS)), RegionSampling())
    with pytest.raises(Unsupported, match=r"eta 0\.5"):
        picture(fast, "pixart-sigma", eta=0.5)


def test_solvers_that_suffer_are_named() -> None:
    fast = diffaccel.wrap(tiny_pipeline("pixart-sigma"), RegionSampling(frozen="reuse", start=2))
    picture(fast, "pixart-sigma")
    assert any("multistep solver" in note for note in fast.report.notes)
    fast = diffaccel.wrap(tiny_pipeline("pixart-sigma"), RegionSampling(start=2))
    picture(fast, "pixart-sigma")
    assert not any("multistep solver" in note for note in fast.report.notes)


def test_changed_projections_are_refused() -> None:
    pipe = tiny_pipeline("sd3")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(Unsupported, match="fused"):
        diffaccel.wrap(pipe, RegionSampling())
    pipe = tiny_pipeline("flux-dev")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(Unsupported, match="compiled"):
        diffaccel.wrap(pipe, RegionSampling())


def test_settings_are_checked() -> None:
    for settings in (
        {"ratio": 0.0},
        {"ratio": 1.1},
        {"start": 0},
        {"starvation": 0.0},
        {"high_share": 1.5},
        {"resets": 1},
        {"resets": (-1,)},
        {"frozen": "zero"},
        {"speed": 2},
    ):
        with pytest.raises(RecipeError, match=f"region_sampling.*{next(iter(settings))}|{next(iter(settings))}"):
            diffaccel.Recipe.from_dict({"schema": 1, "methods": [{"method": "region_sampling", **settings}]})


def test_text_width_of_the_tiny_models() -> None:
    """The identity tests cover a prompt as long as the number of active tokens only while this holds."""
    assert tiny_inputs("sd3")["prompt_embeds"].shape[1:] == (5, TEXT)

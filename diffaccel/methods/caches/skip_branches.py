"""Long skips for transformers that have none, so that the skip cache can work on them after a short training.

Chen et al., "Skip-DiT" (arXiv 2411.17616) joins block i to block L-1-i and replaces the stream by a linear map of both,
which ruins a trained model until it has been trained again. Here the branch is added to the stream instead:

    x <- x + A LN([x ; h_i]),    A = 0 at the start,

so that a model with new branches computes exactly what it did before. They are trained by training/skip_branches.py.
Attached branches belong to the network (`network.skip_branches`): they move, train and are saved with it. A checkpoint
written by `save_pretrained` then holds them besides the stock weights, which still load without them; use
`save_skip_branches` for a file of their own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from typing import Any

import torch
from torch import nn

from diffaccel.engine.seams import Addition
from diffaccel.errors import Unsupported
from diffaccel.files.tensors import TensorFile, strict_json
from diffaccel.models.transformers import ATTACHED_BRANCHES, TransformerLayout, describe_transformer

FORMAT = "diffaccel skip branches 1"
_FILE = TensorFile("skip branches", Unsupported, largest=2**32)


class SkipBranch(nn.Module):
    """One residual skip: x + A LN([x ; h]), all of shape (rows, tokens, width); the norm is computed in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _FloatNorm(2 * width, eps=1e-6)
        self.linear = nn.Linear(2 * width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, stream: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(torch.cat([stream, skip], dim=-1))
        update: torch.Tensor = self.linear(normed.to(self.linear.weight.dtype))
        return stream + update.to(stream.dtype)


class _FloatNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class SkipBranches(nn.ModuleList):
    """The attached branches, from the outside in; branch i joins block i to block L-1-i."""

    addition: Addition


class _Remember:
    """Hook behind block i: keep its image tokens until the partner has read them."""

    def __init__(self, kept: dict[int, torch.Tensor], pair: int, stream: int | None) -> None:
        self.kept, self.pair, self.stream = kept, pair, stream

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept[self.pair] = output if self.stream is None else output[self.stream]


class _Join:
    """Hook in front of block L-1-i: add the branch to its image tokens, which are its first argument."""

    def __init__(self, kept: dict[int, torch.Tensor], pair: int, branch: nn.Module) -> None:
        self.kept, self.pair, self.branch = kept, pair, branch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        skip = self.kept.pop(self.pair, None)
        if skip is None:  # the pipeline left the partner out (skip-layer guidance)
            return None
        if args:
            return (self.branch(args[0], skip), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.branch(kwargs["hidden_states"], skip)}


class _Forget:
    """Hook in front of the network: nothing is left of an earlier call that was broken off."""

    def __init__(self, kept: dict[int, torch.Tensor]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.kept.clear()


def add_skip_branches(transformer: nn.Module, pairs: int = 1) -> SkipBranches:
    """Add the `pairs` outermost long skips to a diffusion transformer, which computes the same as before.

    Args:
        transformer: e.g. `pipe.transformer`; changed until `remove_skip_branches`.
        pairs: 1 to (blocks - 1) // 2. `SkipCache(depth=k)` needs k of them.
    Returns:
        The new branches, also `transformer.skip_branches`; their parameters are all that has to be trained.
    Raises:
        Unsupported: unknown model, native or attached skips already there, too many pairs; the model is untouched.
    """
    layout = _check_host(transformer)
    most = (len(layout.blocks) - 1) // 2
    if type(pairs) is not int or not 1 <= pairs <= most:
        raise Unsupported(f"add_skip_branches: pairs is 1 to {most} for {len(layout.blocks)} blocks, not {pairs!r}.")
    branches = SkipBranches(SkipBranch(_width(layout)) for _ in range(pairs))
    return _attach(transformer, layout, branches)


def remove_skip_branches(transformer: nn.Module) -> None:
    """Take the branches away; the transformer is what it was before they were added.

    Raises:
        Unsupported: there are none.
    """
    _attached(transformer, "remove_skip_branches").addition.take_back(transformer)


def save_skip_branches(transformer: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the attached branches to a safetensors file, which is replaced in one step.

    Raises:
        Unsupported: there are none, or the file cannot be written.
    """
    branches = _attached(transformer, "save_skip_branches")
    facts = _facts(transformer, len(branches))
    _FILE.write(path, branches.state_dict(), {"skip_branches": json.dumps(facts)})


def load_skip_branches(transformer: nn.Module, path: str | os.PathLike[str]) -> SkipBranches:
    """Add the branches of a file to the transformer they were trained for.

    Raises:
        Unsupported: the file is no such file, belongs to another model, or the transformer cannot take branches (remove
            attached ones first); the model is untouched.
    """
    layout = _check_host(transformer)
    metadata, tensors = _FILE.read(path)
    pairs = _check_facts(metadata, transformer, layout, path)
    branches = SkipBranches(SkipBranch(_width(layout)) for _ in range(pairs))
    _check_tensors(tensors, branches, path)
    branches.load_state_dict(tensors)
    return _attach(transformer, layout, branches)


def _check_host(transformer: nn.Module) -> TransformerLayout:
    """Layout of a transformer that can take branches."""
    name, layout = type(transformer).__name__, describe_transformer(transformer)
    if layout is None:
        raise Unsupported(f"{name} is not a diffusion transformer that diffaccel knows; give `pipe.transformer`.")
    if layout.fuses:
        raise Unsupported(f"this {name} has skip branches already; remove_skip_branches takes them away.")
    if layout.long_skips:
        raise Unsupported(f"{name} has long skips of its own; SkipCache uses them without any training.")
    if any("image" not in stack.outputs for stack in layout.stacks):
        raise Unsupported(f"{name} joins text and image to one sequence, which skip branches cannot tell apart.")
    if not isinstance(layout.head, nn.Linear) or any(
        _first_argument(block) != "hidden_states" for block in layout.blocks
    ):
        raise Unsupported(f"the blocks of {name} are not of a kind that skip branches fit.")
    return layout


def _first_argument(block: nn.Module) -> str:
    return list(inspect.signature(type(block).forward).parameters)[1]


def _width(layout: TransformerLayout) -> int:
    return int(layout.head.in_features)  # type: ignore[arg-type]


def _attach(transformer: nn.Module, layout: TransformerLayout, branches: SkipBranches) -> SkipBranches:
    weight = next(layout.blocks[-1].parameters())
    # packed and 8-bit weights are no type to compute in
    wide = (p.dtype for p in layout.blocks[-1].parameters() if p.is_floating_point() and p.element_size() > 1)
    branches.to(weight.device, next(wide, torch.float32)).train(transformer.training)
    addition = Addition(transformer, ATTACHED_BRANCHES, branches)
    kept: dict[int, torch.Tensor] = {}
    addition.before(transformer, _Forget(kept))
    outputs = [stack.outputs for stack in layout.stacks for _ in stack.blocks]
    for pair, branch in enumerate(branches):
        stream = None if len(outputs[pair]) == 1 else outputs[pair].index("image")
        addition.after(layout.blocks[pair], _Remember(kept, pair, stream))
        addition.before(layout.blocks[-1 - pair], _Join(kept, pair, branch))
    branches.addition = addition
    return branches


def _attached(transformer: nn.Module, function: str) -> SkipBranches:
    branches = getattr(transformer, ATTACHED_BRANCHES, None)
    if not isinstance(branches, SkipBranches):
        raise Unsupported(f"{function}: this {type(transformer).__name__} has no skip branches.")
    return branches


def _facts(transformer: nn.Module, pairs: int) -> dict[str, Any]:
    config: Any = transformer.config
    settings = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return {"format": FORMAT, "class": type(transformer).__name__, "config": digest, "pairs": pairs}


def _check_facts(
    metadata: dict[str, str], transformer: nn.Module, layout: TransformerLayout, path: str | os.PathLike[str]
) -> int:
    """Number of pairs in a file that was written for this transformer."""
    try:
        facts = strict_json(metadata["skip_branches"])
    except (KeyError, ValueError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise Unsupported(f"{os.fspath(path)} does not hold skip branches that this version can read.")
    pairs = facts.get("pairs")
    if type(pairs) is not int or not 1 <= pairs <= (len(layout.blocks) - 1) // 2:
        raise Unsupported(f"{os.fspath(path)} has {pairs!r} pairs, which do not fit {len(layout.blocks)} blocks.")
    if facts != _facts(transformer, pairs):
        raise Unsupported(
            f"the skip branches in {os.fspath(path)} were trained for {str(facts.get('class'))[:60]!r} with another "
            f"configuration than this {type(transformer).__name__}."
        )
    return pairs


def _check_tensors(tensors: dict[str, torch.Tensor], branches: SkipBranches, path: str | os.PathLike[str]) -> None:
    """Raises Unsupported unless the tensors of a file are exactly the ones of `branches`."""
    wanted = branches.state_dict()
    if set(tensors) != set(wanted):
        raise Unsupported(f"{os.fspath(path)} does not have exactly the tensors of {len(branches)} skip branches.")
    for name, like in wanted.items():
        if tensors[name].shape != like.shape:
            raise Unsupported(f"the tensor {name} in {os.fspath(path)} does not have the shape {tuple(like.shape)}.")

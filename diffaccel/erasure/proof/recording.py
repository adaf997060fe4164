"""How a proof uses a pipeline: pictures from prompts or embeddings, and recorded calls of the denoiser that can be repeated.

Nothing here knows a model: a run of the pipeline shows how it calls its denoiser, and the call is repeated with another
text. Recorded predictions of the unedited model are what the attacks aim at, whatever the scheduler or parametrisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.engine.seams import Seams
from diffaccel.errors import Unsupported
from diffaccel.models.call import bind_arguments
from diffaccel.pipelines.find import find_convention

SEQUENCE, POOLED = "prompt_embeds", "pooled_prompt_embeds"


@dataclass(frozen=True)
class Drawing:
    """How pictures are made; picture i gets seed + i.

    Attributes:
        call: further arguments of the pipeline call.
    """

    steps: int = 25
    guidance: float | None = None
    seed: int = 0
    batch_size: int = 8
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoding:
    """What the pipeline's call takes instead of prompts: embeddings by the name of their argument, one row per prompt."""

    tensors: Mapping[str, Tensor]

    def replaced(self, **tensors: Tensor) -> Encoding:
        """The same with other tensors under these names."""
        return Encoding({**self.tensors, **tensors})

    @property
    def texts(self) -> dict[str, Tensor]:
        """What carries the prompt: the sequence (n, tokens, d) and, where there is one, the pooled vector (n, d)."""
        return {name: self.tensors[name] for name in (SEQUENCE, POOLED) if name in self.tensors}


@dataclass(frozen=True)
class Moment:
    """One recorded call of the denoiser: its arguments by name, and what it predicted, (n, ...)."""

    arguments: Mapping[str, Any]
    prediction: Tensor


def draw(pipe: Any, what: Sequence[str] | Encoding, drawing: Drawing, *, seeds: Sequence[int] | None = None) -> Tensor:
    """Pictures (n, 3, h, w) in [0, 1] on the CPU; picture i is drawn from `seeds[i]`, by default seed + i."""
    count, parts = len(_rows(what)), []
    seeds = range(drawing.seed, drawing.seed + count) if seeds is None else seeds
    for rows in batches(count, drawing.batch_size):
        parts.append(_call(pipe, _cut(what, rows), drawing, seeds[rows.start : rows.stop], "pt").float().cpu())
    return torch.cat(parts)


def batches(count: int, size: int) -> Iterator[range]:
    """Positions that run together."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _rows(what: Sequence[str] | Encoding) -> Any:
    return what.tensors[SEQUENCE] if isinstance(what, Encoding) else what


def _cut(what: Sequence[str] | Encoding, rows: range) -> Sequence[str] | Encoding:
    if isinstance(what, Encoding):
        return Encoding({name: value[rows.start : rows.stop] for name, value in what.tensors.items()})
    return [what[i] for i in rows]


def _call(pipe: Any, what: Sequence[str] | Encoding, drawing: Drawing, seeds: Sequence[int], output: str) -> Tensor:
    texts = {"prompt": what} if not isinstance(what, Encoding) else _fitting(pipe, what)
    guidance = {} if drawing.guidance is None else {"guidance_scale": drawing.guidance}
    images: Tensor = pipe(
        **texts,
        num_inference_steps=drawing.steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type=output,
        **guidance,
        **drawing.call,
    ).images
    return images


def _fitting(pipe: Any, encoding: Encoding) -> dict[str, Any]:
    """Arguments for the call; PixArt wants to be told that there is no text."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    empty = {"negative_prompt": None} if "negative_prompt" in parameters else {}
    return {**empty, **encoding.tensors}


def encode(pipe: Any, prompts: Sequence[str], drawing: Drawing) -> Encoding:
    """Embeddings of prompts and of the empty negative prompt, by the pipeline's own encoder path; differentiable.

    Raises:
        Unsupported: the pipeline has no `encode_prompt`, or it returns something unknown.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise Unsupported(f"{type(pipe).__name__} has no encode_prompt, so its embeddings cannot be attacked.")
    parameters = inspect.signature(pipe.encode_prompt).parameters
    given = {
        "prompt": list(prompts),
        "prompt_2": None,
        "prompt_3": None,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
        **drawing.call,
    }
    found = pipe.encode_prompt(**{name: value for name, value in given.items() if name in parameters})
    names = _names(pipe, len(found))
    return Encoding({name: value for name, value in zip(names, found, strict=True) if name and value is not None})


def _names(pipe: Any, count: int) -> tuple[str, ...]:
    """Names of what `encode_prompt` returns; "" for what the pipeline makes again by itself."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if count == 2:
        return (SEQUENCE, "negative_prompt_embeds")
    if count == 3 and POOLED in parameters:
        return (SEQUENCE, POOLED, "")
    if count == 4 and "prompt_attention_mask" in parameters:
        return (SEQUENCE, "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    if count == 4 and POOLED in parameters:
        return (SEQUENCE, "negative_prompt_embeds", POOLED, "negative_pooled_prompt_embeds")
    raise Unsupported(f"attacks do not know what encode_prompt of {type(pipe).__name__} returns.")


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Name and network that predicts."""
    name = find_convention(pipe).denoiser
    return name, getattr(pipe, name)


def record(
    pipe: Any, encoding: Encoding, drawing: Drawing, *, moments: int, seeds: Sequence[int] | None = None
) -> list[Moment]:
    """Calls of the denoiser spread evenly over a run without guidance, which therefore have one row per prompt."""
    _, network = denoiser_of(pipe)
    calls: list[Moment] = []

    def make(original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            # offload hooks and compiled blocks own what they return; the next call may overwrite it
            calls.append(Moment(_kept(bind_arguments(type(network), args, kwargs)), prediction(output).clone()))
            return output

        return forward

    embedded = getattr(network.config, "guidance_embeds", False)
    plain = drawing if embedded else Drawing(drawing.steps, 1.0, drawing.seed, drawing.batch_size, drawing.call)
    with Seams() as seams:
        seams.replace_forward(network, make)
        first = range(drawing.seed, drawing.seed + len(_rows(encoding)))
        _call(pipe, encoding, plain, first if seeds is None else seeds, "latent")
    chosen = {round(i * (len(calls) - 1) / max(1, moments - 1)) for i in range(moments)}
    return [call for i, call in enumerate(calls) if i in chosen]


def _kept(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def prediction(output: Any) -> Tensor:
    """The tensor in what a denoiser returns."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def replay(network: nn.Module, moment: Moment, encoding: Encoding) -> Tensor:
    """What the network predicts now in the recorded call, given another text; differentiable in the text."""
    arguments, texts = dict(moment.arguments), encoding.texts
    arguments["encoder_hidden_states"] = texts[SEQUENCE]
    if POOLED in texts:
        if "pooled_projections" in arguments:
            arguments["pooled_projections"] = texts[POOLED]
        else:
            arguments["added_cond_kwargs"] = {**arguments["added_cond_kwargs"], "text_embeds": texts[POOLED]}
    return prediction(network(**arguments))


def readers(network: nn.Module, moment: Moment, encoding: Encoding) -> dict[str, list[tuple[str, nn.Linear]]]:
    """The linear layers into which the text goes unchanged, found by looking on: argument name -> [(path, layer)]."""
    found: dict[str, list[tuple[str, nn.Linear]]] = {name: [] for name in encoding.texts}

    def look(path: str, layer: nn.Linear) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for name, text in encoding.texts.items():
                if args and isinstance(args[0], Tensor) and _begins_with(args[0], text):
                    found[name].append((path, layer))

        return hook

    handles = [
        layer.register_forward_pre_hook(look(path, layer))
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            replay(network, moment, encoding)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _begins_with(inputs: Tensor, text: Tensor) -> bool:
    """Whether the layer reads this text; a pooled vector may be followed by other columns (sizes, in SDXL)."""
    width = text.shape[-1]
    if inputs.shape[:-1] != text.shape[:-1] or inputs.shape[-1] < width:
        return False
    return torch.equal(inputs[..., :width], text)


@torch.no_grad()
def live_matrix(layer: nn.Module, width: int) -> Tensor:
    """What a linear layer does now to its first `width` inputs, (d_out, width) in float64, bias left out.

    Measured by calling it, so that edits in whatever form, adapters and quantisation are in it.
    """
    parameter = next(layer.parameters())
    inputs = int(getattr(layer, "in_features", width))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    basis = torch.zeros(width + 1, inputs, dtype=dtype, device=parameter.device)
    basis[:width, :width] = torch.eye(width, dtype=dtype, device=parameter.device)
    rows = layer(basis[None])[0].double()
    matrix: Tensor = (rows[:-1] - rows[-1]).T.cpu()
    return matrix

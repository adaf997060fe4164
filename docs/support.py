"""What works where: asked of every method on the tests' tiny pipelines, and run there in every situation.

Only for a checkout: the pipelines, the methods' settings and the situations are those of tests/.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import accelerate
import test_block_cache
import test_environment
import test_matrix
import tiny
import tiny_transformers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tables import table

import diffaccel
from diffaccel import BlockCache
from diffaccel.edits.routes import find_routes
from diffaccel.engine.method import Method
from diffaccel.errors import DiffaccelError
from diffaccel.methods import registry
from diffaccel.models.model_map import describe

STEPS = 6
CACHES = {
    "first_block": BlockCache(kind="first_block"),
    "mag": BlockCache(kind="mag", ratios=test_block_cache.RATIOS),
    "taylor, attention": BlockCache(kind="taylor"),
    "taylor, output": BlockCache(kind="taylor", target="output"),
    "pyramid": BlockCache(kind="pyramid"),
    "dual_block": BlockCache(kind="dual_block", first_blocks=1),
}
Change = Callable[[Any], dict[str, Any]]
CALLS = {"normalized_attention_guidance": {"guidance_scale": 1.0}}  # it stands in the place of the other guidance


def methods() -> dict[str, Method]:
    """Every method with the settings under which the tests see it act, in runs of any length."""
    chosen = test_matrix.METHODS | test_matrix.TRANSFORMERS_ONLY | test_matrix.CHANGES_PICTURES
    found = {name: chosen.get(name) or cls() for name, cls in registry().items() if name != "erase"}
    return {name: _as_users_have_it(method) for name, method in found.items()}


def _as_users_have_it(method: Method) -> Method:
    """Acting in a short run on random weights, but as strict as the defaults about solvers that add noise."""
    wanted = {"min_evaluations": 1, "min_tokens": 1, "allow_stochastic": False} | (
        {"threshold": 0.01} if method.name == "adaptive_guidance" else {}
    )
    return method.model_copy(update={key: wanted[key] for key in wanted.keys() & type(method).model_fields.keys()})


# --- pipelines ---


@functools.cache
def pipelines() -> dict[str, tuple[str, ...]]:
    """Kinds of the tests' pipelines by family."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in (*tiny.KINDS, *tiny_transformers.KINDS):
        family = describe(_build(kind)).convention.family
        found[family] = (*found.get(family, ()), kind)
    return found


@functools.cache
def _build(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (tiny if kind in tiny.KINDS else tiny_transformers).tiny_pipeline(kind)


def _answer(check: Callable[[], object], network: str) -> str:
    """ "yes", or the sentence of the refusal with the network's name left out."""
    try:
        check()
    except DiffaccelError as error:
        return _without(network, error)
    return "yes"


def _without(network: str, error: object) -> str:
    return re.sub(rf"(this )?{network}", "this network", str(error))


def _answers(kind: str, candidates: dict[str, Method]) -> dict[str, str]:
    pipe = _build(kind)
    model = describe(pipe)
    network = type(model.denoiser).__name__
    return {name: _answer(lambda m=method: m.check(model), network) for name, method in candidates.items()}


def _rows(candidates: dict[str, Method], *, erase: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """One row per family and set of answers: its name, and the answer of every method."""
    for family, kinds in pipelines().items():
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for kind in kinds:
            answers = _answers(kind, candidates)
            if erase:
                network = type(describe(_build(kind)).denoiser).__name__
                answers["erase"] = _answer(lambda k=kind: find_routes(_build(k)), network)
            groups.setdefault(tuple(answers.items()), []).append(kind)
        for answers_, alike in groups.items():
            yield (family if len(groups) == 1 else f"{family}: {', '.join(alike)}"), dict(answers_)


def _grid(head: str, rows: list[tuple[str, dict[str, str]]], *, code: bool = True) -> str:
    """Cases down, methods across, and numbers for the reasons, which are listed below."""
    columns = list(rows[0][1])
    reasons = list(dict.fromkeys(answer for _, row in rows for answer in row.values() if answer != "yes"))
    cells = [[name, *(_cell(row[column], reasons) for column in columns)] for name, row in rows]
    listed = "\n".join(f"{number}. {reason.removeprefix(NOTE)}" for number, reason in enumerate(reasons, 1))
    header = [head, *(f"`{column}`" if code else column for column in columns)]
    return f"{table(header, cells)}\n\n{listed}"


NOTE = "note: "  # the run goes on, and the report says that there was nothing to do


def _cell(answer: str, reasons: list[str]) -> str:
    if answer == "yes":
        return "yes"
    return f"{'idle' if answer.startswith(NOTE) else 'no'} ({reasons.index(answer) + 1})"


def unets() -> str:
    """Methods on families around a UNet: few families, so methods go down."""
    rows = [row for row in _rows(methods(), erase=True) if _is_unet(row[0])]
    turned = [(f"`{name}`", {family: answers[name] for family, answers in rows}) for name in rows[0][1]]
    return _grid("Method", turned, code=False)


def transformers() -> str:
    """Methods on families around a diffusion transformer."""
    return _grid("Pipelines", [row for row in _rows(methods(), erase=True) if not _is_unet(row[0])])


def caches() -> str:
    """Kinds of block cache on diffusion transformers."""
    return _grid("Pipelines", [row for row in _rows(CACHES, erase=False) if not _is_unet(row[0])])


def _is_unet(name: str) -> bool:
    return pipelines()[name.partition(":")[0]][0] in tiny.KINDS


# --- situations ---


def _lora(pipe: Any) -> dict[str, Any]:
    test_environment.with_lora(pipe)
    return {"cross_attention_kwargs": {"scale": 0.5}}


def _freeu(pipe: Any) -> dict[str, Any]:
    pipe.enable_freeu(**test_environment.FREEU)
    return {}


def _ip_adapter(pipe: Any) -> dict[str, Any]:
    pipe.unet._load_ip_adapter_weights([test_environment.ip_adapter_weights(pipe.unet, 1)])
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, tiny.WIDTH, generator=torch.Generator().manual_seed(6))]}


def _fused(pipe: Any) -> dict[str, Any]:
    _network(pipe).fuse_qkv_projections()
    return {}


def _offload(pipe: Any) -> dict[str, Any]:
    for model in (_network(pipe), pipe.vae):
        if model is not None:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return {}


def _blocks(pipe: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    if hasattr(pipe, "unet"):
        pipe.unet.compile_repeated_blocks(backend="eager")
    else:  # diffusers names no repeated blocks of this transformer
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")
    return {}


def _whole(pipe: Any) -> dict[str, Any]:
    _network(pipe).compile(backend="eager")
    return {}


def _scheduler(make: Callable[[], Any]) -> Change:
    def change(pipe: Any) -> dict[str, Any]:
        pipe.scheduler = make()
        return {}

    return change


def _unguided(pipe: Any) -> dict[str, Any]:
    return {"guidance_scale": 1.0}


def _as_is(pipe: Any) -> dict[str, Any]:
    return {}


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ON_UNETS: dict[str, tuple[str, Change]] = {
    "as it is": ("sd", _as_is),
    "solver with two evaluations per step (Heun)": ("sd", _scheduler(test_matrix.SCHEDULERS["heun"])),
    "multistep solver (DPM-Solver++)": ("sd", _scheduler(test_matrix.SCHEDULERS["dpm++"])),
    "solver that adds noise (Euler ancestral)": ("sd", _scheduler(test_matrix.SCHEDULERS["euler ancestral"])),
    "guidance scale 1": ("sd", _unguided),
    "image-to-image": ("sd-img2img", _as_is),
    "inpainting": ("sd-inpaint", _as_is),
    "ControlNet": ("controlnet", _as_is),
    "T2I-Adapter": ("t2i-adapter", _as_is),
    "LoRA": ("sd", _lora),
    "IP-Adapter": ("sd", _ip_adapter),
    "FreeU": ("sd", _freeu),
    "fused projections": ("sd", _fused),
    "sequential offload": ("sd", _offload),
    "compiled repeated blocks": ("sd", _blocks),
    "network compiled as a whole": ("sd", _whole),
}
ON_TRANSFORMERS: dict[str, tuple[str, Change]] = {
    "as it is": ("sd3", _as_is),
    "solver with two evaluations per step (Heun)": (
        "sd3",
        _scheduler(lambda: FlowMatchHeunDiscreteScheduler(shift=3.0)),
    ),
    "multistep solver (DPM-Solver++)": ("sd3", _scheduler(lambda: DPMSolverMultistepScheduler(**FLOW))),
    "solver that adds noise": (
        "sd3",
        _scheduler(lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)),
    ),
    "guidance scale 1": ("sd3", _unguided),
    "image-to-image": ("sd3-img2img", _as_is),
    "inpainting": ("sd3-inpaint", _as_is),
    "ControlNet": ("sd3-controlnet", _as_is),
    "fused projections": ("sd3", _fused),
    "sequential offload": ("sd3", _offload),
    "compiled blocks": ("sd3", _blocks),
    "network compiled as a whole": ("sd3", _whole),
}


def _case(kind: str, change: Change, candidates: dict[str, Method]) -> dict[str, str]:
    """What a user sees of each method on one pipeline in one situation."""
    module = tiny if kind in tiny.KINDS else tiny_transformers
    pipe = module.tiny_pipeline(kind)
    if kind in ("sd", "sd-img2img"):
        pipe.unet = tiny.tiny_unet(layers=1)  # every method finds its layers there, in half of the time
    changes = {"output_type": "latent"} | change(pipe)

    def inputs(name: str) -> dict[str, Any]:
        return module.tiny_inputs(kind, steps=_steps(kind), **_size(kind)) | CALLS.get(name, {}) | changes

    return {name: _happens(pipe, method, inputs(name)) for name, method in candidates.items()}


def _steps(kind: str) -> int:
    """As many evaluations everywhere: with a strength of 0.8 the first steps are left out."""
    return STEPS + 2 if kind.endswith(("img2img", "inpaint")) else STEPS


def _size(kind: str) -> dict[str, Any]:
    """Sparse attention needs more than one block of tokens to choose from."""
    return {"size": (24, 24)} if kind.startswith("sd3") else {}


def _happens(pipe: Any, method: Method, inputs: dict[str, Any]) -> str:
    """ "yes", the sentence of a refusal, or the note of a run in which nothing was saved."""
    try:
        fast = diffaccel.wrap(pipe, method)
        fast(**inputs)
    except DiffaccelError as error:
        return _without(type(_network(pipe)).__name__, error)
    if method.name in test_matrix.CHANGES_PICTURES:
        acted = any(fast.report.methods.get(method.name, {}).values())
    else:
        acted = fast.report.flops < fast.report.flops_plain
    notes = [note for note in fast.report.notes if note.startswith(f"{method.name}:")]
    return "yes" if acted else NOTE + (*notes, f"{method.name} did nothing.")[0]


def _network(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def _situations(cases: dict[str, tuple[str, Change]], base: str) -> str:
    fitting = {name: methods()[name] for name, answer in _answers(base, methods()).items() if answer == "yes"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _grid("Situation", [(case, _case(*where, fitting)) for case, where in cases.items()])


def situations_unet() -> str:
    """Methods in every situation on a UNet."""
    return _situations(ON_UNETS, "sd")


def situations_transformer() -> str:
    """Methods in every situation on a diffusion transformer."""
    return _situations(ON_TRANSFORMERS, "sd3")


MAKERS = {f.__name__: f for f in (unets, transformers, caches, situations_unet, situations_transformer)}

"""Prompts to picture files: one seed per picture, sizes checked first, every finished batch saved at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.engine.finite import refuse_these
from diffaccel.engine.report import Report
from diffaccel.errors import DiffaccelError
from diffaccel.files.metadata import Generation, png_info
from diffaccel.files.output import OutputFolder, safe_name, write_file
from diffaccel.models.model_map import describe
from diffaccel.models.transformers import TransformerLayout
from diffaccel.wrapping import AcceleratedPipeline

FEW_STEPS = 10  # that every scheduler can do; one that refuses these needs more than a number


class GenerateError(DiffaccelError):
    """Settings that this pipeline cannot generate with; the message names the setting."""


@dataclass(frozen=True)
class Job:
    """One picture: its prompt, its own seed, and where it goes."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Settings:
    """What all pictures of one command share; None leaves the pipeline's own default."""

    steps: int
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None
    batch_size: int = 4
    metadata: bool = True


def plan(prompts: Sequence[str], seed: int, count: int, folder: OutputFolder) -> list[Job]:
    """One job per picture. Picture i gets seed + i, so each can be made again alone.

    Raises:
        GenerateError: a prompt that is not valid text.
        OutputError: a file of the planned name exists already.
    """
    wanted = [prompt for prompt in prompts for _ in range(count)]
    return [_job(prompt, seed + index, folder) for index, prompt in enumerate(wanted)]


def _job(prompt: str, seed: int, folder: OutputFolder) -> Job:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise GenerateError(f"The prompt {prompt!r} is not valid UTF-8 text.") from error
    return Job(prompt, seed, folder.claim(f"{safe_name(prompt)}-{seed}.png"))


def check_size(pipe: Any, size: tuple[int, int] | None) -> None:
    """Raise `GenerateError` if a side is not a multiple of what autoencoder and token size of the pipeline need."""
    factor = _size_factor(pipe)
    for side in size or ():
        if side % factor or side <= 0:
            raise GenerateError(f"The size {size[0]}x{size[1]} does not fit: sides must be multiples of {factor}.")  # type: ignore[index]


def _size_factor(pipe: Any) -> int:
    """Sides must be multiples of this; some pipelines would silently make another size otherwise."""
    cell = int(getattr(pipe, "vae_scale_factor", 8))
    layout = describe(pipe).layout
    if not isinstance(layout, TransformerLayout):
        return cell
    processor = getattr(pipe, "image_processor", None)  # where the pipeline packs its latents, it knows the factor
    return max(cell * layout.patch, int(processor.config.vae_scale_factor) if processor is not None else cell)


def check_steps(pipe: Any, steps: int) -> None:
    """Raise `GenerateError` if the scheduler cannot do so many steps."""
    reason = _refused_steps(pipe.scheduler, steps)
    if reason and can_do_steps(pipe, FEW_STEPS):
        most = pipe.scheduler.config.get("num_train_timesteps") or 0
        why = f"it has {most} at most" if steps > most > 0 else reason
        raise GenerateError(f"{type(pipe.scheduler).__name__} cannot do {steps} steps: {why}.")


def can_do_steps(pipe: Any, steps: int) -> bool:
    """Whether the scheduler takes this number of steps, without more being said."""
    return not _refused_steps(pipe.scheduler, steps)


def _refused_steps(scheduler: Any, steps: int) -> str:
    """Why a copy of the scheduler refuses this number of steps; empty if it does not."""
    twin = type(scheduler).from_config(scheduler.config)
    # dynamic shifting needs the picture size, which changes the noise levels but not their number
    keywords = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting", False) else {}
    try:
        twin.set_timesteps(steps, **keywords)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    levels = len(getattr(twin, "alphas_cumprod", ()))
    if levels and not hasattr(twin, "sigmas") and int(twin.timesteps.max()) >= levels:
        return f"its first would be at noise level {int(twin.timesteps.max())} of {levels}, counted from 0; give fewer"
    return ""


def generate(
    fast: AcceleratedPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    *,
    model: str,
    overwrite: bool = False,
    on_saved: Callable[[Path], None] = lambda path: None,
) -> Iterator[Report]:
    """Make and save the pictures batch by batch; yields each batch's report after its files are complete.

    Args:
        on_saved: called after each file is complete.
    Raises:
        GenerateError: a size or a number of steps this pipeline cannot make, or a call argument it does not have.
        OutputError: a file cannot be written.
        BrokenPicture: at the end, if pictures held NaN or infinite values; nothing was written for them.
    """
    check_size(fast.pipe, settings.size)
    check_steps(fast.pipe, settings.steps)
    broken: list[Job] = []
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        images = fast(**call_arguments(fast.pipe, batch, settings)).images
        report = fast.report
        assert report is not None  # set by every call
        broken += [batch[index] for index in report.broken]
        for job, image in zip(batch, images, strict=True):
            if job in broken:
                continue
            info = (
                png_info(describe_picture(fast, job, settings, image, report, len(batch), model))
                if settings.metadata
                else None
            )
            write_file(job.path, _saver(image, info), overwrite=overwrite)
            on_saved(job.path)
        yield report
    refuse_these([jobs.index(job) for job in broken], len(jobs))


def call_arguments(pipe: Any, batch: Sequence[Job], settings: Settings) -> dict[str, Any]:
    """The pipeline's call arguments for one batch."""
    import torch

    arguments: dict[str, Any] = {
        "prompt": [job.prompt for job in batch],
        "num_inference_steps": settings.steps,
        # On the CPU, so that a seed means the same picture on every device.
        "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in batch],
    }
    arguments |= guidance_arguments(pipe, settings.guidance, len(batch), settings.negative)
    if settings.size is not None:
        arguments["width"], arguments["height"] = settings.size
    _refuse_unknown(pipe, arguments)
    return arguments


def guidance_arguments(pipe: Any, scale: float | None, images: int, negative: str = "") -> dict[str, Any]:
    """Call arguments for a guidance scale and negative prompts; None keeps the pipeline's own scale.

    Pipelines with a distilled scale have another argument for the real one.

    Raises:
        GenerateError: a negative prompt has no effect on this pipeline, or none without a scale.
    """
    arguments: dict[str, Any] = {"negative_prompt": [negative] * images} if negative else {}
    if "true_cfg_scale" not in inspect.signature(type(pipe).__call__).parameters:
        return arguments if scale is None else {**arguments, "guidance_scale": scale}
    if pipe.transformer.config.guidance_embeds:
        if arguments:
            raise GenerateError(
                f"This {type(pipe).__name__} has its guidance built in and no use for a negative prompt; leave it out."
            )
        return {} if scale is None else {"guidance_scale": scale}
    if scale is None:
        if arguments:
            raise GenerateError(f"{type(pipe).__name__} needs a guidance scale for a negative prompt; give one.")
        return {}
    return {"true_cfg_scale": scale, "negative_prompt": [negative] * images}


def _refuse_unknown(pipe: Any, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "num_frames" in parameters:
        raise GenerateError(f"{type(pipe).__name__} makes videos; this command saves pictures.")
    for name in arguments:
        if name not in parameters:
            raise GenerateError(f"{type(pipe).__name__} has no call argument {name!r}.")
    missing = [
        name
        for name in ("image", "mask_image", "control_image")
        if name in parameters and parameters[name].default in (None, inspect.Parameter.empty)
    ]
    if missing:
        raise GenerateError(f"{type(pipe).__name__} needs {missing[0]!r}; this command generates from text alone.")


def describe_picture(
    fast: AcceleratedPipeline, job: Job, settings: Settings, image: Any, report: Report, images: int, model: str
) -> Generation:
    """What a picture of a call says about itself; `images` is how many the call made."""
    return Generation(
        prompt=job.prompt,
        negative_prompt=settings.negative,
        steps=settings.steps,
        guidance=_guidance(fast.pipe, settings),
        scheduler=type(fast.pipe.scheduler).__name__,
        seed=job.seed,
        width=image.width,
        height=image.height,
        model=Path(model).name,
        recipe=fast.recipe.to_dict(),
        seconds=report.seconds / images,
        report=report.to_dict(),
    )


def _guidance(pipe: Any, settings: Settings) -> float:
    """The scale of the call; 1 where the pipeline guides only if told to."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    default = getattr(parameter, "default", None)
    chosen = default if settings.guidance is None else settings.guidance
    return 1.0 if chosen is None else float(chosen)


def _saver(image: Any, info: Any) -> Callable[[Any], Any]:
    return lambda file: image.save(file, format="png", pnginfo=info)

"""Where text enters a pipeline: the live projections, and the text encoders that are loaded.

`diffaccel/models/text_routes.py` says it per denoiser class; here the facts meet one pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import Unsupported
from diffaccel.models.facts import Reader, RouteName, Source, TextRoute
from diffaccel.models.text_routes import describe_text_routes
from diffaccel.pipelines.find import find_convention

CONTROL = "The ControlNet reads the prompt by projections of its own, which the edit leaves as they are."


@dataclass(frozen=True)
class Projection:
    """A linear layer of a pipeline that reads text: dotted path from the pipeline, the live module, and the facts."""

    name: str
    module: nn.Module
    reader: Reader


@dataclass(frozen=True)
class Route:
    """One place where text enters this pipeline.

    Attributes:
        name: "sequence" or "pooled".
        width: of a row of text, as the projections read it.
        projections: every layer that reads it.
        sources: the text encoders that are loaded.
        missing: names of optional text encoders that are not loaded.
    """

    name: RouteName
    width: int
    projections: tuple[Projection, ...]
    sources: tuple[Source, ...]
    missing: tuple[str, ...]


def find_routes(pipe: Any) -> tuple[Route, ...]:
    """Where text enters `pipe`, "sequence" first. Text encoders may be absent; `require_encoders` insists on them.

    Raises:
        Unsupported: pipeline or denoiser not covered, with the reason.
    """
    convention = find_convention(pipe)
    if convention.others and getattr(pipe, convention.others[0], None) is not None:
        raise Unsupported(f"{type(pipe).__name__} has denoisers that take turns; concept erasure does not cover them.")
    denoiser = getattr(pipe, convention.denoiser, None)
    if denoiser is None:
        raise Unsupported(f"this {type(pipe).__name__} has no {convention.denoiser}.")
    return tuple(_route(pipe, convention.denoiser, denoiser, found) for found in describe_text_routes(denoiser))


def _route(pipe: Any, attribute: str, denoiser: nn.Module, found: TextRoute) -> Route:
    projections = tuple(
        Projection(f"{attribute}.{reader.name}", denoiser.get_submodule(reader.name), reader)
        for reader in found.readers
    )
    present = tuple(source for source in found.sources if getattr(pipe, source.encoder, None) is not None)
    missing = tuple(s.encoder for s in found.sources if s.optional and getattr(pipe, s.encoder, None) is None)
    return Route(found.name, found.width, projections, present, missing)


def require_encoders(pipe: Any, route: Route) -> None:
    """Raises Unsupported if a text encoder that the pipeline cannot do without is not loaded, or one cannot be used."""
    denoiser = route.projections[0].name.split(".")[0]
    loaded = {source.encoder for source in route.sources} | set(route.missing)
    facts = next(f for f in describe_text_routes(getattr(pipe, denoiser)) if f.name == route.name)
    absent = [source.encoder for source in facts.sources if source.encoder not in loaded]
    if absent:
        raise Unsupported(
            f"erasing needs the text encoders, but this {type(pipe).__name__} has no {' and no '.join(absent)}."
        )
    for source in route.sources:
        if getattr(pipe, source.tokenizer, None) is None:
            raise Unsupported(f"this {type(pipe).__name__} has {source.encoder}, but no {source.tokenizer} for it.")
        parts = getattr(pipe, source.encoder).modules()
        if any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts):
            raise Unsupported(
                f"{source.encoder} is in training mode, so its dropout would be in the edit; call "
                f"pipe.{source.encoder}.eval() first."
            )


def sections(route: Route) -> Iterator[tuple[int, tuple[Source, ...]]]:
    """Sources that fill the same rows side by side, section by section."""
    for number in sorted({source.section for source in route.sources}):
        yield number, tuple(source for source in route.sources if source.section == number)


def leaks(pipe: Any, routes: tuple[Route, ...]) -> tuple[str, ...]:
    """Ways by which a concept may still enter this pipeline besides the edited routes, a sentence each."""
    found = []
    if getattr(pipe, "controlnet", None) is not None:
        found.append(CONTROL)
    if getattr(pipe, "image_encoder", None) is not None:
        found.append("Image prompts (IP-Adapter) do not pass through the edited projections.")
    for name in dict.fromkeys(name for route in routes for name in route.missing):
        if name == "text_encoder_3":
            found.append(f"{name} was not loaded, so what it would write was not measured; make a new edit to use it.")
    for source in dict.fromkeys(s.encoder for route in routes for s in route.sources):
        if getattr(getattr(pipe, source), "peft_config", None):
            found.append(f"{source} carries adapters; the edit knows the embeddings they made when it was computed.")
    return tuple(found)

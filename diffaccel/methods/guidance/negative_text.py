"""Negative text for methods that use it inside the denoiser: encoded by the pipeline itself, without its own guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffaccel.engine.run import Run
from diffaccel.errors import Unsupported
from diffaccel.models.call import Call
from diffaccel.models.facts import NegativeText

Forward = Callable[..., Any]


class Negative:
    """The negative text of a run, from the pipeline's own `encode_prompt`."""

    def __init__(self, name: str, default: str, pipe: Any, run: Run, where: NegativeText) -> None:
        self.name, self.default, self.pipe, self.run, self.where = name, default, pipe, run, where
        self.embeddings: torch.Tensor | None = None  # (images, tokens, width)
        self.mask: torch.Tensor | None = None  # (images, tokens)

    def encode(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """Around `encode_prompt`: have it encode the negative text too, with the settings of this call."""
        bound = inspect.signature(original).bind(*args, **kwargs)
        if self.where.embeddings is None:
            output = original(*args, **kwargs)
            if self.embeddings is None:  # the pipeline asks once more if it guides by itself
                self.embeddings = self._encode_again(original, bound)
            return output
        self._take_unread(bound)
        if bound.arguments.get("negative_prompt_embeds") is None and not bound.arguments.get("negative_prompt"):
            bound.arguments["negative_prompt"] = self._texts(self.default, bound.arguments)
        self._require_encoder(bound.arguments.get("negative_prompt_embeds"))
        bound.arguments["do_classifier_free_guidance"] = True
        output = original(*bound.args, **bound.kwargs)
        self.embeddings = output[self.where.embeddings]
        self.mask = None if self.where.mask is None else output[self.where.mask]
        return output

    def _take_unread(self, bound: inspect.BoundArguments) -> None:
        """Pipelines that know no negative prompts (LCM) swallow them: here they are of use."""
        for name in bound.signature.parameters:
            if not name.startswith("negative_") or self.run.arguments.get(name) is None:
                continue
            read = bound.arguments.get(name)
            if read is None or (isinstance(read, str) and not read):
                bound.arguments[name] = self.run.arguments[name]

    def _encode_again(self, original: Forward, bound: inspect.BoundArguments) -> torch.Tensor:
        given: Mapping[str, Any] = self.run.arguments
        embeddings: torch.Tensor | None = given.get("negative_prompt_embeds")
        if embeddings is not None:
            return embeddings
        self._require_encoder(None)
        text = given.get("negative_prompt") or self.default
        second = given.get("negative_prompt_2") or text
        changed = {"prompt": self._texts(text, bound.arguments), "prompt_2": self._texts(second, bound.arguments)}
        dropped = {"prompt_embeds": None, "pooled_prompt_embeds": None}
        result: torch.Tensor = original(**{**bound.arguments, **changed, **dropped})[0]
        return result

    def _require_encoder(self, embeddings: Any) -> None:
        if embeddings is None and getattr(self.pipe, "text_encoder", None) is None:
            raise Unsupported(
                f"{self.name} cannot encode a negative prompt: this pipeline has no text encoder; pass "
                "negative_prompt_embeds."
            )

    @staticmethod
    def _texts(text: str | list[str], arguments: Mapping[str, Any]) -> str | list[str]:
        """One text for each prompt, in the form the prompts have."""
        prompt: Any = arguments.get("prompt")
        embeddings: Any = arguments.get("prompt_embeds")
        if isinstance(text, list) or isinstance(prompt, str):
            return text
        return [text] * len(embeddings if prompt is None else prompt)

    def of(self, call: Call) -> torch.Tensor:
        """Embeddings for the rows of a call.

        Raises:
            Unsupported: there are none, or for another number of pictures.
        """
        prompt: torch.Tensor = call.arguments["encoder_hidden_states"]
        if self.embeddings is None:
            raise Unsupported(f"{self.name}: the pipeline did not encode its prompt by encode_prompt.")
        if len(self.embeddings) != len(prompt):
            raise Unsupported(
                f"{self.name} has negative text for {len(self.embeddings)} pictures; the call makes {len(prompt)}."
            )
        return self.embeddings.to(prompt)

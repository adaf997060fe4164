"""Rows to calls of the pipeline: what a batch passes, and whether this pipeline takes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffaccel.batch.arguments import converted, possible_arguments
from diffaccel.batch.fields import Row, is_prompt
from diffaccel.batch.plan import BatchPlan, Group
from diffaccel.batch.settings import BatchError, RowProblem
from diffaccel.errors import DiffaccelError
from diffaccel.generate import Job, Settings, call_arguments, check_size, describe_picture
from diffaccel.metadata import Generation
from diffaccel.recipe import Recipe
from diffaccel.report import Report
from diffaccel.wrapping import AcceleratedPipeline, wrap


class Caller:
    """A pipeline as the rows of a plan use it: one wrapped pipeline per recipe, made once.

    Args:
        model: what pictures and manifest call the model.
    """

    def __init__(self, plan: BatchPlan, fast_or_pipe: Any, model: str) -> None:
        own = fast_or_pipe if isinstance(fast_or_pipe, AcceleratedPipeline) else None
        self.plan, self.model = plan, model
        self.pipe = fast_or_pipe if own is None else own.pipe
        self._wrapped = {"": own} if own is not None else {}
        self.notes: list[str] = []
        self._left_out: frozenset[str] = frozenset()

    def wrapped(self, recipe: str) -> AcceleratedPipeline:
        """The pipeline with a recipe of the plan; "" is the pipeline's own, or none."""
        if recipe not in self._wrapped:
            self._wrapped[recipe] = wrap(self.pipe, self.plan.recipes[recipe] if recipe else Recipe(name="off"))
        return self._wrapped[recipe]

    def check(self) -> None:
        """Raise `BatchError` with the rows whose recipe, size or arguments this pipeline cannot take."""
        known = possible_arguments(self.pipe)
        given = {name for group in self.plan.groups for name, _ in group.extras}
        unknown = sorted(given - known)
        if unknown and self.plan.settings.ignore_unknown_columns:
            self._left_out = frozenset(unknown)
            self.notes.append(f"Columns left out, because the pipeline has no such argument: {', '.join(unknown)}.")
            unknown = []
        problems = [
            RowProblem(
                0, f"The column {name!r} is no column of a batch and no call argument of {type(self.pipe).__name__}."
            )
            for name in unknown
        ]
        if not problems:
            problems = [problem for group in self.plan.groups for problem in self._problems(group)]
        if problems:
            raise BatchError.of(problems)

    def _problems(self, group: Group) -> Iterator[RowProblem]:
        try:
            self.wrapped(group.recipe)
            check_size(self.pipe, group.size)
            self.arguments([self.plan.rows[group.rows[0]]])  # and the values of its further arguments
        except DiffaccelError as error:
            for index in group.rows:
                yield RowProblem(index + 1, str(error))

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Call arguments for rows of one group."""
        first = rows[0]
        jobs = [Job(row.prompt, row.seed, Path()) for row in rows]
        arguments = call_arguments(self.pipe, jobs, self._settings(first))
        if first.negative_prompt:
            arguments["negative_prompt"] = [row.negative_prompt for row in rows]
        for name, value in first.extras:
            if name in self._left_out:
                continue
            texts = [dict(row.extras)[name] for row in rows]
            arguments[name] = (
                [json.loads(text) for text in texts]
                if is_prompt(name)
                else converted(self.pipe, name, json.loads(value))
            )
        return arguments

    def _settings(self, row: Row) -> Settings:
        return Settings(row.steps, row.guidance_scale, row.negative_prompt, row.size)

    def call(self, rows: Sequence[Row]) -> tuple[list[Any], Report]:
        """The pictures of rows of one group, and what the call did."""
        fast = self.wrapped(rows[0].recipe)
        images = list(fast(**self.arguments(rows)).images)
        if len(images) != len(rows):
            raise BatchError(f"{type(self.pipe).__name__} made {len(images)} pictures of {len(rows)} prompts.")
        assert fast.report is not None  # set by every call
        return images, fast.report

    def describe(self, row: Row, image: Any, report: Report, together: int) -> Generation:
        """What a picture says about itself."""
        job, fast = Job(row.prompt, row.seed, Path()), self.wrapped(row.recipe)
        # No counts of the whole call in the picture: it must not depend on its batch mates.
        return dataclasses.replace(
            describe_picture(fast, job, self._settings(row), image, report, together, self.model), report={}
        )

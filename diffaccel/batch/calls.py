"""Rows to calls of the pipeline: what a batch passes, and whether this pipeline takes it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffaccel.batch.arguments import converted, possible_arguments
from diffaccel.batch.fields import Row, is_prompt
from diffaccel.batch.plan import BatchPlan, Group
from diffaccel.batch.settings import BatchError, RowProblem
from diffaccel.engine.report import Report, refuse_broken
from diffaccel.errors import DiffaccelError
from diffaccel.files.metadata import Generation
from diffaccel.generate import Job, Settings, call_arguments, check_size, check_steps, describe_picture
from diffaccel.recipes.recipe import Recipe
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
        self._verdicts: dict[Hashable, str] = {}

    def wrapped(self, recipe: str) -> AcceleratedPipeline:
        """The pipeline with a recipe of the plan; "" is the pipeline's own, or none."""
        if recipe not in self._wrapped:
            self._wrapped[recipe] = wrap(self.pipe, self.plan.recipes[recipe] if recipe else Recipe(name="off"))
        return self._wrapped[recipe]

    def check(self) -> None:
        """Raise `BatchError` with the rows whose recipe, size, steps or arguments this pipeline cannot take.

        Columns that are to be ignored are no longer in `plan` afterwards.
        """
        known = possible_arguments(self.pipe)
        given = {name for row in self.plan.rows for name, _ in row.extras} | {name for name, _ in self.plan.undecided}
        unknown = sorted(given - known)
        if unknown and self.plan.settings.ignore_unknown_columns:
            self.plan = self.plan.without(unknown)
            self.notes.append(f"Columns left out, because the pipeline has no such argument: {', '.join(unknown)}.")
            unknown = []
        problems = [self._unknown(name) for name in unknown] or list(self._problems())
        if problems:
            raise BatchError.of(problems)

    def _unknown(self, name: str) -> RowProblem:
        pipeline = type(self.pipe).__name__
        return RowProblem(0, f"The column {name!r} is no column of a batch and no call argument of {pipeline}.")

    def _problems(self) -> Iterator[RowProblem]:
        yield from (problem for _, problem in self.plan.undecided)
        told = {problem.row for _, problem in self.plan.undecided}
        for group in self.plan.groups:
            if wrong := self._wrong(group):
                yield from (RowProblem(index + 1, wrong) for index in group.rows if index + 1 not in told)

    def _wrong(self, group: Group) -> str:
        """Why the pipeline cannot take these rows; empty if it can. In a long list most groups differ in one value only,
        so each question is asked once."""
        first = [self.plan.rows[group.rows[0]]]
        questions: dict[Hashable, Callable[[], object]] = {
            ("recipe", group.recipe): lambda: self.wrapped(group.recipe),
            ("size", group.size): lambda: check_size(self.pipe, group.size),
            ("steps", group.steps): lambda: check_steps(self.pipe, group.steps),
            ("call", group.guidance_scale is None, group.negative): lambda: self._common(first),
        }
        for name, value in group.extras:
            if not is_prompt(name):
                questions["value", name, value] = functools.partial(self._value, name, value)
        return next((wrong for key, ask in questions.items() if (wrong := self._verdict(key, ask))), "")

    def _verdict(self, key: Hashable, ask: Callable[[], object]) -> str:
        if key not in self._verdicts:
            try:
                ask()
                self._verdicts[key] = ""
            except DiffaccelError as error:
                self._verdicts[key] = str(error)
        return self._verdicts[key]

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Call arguments for rows of one group."""
        return self._common(rows) | {name: self._extra(name, rows) for name, _ in rows[0].extras}

    def _common(self, rows: Sequence[Row]) -> dict[str, Any]:
        jobs = [Job(row.prompt, row.seed, Path()) for row in rows]
        arguments = call_arguments(self.pipe, jobs, self._settings(rows[0]))
        if rows[0].negative_prompt:
            arguments["negative_prompt"] = [row.negative_prompt for row in rows]
        return arguments

    def _extra(self, name: str, rows: Sequence[Row]) -> Any:
        texts = [dict(row.extras)[name] for row in rows]
        return list(map(json.loads, texts)) if is_prompt(name) else self._value(name, texts[0])

    def _value(self, name: str, text: str) -> Any:
        return converted(self.pipe, name, json.loads(text))

    def _settings(self, row: Row) -> Settings:
        return Settings(row.steps, row.guidance_scale, row.negative_prompt, row.size)

    def call(self, rows: Sequence[Row]) -> tuple[list[Any], Report]:
        """The pictures of rows of one group, and what the call did.

        Raises:
            BrokenPicture: one of them holds NaN or infinite values.
        """
        fast = self.wrapped(rows[0].recipe)
        images = list(fast(**self.arguments(rows)).images)
        if len(images) != len(rows):
            raise BatchError(f"{type(self.pipe).__name__} made {len(images)} pictures of {len(rows)} prompts.")
        refuse_broken(fast.report)
        assert fast.report is not None  # set by every call
        return images, fast.report

    def describe(self, row: Row, image: Any, report: Report, together: int) -> Generation:
        """What a picture says about itself."""
        job, fast = Job(row.prompt, row.seed, Path()), self.wrapped(row.recipe)
        # No counts of the whole call in the picture: it must not depend on its batch mates.
        return dataclasses.replace(
            describe_picture(fast, job, self._settings(row), image, report, together, self.model), report={}
        )

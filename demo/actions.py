"""What the buttons do: values of the page in, values of the page out. The work itself is in the files named after the tabs.

Every action finds the visitor's session by the key that the server gave the page, turns errors into one sentence, and
shares nothing with other visitors but the queue and the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from diffaccel.batch import BatchError
from diffaccel.demo import batching, comparing, erasing, exploring, recipes
from diffaccel.demo.engine import Ask, Cancelled, Engine, PageError, Watch
from diffaccel.demo.fields import Field, build_recipe, offered, show_recipe
from diffaccel.demo.markup import message, notes
from diffaccel.demo.sessions import Session, Sessions
from diffaccel.errors import DiffaccelError
from diffaccel.methods import registry
from diffaccel.recipes.presets import presets
from diffaccel.recipes.recipe import Recipe

log = logging.getLogger("diffaccel.demo")
Update = Any


class Actions:
    """The functions behind the page.

    Args:
        engine: the model.
        sessions: the visitors.
    """

    def __init__(self, engine: Engine, sessions: Sessions) -> None:
        self.engine, self.sessions = engine, sessions
        self.fields: list[Field] = [field for fields in offered().values() for field in fields]
        self.methods = list(offered())

    # --- sessions ---

    def session(self, request: gr.Request) -> Session:
        """The visitor's session."""
        return self.sessions.of(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.sessions.close(str(request.session_hash))

    @contextmanager
    def _readable(self, session: Session) -> Iterator[None]:
        """Errors as a sentence for the page; what nobody expected also goes to the server's log."""
        try:
            yield
        except Cancelled:
            raise
        except Exception as error:
            session.problem = sentence(error)
            if not isinstance(error, DiffaccelError):
                log.exception("an action of the page failed")
            raise refusal(session.problem) from error

    def problem(self, request: gr.Request) -> str:
        """The last error of this visitor, to stay on the page when the notice is gone."""
        return message(self.session(request).problem, "bad")

    def cancel(self, tab: str) -> Callable[[gr.Request], str]:
        """The action of a tab's Cancel button."""

        def stop(request: gr.Request) -> str:
            found = self.session(request).cancel(tab)
            text = "Cancelling: the run stops after the current step." if found else "Nothing is running."
            gr.Info(text, duration=3)
            return message(text)

        return stop

    # --- recipe ---

    def check(
        self, request: gr.Request, model: str, preset: str, methods: list[str], *shown: Any
    ) -> tuple[Update, ...]:
        """The recipe that the controls say: its JSON, a message, and the file for download."""
        session = self.session(request)
        try:
            recipe = self._recipe(preset, methods, shown)
            text, wrong = self._json(recipe), recipes.complaint(recipe, self.engine, model)
            download = gr.update(value=str(recipes.save(recipe, session)), interactive=True)
        except DiffaccelError as error:
            return gr.skip(), message(sentence(error), "bad"), gr.update(interactive=False)
        if wrong:
            return text, message(sentence(wrong), "bad"), download
        return text, message(self._praise(recipe, preset), "good"), download

    def _recipe(self, preset: str, methods: Sequence[str], shown: Sequence[Any]) -> Recipe:
        values = {(field.method, field.name): value for field, value in zip(self.fields, shown, strict=True)}
        return build_recipe(methods, values, name=preset or recipes.CUSTOM)

    @staticmethod
    def _json(recipe: Recipe) -> str:
        import json

        return json.dumps(recipe.to_dict(), indent=2)

    @staticmethod
    def _praise(recipe: Recipe, preset: str) -> str:
        known, text = presets(), recipe.describe().replace("()", "")
        return f"{text}. {known[preset].note}" if preset in known else text

    def fill(self, preset: str, model: str, request: gr.Request) -> list[Update]:
        """Set the switches to a preset, for this model. The custom one is whatever they say already."""
        if preset not in presets():
            return [gr.skip()] * (1 + len(self.fields))
        session = self.session(request)
        with self._readable(session):
            session.filled = recipes.preset(preset, self.engine, model)
            return self._switches(session.filled)

    def refill(self, preset: str, model: str, request: gr.Request) -> list[Update]:
        """Another model: set the switches only where its preset is another one.

        An answer that comes late would take back what a visitor has switched meanwhile.
        """
        session = self.session(request)
        with self._readable(session):
            same = preset in presets() and recipes.preset(preset, self.engine, model) == session.filled
        return [gr.skip()] * (1 + len(self.fields)) if same else self.fill(preset, model, request)

    def upload(self, file: str | None, model: str, request: gr.Request) -> list[Update]:
        """Set the switches to a recipe file: preset name, methods, fields."""
        with self._readable(self.session(request)):
            if file is None:
                raise PageError("Choose a recipe file first.")
            recipe = recipes.from_file(file, self.engine, model)
            return [recipes.CUSTOM, *self._switches(recipe)]

    def _switches(self, recipe: Recipe) -> list[Update]:
        chosen, shown = show_recipe(recipe)
        return [chosen, *(shown[field.method, field.name] for field in self.fields)]

    def groups(self, methods: list[str]) -> list[Update]:
        """Show the settings of the chosen methods only."""
        return [gr.update(visible=True if name in methods else "hidden") for name in self.methods]

    def described(self, method: str) -> str:
        """What a method is called on the page."""
        from diffaccel.demo.fields import summary_of

        return summary_of(registry()[method])

    # --- running ---

    def prepare(self, tab: str) -> Callable[..., tuple[Update, ...]]:
        """First half of a run: refuse a wrong recipe at once if there is one, then hand the buttons to the run."""

        def start(request: gr.Request, *recipe: Any) -> tuple[Update, ...]:
            session = self.session(request)
            session.problem = ""  # what the server refuses before an action starts leaves no sentence of its own
            text = gr.skip()
            if recipe:
                preset, methods, *shown = recipe
                with self._readable(session):
                    text = self._json(self._recipe(preset, methods, shown))
            session.complaints.pop(tab, None)
            session.prepare(tab)
            return text, gr.update(interactive=False), gr.update(interactive=True), ""

        return start

    @staticmethod
    def ready() -> tuple[Update, Update, Update]:
        """The run is over: its sentence stays, its buttons are back."""
        return gr.skip(), gr.update(interactive=True), gr.update(interactive=False)

    def failed(self, tab: str) -> Callable[..., tuple[Update, Update, Update]]:
        """The run was refused or broke: why, and its buttons are back."""

        def ended(request: gr.Request, *inputs: Any) -> tuple[Update, Update, Update]:
            self.session(request).complaints[tab] = inputs
            known = self.problem(request) or message("A value was refused; the notice says why.", "bad")
            return known, gr.update(interactive=True), gr.update(interactive=False)

        return ended

    def forget(self, tab: str) -> Callable[..., Update]:
        """A complaint goes when its inputs are others; it may be right no longer."""

        def changed(request: gr.Request, *inputs: Any) -> Update:
            complaints = self.session(request).complaints
            if complaints.get(tab, inputs) == inputs:  # also an answer to a change from before the complaint
                return gr.skip()
            del complaints[tab]
            return ""

        return changed

    @contextmanager
    def _run(
        self, tab: str, request: gr.Request, progress: gr.Progress, unit: str = "steps"
    ) -> Iterator[tuple[Session, Watch]]:
        session = self.session(request)

        def show(done: int, total: int, text: str) -> None:
            progress((done, total), desc=text, unit=unit)

        with session.running(tab) as cancel, self._readable(session):
            yield session, Watch(show, cancel)

    def compare(
        self,
        model: str,
        prompt: str,
        negative: str,
        seed: float,
        steps: float,
        guidance: float | None,
        width: float | None,
        height: float | None,
        recipe: str,
        warm: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (gradio finds it by its default)
    ) -> tuple[Update, ...]:
        """Plain and accelerated picture, figures, steps, region map, two files, a sentence; `warm` measures times."""
        try:
            with self._run("compare", request, progress) as (session, watch):
                ask = _ask(prompt, negative, seed, steps, guidance, width, height)
                chosen = recipes.from_text(recipe, self.engine, model)
                found = comparing.compare(self.engine, session, model, ask, chosen, watch, timed=bool(warm))
        except Cancelled as stop:
            return *([gr.skip()] * 6), message(str(stop))
        plain, fast = str(found.plain.path), str(found.fast.path)
        regions = None if found.region_map is None else str(found.region_map)
        return (
            (plain, fast),
            found.figures(),
            found.steps(),
            gr.update(value=regions, visible=regions is not None),
            gr.update(value=plain, interactive=True),
            gr.update(value=fast, interactive=True),
            message(f"{found.summary()} {_edit_note(session)}".strip(), "good"),
        )

    def explore(
        self,
        model: str,
        prompt: str,
        negative: str,
        seed: float,
        steps: float,
        guidance: float | None,
        width: float | None,
        height: float | None,
        recipe: str,
        first: str,
        first_values: str,
        second: str | None,
        second_values: str,
        baseline: bool,
        warm: bool,
        over: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Update, ...]:
        """Grid, plot, figures, a sentence; `warm` measures times."""
        try:
            with self._run("explore", request, progress) as (session, watch):
                ask = _ask(prompt, negative, seed, steps, guidance, width, height)
                chosen = recipes.from_text(recipe, self.engine, model)
                pairs = [(name, text) for name, text in ((first, first_values), (second, second_values)) if name]
                axes = [exploring.Axis.of(name, text or "") for name, text in pairs]
                how: Any = {"baseline": bool(baseline), "timed": bool(warm), "over": exploring.axis_of(over)}
                found = exploring.explore(self.engine, session, model, ask, chosen, axes, watch, **how)
        except Cancelled as stop:
            return *([gr.skip()] * 3), message(str(stop))
        gallery = gr.update(value=found.gallery(), columns=min(max(found.columns, 2), 6), visible=True)
        plot = gr.update(value=str(found.plot), visible=True)
        done = f"Done: {len(found.cells)} pictures beside plain. {_edit_note(session)}".strip()
        return gallery, plot, found.figures(), message(done, "good")

    # --- erase ---

    def erase(
        self,
        model: str,
        prompt: str,
        negative: str,
        seed: float,
        steps: float,
        guidance: float | None,
        width: float | None,
        height: float | None,
        concepts: str,
        keep: str,
        anchor: str,
        method: str,
        settings: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Update, ...]:
        """Before and after, figures, the edit's file, what is applied, a sentence."""
        try:
            with self._run("erase", request, progress) as (session, watch):
                ask = _ask(prompt, negative, seed, steps, guidance, width, height)
                wanted = erasing.Request.of(concepts, keep, anchor or "", method, settings)
                found = erasing.erase(self.engine, session, model, ask, wanted, watch)
        except Cancelled as stop:
            return *([gr.skip()] * 3), message(erasing.state(session)), message(str(stop))
        return (
            (str(found.before.path), str(found.after.path)),
            found.figures(),
            gr.update(value=str(found.file), interactive=True),
            message(erasing.state(session)),
            found.ended(),
        )

    # --- batch ---

    def check_batch(
        self,
        file: str | None,
        seed: float,
        steps: float,
        guidance: float | None,
        width: float | None,
        height: float | None,
        format: str,
        metadata: bool,
        model: str,
        request: gr.Request,
    ) -> str:
        """The uploaded list as it will be drawn, or all that is wrong with it."""
        session = self.session(request)
        if file is None:
            return ""
        try:
            options = _options("", seed, steps, guidance, width, height, format, metadata)
            with session.passing_folder() as folder:
                plan = batching.check(folder, file, options)
                return batching.preview(plan, self.engine.pipeline_class(model))
        except BatchError as error:
            return _problems(error)
        except DiffaccelError as error:
            return message(sentence(error), "bad")

    def batch(
        self,
        model: str,
        negative: str,
        seed: float,
        steps: float,
        guidance: float | None,
        width: float | None,
        height: float | None,
        recipe: str,
        file: str | None,
        format: str,
        metadata: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Update, ...]:
        """The last pictures, figures, the archive, a sentence."""
        try:
            with self._run("batch", request, progress, unit="pictures") as (session, watch):
                options = _options(negative, seed, steps, guidance, width, height, format, metadata)
                chosen = recipes.from_text(recipe, self.engine, model)
                found = batching.run(self.engine, session, model, file, chosen, options, watch)
        except Cancelled as stop:
            return *([gr.skip()] * 3), message(str(stop))
        report = found.report
        gallery = gr.update(value=found.gallery(), visible=True)
        archive = None if found.archive is None else str(found.archive)
        text = f"{report.done} of {report.total} pictures"
        ended = message(f"Cancelled: {text} are complete.") if found.cancelled else message(f"Done: {text}.", "good")
        return gallery, found.figures(), gr.update(value=archive, interactive=archive is not None), ended

    # --- the edit ---

    @staticmethod
    def hint(prompt: str, concepts: str, keep: str) -> str:
        """What should be looked at before an edit is computed."""
        return message(" ".join(erasing.hints(prompt, concepts, keep)))

    def edit_buttons(self, request: gr.Request) -> tuple[Update, Update]:
        """Apply and Undo answer where there is something to apply or undo."""
        session = self.session(request)
        return gr.update(interactive=erasing.can_apply(session)), gr.update(interactive=session.applied is not None)

    def apply(self, request: gr.Request) -> str:
        """Apply this visitor's edit."""
        with self._readable(self.session(request)):
            return message(erasing.apply(self.session(request)), "good")

    def undo(self, request: gr.Request) -> str:
        """Take this visitor's edit back."""
        with self._readable(self.session(request)):
            return message(erasing.undo(self.session(request)))


def _ask(prompt: str, negative: str, seed: Any, steps: Any, guidance: Any, width: Any, height: Any) -> Ask:
    return Ask.of(
        prompt=prompt or "",
        negative=negative or "",
        seed=0 if seed is None else seed,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
    )


def _options(
    negative: str, seed: Any, steps: Any, guidance: Any, width: Any, height: Any, kind: str, metadata: bool
) -> batching.Options:
    ask = _ask("any", negative, seed, steps, guidance, width, height)  # checks them
    return batching.Options(ask.seed, ask.steps, ask.guidance, ask.size, ask.negative, kind, bool(metadata))


def _problems(error: BatchError) -> str:
    """All problems of a list, or its one sentence."""
    if not error.problems:
        return message(sentence(error), "bad")
    count = len(error.problems)
    head = f"{count} {'problem' if count == 1 else 'problems'} in the list:"
    return message(head, "bad") + notes([_cut(str(problem)) for problem in error.problems[:50]])


def _cut(text: str) -> str:
    return text if len(text) <= 500 else f"{text[:497]}..."


def _edit_note(session: Session) -> str:
    return "Both pictures are drawn with this session's edit." if session.applied else ""


def refusal(text: str) -> gr.Error:
    """The notice of an error. Browsers show its text as HTML, and a sentence may repeat what stood in a file."""
    return gr.Error(escape(text, quote=False), duration=12, print_exception=False)


def sentence(error: Exception | str) -> str:
    """What a person reads; memory is the one failure of a library that has an own sentence."""
    if isinstance(error, (str, DiffaccelError)):
        text = " ".join(str(error).split())
        return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError) or should_reduce_batch_size(error):
        return "There was not enough memory for this picture; choose a smaller size."
    return f"Something went wrong on the server ({type(error).__name__}); its log says more."

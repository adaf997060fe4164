"""Forgetting concepts, for one visitor: the edit is a file of their session and acts inside their calls only."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.demo.comparing import likeness
from diffaccel.demo.engine import PLAIN, Ask, Drawn, Engine, PageError, Watch
from diffaccel.demo.markup import decibel, message, notes, table
from diffaccel.demo.sessions import Session
from diffaccel.edits.concepts import ErasureWarning, escaped, names_in, settle
from diffaccel.edits.effect import way
from diffaccel.erasure.settings import METHODS, settings_of
from diffaccel.erasure.solve import erase as solve
from diffaccel.erasure.solve import suited_method
from diffaccel.files.output import safe_name
from diffaccel.methods import Erase
from diffaccel.recipes.recipe import Recipe

MOST_NAMES = 64
AUTOMATIC = "automatic"  # what `diffaccel.erase` chooses if no method is named
ABOUT = {  # docs/erasure.md has the figures behind these sentences
    AUTOMATIC: "context: what `diffaccel.erase` does.",
    "context": "uce on every row of whole sentences. On the bundled models it erased and spared most, given sample prompts of "
    "their kind, which this page does not take. Without *Draw instead*, another thing of the concept's kind takes its place.",
    "uce": "Ridge regression on the last word of short phrases. Works without an anchor. A quarter of the "
    "pictures of shapes-sd still show the concept, more of shapes-sd3.",
    "rece": "uce, then erases what a closed-form attack would bring back. Attacks have to go a little further, and what is "
    "kept suffers more.",
    "speed": "Moves text only in directions that nothing preserved uses. With its own settings several concepts at once cost "
    "what is kept most of all; raise `ridge` until that survives.",
    "mace": "Only the words around a concept, the first of its paper's two stages. Alone it erases least; `tokens=all` takes "
    "the concept's own words too.",
}


@dataclass(frozen=True)
class Request:
    """What to erase.

    Attributes:
        method: None is the choice of `diffaccel.erase`.
        settings: of the method, by name; the method refuses what it does not know.
    """

    concepts: tuple[str, ...]
    keep: tuple[str, ...] = ()
    anchor: str | None = None
    method: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, concepts: str, keep: str, anchor: str, method: str, settings: str) -> Request:
        """From the texts of the page: names as `diffaccel.erase` separates them, settings as NAME=VALUE.

        Raises:
            PageError: nothing to erase, too many names, an unknown method, or a line that is no setting.
        """
        names, kept = _names(concepts), _names(keep)
        if not names:
            raise PageError("Name at least one concept to erase.")
        if len(names) + len(kept) > MOST_NAMES:
            raise PageError(f"That is {len(names) + len(kept)} names; the page takes {MOST_NAMES} at most.")
        if method not in (AUTOMATIC, *METHODS):
            raise PageError(f"There is no method {method!r}; choose one of {', '.join((AUTOMATIC, *METHODS))}.")
        chosen = None if method == AUTOMATIC else method
        return cls(names, kept, anchor.strip() or None, chosen, tuple(_setting(part) for part in _parts(settings)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names_in(text or "") if name))


def _parts(settings: str) -> list[str]:
    return [part.strip() for part in re.split(r"[;\n]", settings or "") if part.strip()]


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise PageError(f"{text!r} is no setting; write NAME=VALUE, for example ridge=0.5.")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()


@dataclass(frozen=True)
class Erased:
    """An edit, and a picture before and after it."""

    edit: Any
    file: Path
    before: Drawn
    after: Drawn
    warnings: tuple[str, ...]

    def figures(self) -> str:
        """What the edit does, in numbers."""
        sequence = {name: found for name, found in self.edit.diagnostics.items() if "strength" in found}
        rows = [
            (concept, route, _share(share), f"{found.get('kept_change_max', 0.0):.2%}", str(found["rank"]))
            for route, found in sequence.items()
            for concept, share in found["strength"].items()
        ]
        header = ("concept", "text", "moved to its anchor", "largest change of what is kept", "rank")
        close = likeness(self.after.image, self.before.image)
        caption = f"{self.edit.method}: the picture changed to {decibel(close.psnr)} PSNR"
        seen = [] if self.edit.effect is None else [str(self.edit.effect)]
        taken = self.edit.diagnostics.get("stand_ins", {}).items()
        chosen = [f"{target} becomes {anchor}; write something else under Draw instead." for target, anchor in taken]
        return table(header, rows, caption) + notes([*self.warnings, *chosen, *seen, *self.edit.leaks])

    def ended(self) -> str:
        """How it went, in one sentence."""
        if self.warnings:
            return message(f"Computed, but not as asked: {self.warnings[0]}", "bad")
        return message("Done: look at both pictures, then apply the edit or change it.", "good")


def _share(share: float) -> str:
    """Of the way; a number that is none of a way is said in words."""
    return f"{share:.0%}" if 0 <= share <= 2 else way(share)


def erase(engine: Engine, session: Session, model: str, ask: Ask, request: Request, watch: Watch) -> Erased:
    """Solve for the edit and draw the prompt before and after: stock model, and this edit alone.

    It becomes the session's edit, not yet applied; one that is applied stays so.

    Raises:
        DiffaccelError: the model, the settings or the request; or `Cancelled`.
    """
    watch.total = 2 * ask.steps
    watch.show(0, watch.total, "computing the edit")
    concepts, keep = settle(_escaped(request.concepts), _escaped(request.keep), request.anchor)
    chosen = settings_of(request.method or suited_method(concepts), dict(request.settings))
    with engine.pipeline(model) as pipe:
        watch.check()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ErasureWarning)
            edit = solve(pipe, concepts, keep=_escaped(keep), method=chosen)
        watch.check()
        folder = session.new_folder()
        name = f"no-{safe_name('-'.join(request.concepts))}-{edit.digest[:8]}.safetensors"
        edit.save(session.folder / name)
        watch.label = "before"
        before = engine.draw(PLAIN, ask, watch, folder / "before.png")
        watch.label = "after"
        recipe = Recipe(name="erase", methods=(Erase(file=name).located(session.folder),))
        after = engine.draw(recipe, ask, watch, folder / "after.png", str(session.folder))
    session.edit = edit, name
    return Erased(edit, session.folder / name, before, after, tuple(str(warning.message) for warning in caught))


def _escaped(names: Sequence[str]) -> list[str]:
    return [escaped(name) for name in names]


def apply(session: Session) -> str:
    """From now on the session's pictures are drawn with its edit, in place of one applied before. A sentence that says so.

    Raises:
        PageError: there is no edit, or it is applied already.
    """
    if session.edit is None:
        raise PageError("There is no edit yet: compute one first.")
    if not can_apply(session):
        raise PageError("This edit is applied already.")
    session.applied = session.edit
    return state(session)


def undo(session: Session) -> str:
    """The session's pictures are drawn by the stock model again.

    Raises:
        PageError: no edit is applied.
    """
    if session.applied is None:
        raise PageError("No edit is applied, so there is nothing to undo.")
    session.applied = None
    return state(session)


def can_apply(session: Session) -> bool:
    """Whether there is an edit that does not act yet."""
    return session.edit is not None and (session.applied is None or session.edit[1] != session.applied[1])


def state(session: Session) -> str:
    """What acts on this session's pictures, and what could."""
    if session.edit is None:
        return "No edit yet. The model is as it came."
    if session.applied is None:
        return f"Computed, not applied: an edit against {_targets(session.edit)}."
    acts = f"Applied: all tabs of this page draw with the edit against {_targets(session.applied)}. Other visitors see none of it."
    if not can_apply(session):
        return acts
    return f"{acts} The newer edit against {_targets(session.edit)} is not applied; applying it takes that one's place."


def _targets(edit: tuple[Any, str]) -> str:
    return ", ".join(concept.target for concept in edit[0].concepts)


def hints(prompt: str, concepts: str, keep: str) -> list[str]:
    """What a visitor may have overlooked, one sentence each."""
    names = _names(concepts)
    if not names:
        return []
    said, found = " or ".join(names), []
    if not any(name.casefold() in (prompt or "").casefold() for name in names):
        found.append(f"The prompt does not mention {said}, so before and after may look alike.")
    if not _names(keep):
        found.append(f"Nothing is named under Keep: what is like {said} may change with it.")
    return found

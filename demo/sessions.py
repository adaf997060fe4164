"""What belongs to one visitor: a folder of their own, their edit, and the handle that cancels their run."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffaccel.methods import Erase
from diffaccel.recipes.recipe import Recipe

KEPT_RUNS = 12  # folders of finished actions that a session keeps
MOST_SESSIONS = 200  # pages that say goodbye are closed at once; clients that never do are closed when more come


@dataclass
class Session:
    """One open page.

    Attributes:
        folder: holds all its files; nobody else's.
        edit: the last edit computed on the Erase tab, as (edit, file name inside `folder`).
        applied: the edit that acts on the pictures of this session; looking at another one does not take it away.
        problem: the sentence of the last error, for the page.
        complaints: tabs whose status is about something wrong, with the inputs that were wrong.
        filled: the preset that the page's switches were last set to.
    """

    folder: Path
    edit: tuple[Any, str] | None = None
    applied: tuple[Any, str] | None = None
    problem: str = ""
    complaints: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    filled: Recipe | None = None
    _events: dict[str, threading.Event] = field(default_factory=dict)
    _runs: int = 0
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def new_folder(self) -> Path:
        """An empty folder for the files of one action; the oldest ones go."""
        with self._guard:
            self._runs += 1
            number = self._runs
        old = self.folder / f"{number - KEPT_RUNS:05d}"
        if old.is_dir():
            shutil.rmtree(old)
        made = self.folder / f"{number:05d}"
        made.mkdir()
        return made

    @contextmanager
    def passing_folder(self) -> Iterator[Path]:
        """A folder that goes with the block; looking at lists must not push out the results of runs."""
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def with_edit(self, recipe: Recipe) -> Recipe:
        """The recipe with this session's applied edit in it; the model itself is never changed."""
        if self.applied is None:
            return recipe
        erase = Erase(file=self.applied[1]).located(self.folder)
        return Recipe(name=recipe.name, note=recipe.note, methods=(*recipe.methods, erase))

    def prepare(self, tab: str) -> None:
        """A run of this tab was asked for and may be waiting in the queue: from now on it can be cancelled."""
        with self._guard:
            self._events[tab] = threading.Event()

    @contextmanager
    def running(self, tab: str) -> Iterator[threading.Event]:
        """The event that cancels the run inside the block."""
        with self._guard:
            event = self._events.setdefault(tab, threading.Event())
        try:
            yield event
        finally:
            with self._guard:
                if self._events.get(tab) is event:
                    del self._events[tab]

    @property
    def busy(self) -> bool:
        """Whether something runs or waits."""
        return bool(self._events)

    def cancel(self, tab: str | None = None) -> bool:
        """Stop the run of a tab, or all; False if there is none."""
        with self._guard:
            events = [event for name, event in self._events.items() if tab in (None, name)]
        for event in events:
            event.set()
        return bool(events)


class Sessions:
    """All open pages, by the key that the server gave each.

    Args:
        root: the folder that holds all of theirs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, Session] = {}
        self._guard = threading.Lock()

    def of(self, key: str) -> Session:
        """The session of a key, made if it is new. A key never becomes part of a path: its hash does."""
        self._make_room()
        with self._guard:
            if key not in self._open:
                folder = self.root / hashlib.sha256(key.encode()).hexdigest()[:24]
                folder.mkdir(parents=True, exist_ok=True)
                self._open[key] = Session(folder)
            self._open[key] = session = self._open.pop(key)  # the last one used is the last one closed
            return session

    def _make_room(self) -> None:
        with self._guard:
            idle = [key for key, session in self._open.items() if not session.busy]
            surplus = idle[: max(0, len(self._open) - MOST_SESSIONS)]
        for key in surplus:
            self.close(key)

    def close(self, key: str) -> None:
        """The page was left: what it runs stops, and its files go."""
        with self._guard:
            session = self._open.pop(key, None)
        if session is not None:
            session.cancel()
            shutil.rmtree(session.folder, ignore_errors=True)

"""The shared work list: who does what, decided by files alone. No collectives, no clocks compared.

A claim is the file `claims/<work>/<unit>.<attempt>` and holds its owner's name. Creating a file that must not exist is
atomic on local and network file systems, so each attempt has one owner; the highest attempt counts. Taking over means to
create the next attempt.

A worker shows that it lives by a counter in `workers/<name>`, written every few seconds. Another worker believes it dead
when its file is gone, when the counter has stood still for the lease *on the observer's own clock*, or at once when both
ran on the same machine and its process is no more. Nothing breaks if a worker was only slow: it makes the same picture
again, under the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

BEATS_PER_LEASE = 6


def this_machine() -> str:
    """Names the machine, this boot of it and the process table seen from here; "" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's count; "" if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


class Member:
    """This process as a worker of a folder: its name, its sign of life, its view of the others."""

    def __init__(self, folder: Path, lease: float, work: str = "") -> None:
        self.name = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder, self.lease, self.work = folder, lease, work
        self.card = {"machine": this_machine(), "pid": os.getpid(), "start": process_start(os.getpid()), "work": work}
        self._beat = 0
        self._stop = threading.Event()
        self._seen: dict[str, tuple[str | None, float]] = {}
        self._met: set[str] = {self.name}
        self._beating: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="diffaccel-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            (self.folder / self.name).unlink()
        self.tidy()

    def _run(self) -> None:
        while not self._stop.wait(self.lease / BEATS_PER_LEASE):
            with contextlib.suppress(
                OSError
            ):  # a full disk stops the pictures, which say so; a missed beat is no error
                self._write()

    def _write(self) -> None:
        """Exchange the file as a whole: on network file systems others see closed files only."""
        self._beat += 1
        temporary = self.folder / f".{self.name}.tmp"
        temporary.write_text(json.dumps({**self.card, "beat": self._beat}))
        os.replace(temporary, self.folder / self.name)

    def tidy(self) -> None:
        """Remove the cards of dead workers; who has none is dead as well."""
        for path in self.folder.iterdir():
            name = path.name.removeprefix(".").removesuffix(".tmp")
            if name != self.name and not self.is_alive(name):
                with contextlib.suppress(OSError):  # another worker tidies as well
                    path.unlink()

    def others(self) -> list[str]:
        """Names of the other workers of the folder that may be alive."""
        names = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        return [name for name in names if name != self.name and self.is_alive(name)]

    def strangers(self) -> list[str]:
        """Those of them that work on something else, or on the same cut into other pieces."""
        return [name for name in self.others() if self._card_of(name).get("work") != self.work]

    def is_surely_alive(self, name: str) -> bool:
        """Whether its process runs on this machine, or its counter was seen moving. Until then it may be a dead one's card."""
        card = self._card_of(name)
        machine, start = card.get("machine"), card.get("start")
        here = bool(machine and start) and machine == self.card["machine"]
        return name in self._beating or (here and process_start(int(card.get("pid", 0))) == start)

    def _card_of(self, name: str) -> dict[str, Any]:
        try:
            card = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return {}
        return card if isinstance(card, dict) else {}

    def met(self, name: str) -> bool:
        """Whether this worker was alive at some time since we started: its failures belong to this run."""
        return name in self._met or self.is_alive(name)

    def is_alive(self, name: str) -> bool:
        """Whether a worker may still be at work."""
        if name == self.name:
            return True
        try:
            text = (self.folder / name).read_text()
        except OSError:
            return False
        if self._is_gone(text) or not self.moved(name, text):
            return False
        self._met.add(name)
        return True

    def _is_gone(self, text: str) -> bool:
        """Whether its process certainly is no more; only possible to tell on the same machine."""
        try:
            card: dict[str, Any] = json.loads(text)
            pid, machine, start = int(card["pid"]), str(card["machine"]), str(card["start"])
        except (ValueError, KeyError, TypeError):
            return False
        return bool(machine and start) and machine == self.card["machine"] and process_start(pid) != start

    def moved(self, name: str, text: str) -> bool:
        """Whether something changed within the lease; it has to be asked for repeatedly."""
        now = time.monotonic()
        last, since = self._seen.get(name, (None, now))
        if text != last:
            self._seen[name] = (text, now)
            if last is not None:
                self._beating.add(name)
            return True
        return now - since < self.lease


class Claims:
    """Claims on the units of one division of the work."""

    def __init__(self, folder: Path, member: Member) -> None:
        self.folder, self.member = folder, member
        folder.mkdir(parents=True, exist_ok=True)

    def attempts(self) -> dict[str, int]:
        """The highest attempt of every unit that was ever claimed."""
        found: dict[str, int] = {}
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:  # all is done, and another worker has tidied up
            return found
        for name in names:
            unit, _, attempt = name.rpartition(".")
            if unit and not unit.startswith(".") and attempt.isdecimal():
                found[unit] = max(found.get(unit, -1), int(attempt))
        return found

    def owner(self, unit: str, attempt: int) -> str:
        """Who made this attempt; "" if the file is being written, or its writer died in between."""
        try:
            return (self.folder / f"{unit}.{attempt}").read_text()
        except OSError:
            return ""

    def try_claim(self, unit: str, attempt: int) -> bool:
        """Make an attempt ours; False if someone else has it.

        Raises:
            FileNotFoundError: there are no claims any more: all is done and another worker has tidied up, or somebody
                moved or removed the folder.
        """
        path = self.folder / f"{unit}.{attempt}"
        temporary = self.folder / f".{self.member.name}"
        try:
            if not temporary.exists():
                temporary.write_text(self.member.name)
            os.link(temporary, path)  # appears with its content, all at once
            return True
        except FileExistsError:
            return (
                self.owner(unit, attempt) == self.member.name
            )  # on NFS a successful link can be reported as a failed one
        except FileNotFoundError:
            raise
        except OSError:  # no hard links here, or too many of them
            return self._create(path)

    def _create(self, path: Path) -> bool:
        try:
            with path.open("x") as file:
                file.write(self.member.name)
            return True
        except FileExistsError:
            return False

    def is_mine(self, unit: str, attempt: int) -> bool:
        """Whether nobody took over since, and the claims were not tidied up because others finished everything."""
        return self.owner(unit, attempt) == self.member.name and not (self.folder / f"{unit}.{attempt + 1}").exists()

    def is_free(self, unit: str, attempt: int) -> bool:
        """Whether the owner of the newest attempt is believed dead, so that the next attempt may be made."""
        owner = self.owner(unit, attempt)
        if not owner:
            return not self.member.moved(f"{unit}.{attempt}", "")  # judged like a worker that never beats
        return not self.member.is_alive(owner)

    def remove(self) -> None:
        """Tidy up after the last unit is done; left to the last worker, since the others may still be looking."""
        if self.member.others():
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # in the way of nobody if it stays

"""A process that has loaded everything and forks workers at once, so that a hundred can be killed in a minute.

Run as a program it reads one JSON command a line and answers with one JSON line:
    {"do": "start", "rows": [...], "output": "...", "settings": {...}, "kill_at_call": n, "kill_at_second": t, "pause": seconds}
        -> {"pid": ...}     killed at its t-th second of computing, whatever else the machine does
    {"do": "kill", "pid": ..., "after": seconds} -> {"status": ..., "seconds": ...}     wait status, killed or ended before
    {"do": "wait", "pid": ...} -> {"status": ..., "seconds": ...}     seconds it computed
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# What a worker asks of the disk: a kill before any of these must be harmless.
DISK_CALLS = ("replace", "link", "fsync", "unlink")


# Two sizes, so that batches are not simply the list cut into pieces.
ROWS = [{"prompt": f"a red square {number}", "width": 16, "height": 24 - 8 * (number % 2)} for number in range(8)]
SETTINGS = {"steps": 1, "batch_size": 2, "guidance_scale": 1.0, "lease": 2.0}


def fast_pipe() -> Any:
    """A Stable Diffusion pipeline that needs a few milliseconds a picture."""
    from tiny_text import tiny_text_pipeline

    pipe = tiny_text_pipeline("sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _kill_at(number: int) -> None:
    """Make this process die just before its n-th request to the disk."""
    counter = itertools.count(1)
    for name in DISK_CALLS:
        setattr(os, name, functools.partial(_counted, getattr(os, name), counter, number))


def _counted(original: Any, counter: Any, last: int, *args: Any, **kwargs: Any) -> Any:
    if next(counter) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)


def _work(pipe: Any, command: dict[str, Any]) -> int:
    from diffaccel.batch import BatchSettings, plan_batch, run_batch
    from diffaccel.batch.calls import Caller

    if "kill_at_call" in command:
        _kill_at(command["kill_at_call"])
    if "kill_at_second" in command:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process as SIGKILL does
        signal.setitimer(signal.ITIMER_PROF, command["kill_at_second"])
    if "pause" in command:
        call = Caller.call

        def slow(self: Any, rows: Any) -> Any:
            time.sleep(command["pause"])
            return call(self, rows)

        Caller.call = slow  # type: ignore[method-assign]
    plan = plan_batch(command["rows"], command["output"], BatchSettings(**command["settings"]))
    return run_batch(plan, pipe).exit_code


def _start(pipe: Any, command: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = _work(pipe, command)
    except BaseException:  # noqa: BLE001  (a forked child must not return into its parent's program)
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    import torch
    from tqdm import tqdm

    import diffaccel

    # A progress bar's lock is a semaphore shared by forked processes: a child killed while it holds it would stop all others.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    pipe = diffaccel.wrap(fast_pipe(), "off")
    with tempfile.TemporaryDirectory() as folder:  # imports everything that a worker will need
        _work(pipe, {"rows": ROWS, "output": folder, "settings": {**SETTINGS, "shards": 2, "contact_sheet": True}})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "start":
            answer = {"pid": _start(pipe, command)}
        else:
            if command["do"] == "kill":
                time.sleep(command["after"])
                os.kill(command["pid"], signal.SIGKILL)
            _, status, used = os.wait4(command["pid"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}
        print(json.dumps(answer), flush=True)


class Forge:
    """The other end: starts the process and talks to it."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, rows: Any, output: Path, settings: Any, **more: Any) -> int:
        return int(self.ask(do="start", rows=rows, output=str(output), settings=settings, **more)["pid"])

    def wait(self, pid: int) -> int:
        return int(self.ask(do="wait", pid=pid)["status"])

    def seconds(self, pid: int) -> float:
        """How long it computed until its good end."""
        answer = self.ask(do="wait", pid=pid)
        assert answer["status"] == 0
        return float(answer["seconds"])

    def kill(self, pid: int, after: float) -> int:
        """Status -9 if the kill met it alive."""
        return int(self.ask(do="kill", pid=pid, after=after)["status"])

    def run(self, rows: Any, output: Path, settings: Any, **more: Any) -> int:
        return self.wait(self.start(rows, output, settings, **more))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.communicate()


if __name__ == "__main__":
    main()

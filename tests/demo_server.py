"""What the tests of the page share: its server as a process of its own, and a browser that forgives no error."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTING = 240  # seconds; importing torch, diffusers and gradio on a busy machine
WORKING = 240_000  # milliseconds
VARIABLE = "DIFFACCEL_CHROMIUM"


def find_chromium() -> str | None:
    """The browser for the tests: named by the environment, or found on the path."""
    given = os.environ.get(VARIABLE)
    names = [given] if given else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    return next((path for name in names if (path := shutil.which(name))), None)


@contextlib.contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """The page on a free port of this machine; the address. Its log goes to `folder`/server.log."""
    port = _free_port()
    log, temporary = folder / "server.log", folder / "temporary"
    temporary.mkdir()
    code = "from diffaccel.cli.app import main; main()"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "demo", "--port", str(port), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), **environment},
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/", log)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert not list(temporary.glob("diffaccel-page-*")), "the visitors' files are still there"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"the page did not start:\n{log.read_text(errors='replace')}")


class Visitor:
    """One person with a browser window.

    Attributes:
        page: the Playwright page.
        errors: what the browser's console and scripts complained about.
        hosts: all machines that the page asked for something.
    """

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._listen)
        self.page.on("request", lambda request: self.hosts.add(request.url.partition("//")[2].partition("/")[0]))
        self.page.goto(url)
        self.wait("recipe-message", "skip_cache")

    def _listen(self, entry: Any) -> None:
        if entry.type == "error":
            self.errors.append(entry.text)

    def wait(self, component: str, text: str) -> None:
        """Until a part of the page says so."""
        from playwright.sync_api import expect

        expect(self.page.locator(f"#{component}")).to_contain_text(text, timeout=WORKING)

    def wait_silence(self, component: str) -> None:
        """Until a part of the page has no sentence to say."""
        from playwright.sync_api import expect

        expect(self.page.locator(f"#{component} .da-message")).to_have_count(0, timeout=WORKING)

    def wait_for_pictures(self, component: str, count: int) -> None:
        """Until a gallery shows so many; they arrive after the sentence that says done."""
        from playwright.sync_api import expect

        expect(self.page.locator(f"#{component} img")).to_have_count(count, timeout=WORKING)

    def text(self, component: str) -> str:
        """What a part of the page says."""
        return str(self.page.locator(f"#{component}").inner_text())

    def type(self, component: str, text: str) -> None:
        """Fill in a text or a number."""
        self.page.locator(f"#{component} :is(textarea, input)").first.fill(text)

    def choose(self, component: str, option: str) -> None:
        """Pick from a drop-down."""
        self.page.locator(f"#{component} input").first.click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def switch(self, label: str, *, on: bool = True) -> None:
        """Set a check box. The page's answer to an earlier change may arrive meanwhile and set all of them once more."""
        from playwright.sync_api import Error

        box = self.page.get_by_label(label)
        for _ in range(3):
            try:
                return box.set_checked(on, timeout=WORKING)
            except Error:
                self.page.wait_for_timeout(1000)
        return box.set_checked(on, timeout=WORKING)

    def press(self, component: str) -> None:
        """Press a button."""
        self.page.locator(f"#{component}").click()

    def tab(self, name: str) -> None:
        """Open a tab."""
        self.page.get_by_role("tab", name=name).click()

    def open(self, panel: str) -> None:
        """Open an accordion."""
        self.page.get_by_role("button", name=panel).click()

    def run(self, tab: str, text: str = "Done") -> None:
        """Press a tab's main button and wait for its new sentence."""
        from playwright.sync_api import expect

        old = f"document.querySelector('#{tab}-status .da-message')?.setAttribute('data-old', '')"
        self.page.evaluate(old)
        self.press(f"{tab}-run")
        new = self.page.locator(f"#{tab}-status .da-message:not([data-old])")
        expect(new).to_contain_text(text, timeout=WORKING)
        expect(self.page.locator(f"#{tab}-run")).to_be_enabled(timeout=WORKING)

    def download(self, component: str, folder: Path) -> Path:
        """Save what a button offers."""
        with self.page.expect_download() as offered:
            self.press(component)
        path = folder / offered.value.suggested_filename
        offered.value.save_as(path)
        return path

    def upload(self, component: str, path: Path) -> None:
        """Choose a file."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(f"#{component}:is(button), #{component} button").first.click()
        chooser.value.set_files(path)

    def leave(self) -> None:
        """Close the window; nothing may have gone wrong in it, and nothing may have been asked of other machines."""
        self.context.close()
        assert self.errors == []
        assert all(host.partition(":")[0] in ("127.0.0.1", "") for host in self.hosts), self.hosts

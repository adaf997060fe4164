"""Serving the page: to this machine only by default, without telemetry, with no file access outside its own folder."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported, whatever the environment says

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffaccel.demo.actions import Actions
from diffaccel.demo.engine import Engine
from diffaccel.demo.layout import build
from diffaccel.demo.sessions import Sessions
from diffaccel.demo.style import CSS, HEAD, theme
from diffaccel.errors import DiffaccelError

MOST_UPLOADED = "8mb"
# What a browser may load for the page: its own things. Gradio's templates need the two unsafe sources.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


def serve(
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed: Sequence[Path] = (),
    auth: tuple[str, str] | None = None,
    open_browser: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Serve until interrupted. All files of all visitors lie in one temporary folder, which goes at the end.

    Args:
        allowed: folders whose diffusers models visitors may load.
        auth: user and password, or None for an open page.
    Raises:
        DiffaccelError: the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="diffaccel-page-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "served"))
        page = make_page(Engine(allowed, device, dtype), Path(folder, "sessions"))
        try:
            launch(page, host, port, auth, open_browser=open_browser)
        finally:
            page.close(verbose=False)


def make_page(engine: Engine, folder: Path) -> gr.Blocks:
    """The page around a model, with its visitors' files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return build(Actions(engine, Sessions(folder)))


def launch(
    page: gr.Blocks, host: str, port: int | None, auth: tuple[str, str] | None, *, open_browser: bool = False
) -> None:
    """Start the server, say where it is, and wait for Ctrl+C or SIGTERM. Raises `DiffaccelError` if the port is taken."""
    try:
        page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            inbrowser=open_browser,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=MOST_UPLOADED,
            allowed_paths=[],
            app_kwargs={"middleware": [Middleware(_OwnThingsOnly)]},
            theme=theme(),
            css=CSS,
            head=HEAD,
            footer_links=["api", "settings"],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise DiffaccelError(f"the page cannot be served on {host}, port {port or 'any'}: {error}") from error
    print(f"The page is at {page.local_url} (Ctrl+C ends it).", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder of the visitors goes then, too
    page.block_thread()


class _OwnThingsOnly:
    """Every answer tells the browser to fetch nothing from other machines, whatever text came to stand in the page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)

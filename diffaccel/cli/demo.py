"""`diffaccel demo`: the page, served to this machine only unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffaccel.cli.support import Debug, Placement, Precision, quiet_libraries
from diffaccel.errors import DiffaccelError

AUTH_VARIABLE = "DIFFACCEL_DEMO_AUTH"


def demo(
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reachable from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; default: the first free one from 7860.")
    ] = None,
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            "--allow",
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder whose diffusers models the page may load; repeatable.",
        ),
    ] = None,
    auth: Annotated[
        str | None,
        typer.Option(
            envvar=AUTH_VARIABLE,
            show_envvar=True,
            metavar="USER:PASSWORD|@FILE",
            help="Ask for a password. Other users of this machine can read a command line: prefer @FILE or the variable.",
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    device: Placement = None,
    dtype: Precision = None,
    debug: Debug = False,
) -> None:
    """Serve the page: compare, explore, erase and batch in a browser."""
    login = None if auth is None else credentials(auth)
    quiet_libraries()
    try:
        from diffaccel.demo.app import serve
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise DiffaccelError("the page needs gradio; install it with: pip install 'diffaccel[demo,metrics]'") from error
    serve(host=host, port=port, allowed=allow or [], auth=login, open_browser=open_browser, device=device, dtype=dtype)


def credentials(text: str) -> tuple[str, str]:
    """User and password from "user:password", or from the first line of "@file".

    Raises:
        typer.BadParameter: neither; the message never repeats what was given.
    """
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError):
            raise typer.BadParameter("--auth names a file that cannot be read.") from None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise typer.BadParameter("--auth must be USER:PASSWORD, or @FILE with such a line.")
    return user, password

"""What the commands share: errors as one sentence, option types, consoles."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from diffaccel.errors import DiffaccelError
from diffaccel.loading import DTYPES, SCHEDULERS
from diffaccel.version import __version__


class Equal(StrEnum):
    """What "fewer steps" is made equal to."""

    time = "time"
    evaluations = "evaluations"
    flops = "flops"


_CAUGHT = (
    DiffaccelError,
    *(
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ),
)


class OneSentence(typer.core.TyperGroup):
    """Turns exceptions of all commands into one sentence and exit code 1, unless --debug asks for the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _CAUGHT as error:
            gone = isinstance(error, BrokenPipeError)  # nobody reads what we say; typer ends without a word
            if gone or ctx.meta.get("debug") or isinstance(error, (typer.Exit, typer.Abort)):
                raise
            Console(stderr=True, soft_wrap=True).print(f"[red]Error:[/red] {escape(_sentence(error))}", highlight=False)
            raise typer.Exit(1) from error


def _sentence(error: Exception) -> str:
    if isinstance(error, DiffaccelError):
        text = " ".join(str(error).split())
        return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text
    lines = str(error).strip().splitlines() or ["no message"]
    return f"unexpected {type(error).__name__}: {lines[0]} (--debug shows where)"


def _set_debug(ctx: typer.Context, value: bool) -> None:
    ctx.meta["debug"] = value or ctx.meta.get("debug", False)


def print_version(value: bool) -> None:
    """Callback of --version."""
    if value:
        typer.echo(f"diffaccel {__version__}")
        raise typer.Exit


def _check_finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 512x768.")
    return int(match[1]), int(match[2])


PRESETS = ("off", "fewer-steps", "balanced", "fast", "fastest")  # without importing what builds them
RECIPE_HELP = f"Preset ({', '.join(PRESETS)}) or recipe file"

Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several make several pictures.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Bundled model, folder in diffusers' format, or hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if missing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist already.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[
    float | None, typer.Option(callback=_check_finite, help="Guidance scale; default: the pipeline's own.")
]
Negative = Annotated[str, typer.Option(help="What not to draw.")]
Size = Annotated[Any, typer.Option(parser=_parse_size, metavar="WxH", help="Picture size; default: the model's own.")]
Seed = Annotated[int, typer.Option(min=0, max=2**53, help="Seed of the first picture; picture i gets seed + i.")]
Scheduler = Annotated[str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}; default: the model's own.")]
Placement = Annotated[str | None, typer.Option(help="Torch device; default: a GPU if there is one.")]
Variant = Annotated[str | None, typer.Option(help="Which weights, where a model has several, such as fp16.")]
Precision = Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default: float16 on a GPU.")]


def quiet_libraries() -> None:
    """Keep stderr for our own sentences and the bar that counts steps, not for the bars and hints of loading."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Our own warnings are notes of the report, which is printed at the end.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"diffaccel\.")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr that shows what is being measured."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("warming up", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=escape(name))


def console(file: TextIO | None = None) -> Console:
    """A console that does not break tables when the output is a pipe or a file."""
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else 160)


def show(table: Table, out: Console | None = None) -> None:
    """Print a table, or where a line is too short for its words, its cells one below the other: nothing is cut."""
    out = out or console()
    if Measurement.get(out, out.options.update(width=10_000), table).minimum <= out.width:
        for column in table.columns:
            column.overflow = "fold"
        out.print(table)
        return
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, cells, strict=True):
            if cell:
                out.print(f"[bold]{column.header}[/bold]: {cell}", soft_wrap=True, highlight=False)
        out.print()

"""Reading lists of rows: CSV, JSONL, Parquet, plain text, or dictionaries. Only syntax here; meaning is in `fields.py`."""

from __future__ import annotations

import collections
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.batch.settings import BatchError, RowProblem
from diffaccel.files.text import read_text

RawRow = Mapping[str, Any]


class TooLarge(BatchError):
    """A list beyond its limits."""


@dataclass(frozen=True)
class Limits:
    """How large a list may be; None is no limit. Looked at before and while a file is read, never afterwards.

    Attributes:
        bytes: of the file, and of what a compressed one unpacks to.
    """

    rows: int | None = None
    bytes: int | None = None

    def take(self, path: Path, rows: Iterable[Any]) -> list[Any]:
        """The rows, read no further than one too many. Raises `TooLarge` then."""
        found = list(itertools.islice(rows, None if self.rows is None else self.rows + 1))
        self.allow_rows(path, len(found))
        return found

    def allow_rows(self, path: Path, count: int) -> None:
        """Raise `TooLarge` if there are too many."""
        if self.rows is not None and count > self.rows:
            raise TooLarge(f"{path} has more than {self.rows} rows.")

    def allow_bytes(self, path: Path, count: int) -> None:
        """Raise `TooLarge` if there are too many."""
        if self.bytes is not None and count > self.bytes:
            raise TooLarge(f"{path} holds more than {self.bytes} bytes.")


def read_rows(
    source: Path | str | Sequence[RawRow], limits: Limits | None = None
) -> tuple[list[RawRow], list[RowProblem]]:
    """The rows of a list with its problems of syntax; a row with such a problem is an empty dictionary.

    Empty lines and empty rows at the end of a spreadsheet do not count as rows.

    Raises:
        BatchError: no such file, an unknown kind of file, one beyond the limits, or one that cannot be read at all.
    """
    if not isinstance(source, (str, Path)):
        return _from_mappings(source)
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BatchError(f"{path} is no list that is known here; known are {', '.join(_READERS)}.")
    try:
        limits = limits or Limits()
        limits.allow_bytes(path, path.stat().st_size)
        rows, problems = reader(path, limits)
    except OSError as error:
        raise BatchError(f"Cannot read {path}: {(error.strerror or str(error)).lower()}.") from error
    except UnicodeDecodeError as error:
        raise BatchError(f"{path} is not a text file in UTF-8: {error.reason}.") from error
    if not rows:
        raise BatchError(f"{path} holds no rows.")
    return rows, problems


def _from_mappings(source: Sequence[RawRow]) -> tuple[list[RawRow], list[RowProblem]]:
    rows: list[RawRow] = []
    problems = []
    for number, row in enumerate(source, 1):
        named = isinstance(row, Mapping) and all(isinstance(key, str) for key in row)
        if not named:
            problems.append(RowProblem(number, "a row is a dictionary with names as keys."))
        rows.append(dict(row) if named else {})
    if not rows:
        raise BatchError("the list holds no rows.")
    return rows, problems


def _read_csv(path: Path, limits: Limits) -> tuple[list[RawRow], list[RowProblem]]:
    with io.StringIO(read_text(path), newline="") as file:
        lines = csv.reader(file, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            filled = (line for line in lines if any(cell.strip() for cell in line))
            header = _without_empty_end([name.strip() for name in next(filled, [])])
            _check_header(path, header)
            cells = limits.take(path, filled)
        except csv.Error as error:
            raise BatchError(f"{path}, line {lines.line_num}: {error}.") from error
    rows: list[RawRow] = []
    problems = []
    for number, given in enumerate(cells, 1):
        line = given[: len(header)] + _without_empty_end(given[len(header) :])
        if len(line) != len(header):
            problems.append(RowProblem(number, f"it has {len(line)} cells, the header has {len(header)}."))
            rows.append({})
        else:
            rows.append(dict(zip(header, line, strict=True)))
    return rows, problems


def _without_empty_end(cells: list[str]) -> list[str]:
    """Without the empty columns that spreadsheets write behind the last one."""
    used = [place for place, cell in enumerate(cells, 1) if cell.strip()]
    return cells[: max(used, default=0)]


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted(name for name, count in collections.Counter(header).items() if count > 1)
    if twice:
        raise BatchError(f"{path} has the column {twice[0]!r} twice.")
    if "" in header:
        raise BatchError(f"{path} has a column without a name.")


def _read_jsonl(path: Path, limits: Limits) -> tuple[list[RawRow], list[RowProblem]]:
    rows: list[RawRow] = []
    problems = []
    for line in limits.take(path, _lines(path)):
        row: Any = {}
        try:
            row = _object(json.loads(line, object_pairs_hook=_unique))
        except (ValueError, RecursionError) as error:
            row = {}
            problems.append(RowProblem(len(rows) + 1, f"{error}.".replace("..", ".")))
        rows.append(row)
    return rows, problems


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError(f"it is not a JSON object but {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names one key twice")
    return found


def _read_parquet(path: Path, limits: Limits) -> tuple[list[RawRow], list[RowProblem]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BatchError("Parquet needs pyarrow; install diffaccel[batch].") from error
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            limits.allow_rows(path, table.metadata.num_rows)
            return limits.take(path, _unpacked(path, table, limits)), []
    except pyarrow.ArrowException as error:
        raise BatchError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}.") from error


def _unpacked(path: Path, table: Any, limits: Limits) -> Iterator[RawRow]:
    """The rows of a Parquet file. A few rows at a time, since one long text may stand for any number of them."""
    groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
    limits.allow_bytes(path, sum(group.total_byte_size for group in groups))
    size = 0
    for part in table.iter_batches(batch_size=1024 if limits.bytes is None else 8):
        size += part.nbytes
        limits.allow_bytes(path, size)
        yield from part.to_pylist()


def _read_text(path: Path, limits: Limits) -> tuple[list[RawRow], list[RowProblem]]:
    return [{"prompt": line.strip()} for line in limits.take(path, _lines(path))], []


def _lines(path: Path) -> Iterator[str]:
    """Lines that are not empty; only a line feed ends one."""
    return (line for line in read_text(path).split("\n") if line.strip())


_READERS: dict[str, Callable[[Path, Limits], tuple[list[RawRow], list[RowProblem]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}

"""The list of all pictures: one entry per row, in the order of the list, as JSONL or Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffaccel.batch.settings import BatchError

_HIDDEN = ("key",)
# Parquet columns have one type each: what varies in shape is stored as JSON text.
_AS_JSON = ("recipe", "arguments")


def encode_manifest(records: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """The manifest's content."""
    entries = [{name: value for name, value in record.items() if name not in _HIDDEN} for record in records]
    if kind == "jsonl":
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode("utf-8", "replace")
    return _parquet(entries)


def check_manifest(kind: str) -> None:
    """Raise `BatchError` if this kind cannot be written here; said before the first picture."""
    if kind == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise BatchError("A Parquet manifest needs pyarrow; install diffaccel[batch].") from error


def _parquet(entries: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for entry in entries for name in entry))
    columns = {name: [_cell(name, entry.get(name)) for entry in entries] for name in names}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _cell(name: str, value: Any) -> Any:
    return json.dumps(value) if name in _AS_JSON and value is not None else value


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The entries of a manifest; recipes and arguments as dictionaries in both formats."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    import pyarrow.parquet

    with path.open("rb") as file:
        entries: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    return [
        {name: json.loads(value) if name in _AS_JSON and value is not None else value for name, value in entry.items()}
        for entry in entries
    ]

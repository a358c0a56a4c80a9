"""Answers as they come: a table, CSV, JSON, NDJSON or Parquet."""

import contextlib
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol

import msgspec

from asyncinfer.cli.predict.readers import arrow
from asyncinfer.errors import FileRefused
from asyncinfer.tensors.missing_values import in_words
from asyncinfer.untrusted.printable import printable, printable_json

FORMS: Final = ("table", "csv", "json", "ndjson", "parquet")
_FORM_BY_SUFFIX: Final = {
    ".csv": "csv",
    ".json": "json",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_MAX_COLUMNS: Final = 64
"""So many elements of one output become columns of their own; more are JSON in one cell."""

_TABLE_ROWS: Final = 1000
_ROW_GROUP: Final = 10_000

Record = dict[str, Any]
"""The number of a row, and its outputs by name, or an `error`; NaN and infinities are floats."""


class Writer(Protocol):
    def write(self, record: Record) -> None: ...

    def finish(self) -> None: ...


def form_of(path: str | None, asked: str | None) -> str:
    """As asked, else by the file's name; a table on a terminal, NDJSON in a pipe."""
    if asked:
        return asked
    if path is None:
        return "table" if sys.stdout.isatty() else "ndjson"
    suffix = Path(path).suffix.lower()
    if suffix in _FORM_BY_SUFFIX:
        return _FORM_BY_SUFFIX[suffix]
    raise FileRefused(
        f"{path}: its name does not tell what to write. Say so with --to: {', '.join(FORMS[1:])}."
    )


@contextlib.contextmanager
def writer(path: str | None, form: str) -> Iterator[Writer]:
    """A file appears under its name once it is whole; until then it is beside it, as .part."""
    if path is None:
        if form == "parquet" and sys.stdout.isatty():
            raise FileRefused("Parquet is not for a terminal: add --output results.parquet.")
        made = _WRITERS[form](_stdout(form))
        yield made
        made.finish()
        sys.stdout.buffer.flush()
        return
    part = f"{path}.part"
    try:
        content = open(part, "wb")  # noqa: SIM115
    except OSError as error:
        raise FileRefused(f"{path} cannot be written: {error.strerror}.") from error
    with content:
        made = _WRITERS[form](content)
        yield made
        made.finish()
    os.replace(part, path)


def _stdout(form: str) -> Any:
    if not sys.stdout.isatty():
        return sys.stdout.buffer
    return _Terminal(sys.stdout.buffer, printable if form == "csv" else printable_json)


class _Terminal:
    """Takes whole records as UTF-8, and writes them so that the terminal obeys none of it."""

    def __init__(self, terminal: IO[bytes], escape: Callable[[str], str]) -> None:
        self._terminal = terminal
        self._escape = escape

    def write(self, content: bytes) -> None:
        self._terminal.write(self._escape(content.decode()).encode())

    def flush(self) -> None:
        self._terminal.flush()


# --- lines -----------------------------------------------------------------------------------


class _NDJSON:
    def __init__(self, content: IO[bytes]) -> None:
        self._content = content

    def write(self, record: Record) -> None:
        self._content.write(_json_of(record) + b"\n")
        self._content.flush()

    def finish(self) -> None:
        pass


class _JSON:
    """One list, a row a line."""

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self._before = b"[\n"

    def write(self, record: Record) -> None:
        self._content.write(self._before + _json_of(record))
        self._before = b",\n"

    def finish(self) -> None:
        self._content.write(b"[]\n" if self._before == b"[\n" else b"\n]\n")


def _json_of(record: Record) -> bytes:
    """Numbers that JSON does not have are words, as the API writes them."""
    return msgspec.json.encode(in_words(record))


# --- columns ---------------------------------------------------------------------------------


class _Columns:
    """The first good row tells the columns; failed rows before it wait for that."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._waiting: list[Record] = []

    def rows(self, record: Record) -> list[list[Any]]:
        """What can be written now, in order."""
        record = in_words(record)
        if not self._names and "error" in record:
            self._waiting.append(record)
            return []
        if not self._names:
            self._names = [*flat(record), "error"]
        return [self._row(one) for one in (*self._taken(), record)]

    def rest(self) -> list[list[Any]]:
        if not self._names and self._waiting:
            self._names = ["row", "error"]
        return [self._row(one) for one in self._taken()]

    @property
    def names(self) -> list[str]:
        return self._names

    def _taken(self) -> list[Record]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def _row(self, record: Record) -> list[Any]:
        cells = flat(record)
        return [cells.get(name) for name in self._names]


class _CSV:
    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self._columns = _Columns()
        self._has_header = False

    def write(self, record: Record) -> None:
        self._put(self._columns.rows(record))

    def finish(self) -> None:
        self._put(self._columns.rest())

    def _put(self, rows: Sequence[Sequence[Any]]) -> None:
        if rows and not self._has_header:
            self._has_header = True
            self._line(self._columns.names)
        for row in rows:
            self._line(["" if cell is None else cell for cell in row])
        self._content.flush()

    def _line(self, cells: Sequence[Any]) -> None:
        text = _OneLine()
        csv.writer(text, lineterminator="\n").writerow(cells)
        self._content.write(text.line.encode())


class _OneLine:
    line = ""

    def write(self, line: str) -> None:
        self.line = line


class _Table:
    """In pieces, so that the first rows are there before the last."""

    def __init__(self, _: IO[bytes]) -> None:
        self._columns = _Columns()
        self._rows: list[list[Any]] = []
        self._is_first = True

    def write(self, record: Record) -> None:
        self._rows += self._columns.rows(record)
        if len(self._rows) >= _TABLE_ROWS:
            self._put()

    def finish(self) -> None:
        self._rows += self._columns.rest()
        if self._rows:
            self._put()

    def _put(self) -> None:
        from asyncinfer.cli.output import show

        names = self._columns.names
        kept = [at for at, _ in enumerate(names) if any(row[at] is not None for row in self._rows)]
        rows = [[_short(row[at]) for at in kept] for row in self._rows]
        numeric = [names[at] for at in kept if isinstance(self._rows[0][at], int | float)]
        show([names[at] for at in kept], rows, numeric=numeric)
        self._rows = []


def _short(cell: Any) -> Any:
    return f"{cell:.4g}" if isinstance(cell, float) else cell


def flat(record: Record) -> Record:
    """A record with a column for each element of a short list."""
    cells: Record = {}
    for name, value in in_words(record).items():
        if name == "error":
            cells[name] = f"{value['code']}: {value['detail']}"
        elif _is_vector(value):
            cells |= {f"{name}_{at}": one for at, one in enumerate(value)}
        elif isinstance(value, list | dict):
            cells[name] = msgspec.json.encode(value).decode()
        else:
            cells[name] = value
    return cells


def _is_vector(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_COLUMNS
        and not any(isinstance(one, list | dict) for one in value)
    )


# --- Parquet ---------------------------------------------------------------------------------


class _Parquet:
    """Lists stay lists; the first row group tells the types."""

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self._arrow = arrow("pyarrow", "Parquet")
        self._parquet = arrow("pyarrow.parquet", "Parquet")
        self._writer: Any = None
        self._records: list[Record] = []

    def write(self, record: Record) -> None:
        error = record.get("error")
        text = f"{error['code']}: {error['detail']}" if error else None
        self._records.append({**record, "error": text})
        if len(self._records) >= _ROW_GROUP:
            self._put()

    def finish(self) -> None:
        self._put()
        self._writer.close()

    def _put(self) -> None:
        if self._writer is None:
            schema = self._schema()
            self._writer = self._parquet.ParquetWriter(self._content, schema)
        made = self._arrow.Table.from_pylist(self._records, schema=self._writer.schema)
        self._writer.write_table(made)
        self._records = []

    def _schema(self) -> Any:
        # from_pylist looks at the first record only, which may be a failed one.
        names = dict.fromkeys(name for one in self._records for name in one)
        whole = [{name: one.get(name) for name in names} for one in self._records]
        found = self._arrow.Table.from_pylist(whole).schema
        fields = [self._typed(one) for one in found if one.name != "error"]
        return self._arrow.schema([*fields, ("error", self._arrow.string())])

    def _typed(self, field: Any) -> Any:
        """Of a row without a class both are null, which says nothing of the rows to come."""
        types = {"prediction": self._arrow.int64(), "class_name": self._arrow.string()}
        if self._arrow.types.is_null(field.type) and field.name in types:
            return field.with_type(types[field.name])
        return field


_WRITERS: Final[dict[str, Any]] = {
    "table": _Table,
    "csv": _CSV,
    "json": _JSON,
    "ndjson": _NDJSON,
    "parquet": _Parquet,
}

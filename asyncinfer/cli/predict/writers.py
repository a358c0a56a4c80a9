"""Writers of results, as a table, CSV, JSON, NDJSON or Parquet."""

import contextlib
import csv
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Final, Protocol

import msgspec

from asyncinfer.cli.output import show
from asyncinfer.cli.predict.formats import import_arrow, output_format
from asyncinfer.errors import FileRefused
from asyncinfer.tensors.missing_values import as_nonfinite_words
from asyncinfer.untrusted.printable import printable, printable_json

_MAX_COLUMNS: Final = 64
"""The elements of an output become columns up to this number; more become JSON in one cell."""

_ROWS_PER_TABLE: Final = 1000
_ROWS_PER_GROUP: Final = 10_000

Record = dict[str, Any]
"""A row's number, and its outputs by name or an `error`; NaN and infinities are floats."""


class Writer(Protocol):
    """Writes records in one format. Call `write` for each and `finish` once, after the last."""

    def write(self, record: Record) -> None:
        """Writes a record, or keeps it until more are there."""

    def finish(self) -> None:
        """Writes the records that are held back, and the end of the output."""


def format_of(path: str | None, requested: str | None) -> str:
    """The requested format, else that of the file's name; one of OUTPUT_FORMATS.

    Without either it is a table on a terminal and NDJSON in a pipe. Raises FileRefused for a name
    that shows no format.
    """
    if requested:
        return requested
    if path is None:
        return "table" if sys.stdout.isatty() else "ndjson"
    return output_format(path)


@contextlib.contextmanager
def writer(path: str | None, file_format: str) -> Iterator[Writer]:
    """Opens a writer to a file, or to stdout for None, and calls its `finish` at the end.

    The file appears once it is complete; until then, and after an exception, its content is in a
    file with the suffix .part. Raises FileRefused if the file cannot be written, pyarrow is missing
    for Parquet, or Parquet would go to a terminal. `file_format` is one of OUTPUT_FORMATS.
    """
    if path is None:
        if file_format == "parquet" and sys.stdout.isatty():
            raise FileRefused("Parquet is not for a terminal: add --output results.parquet.")
        stdout_writer = _WRITERS[file_format](_stdout(file_format))
        yield stdout_writer
        stdout_writer.finish()
        sys.stdout.buffer.flush()
        return
    part = f"{path}.part"
    try:
        content = open(part, "wb")  # noqa: SIM115
    except OSError as error:
        raise FileRefused(f"{path} cannot be written: {error.strerror}.") from error
    with content:
        file_writer = _WRITERS[file_format](content)
        yield file_writer
        file_writer.finish()
    os.replace(part, path)


def _stdout(file_format: str) -> Any:
    """The binary stdout; on a terminal a stream that escapes control characters."""
    if not sys.stdout.isatty():
        return sys.stdout.buffer
    return _Terminal(sys.stdout.buffer, printable if file_format == "csv" else printable_json)


class _Terminal:
    """A stream to a terminal that escapes control characters of records in UTF-8."""

    def __init__(self, terminal: IO[bytes], escape: Callable[[str], str]) -> None:
        self._terminal = terminal
        self._escape = escape

    def write(self, content: bytes) -> None:
        """Writes UTF-8 text with control characters escaped; it must be whole characters."""
        self._terminal.write(self._escape(content.decode()).encode())

    def flush(self) -> None:
        self._terminal.flush()


# --- lines ---------------------------------------------------------------------------------


class _NDJSON:
    """Writes each row at once as a line of JSON."""

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content

    def write(self, record: Record) -> None:
        """Writes a record as a line, and flushes."""
        self._content.write(_json_of(record) + b"\n")
        self._content.flush()

    def finish(self) -> None:
        """Does nothing."""


class _JSON:
    """Writes one list, with each row on a line."""

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self._separator = b"[\n"

    def write(self, record: Record) -> None:
        """Writes a record after a comma, or after the opening bracket if it is the first."""
        self._content.write(self._separator + _json_of(record))
        self._separator = b",\n"

    def finish(self) -> None:
        """Writes the closing bracket; `[]` if there was no record."""
        self._content.write(b"[]\n" if self._separator == b"[\n" else b"\n]\n")


def _json_of(record: Record) -> bytes:
    """A record as JSON without a line end; NaN and infinities are words, as the API writes them."""
    return msgspec.json.encode(as_nonfinite_words(record))


# --- columns -------------------------------------------------------------------------------


class _Columns:
    """The columns of a table: those of the first good row; failed rows before it are held back.

    Fields that only later rows have are left out.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._waiting: list[Record] = []

    def rows(self, record: Record) -> list[list[Any]]:
        """Takes a record and returns the rows that can be written now, in order; maybe none.

        A row has a cell for each of `names`, None where the record has no such field.
        """
        record = as_nonfinite_words(record)
        if not self._names and "error" in record:
            self._waiting.append(record)
            return []
        if not self._names:
            self._names = [*flat(record), "error"]
        return [self._row(ready) for ready in (*self._take_waiting(), record)]

    def rest(self) -> list[list[Any]]:
        """The rows that are still held back, at the end.

        If no row was good, they have the columns `row` and `error`.
        """
        if not self._names and self._waiting:
            self._names = ["row", "error"]
        return [self._row(record) for record in self._take_waiting()]

    @property
    def names(self) -> list[str]:
        """The titles of the columns; an empty list as long as `rows` has returned no row."""
        return self._names

    def _take_waiting(self) -> list[Record]:
        """The records that are held back, which are no longer kept then."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _row(self, record: Record) -> list[Any]:
        """The cells of a record, one for each of `names`; None where it has no such field."""
        cells = flat(record)
        return [cells.get(name) for name in self._names]


class _CSV:
    """Writes a header and lines of CSV, with nothing for None; no header without rows."""

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self._columns = _Columns()
        self._has_header = False

    def write(self, record: Record) -> None:
        """Writes a record as a line, unless the columns are not known yet."""
        self._write_rows(self._columns.rows(record))

    def finish(self) -> None:
        """Writes the failed rows that are held back if no row was good."""
        self._write_rows(self._columns.rest())

    def _write_rows(self, rows: Sequence[Sequence[Any]]) -> None:
        """Writes rows as lines and flushes; before the first of all, the header."""
        if rows and not self._has_header:
            self._has_header = True
            self._write_line(self._columns.names)
        for row in rows:
            self._write_line(["" if cell is None else cell for cell in row])
        self._content.flush()

    def _write_line(self, cells: Sequence[Any]) -> None:
        """Writes cells as one line in UTF-8, quoted where CSV needs it."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        self._content.write(line.getvalue().encode())


class _Table:
    """Writes a table in pieces, so that the first rows appear before the last are there."""

    def __init__(self, _: IO[bytes]) -> None:
        self._columns = _Columns()
        self._rows: list[list[Any]] = []

    def write(self, record: Record) -> None:
        """Keeps a record, and prints a table once there are 1,000 rows."""
        self._rows += self._columns.rows(record)
        if len(self._rows) >= _ROWS_PER_TABLE:
            self._write_rows()

    def finish(self) -> None:
        """Prints the rows that are left."""
        self._rows += self._columns.rest()
        if self._rows:
            self._write_rows()

    def _write_rows(self) -> None:
        """Prints the rows so far as a table; columns that are empty in all of them are left out."""
        names = self._columns.names
        shown = [at for at, _ in enumerate(names) if any(row[at] is not None for row in self._rows)]
        rows = [[_short(row[at]) for at in shown] for row in self._rows]
        numeric = [names[at] for at in shown if isinstance(self._rows[0][at], int | float)]
        show([names[at] for at in shown], rows, numeric=numeric)
        self._rows = []


def _short(cell: Any) -> Any:
    """A float as text of 4 digits; anything else unchanged."""
    return f"{cell:.4g}" if isinstance(cell, float) else cell


def flat(record: Record) -> Record:
    """A record with a text or number for each cell, NaN as a word.

    A list of at most 64 elements becomes a key for each, as `probabilities_0`; other lists and
    dicts become JSON, and an error `code: detail`.
    """
    cells: Record = {}
    for name, value in as_nonfinite_words(record).items():
        if name == "error":
            cells[name] = f"{value['code']}: {value['detail']}"
        elif _is_vector(value):
            cells |= {f"{name}_{at}": element for at, element in enumerate(value)}
        elif isinstance(value, list | dict):
            cells[name] = msgspec.json.encode(value).decode()
        else:
            cells[name] = value
    return cells


def _is_vector(value: Any) -> bool:
    """Whether a value is a list of at most 64 elements without lists and dicts in it."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_COLUMNS
        and not any(isinstance(element, list | dict) for element in value)
    )


# --- Parquet -------------------------------------------------------------------------------


class _Parquet:
    """Writes row groups of 10,000 rows, lists as lists; the first group determines the types.

    Fields that only later groups have are left out.
    """

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self._arrow = import_arrow("pyarrow")
        self._parquet = import_arrow("pyarrow.parquet")
        self._writer: Any = None
        self._records: list[Record] = []

    def write(self, record: Record) -> None:
        """Keeps a record with its error as text, and writes a row group once there are 10,000."""
        error = record.get("error")
        text = f"{error['code']}: {error['detail']}" if error else None
        self._records.append({**record, "error": text})
        if len(self._records) >= _ROWS_PER_GROUP:
            self._write_rows()

    def finish(self) -> None:
        """Writes the last row group and the footer; without any record a file without rows."""
        self._write_rows()
        self._writer.close()

    def _write_rows(self) -> None:
        """Writes the rows so far as a row group."""
        if self._writer is None:
            schema = self._schema()
            self._writer = self._parquet.ParquetWriter(self._content, schema)
        table = self._arrow.Table.from_pylist(self._records, schema=self._writer.schema)
        self._writer.write_table(table)
        self._records = []

    def _schema(self) -> Any:
        """The schema of the rows so far: their fields, and `error` as the last column."""
        # from_pylist takes the columns from the first record only, which may be a failed row.
        names = dict.fromkeys(name for record in self._records for name in record)
        filled = [{name: record.get(name) for name in names} for record in self._records]
        schema = self._arrow.Table.from_pylist(filled).schema
        fields = [self._with_type(field) for field in schema if field.name != "error"]
        return self._arrow.schema([*fields, ("error", self._arrow.string())])

    def _with_type(self, field: Any) -> Any:
        """A field with its known type if its column is null so far.

        Both fields are null for a row without a class, unlike in later rows.
        """
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

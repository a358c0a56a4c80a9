"""Readers of rows from a file or stdin, as CSV, JSON, NDJSON, NPY or Parquet."""

import contextlib
import csv
import io
import itertools
import math
import os
import select
import sys
import time
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.cli.predict.formats import import_arrow, input_format
from asyncinfer.client import WaitTimeout
from asyncinfer.errors import FileRefused

_SHOWN_CHARACTERS: Final = 40
_MAX_CELL_CHARACTERS: Final = 10_000_000
_MISSING: Final = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"})
"""The texts of a missing value, in lower case, as pandas and R write them."""
_INFINITE: Final = {word: float(word) for word in ("inf", "infinity", "-inf", "-infinity")}
_MAGIC: Final = {b"PAR1": "parquet", b"\x93NUM": "npy"}


class ReadOptions(Struct, frozen=True, kw_only=True):
    """How to read rows."""

    source: str
    """A path, or - for stdin."""
    file_format: str | None = None
    columns: tuple[str, ...] = ()
    """The columns to send, by name or number from 1; empty for all."""
    header: bool | None = None
    """Whether a CSV has a header. None: its first line is one if no cell of it is a number."""
    inputs: dict[str, int] = {}
    """The rank of each input of the model, by name."""
    text_inputs: frozenset[str] = frozenset()
    """The inputs of strings; cells of their columns are not parsed."""
    single_inputs: frozenset[str] = frozenset()
    """The required inputs, if each takes one value per row; else empty.

    Of a table with a column for each, the columns named like inputs are sent and others left out.
    """
    deadline: float = math.inf
    """The time on the monotonic clock until which a read of stdin waits."""


class Row(Struct, frozen=True):
    """A row: its value, or the `problem` for which it cannot be sent."""

    number: int
    """Counted from 1."""
    value: Any = None
    problem: str = ""


def rows(options: ReadOptions) -> Iterator[Row]:
    """Reads rows one after another, numbered from 1; a bad row has a `problem`.

    Raises FileRefused if the source cannot be read as its format at all, also when that shows only
    later, and WaitTimeout if stdin stays silent until the deadline.
    """
    file_format = options.file_format or (
        "ndjson" if options.source == "-" else input_format(options.source)
    )
    with _open(options.source, options.deadline) as content:
        try:
            yield from _READERS[file_format](content, options)
        except UnicodeDecodeError as error:
            raise _unreadable_error(
                options, file_format, "it is not text in UTF-8", content
            ) from error
        except (msgspec.DecodeError, csv.Error, ValueError) as error:
            raise _unreadable_error(options, file_format, str(error), content) from error


def with_first_read(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows, the first already read, so that an unreadable file is refused at once."""
    first = next(rows, None)
    return iter(()) if first is None else itertools.chain([first], rows)


@contextlib.contextmanager
def _open(source: str, deadline: float = math.inf) -> Iterator[IO[bytes]]:
    """Opens the source for reading, and closes it unless it is stdin; raises FileRefused.

    `deadline` is on the monotonic clock; only a read of stdin observes it, and not on Windows.
    """
    if source == "-":
        is_bounded = deadline < math.inf and sys.platform != "win32"
        yield io.BufferedReader(_Stdin(deadline)) if is_bounded else sys.stdin.buffer
        return
    try:
        content = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise FileRefused(
            f"{source} cannot be read: {error.strerror}. Give the path of a file, - for stdin, or "
            "one row as JSON."
        ) from error
    with content:
        yield content


class _Stdin(io.RawIOBase):
    """Stdin with a deadline, after which a read raises WaitTimeout; a blocking read has none."""

    def __init__(self, deadline: float) -> None:
        self._descriptor = sys.stdin.fileno()
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what is there into the buffer; returns the number of bytes, 0 at its end."""
        left_seconds = max(0.0, self._deadline - time.monotonic())
        if not select.select([self._descriptor], [], [], left_seconds)[0]:
            raise WaitTimeout("Stdin is open, and no further row came in time.")
        chunk = os.read(self._descriptor, len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _unreadable_error(
    options: ReadOptions, file_format: str, reason: str, content: IO[bytes]
) -> FileRefused:
    """The error for a source that is not of its format; names the format its first bytes show."""
    hint = "Set its format with --from."
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        content.seek(0)
        if actual := _MAGIC.get(content.read(4)):
            hint = f"It looks like {actual}: --from {actual}."
    name = "stdin" if options.source == "-" else options.source
    return FileRefused(f"{name} is no {file_format.upper()} file: {reason}. {hint}")


# --- CSV -----------------------------------------------------------------------------------


def _csv(content: IO[bytes], options: ReadOptions) -> Iterator[Row]:
    """Yields the rows of a CSV; raises ValueError if it is not one, or lacks a wanted column.

    Empty lines are skipped. Tabs separate the cells of a file named .tsv.
    """
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    delimiter = "\t" if options.source.lower().endswith(".tsv") else ","
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        filled = filter(None, lines)
        first = next(filled, None)
        if first is None:
            return
        if any("\0" in cell for cell in first):
            raise ValueError("it has binary content")
        has_header = _is_header(first) if options.header is None else options.header
        names = first if has_header else [str(at) for at in range(1, len(first) + 1)]
        indexes = _column_indexes(names, options)
        rows = filled if has_header else itertools.chain([first], filled)
        for number, cells in enumerate(rows, start=1):
            yield _csv_row(number, lines.line_num, cells, names, indexes, options)
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from error
    finally:
        text.detach()


def _csv_row(
    number: int,
    line_number: int,
    cells: Sequence[str],
    names: Sequence[str],
    indexes: Sequence[int],
    options: ReadOptions,
) -> Row:
    """The row of a line; it has a `problem` if a cell is no number or the number of cells is wrong.

    `number` counts rows and `line_number` lines of the file. `cells` and `names` are of all
    columns, and `indexes` those of the columns to send.
    """
    if len(cells) != len(names):
        problem = f"line {line_number}: {len(cells)} cells where {len(names)} are expected"
        return Row(number, problem=problem)
    has_input_names = options.inputs.keys() >= {names[at].strip() for at in indexes}
    values: list[Any] = []
    for at in indexes:
        is_text = (
            names[at].strip() in options.text_inputs
            if has_input_names
            else bool(options.text_inputs)
        )
        try:
            values.append(cells[at] if is_text else parse_cell(cells[at]))
        except ValueError as error:
            problem = f"line {line_number}: column {names[at]!r}: {error}"
            return Row(number, problem=f"{problem}; leave the column out with --columns")
    return Row(number, _row_value([names[at] for at in indexes], values, options))


def _is_header(cells: Sequence[str]) -> bool:
    """Whether no cell of a CSV's first line is a number."""
    return not any(parse_number(cell) is not None for cell in cells)


def parse_cell(text: str) -> int | float | None:
    """The number in a cell, which may be an infinity; None for a missing value, as `NaN` or `NA`.

    Raises ValueError if the cell has something else. The model may refuse a missing value.
    """
    word = text.strip().lower()
    if word in _MISSING:
        return None
    value = parse_number(word)
    if value is None and word not in _INFINITE:
        raise ValueError(f"{text[:_SHOWN_CHARACTERS]!r} is no number")
    return _INFINITE[word] if value is None else value


def parse_number(word: str) -> int | float | None:
    """An int or a float; None if the word is no number, or one that JSON has not, as `inf`."""
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(ValueError):
        value = float(word)
        return value if abs(value) < float("inf") else None
    return None


def _column_indexes(names: Sequence[str], options: ReadOptions) -> list[int]:
    """The indexes of the columns to send; raises ValueError for a column that is not there."""
    stripped = [name.strip() for name in names]
    if not options.columns:
        by_name = options.single_inputs and options.single_inputs <= set(stripped)
        return [at for at, name in enumerate(stripped) if not by_name or name in options.inputs]
    indexes = []
    for column in options.columns:
        if column in stripped:
            indexes.append(stripped.index(column))
        elif column.isdecimal() and 1 <= int(column) <= len(names):
            indexes.append(int(column) - 1)
        else:
            raise ValueError(f"it has no column {column!r}, but {', '.join(stripped)}")
    return indexes


# --- JSON ----------------------------------------------------------------------------------


def _json(content: IO[bytes], options: ReadOptions) -> Iterator[Row]:
    """Yields the rows of a list, or of an object whose `data` is such a list.

    A list of numbers is a single row. Raises ValueError for other JSON; all of it is read at once.
    """
    values = _decode_json(_without_mark(content.read()))
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise ValueError("it must be a list of rows")
    if values and not isinstance(values[0], list | dict | str):
        values = [values]  # one row
    for number, row in enumerate(values, start=1):
        yield json_row(number, row, options)


def _ndjson(content: IO[bytes], options: ReadOptions) -> Iterator[Row]:
    """Yields a row for each line that is not empty; a line that is not JSON has a `problem`."""
    number = 0
    for line_number, line in enumerate(content, start=1):
        if line_number == 1:
            line = _without_mark(line)
        if not line.strip():
            continue
        number += 1
        try:
            row = _decode_json(line)
        except ValueError as error:
            yield Row(number, problem=f"line {line_number}: not JSON: {error}")
            continue
        yield json_row(number, row, options)


def _decode_json(text: bytes) -> Any:
    """The value of JSON text; raises ValueError, with a hint if NaN is in the text."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
        raise ValueError(f'{error}; a number that JSON does not have is "NaN" or null') from error


def _without_mark(start: bytes) -> bytes:
    """The start of a text without the byte order mark that Windows tools write.

    Raises ValueError for UTF-16.
    """
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    return start.removeprefix(BOM_UTF8)


def json_row(number: int, row: Any, options: ReadOptions) -> Row:
    """A row from its decoded JSON; it has a `problem` if it is null or lacks a wanted column.

    A record is read like a row of a table, and {"data": row} like `row`. Other values are
    unchanged.
    """
    if isinstance(row, dict) and set(row) == {"data"}:
        row = row["data"]
    if isinstance(row, dict):
        try:
            indexes = _column_indexes(list(row), options)
        except ValueError as error:
            return Row(number, problem=str(error))
        names, values = list(row), list(row.values())
        selected = [names[at] for at in indexes]
        return Row(number, _row_value(selected, [values[at] for at in indexes], options))
    if row is None:
        return Row(number, problem="null is no row")
    return Row(number, row)


def _row_value(names: Sequence[str], values: Sequence[Any], options: ReadOptions) -> Any:
    """The value to send: a dict if all columns are named like inputs, else a list.

    `names` and `values` are of the columns to send. A single column of vectors is the list itself.
    """
    stripped = [name.strip() for name in names]
    if set(stripped) <= options.inputs.keys():
        named = dict(zip(stripped, values, strict=True))
        return {name: _with_rank(value, options.inputs[name]) for name, value in named.items()}
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    return list(values)


def _with_rank(value: Any, rank: int) -> Any:
    """The value in a list if it is none and its input is a matrix, as scikit-learn exports it."""
    return [value] if rank == 2 and not isinstance(value, list) else value


# --- arrays and tables ---------------------------------------------------------------------


def _npy(content: IO[bytes], options: ReadOptions) -> Iterator[Row]:
    """Yields the rows of an array along its first axis; an array of the rank of a row is one row.

    Raises ValueError for a single value, or for an array of Python objects.
    """
    import numpy as np

    source = content if content.seekable() else io.BytesIO(content.read())
    array = np.load(source, allow_pickle=False)
    if array.ndim == 0:
        raise ValueError("it has no rows, but a single value")
    if len(options.inputs) == 1 and array.ndim == next(iter(options.inputs.values())) - 1:
        array = array[None]  # one row
    for number, row in enumerate(array, start=1):
        yield Row(number, row)


def _parquet(content: IO[bytes], options: ReadOptions) -> Iterator[Row]:
    """Yields the rows of a Parquet file, row group by row group; raises FileRefused, ValueError."""
    parquet = import_arrow("pyarrow.parquet")
    source = content if content.seekable() else io.BytesIO(content.read())
    file = parquet.ParquetFile(source)
    names = file.schema_arrow.names
    columns = [names[at] for at in _column_indexes(names, options)]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield Row(number, _row_value(columns, [row[name] for name in columns], options))


_READERS: Final[dict[str, Callable[[IO[bytes], ReadOptions], Iterator[Row]]]] = {
    "csv": _csv,
    "json": _json,
    "ndjson": _ndjson,
    "npy": _npy,
    "parquet": _parquet,
}

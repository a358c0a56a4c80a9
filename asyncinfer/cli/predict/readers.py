"""Readers of rows from a file or stdin, as CSV, JSON, NDJSON, NPY or Parquet."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import select
import sys
import time
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, Final

import msgspec

from asyncinfer.cli.exit_codes import say_error
from asyncinfer.cli.predict.cells import BEYOND_ALL_NUMBERS
from asyncinfer.cli.predict.csv_rows import csv_rows
from asyncinfer.cli.predict.formats import import_arrow, input_format
from asyncinfer.cli.predict.tables import (
    NoColumn,
    ReadOptions,
    Row,
    column_indexes,
    numbered_columns,
    row_value,
)
from asyncinfer.client import WaitTimeout
from asyncinfer.errors import FileRefused

_MAGIC: Final = {b"PAR1": "parquet", b"\x93NUM": "npy"}
_REMEDIES: Final = {
    "npy": "Save it again; an array of Python objects as numbers, or as array.astype(str).",
    "parquet": "Copy it or write it again.",
}
"""What to do about a file that is of its format, and damaged."""


def rows(options: ReadOptions) -> Generator[Row, None, str]:
    """Reads rows one after another, numbered from 1, and returns why there are none.

    A bad row has a `problem`. Raises FileRefused if the source cannot be read as its format at all,
    also when that shows only later, if it lacks a wanted column, or for an option that its format
    does not have; and WaitTimeout if stdin stays silent until the deadline.
    """
    file_format = options.file_format or (
        "ndjson" if options.source == "-" else input_format(options.source)
    )
    _check_options(file_format, options)
    with _open(options.source, options.deadline) as content:
        try:
            return (yield from _READERS[file_format](content, options)) or ""
        except NoColumn as error:
            raise FileRefused(f"{options.name} {error}.") from error
        except UnicodeDecodeError as error:
            reason, hint = (
                "it is not text in UTF-8",
                "Save it as UTF-8, or set its format with --from.",
            )
            raise _unreadable_error(options, file_format, reason, content, hint) from error
        except (msgspec.DecodeError, csv.Error, ValueError) as error:
            raise _unreadable_error(options, file_format, str(error), content) from error


def with_first_read(options: ReadOptions) -> Iterator[Row]:
    """Rows whose first is already read, so that an unreadable file is refused at once.

    If there is none, says so on stderr.
    """
    reader = rows(options)
    try:
        return itertools.chain([next(reader)], reader)
    except StopIteration as end:
        say_error(f"{options.name} has 0 rows{f': {end.value}' if end.value else ''}.")
        return iter(())


def _check_options(file_format: str, options: ReadOptions) -> None:
    """Raises FileRefused for an option of CSV if the format is another."""
    given = {"--header": options.header, "--separator": options.separator}
    for flag, value in given.items():
        if file_format != "csv" and value is not None:
            raise FileRefused(f"{flag} is for CSV, and {options.name} is {file_format.upper()}.")


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
    options: ReadOptions,
    file_format: str,
    reason: str,
    content: IO[bytes],
    hint: str = "Set its format with --from.",
) -> FileRefused:
    """The error for a source that is not of its format; names the format its first bytes show.

    `hint` is used if they show none.
    """
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        content.seek(0)
        start = content.read(4)
        actual = _MAGIC.get(start)
        if actual == file_format:
            return FileRefused(f"{options.name} cannot be read: {reason}. {_REMEDIES[actual]}")
        if actual:
            hint = f"It looks like {actual}: --from {actual}."
        elif start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            hint = "It is UTF-16: save it as UTF-8."
    return FileRefused(f"{options.name} is no {file_format.upper()} file: {reason}. {hint}")


# --- JSON ----------------------------------------------------------------------------------


def _json(content: IO[bytes], options: ReadOptions) -> Generator[Row, None, None]:
    """Yields the rows of a list, or of an object whose `data` is such a list.

    A list of numbers is a single row. Raises ValueError for what is no JSON and FileRefused for
    other JSON, also if a number is too large; all of it is read at once.
    """
    try:
        values = decode_json(_without_mark(content.read(), options))
    except NumberBeyond as error:
        raise FileRefused(f"{options.name}: {error}.") from error
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise FileRefused(
            f"{options.name} must be a list of rows, or an object with that list as `data`."
        )
    if values and not isinstance(values[0], list | dict | str):
        values = [values]  # one row
    for number, row in enumerate(values, start=1):
        yield json_row(number, row, options)


def _ndjson(content: IO[bytes], options: ReadOptions) -> Generator[Row, None, None]:
    """Yields a row for each line that is not empty; a line that is not JSON has a `problem`."""
    number = 0
    for line_number, line in enumerate(content, start=1):
        if line_number == 1:
            line = _without_mark(line, options)
        if not line.strip():
            continue
        number += 1
        try:
            row = decode_json(line)
        except NumberBeyond as error:
            yield Row(number, problem=f"line {line_number}: {error}")
            continue
        except ValueError as error:
            yield Row(number, problem=f"line {line_number}: not JSON: {error}")
            continue
        yield json_row(number, row, options)


class NumberBeyond(ValueError):
    """JSON has a number that is too large for every datatype, such as 1e400."""


def decode_json(text: bytes | str) -> Any:
    """The value of JSON text.

    Raises NumberBeyond, and ValueError for text that is not JSON, with a hint if NaN is in it.
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        if number := _number_beyond(text):
            raise NumberBeyond(f"{number[:40]!r} {BEYOND_ALL_NUMBERS}") from error
        content = text if isinstance(text, bytes) else text.encode()
        if b"NaN" not in content and b"Infinity" not in content:
            raise
        raise ValueError(f'{error}; a number that JSON does not have is "NaN" or null') from error


def _number_beyond(text: bytes | str) -> str:
    """The first number of JSON text that is too large for every datatype; empty if none is."""
    found: list[str] = []

    def read(number: str) -> None:
        if math.isinf(float(number)):
            found.append(number)

    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text, parse_float=read, parse_int=read)
        return found[0] if found else ""
    return ""


def _without_mark(start: bytes, options: ReadOptions) -> bytes:
    """The start of a text without the byte order mark that Windows tools write.

    Raises FileRefused for UTF-16.
    """
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise FileRefused(f"{options.name} is UTF-16: save it as UTF-8.")
    return start.removeprefix(BOM_UTF8)


def json_row(number: int, row: Any, options: ReadOptions) -> Row:
    """A row from its decoded JSON; it has a `problem` if it is null or lacks a wanted column.

    A record is read like a row of a table, and {"data": row} like `row`. Of a list --columns takes
    elements by number. Other values are unchanged.
    """
    if isinstance(row, dict) and set(row) == {"data"}:
        row = row["data"]
    if row is None:
        return Row(number, problem="null is no row")
    try:
        if isinstance(row, dict):
            names = list(row)
            selected = [names[at] for at in column_indexes(names, options)]
            return Row(number, row_value(selected, [row[name] for name in selected], options))
        if options.columns:
            values = row if isinstance(row, list) else []
            indexes = column_indexes(numbered_columns(len(values)), options)
            return Row(number, [values[at] for at in indexes])
    except NoColumn as error:
        return Row(number, problem=str(error))
    return Row(number, row)


# --- arrays and tables ---------------------------------------------------------------------


def _npy(content: IO[bytes], options: ReadOptions) -> Generator[Row, None, None]:
    """Yields the rows of an array along its first axis; an array of the rank of a row is one row.

    Raises ValueError for an array of Python objects, FileRefused for a single value or for
    --columns if rows are no vectors, and NoColumn.
    """
    import numpy as np

    source = content if content.seekable() else io.BytesIO(content.read())
    array = np.load(source, allow_pickle=False)
    if array.ndim == 0:
        raise FileRefused(f"{options.name} has no rows, but a single value.")
    if len(options.inputs) == 1 and array.ndim == next(iter(options.inputs.values())) - 1:
        array = array[None]  # one row
    if options.columns:
        if array.ndim != 2:
            shape = list(array.shape[1:])
            raise FileRefused(
                f"--columns is for rows of numbers, and each of {options.name} has shape {shape}."
            )
        array = array[:, column_indexes(numbered_columns(array.shape[1]), options)]
    for number, row in enumerate(array, start=1):
        yield Row(number, row)


def _parquet(content: IO[bytes], options: ReadOptions) -> Generator[Row, None, None]:
    """Yields the rows of a Parquet file, row group by row group; raises FileRefused, ValueError."""
    parquet = import_arrow("pyarrow.parquet")
    source = content if content.seekable() else io.BytesIO(content.read())
    file = parquet.ParquetFile(source)
    names = file.schema_arrow.names
    columns = [names[at] for at in column_indexes(names, options)]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield Row(number, row_value(columns, [row[name] for name in columns], options))


_READERS: Final[dict[str, Callable[[IO[bytes], ReadOptions], Generator[Row, None, str | None]]]] = {
    "csv": csv_rows,
    "json": _json,
    "ndjson": _ndjson,
    "npy": _npy,
    "parquet": _parquet,
}

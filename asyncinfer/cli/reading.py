"""Rows of a file or of stdin: CSV, JSON, NDJSON, NPY or Parquet, read as they are asked for."""

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.errors import AsyncinferError

if TYPE_CHECKING:
    from types import ModuleType

FORMS: Final = ("csv", "json", "ndjson", "npy", "parquet")
_FORM_BY_SUFFIX: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".npy": "npy",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_SHOWN_CHARACTERS: Final = 40
_MOST_CELL_CHARACTERS: Final = 10_000_000
_MAGIC: Final = {b"PAR1": "parquet", b"\x93NUM": "npy"}


class UnreadableFile(AsyncinferError):
    """A file that cannot be read as what it should be; the detail says what to do."""

    code = "unreadable_file"


class Asked(Struct, frozen=True, kw_only=True):
    """How rows are to be read."""

    source: str
    """A path, or - for stdin."""
    form: str | None = None
    columns: tuple[str, ...] = ()
    """Those of a table to send, by name or number from 1; none means all."""
    header: bool | None = None
    """Whether a CSV has one; None: its first line is one when no cell of it is a number."""
    texts: bool = False
    """Whether the model takes strings, so that cells are none of our business."""


class Row(Struct, frozen=True):
    """One row: what to send, or why there is nothing to."""

    number: int
    value: Any = None
    problem: str = ""


def rows(asked: Asked) -> Iterator[Row]:
    """Raises UnreadableFile where no row can be had; a bad row is one with a `problem`."""
    form = asked.form or _form_of(asked.source)
    with _opened(asked.source) as content:
        try:
            yield from _READERS[form](content, asked)
        except UnicodeDecodeError as error:
            raise _no_such(asked, form, "it is not text in UTF-8", content) from error
        except (msgspec.DecodeError, csv.Error, ValueError) as error:
            raise _no_such(asked, form, str(error), content) from error


def _form_of(source: str) -> str:
    if source == "-":
        return "ndjson"
    suffix = Path(source).suffix.lower()
    if suffix in _FORM_BY_SUFFIX:
        return _FORM_BY_SUFFIX[suffix]
    raise UnreadableFile(
        f"{source}: its name does not tell what it is. Say so with --from: {', '.join(FORMS)}."
    )


@contextlib.contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        content = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise UnreadableFile(
            f"{source} cannot be read: {error.strerror}. Give the path of a file, - for stdin, or "
            "one row as JSON."
        ) from error
    with content:
        yield content


def _no_such(asked: Asked, form: str, reason: str, content: IO[bytes]) -> UnreadableFile:
    """What it looks like instead is told where its first bytes show it."""
    hint = "Say what it is with --from."
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        content.seek(0)
        if looks := _MAGIC.get(content.read(4)):
            hint = f"It looks like {looks}: --from {looks}."
    name = "stdin" if asked.source == "-" else asked.source
    return UnreadableFile(f"{name} is no {form.upper()} file: {reason}. {hint}")


# --- CSV -------------------------------------------------------------------------------------


def _csv(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    csv.field_size_limit(_MOST_CELL_CHARACTERS)
    delimiter = "\t" if asked.source.lower().endswith(".tsv") else ","
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        first = next((line for line in lines if line), None)
        if first is None:
            return
        if any("\0" in cell for cell in first):
            raise ValueError("it has binary content")
        has_header = _is_header(first) if asked.header is None else asked.header
        names = first if has_header else [str(at) for at in range(1, len(first) + 1)]
        chosen = _chosen(names, asked.columns)
        number = 0
        if not has_header:
            number = 1
            yield _csv_row(1, lines.line_num, first, names, chosen, asked.texts)
        for line in lines:
            if line:
                number += 1
                yield _csv_row(number, lines.line_num, line, names, chosen, asked.texts)
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from error
    finally:
        text.detach()


def _csv_row(
    number: int,
    line_number: int,
    cells: Sequence[str],
    names: Sequence[str],
    chosen: Sequence[int],
    texts: bool,
) -> Row:
    if len(cells) != len(names):
        problem = f"line {line_number}: {len(cells)} cells where {len(names)} are expected"
        return Row(number, problem=problem)
    if texts:
        return Row(number, [cells[at] for at in chosen])
    values = []
    for at in chosen:
        value = _number(cells[at])
        if value is None:
            shown = repr(cells[at][:_SHOWN_CHARACTERS])
            problem = f"line {line_number}: column {names[at]!r}: {shown} is no number"
            return Row(number, problem=f"{problem}; leave it out with --columns")
        values.append(value)
    return Row(number, values)


def _is_header(cells: Sequence[str]) -> bool:
    return not any(_number(cell) is not None for cell in cells)


def _number(cell: str) -> int | float | None:
    """Whole numbers stay whole; what JSON has no number for is none."""
    with contextlib.suppress(ValueError):
        return int(cell)
    with contextlib.suppress(ValueError):
        value = float(cell)
        return value if abs(value) < float("inf") else None
    return None


def _chosen(names: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Where the wanted columns are."""
    stripped = [name.strip() for name in names]
    if not columns:
        return list(range(len(names)))
    places = []
    for one in columns:
        if one in stripped:
            places.append(stripped.index(one))
        elif one.isdecimal() and 1 <= int(one) <= len(names):
            places.append(int(one) - 1)
        else:
            raise ValueError(f"it has no column {one!r}, but {', '.join(stripped)}")
    return places


# --- JSON ------------------------------------------------------------------------------------


def _json(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    """A list of rows, or an object whose `data` is one."""
    found = msgspec.json.decode(content.read())
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    if not isinstance(found, list):
        raise ValueError("it must be a list of rows")
    if found and not isinstance(found[0], list | dict | str):
        found = [found]  # one row
    for number, row in enumerate(found, start=1):
        yield _json_row(number, row, asked)


def _ndjson(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(content, start=1):
        if not line.strip():
            continue
        number += 1
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            yield Row(number, problem=f"line {line_number}: not JSON: {error}")
            continue
        yield _json_row(number, row, asked)


def _json_row(number: int, row: Any, asked: Asked) -> Row:
    """Of a record its values, as of a table's columns; of {"data": row} the row."""
    if isinstance(row, dict) and set(row) == {"data"}:
        row = row["data"]
    if isinstance(row, dict):
        try:
            places = _chosen(list(row), asked.columns)
        except ValueError as error:
            return Row(number, problem=str(error))
        values = list(row.values())
        return Row(number, [values[at] for at in places])
    if row is None:
        return Row(number, problem="null is no row")
    return Row(number, row)


# --- arrays and tables -----------------------------------------------------------------------


def _npy(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    import numpy as np

    source = content if content.seekable() else io.BytesIO(content.read())
    array = np.load(source, allow_pickle=False)
    if array.ndim == 0:
        raise ValueError("it has no rows, but a single value")
    for number, row in enumerate(array, start=1):
        yield Row(number, row.tolist())


def _parquet(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    parquet = arrow("pyarrow.parquet", "Parquet")
    source = content if content.seekable() else io.BytesIO(content.read())
    file = parquet.ParquetFile(source)
    names = file.schema_arrow.names
    columns = [names[at] for at in _chosen(names, asked.columns)]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            values = [row[name] for name in columns]
            if None in values:
                yield Row(number, problem=f"column {columns[values.index(None)]!r} is null")
            else:
                yield Row(number, values[0] if _is_one_list(values) else values)


def _is_one_list(values: Sequence[Any]) -> bool:
    """A column of vectors is the row itself."""
    return len(values) == 1 and isinstance(values[0], list)


def arrow(module: str, what: str) -> "ModuleType":
    """A module of pyarrow, which not everyone has."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnreadableFile(f"{what} needs pyarrow: pip install 'asyncinfer[parquet]'.") from error


_READERS: Final[dict[str, Callable[[IO[bytes], Asked], Iterator[Row]]]] = {
    "csv": _csv,
    "json": _json,
    "ndjson": _ndjson,
    "npy": _npy,
    "parquet": _parquet,
}

"""Rows of a file or of stdin: CSV, JSON, NDJSON, NPY or Parquet, read as they are asked for."""

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
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.client import WaitTimeout
from asyncinfer.errors import FileRefused

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
_MAX_CELL_CHARACTERS: Final = 10_000_000
_MISSING: Final = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"})
"""What a cell without a value has, in lower case, as pandas and R write it."""
_INFINITE: Final = {word: float(word) for word in ("inf", "infinity", "-inf", "-infinity")}
_MAGIC: Final = {b"PAR1": "parquet", b"\x93NUM": "npy"}


class Asked(Struct, frozen=True, kw_only=True):
    """How rows are to be read."""

    source: str
    """A path, or - for stdin."""
    form: str | None = None
    columns: tuple[str, ...] = ()
    """Those of a table to send, by name or number from 1; none means all."""
    header: bool | None = None
    """Whether a CSV has one; None: its first line is one when no cell of it is a number."""
    inputs: dict[str, int] = {}
    """What the model takes, and how many dimensions each has."""
    text_inputs: frozenset[str] = frozenset()
    """Those that take strings: the cells of their columns stay as they are."""
    single_inputs: frozenset[str] = frozenset()
    """Those that a row must have and gives one value: a table that has a column for each is taken
    by these names, and its other columns are left out."""
    until: float = math.inf
    """On the monotonic clock: how long stdin may be silent."""


class Row(Struct, frozen=True):
    """One row: what to send, or why there is nothing to."""

    number: int
    value: Any = None
    problem: str = ""


def rows(asked: Asked) -> Iterator[Row]:
    """Raises FileRefused where no row can be had; a bad row is one with a `problem`."""
    form = asked.form or _form_of(asked.source)
    with _opened(asked.source, asked.until) as content:
        try:
            yield from _READERS[form](content, asked)
        except UnicodeDecodeError as error:
            raise _no_such(asked, form, "it is not text in UTF-8", content) from error
        except (msgspec.DecodeError, csv.Error, ValueError) as error:
            raise _no_such(asked, form, str(error), content) from error


def begun(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows, the first of them read: so a file that is none is refused at once."""
    first = next(rows, None)
    return iter(()) if first is None else itertools.chain([first], rows)


def _form_of(source: str) -> str:
    if source == "-":
        return "ndjson"
    suffix = Path(source).suffix.lower()
    if suffix in _FORM_BY_SUFFIX:
        return _FORM_BY_SUFFIX[suffix]
    raise FileRefused(
        f"{source}: its name does not tell what it is. Say so with --from: {', '.join(FORMS)}."
    )


@contextlib.contextmanager
def _opened(source: str, until: float = math.inf) -> Iterator[IO[bytes]]:
    if source == "-":
        is_bounded = until < math.inf and sys.platform != "win32"
        yield io.BufferedReader(_Stdin(until)) if is_bounded else sys.stdin.buffer
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
    """Raises WaitTimeout where nothing has come by then: a read that blocks has no bound."""

    def __init__(self, until: float) -> None:
        self._descriptor = sys.stdin.fileno()
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        left = max(0.0, self._until - time.monotonic())
        if not select.select([self._descriptor], [], [], left)[0]:
            raise WaitTimeout("Stdin is open, and no further row came in time.")
        chunk = os.read(self._descriptor, len(into))
        into[: len(chunk)] = chunk
        return len(chunk)


def _no_such(asked: Asked, form: str, reason: str, content: IO[bytes]) -> FileRefused:
    """What it looks like instead is told where its first bytes show it."""
    hint = "Say what it is with --from."
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        content.seek(0)
        if looks := _MAGIC.get(content.read(4)):
            hint = f"It looks like {looks}: --from {looks}."
    name = "stdin" if asked.source == "-" else asked.source
    return FileRefused(f"{name} is no {form.upper()} file: {reason}. {hint}")


# --- CSV -------------------------------------------------------------------------------------


def _csv(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
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
        chosen = _chosen(names, asked)
        count = 0
        if not has_header:
            count = 1
            yield _csv_row(1, lines.line_num, first, names, chosen, asked)
        for line in lines:
            if line:
                count += 1
                yield _csv_row(count, lines.line_num, line, names, chosen, asked)
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from error
    finally:
        text.detach()


def _csv_row(
    place: int,
    line_number: int,
    cells: Sequence[str],
    names: Sequence[str],
    chosen: Sequence[int],
    asked: Asked,
) -> Row:
    if len(cells) != len(names):
        problem = f"line {line_number}: {len(cells)} cells where {len(names)} are expected"
        return Row(place, problem=problem)
    are_named = asked.inputs.keys() >= {names[at].strip() for at in chosen}
    values: list[Any] = []
    for at in chosen:
        is_text = names[at].strip() in asked.text_inputs if are_named else bool(asked.text_inputs)
        try:
            values.append(cells[at] if is_text else cell(cells[at]))
        except ValueError as error:
            problem = f"line {line_number}: column {names[at]!r}: {error}"
            return Row(place, problem=f"{problem}; leave the column out with --columns")
    return Row(place, _row([names[at] for at in chosen], values, asked))


def _is_header(cells: Sequence[str]) -> bool:
    return not any(number(cell) is not None for cell in cells)


def cell(text: str) -> int | float | None:
    """The number in a cell, or None where it is missing: the model tells whether it may be.

    Raises ValueError where the cell has something else.
    """
    word = text.strip().lower()
    if word in _MISSING:
        return None
    value = number(word)
    if value is None and word not in _INFINITE:
        raise ValueError(f"{text[:_SHOWN_CHARACTERS]!r} is no number")
    return _INFINITE[word] if value is None else value


def number(word: str) -> int | float | None:
    """Whole numbers stay whole; what JSON has no number for is none."""
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(ValueError):
        value = float(word)
        return value if abs(value) < float("inf") else None
    return None


def _chosen(names: Sequence[str], asked: Asked) -> list[int]:
    """Where the wanted columns are."""
    stripped = [name.strip() for name in names]
    if not asked.columns:
        by_name = asked.single_inputs and asked.single_inputs <= set(stripped)
        return [at for at, name in enumerate(stripped) if not by_name or name in asked.inputs]
    places = []
    for one in asked.columns:
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
    found = _decoded(_text(content.read()))
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    if not isinstance(found, list):
        raise ValueError("it must be a list of rows")
    if found and not isinstance(found[0], list | dict | str):
        found = [found]  # one row
    for number, row in enumerate(found, start=1):
        yield json_row(number, row, asked)


def _ndjson(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(content, start=1):
        if line_number == 1:
            line = _text(line)
        if not line.strip():
            continue
        number += 1
        try:
            row = _decoded(line)
        except ValueError as error:
            yield Row(number, problem=f"line {line_number}: not JSON: {error}")
            continue
        yield json_row(number, row, asked)


def _decoded(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
        raise ValueError(f'{error}; a number that JSON does not have is "NaN" or null') from error


def _text(begun: bytes) -> bytes:
    """Without the byte order mark that Windows tools write first."""
    if begun.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    return begun.removeprefix(BOM_UTF8)


def json_row(number: int, row: Any, asked: Asked) -> Row:
    """Of a record its values, as of a table's columns; of {"data": row} the row."""
    if isinstance(row, dict) and set(row) == {"data"}:
        row = row["data"]
    if isinstance(row, dict):
        try:
            places = _chosen(list(row), asked)
        except ValueError as error:
            return Row(number, problem=str(error))
        names, values = list(row), list(row.values())
        return Row(number, _row([names[at] for at in places], [values[at] for at in places], asked))
    if row is None:
        return Row(number, problem="null is no row")
    return Row(number, row)


def _row(names: Sequence[str], values: Sequence[Any], asked: Asked) -> Any:
    """Columns that are the model's inputs go by name; one column of vectors is the row itself."""
    stripped = [name.strip() for name in names]
    if set(stripped) <= asked.inputs.keys():
        named = dict(zip(stripped, values, strict=True))
        return {name: _of_rank(value, asked.inputs[name]) for name, value in named.items()}
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    return list(values)


def _of_rank(value: Any, rank: int) -> Any:
    """A number for an input that has a matrix of them, as scikit-learn exports it."""
    return [value] if rank == 2 and not isinstance(value, list) else value


# --- arrays and tables -----------------------------------------------------------------------


def _npy(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    import numpy as np

    source = content if content.seekable() else io.BytesIO(content.read())
    array = np.load(source, allow_pickle=False)
    if array.ndim == 0:
        raise ValueError("it has no rows, but a single value")
    if len(asked.inputs) == 1 and array.ndim == next(iter(asked.inputs.values())) - 1:
        array = array[None]  # one row
    for place, row in enumerate(array, start=1):
        yield Row(place, row)


def _parquet(content: IO[bytes], asked: Asked) -> Iterator[Row]:
    parquet = arrow("pyarrow.parquet", "Parquet")
    source = content if content.seekable() else io.BytesIO(content.read())
    file = parquet.ParquetFile(source)
    names = file.schema_arrow.names
    columns = [names[at] for at in _chosen(names, asked)]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield Row(number, _row(columns, [row[name] for name in columns], asked))


def arrow(module: str, what: str) -> "ModuleType":
    """A module of pyarrow, which not everyone has."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FileRefused(f"{what} needs pyarrow: pip install 'asyncinfer[parquet]'.") from error


_READERS: Final[dict[str, Callable[[IO[bytes], Asked], Iterator[Row]]]] = {
    "csv": _csv,
    "json": _json,
    "ndjson": _ndjson,
    "npy": _npy,
    "parquet": _parquet,
}

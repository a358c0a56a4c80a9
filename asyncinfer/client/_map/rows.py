"""The rows of a map, cut into blocks that can be one job each: as they come, never all at once."""

import contextlib
import itertools
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.client._encoding import is_frame, to_plain
from asyncinfer.client._errors import CannotSend

_BLOCK_BYTES: Final = 1 << 20
"""About the most bytes of a block: well below what a server takes in JSON (MAX_JSON, 2 MiB)."""


class RowBlock(Struct, frozen=True):
    """Neighbouring rows of one shape: a list of them, an array, or an array for each input."""

    numbers: Sequence[int]
    """The number of each row in the map."""
    rows: Any

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.numbers)


class ArrayRows:
    """Rows in an array `(rows, *dims)`, or in one for each input by name."""

    failure: None = None

    def __init__(self, arrays: Any) -> None:
        self._arrays = arrays
        named = arrays.values() if isinstance(arrays, dict) else [arrays]
        self.total = min(map(len, named), default=0)
        """The number of rows; of several arrays, of the shortest."""

    def read_first(self) -> list[Any]:
        """A list of the first row, empty if there is none."""
        return [rows_at(self._arrays, 0)] if self.total else []

    def blocks(self, max_rows: int) -> Iterator[RowBlock]:
        """Yields all rows in blocks of at most `max_rows` rows and about 1 MiB, as views."""
        (first,) = self.read_first()
        size = min(max_rows, max(1, _BLOCK_BYTES // max(bytes_in(first), 1)))
        for start in range(0, self.total, size):
            end = min(start + size, self.total)
            yield RowBlock(range(start, end), rows_at(self._arrays, slice(start, end)))


class IteratedRows:
    """Rows of an iterable, which are read one by one as they are needed.

    The error of an iterable ends the blocks with the rows before it, and is in `failure` then.
    """

    failure: Exception | None = None

    def __init__(self, rows: Iterable[Any]) -> None:
        self.total = len(rows) if isinstance(rows, Sized) else None
        """The number of rows; None if it is unknown."""
        self._rows = iter(rows)

    def read_first(self) -> list[Any]:
        """A list of the first row, empty if there is none; call it once, before `blocks`."""
        first = list(itertools.islice(self._rows, 1))
        self._rows = itertools.chain(first, self._rows)
        return first

    def blocks(self, max_rows: int) -> Iterator[RowBlock]:
        """Yields all rows in blocks of at most `max_rows` rows and about 1 MiB."""
        builder = BlockBuilder(max_rows)
        try:
            for row in self._rows:
                if block := builder.add(row):
                    yield block
        except Exception as error:
            self.failure = error
        if block := builder.flush():
            yield block


class AsyncIteratedRows:
    """The same as IteratedRows for an asynchronous iterable."""

    failure: Exception | None = None

    def __init__(self, rows: AsyncIterable[Any]) -> None:
        self.total = len(rows) if isinstance(rows, Sized) else None
        self._rows = aiter(rows)
        self._first: list[Any] = []

    async def read_first(self) -> list[Any]:
        """A list of the first row, empty if there is none; call it once, before `blocks`."""
        with contextlib.suppress(StopAsyncIteration):
            self._first.append(await anext(self._rows))
        return self._first

    async def blocks(self, max_rows: int) -> AsyncIterator[RowBlock]:
        """Yields all rows in blocks of at most `max_rows` rows and about 1 MiB."""
        builder = BlockBuilder(max_rows)
        try:
            for row in self._first:
                if block := builder.add(row):
                    yield block
            async for row in self._rows:
                if block := builder.add(row):
                    yield block
        except Exception as error:
            self.failure = error
        if block := builder.flush():
            yield block


MapRows = ArrayRows | IteratedRows | AsyncIteratedRows


def open_rows(rows: Any) -> ArrayRows | IteratedRows:
    """Rows of any form, none of which is read yet; raises CannotSend for what has no rows."""
    if isinstance(rows, Mapping):
        import numpy as np

        # asanyarray keeps the masks of masked arrays.
        arrays = {name: np.asanyarray(values) for name, values in rows.items()}
        if single := [name for name, array in arrays.items() if array.ndim == 0]:
            raise CannotSend(f"{single[0]!r} of the rows is a single value; give one for each row.")
        return ArrayRows(arrays)
    if hasattr(rows, "dtype") and getattr(rows, "ndim", 0) > 0:
        return ArrayRows(rows)
    if is_frame(rows):
        raise CannotSend("map takes rows; iterating a frame gives columns: use map_frame().")
    try:
        return IteratedRows(rows)
    except TypeError:
        hint = "; use AsyncClient" if hasattr(rows, "__aiter__") else ""
        kind = type(rows).__name__
        raise CannotSend(f"map takes an iterable of rows, not {kind}{hint}.") from None


def open_async_rows(rows: Any) -> MapRows:
    """The same as `open_rows` where rows may come from an asynchronous iterable."""
    return AsyncIteratedRows(rows) if hasattr(rows, "__aiter__") else open_rows(rows)


class BlockBuilder:
    """Collects rows that come one by one into blocks of at most `max_rows` rows and about 1 MiB.

    Call `flush` after the last row.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._next_number = 0
        self._rows: list[Any] = []
        self._shape: Any = None
        self._size = max_rows

    def add(self, row: Any) -> RowBlock | None:
        """Adds a row; returns the block that is complete now, if one is.

        A row of another shape completes the block before it.
        """
        shape = shape_of(row)
        is_complete = len(self._rows) >= self._size or shape != self._shape
        block = self.flush() if is_complete else None
        if not self._rows:
            self._shape = shape
            self._size = min(self._max_rows, max(1, _BLOCK_BYTES // max(bytes_in(row), 1)))
        self._rows.append(row)
        return block if block or len(self._rows) < self._size else self.flush()

    def flush(self) -> RowBlock | None:
        """The block of the rows since the last one; None if there are none."""
        if not self._rows:
            return None
        numbers = range(self._next_number, self._next_number + len(self._rows))
        block = RowBlock(numbers, self._rows)
        self._next_number += len(self._rows)
        self._rows = []
        return block


def split_in_half(block: RowBlock) -> tuple[RowBlock, RowBlock]:
    """The first and the second half of a block of at least two rows."""
    middle = len(block) // 2
    return _slice(block, slice(0, middle)), _slice(block, slice(middle, None))


def without(block: RowBlock, places: Iterable[int]) -> RowBlock:
    """The block without the rows at these places in it, counted from 0; they keep their numbers."""
    left_out = set(places)
    kept = [place for place in range(len(block)) if place not in left_out]
    rows = block.rows
    if isinstance(rows, list):
        picked: Any = [rows[place] for place in kept]
    elif isinstance(rows, dict):
        picked = {name: values[kept] for name, values in rows.items()}
    else:
        picked = rows[kept]
    return RowBlock([block.numbers[place] for place in kept], picked)


def shape_of(row: Any) -> Any:
    """A value that is equal for rows that fit into one array.

    Of nested lists only the first elements are looked at.
    """
    if isinstance(row, list | tuple):
        return (len(row), shape_of(row[0])) if row else (0,)
    if isinstance(row, Mapping):
        return tuple((name, shape_of(value)) for name, value in row.items())
    if hasattr(row, "dtype"):
        return (row.shape, str(row.dtype))
    return ()


def rank_of(value: Any) -> int:
    """The number of axes; of nested lists by their first elements."""
    if isinstance(value, list | tuple):
        return 1 + (rank_of(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))


def bytes_in(row: Any) -> int:
    """About how many bytes a row takes in a request; 1 if it cannot be encoded."""
    if isinstance(row, Mapping):
        return sum(map(bytes_in, row.values()))
    if hasattr(row, "nbytes") and getattr(row.dtype, "kind", "O") not in "OTUS":
        return int(row.nbytes)
    try:
        return len(msgspec.json.encode(row, enc_hook=to_plain))
    except (TypeError, ValueError):
        return 1


def _slice(block: RowBlock, places: slice) -> RowBlock:
    """The part of a block at these places in it."""
    return RowBlock(block.numbers[places], rows_at(block.rows, places))


def single_row_blocks(block: RowBlock) -> Iterator[RowBlock]:
    """Yields a block for each row."""
    for place in range(len(block)):
        yield _slice(block, slice(place, place + 1))


def rows_at(rows: Any, places: int | slice) -> Any:
    """The row or rows at these places of a list, an array, or a dict of arrays."""
    if isinstance(rows, dict):
        return {name: values[places] for name, values in rows.items()}
    return rows[places]

"""The rows of a map, cut into blocks that can be one job each: as they come, never all at once."""

import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.client._encoding import to_plain

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


class ArrayRows(Struct, frozen=True):
    """Rows in an array `(rows, *dims)`, or in one for each input by name."""

    arrays: Any

    def __len__(self) -> int:
        """The number of rows; of several arrays, of the shortest."""
        if isinstance(self.arrays, dict):
            return min(map(len, self.arrays.values()))
        return len(self.arrays)

    def first(self) -> Any:
        """The first row; raises IndexError if there is none."""
        return rows_at(self.arrays, 0)

    def blocks(self, max_rows: int) -> Iterator[RowBlock]:
        """Yields all rows in blocks of at most `max_rows` rows and about 1 MiB, as views."""
        total = len(self)
        size = min(max_rows, max(1, _BLOCK_BYTES // max(bytes_in(self.first()), 1)))
        for start in range(0, total, size):
            end = min(start + size, total)
            yield RowBlock(range(start, end), rows_at(self.arrays, slice(start, end)))


def array_rows(rows: Any) -> ArrayRows | None:
    """Rows that are an array, or a dict of what can be arrays; None for every other iterable."""
    if isinstance(rows, Mapping):
        import numpy as np

        # asanyarray keeps the masks of masked arrays.
        return ArrayRows({name: np.asanyarray(values) for name, values in rows.items()})
    return ArrayRows(rows) if hasattr(rows, "dtype") and getattr(rows, "ndim", 0) > 0 else None


class BlockBuilder:
    """Collects rows that come one by one into blocks of at most `max_rows` rows and about 1 MiB.

    Call `flush` after the last row, until it returns None.
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
        """The block of the rows so far, which are no longer kept; None if there are none."""
        if not self._rows:
            return None
        numbers = range(self._next_number, self._next_number + len(self._rows))
        block = RowBlock(numbers, self._rows)
        self._next_number += len(self._rows)
        self._rows = []
        return block


def blocks_of(rows: Iterable[Any], max_rows: int) -> Iterator[RowBlock]:
    """Yields the blocks of rows that come one by one; reads rows only as blocks are taken."""
    builder = BlockBuilder(max_rows)
    for row in rows:
        if block := builder.add(row):
            yield block
    while block := builder.flush():
        yield block


async def blocks_of_async(rows: AsyncIterator[Any], max_rows: int) -> AsyncIterator[RowBlock]:
    """The same as `blocks_of` for an asynchronous iterator."""
    builder = BlockBuilder(max_rows)
    async for row in rows:
        if block := builder.add(row):
            yield block
    while block := builder.flush():
        yield block


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


def peek(rows: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first row, and an iterator of all rows; raises StopIteration if there are none."""
    rest = iter(rows)
    first = next(rest)
    return first, itertools.chain([first], rest)

"""Rows of any origin, cut into blocks that can be one job: as they come, never all at once."""

import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.client._encoding import plain

_BLOCK_BYTES: Final = 1 << 20
"""A job's rows have about as much: well below what a server takes in JSON (MAX_JSON, 2 MiB)."""


class Block(Struct, frozen=True):
    """Neighbouring rows of one shape: a list of them, an array, or an array for each input."""

    numbers: Sequence[int]
    rows: Any

    def __len__(self) -> int:
        return len(self.numbers)


class Columns(Struct, frozen=True):
    """An array, or one for each input by name; the first axis counts rows."""

    arrays: Any

    def __len__(self) -> int:
        if isinstance(self.arrays, dict):
            return min(len(one) for one in self.arrays.values())
        return len(self.arrays)

    def first(self) -> Any:
        return row_at(self.arrays, 0)

    def blocks(self, most: int) -> Iterator[Block]:
        total = len(self)
        size = min(most, max(1, _BLOCK_BYTES // max(bytes_in(self.first()), 1)))
        for start in range(0, total, size):
            end = min(start + size, total)
            yield Block(range(start, end), row_at(self.arrays, slice(start, end)))


def columns_of(rows: Any) -> Columns | None:
    """Rows that are an array or a dict of them; None for every other iterable."""
    if isinstance(rows, Mapping):
        import numpy as np

        # One that is masked stays so.
        return Columns({name: np.asanyarray(one) for name, one in rows.items()})
    return Columns(rows) if hasattr(rows, "dtype") and getattr(rows, "ndim", 0) > 0 else None


class Gathering:
    """Makes blocks of rows that come one by one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._next = 0
        self._rows: list[Any] = []
        self._shape: Any = None
        self._size = most

    def add(self, row: Any) -> Block | None:
        """The block that is complete now, if one is."""
        shape = shape_of(row)
        is_full = len(self._rows) >= self._size or shape != self._shape
        done = self.rest() if is_full else None
        if not self._rows:
            self._shape = shape
            self._size = min(self._most, max(1, _BLOCK_BYTES // max(bytes_in(row), 1)))
        self._rows.append(row)
        return done if done or len(self._rows) < self._size else self.rest()

    def rest(self) -> Block | None:
        if not self._rows:
            return None
        block = Block(range(self._next, self._next + len(self._rows)), self._rows)
        self._next += len(self._rows)
        self._rows = []
        return block


def blocks_of(rows: Iterable[Any], most: int) -> Iterator[Block]:
    gathering = Gathering(most)
    for row in rows:
        if block := gathering.add(row):
            yield block
    while block := gathering.rest():
        yield block


async def ablocks_of(rows: AsyncIterator[Any], most: int) -> AsyncIterator[Block]:
    gathering = Gathering(most)
    async for row in rows:
        if block := gathering.add(row):
            yield block
    while block := gathering.rest():
        yield block


def halves(block: Block) -> tuple[Block, Block]:
    middle = len(block) // 2
    return _part(block, slice(0, middle)), _part(block, slice(middle, None))


def without(block: Block, places: Iterable[int]) -> Block:
    """The rows that are not at these places of the block."""
    left_out = set(places)
    kept = [place for place in range(len(block)) if place not in left_out]
    rows = block.rows
    if isinstance(rows, list):
        picked: Any = [rows[place] for place in kept]
    elif isinstance(rows, dict):
        picked = {name: one[kept] for name, one in rows.items()}
    else:
        picked = rows[kept]
    return Block([block.numbers[place] for place in kept], picked)


def shape_of(row: Any) -> Any:
    """Equal for rows that fit into one array."""
    if isinstance(row, list | tuple):
        return (len(row), shape_of(row[0])) if row else (0,)
    if isinstance(row, Mapping):
        return tuple((name, shape_of(one)) for name, one in row.items())
    if hasattr(row, "dtype"):
        return (row.shape, str(row.dtype))
    return ()


def rank_of(value: Any) -> int:
    """How many axes it has; of lists by their first element."""
    if isinstance(value, list | tuple):
        return 1 + (rank_of(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))


def bytes_in(row: Any) -> int:
    """About what it takes in a request."""
    if isinstance(row, Mapping):
        return sum(map(bytes_in, row.values()))
    if hasattr(row, "nbytes") and getattr(row.dtype, "kind", "O") not in "OTUS":
        return int(row.nbytes)
    try:
        return len(msgspec.json.encode(row, enc_hook=plain))
    except (TypeError, ValueError):
        return 1


def _part(block: Block, where: slice) -> Block:
    return Block(block.numbers[where], row_at(block.rows, where))


def singles(block: Block) -> Iterator[Block]:
    for place in range(len(block)):
        yield _part(block, slice(place, place + 1))


def row_at(rows: Any, where: int | slice) -> Any:
    if isinstance(rows, dict):
        return {name: one[where] for name, one in rows.items()}
    return rows[where]


def peeked(rows: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first row and all of them; raises StopIteration where there is none."""
    rest = iter(rows)
    first = next(rest)
    return first, itertools.chain([first], rest)

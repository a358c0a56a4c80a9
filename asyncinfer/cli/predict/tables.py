"""Rows and how to read them: which columns are sent, and as which inputs of the model."""

import math
from collections.abc import Sequence
from typing import Any

from msgspec import Struct


class ReadOptions(Struct, frozen=True, kw_only=True):
    """How to read rows."""

    source: str
    """A path, or - for stdin."""
    file_format: str | None = None
    columns: tuple[str, ...] = ()
    """The columns to send, by name or number from 1; empty for all."""
    header: bool | None = None
    """Whether a CSV has a header. None: its first line is one if no cell of it is a number."""
    separator: str | None = None
    """The character between the cells of a CSV. None: the one that its first line has."""
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

    @property
    def name(self) -> str:
        """The source in words."""
        return "stdin" if self.source == "-" else self.source


class Row(Struct, frozen=True):
    """A row: its value, or the `problem` for which it cannot be sent."""

    number: int
    """Counted from 1."""
    value: Any = None
    problem: str = ""


class NoColumn(Exception):
    """A column of --columns is not there, or is named twice; the text follows the table's name."""


def column_indexes(names: Sequence[str], options: ReadOptions) -> list[int]:
    """The indexes of the columns to send; raises NoColumn for one that is not there, or twice."""
    stripped = [name.strip() for name in names]
    if not options.columns:
        by_name = options.single_inputs and options.single_inputs <= set(stripped)
        return [at for at, name in enumerate(stripped) if not by_name or name in options.inputs]
    indexes: list[int] = []
    for column in options.columns:
        if column in stripped:
            index = stripped.index(column)
        elif column.isdecimal() and 1 <= int(column) <= len(names):
            index = int(column) - 1
        else:
            raise NoColumn(f"has no column {column!r}, but {', '.join(stripped) or 'none'}")
        if index in indexes:
            raise NoColumn(f"has one column {stripped[index]!r}, which --columns names twice")
        indexes.append(index)
    return indexes


def numbered_columns(count: int) -> list[str]:
    """The names of columns without a header: their numbers, from 1."""
    return [str(at) for at in range(1, count + 1)]


def row_value(names: Sequence[str], values: Sequence[Any], options: ReadOptions) -> Any:
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

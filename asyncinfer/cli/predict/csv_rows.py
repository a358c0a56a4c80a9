"""The rows of a CSV file: its separator, its header and its cells."""

import csv
import io
import itertools
import re
from collections.abc import Generator, Iterable, Sequence
from typing import IO, Any, Final

from asyncinfer.cli.output import counted
from asyncinfer.cli.predict.cells import (
    WordCell,
    is_like_number,
    parse_cell,
    separator_in,
    separator_word,
)
from asyncinfer.cli.predict.tables import (
    ReadOptions,
    Row,
    column_indexes,
    numbered_columns,
    row_value,
)

_MAX_CELL_CHARACTERS: Final = 10_000_000
_SHOWN_CHARACTERS: Final = 60
_QUOTED: Final = re.compile('"[^"]*("|$)')


def csv_rows(content: IO[bytes], options: ReadOptions) -> Generator[Row, None, str]:
    """Yields the rows of a CSV, and returns why there are none, "" if there are.

    Empty lines are skipped. Raises ValueError if it is no CSV, and NoColumn for a column that is
    not there.
    """
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    try:
        start = _read_start(text)
        separator = options.separator or _separator_of(start[-1] if start else "", options)
        lines = csv.reader(itertools.chain(start, text), delimiter=separator, strict=True)
        filled = filter(None, lines)
        first = next(filled, None)
        if first is None:
            return ""
        if any("\0" in cell for cell in first):
            raise ValueError("it has binary content")
        has_header = _is_header(first) if options.header is None else options.header
        table = _Table(first if has_header else numbered_columns(len(first)), separator, options)
        rows = filled if has_header else itertools.chain([first], filled)
        count = 0
        for count, cells in enumerate(rows, start=1):
            yield table.row(count, lines.line_num, cells)
        return "" if count else _header_alone(first, separator)
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from error
    finally:
        text.detach()


def _read_start(text: Iterable[str]) -> list[str]:
    """The lines up to the first that is not blank, which is the last of them if there is one."""
    start: list[str] = []
    for line in text:
        start.append(line)
        if line.strip():
            break
    return start


def _separator_of(line: str, options: ReadOptions) -> str:
    """A tab or a semicolon if the line has one outside of quotes, else a comma; a tab in a .tsv."""
    bare = _QUOTED.sub("", line)
    if "\t" in bare or options.source.lower().endswith(".tsv"):
        return "\t"
    return ";" if ";" in bare else ","


def _is_header(cells: Sequence[str]) -> bool:
    """Whether no cell of a CSV's first line is a number, nor an only cell several numbers."""
    has_numbers = any(map(is_like_number, cells))
    return not has_numbers and not (len(cells) == 1 and separator_in(cells[0]))


def _header_alone(cells: Sequence[str], separator: str) -> str:
    """Why a file has no rows whose only line was taken as a header."""
    shown = separator.join(cells)[:_SHOWN_CHARACTERS]
    advice = "if it is a row, add --no-header"
    if len(cells) == 1:
        named = separator_word(separator)
        advice += f"; if it has columns that {named} does not separate, add --separator"
    return f"the only line, {shown!r}, was taken as the header; {advice}"


class _Table:
    """The columns of a CSV; makes rows of its lines."""

    def __init__(self, names: Sequence[str], separator: str, options: ReadOptions) -> None:
        self._indexes = column_indexes(names, options)
        self._count = len(names)
        self._separator = separator
        self._options = options
        self._names = [names[at] for at in self._indexes]
        stripped = [name.strip() for name in self._names]
        are_inputs = options.inputs.keys() >= set(stripped)
        self._are_texts = [
            name in options.text_inputs if are_inputs else bool(options.text_inputs)
            for name in stripped
        ]
        self._has_good_row = False

    def row(self, number: int, line_number: int, cells: Sequence[str]) -> Row:
        """The row of a line; it has a `problem` if a cell is no number, or their count is wrong.

        `number` counts rows and `line_number` lines of the file.
        """
        problem = ""
        if len(cells) != self._count:
            problem = f"{counted(len(cells), 'cell')} where {self._count} are expected"
            if len(cells) == 1:
                named = separator_word(self._separator)
                problem += f"; if {named} does not separate them, add --separator"
            return Row(number, problem=f"line {line_number}: {problem}")
        values: list[Any] = []
        for name, at, is_text in zip(self._names, self._indexes, self._are_texts, strict=True):
            try:
                values.append(cells[at] if is_text else parse_cell(cells[at]))
            except ValueError as error:
                # A column that had a number is wanted, so only this cell is wrong.
                is_unwanted = isinstance(error, WordCell) and not self._has_good_row
                advice = "; leave the column out with --columns" if is_unwanted else ""
                problem = f"line {line_number}: column {name!r}: {error}{advice}"
                return Row(number, problem=problem)
        self._has_good_row = True
        return Row(number, row_value(self._names, values, self._options))

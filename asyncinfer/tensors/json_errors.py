"""Errors of a JSON array, element by element: each with its place and what is expected there.

This is the slow path, taken after the decoder has rejected an input: it visits every element in
Python.
"""

import codecs
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Final

from msgspec import Struct

from asyncinfer.errors import InputError, InvalidInput
from asyncinfer.tensors.datatypes import (
    FLOATS,
    RANGES,
    TensorSpec,
    dims,
    has_dynamic_first_dim,
    nesting_of,
    range_text,
    shape_text,
)
from asyncinfer.tensors.missing_values import NONFINITE_WORDS, is_missing_value

MAX_LISTED_ERRORS: Final = 20
"""How many errors one answer lists; the others are only counted."""

_MAX_COUNTED: Final = 1000
_MAX_INT_DIGITS: Final = 300
_SHOWN_CHARACTERS: Final = 64
_EXAMINED_BYTES: Final = 64 << 10
"""How much of a long text is searched for errors: the search costs about 40 times as much as the
decoder, and the cost of a request should match its size."""

_CHUNK_ELEMENTS: Final = 64
"""How many elements are checked together, before each of them is."""

_WORDS: Final = '"NaN", "Infinity", "-Infinity"'
_MISSING_VALUE_RULE: Final = 'only FP16, BF16, FP32 and FP64 take null and "NaN"'

_INFINITIES: Final = (math.inf, -math.inf)
"""The values that Python's parser gives for numbers beyond every datatype, such as 1e400."""


def invalid_input_error(
    faults: Iterable[InputError], *, otherwise: str = "does not fit"
) -> InvalidInput:
    """Returns the error that lists `faults`: the first 20, and how many more there are.

    `otherwise` is its detail if there are none; then its only fault is at /data.
    """
    found = list(itertools.islice(faults, _MAX_COUNTED)) or [InputError("/data", otherwise)]
    root = f"/{found[0].pointer[1:].partition('/')[0]}"
    least = "at least " if len(found) == _MAX_COUNTED else ""
    detail = f"{found[0].pointer}: {found[0].detail}"
    if len(found) > 1:
        detail = f"{detail} (and {least}{len(found) - 1} more)"
    unlisted = len(found) - MAX_LISTED_ERRORS
    if unlisted > 0:
        found[MAX_LISTED_ERRORS:] = [
            InputError(root, f"{least}{unlisted} more errors are not listed")
        ]
    return InvalidInput(detail, faults=found)


def unknown_name_detail(name: str, known: Iterable[str]) -> str:
    """The detail of an error about a name that is not known, with the most similar known name."""
    names = sorted(known)
    listed = ", ".join(f"`{known_name}`" for known_name in names) or "none"
    if nearest := get_close_matches(name[:_SHOWN_CHARACTERS], names, n=1):
        return f"There is no such name. Did you mean `{nearest[0]}`? Known: {listed}."
    return f"There is no such name. Known: {listed}."


def find_errors(
    data: bytes, spec: TensorSpec, *, model: str, max_rows: int, at: str = "/data"
) -> Iterator[InputError]:
    """Every difference between the JSON text `data` and `spec`; pointers start with `at`.

    `model` is the name in the details. Only the first 64 KiB of a long text are examined, so there
    may be no error in them. Raises nothing: text that is not JSON is a fault at `at`.
    """
    if spec.shape is None:
        try:
            rank = nesting_of(data)
        except ValueError as error:
            yield InputError(at, str(error))
            return
        # Without a declared number of dimensions, there are no rows to count.
        spec, max_rows = TensorSpec(spec.name, spec.datatype, (None,) * rank), sys.maxsize
    text, cut = _beginning(data) if len(data) > _EXAMINED_BYTES else (data, 0)
    try:
        value = json.loads(text.decode(), parse_int=_int, parse_constant=lambda _: _NonFinite())
    except UnicodeDecodeError as error:
        yield InputError(at, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        # Counting brackets closes the cut text wrongly if there are brackets in strings.
        if not cut:
            yield InputError(at, _syntax_problem(data, error))
    except RecursionError:
        yield InputError(at, f"nested too deep, {model} takes shape {shape_text(spec)}")
    else:
        yield from _ErrorFinder(spec, model, max_rows, at, cut).find(value)


def too_many_rows_detail(rows: str, spec: TensorSpec, *, model: str, max_rows: int) -> str:
    """The detail of an error about too many rows.

    `rows` is their number in words, as `more than 100`, and `max_rows` the limit of the model.
    """
    noun = "rows" if len(dims(spec)) > 1 else f"{_element(spec.datatype).noun}s"
    return f"{rows} {noun}, {model} takes at most {max_rows} in one job"


def _beginning(data: bytes) -> tuple[bytes, int]:
    """The first elements of a text as valid JSON, and how many nested arrays were cut short.

    These are the outermost one, the last one in it, and so on.
    """
    end = data.rfind(b",", 0, _EXAMINED_BYTES)
    if end < 0:
        return data, 0
    head = data[:end]
    cut = max(0, head.count(b"[") - head.count(b"]"))
    return head + b"]" * cut, cut


class _NonFinite:
    """Marks a bare NaN or Infinity, which Python's parser accepts but JSON does not have."""


def _int(digits: str) -> int | float:
    """A whole number; infinity for one with more digits than any datatype has."""
    return int(digits) if len(digits) <= _MAX_INT_DIGITS else math.inf


def _syntax_problem(data: bytes, error: json.JSONDecodeError) -> str:
    if data.startswith(codecs.BOM_UTF8):
        return "begins with a byte order mark; send UTF-8 without one"
    return f"not valid JSON: {error.msg} at character {error.pos}"


class _ErrorFinder:
    """Compares a parsed JSON value with a tensor's spec.

    `root` is the pointer of the value, and `cut` the number of nested arrays whose end is missing.
    Of its methods `pointer` is the place of a value, and `axis` its depth.
    """

    def __init__(self, spec: TensorSpec, model: str, max_rows: int, root: str, cut: int) -> None:
        self._spec = spec
        self._root = root
        self._cut = cut
        self._cut_lists: set[int] = set()
        """The `id`s of lists whose end is missing."""
        self._dims = dims(spec)
        self._rank = len(self._dims)
        self._model = model
        self._max_rows = max_rows
        self._element = _element(spec.datatype)
        self._sizes: dict[int | str, int] = {}
        """First size of each dynamic dimension, by symbol, or by axis if it has none."""

    def find(self, value: object) -> Iterator[InputError]:
        """Yields the errors of the value; call it once."""
        last = value
        for _ in range(self._cut):
            if isinstance(last, list):
                self._cut_lists.add(id(last))
                last = last[-1] if last else None
        if self._rank > 1 and isinstance(value, list) and _is_flat(value):
            takes = f"{self._model} takes {self._rank}: shape {shape_text(self._spec)}"
            yield InputError(self._root, f"1 dimension, {takes}{_as_row(value, self._rank)}")
        else:
            yield from self._value_errors(self._root, value, 0)

    def _value_errors(self, pointer: str, value: object, axis: int) -> Iterator[InputError]:
        if axis == self._rank:
            yield from self._element_errors(pointer, value)
        elif not isinstance(value, list):
            yield InputError(pointer, f"{_kind(value)}, expected {self._array_words(axis)}")
        elif axis == 0 and has_dynamic_first_dim(self._spec) and len(value) > self._max_rows:
            rows = f"more than {self._max_rows}" if self._cut else str(len(value))
            detail = too_many_rows_detail(
                rows, self._spec, model=self._model, max_rows=self._max_rows
            )
            yield InputError(pointer, detail)
        else:
            yield from self._array_errors(pointer, value, axis)

    def _array_errors(self, pointer: str, items: list[object], axis: int) -> Iterator[InputError]:
        """An error of the array's size, and the errors of its items."""
        problem = "" if id(items) in self._cut_lists else self._size_problem(len(items), axis)
        if problem:
            place = f"row {pointer.rpartition('/')[2]} has " if axis == 1 else ""
            yield InputError(pointer, f"{place}{problem}")
        for index in self._unchecked(items, axis):
            yield from self._value_errors(f"{pointer}/{index}", items[index], axis + 1)

    def _unchecked(self, items: list[object], axis: int) -> Iterator[int]:
        """Indexes of items to visit: all but chunks of elements that are all valid."""
        if axis < self._rank - 1:
            yield from range(len(items))
            return
        for start in range(0, len(items), _CHUNK_ELEMENTS):
            chunk = items[start : start + _CHUNK_ELEMENTS]
            if not self._element.accepts_all(chunk):
                yield from range(start, start + len(chunk))

    def _element_errors(self, pointer: str, value: object) -> Iterator[InputError]:
        element = self._element
        if element.accepts_all([value]):
            return
        if type(value) in element.types or (element.range and value in _INFINITIES):
            datatype = self._spec.datatype
            yield InputError(pointer, f"beyond the range of {datatype}, {range_text(datatype)}")
        else:
            yield InputError(
                pointer,
                f"{_kind(value)}, expected {element.noun_with_article}{element.hint(value)}",
            )

    def _size_problem(self, size: int, axis: int) -> str:
        """What is wrong with the size of an array, in words; "" if nothing is.

        Notes the first size of each dynamic dimension.
        """
        dim = self._dims[axis]
        takes = f"{size} {self._noun(axis, size)}, {self._model} takes"
        if isinstance(dim, int):
            return "" if size == dim else f"{takes} {dim}"
        if size == 0:
            return f"{takes} at least 1"
        first = self._sizes.setdefault(axis if dim is None else dim, size)
        return "" if size == first else f"{takes} equal sizes, here {first}"

    def _array_words(self, axis: int) -> str:
        """The array that is expected at this depth, in words."""
        dim = self._dims[axis]
        if isinstance(dim, int):
            return f"an array of {dim} {self._noun(axis, dim)}"
        return f"an array of {self._noun(axis, 2)}"

    def _noun(self, axis: int, count: int) -> str:
        """The word for an item of an array at this depth."""
        outer = "row" if axis == 0 else "array"
        noun = self._element.noun if axis == self._rank - 1 else outer
        return noun if count == 1 else f"{noun}s"


class _Element(Struct, frozen=True):
    """What an element of a datatype may be, and its name in messages."""

    noun_with_article: str
    noun: str
    types: frozenset[type]
    range: tuple[float, float] | None = None
    takes_missing_values: bool = False

    def accepts_all(self, items: list[Any]) -> bool:
        """Whether each of the elements is of an allowed type and in range.

        Checks many at once, because visiting each element of a large input is too slow.
        """
        if not self.types.issuperset(map(type, items)):
            if self.takes_missing_values:
                items = [item for item in items if not is_missing_value(item)]
            if not self.types.issuperset(map(type, items)):
                return False
        if self.range is None or not items:
            return True
        low, high = self.range
        return bool(low <= min(items) and max(items) <= high)

    def hint(self, value: object) -> str:
        """What to write instead, if the value seems to mean NaN or an infinity; else ""."""
        if self.takes_missing_values:
            if isinstance(value, _NonFinite):
                return f"; JSON has neither, write {_WORDS} or null"
            return f", or {_WORDS}" if isinstance(value, str) else ""
        is_missing = is_missing_value(value) and (value is None or str not in self.types)
        return f"; {_MISSING_VALUE_RULE}" if is_missing or isinstance(value, _NonFinite) else ""


def _element(datatype: str) -> _Element:
    """The rules for the elements of a datatype."""
    if datatype == "BOOL":
        return _Element("true or false", "boolean", frozenset({bool}))
    if datatype == "BYTES":
        return _Element("a string", "string", frozenset({str}))
    if datatype in FLOATS:
        numbers = frozenset({int, float})
        return _Element("a number", "number", numbers, RANGES[datatype], takes_missing_values=True)
    return _Element("a whole number", "whole number", frozenset({int}), RANGES[datatype])


def _as_row(items: list[object], rank: int) -> str:
    """A hint how to write a single row that was sent without a list around it; "" if it is none."""
    first = items[0]
    if rank != 2 or type(first) not in (int, float) or first in _INFINITIES:
        return ""
    shown = f"{first}"[:_SHOWN_CHARACTERS]
    return f"; one row? [[{shown}{', ...' if len(items) > 1 else ''}]]"


def _is_flat(items: list[object]) -> bool:
    """Whether a list has items, and none of them is a list or an object."""
    return bool(items) and not any(isinstance(item, list | dict) for item in items)


def _kind(value: object) -> str:
    """A parsed JSON value in words, such as `a string`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value in NONFINITE_WORDS:
        return f'"{value}"'
    return _KINDS[type(value)]


_KINDS: Final[dict[type, str]] = {
    str: "a string",
    list: "an array",
    dict: "an object",
    int: "a whole number",
    float: "a number with a decimal point",
    _NonFinite: "NaN or Infinity",
}

"""What a graph calls the classes of an output, by column: read from the nodes that make it.

Converters of scikit-learn, LightGBM, XGBoost and CatBoost write that table into a classifier's
attributes, or into a constant that the number of the highest score is looked up in.
"""

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from msgspec import Struct

from asyncinfer.models.onnx_file import DamagedFile, fields, varint

Table: TypeAlias = tuple[int | str, ...]

_MOST_NODES: Final = 20_000
_MOST_STEPS: Final = 32
_LONGEST_TABLE_BYTES: Final = 1 << 20
_MOST_TABLE_BYTES: Final = 4 << 20
"""Of all tables that are read for one model; a second or two."""

_UNCHANGED: Final = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_CLASSIFIERS: Final = frozenset({"LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"})
_LOOKUPS: Final = frozenset({"ArrayFeatureExtractor", "Gather"})
_INT32, _INT64, _STRING = 6, 7, 8
_DTYPES: Final[dict[int, "np.dtype[Any]"]] = {_INT32: np.dtype("<i4"), _INT64: np.dtype("<i8")}


class Shown(Struct, frozen=True):
    """What a graph shows of an output."""

    table: Table
    """By column what it calls the class."""
    is_only: bool
    """Whether it is the label of the only classifier among the graph's nodes, which the scores are
    of. With two heads one may be a classifier, and the scores the other's."""
    is_lowest: bool = False
    """Whether it is the place of a lowest number, as KMeans picks the least distance."""


class _Node(Struct, frozen=True):
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[int, int], ...]
    """Where each begins and ends in the file."""


def class_tables(path: Path, names: Collection[str], scored: str) -> dict[str, Shown]:
    """What the graph shows of each of these outputs; `scored` is the output of the scores."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            content = memoryview(whole)
            try:
                graph = _Graph(content)
                found = {name: graph.shown(name, scored) for name in names}
            finally:
                content.release()
    except (OSError, ValueError):  # a damaged file, or one that ONNX Runtime reads in another way
        return {}
    return {name: shown for name, shown in found.items() if shown}


class _Graph:
    """The main graph of a file: who makes a value, and its constants."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._table_bytes = 0
        self._makers: dict[str, _Node] = {}
        self._constants: dict[str, tuple[int, int]] = {}
        self._classifiers: list[_Node] = []
        for number, start, end in fields(content, 0, len(content)):
            if number == 7:
                self._read(start, end)

    def shown(self, name: str, scored: str) -> Shown | None:
        table, is_label = self._table(name, _MOST_STEPS)
        is_lowest = self._is_lowest(name)
        if not table and not is_lowest:
            return None
        is_only = is_label and self._is_of_only_classifier(scored)
        return Shown(table or (), is_only, is_lowest)

    def _is_of_only_classifier(self, scored: str) -> bool:
        """Whether the graph has one classifier, and this output is made of its scores."""
        if len(self._classifiers) != 1:
            return False
        (classifier,) = self._classifiers
        waiting, known = [scored], {scored}
        while waiting:
            node = self._makers.get(waiting.pop())
            if node is classifier:
                return True
            new = set(node.inputs) - known if node else set()
            waiting += new
            known |= new
        return False

    def _is_lowest(self, name: str) -> bool:
        for _ in range(_MOST_STEPS):
            node = self._makers.get(name)
            if node is None or len(node.inputs) < (2 if node.operator in _LOOKUPS else 1):
                return False
            if node.operator == "TopK":
                return name in node.outputs[1:] and self._takes_smallest(node)
            if node.operator not in _LOOKUPS | _UNCHANGED | {"LabelEncoder"}:
                return node.operator == "ArgMin"
            name = node.inputs[node.operator in _LOOKUPS]
        return False

    def _takes_smallest(self, node: _Node) -> bool:
        return any(
            _text(self._content, start, end, 1) == "largest"
            and [*_numbers(self._content, start, end, 3)] == [0]
            for start, end in node.attributes
        )

    def _table(self, name: str, steps: int) -> tuple[Table | None, bool]:
        """What the maker of this value calls each column, and whether that is a classifier."""
        for step in range(steps):
            node = self._makers.get(name)
            if node is None or not node.inputs:
                break
            if node.operator in _CLASSIFIERS and node.outputs[0] == name:
                return self._attribute(node, "classlabels_"), True
            if node.operator in _LOOKUPS and node.inputs[0] in self._constants:
                start, end = self._constants[node.inputs[0]]
                self._count(end - start)
                return _tensor(self._content, start, end), False
            if node.operator == "LabelEncoder":
                return self._encoded(node, steps - step - 1)
            if node.operator not in _UNCHANGED:
                break
            name = node.inputs[0]
        return None, False

    def _encoded(self, node: _Node, steps: int) -> tuple[Table | None, bool]:
        """Of the table that is looked up what becomes of each entry."""
        keys, values = self._attribute(node, "keys_"), self._attribute(node, "values_")
        if not keys or not values or len(keys) != len(values):
            return None, False
        names = dict(zip(keys, values, strict=True))
        before, is_label = self._table(node.inputs[0], steps)
        before = before or tuple(range(len(keys)))
        known = tuple(names[one] for one in before) if set(before) <= names.keys() else None
        return known, is_label

    def _read(self, start: int, end: int) -> None:
        nodes = 0
        for number, begin, stop in fields(self._content, start, end):
            if number == 1 and (nodes := nodes + 1) > _MOST_NODES:
                raise DamagedFile("too many nodes to look at")
            if number == 1:
                node = _node(self._content, begin, stop)
                self._makers |= dict.fromkeys(node.outputs, node)
                if node.operator in _CLASSIFIERS:
                    self._classifiers.append(node)
            elif number == 5 and stop - begin <= _LONGEST_TABLE_BYTES:
                self._constants[_text(self._content, begin, stop, 8)] = begin, stop

    def _count(self, table_bytes: int) -> None:
        self._table_bytes += table_bytes
        if self._table_bytes > _MOST_TABLE_BYTES:
            raise DamagedFile("too many classes to look at")

    def _attribute(self, node: _Node, prefix: str) -> Table | None:
        """The whole numbers, else the strings, of the attribute that begins like this."""
        for start, end in node.attributes:
            if _text(self._content, start, end, 1).startswith(prefix):
                self._count(end - start)
                numbers: Table = tuple(_numbers(self._content, start, end, 8))
                if found := numbers or tuple(_texts(self._content, start, end, 9)):
                    return found
        return None


def _node(content: memoryview, start: int, end: int) -> _Node:
    parts: dict[int, list[tuple[int, int]]] = {}
    for number, begin, stop in fields(content, start, end):
        parts.setdefault(number, []).append((begin, stop))
    texts = {
        number: tuple(bytes(content[begin:stop]).decode() for begin, stop in parts.get(number, ()))
        for number in (1, 2, 4)
    }
    return _Node("".join(texts[4]), texts[1], texts[2], tuple(parts.get(5, ())))


def _tensor(content: memoryview, start: int, end: int) -> Table | None:
    """The elements of a constant of whole numbers or strings."""
    (kind,) = [*_numbers(content, start, end, 2), 0][:1]
    if kind == _STRING:
        return tuple(_texts(content, start, end, 6))
    if kind not in _DTYPES:
        return None
    for number, begin, stop in fields(content, start, end):
        if number == 9:
            return tuple(np.frombuffer(content[begin:stop], _DTYPES[kind]).tolist())
    return tuple(_numbers(content, start, end, 5 if kind == _INT32 else 7))


def _text(content: memoryview, start: int, end: int, wanted: int) -> str:
    return next(iter(_texts(content, start, end, wanted)), "")


def _texts(content: memoryview, start: int, end: int, wanted: int) -> Iterator[str]:
    for number, begin, stop in fields(content, start, end):
        if number == wanted:
            yield bytes(content[begin:stop]).decode()


def _numbers(content: memoryview, at: int, end: int, wanted: int) -> Iterator[int]:
    """The signed whole numbers of a repeated field, packed or not."""
    while at < end:
        tag, at = varint(content, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = varint(content, at, end)
            if number == wanted:
                yield _signed(value)
            continue
        size, at = varint(content, at, end) if kind == 2 else (8 if kind == 1 else 4, at)
        stop = at + size
        if stop > end:
            raise DamagedFile("a field is longer than what it is in")
        while number == wanted and kind == 2 and at < stop:
            value, at = varint(content, at, stop)
            yield _signed(value)
        at = stop


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

"""The table of classes of an output, by column, read from the nodes of the graph that make it.

Converters of scikit-learn, LightGBM, XGBoost and CatBoost write it into the attributes of a
classifier, or into a constant in which the number of the highest score is looked up.
"""

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from msgspec import Struct

from asyncinfer.models.onnx_file import DamagedFile, fields, read_varint

Table: TypeAlias = tuple[int | str, ...]

_MAX_NODES: Final = 20_000
_MAX_STEPS: Final = 32
_MAX_TABLE_BYTES: Final = 1 << 20
_MAX_TOTAL_BYTES: Final = 4 << 20
"""Of all tables that are read for one model, which takes a second or two."""

_PASS_THROUGH: Final = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_CLASSIFIERS: Final = frozenset({"LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"})
_LOOKUPS: Final = frozenset({"ArrayFeatureExtractor", "Gather"})
_INT32, _INT64, _STRING = 6, 7, 8
_DTYPES: Final[dict[int, "np.dtype[Any]"]] = {_INT32: np.dtype("<i4"), _INT64: np.dtype("<i8")}


class ClassTable(Struct, frozen=True):
    """What a graph shows of an output that may be the class."""

    table: Table
    """By column the value of the output; empty if it is unknown."""
    is_only: bool
    """Whether the output is the label of the only classifier node, and the scores are of that node
    too. Of two heads one may be a classifier, and the scores may be the other's."""
    is_lowest: bool = False
    """Whether the output is the number of the lowest column, as KMeans picks the least distance."""


class _Node(Struct, frozen=True):
    """A node of the graph."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[int, int], ...]
    """Start and end of each in the file."""


def class_tables(path: Path, names: Collection[str], score_output: str) -> dict[str, ClassTable]:
    """The tables of the outputs `names`, by output; outputs without one are left out.
    `score_output` is the output with the scores. Reads the file, and never raises: a damaged file
    has no tables."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            content = memoryview(mapped)
            try:
                graph = _Graph(content)
                found = {name: graph.class_table(name, score_output) for name in names}
            finally:
                content.release()
    except (OSError, ValueError):  # a damaged file, or one that ONNX Runtime reads in another way
        return {}
    return {name: class_table for name, class_table in found.items() if class_table}


class _Graph:
    """The main graph of a file: the node that makes each value, and the constants. Its methods
    raise a ValueError if the file is damaged or there is too much to read."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._table_bytes = 0
        self._makers: dict[str, _Node] = {}
        self._constants: dict[str, tuple[int, int]] = {}
        self._classifiers: list[_Node] = []
        for number, start, end in fields(content, 0, len(content)):
            if number == 7:
                self._read_graph(start, end)

    def class_table(self, name: str, score_output: str) -> ClassTable | None:
        """The table of an output; None if the graph shows neither a table nor that it is the lowest
        column."""
        table, is_label = self._table(name, _MAX_STEPS)
        is_lowest = self._is_lowest(name)
        if not table and not is_lowest:
            return None
        is_only = is_label and self._has_only_classifier(score_output)
        return ClassTable(table or (), is_only, is_lowest)

    def _has_only_classifier(self, score_output: str) -> bool:
        """Whether the graph has one classifier node, and this output depends on it."""
        if len(self._classifiers) != 1:
            return False
        (classifier,) = self._classifiers
        pending, known = [score_output], {score_output}
        while pending:
            node = self._makers.get(pending.pop())
            if node is classifier:
                return True
            new = set(node.inputs) - known if node else set()
            pending += new
            known |= new
        return False

    def _is_lowest(self, name: str) -> bool:
        """Whether this output is the number of the lowest of several numbers."""
        for _ in range(_MAX_STEPS):
            node = self._makers.get(name)
            if node is None or len(node.inputs) < (2 if node.operator in _LOOKUPS else 1):
                return False
            if node.operator == "TopK":
                return name in node.outputs[1:] and self._takes_smallest(node)
            if node.operator not in _LOOKUPS | _PASS_THROUGH | {"LabelEncoder"}:
                return node.operator == "ArgMin"
            name = node.inputs[node.operator in _LOOKUPS]
        return False

    def _takes_smallest(self, node: _Node) -> bool:
        """Whether a TopK node has `largest` set to 0."""
        return any(
            _text(self._content, start, end, 1) == "largest"
            and [*_numbers(self._content, start, end, 3)] == [0]
            for start, end in node.attributes
        )

    def _table(self, name: str, steps: int) -> tuple[Table | None, bool]:
        """The table of the node that makes this value, None if it is unknown, and whether that node
        is a classifier. Follows at most `steps` nodes."""
        for step in range(steps):
            node = self._makers.get(name)
            if node is None or not node.inputs:
                break
            if node.operator in _CLASSIFIERS and node.outputs[0] == name:
                return self._attribute(node, "classlabels_"), True
            if node.operator in _LOOKUPS and node.inputs[0] in self._constants:
                start, end = self._constants[node.inputs[0]]
                self._count_bytes(end - start)
                return _tensor(self._content, start, end), False
            if node.operator == "LabelEncoder":
                return self._encoded_table(node, steps - step - 1)
            if node.operator not in _PASS_THROUGH:
                break
            name = node.inputs[0]
        return None, False

    def _encoded_table(self, node: _Node, steps: int) -> tuple[Table | None, bool]:
        """The table of a LabelEncoder: its input's table, with each entry encoded; None if an entry
        cannot be encoded. Second, whether it is of a classifier."""
        keys, values = self._attribute(node, "keys_"), self._attribute(node, "values_")
        if not keys or not values or len(keys) != len(values):
            return None, False
        names = dict(zip(keys, values, strict=True))
        before, is_label = self._table(node.inputs[0], steps)
        before = before or tuple(range(len(keys)))
        known = tuple(names[value] for value in before) if set(before) <= names.keys() else None
        return known, is_label

    def _read_graph(self, start: int, end: int) -> None:
        """Reads nodes and small constants; raises DamagedFile if there are too many nodes."""
        nodes = 0
        for number, begin, stop in fields(self._content, start, end):
            if number == 1 and (nodes := nodes + 1) > _MAX_NODES:
                raise DamagedFile("too many nodes to look at")
            if number == 1:
                node = _node(self._content, begin, stop)
                self._makers |= dict.fromkeys(node.outputs, node)
                if node.operator in _CLASSIFIERS:
                    self._classifiers.append(node)
            elif number == 5 and stop - begin <= _MAX_TABLE_BYTES:
                self._constants[_text(self._content, begin, stop, 8)] = begin, stop

    def _count_bytes(self, table_bytes: int) -> None:
        """Adds to the bytes read so far; raises DamagedFile if they are too many."""
        self._table_bytes += table_bytes
        if self._table_bytes > _MAX_TOTAL_BYTES:
            raise DamagedFile("too many classes to look at")

    def _attribute(self, node: _Node, prefix: str) -> Table | None:
        """The whole numbers, else the strings, of the first attribute whose name begins with
        `prefix`; None if there are none."""
        for start, end in node.attributes:
            if _text(self._content, start, end, 1).startswith(prefix):
                self._count_bytes(end - start)
                numbers: Table = tuple(_numbers(self._content, start, end, 8))
                if found := numbers or tuple(_strings_of_field(self._content, start, end, 9)):
                    return found
        return None


def _node(content: memoryview, start: int, end: int) -> _Node:
    """Reads one node at this place in the file; protobuf fields 1, 2 and 4 are inputs, outputs and
    operator."""
    parts: dict[int, list[tuple[int, int]]] = {}
    for number, begin, stop in fields(content, start, end):
        parts.setdefault(number, []).append((begin, stop))
    texts = {
        number: tuple(bytes(content[begin:stop]).decode() for begin, stop in parts.get(number, ()))
        for number in (1, 2, 4)
    }
    return _Node("".join(texts[4]), texts[1], texts[2], tuple(parts.get(5, ())))


def _tensor(content: memoryview, start: int, end: int) -> Table | None:
    """The elements of the constant in these bytes, of whole numbers or strings; None for other
    datatypes."""
    (kind,) = [*_numbers(content, start, end, 2), 0][:1]
    if kind == _STRING:
        return tuple(_strings_of_field(content, start, end, 6))
    if kind not in _DTYPES:
        return None
    for number, begin, stop in fields(content, start, end):
        if number == 9:
            return tuple(np.frombuffer(content[begin:stop], _DTYPES[kind]).tolist())
    return tuple(_numbers(content, start, end, 5 if kind == _INT32 else 7))


def _text(content: memoryview, start: int, end: int, wanted: int) -> str:
    """The first string in the protobuf field number `wanted` of these bytes; empty if there is
    none."""
    return next(iter(_strings_of_field(content, start, end, wanted)), "")


def _strings_of_field(content: memoryview, start: int, end: int, wanted: int) -> Iterator[str]:
    """The strings in field number `wanted` of the protobuf message in `content[start:end]`. Raises
    DamagedFile, and UnicodeDecodeError if one is not UTF-8."""
    for number, begin, stop in fields(content, start, end):
        if number == wanted:
            yield bytes(content[begin:stop]).decode()


def _numbers(content: memoryview, at: int, end: int, wanted: int) -> Iterator[int]:
    """The signed whole numbers of the repeated protobuf field number `wanted`, packed or not."""
    while at < end:
        tag, at = read_varint(content, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = read_varint(content, at, end)
            if number == wanted:
                yield _signed(value)
            continue
        size, at = read_varint(content, at, end) if kind == 2 else (8 if kind == 1 else 4, at)
        stop = at + size
        if stop > end:
            raise DamagedFile("a field is longer than what it is in")
        while number == wanted and kind == 2 and at < stop:
            value, at = read_varint(content, at, stop)
            yield _signed(value)
        at = stop


def _signed(value: int) -> int:
    """A varint as the signed number of 64 bits that it stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value

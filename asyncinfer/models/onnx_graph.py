"""The graph of an ONNX file: nodes, names and dimensions, read without trusting its bytes.

Weights are skipped by their length, so that a large file takes no longer than a small one.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from msgspec import Struct

from asyncinfer.models.onnx_file import NO_END, fields, mapped, read_varint

_MAX_NODES: Final = 200_000
_MAX_PARTS: Final = 4_000_000
"""Counts fields of nodes and attributes, names, and numbers."""
_MAX_DEPTH: Final = 16
"""The limit of graphs within graphs."""

_TREE_DOMAIN: Final = "ai.onnx.ml"
_VOCABULARY: Final = "TfIdfVectorizer"
"""The attributes of these operators are trees and words, millions of them, and have no graphs."""

_TENSOR, _OPTIONAL = 1, 9
"""The fields of TypeProto for these kinds of types."""

_INTEGER_ATTRIBUTES: Final = frozenset(
    {"axis", "gather_axis", "largest", "noop_with_empty_axes", "training_mode"}
)
_LIST_ATTRIBUTES: Final = frozenset({"axes", "value"})

_STRING: Final = 8
_INTEGERS: Final = {6: ("<i4", 5), 7: ("<i8", 7)}
"""By element type of a tensor, INT32 and INT64, its numpy dtype and the field of its elements."""

_RAW_DATA: Final = 9

Dims: TypeAlias = tuple[int, ...]
Span: TypeAlias = tuple[int, int]
"""Start and end of a message in the file."""
Key: TypeAlias = tuple[str, str, str]
"""Domain, name and overload of a function."""


class GraphTooLarge(ValueError):
    """The graph has more parts than the limits allow."""


class Node(Struct, frozen=True):
    """An operator or a call of a function, without the weights in its attributes."""

    domain: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    key: Key
    """The key of the function that it calls, if there is one."""
    attributes: tuple[Span, ...]
    integers: dict[str, int] = {}
    """The attributes in _INTEGER_ATTRIBUTES that it has."""
    integer_lists: dict[str, Dims] = {}
    """The attribute `axes`, and the dimensions of the tensor in a Constant's `value`."""
    graphs: list["Graph"] = []


class Tensor(Struct, frozen=True):
    """An initializer, without its elements."""

    dims: Dims
    span: Span


class Graph(Struct, frozen=True):
    """A graph, or one within a node, as its names connect its nodes."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    initializers: dict[str, Tensor]
    names_read: frozenset[str]
    """Every name that its nodes read, also in the graphs of nodes."""
    unknown_rank: frozenset[str]
    """Inputs and outputs whose type has no shape: they may have any number of dimensions."""


class Function(Struct, frozen=True):
    """A function of the file, which nodes call by its key."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]


class OnnxFile(Struct, frozen=True):
    """The graph of a file and the functions that it defines."""

    graph: Graph
    functions: dict[Key, Function]


def read(path: Path) -> OnnxFile:
    """The graph of a file; raises GraphTooLarge, DamagedFile (ValueError if it is empty) or
    OSError."""
    with mapped(path) as content:
        return read_content(content)


def read_content(content: memoryview) -> OnnxFile:
    """The graph in the bytes of a file; raises GraphTooLarge or DamagedFile."""
    return _Reader(content).file()


class _Reader:
    """Reads one file, and counts its parts over all graphs for the limits.

    The numbers of fields are those of onnx.proto. Of its methods `begin` and `end`, or `start` and
    `stop`, are the bounds of a message in the file; `depth` counts graphs within graphs. They raise
    GraphTooLarge and DamagedFile.
    """

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._nodes = 0
        self._parts = 0

    def file(self) -> OnnxFile:
        outermost = self._spans(0, len(self._content))
        functions = dict(self._function(*span) for span in outermost.get(25, ()))
        return OnnxFile(self._graph(outermost.get(7, ()), 0), functions)

    def _graph(self, spans: Sequence[Span], depth: int) -> Graph:
        """The graph in these bounds; protobuf merges one that occurs several times."""
        if depth > _MAX_DEPTH:
            raise GraphTooLarge
        inputs: list[str] = []
        nodes: list[Node] = []
        initializers: dict[str, Tensor] = {}
        shaped: dict[str, bool] = {}
        for number, start, stop in chain(*(fields(self._content, *span) for span in spans)):
            if number == 1:
                nodes.append(self._node(start, stop, depth))
            elif number == 5:
                name, dims = self._tensor(start, stop)
                initializers[name] = Tensor(dims, (start, stop))
            elif number in (11, 12):
                name, has_shape = self._value(start, stop)
                shaped[name] = shaped.get(name, False) or has_shape
                if number == 11:
                    inputs.append(name)
        names_read = {name for node in nodes for name in node.inputs}
        names_read.update(*(graph.names_read for node in nodes for graph in node.graphs))
        unknown_rank = frozenset(name for name, has_shape in shaped.items() if not has_shape)
        return Graph(tuple(inputs), tuple(nodes), initializers, frozenset(names_read), unknown_rank)

    def _function(self, begin: int, end: int) -> tuple[Key, Function]:
        spans = self._spans(begin, end)
        key = (_domain(self._text(spans, 10)), self._text(spans, 1), self._text(spans, 13))
        nodes = tuple(self._node(*span, 0) for span in spans.get(7, ()))
        return key, Function(self._texts(spans, 4), self._texts(spans, 5), nodes)

    def _node(self, begin: int, end: int, depth: int) -> Node:
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise GraphTooLarge
        spans = self._spans(begin, end)
        domain, operator = _domain(self._text(spans, 7)), self._text(spans, 4)
        key = (domain, operator, self._text(spans, 8))
        attributes = tuple(spans.get(5, ()))
        inputs, outputs = self._texts(spans, 1), self._texts(spans, 2)
        node = Node(domain, operator, inputs, outputs, key, attributes)
        if domain != _TREE_DOMAIN and operator != _VOCABULARY:
            for span in attributes:
                self._add_attribute(node, *span, depth)
        return node

    def _add_attribute(self, node: Node, begin: int, end: int, depth: int) -> None:
        """Adds an attribute to the node, if it is one that is kept or has graphs."""
        name = ""
        numbers: list[int] = []
        value: int | None = None
        dims: Dims | None = None
        for number, start, stop in fields(self._content, begin, end, with_numbers=True):
            self._count(1)
            if number == 1 and stop != NO_END:
                name = self._decode(start, stop)
            elif number == 3 and stop == NO_END:
                value = _signed(start)
            elif number == 5 and stop != NO_END:
                _, dims = self._tensor(start, stop)
            elif number == 8:
                numbers += self._integers(start, stop)
            elif number in (6, 11) and stop != NO_END:
                node.graphs.append(self._graph([(start, stop)], depth + 1))
        if value is not None and name in _INTEGER_ATTRIBUTES:
            node.integers[name] = value
        if name in _LIST_ATTRIBUTES:
            node.integer_lists[name] = tuple(numbers) if dims is None else dims

    def _tensor(self, begin: int, end: int) -> tuple[str, Dims]:
        """The name and the dimensions of a tensor; its elements are skipped."""
        name = ""
        dims: list[int] = []
        for number, start, stop in fields(self._content, begin, end, with_numbers=True):
            if number == 1:
                dims += self._integers(start, stop)
            elif number == 8 and stop != NO_END:
                name = self._decode(start, stop)
        return name, tuple(dims)

    def _value(self, begin: int, end: int) -> tuple[str, bool]:
        """The name of an input or output, and whether its type has a shape."""
        spans = self._spans(begin, end)
        return self._text(spans, 1), any(self._has_shape(*span, 0) for span in spans.get(2, ()))

    def _has_shape(self, begin: int, end: int, depth: int) -> bool:
        """Whether a type has a shape; for an optional, whether the type of its element has one."""
        if depth > _MAX_DEPTH:
            raise GraphTooLarge
        for number, start, stop in fields(self._content, begin, end):
            if number not in (_TENSOR, _OPTIONAL):
                continue
            for inner, first, last in fields(self._content, start, stop):
                if number == _TENSOR and inner == 2:
                    return True
                if number == _OPTIONAL and inner == 1 and self._has_shape(first, last, depth + 1):
                    return True
        return False

    def _spans(self, begin: int, end: int) -> dict[int, list[Span]]:
        """By number the fields of a message."""
        spans: dict[int, list[Span]] = {}
        for number, start, stop in fields(self._content, begin, end):
            self._count(1)
            spans.setdefault(number, []).append((start, stop))
        return spans

    def _text(self, spans: Mapping[int, Sequence[Span]], number: int) -> str:
        """The text of this field, of several the last one; empty if there is none."""
        return self._decode(*spans[number][-1]) if number in spans else ""

    def _texts(self, spans: Mapping[int, Sequence[Span]], number: int) -> tuple[str, ...]:
        return tuple(self._decode(*span) for span in spans.get(number, ()))

    def _decode(self, start: int, stop: int) -> str:
        """The text in these bounds; bytes that are not UTF-8 become surrogates."""
        self._count(1)
        return str(self._content[start:stop], "utf-8", "surrogateescape")

    def _integers(self, start: int, stop: int) -> Iterator[int]:
        """As the function, counted: of packed numbers as if each had one byte."""
        self._count(1 if stop == NO_END else stop - start)
        return _integers(self._content, start, stop)

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > _MAX_PARTS:
            raise GraphTooLarge


def _domain(name: str) -> str:
    """The domain of an operator; the default one has two names, of which "" is returned."""
    return "" if name == "ai.onnx" else name


# --- values ------------------------------------------------------------------------------------


def attribute_name(content: memoryview, span: Span) -> str:
    """The name of an attribute; these functions raise DamagedFile, or UnicodeDecodeError for a text
    that is not UTF-8."""
    return next(_strings(content, span, 1), "")


def attribute_values(content: memoryview, span: Span) -> tuple[int | str, ...]:
    """The whole numbers, else the strings, of an attribute that is a list."""
    return tuple(_numbers(content, span, 8)) or tuple(_strings(content, span, 9))


def tensor_values(content: memoryview, span: Span) -> tuple[int | str, ...]:
    """The elements of a tensor of whole numbers or strings; empty for other datatypes."""
    kind = next(_numbers(content, span, 2), 0)
    if kind == _STRING:
        return tuple(_strings(content, span, 6))
    if kind not in _INTEGERS:
        return ()
    dtype, field_number = _INTEGERS[kind]
    for number, start, stop in fields(content, *span):
        if number == _RAW_DATA:
            return tuple(np.frombuffer(content[start:stop], np.dtype(dtype)).tolist())
    return tuple(_numbers(content, span, field_number))


def _strings(content: memoryview, span: Span, wanted: int) -> Iterator[str]:
    for number, start, stop in fields(content, *span):
        if number == wanted:
            yield str(content[start:stop], "utf-8")


def _numbers(content: memoryview, span: Span, wanted: int) -> Iterator[int]:
    """The whole numbers of a field, packed or not."""
    for number, start, stop in fields(content, *span, with_numbers=True):
        if number == wanted:
            yield from _integers(content, start, stop)


def _integers(content: memoryview, start: int, stop: int) -> Iterator[int]:
    """The values of a repeated field: `start` itself if `stop` is NO_END, else packed ones."""
    if stop == NO_END:
        yield _signed(start)
        return
    at = start
    while at < stop:
        value, at = read_varint(content, at, stop)
        yield _signed(value)


def _signed(value: int) -> int:
    """The value of an int64, whose varint in protobuf is read without a sign."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value

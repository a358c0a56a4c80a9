"""The graph of an ONNX file: nodes, names and dimensions, read without trusting its bytes.

Weights are skipped by their length, so that a large file takes no longer than a small one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from asyncinfer.models.onnx_file import NO_END, fields, mapped, read_varint

_MAX_NODES: Final = 200_000
_MAX_NAMES: Final = 2_000_000
_MAX_NUMBERS: Final = 2_000_000
"""Counts fields of attributes, and dimensions."""
_MAX_DEPTH: Final = 16
"""The limit of graphs within graphs."""

_TREE_DOMAIN: Final = "ai.onnx.ml"
"""The attributes of its operators are trees, with millions of numbers, and have no graphs."""

_TENSOR, _OPTIONAL = 1, 9
"""The fields of TypeProto for these kinds of types."""

_INTEGER_ATTRIBUTES: Final = frozenset(
    {"axis", "gather_axis", "noop_with_empty_axes", "training_mode"}
)
_LIST_ATTRIBUTES: Final = frozenset({"axes", "value"})

Dims = tuple[int, ...]


class GraphTooLarge(ValueError):
    """The graph has more parts than the limits allow."""


class Node(Struct, frozen=True):
    """An operator or a call of a function, without the weights in its attributes."""

    domain: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: dict[str, int]
    """The attributes in _INTEGER_ATTRIBUTES that it has."""
    integer_lists: dict[str, Dims]
    """The attribute `axes`, and the dimensions of the tensor in a Constant's `value`."""
    graphs: tuple["Graph", ...]
    key: tuple[str, str, str]
    """Domain, name and overload: the key of the function that it calls, if there is one."""


class Graph(Struct, frozen=True):
    """A graph, or one within a node, as its names connect its nodes."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    initializers: dict[str, Dims]
    """The dimensions of each initializer."""
    names_read: frozenset[str]
    """Every name that its nodes read, also in the graphs of nodes."""


class OnnxFile(Struct, frozen=True):
    """The graph of a file and the functions that it defines."""

    graph: Graph
    functions: dict[tuple[str, str, str], "Function"]
    unknown_rank: frozenset[str]
    """Inputs and outputs whose type has no shape: they may have any number of dimensions."""


class Function(Struct, frozen=True):
    """A function of the file, which nodes call by its key."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]


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

    Of its methods `begin` and `end`, or `start` and `stop`, are the bounds of a message in the
    file; `depth` counts graphs within graphs. They raise GraphTooLarge and DamagedFile.
    """

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._nodes = 0
        self._names = 0
        self._numbers = 0

    def file(self) -> OnnxFile:
        """The whole file."""
        graph = _Parts()
        functions = {}
        for number, begin, end in fields(self._content, 0, len(self._content)):
            if number == 7:  # protobuf merges a field that occurs twice
                self._add_graph(graph, begin, end, 0)
            elif number == 25:
                key, function = self._function(begin, end)
                functions[key] = function
        of_any_rank = frozenset(name for name, has_shape in graph.shaped.items() if not has_shape)
        return OnnxFile(graph.build(), functions, of_any_rank)

    def _graph(self, begin: int, end: int, depth: int) -> Graph:
        """The graph in these bounds, which is within a node."""
        if depth > _MAX_DEPTH:
            raise GraphTooLarge
        parts = _Parts()
        self._add_graph(parts, begin, end, depth)
        return parts.build()

    def _add_graph(self, parts: "_Parts", begin: int, end: int, depth: int) -> None:
        """Adds the parts of a graph in these bounds to `parts`."""
        for number, start, stop in fields(self._content, begin, end):
            if number == 1:
                parts.nodes.append(self._node(start, stop, depth))
            elif number == 5:
                name, dims = self._tensor(start, stop)
                parts.tables[name] = dims
            elif number in (11, 12):
                name, has_shape = self._value(start, stop)
                parts.shaped[name] = parts.shaped.get(name, False) or has_shape
                if number == 11:
                    parts.inputs.append(name)

    def _function(self, begin: int, end: int) -> tuple[tuple[str, str, str], "Function"]:
        """A function and its key: domain, name and overload."""
        words = {1: "", 10: "", 13: ""}
        names: dict[int, list[str]] = {4: [], 5: []}
        nodes = []
        for number, start, stop in fields(self._content, begin, end):
            if number in words:
                words[number] = self._text(start, stop)
            elif number in names:
                names[number].append(self._text(start, stop))
            elif number == 7:
                nodes.append(self._node(start, stop, 0))
        key = (_domain(words[10]), words[1], words[13])
        return key, Function(tuple(names[4]), tuple(names[5]), tuple(nodes))

    def _node(self, begin: int, end: int, depth: int) -> Node:
        """The node in these bounds."""
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise GraphTooLarge
        words = {4: "", 7: "", 8: ""}
        names: dict[int, list[str]] = {1: [], 2: []}
        spans = []
        for number, start, stop in fields(self._content, begin, end):
            if number in words:
                words[number] = self._text(start, stop)
            elif number in names:
                names[number].append(self._text(start, stop))
            elif number == 5:
                spans.append((start, stop))
        domain = _domain(words[7])
        attributes = _Attributes()
        if domain != _TREE_DOMAIN:
            for start, stop in spans:
                self._add_attribute(attributes, start, stop, depth)
        return Node(
            domain,
            words[4],
            tuple(names[1]),
            tuple(names[2]),
            attributes.numbers,
            attributes.lists,
            tuple(attributes.graphs),
            (domain, words[4], words[8]),
        )

    def _add_attribute(self, attributes: "_Attributes", begin: int, end: int, depth: int) -> None:
        """Adds an attribute to `attributes`, if it is one that is kept or has graphs."""
        name = ""
        numbers: list[int] = []
        value: int | None = None
        dims: Dims | None = None
        for number, start, stop in fields(self._content, begin, end, with_numbers=True):
            self._count_number()
            if number == 1 and stop != NO_END:
                name = self._text(start, stop)
            elif number == 3 and stop == NO_END:
                value = _signed(start)
            elif number == 5 and stop != NO_END:
                _, dims = self._tensor(start, stop)
            elif number == 8:
                numbers += self._integers(start, stop)
            elif number in (6, 11) and stop != NO_END:
                attributes.graphs.append(self._graph(start, stop, depth + 1))
        if value is not None and name in _INTEGER_ATTRIBUTES:
            attributes.numbers[name] = value
        if name in _LIST_ATTRIBUTES:
            attributes.lists[name] = tuple(numbers) if dims is None else dims

    def _tensor(self, begin: int, end: int) -> tuple[str, Dims]:
        """The name and the dimensions of a tensor; its elements are skipped."""
        name = ""
        dims: list[int] = []
        for number, start, stop in fields(self._content, begin, end, with_numbers=True):
            if number == 1:
                dims += self._integers(start, stop)
            elif number == 8 and stop != NO_END:
                name = self._text(start, stop)
        return name, tuple(dims)

    def _integers(self, start: int, stop: int) -> Iterator[int]:
        """The values of a repeated field: `start` itself if `stop` is NO_END, else packed ones."""
        if stop == NO_END:
            yield _signed(start)
            return
        at = start
        while at < stop:
            self._count_number()
            value, at = read_varint(self._content, at, stop)
            yield _signed(value)

    def _count_number(self) -> None:
        """Counts a number; raises GraphTooLarge beyond the limit."""
        self._numbers += 1
        if self._numbers > _MAX_NUMBERS:
            raise GraphTooLarge

    def _value(self, begin: int, end: int) -> tuple[str, bool]:
        """The name of an input or output, and whether its type has a shape."""
        name, has_shape = "", False
        for number, start, stop in fields(self._content, begin, end):
            if number == 1:
                name = self._text(start, stop)
            elif number == 2:
                has_shape = has_shape or self._has_shape(start, stop, 0)
        return name, has_shape

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

    def _text(self, start: int, stop: int) -> str:
        """The text in these bounds, which counts as a name.

        Bytes that are not UTF-8 become surrogates.
        """
        self._names += 1
        if self._names > _MAX_NAMES:
            raise GraphTooLarge
        return str(self._content[start:stop], "utf-8", "surrogateescape")


class _Attributes:
    """The attributes of a node while it is read."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.lists: dict[str, Dims] = {}
        self.graphs: list[Graph] = []


class _Parts:
    """The parts of a graph while it is read."""

    def __init__(self) -> None:
        self.inputs: list[str] = []
        self.nodes: list[Node] = []
        self.tables: dict[str, Dims] = {}
        self.shaped: dict[str, bool] = {}

    def build(self) -> Graph:
        """The graph of the parts so far."""
        reads = {name for node in self.nodes for name in node.inputs}
        reads.update(*(graph.names_read for node in self.nodes for graph in node.graphs))
        return Graph(tuple(self.inputs), tuple(self.nodes), self.tables, frozenset(reads))


def _domain(name: str) -> str:
    """The domain of an operator; the default one has two names, of which "" is returned."""
    return "" if name == "ai.onnx" else name


def _signed(value: int) -> int:
    """The value of an int64, whose varint in protobuf is read without a sign."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value

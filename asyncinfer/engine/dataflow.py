"""What a graph does with the values of its inputs, as far as batching must know. Pure.

Only what makes the rows of a run depend on each other by so little that made-up rows may not show
it, and which inputs are row numbers of a table.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from asyncinfer.models.onnx_graph import Dims, File, Function, Graph, Node, TooLarge

_MOST_STEPS: Final = 5_000_000
_MOST_PASSES: Final = 20
"""Over nodes that are not sorted, each pass settles at least one more."""

_DEEPEST: Final = 116
"""Functions and graphs that are followed within each other; ONNX Runtime loads no more than 100
functions."""

_SHAPES: Final = frozenset({"Shape", "Size"})
"""Operators that look at no values."""

_SAME_NUMBERS: Final = frozenset(
    {"Cast", "CastLike", "Clip", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape"}
    | {"Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators whose first input's numbers are all that their outputs have."""

_SAME_DIMS: Final = frozenset({"Cast", "CastLike", "DequantizeLinear", "Identity"})

_LOOKUPS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    "Gather": ((0, 1),),
    "GatherBlockQuantized": ((0, 1),),
    "EmbedLayerNormalization": ((2, 0), (4, 1), (3, 8)),
    "QEmbedLayerNormalization": ((2, 0), (4, 1)),
}
"""Per operator which of its inputs is a table, and which are row numbers of it."""

_SIZES: Final[Mapping[str, tuple[int, ...]]] = {
    **dict.fromkeys(("ConstantOfShape", "Range", "EyeLike"), (0, 1, 2)),
    **dict.fromkeys(("Expand", "Reshape", "TopK", "Tile", "Pad", "Split", "OneHot"), (1,)),
    "Slice": (1, 2, 3, 4),
    "Resize": (2, 3),
    "Loop": (0,),
}
"""Per operator which of its inputs say how large something is to be. What is made as long as the
longest row of a run is usual, and is masked for the others."""

_ONNX: Final = frozenset({"", "com.microsoft"})
"""Domains whose operators of these names are known."""


class Flow(Struct, frozen=True):
    mixers: Mapping[str, frozenset[str]] = {}
    """Operators that use one statistic of all rows of a run, each with the inputs of the graph
    that it is fed from."""
    heights: Mapping[str, int] = {}
    """Of inputs that are row numbers of tables, the number of rows of the lowest one."""
    unread: bool = False
    """Whether the graph was too large to be followed, so that nothing is known."""

    def mixer(self, inputs: frozenset[str]) -> str:
        """An operator that is fed from any of these inputs; empty where there is none."""
        return next((name for name, fed in self.mixers.items() if fed & inputs), "")


def of_file(file: File, outputs: Collection[str] = ()) -> Flow:
    """What the nodes do that these outputs need, or all nodes."""
    try:
        needed = _needed(file.graph, outputs) if outputs else file.graph
        found = _Follower(file.functions).graph(needed)
    except TooLarge:
        return Flow(unread=True)
    names = file.graph.inputs
    heights: dict[str, int] = {}
    for height, ids in found.lookups:
        if isinstance(height, int) and height > 0:
            for name in _named(ids, names):
                heights[name] = min(height, heights.get(name, height))
    mixers = {name: frozenset(_named(mask, names)) for name, mask in found.mixers.items() if mask}
    return Flow(mixers, heights)


def _needed(graph: Graph, outputs: Collection[str]) -> Graph:
    """The graph without nodes whose values are not asked for."""
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    waiting = [makers[name] for name in outputs if name in makers]
    kept: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in kept:
            continue
        kept.add(id(node))
        reads = itertools.chain(node.inputs, *(inner.reads for inner in node.graphs))
        waiting += [makers[name] for name in reads if name in makers]
    nodes = tuple(node for node in graph.nodes if id(node) in kept)
    return Graph(graph.inputs, nodes, graph.tables, graph.reads)


def _named(mask: int, names: Sequence[str]) -> list[str]:
    return [name for at, name in enumerate(names) if mask >> at & 1]


class _Table(Struct, frozen=True):
    """What is known of a value that is a table: its dimensions, or which input it is."""

    dims: Dims = ()
    source: int = 0
    """A mask of the function's input that it is, whose dimensions its callers know."""


class _Value(Struct, frozen=True):
    """Masks of inputs: bit n stands for the n-th input of the graph or function."""

    fed: int = 0
    """Inputs whose values decide this one."""
    same: int = 0
    """Inputs of whose very numbers it is made."""
    table: _Table | None = None
    overall: int = 0
    """Inputs of all of whose numbers it is one statistic, such as the largest."""


_UNKNOWN: Final = _Value()

Lookup = tuple[int | tuple[int, int], int]
"""The height of a table, or the input that it is and the axis; and a mask of the row numbers."""


class _Summary(Struct, frozen=True):
    """What a graph or function does, in terms of its inputs."""

    outputs: tuple[_Value, ...]
    mixers: dict[str, int]
    lookups: frozenset[Lookup]


class _Scope(Struct):
    """The values of a graph, and around it those of the graph that it is in."""

    values: dict[str, _Value]
    outer: "_Scope | None" = None


class _Follower:
    def __init__(self, functions: Mapping[tuple[str, str, str], Function]) -> None:
        self._functions = functions
        self._summaries: dict[tuple[str, str, str], _Summary] = {}
        self._steps = 0
        self._depth = 0

    def graph(self, graph: Graph) -> _Summary:
        tables = _tables(graph)
        self.step(len(graph.nodes) * (len(graph.inputs) // 64 + 1))
        fed = {
            name: _Value(1 << at, 1 << at, tables[name].table if name in tables else None)
            for at, name in enumerate(graph.inputs)
        }
        return self._settled(graph.nodes, {**tables, **fed}, ())

    def _function(self, key: tuple[str, str, str]) -> _Summary:
        if key not in self._summaries:
            function = self._functions[key]
            # One that calls itself finds this; no such file can be loaded.
            self._summaries[key] = _Summary((_UNKNOWN,) * len(function.outputs), {}, frozenset())
            self.step(len(function.nodes) * (len(function.inputs) // 64 + 1))
            values = {
                name: _Value(1 << at, 1 << at, _Table(source=1 << at))
                for at, name in enumerate(function.inputs)
            }
            self._summaries[key] = self._settled(function.nodes, values, function.outputs)
        return self._summaries[key]

    def _settled(
        self, nodes: Sequence[Node], values: dict[str, _Value], outputs: Sequence[str]
    ) -> _Summary:
        """Follows the nodes until nothing changes: at once where they are sorted."""
        scope = _Scope(values)
        inner: dict[int, _Scope] = {}
        early: set[tuple[int, str]] = set()
        for _ in range(_MOST_PASSES):
            found = _Pass(self, inner, early)
            found.follow(nodes, scope)
            if not found.too_early:
                ends = tuple(scope.values.get(name, _UNKNOWN) for name in outputs)
                return _Summary(ends, found.mixers, frozenset(found.lookups))
        raise TooLarge

    def called(self, node: Node) -> _Summary | None:
        return self._function(node.key) if node.key in self._functions else None

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Raises TooLarge where graphs and functions are within too many others."""
        if self._depth == _DEEPEST:
            raise TooLarge
        self._depth += 1
        yield
        self._depth -= 1

    def step(self, count: int = 1) -> None:
        """Raises TooLarge once there were too many steps."""
        self._steps += count
        if self._steps > _MOST_STEPS:
            raise TooLarge


class _Pass:
    """One pass over the nodes of a graph or function and of the graphs within it."""

    def __init__(
        self, follower: _Follower, inner: dict[int, _Scope], early: set[tuple[int, str]]
    ) -> None:
        self._follower = follower
        self._inner = inner
        """Of each graph within another its values, which the next pass goes on with."""
        self._early = early
        """Names, each with its scope, that were read before the node that gives them, in any pass
        so far; or that are given further outside."""
        self.too_early = False
        """Whether one of them has got another value since."""
        self.mixers: dict[str, int] = {}
        self.lookups: set[Lookup] = set()

    def follow(self, nodes: Sequence[Node], scope: _Scope) -> None:
        with self._follower.deeper():
            self._follow(nodes, scope)

    def _follow(self, nodes: Sequence[Node], scope: _Scope) -> None:
        for node in nodes:
            inputs = [self._value(name, scope) for name in node.inputs]
            captured = self._graphs(node, inputs, scope)
            outputs = self._outputs(node, inputs, captured)
            for name, value in zip(node.outputs, outputs, strict=True):
                if (id(scope), name) in self._early and scope.values.get(name) != value:
                    self.too_early = True
                scope.values[name] = value

    def _value(self, name: str, scope: _Scope | None) -> _Value:
        around: _Scope | None = scope
        while around is not None:
            self._follower.step()
            if name in around.values:
                return around.values[name]
            self._early.add((id(around), name))
            around = around.outer
        return _UNKNOWN

    def _graphs(self, node: Node, inputs: Sequence[_Value], scope: _Scope) -> int:
        """Follows the graphs within a node; gives what they read of the values around them.

        Anything that goes in may come back in a later turn of a loop, so all of it is what the
        graph's inputs are made of.
        """
        captured = 0
        for graph in node.graphs:
            for name in graph.reads:
                if name not in graph.tables:
                    captured |= self._value(name, scope).fed
        fed = _fed(inputs) | captured
        for graph in node.graphs:
            within = self._inner.setdefault(id(graph), _Scope({}, scope))
            within.values.update((name, _Value(fed)) for name in graph.inputs)
            within.values.update(_tables(graph))
            self.follow(graph.nodes, within)
        return captured

    def _outputs(self, node: Node, inputs: Sequence[_Value], captured: int) -> list[_Value]:
        if (summary := self._follower.called(node)) is not None:
            self._mix(node, inputs, captured)
            return self._of_call(node, summary, inputs)
        self._mix(node, inputs, captured)
        if node.domain not in _ONNX:
            return [_Value(_fed(inputs) | captured)] * len(node.outputs)
        if node.operator in _SHAPES:
            return [_UNKNOWN] * len(node.outputs)
        self._look_up(node, inputs)
        first = inputs[0] if inputs else _UNKNOWN
        same = 0
        if node.operator == "Concat":
            for value in inputs:
                same |= value.same
        elif node.operator in _SAME_NUMBERS:
            same = first.same
        table = first.table if node.operator in _SAME_DIMS else None
        if node.operator == "Constant" and "value" in node.lists:
            table = _Table(node.lists["value"])
        fed = _fed(inputs) | captured
        overall = fed if _is_of_all(node) else self._overall(node, inputs)
        return [_Value(fed, same, table, overall)] * len(node.outputs)

    def _overall(self, node: Node, inputs: Sequence[_Value]) -> int:
        """Of what this gives, if it is made of nothing else than statistics of all rows."""
        overall = 0
        for at, value in enumerate(inputs):
            if at not in _SIZES.get(node.operator, ()):
                overall |= value.overall
        return overall

    def _mix(self, node: Node, inputs: Sequence[_Value], captured: int) -> None:
        fed = 0
        if node.operator.startswith("DynamicQuantize"):
            fed = _fed(inputs)
        elif node.operator == "QuantizeLinear" and len(inputs) > 1:
            # By a scale that is itself computed, which is what DynamicQuantizeLinear consists of.
            fed = inputs[1].fed
        elif node.operator == "MeanVarianceNormalization":
            fed = _fed(inputs) if 0 in node.lists.get("axes", (0,)) else 0
        elif node.operator == "BatchNormalization" and node.numbers.get("training_mode"):
            fed = _fed(inputs)
        elif captured or any(value.fed and not value.overall for value in inputs):
            # Such as the largest number of a run, by which all are divided.
            fed = self._overall(node, inputs)
        if fed:
            self.mixers[node.operator] = self.mixers.get(node.operator, 0) | fed

    def _look_up(self, node: Node, inputs: Sequence[_Value]) -> None:
        axis = node.numbers.get("axis", node.numbers.get("gather_axis", 0))
        for at, ids in _LOOKUPS.get(node.operator, ()):
            if max(at, ids) >= len(inputs) or not inputs[ids].same:
                continue
            table = inputs[at].table
            if table is None:
                continue
            if table.source:
                self.lookups.add(((table.source, axis), inputs[ids].same))
            elif -len(table.dims) <= axis < len(table.dims):
                self.lookups.add((table.dims[axis], inputs[ids].same))

    def _of_call(self, node: Node, summary: _Summary, inputs: Sequence[_Value]) -> list[_Value]:
        """What a function gives for these inputs."""
        for name, mask in summary.mixers.items():
            if fed := self._through(mask, inputs).fed:
                self.mixers[name] = self.mixers.get(name, 0) | fed
        for height, mask in summary.lookups:
            if not (same := self._through(mask, inputs).same):
                continue
            if isinstance(height, int):
                self.lookups.add((height, same))
                continue
            source, axis = height
            table = self._through(source, inputs).table
            if table is not None and table.source:
                self.lookups.add(((table.source, axis), same))
            elif table is not None and -len(table.dims) <= axis < len(table.dims):
                self.lookups.add((table.dims[axis], same))
        given = [self._of_output(value, inputs) for value in summary.outputs]
        return (given + [_UNKNOWN] * len(node.outputs))[: len(node.outputs)]

    def _of_output(self, value: _Value, inputs: Sequence[_Value]) -> _Value:
        table = value.table
        if table is not None and table.source:
            table = self._through(table.source, inputs).table
        fed, same = self._through(value.fed, inputs).fed, self._through(value.same, inputs).same
        return _Value(fed, same, table, self._through(value.overall, inputs).fed)

    def _through(self, mask: int, inputs: Sequence[_Value]) -> _Value:
        """All of the inputs of this mask together; the table of the first."""
        fed = same = 0
        table = None
        while mask:
            at = (mask & -mask).bit_length() - 1
            mask &= mask - 1
            self._follower.step()
            if at < len(inputs):
                fed, same = fed | inputs[at].fed, same | inputs[at].same
                table = table or inputs[at].table
        return _Value(fed, same, table)


def _is_of_all(node: Node) -> bool:
    """Whether it reduces all dimensions, and so the rows."""
    return (
        node.operator.startswith("Reduce")
        and not any(node.inputs[1:])
        and not node.lists.get("axes")
        and not node.numbers.get("noop_with_empty_axes")
    )


def _tables(graph: Graph) -> dict[str, _Value]:
    return {name: _Value(table=_Table(dims)) for name, dims in graph.tables.items()}


def _fed(values: Sequence[_Value]) -> int:
    fed = 0
    for value in values:
        fed |= value.fed
    return fed

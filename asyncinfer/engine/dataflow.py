"""Data flow in a graph, as far as batching must know it; without I/O.

It finds operators that make the rows of a run depend on each other so little that made-up rows may
not show it, and inputs that are row numbers of a table.
"""

import functools
import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from asyncinfer.models.onnx_graph import Dims, Function, Graph, GraphTooLarge, Node, OnnxFile

_MAX_STEPS: Final = 5_000_000
_MAX_PASSES: Final = 20
"""Passes over nodes that are not sorted; each pass completes at least one more node."""

_MAX_DEPTH: Final = 116
"""How deep functions and graphs are followed within each other; ONNX Runtime loads no more than
100 functions."""

_SHAPES: Final = frozenset({"Shape", "Size"})
"""Operators whose outputs do not depend on values."""

_SAME_NUMBERS: Final = frozenset(
    {"Cast", "CastLike", "Clip", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape"}
    | {"Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators whose outputs have only numbers of their first input."""

_SAME_DIMS: Final = frozenset({"Cast", "CastLike", "DequantizeLinear", "Identity"})

_LOOKUPS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    "Gather": ((0, 1),),
    "GatherBlockQuantized": ((0, 1),),
    "EmbedLayerNormalization": ((2, 0), (4, 1), (3, 8)),
    "QEmbedLayerNormalization": ((2, 0), (4, 1)),
}
"""By operator, pairs of inputs by position: a table, and row numbers of it."""

_SIZES: Final[Mapping[str, tuple[int, ...]]] = {
    **dict.fromkeys(("ConstantOfShape", "Range", "EyeLike"), (0, 1, 2)),
    **dict.fromkeys(("Expand", "Reshape", "TopK", "Tile", "Pad", "Split", "OneHot"), (1,)),
    "Slice": (1, 2, 3, 4),
    "Resize": (2, 3),
    "Loop": (0,),
}
"""By operator, the inputs (by position) that give a size. Sizes are left out of the statistics over
all rows: padding to the longest row of a run is usual, and is masked for the others."""

_ONNX: Final = frozenset({"", "com.microsoft"})
"""Domains whose operators of these names are known."""


class Flow(Struct, frozen=True):
    """What is known of the data flow in a graph."""

    mixers: Mapping[str, frozenset[str]] = {}
    """By operator that uses one statistic of all rows of a run, the inputs of the graph that feed
    it."""
    heights: Mapping[str, int] = {}
    """By input that is row numbers of tables, the number of rows of the smallest table."""
    is_unread: bool = False
    """Whether the graph was too large to be followed, so that nothing is known."""

    def mixer(self, inputs: frozenset[str]) -> str:
        """The name of an operator that mixes rows of any of these inputs; empty if there is
        none."""
        return next((name for name, fed in self.mixers.items() if fed & inputs), "")


def read_flow(file: OnnxFile, outputs: Collection[str] = ()) -> Flow:
    """Follows the nodes that these outputs need, or all nodes if none are named. Never raises: a
    graph that is too large gives a Flow that is unread."""
    try:
        needed = _needed_nodes(file.graph, outputs) if outputs else file.graph
        found = _GraphFollower(file.functions).graph(needed)
    except GraphTooLarge:
        return Flow(is_unread=True)
    names = file.graph.inputs
    heights: dict[str, int] = {}
    for height, ids in found.lookups:
        if isinstance(height, int) and height > 0:
            for name in _names_in_mask(ids, names):
                heights[name] = min(height, heights.get(name, height))
    mixers = {
        name: frozenset(_names_in_mask(mask, names)) for name, mask in found.mixers.items() if mask
    }
    return Flow(mixers, heights)


def _needed_nodes(graph: Graph, outputs: Collection[str]) -> Graph:
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    pending = [makers[name] for name in outputs if name in makers]
    kept: set[int] = set()
    while pending:
        node = pending.pop()
        if id(node) in kept:
            continue
        kept.add(id(node))
        reads = itertools.chain(
            node.inputs, *(inner_scopes.names_read for inner_scopes in node.graphs)
        )
        pending += [makers[name] for name in reads if name in makers]
    nodes = tuple(node for node in graph.nodes if id(node) in kept)
    return msgspec.structs.replace(graph, nodes=nodes)


def _names_in_mask(mask: int, names: Sequence[str]) -> list[str]:
    """The names whose bits are set: bit n stands for the n-th name."""
    return [name for at, name in enumerate(names) if mask >> at & 1]


class _Table(Struct, frozen=True):
    """What is known of a value that may be a table: its dimensions, or which input it is."""

    dims: Dims = ()
    source: int = 0
    """Within a function, the mask of the input that it is; the caller knows its dimensions."""


class _Value(Struct, frozen=True):
    """Where a value comes from, as masks: bit n stands for the n-th input of the graph or
    function."""

    fed: int = 0
    """The inputs on which the value depends."""
    same: int = 0
    """The inputs whose numbers it has unchanged."""
    table: _Table | None = None
    overall: int = 0
    """The inputs of whose numbers, over all rows, it is one statistic, such as the largest."""


_UNKNOWN: Final = _Value()

Lookup = tuple[int | tuple[int, int], int]
"""(height, row numbers): the height of a table is its number of rows, or within a function the
mask of the input that it is, with the axis; row numbers are a mask of inputs."""


class _Summary(Struct, frozen=True):
    """What a graph or function does with its inputs; masks as in `_Value`."""

    outputs: tuple[_Value, ...]
    mixers: dict[str, int]
    lookups: frozenset[Lookup]


class _Scope(Struct):
    """The values of a graph by name, and the scope of the graph around it."""

    values: dict[str, _Value]
    outer: "_Scope | None" = None


class _GraphFollower:
    """Follows a graph and the functions that it calls, each function once; one instance per
    file."""

    def __init__(self, functions: Mapping[tuple[str, str, str], Function]) -> None:
        self._functions = functions
        self._summaries: dict[tuple[str, str, str], _Summary] = {}
        self._steps = 0
        self.depth = 0
        """How many graphs and functions within each other are being followed."""

    def graph(self, graph: Graph) -> _Summary:
        """Follows the main graph and returns its mixers and lookups, without outputs; raises
        GraphTooLarge."""
        tables = _tables(graph)
        self.count_steps(len(graph.nodes) * (len(graph.inputs) // 64 + 1))
        fed = {
            name: _Value(1 << at, 1 << at, tables[name].table if name in tables else None)
            for at, name in enumerate(graph.inputs)
        }
        return self._summarize(graph.nodes, {**tables, **fed}, ())

    def summary_of_call(self, node: Node) -> _Summary | None:
        """The summary of the function that the node calls, which is followed when first called;
        None for an operator. Raises GraphTooLarge."""
        key = node.key
        if key not in self._functions:
            return None
        if key not in self._summaries:
            function = self._functions[key]
            # A function that calls itself finds this; ONNX Runtime loads no such file.
            self._summaries[key] = _Summary((_UNKNOWN,) * len(function.outputs), {}, frozenset())
            self.count_steps(len(function.nodes) * (len(function.inputs) // 64 + 1))
            values = {
                name: _Value(1 << at, 1 << at, _Table(source=1 << at))
                for at, name in enumerate(function.inputs)
            }
            self._summaries[key] = self._summarize(function.nodes, values, function.outputs)
        return self._summaries[key]

    def _summarize(
        self, nodes: Sequence[Node], values: dict[str, _Value], outputs: Sequence[str]
    ) -> _Summary:
        """Follows nodes in passes until no value changes; sorted nodes need one pass. `values` are
        known before, and get those that the nodes give; the summary has those named in `outputs`.
        Raises GraphTooLarge after too many passes or steps."""
        scope = _Scope(values)
        inner_scopes: dict[int, _Scope] = {}
        read_early: set[tuple[int, str]] = set()
        for _ in range(_MAX_PASSES):
            found = _Pass(self, inner_scopes, read_early)
            found.follow(nodes, scope)
            if not found.needs_another_pass:
                ends = tuple(scope.values.get(name, _UNKNOWN) for name in outputs)
                return _Summary(ends, found.mixers, frozenset(found.lookups))
        raise GraphTooLarge

    def count_steps(self, count: int = 1) -> None:
        """Adds to the steps so far; raises GraphTooLarge once there are too many."""
        self._steps += count
        if self._steps > _MAX_STEPS:
            raise GraphTooLarge


class _Pass:
    """One pass over the nodes of a graph or function and of the graphs within it."""

    def __init__(
        self,
        follower: _GraphFollower,
        inner_scopes: dict[int, _Scope],
        read_early: set[tuple[int, str]],
    ) -> None:
        self._follower = follower
        self._inner_scopes = inner_scopes
        """By id of an inner graph its scope, which the next pass continues with."""
        self._read_early = read_early
        """(scope, name) of values that were read, in any pass so far, in a scope that did not have
        them yet."""
        self.needs_another_pass = False
        """Whether one of those values has changed since it was read."""
        self.mixers: dict[str, int] = {}
        self.lookups: set[Lookup] = set()

    def follow(self, nodes: Sequence[Node], scope: _Scope) -> None:
        """Adds the values that the nodes give to the scope; notes mixers and lookups. Raises
        GraphTooLarge if too many graphs are within each other."""
        self._follower.depth += 1
        if self._follower.depth > _MAX_DEPTH:
            raise GraphTooLarge
        for node in nodes:
            inputs = [self._value(name, scope) for name in node.inputs]
            captured = self._follow_inner_graphs(node, inputs, scope)
            outputs = self._outputs(node, inputs, captured)
            for name, value in zip(node.outputs, outputs, strict=True):
                if (id(scope), name) in self._read_early and scope.values.get(name) != value:
                    self.needs_another_pass = True
                scope.values[name] = value
        self._follower.depth -= 1

    def _value(self, name: str, scope: _Scope | None) -> _Value:
        """The value of this name in the scope or those around it; an empty one if it is unknown,
        which is noted in case it comes later."""
        while scope is not None:
            self._follower.count_steps()
            if name in scope.values:
                return scope.values[name]
            self._read_early.add((id(scope), name))
            scope = scope.outer
        return _UNKNOWN

    def _follow_inner_graphs(self, node: Node, inputs: Sequence[_Value], scope: _Scope) -> int:
        """Follows the graphs within a node; returns the mask of inputs that they read from the
        scopes around them.

        Any input of the node may come back in a later iteration of a loop, so that each input of an
        inner graph depends on all of them.
        """
        captured = 0
        for graph in node.graphs:
            for name in graph.names_read:
                if name not in graph.initializers:
                    captured |= self._value(name, scope).fed
        fed = _all_fed(inputs) | captured
        for graph in node.graphs:
            inner_scope = self._inner_scopes.setdefault(id(graph), _Scope({}, scope))
            inner_scope.values.update((name, _Value(fed)) for name in graph.inputs)
            inner_scope.values.update(_tables(graph))
            self.follow(graph.nodes, inner_scope)
        return captured

    def _outputs(self, node: Node, inputs: Sequence[_Value], captured: int) -> list[_Value]:
        """The values that a node gives, one for each output; notes whether it mixes rows or looks
        up a table. `captured` is the mask of inputs that its inner graphs read."""
        self._note_mixer(node, inputs, captured)
        if (summary := self._follower.summary_of_call(node)) is not None:
            return self._call_outputs(node, summary, inputs)
        if node.domain not in _ONNX:
            return [_Value(_all_fed(inputs) | captured)] * len(node.outputs)
        if node.operator in _SHAPES:
            return [_UNKNOWN] * len(node.outputs)
        self._note_lookup(node, inputs)
        first = inputs[0] if inputs else _UNKNOWN
        same = first.same if node.operator in _SAME_NUMBERS else 0
        if node.operator == "Concat":
            same = _union(value.same for value in inputs)
        table = first.table if node.operator in _SAME_DIMS else None
        if node.operator == "Constant" and "value" in node.integer_lists:
            table = _Table(node.integer_lists["value"])
        fed = _all_fed(inputs) | captured
        overall = fed if _reduces_all_rows(node) else self._overall(node, inputs)
        return [_Value(fed, same, table, overall)] * len(node.outputs)

    def _overall(self, node: Node, inputs: Sequence[_Value]) -> int:
        """The mask of inputs of whose statistics over all rows a node's output is made; inputs that
        only give sizes are left out."""
        sizes = _SIZES.get(node.operator, ())
        return _union(value.overall for at, value in enumerate(inputs) if at not in sizes)

    def _note_mixer(self, node: Node, inputs: Sequence[_Value], captured: int) -> None:
        """Notes the operator, with the inputs that feed it, if it uses a statistic of all rows for
        each row."""
        fed = 0
        if node.operator.startswith("DynamicQuantize"):
            fed = _all_fed(inputs)
        elif node.operator == "QuantizeLinear" and len(inputs) > 1:
            # With a computed scale, as DynamicQuantizeLinear has it when written out.
            fed = inputs[1].fed
        elif node.operator == "MeanVarianceNormalization":
            fed = _all_fed(inputs) if 0 in node.integer_lists.get("axes", (0,)) else 0
        elif node.operator == "BatchNormalization" and node.integers.get("training_mode"):
            fed = _all_fed(inputs)
        elif captured or any(value.fed and not value.overall for value in inputs):
            # Such as the largest number of a run, by which all are divided.
            fed = self._overall(node, inputs)
        if fed:
            self.mixers[node.operator] = self.mixers.get(node.operator, 0) | fed

    def _note_lookup(self, node: Node, inputs: Sequence[_Value]) -> None:
        """Notes the inputs that the operator uses as row numbers of a table."""
        axis = node.integers.get("axis", node.integers.get("gather_axis", 0))
        for at, ids in _LOOKUPS.get(node.operator, ()):
            if max(at, ids) < len(inputs):
                self._add_lookup(inputs[at].table, axis, inputs[ids].same)

    def _add_lookup(self, table: _Table | None, axis: int, same: int) -> None:
        """Notes inputs (a mask) as row numbers of a table along this axis, if there are both."""
        if table is None or not same:
            return
        if table.source:
            self.lookups.add(((table.source, axis), same))
        elif -len(table.dims) <= axis < len(table.dims):
            self.lookups.add((table.dims[axis], same))

    def _call_outputs(
        self, node: Node, summary: _Summary, inputs: Sequence[_Value]
    ) -> list[_Value]:
        """The values that a function gives for these inputs; notes its mixers and lookups."""
        for name, mask in summary.mixers.items():
            if fed := self._combine(mask, inputs).fed:
                self.mixers[name] = self.mixers.get(name, 0) | fed
        for height, mask in summary.lookups:
            same = self._combine(mask, inputs).same
            if not isinstance(height, int):
                source, axis = height
                self._add_lookup(self._combine(source, inputs).table, axis, same)
            elif same:
                self.lookups.add((height, same))
        outputs = [self._call_output(value, inputs) for value in summary.outputs]
        return (outputs + [_UNKNOWN] * len(node.outputs))[: len(node.outputs)]

    def _call_output(self, value: _Value, inputs: Sequence[_Value]) -> _Value:
        """A value of a function in terms of the caller's inputs."""
        table = value.table
        if table is not None and table.source:
            table = self._combine(table.source, inputs).table
        fed, same = self._combine(value.fed, inputs).fed, self._combine(value.same, inputs).same
        return _Value(fed, same, table, self._combine(value.overall, inputs).fed)

    def _combine(self, mask: int, inputs: Sequence[_Value]) -> _Value:
        """The union of the inputs in this mask, with the first table among them."""
        fed = same = 0
        table = None
        while mask:
            at = (mask & -mask).bit_length() - 1
            mask &= mask - 1
            self._follower.count_steps()
            if at < len(inputs):
                fed, same = fed | inputs[at].fed, same | inputs[at].same
                table = table or inputs[at].table
        return _Value(fed, same, table)


def _reduces_all_rows(node: Node) -> bool:
    """Whether a node reduces all dimensions, and so the rows too."""
    return (
        node.operator.startswith("Reduce")
        and not any(node.inputs[1:])
        and not node.integer_lists.get("axes")
        and not node.integers.get("noop_with_empty_axes")
    )


def _tables(graph: Graph) -> dict[str, _Value]:
    """The constants of a graph that may be tables, as values by name."""
    return {name: _Value(table=_Table(tensor.dims)) for name, tensor in graph.initializers.items()}


def _all_fed(values: Sequence[_Value]) -> int:
    """The mask of the inputs on which any of these values depends."""
    return _union(value.fed for value in values)


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)

"""Mutations of what a model says: other operators, attributes, shapes, types and names."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import onnx

from tests.zoo.entry import Rng

_T = TypeVar("_T")

_OPERATORS: Final = ("Add", "Gather", "Conv", "Reshape", "Loop", "TopK", "Split", "Concat", "Cast")
_NUMBERS: Final = (-(2**63), -(2**31), -1, 0, 1, 2, 7, 2**20, 2**31, 2**40, 2**63 - 1)
_ELEM_TYPES: Final = tuple(range(24))


def mutate_meaning(content: bytes, rng: Rng, times: int) -> bytes:
    """The model after `times` random changes; the file stays well-formed."""
    model = onnx.load_model_from_string(content)
    for _ in range(times):
        _choose(_CHANGES, rng)(model.graph, rng)
    mutated: bytes = model.SerializeToString()
    return mutated


def _choose(choices: Sequence[_T], rng: Rng) -> _T:
    return choices[int(rng.integers(len(choices)))]


def _change_operator(graph: Any, rng: Rng) -> None:
    _choose(graph.node, rng).op_type = _choose(_OPERATORS, rng)


def _change_attribute(graph: Any, rng: Rng) -> None:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    if not attributes:
        return
    attribute = _choose(attributes, rng)
    attribute.i = _choose(_NUMBERS, rng)
    if attribute.ints:
        attribute.ints[int(rng.integers(len(attribute.ints)))] = _choose(_NUMBERS, rng)
    if attribute.HasField("g"):
        _choose(_CHANGES, rng)(attribute.g, rng)


def _swap_inputs(graph: Any, rng: Rng) -> None:
    """An input of a node becomes any other name in the graph."""
    node = _choose(graph.node, rng)
    names = [name for other in graph.node for name in (*other.input, *other.output)]
    names += [weight.name for weight in graph.initializer]
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = _choose(names, rng)


def _add_input(graph: Any, rng: Rng) -> None:
    _choose(graph.node, rng).input.append(_choose(["", "nowhere", graph.node[0].output[0]], rng))


def _drop_input(graph: Any, rng: Rng) -> None:
    node = _choose(graph.node, rng)
    if node.input:
        del node.input[-1]


def _change_dims(graph: Any, rng: Rng) -> None:
    if not graph.initializer:
        return
    tensor = _choose(graph.initializer, rng)
    if tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = _choose(_NUMBERS, rng)
    else:
        tensor.dims.append(_choose(_NUMBERS, rng))


def _change_elem_type(graph: Any, rng: Rng) -> None:
    values = [*graph.input, *graph.output]
    if values:
        _choose(values, rng).type.tensor_type.elem_type = _choose(_ELEM_TYPES, rng)


def _change_weight_type(graph: Any, rng: Rng) -> None:
    if graph.initializer:
        _choose(graph.initializer, rng).data_type = _choose(_ELEM_TYPES, rng)


def _change_weight_bytes(graph: Any, rng: Rng) -> None:
    """Random bytes as weights, which may be axes, sizes or indices."""
    tensors = [tensor for tensor in graph.initializer if tensor.raw_data]
    if tensors:
        tensor = _choose(tensors, rng)
        tensor.raw_data = rng.bytes(len(tensor.raw_data))


def _change_shape(graph: Any, rng: Rng) -> None:
    values = [value for value in (*graph.input, *graph.output) if value.type.tensor_type.shape.dim]
    if values:
        dim = _choose(_choose(values, rng).type.tensor_type.shape.dim, rng)
        dim.dim_value = _choose(_NUMBERS, rng)


def _repeat_node(graph: Any, rng: Rng) -> None:
    graph.node.append(_choose(graph.node, rng))


_CHANGES: Final[tuple[Callable[[Any, Rng], None], ...]] = (
    _change_operator,
    _change_attribute,
    _change_attribute,
    _swap_inputs,
    _add_input,
    _drop_input,
    _change_dims,
    _change_elem_type,
    _change_weight_type,
    _change_weight_bytes,
    _change_weight_bytes,
    _change_shape,
    _repeat_node,
)

"""Models that are well written and wrong: other operators, attributes, shapes, types, names."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import onnx

from tests.zoo.entry import Rng

_T = TypeVar("_T")

_OPERATORS: Final = ("Add", "Gather", "Conv", "Reshape", "Loop", "TopK", "Split", "Concat", "Cast")
_NUMBERS: Final = (-(2**63), -(2**31), -1, 0, 1, 2, 7, 2**20, 2**31, 2**40, 2**63 - 1)
_ELEM_TYPES: Final = tuple(range(24))


def distorted(content: bytes, rng: Rng, times: int) -> bytes:
    """The model after so many changes of what it says."""
    model = onnx.load_model_from_string(content)
    for _ in range(times):
        _one_of(_CHANGES, rng)(model.graph, rng)
    whole: bytes = model.SerializeToString()
    return whole


def _one_of(choices: Sequence[_T], rng: Rng) -> _T:
    return choices[int(rng.integers(len(choices)))]


def _change_operator(graph: Any, rng: Rng) -> None:
    _one_of(graph.node, rng).op_type = _one_of(_OPERATORS, rng)


def _change_attribute(graph: Any, rng: Rng) -> None:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    if not attributes:
        return
    attribute = _one_of(attributes, rng)
    attribute.i = _one_of(_NUMBERS, rng)
    if attribute.ints:
        attribute.ints[int(rng.integers(len(attribute.ints)))] = _one_of(_NUMBERS, rng)
    if attribute.HasField("g"):
        _one_of(_CHANGES, rng)(attribute.g, rng)


def _swap_inputs(graph: Any, rng: Rng) -> None:
    """An input of a node becomes any other name that there is."""
    node = _one_of(graph.node, rng)
    names = [name for other in graph.node for name in (*other.input, *other.output)]
    names += [weight.name for weight in graph.initializer]
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = _one_of(names, rng)


def _add_input(graph: Any, rng: Rng) -> None:
    _one_of(graph.node, rng).input.append(_one_of(["", "nowhere", graph.node[0].output[0]], rng))


def _drop_input(graph: Any, rng: Rng) -> None:
    node = _one_of(graph.node, rng)
    if node.input:
        del node.input[-1]


def _change_dims(graph: Any, rng: Rng) -> None:
    if not graph.initializer:
        return
    tensor = _one_of(graph.initializer, rng)
    if tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = _one_of(_NUMBERS, rng)
    else:
        tensor.dims.append(_one_of(_NUMBERS, rng))


def _change_elem_type(graph: Any, rng: Rng) -> None:
    values = [*graph.input, *graph.output]
    if values:
        _one_of(values, rng).type.tensor_type.elem_type = _one_of(_ELEM_TYPES, rng)


def _change_weight_type(graph: Any, rng: Rng) -> None:
    if graph.initializer:
        _one_of(graph.initializer, rng).data_type = _one_of(_ELEM_TYPES, rng)


def _change_weight_bytes(graph: Any, rng: Rng) -> None:
    """Other numbers in the weights, which may be axes, sizes or indices."""
    tensors = [tensor for tensor in graph.initializer if tensor.raw_data]
    if tensors:
        tensor = _one_of(tensors, rng)
        tensor.raw_data = rng.bytes(len(tensor.raw_data))


def _change_shape(graph: Any, rng: Rng) -> None:
    values = [value for value in (*graph.input, *graph.output) if value.type.tensor_type.shape.dim]
    if values:
        dim = _one_of(_one_of(values, rng).type.tensor_type.shape.dim, rng)
        dim.dim_value = _one_of(_NUMBERS, rng)


def _repeat_node(graph: Any, rng: Rng) -> None:
    graph.node.append(_one_of(graph.node, rng))


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

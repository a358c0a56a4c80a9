"""All locations of external weights in a file are found, even if it hides them."""

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from asyncinfer.models import onnx_file
from asyncinfer.models.onnx_file import DamagedFile
from tests import zoo


def locations_in(content: bytes) -> set[str]:
    return set(onnx_file.find_locations(memoryview(content)))


def external(location: str) -> TensorProto:
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1])
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph(location: str) -> onnx.GraphProto:
    return onnx.GraphProto(initializer=[external(location)])


def hidden_everywhere() -> onnx.ModelProto:
    attributes = [
        onnx.AttributeProto(t=external("t"), g=graph("g")),
        onnx.AttributeProto(tensors=[external("tensors")], graphs=[graph("graphs")]),
        onnx.AttributeProto(
            sparse_tensor=onnx.SparseTensorProto(values=external("sparse attribute"))
        ),
    ]
    node = onnx.NodeProto(attribute=attributes)
    inner = onnx.GraphProto(
        node=[node],
        initializer=[external("initializer")],
        sparse_initializer=[
            onnx.SparseTensorProto(values=external("values"), indices=external("indices"))
        ],
    )
    outer = onnx.AttributeProto(g=inner)
    function = onnx.FunctionProto(
        node=[onnx.NodeProto(attribute=[onnx.AttributeProto(t=external("function"))])],
        attribute_proto=[onnx.AttributeProto(t=external("default"))],
    )
    model = onnx.ModelProto(functions=[function])
    model.graph.node.append(onnx.NodeProto(attribute=[outer]))
    model.training_info.add(initialization=graph("training"))
    return model


def test_locations_are_found_wherever_a_tensor_may_be() -> None:
    assert locations_in(hidden_everywhere().SerializeToString()) == {
        *("t", "g", "tensors", "graphs", "sparse attribute", "initializer"),
        *("values", "indices", "function", "default", "training"),
    }


def test_a_model_without_external_weights_has_no_locations() -> None:
    assert locations_in(zoo.mlp([4, 3]).SerializeToString()) == set()


def test_a_second_graph_in_the_file_hides_nothing() -> None:
    two = onnx.ModelProto(graph=graph("a")).SerializeToString()
    two += onnx.ModelProto(graph=graph("b")).SerializeToString()

    assert locations_in(two) == {"a", "b"}


def test_graphs_within_graphs_a_thousand_deep_are_read() -> None:
    content = graph("deep").SerializeToString()
    for _ in range(1000):
        for field in (6, 5, 1):
            content = bytes([field << 3 | 2]) + length(len(content)) + content
    assert locations_in(bytes([7 << 3 | 2]) + length(len(content)) + content) == {"deep"}


def length(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


@pytest.mark.parametrize(
    "content",
    [b"\x0a\x05abc", b"\x3a", b"\x08" + b"\xff" * 11, b"\x0b\x0c", b"\x0d\x00", b"\x80", bytes(9)],
)
def test_a_damaged_file_raises_damaged_file(content: bytes) -> None:
    with pytest.raises(DamagedFile):
        locations_in(content)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_damaged(content: bytes) -> None:
    with contextlib.suppress(DamagedFile):
        locations_in(content)


@given(st.data())
def test_any_flipped_byte_is_read_or_damaged(data: st.DataObject) -> None:
    content = bytearray(hidden_everywhere().SerializeToString())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DamagedFile):
        locations_in(bytes(content))


def test_weights_that_onnx_itself_stores_outside_are_found() -> None:
    model = zoo.mlp([64, 64])
    weight = model.graph.initializer[0]
    assert np.prod(weight.dims) == 4096
    onnx.external_data_helper.set_external_data(weight, "weights.bin")

    assert locations_in(model.SerializeToString()) == {"weights.bin"}

"""The data flow of a graph: operators that mix rows, and inputs that are row numbers of tables."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from asyncinfer.engine import dataflow
from asyncinfer.engine.dataflow import Flow
from asyncinfer.models import onnx_graph
from asyncinfer.models.onnx_file import DamagedFile
from tests import zoo
from tests.zoo.model_builder import node

INT64 = TensorProto.INT64
MICROSOFT, OURS = "com.microsoft", "ours"


def read_flow(model: onnx.ModelProto) -> Flow:
    content = memoryview(model.SerializeToString())
    return dataflow.read_flow(onnx_graph.read_content(content))


def find_mixers(model: onnx.ModelProto) -> dict[str, set[str]]:
    """By operator that mixes rows, the inputs that feed it."""
    return {operator: set(inputs) for operator, inputs in read_flow(model).mixers.items()}


def model_of_x(*nodes: onnx.NodeProto, **weights: npt.NDArray[Any]) -> onnx.ModelProto:
    inputs = [zoo.tensor("x", ["batch", 4]), zoo.tensor("apart", [4])]
    return zoo.model(nodes, inputs, [zoo.tensor("y", None)], weights)


def quantize(name: str, *, prefix: str = "") -> onnx.NodeProto:
    outputs = [f"{prefix}{output}" for output in ("q", "scale", "zero")]
    return node("DynamicQuantizeLinear", [name], outputs)


def graph(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[str] = (), outputs: Sequence[str] = ("q",)
) -> onnx.GraphProto:
    input_values, output_values = (
        [zoo.tensor(name, None) for name in names] for names in (inputs, outputs)
    )
    return helper.make_graph(nodes, "inner", input_values, output_values)


# --- what mixes rows ---------------------------------------------------------------------------


def in_a_branch() -> onnx.ModelProto:
    branch = graph([quantize("t")])
    inner = node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    return model_of_x(node("Tanh", ["x"], ["t"]), inner, yes=np.array(True))


def in_a_loop() -> onnx.ModelProto:
    """The quantized value comes from the iteration before."""
    turn = [
        node("Identity", ["go"], ["go_on"]),
        quantize("v"),
        node("Add", ["x", "x"], ["v_next"]),
    ]
    body = graph(turn, ["turn", "go", "v"], ["go_on", "v_next"])
    loop = node("Loop", ["turns", "", "start"], ["y"], body=body)
    return model_of_x(loop, turns=np.array(5), start=np.zeros(4, np.float32))


def with_functions(
    *functions: tuple[str, Sequence[onnx.NodeProto]],
) -> onnx.ModelProto:
    model = model_of_x(node("outer", ["x"], ["y"], domain=OURS))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(OURS, 1)]
    for name, nodes in functions:
        function = helper.make_function(OURS, name, ["a"], ["b"], nodes, opsets)
        model.functions.append(function)
    model.opset_import.append(helper.make_opsetid(OURS, 1))
    return model


def in_a_function_of_a_function() -> onnx.ModelProto:
    return with_functions(
        ("outer", [node("inner", ["a"], ["b"], domain=OURS)]),
        ("inner", [quantize("a"), node("Identity", ["q"], ["b"])]),
    )


def before_what_feeds_it() -> onnx.ModelProto:
    """ONNX Runtime sorts the nodes itself."""
    return model_of_x(quantize("t2"), node("Abs", ["t1"], ["t2"]), node("Tanh", ["x"], ["t1"]))


def scaled_by_itself() -> onnx.ModelProto:
    """The operators that DynamicQuantizeLinear consists of."""
    return model_of_x(
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Div", ["most", "levels"], ["scale"]),
        node("QuantizeLinear", ["x", "scale"], ["y"]),
        levels=np.array(255, np.float32),
    )


MAXIMUM = node("ReduceMax", ["x"], ["most"], keepdims=0)
LIMIT = {"limit": np.array(1e4, np.float32)}


def quantized_by_hand() -> onnx.ModelProto:
    """As written by exporters that do not use DynamicQuantizeLinear."""
    return model_of_x(
        MAXIMUM, node("Div", ["x", "most"], ["d"]), node("Round", ["d"], ["r"]),
        node("ArgMax", ["r"], ["y"]),
    )  # fmt: skip


def in_the_branch_that_one_row_decides() -> onnx.ModelProto:
    then, otherwise = (
        graph([node(operator, ["x"], ["z"])], (), ("z",)) for operator in ("Abs", "Neg")
    )
    choice = node("If", ["any"], ["y"], then_branch=then, else_branch=otherwise)
    return model_of_x(MAXIMUM, node("Greater", ["most", "limit"], ["any"]), choice, **LIMIT)


def by_a_function_s_statistic() -> onnx.ModelProto:
    least = [node("ReduceMin", ["a"], ["b"], keepdims=0)]
    model = with_functions(("outer", least))
    model.graph.node[0].output[0] = "least"
    model.graph.node.append(node("Sub", ["x", "least"], ["y"]))
    return model


@pytest.mark.parametrize(
    ("build", "operator"),
    [
        (quantized_by_hand, "Div"),
        (in_the_branch_that_one_row_decides, "If"),
        (by_a_function_s_statistic, "Sub"),
        (
            lambda: model_of_x(
                MAXIMUM,
                node("Greater", ["most", "limit"], ["any"]),
                node("Where", ["any", "limit", "x"], ["y"]),
                **LIMIT,
            ),
            "Where",
        ),
        (lambda: model_of_x(quantize("x")), "DynamicQuantizeLinear"),
        (
            lambda: model_of_x(node("DynamicQuantizeMatMul", ["x", "w"], ["y"], domain=MICROSOFT)),
            "DynamicQuantizeMatMul",
        ),
        (
            lambda: model_of_x(node("DynamicQuantizeLSTM", ["x", "w"], ["y"], domain=MICROSOFT)),
            "DynamicQuantizeLSTM",
        ),
        (
            lambda: model_of_x(node("MeanVarianceNormalization", ["x"], ["y"])),
            "MeanVarianceNormalization",
        ),
        (
            lambda: model_of_x(
                node("BatchNormalization", ["x", *"sbmv"], ["y", "", ""], training_mode=1)
            ),
            "BatchNormalization",
        ),
        (scaled_by_itself, "QuantizeLinear"),
        (in_a_branch, "DynamicQuantizeLinear"),
        (in_a_loop, "DynamicQuantizeLinear"),
        (in_a_function_of_a_function, "DynamicQuantizeLinear"),
        (before_what_feeds_it, "DynamicQuantizeLinear"),
    ],
)
def test_an_operator_of_one_scale_for_all_rows_is_found_with_what_feeds_it(
    build: Callable[[], onnx.ModelProto], operator: str
) -> None:
    assert find_mixers(build()) == {operator: {"x"}}


@pytest.mark.parametrize(
    "build",
    [
        lambda: model_of_x(quantize("w"), w=np.ones((4, 4), np.float32)),
        lambda: model_of_x(
            node("Shape", ["x"], ["s"]), node("Cast", ["s"], ["f"], to=1), quantize("f")
        ),
        lambda: model_of_x(
            node("QuantizeLinear", ["x", "scale"], ["y"]), scale=np.array(0.1, np.float32)
        ),
        lambda: model_of_x(node("MeanVarianceNormalization", ["x"], ["y"], axes=[1])),
        lambda: model_of_x(
            node("ReduceMax", ["x"], ["m"], axes=[1]), node("Div", ["x", "m"], ["y"])
        ),
        lambda: model_of_x(
            node("ReduceMax", ["x"], ["m"], noop_with_empty_axes=1), node("Div", ["x", "m"], ["y"])
        ),
        lambda: model_of_x(
            node("Shape", ["x"], ["s"]),
            node("ReduceMax", ["s"], ["m"], keepdims=0),
            node("Div", ["x", "m"], ["y"]),
        ),
        # The mask of a batch of texts, as long as the longest.
        lambda: model_of_x(
            MAXIMUM,
            node("Range", ["limit", "most", "limit"], ["r"]),
            node("Less", ["r", "x"], ["y"]),
            **LIMIT,
        ),
        lambda: model_of_x(MAXIMUM, node("Div", ["most", "limit"], ["y"]), **LIMIT),
        lambda: with_functions(("outer", [node("Tanh", ["a"], ["b"])])),
    ],
)
def test_an_operator_that_no_row_feeds_mixes_no_rows(build: Callable[[], onnx.ModelProto]) -> None:
    assert find_mixers(build()) == {}


def test_an_operator_is_named_with_its_own_input_alone() -> None:
    flow = read_flow(model_of_x(quantize("apart"), node("Tanh", ["x"], ["y"])))

    assert flow.mixer(frozenset({"apart"})) == "DynamicQuantizeLinear"
    assert flow.mixer(frozenset({"x"})) == ""


# --- row numbers of tables ---------------------------------------------------------------------


def model_of_ids(*nodes: onnx.NodeProto, **heights: int) -> onnx.ModelProto:
    weights = {name: np.zeros((height, 2), np.float32) for name, height in heights.items()}
    inputs = [zoo.tensor("ids", ["batch", 3], INT64)]
    return zoo.model(nodes, inputs, [zoo.tensor("y", None)], weights)


def looked_up_in_a_function() -> onnx.ModelProto:
    model = model_of_ids(node("embedding", ["t", "ids"], ["y"], domain=OURS), t=60)
    opsets = [helper.make_opsetid("", 18)]
    nodes = [node("Gather", ["table", "at"], ["b"])]
    model.functions.append(
        helper.make_function(OURS, "embedding", ["table", "at"], ["b"], nodes, opsets)
    )
    return model


def looked_up_in_a_constant() -> onnx.ModelProto:
    table = helper.make_tensor("t", TensorProto.FLOAT, [50, 1], np.zeros(50, np.float32))
    return model_of_ids(
        node("Constant", [], ["t"], value=table), node("Gather", ["t", "ids"], ["y"])
    )


@pytest.mark.parametrize(
    ("build", "height"),
    [
        (lambda: model_of_ids(node("Gather", ["t", "ids"], ["y"]), t=40), 40),
        (lambda: model_of_ids(node("Gather", ["t", "ids"], ["y"], axis=1), t=40), 2),
        (
            lambda: model_of_ids(
                node("Cast", ["ids"], ["i"], to=6),
                node("Unsqueeze", ["i", "at"], ["u"]),
                node("Gather", ["t", "u"], ["y"]),
                t=70,
            ),
            70,
        ),
        (
            lambda: model_of_ids(
                node("Gather", ["s", "ids"], ["a"]), node("Gather", ["t", "ids"], ["b"]), s=9, t=70
            ),
            9,
        ),
        (
            lambda: model_of_ids(
                node("DequantizeLinear", ["t", "scale"], ["f"]),
                node("Gather", ["f", "ids"], ["y"]),
                t=30,
            ),
            30,
        ),
        (
            lambda: model_of_ids(
                node(
                    "EmbedLayerNormalization",
                    ["ids", "", "t", "p", "", "g", "b"],
                    ["y", "m"],
                    domain=MICROSOFT,
                ),
                t=80,
            ),
            80,
        ),
        (looked_up_in_a_function, 60),
        (looked_up_in_a_constant, 50),
        (
            lambda: model_of_ids(
                node("Add", ["ids", "n"], ["i"]), node("Gather", ["t", "i"], ["y"]), t=9
            ),
            None,
        ),
    ],
)
def test_ids_are_known_to_end_where_their_table_does(
    build: Callable[[], onnx.ModelProto], height: int | None
) -> None:
    assert read_flow(build()).heights.get("ids") == height


# --- the bytes ---------------------------------------------------------------------------------


def test_a_type_without_a_shape_is_distinguished_from_a_scalar() -> None:
    model = zoo.model(
        [node("Identity", ["x"], ["y"])],
        [zoo.tensor("x", None), zoo.tensor("scalar", []), zoo.tensor("row", ["n"])],
        [zoo.tensor("y", None)],
    )
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    model.graph.input.append(
        helper.make_value_info("maybe", helper.make_optional_type_proto(tensor))
    )

    read = onnx_graph.read_content(memoryview(model.SerializeToString()))

    assert read.graph.unknown_rank == {"x", "maybe", "y"}


@given(st.data())
def test_any_flipped_byte_is_followed_or_damaged(data: st.DataObject) -> None:
    build = data.draw(st.sampled_from((in_a_loop, in_a_function_of_a_function)))
    content = bytearray(build().SerializeToString())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DamagedFile, onnx_graph.GraphTooLarge):
        dataflow.read_flow(onnx_graph.read_content(memoryview(bytes(content))))


def test_functions_that_call_each_other_ten_times_over_are_followed_once() -> None:
    functions = []
    for depth in range(30):
        nodes = [
            node(f"f{depth + 1}", ["a" if at == 0 else f"v{at}"], [f"v{at + 1}"], domain=OURS)
            for at in range(10)
        ]
        functions.append((f"f{depth}", [*nodes, node("Identity", ["v10"], ["b"])]))
    functions.append(("f30", [quantize("a"), node("Identity", ["q"], ["b"])]))
    functions.append(("outer", [node("f0", ["a"], ["b"], domain=OURS)]))

    assert find_mixers(with_functions(*functions)) == {"DynamicQuantizeLinear": {"x"}}


def test_functions_too_deep_within_each_other_are_not_followed() -> None:
    functions = [
        (f"f{depth}", [node(f"f{depth + 1}", ["a"], ["b"], domain=OURS)]) for depth in range(2000)
    ]
    functions.append(("outer", [node("f0", ["a"], ["b"], domain=OURS)]))

    assert read_flow(with_functions(*functions)).is_unread


def test_a_vocabulary_of_millions_of_words_does_not_make_a_graph_too_large() -> None:
    vectorizer = node("TfIdfVectorizer", ["x"], ["y"])
    vectorizer.attribute.add(name="ngram_indexes").ints.extend([0] * 4_000_001)

    assert read_flow(model_of_x(vectorizer)) == Flow()

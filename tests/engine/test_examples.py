"""The announced example: a request that the model answers with numbers, if it answers any so."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from asyncinfer.api.handlers.models import example_of
from asyncinfer.engine import Engine, Stop
from asyncinfer.models.folder import scan
from asyncinfer.tensors.datatypes import Feeds
from tests import zoo

INT64 = TensorProto.INT64


def load_model(folder: Path, model: onnx.ModelProto) -> Engine:
    zoo.place(folder, "m", model)
    (file,) = scan(folder)
    return Engine.load(file, intra_op_threads=1)


def masked_mean() -> onnx.ModelProto:
    """The mean of the ids that the mask keeps; 0 / 0 if it keeps none."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "kept"], ["products"]),
        helper.make_node("ReduceSum", ["products", "last"], ["sum"]),
        helper.make_node("ReduceSum", ["kept", "last"], ["count"]),
        helper.make_node("Div", ["sum", "count"], ["y"]),
    ]
    inputs = [zoo.tensor(name, ["batch", "length"], INT64) for name in ("ids", "mask")]
    return zoo.model(nodes, inputs, [zoo.tensor("y", ["batch", 1])], {"last": np.array([1])})


def unary_model(op: str, rank: int = 2, **attributes: Any) -> onnx.ModelProto:
    shape = ["batch", "a", "b"][:rank]
    node = helper.make_node(op, ["x"], ["y"], **attributes)
    return zoo.model([node], [zoo.tensor("x", shape)], [zoo.tensor("y", shape)])


def embedding(words: int, rank: int) -> onnx.ModelProto:
    dims = ["batch", "length"]
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    table = np.arange(2.0 * words, dtype=np.float32).reshape(words, 2)
    outputs = [zoo.tensor("y", [*dims[:rank], 2])]
    return zoo.model([node], [zoo.tensor("x", dims[:rank], INT64)], outputs, {"table": table})


def convolution_of_five() -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "kernel"], ["y"])
    kernel = {"kernel": np.ones((1, 1, 5), np.float32)}
    inputs, outputs = [zoo.tensor("x", ["batch", 1, "n"])], [zoo.tensor("y", ["batch", 1, "m"])]
    return zoo.model([node], inputs, outputs, kernel)


def test_ids_and_mask_are_ones_so_that_something_is_left_to_answer_from(tmp_path: Path) -> None:
    engine = load_model(tmp_path, masked_mean())

    assert engine.signature.example_inputs == {"ids": [[1]], "mask": [[1]]}
    assert example_of(engine.signature) == {
        "inputs": [
            {"name": name, "shape": (1, 1), "datatype": "INT64", "data": [[1]]}
            for name in ("ids", "mask")
        ]
    }
    feeds: Feeds = {"ids": np.array([[1]]), "mask": np.array([[1]])}
    assert engine.run(feeds, Stop())[0].tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (embedding(9, 2), [[1]]),
        (embedding(1, 2), [[0]]),
        (embedding(9, 1), [0]),
        (unary_model("Neg"), [[0.0]]),
        (unary_model("Log"), [[1.0]]),
        (convolution_of_five(), [[[0.0] * 8]]),
    ],
    ids=["words", "one word", "numbers", "fractions", "log of 0", "too short"],
)
def test_one_input_is_what_the_model_answers_with_numbers(
    tmp_path: Path, model: onnx.ModelProto, example: object
) -> None:
    assert load_model(tmp_path, model).signature.example == example


def test_a_model_that_takes_nothing_made_up_still_shows_the_form(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Identity", ["r"], ["y"]),
    ]
    inputs, outputs = [zoo.tensor("x", ["batch", 2])], [zoo.tensor("y", [7, 7])]
    model = zoo.model(nodes, inputs, outputs, {"shape": np.array([7, 7])})

    assert load_model(tmp_path, model).signature.example == [[0.0, 0.0]]


def test_a_scalar_beside_a_matrix_is_shown_as_requests_have_it(tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "by"], ["y"])
    inputs = [zoo.tensor("x", ["batch", 2]), zoo.tensor("by", [])]
    engine = load_model(tmp_path, zoo.model([node], inputs, [zoo.tensor("y", ["batch", 2])]))

    example = example_of(engine.signature)
    assert example
    assert example["inputs"][1] == {"name": "by", "shape": (), "datatype": "FP32", "data": [0.0]}

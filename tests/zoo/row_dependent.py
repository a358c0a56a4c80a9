"""Models whose rows depend on each other, or that change their number: never batched."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from tests.zoo.behaviour import minus_mean, positive_rows, recurrent, running_sum, sorted_rows
from tests.zoo.entry import ROWS, Entry, random_inputs
from tests.zoo.model_builder import model, node, tensor


def entries() -> Iterator[Entry]:
    pairs = random_inputs({"x": ("FP32", (ROWS, 2))})
    for build in (
        running_sum,
        minus_mean,
        sorted_rows,
        positive_rows,
        top_row,
        repeated_rows,
        nonzero_indices,
        reversed_rows,
    ):
        yield Entry(build.__name__, build, pairs, False)
    yield Entry("recurrent", recurrent, random_inputs({"x": ("FP32", (ROWS, 1, 3))}), False)
    words = random_inputs({"x": ("BYTES", (ROWS,))})
    yield Entry("words_without_stop_words", words_without_stop_words, words, False)


def top_row() -> onnx.ModelProto:
    """The largest number of each column: always one row."""
    weights = {"k": np.array([1], np.int64)}
    nodes = [node("TopK", ["x", "k"], ["y", "order"], axis=0)]
    return model(nodes, [tensor("x", ["n", 2])], [tensor("y", [1, 2])], weights)


def repeated_rows() -> onnx.ModelProto:
    """Every row twice."""
    weights = {"times": np.array([2, 1], np.int64)}
    nodes = [node("Tile", ["x", "times"], ["y"])]
    return model(nodes, [tensor("x", ["n", 2])], [tensor("y", ["m", 2])], weights)


def nonzero_indices() -> onnx.ModelProto:
    """The indices of the positive numbers: [2, found]."""
    nodes = [node("Relu", ["x"], ["positive"]), node("NonZero", ["positive"], ["y"])]
    outputs = [tensor("y", [2, "found"], TensorProto.INT64)]
    return model(nodes, [tensor("x", ["n", 2])], outputs)


def reversed_rows() -> onnx.ModelProto:
    """The last row first."""
    names = {"start": -1, "end": -(2**62), "axis": 0, "step": -1}
    weights = {name: np.array([number], np.int64) for name, number in names.items()}
    nodes = [node("Slice", ["x", *names], ["y"])]
    return model(nodes, [tensor("x", ["n", 2])], [tensor("y", ["n", 2])], weights)


def words_without_stop_words() -> onnx.ModelProto:
    """The words without the stop words: fewer than those of the input."""
    nodes = [node("StringNormalizer", ["x"], ["y"], stopwords=["a", "日本"], is_case_sensitive=1)]
    string = TensorProto.STRING
    return model(nodes, [tensor("x", ["n"], string)], [tensor("y", ["m"], string)])

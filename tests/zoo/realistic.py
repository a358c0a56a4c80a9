"""Small models like those that users serve: images, text, similarity, scikit-learn."""

import functools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto

from asyncinfer.tensors.datatypes import Feeds
from tests.zoo.entry import ROWS, Entry, Rng, random_inputs
from tests.zoo.model_builder import model, node, tensor

VOCABULARY: Final = 50
LABELS: Final = ("cat", "dog", "owl")
_SPECIES: Final = np.array(["setosa", "versicolor", "virginica"])


def entries() -> Iterator[Entry]:
    yield Entry("images", images, random_inputs({"pixels": ("FP32", (ROWS, 3, "h", "w"))}), True)
    yield Entry(
        "image_classifier",
        image_classifier,
        random_inputs({"pixels": ("FP32", (ROWS, 3, 8, 8))}),
        True,
        toml=f"labels = {list(LABELS)}",
    )
    yield Entry("embedding", embedding, ids_that_may_be_too_large, True)
    yield Entry("text", text_embedding, tokens, True)
    vectors = {"a": ("FP32", (ROWS, "width")), "b": ("FP32", (ROWS, "width"))}
    yield Entry("similarity", similarity, random_inputs(vectors), True)
    flowers = random_inputs({"X": ("FP32", (ROWS, 4))})
    for zipmap in (False, True):
        for strings in (False, True):
            name = f"logistic_{'strings' if strings else 'ints'}{'_zipmap' if zipmap else ''}"
            build = functools.partial(logistic, strings=strings, zipmap=zipmap)
            yield Entry(name, build, flowers, True)


def images() -> onnx.ModelProto:
    """A convolution and a mean over images of any size."""
    weights = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = [
        node("Conv", ["pixels", "w"], ["seen"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["seen"], ["bright"]),
        node("GlobalAveragePool", ["bright"], ["pooled"]),
        node("Flatten", ["pooled"], ["y"]),
    ]
    inputs = [tensor("pixels", ["N", 3, "H", "W"])]
    return model(nodes, inputs, [tensor("y", ["N", 4])], weights)


def image_classifier() -> onnx.ModelProto:
    weights = {"w": np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)}
    nodes = [
        node("Conv", ["pixels", "w"], ["scores"], kernel_shape=[8, 8]),
        node("Flatten", ["scores"], ["flat"]),
        node("Softmax", ["flat"], ["probabilities"]),
    ]
    inputs = [tensor("pixels", ["batch", 3, 8, 8])]
    return model(nodes, inputs, [tensor("probabilities", ["batch", len(LABELS)])], weights)


def embedding() -> onnx.ModelProto:
    """Rows of a table by their number; an unknown number fails the run."""
    table = np.random.default_rng(0).normal(size=(VOCABULARY, 4)).astype(np.float32)
    inputs = [tensor("ids", ["batch", "n"], TensorProto.INT64)]
    outputs = [tensor("y", ["batch", "n", 4])]
    return model([node("Gather", ["table", "ids"], ["y"])], inputs, outputs, {"table": table})


def ids_that_may_be_too_large(rng: Rng, rows: int) -> Feeds:
    end = VOCABULARY if rng.random() < 0.8 else 10 * VOCABULARY
    return {"ids": rng.integers(0, end, (rows, int(rng.integers(1, 4))))}


def text_embedding() -> onnx.ModelProto:
    """The mean of the vectors of the tokens that the mask selects."""
    table = np.random.default_rng(0).normal(size=(VOCABULARY, 8)).astype(np.float32)
    nodes = [
        node("Gather", ["table", "input_ids"], ["vectors"]),
        node("Cast", ["attention_mask"], ["mask_2d"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask_2d", "last"], ["mask"]),
        node("Mul", ["vectors", "mask"], ["masked"]),
        node("ReduceSum", ["masked", "tokens"], ["sum"], keepdims=0),
        node("ReduceSum", ["mask", "tokens"], ["count"], keepdims=0),
        node("Max", ["count", "least"], ["divisor"]),
        node("Div", ["sum", "divisor"], ["sentence_embedding"]),
    ]
    names = ("input_ids", "attention_mask")
    inputs = [tensor(name, ["batch", "seq"], TensorProto.INT64) for name in names]
    weights = {
        "table": table,
        "last": np.array([-1]),
        "tokens": np.array([1]),
        "least": np.array(1e-9, np.float32),
    }
    return model(nodes, inputs, [tensor("sentence_embedding", ["batch", 8])], weights)


def tokens(rng: Rng, rows: int) -> Feeds:
    """Sentences of one padded length."""
    length = int(rng.integers(1, 6))
    lengths = rng.integers(1, length, (rows, 1), endpoint=True)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (rows, length)),
        "attention_mask": (np.arange(length) < lengths).astype(np.int64),
    }


def similarity() -> onnx.ModelProto:
    """The cosine of the angle between two vectors, per row."""
    nodes = [
        node("Mul", ["a", "b"], ["products"]),
        node("ReduceSum", ["products", "last"], ["dot"], keepdims=0),
        node("ReduceL2", ["a", "last"], ["a_length"], keepdims=0),
        node("ReduceL2", ["b", "last"], ["b_length"], keepdims=0),
        node("Mul", ["a_length", "b_length"], ["lengths"]),
        node("Div", ["dot", "lengths"], ["cosine"]),
    ]
    inputs = [tensor(name, ["batch", "width"]) for name in ("a", "b")]
    weights = {"last": np.array([-1])}
    return model(nodes, inputs, [tensor("cosine", ["batch"])], weights)


@functools.cache
def _fitted(strings: bool) -> Any:
    # scikit-learn takes a second to import; tests that do not need it should not wait.
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    flowers = load_iris()
    labels = _SPECIES[flowers.target] if strings else flowers.target
    return LogisticRegression(max_iter=500).fit(flowers.data, labels)


def logistic(*, strings: bool, zipmap: bool) -> onnx.ModelProto:
    """A model of scikit-learn's converter, whose probabilities are maps by default (`zipmap`)."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    fitted = _fitted(strings)
    types = [("X", FloatTensorType([None, 4]))]
    made: onnx.ModelProto = to_onnx(
        fitted, initial_types=types, options={id(fitted): {"zipmap": zipmap}}, target_opset=18
    )
    return made

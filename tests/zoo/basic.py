"""Basic models: every datatype, every rank, unusual names, several inputs."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from asyncinfer.tensors.datatypes import Array, Feeds
from tests.zoo.behaviour import added, identity, mlp, quantized
from tests.zoo.entry import ROWS, Entry, Rng, random_inputs
from tests.zoo.model_builder import Dims, Weights, model, node, tensor

ELEM_TYPES: Final = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


def entries() -> Iterator[Entry]:
    for datatype in ELEM_TYPES:
        yield _of_datatype(datatype)
    yield _of_rank("rank_0", [], (), batched=False)
    yield _of_rank("rank_1", ["batch"], (ROWS,), batched=True)
    yield _of_rank("rank_3", ["batch", None, 4], (ROWS, "n", 4), batched=True)
    yield _of_rank("rank_4", ["batch", 2, "h", "w"], (ROWS, 2, "h", "w"), batched=True)
    yield _of_rank("fixed_one", [1, 4], (1, 4), batched=False)
    yield _of_rank("fixed_four", [4, 3], (4, 3), batched=False)
    unnamed: Dims = ["?", 2, "?", "-1"]
    yield _of_rank("unnamed", unnamed, (ROWS, 2, "h", "w"), batched=True)
    yield Entry("any_rank", lambda: identity(TensorProto.FLOAT, None), array_of_any_rank, False)
    yield Entry("quantized", quantized, ids_below_40, False)
    widths = [6, 16, 3]
    yield Entry("mlp", lambda: mlp(widths), random_inputs({"x": ("FP32", (ROWS, 6))}), True)
    yield Entry(
        "weights_apart",
        lambda: mlp([5, 7, 2]),
        random_inputs({"x": ("FP32", (ROWS, 5))}),
        True,
        has_external_weights=True,
    )
    two = {"a": ("FP32", (ROWS, 2)), "b": ("FP32", (ROWS, 2))}
    yield Entry("added", added, random_inputs(two), True)
    apart: Dims = ["unk__1", 2]
    yield Entry("names_apart", lambda: added(apart, ["unk__2", 2]), random_inputs(two), True)
    yield Entry(
        "several",
        several,
        random_inputs(
            {"a": ("FP32", (ROWS, "n")), "b": ("INT64", (ROWS,)), "c": ("BYTES", (ROWS, 1))}
        ),
        True,
    )
    yield Entry(
        "unusual_names", unusual_names, random_inputs({"x/input:0": ("FP32", (ROWS, 2))}), True
    )
    yield Entry("half", half_matmul, random_inputs({"x": ("FP16", (ROWS, 4))}), True)
    yield Entry("regression", regression, random_inputs({"features": ("FP32", (ROWS, 3))}), True)
    yield Entry("last_axis", last_axis, random_inputs({"x": ("FP32", (3, ROWS))}), True)
    yield Entry("summed", summed, random_inputs({"x": ("FP32", (ROWS, "k"))}), True)
    yield Entry("summed_or_empty", summed, rows_that_may_be_empty, None)
    yield Entry("overridable", overridable, random_inputs({"x": ("FP32", (ROWS, 2))}), True)
    yield Entry("overridden", overridable, inputs_with_or_without_scale, True)


def _of_datatype(datatype: str) -> Entry:
    draw = random_inputs({"x": (datatype, (ROWS, 2))})
    return Entry(datatype.lower(), lambda: identity(ELEM_TYPES[datatype]), draw, True)


def _of_rank(name: str, dims: Dims, drawn_dims: tuple[int | str, ...], *, batched: bool) -> Entry:
    draw = random_inputs({"x": ("FP32", drawn_dims)})
    return Entry(name, lambda: identity(TensorProto.FLOAT, dims), draw, batched)


def array_of_any_rank(rng: Rng, rows: int) -> Feeds:
    shape = rng.integers(1, 3, rng.integers(0, 5), endpoint=True)
    return {"x": np.full(shape, rows, np.float32)}


def ids_below_40(rng: Rng, rows: int) -> Feeds:
    return {"ids": rng.integers(0, 40, rows)}


def several() -> onnx.ModelProto:
    """Three inputs of three datatypes, four outputs in another order."""
    nodes = [
        node("Identity", ["c"], ["words"]),
        node("Mul", ["b", "two"], ["doubled"]),
        node("ReduceSum", ["a", "axis"], ["sum"], keepdims=0),
        node("Greater", ["a", "nought"], ["positive"]),
    ]
    outputs = [
        tensor("words", ["batch", 1], TensorProto.STRING),
        tensor("positive", ["batch", "n"], TensorProto.BOOL),
        tensor("doubled", ["batch"], TensorProto.INT64),
        tensor("sum", ["batch"]),
    ]
    inputs = [
        tensor("a", ["batch", "n"]),
        tensor("b", ["batch"], TensorProto.INT64),
        tensor("c", ["batch", 1], TensorProto.STRING),
    ]
    weights: Weights = {
        "two": np.array(2, np.int64),
        "axis": np.array([1], np.int64),
        "nought": np.array(0, np.float32),
    }
    return model(nodes, inputs, outputs, weights)


def unusual_names() -> onnx.ModelProto:
    """Names with slashes, colons, spaces, quotes and non-ASCII letters; unsorted outputs."""
    nodes = [
        node("Neg", ["x/input:0"], ["z:0"]),
        node("Abs", ["x/input:0"], ["a b"]),
        node("Relu", ["x/input:0"], ['ω"']),
    ]
    shape: Dims = ["batch", 2]
    outputs = [tensor(name, shape) for name in ("z:0", 'ω"', "a b")]
    return model(nodes, [tensor("x/input:0", shape)], outputs)


def half_matmul() -> onnx.ModelProto:
    weights = {"w": np.random.default_rng(1).normal(size=(4, 3)).astype(np.float16)}
    return model(
        [node("MatMul", ["x", "w"], ["y"])],
        [tensor("x", ["batch", 4], TensorProto.FLOAT16)],
        [tensor("y", ["batch", 3], TensorProto.FLOAT16)],
        weights,
    )


def regression() -> onnx.ModelProto:
    """One number per row."""
    weights = {"w": np.array([1.5, -2, 0.25], np.float32), "bias": np.array(7, np.float32)}
    nodes = [node("MatMul", ["features", "w"], ["line"]), node("Add", ["line", "bias"], ["price"])]
    inputs = [tensor("features", ["batch", 3])]
    return model(nodes, inputs, [tensor("price", ["batch"])], weights)


def last_axis() -> onnx.ModelProto:
    """The batch is the last axis of the input, and the only axis of an output."""
    nodes = [node("Relu", ["x"], ["y"]), node("ReduceMax", ["x", "axis"], ["largest"], keepdims=0)]
    outputs = [tensor("y", [3, "batch"]), tensor("largest", ["batch"])]
    return model(nodes, [tensor("x", [3, "batch"])], outputs, {"axis": np.array([0], np.int64)})


def summed() -> onnx.ModelProto:
    """The sum of a row of any width."""
    return model(
        [node("ReduceSum", ["x", "axis"], ["y"], keepdims=1)],
        [tensor("x", ["batch", "k"])],
        [tensor("y", ["batch", 1])],
        {"axis": np.array([1], np.int64)},
    )


def rows_that_may_be_empty(rng: Rng, rows: int) -> Feeds:
    width = int(rng.integers(0, 3))
    return {"x": rng.normal(size=(rows, width)).astype(np.float32)}


def overridable() -> onnx.ModelProto:
    """`scale` has a default value in the graph, which a request may override."""
    return model(
        [node("Mul", ["x", "scale"], ["y"])],
        [tensor("x", ["batch", 2]), tensor("scale", [2])],
        [tensor("y", ["batch", 2])],
        {"scale": np.array([2, 3], np.float32)},
    )


def inputs_with_or_without_scale(rng: Rng, rows: int) -> Feeds:
    feeds: dict[str, Array] = {"x": rng.normal(size=(rows, 2)).astype(np.float32)}
    if rng.random() < 0.5:
        feeds["scale"] = rng.integers(1, 3, 2).astype(np.float32)
    return feeds

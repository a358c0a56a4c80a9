"""Models with control flow, and models with a state among inputs and outputs."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.zoo.entry import ROWS, Entry, Tensors, random_inputs
from tests.zoo.model_builder import Dims, Weights, model, node, tensor

HIDDEN = 128


def entries() -> Iterator[Entry]:
    pairs = random_inputs({"x": ("FP32", (ROWS, 2))})
    yield Entry("by_mean", by_mean, pairs, False)
    yield Entry("doubled_in_a_loop", doubled_in_a_loop, pairs, True)
    yield Entry("scan_over_rows", lambda: scanned(0), pairs, False)
    yield Entry("scan_over_columns", lambda: scanned(1), pairs, True)
    sequence = random_inputs({"frames": ("FP32", (ROWS, 576)), "h": ("FP32", (1, 1, HIDDEN))})
    yield Entry("sequence", sequence_of_frames, sequence, False)
    step: Tensors = {"input": ("FP32", (ROWS, 64)), "state": ("FP32", (2, ROWS, HIDDEN))}
    yield Entry("lstm_step", lstm_step, random_inputs({**step, "sr": ("INT64", ())}), True)
    layer: Tensors = {"x": ("FP32", ("time", ROWS, 4)), "h": ("FP32", (1, ROWS, HIDDEN))}
    yield Entry("gru", gru, random_inputs(layer), True)


def by_mean() -> onnx.ModelProto:
    """Twice the input if the mean of all rows is positive, else minus the input."""
    return _by("ReduceMean", 0)


def by_largest(threshold: float) -> onnx.ModelProto:
    """Twice the input if any number of any row is above the threshold, else minus the input."""
    return _by("ReduceMax", threshold)


def _by(operator: str, threshold: float) -> onnx.ModelProto:
    then = helper.make_graph([node("Add", ["x", "x"], ["t"])], "then", [], [tensor("t", None)])
    other = helper.make_graph([node("Neg", ["x"], ["o"])], "else", [], [tensor("o", None)])
    nodes = [
        node(operator, ["x"], ["found"], keepdims=0),
        node("Greater", ["found", "threshold"], ["above"]),
        node("If", ["above"], ["y"], then_branch=then, else_branch=other),
    ]
    weights = {"threshold": np.array(threshold, np.float32)}
    return model(nodes, [tensor("x", ["batch", 2])], [tensor("y", ["batch", 2])], weights)


def doubled_in_a_loop() -> onnx.ModelProto:
    """x · 2⁵, by a loop that doubles five times."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Add", ["v", "v"], ["v_next"])],
        "turn",
        [
            tensor("turn", [], TensorProto.INT64),
            tensor("go", [], TensorProto.BOOL),
            tensor("v", ["batch", 2]),
        ],
        [tensor("go_on", [], TensorProto.BOOL), tensor("v_next", ["batch", 2])],
    )
    nodes = [node("Loop", ["turns", "", "x"], ["y"], body=body)]
    weights = {"turns": np.array(5)}
    return model(nodes, [tensor("x", ["batch", 2])], [tensor("y", ["batch", 2])], weights)


def scanned(axis: int) -> onnx.ModelProto:
    """A running sum along an axis: along axis 0 rows depend on each other, along axis 1 not."""
    width: int | str = 2 if axis == 0 else "batch"
    body = helper.make_graph(
        [node("Add", ["sum", "one"], ["sum_next"]), node("Identity", ["sum_next"], ["out"])],
        "step",
        [tensor("sum", [width]), tensor("one", [width])],
        [tensor("sum_next", [width]), tensor("out", [width])],
    )
    nodes = [
        node("Split", ["x"], ["first", "second"], axis=1, num_outputs=2),
        node("Squeeze", ["first", "one_axis"], ["column"]),
        node("Sub", ["column", "column"], ["nothing"]),
    ]
    start = "nothing" if axis == 1 else "zeros"
    nodes.append(
        node(
            "Scan",
            [start, "x"],
            ["last", "y"],
            body=body,
            num_scan_inputs=1,
            scan_input_axes=[axis],
            scan_output_axes=[axis],
        )
    )
    weights: Weights = {"one_axis": np.array([1], np.int64), "zeros": np.zeros(2, np.float32)}
    return model(nodes, [tensor("x", ["batch", 2])], [tensor("y", ["batch", 2])], weights)


def sequence_of_frames() -> onnx.ModelProto:
    """A number for each frame of a recording: the first dimension is time."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, HIDDEN, 576), scale=0.02).astype(np.float32),
        "r": rng.normal(size=(1, HIDDEN, HIDDEN), scale=0.1).astype(np.float32),
        "axis": np.array([1]),
        "direction": np.array([1]),
        "last": np.array([-1]),
    }
    nodes = [
        node("Unsqueeze", ["frames", "axis"], ["stepped"]),
        node("RNN", ["stepped", "w", "r", "", "", "h"], ["all", "hn"], hidden_size=HIDDEN),
        node("Squeeze", ["all", "direction"], ["hidden"]),
        node("ReduceMean", ["hidden", "last"], ["mean"], keepdims=0),
        node("Squeeze", ["mean", "direction"], ["flat"]),
        node("Sigmoid", ["flat"], ["speech"]),
    ]
    return model(
        nodes,
        [tensor("frames", ["sequence_length", 576]), tensor("h", [1, 1, HIDDEN])],
        [tensor("speech", ["sequence_length"]), tensor("hn", [1, 1, HIDDEN])],
        weights,
    )


def lstm_step() -> onnx.ModelProto:
    """One step of an LSTM with its state as input and output, batched on axis 1; `sr` on none."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, 4 * HIDDEN, 64), scale=0.1).astype(np.float32),
        "r": rng.normal(size=(1, 4 * HIDDEN, HIDDEN), scale=0.1).astype(np.float32),
        "first": np.array([0]),
        "last": np.array([-1]),
        "rate": np.array(16000),
    }
    nodes = [
        node("Unsqueeze", ["input", "first"], ["step"]),
        node("Split", ["state"], ["h", "c"], axis=0, num_outputs=2),
        node("LSTM", ["step", "w", "r", "", "", "h", "c"], ["", "hn", "cn"], hidden_size=HIDDEN),
        node("Concat", ["hn", "cn"], ["stateN"], axis=0),
        node("Squeeze", ["hn", "first"], ["hidden"]),
        node("ReduceMean", ["hidden", "last"], ["mean"], keepdims=1),
        node("Sigmoid", ["mean"], ["probability"]),
        node("Greater", ["sr", "rate"], ["is_fast"]),
        node("Sub", ["probability", "probability"], ["nothing"]),
        node("Where", ["is_fast", "nothing", "probability"], ["output"]),
    ]
    state: Dims = [2, "batch", HIDDEN]
    inputs = [tensor("input", ["batch", 64]), tensor("state", state)]
    return model(
        nodes,
        [*inputs, tensor("sr", [], TensorProto.INT64)],
        [tensor("output", ["batch", 1]), tensor("stateN", state)],
        weights,
    )


def gru() -> onnx.ModelProto:
    """A whole sequence through a GRU: time is axis 0, the batch axis 1."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, 3 * HIDDEN, 4), scale=0.3).astype(np.float32),
        "r": rng.normal(size=(1, 3 * HIDDEN, HIDDEN), scale=0.1).astype(np.float32),
        "direction": np.array([1]),
    }
    nodes = [
        node("GRU", ["x", "w", "r", "", "", "h"], ["all", "hn"], hidden_size=HIDDEN),
        node("Squeeze", ["all", "direction"], ["y"]),
    ]
    return model(
        nodes,
        [tensor("x", ["time", "batch", 4]), tensor("h", [1, "batch", HIDDEN])],
        [tensor("y", ["time", "batch", HIDDEN]), tensor("hn", [1, "batch", HIDDEN])],
        weights,
    )

"""The measured models, their inputs, and ONNX Runtime alone for comparison."""

import json
import shutil
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Rows = npt.NDArray[np.float32]

WIDTHS = {"iris": 4, "digits": 64, "mlp": 784}


def place(folder: Path) -> None:
    """Writes the shipped models, and an MLP 784-1024-1024-10, to a model folder."""
    shipped = Path(__file__).parent.parent.parent / "model"
    for name in ("iris", "digits"):
        shutil.copytree(shipped / name, folder / name)
    (folder / "mlp" / "1").mkdir(parents=True)
    onnx.save(_mlp(784, 1024, 1024, 10), folder / "mlp" / "1" / "model.onnx")


def place_many(folder: Path, count: int) -> None:
    """Writes the Iris model to a model folder under `count` names."""
    shipped = Path(__file__).parent.parent.parent / "model" / "iris"
    for number in range(count):
        shutil.copytree(shipped, folder / f"m{number:03}")


def _mlp(*widths: int) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    nodes, weights, before = [], [], "x"
    for layer, (wide, out) in enumerate(pairwise(widths)):
        weight = (random.standard_normal((wide, out)) / np.sqrt(wide)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        last = layer == len(widths) - 2
        nodes.append(
            helper.make_node("MatMul", [before, f"w{layer}"], ["y" if last else f"h{layer}"])
        )
        if not last:
            nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]))
            before = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", widths[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", widths[-1]])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def inputs(model: str, count: int) -> list[bytes]:
    """JSON inputs of one row each."""
    random = np.random.default_rng(1)
    rows = random.uniform(0, 5, (min(count, 500), WIDTHS[model])).round(4)
    texts = [json.dumps([row.tolist()]).encode() for row in rows]
    return [texts[i % len(texts)] for i in range(count)]


def session(folder: Path, model: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = folder / model / "1" / "model.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def predictions(folder: Path, model: str, texts: Sequence[bytes]) -> list[int]:
    """The most probable class of each row, by ONNX Runtime alone."""
    bare = session(folder, model)
    rows = np.concatenate([np.asarray(json.loads(text), dtype=np.float32) for text in texts])
    outputs = bare.run(None, {bare.get_inputs()[0].name: rows})
    return [int(row) for row in np.argmax(outputs[-1], axis=1)]


def bare_rows_per_second(folder: Path, model: str, batch: int, seconds: float) -> float:
    """Rows per second of ONNX Runtime alone, with one thread and always the same batch."""
    bare = session(folder, model)
    rows: Rows = np.random.default_rng(2).uniform(0, 5, (batch, WIDTHS[model])).astype(np.float32)
    feed = {bare.get_inputs()[0].name: rows}
    bare.run(None, feed)
    runs, since = 0, time.perf_counter()
    while time.perf_counter() - since < seconds:
        bare.run(None, feed)
        runs += 1
    return runs * batch / (time.perf_counter() - since)

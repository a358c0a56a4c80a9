"""Functions that build an ONNX model and write it to a model folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET: Final = 18
IR_VERSION: Final = 9

Dims: TypeAlias = Sequence[int | str | None]
Weights: TypeAlias = Mapping[str, npt.NDArray[Any]]

node = helper.make_node


def place(
    folder: Path, name: str, model: onnx.ModelProto, *, version: int = 1, toml: str = ""
) -> Path:
    """Writes `model` to the model folder; returns its file."""
    return place_bytes(folder, name, model.SerializeToString(), version=version, toml=toml)


def place_bytes(
    folder: Path, name: str, content: bytes, *, version: int = 1, toml: str = ""
) -> Path:
    """Writes any content to the model folder as if it were a model; returns the file."""
    path = folder / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    if toml:
        (folder / name / "model.toml").write_text(toml)
    return path


def tensor(
    name: str, shape: Dims | None, elem_type: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Weights | None = None,
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(w, name) for name, w in (weights or {}).items()]
    graph = helper.make_graph(nodes, "zoo", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

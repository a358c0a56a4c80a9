"""Files that are no models, and hostile models: each must be refused with a reason."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.zoo.behaviour import identity, mlp
from tests.zoo.model_builder import Dims, model, node, place, place_bytes, tensor

Place: TypeAlias = Callable[[Path, str], object]
"""Writes a model to the model folder, under a name."""

SECRET: Final = b"root:x:0:0:" + bytes(389)
"""The content of a file outside of the model folder: 400 bytes, which could serve as weights."""

_NESTED: Final = 400
_EXPANSION_DEPTH: Final = 12


def _content(content: bytes) -> Place:
    return lambda folder, name: place_bytes(folder, name, content)


def _good_model() -> bytes:
    content: bytes = mlp([4, 3]).SerializeToString()
    return content


def _altered(alter: Callable[[onnx.ModelProto], object]) -> Place:
    """A good model that `alter` has changed."""

    def put(folder: Path, name: str) -> None:
        made = mlp([4, 3])
        alter(made)
        place(folder, name, made)

    return put


def _set_opset(made: onnx.ModelProto) -> None:
    made.opset_import[0].version = 999


def _set_ir_version(made: onnx.ModelProto) -> None:
    made.ir_version = 999


def _rename_operator(made: onnx.ModelProto) -> None:
    made.graph.node[0].op_type = "MatMulTypo"


def _move_operator(made: onnx.ModelProto) -> None:
    made.graph.node[0].domain = "com.example"


def _close_circle(made: onnx.ModelProto) -> None:
    made.graph.node[0].input[0] = "y"


def _claim(dims: list[int]) -> Callable[[onnx.ModelProto], None]:
    """Changes the weights' shape, but not their bytes."""

    def alter(made: onnx.ModelProto) -> None:
        weight = made.graph.initializer[0]
        del weight.dims[:]
        weight.dims.extend(dims)

    return alter


def _give_sparse_input(made: onnx.ModelProto) -> None:
    made.graph.input[0].type.sparse_tensor_type.elem_type = TensorProto.FLOAT


def sequence_output() -> onnx.ModelProto:
    sequence = helper.make_sequence_type_proto(
        helper.make_tensor_type_proto(TensorProto.FLOAT, ["batch", 2])
    )
    nodes = [node("SequenceConstruct", ["x"], ["y"])]
    return model(nodes, [tensor("x", ["batch", 2])], [helper.make_value_info("y", sequence)])


def nested() -> bytes:
    """If within If within If, deeper than the `onnx` library can write it."""
    node_bytes: bytes = node("Identity", ["x"], ["y"]).SerializeToString()
    for depth in range(_NESTED):
        outer = node("If", ["yes"], ["y"], name=f"if{depth}").SerializeToString()
        branch = helper.make_attribute("then_branch", helper.make_graph([], "g", [], []))
        inner = branch.SerializeToString() + _field(6, _field(1, node_bytes))
        node_bytes = outer + _field(5, inner)
    flat = model([], [tensor("x", ["batch", 2])], [tensor("y", ["batch", 2])])
    content: bytes = flat.SerializeToString() + _field(7, _field(1, node_bytes))
    return content


def _field(number: int, content: bytes) -> bytes:
    """A field with a message; protobuf merges the messages of a repeated singular field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    low = number & 127
    return bytes([low | 128]) + _varint(number >> 7) if number > 127 else bytes([low])


def allocating() -> onnx.ModelProto:
    """Allocates 64 GiB, when the graph is folded at load or at the latest when it runs."""
    filling_value = numpy_helper.from_array(np.ones(1, np.float32))
    nodes = [
        node("ConstantOfShape", ["size"], ["filling"], value=filling_value),
        node("ReduceMax", ["filling"], ["most"], keepdims=0),
        node("Add", ["x", "most"], ["y"]),
    ]
    shape: Dims = ["batch", 1]
    return model(nodes, [tensor("x", shape)], [tensor("y", shape)], {"size": np.array([2**34])})


def recursive_function() -> onnx.ModelProto:
    """A function that calls itself."""
    return _with_functions({"f": ["f"]}, "f")


def exponential_functions() -> onnx.ModelProto:
    """Ten calls of a function that makes ten calls, twelve deep: 10¹² nodes when inlined.

    It is the "billion laughs" attack with ONNX functions.
    """
    calls = {f"f{depth}": [f"f{depth + 1}"] * 10 for depth in range(_EXPANSION_DEPTH)}
    return _with_functions({**calls, f"f{_EXPANSION_DEPTH}": []}, "f0")


def _with_functions(calls: dict[str, list[str]], first: str) -> onnx.ModelProto:
    made = model(
        [node(first, ["x"], ["y"], domain="local")],
        [tensor("x", ["batch", 2])],
        [tensor("y", ["batch", 2])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    made.opset_import.append(opsets[1])
    for name, called in calls.items():
        steps = ["a", *(f"s{step}" for step in range(len(called)))]
        nodes = [
            node(callee, [steps[step]], [steps[step + 1]], domain="local")
            for step, callee in enumerate(called)
        ]
        nodes.append(node("Neg", [steps[-1]], ["b"]))
        made.functions.append(helper.make_function("local", name, ["a"], ["b"], nodes, opsets))
    return made


def aborting_split() -> onnx.ModelProto:
    """Aborts the process that loads it: ONNX Runtime 1.32 writes more outputs than it allocated."""
    nodes = [node("Split", ["x"], ["a", "y"], axis=1, num_outputs=1)]
    return model(nodes, [tensor("x", ["batch", 2])], [tensor("y", ["batch", 2])])


def aborting_scan() -> onnx.ModelProto:
    """Aborts the process that runs it with at least 3 rows of 3 numbers; 2 by 2 works."""
    body = helper.make_graph(
        [node("Add", ["sum", "one"], ["next"]), node("Identity", ["next"], ["out"])],
        "step",
        [tensor("sum", ["batch"]), tensor("one", ["batch"])],
        [tensor("next", ["batch"]), tensor("out", ["batch"])],
    )
    nodes = [
        node("Split", ["x"], ["first", "second"], axis=1, num_outputs=2),
        node("Squeeze", ["first"], ["start"]),
        node(
            "Scan",
            ["start", "x"],
            ["last", "y"],
            body=body,
            num_scan_inputs=1,
            scan_input_axes=[1],
            scan_output_axes=[1],
        ),
    ]
    return model(nodes, [tensor("x", ["batch", "w"])], [tensor("y", ["batch", "w"])])


# --- weights in other folders ------------------------------------------------------------------


def _weights_at(location: str) -> onnx.ModelProto:
    made = model(
        [node("Add", ["x", "stolen"], ["y"])],
        [tensor("x", ["batch", 100])],
        [tensor("y", ["batch", 100])],
    )
    stolen = made.graph.initializer.add(
        name="stolen",
        data_type=TensorProto.FLOAT,
        dims=[100],
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(SECRET)))):
        stolen.external_data.add(key=key, value=value)
    return made


def _secret(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}-secret"
    path.write_bytes(SECRET)
    return path


def _absolute(folder: Path, name: str) -> None:
    place(folder, name, _weights_at(str(_secret(folder))))


def _upwards(folder: Path, name: str) -> None:
    place(folder, name, _weights_at(f"../../../{_secret(folder).name}"))


def _linked(link: Callable[[Path, Path], object]) -> Place:
    def put(folder: Path, name: str) -> None:
        path = place(folder, name, _weights_at("weights.bin"))
        link(_secret(folder), path.parent / "weights.bin")

    return put


def _linked_folder(folder: Path, name: str) -> None:
    path = place(folder, name, _weights_at(f"data/{_secret(folder).name}"))
    os.symlink(folder.parent, path.parent / "data")


BROKEN: Final[dict[str, Place]] = {
    "empty": _content(b""),
    "random": _content(np.random.default_rng(0).bytes(5000)),
    "zeros": _content(bytes(5000)),
    "cut_short": _content(_good_model()[:-40]),
    "cut_in_half": _content(_good_model()[: len(_good_model()) // 2]),
    "of_the_future": _altered(_set_opset),
    "of_a_later_format": _altered(_set_ir_version),
    "unknown_operator": _altered(_rename_operator),
    "unknown_domain": _altered(_move_operator),
    "circle": _altered(_close_circle),
    "claims_much": _altered(_claim([4, 2**40])),
    "claims_more_than_there_is": _altered(_claim([4, 2**62])),
    "claims_less_than_nothing": _altered(_claim([-4, 3])),
    "sparse_input": _altered(_give_sparse_input),
    "sequence_output": lambda folder, name: place(folder, name, sequence_output()),
    "nested": _content(nested()),
    "of_complex_numbers": lambda folder, name: place(folder, name, identity(TensorProto.COMPLEX64)),
}
"""Refused when they are loaded."""

OUTSIDE_WEIGHTS: Final[dict[str, Place]] = {
    "weights_absolute": _absolute,
    "weights_upwards": _upwards,
    "weights_symlink": _linked(lambda target, link: os.symlink(target, link)),
    "weights_hardlink": _linked(lambda target, link: os.link(target, link)),
    "weights_in_linked_folder": _linked_folder,
    "weights_missing": lambda folder, name: place(folder, name, _weights_at("nowhere.bin")),
    "weights_a_device": lambda folder, name: place(folder, name, _weights_at("/dev/zero")),
}
"""Would read a file outside of their folder as weights."""

BOMBS: Final[dict[str, Place]] = {
    "allocating": lambda folder, name: place(folder, name, allocating()),
    "recursive": lambda folder, name: place(folder, name, recursive_function()),
    "aborting_split": lambda folder, name: place(folder, name, aborting_split()),
    "aborting_scan": lambda folder, name: place(folder, name, aborting_scan()),
}
"""May end the process that loads them, which must not be the worker."""

"""Each reason why jobs are not batched names a remedy, and the remedy works."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from msgspec import Struct
from onnx import TensorProto, helper

from asyncinfer.engine import Engine
from asyncinfer.models.batching_obstacles import Obstacle
from asyncinfer.models.folder import scan
from asyncinfer.models.signature import Signature
from tests import zoo
from tests.zoo.model_builder import node

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


class Case(Struct, frozen=True):
    """A model that is not batched, and the same model after its remedy."""

    off: Callable[[], onnx.ModelProto]
    words: str
    """A part of the remedy's text."""
    toml: str = ""
    remedied: Callable[[], onnx.ModelProto] | None = None
    """The model as exported again."""
    remedied_toml: str = ""
    probe_seconds: float = 5.0


def with_tanh(
    wrong: list[onnx.NodeProto], shape: zoo.Dims | None, weights: zoo.Weights | None = None
) -> onnx.ModelProto:
    """A model with `y`, the output of the wrong nodes, and `z`, whose rows are independent."""
    return zoo.model(
        [*wrong, node("Tanh", ["x"], ["z"])],
        [zoo.tensor("x", ["batch", 8])],
        [zoo.tensor("y", shape), zoo.tensor("z", ["batch", 8])],
        weights,
    )


def only_y(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.output[1]
    return model


def unsteady() -> onnx.ModelProto:
    """A model whose rows are along axis 1 if a number is negative, else along axis 0."""
    then = helper.make_graph([node("Transpose", ["x"], ["t"])], "then", [], [zoo.tensor("t", None)])
    other = helper.make_graph([node("Identity", ["x"], ["o"])], "else", [], [zoo.tensor("o", None)])
    nodes = [
        node("ReduceMin", ["x", "both"], ["least"], keepdims=0),
        node("Less", ["least", "zero"], ["below"]),
        node("If", ["below"], ["y"], then_branch=then, else_branch=other),
    ]
    weights = {"zero": np.array(0, np.float32), "both": np.array([0, 1])}
    return with_tanh(nodes, None, weights)


def clipped() -> onnx.ModelProto:
    """A model that changes all rows if one of them has a larger number than any probe row."""
    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Greater", ["most", "limit"], ["above"]),
        node("Where", ["above", "limit", "x"], ["y"]),
    ]
    return with_tanh(nodes, ["batch", 8], {"limit": np.array(1e4, np.float32)})


def in_training() -> onnx.ModelProto:
    nodes = [node("Dropout", ["x", "half", "yes"], ["y"])]
    weights = {"half": np.array(0.5, np.float32), "yes": np.array(True)}
    return only_y(with_tanh(nodes, ["batch", 8], weights))


def squeezed() -> onnx.ModelProto:
    return with_tanh([node("Squeeze", ["x"], ["y"])], None)


def pairs() -> onnx.ModelProto:
    nodes = [node("Transpose", ["x"], ["t"]), node("MatMul", ["x", "t"], ["y"])]
    return with_tanh(nodes, ["batch", "batch"])


def doubled() -> onnx.ModelProto:
    return with_tanh([node("Concat", ["x", "x"], ["y"], axis=0)], ["twice", 8])


def normed() -> onnx.ModelProto:
    nodes = [node("ReduceMean", ["x", "rows"], ["m"]), node("Sub", ["x", "m"], ["y"])]
    return with_tanh(nodes, ["batch", 8], {"rows": np.array([0])})


def nothing_in() -> onnx.ModelProto:
    constant = helper.make_tensor("c", FLOAT, [1], [1.0])
    return zoo.model([node("Constant", [], ["y"], value=constant)], [], [zoo.tensor("y", [1])])


def deep(depth: int) -> onnx.ModelProto:
    """A model with branches within branches."""
    inner = [node("Tanh", ["x"], ["y0"])]
    for at in range(depth):
        given = [zoo.tensor(f"y{at}", ["batch", 2])]
        then = helper.make_graph(inner, f"then{at}", [], given)
        copy = [node("Identity", ["x"], [f"y{at}"])]
        other = helper.make_graph(copy, f"else{at}", [], given)
        inner = [node("If", ["yes"], [f"y{at + 1}"], then_branch=then, else_branch=other)]
    inputs, outputs = [zoo.tensor("x", ["batch", 2])], [zoo.tensor(f"y{depth}", ["batch", 2])]
    return zoo.model(inner, inputs, outputs, {"yes": np.array(True)})


def unchanged() -> onnx.ModelProto:
    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Mul", ["s", "zero"], ["y"]),
    ]
    weights = {"zero": np.array([0, 0], np.float32)}
    return zoo.model(nodes, [zoo.tensor("x", ["batch", 2])], [zoo.tensor("y", [2])], weights)


def far_table() -> onnx.ModelProto:
    """A model that only accepts numbers from 1000 to 1004."""
    nodes = [
        node("Sub", ["x", "offset"], ["ids"]),
        node("Gather", ["table", "ids"], ["y"]),
    ]
    weights = {"table": np.eye(5, dtype=np.float32), "offset": np.array(1000)}
    inputs, outputs = [zoo.tensor("x", ["batch"], INT64)], [zoo.tensor("y", ["batch", 5])]
    return zoo.model(nodes, inputs, outputs, weights)


def flat(rows: int) -> onnx.ModelProto:
    nodes = [node("Reshape", ["x", "shape"], ["y"])]
    weights = {"shape": np.array([rows, 4])}
    return zoo.model(
        nodes, [zoo.tensor("x", ["batch", 2, 2])], [zoo.tensor("y", ["batch", 4])], weights
    )


def above_a_thousand() -> onnx.ModelProto:
    weights = {"limit": np.array(1000, np.float32)}
    return zoo.model(
        [node("Greater", ["x", "limit"], ["y"])],
        [zoo.tensor("x", ["batch", 2])],
        [zoo.tensor("y", ["batch", 2], TensorProto.BOOL)],
        weights,
    )


def numbers_and_categories() -> onnx.ModelProto:
    known = ["basic", "pro"]
    nodes = [
        node("OneHotEncoder", ["plan"], ["hot"], domain="ai.onnx.ml", cats_strings=known, zeros=0),
        node("Reshape", ["hot", "shape"], ["columns"]),
        node("Concat", ["age", "columns"], ["y"], axis=1),
    ]
    inputs = [zoo.tensor("age", [None, 1]), zoo.tensor("plan", [None, 1], STRING)]
    outputs = [zoo.tensor("y", [None, 3])]
    return zoo.model(nodes, inputs, outputs, {"shape": np.array([-1, 2])})


def tanh(*shape: int | str | None) -> Callable[[], onnx.ModelProto]:
    return lambda: zoo.unary("Tanh", shape)


EXPORT: Final = "export it with a dynamic first dimension"
LEAVE_OUT: Final = "keep only other outputs, with `outputs` in model.toml"
ROW_EACH: Final = "export it so that this output has a row for each row of the input"
FORCE: Final = "[batching]\nenabled = true"
Z: Final = 'outputs = ["z"]'

CASES: Final = {
    "asked": Case(
        tanh("b", 2), "without `batching.enabled = false`", "[batching]\nenabled = false"
    ),
    "no_input": Case(nothing_in, "export it with an input that has rows", remedied=tanh("b", 2)),
    "scalar": Case(tanh(), EXPORT, remedied=tanh("b")),
    "fixed": Case(tanh(1, 2), EXPORT, remedied=tanh("b", 2)),
    "other_open": Case(
        tanh(1, "n"),
        "if dimension 1 counts rows, set `batching.axis = 1`",
        remedied_toml="[batching]\naxis = 1",
    ),
    "any_rank": Case(
        lambda: zoo.unary("Tanh", None), "export it with a shape", remedied=tanh("b", 2)
    ),
    "dynamic beside": Case(clipped, LEAVE_OUT, remedied_toml=Z),
    "dynamic": Case(zoo.quantized, "`batching.enabled = true`", remedied_toml=FORCE),
    "unread": Case(lambda: deep(17), "`batching.enabled = true`", remedied_toml=FORCE),
    "slow": Case(
        lambda: zoo.loop_for_hours("batch"),
        "`batching.enabled = true` in model.toml batches jobs without a probe",
        remedied_toml=FORCE,
        probe_seconds=0.05,
    ),
    "none_ran": Case(
        far_table, "give several rows in `example`", remedied_toml="example = [1000, 1004]"
    ),
    "none_ran_like_example": Case(
        far_table,
        "give several rows in `example` in model.toml that the model accepts",
        "example = [1, 2]",
        remedied_toml="example = [1000, 1004]",
    ),
    "failed_together": Case(
        lambda: flat(1), "export it without a fixed number of rows", remedied=lambda: flat(-1)
    ),
    "no_rows": Case(unchanged, "export it with one that has", remedied=tanh("b", 2)),
    "one_answer": Case(
        above_a_thousand,
        "give several rows in `example` in model.toml that get different results",
        remedied_toml="example = [[1, 2], [2000, 3000]]",
    ),
    "one_value": Case(
        numbers_and_categories,
        "give several rows in `example` in model.toml that differ in it",
        '[example]\nage = [[30]]\nplan = [["pro"]]',
        remedied_toml='[example]\nage = [[30], [40]]\nplan = [["pro"], ["basic"]]',
    ),
    "unsteady": Case(unsteady, LEAVE_OUT, remedied_toml=Z),
    "mixes": Case(normed, LEAVE_OUT, remedied_toml=Z),
    "unsteady_numbers": Case(in_training, "export it for inference", remedied=tanh("b", 8)),
    "rank": Case(squeezed, LEAVE_OUT, remedied_toml=Z),
    "shape": Case(pairs, LEAVE_OUT, remedied_toml=Z),
    "count": Case(doubled, LEAVE_OUT, remedied_toml=Z),
    "unsteady alone": Case(lambda: only_y(unsteady()), ROW_EACH, remedied=tanh("b", 8)),
    "mixes alone": Case(lambda: only_y(normed()), "`batching.enabled = true`", remedied_toml=FORCE),
    "rank alone": Case(lambda: only_y(squeezed()), ROW_EACH, remedied=tanh("b", 8)),
    "shape alone": Case(lambda: only_y(pairs()), ROW_EACH, remedied=tanh("b", 8)),
    "count alone": Case(lambda: only_y(doubled()), ROW_EACH, remedied=tanh("b", 8)),
}


def loaded(folder: Path, model: onnx.ModelProto, toml: str, seconds: float) -> Signature:
    zoo.place(folder, "m", model, toml=toml)
    (file,) = scan(folder)
    return Engine.load(file, intra_op_threads=1, probe_seconds=seconds).signature


def test_every_reason_has_a_case() -> None:
    assert {name.partition(" ")[0].upper() for name in CASES} == {off.name for off in Obstacle}


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_of_a_reason_is_named_and_makes_the_model_batch(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    off = Obstacle[name.partition(" ")[0].upper()]

    signature = loaded(tmp_path / "off", case.off(), case.toml, case.probe_seconds)
    model = (case.remedied or case.off)()
    remedied = loaded(tmp_path / "on", model, case.remedied_toml, case.probe_seconds)

    assert not signature.batched
    beginning = off.description.partition("{")[0]
    assert signature.batching.startswith(f"off: {beginning}"), signature.batching
    assert case.words in signature.batching
    assert remedied.batched, remedied.batching

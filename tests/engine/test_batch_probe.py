"""Batching: jobs that share a run get the answers that each gets alone in bare ONNX Runtime."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from asyncinfer.engine import Engine, Stop
from asyncinfer.engine.runner import Runner
from asyncinfer.engine.runtime import ort
from asyncinfer.errors import ModelFailed, ModelRefused
from asyncinfer.jobs import Facts, Record
from asyncinfer.models import batching, results
from asyncinfer.models.folder import scan
from asyncinfer.repository.claims import ClaimedJob
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import Feeds, TensorSpec
from asyncinfer.worker import execution
from tests import zoo
from tests.models.single_result import render_result

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def load_model(folder: Path, model: onnx.ModelProto, toml: str = "") -> Engine:
    zoo.place(folder, "m", model, toml=toml)
    (file,) = scan(folder)
    return Engine.load(file, intra_op_threads=1)


def load_error(folder: Path, model: onnx.ModelProto, toml: str = "") -> str:
    with pytest.raises(ModelRefused) as refused:
        load_model(folder, model, toml)
    return refused.value.detail


def new_claimed_job(at: int, feeds: Feeds, **requested: Any) -> ClaimedJob:
    record = Record(
        1, "q", "m", "default", 0, payload="tensors", **{"answer": "tensors", **requested}
    )
    return ClaimedJob(f"job{at}", packing.pack(feeds), b"12345678", record, Facts())


def run_jobs(engine: Engine, jobs: Sequence[Feeds], **requested: Any) -> tuple[int, list[bytes]]:
    """Runs the jobs of one claim; returns how many runs it took, and the result of each job."""
    return run_claimed(
        engine, [new_claimed_job(at, feeds, **requested) for at, feeds in enumerate(jobs)]
    )


def run_claimed(engine: Engine, claims: Sequence[ClaimedJob]) -> tuple[int, list[bytes]]:
    """Runs the jobs of one claim, which need not want the same; returns what `run_jobs` does."""
    prepared = execution.prepare(claims, lambda _: engine, "m")
    assert not prepared.refused, prepared.refused
    answers = {
        job.job_id: body
        for batch in prepared.batches
        for job, body in zip(batch.jobs, execution.run(batch, Stop()), strict=True)
    }
    return len(prepared.batches), [answers[job.job_id] for job in claims]


def assert_equal_arrays(actual: Any, expected: Any) -> None:
    assert actual.shape == expected.shape
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-4)
    else:
        np.testing.assert_array_equal(actual, expected)


def count_runs(engine: Engine, folder: Path, jobs: Sequence[Feeds]) -> int:
    """Runs the jobs and asserts that each gets what a bare session gives it alone; returns how many
    runs it took."""
    bare = ort.InferenceSession(str(folder / "m/1/model.onnx"), providers=["CPUExecutionProvider"])
    runs, bodies = run_jobs(engine, jobs)
    for feeds, body in zip(jobs, bodies, strict=True):
        for actual, expected in zip(
            packing.unpack(body).values(), bare.run(None, dict(feeds)), strict=True
        ):
            assert_equal_arrays(actual, expected)
    return runs


def floats(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- models ------------------------------------------------------------------------------------


def stateful() -> onnx.ModelProto:
    """A recurrent cell: `input` [batch, 4], `state` [2, batch, 4] and the scalar `sr`."""
    nodes = [
        helper.make_node("ReduceSum", ["state", "zero"], ["summed"], keepdims=0),
        helper.make_node("Cast", ["sr"], ["rate"], to=FLOAT),
        helper.make_node("Add", ["input", "summed"], ["mixed"]),
        helper.make_node("Add", ["mixed", "rate"], ["output"]),
        helper.make_node("Tanh", ["output"], ["next"]),
        helper.make_node("Unsqueeze", ["next", "zero"], ["one"]),
        helper.make_node("Concat", ["one", "state"], ["three"], axis=0),
        helper.make_node("Slice", ["three", "zero", "two", "zero"], ["stateN"]),
    ]
    return zoo.model(
        nodes,
        [
            zoo.tensor("input", ["batch", 4]),
            zoo.tensor("state", [2, "batch", 4]),
            zoo.tensor("sr", [], INT64),
        ],
        [zoo.tensor("output", ["batch", 4]), zoo.tensor("stateN", ["a", "b", 4])],
        {"zero": np.array([0]), "two": np.array([2])},
    )


def over_time() -> onnx.ModelProto:
    """An RNN over [sequence_length, 576]."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Unsqueeze", ["x", "one"], ["steps"]),
        helper.make_node("RNN", ["steps", "w", "r"], ["all"], hidden_size=3),
        helper.make_node("Reshape", ["all", "flat"], ["y"]),
    ]
    weights: zoo.Weights = {
        "w": rng.normal(size=(1, 3, 576)).astype(np.float32) / 24,
        "r": rng.normal(size=(1, 3, 3)).astype(np.float32),
        "one": np.array([1]),
        "flat": np.array([-1, 3]),
    }
    shape: zoo.Dims = ["sequence_length", 576]
    return zoo.model(
        nodes, [zoo.tensor("x", shape)], [zoo.tensor("y", ["sequence_length", 3])], weights
    )


def image() -> onnx.ModelProto:
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"])
    return zoo.model(
        [node],
        [zoo.tensor("x", ["batch", 3, "height", "width"])],
        [zoo.tensor("y", ["batch", 3, 1, 1])],
    )


def table(size: int = 5) -> onnx.ModelProto:
    """Rows of a table by number; a number that the table does not have fails."""
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    return zoo.model(
        [node],
        [zoo.tensor("ids", ["batch", "length"], INT64)],
        [zoo.tensor("y", ["batch", "length", 2])],
        {"table": floats(size, 2)},
    )


def words() -> onnx.ModelProto:
    node = helper.make_node(
        "LabelEncoder",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        keys_strings=["a", "some text"],
        values_int64s=[1, 2],
    )
    return zoo.model(
        [node], [zoo.tensor("x", ["n", 2], STRING)], [zoo.tensor("y", ["n", 2], INT64)]
    )


def halves() -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    half = TensorProto.FLOAT16
    return zoo.model(
        [node],
        [zoo.tensor("x", ["batch", 4], half)],
        [zoo.tensor("y", ["batch", 3], half)],
        {"w": floats(4, 3).astype(np.float16)},
    )


def nearly_unmixed() -> onnx.ModelProto:
    """Other rows change a row by at most five parts in a thousand, which is no rounding."""
    nodes = [
        helper.make_node("Tanh", ["x"], ["bounded"]),
        helper.make_node("ReduceMean", ["bounded", "axes"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "share"], ["change"]),
        helper.make_node("Mul", ["x", "change"], ["changed"]),
        helper.make_node("Add", ["x", "changed"], ["y"]),
    ]
    weights: zoo.Weights = {"axes": np.array([0]), "share": np.array(5e-3, np.float32)}
    return zoo.model(nodes, [zoo.tensor("x", ["n", 2])], [zoo.tensor("y", ["n", 2])], weights)


# --- shared runs -------------------------------------------------------------------------------


def test_a_state_on_another_axis_and_an_equal_scalar_share_a_run(tmp_path: Path) -> None:
    engine = load_model(tmp_path, stateful())

    def job(rows: int, rate: int) -> Feeds:
        state = floats(2, rows, 4, seed=rows)
        return {"input": floats(rows, 4), "state": state, "sr": np.array(rate)}

    jobs = [job(1, 8), job(2, 16), job(3, 8), job(1, 16)]

    assert engine.signature.input_axes == (0, 1, None), engine.signature.batching
    assert engine.signature.output_axes == (0, 1)
    assert count_runs(engine, tmp_path, jobs) == 2


def test_images_of_equal_sizes_share_a_run(tmp_path: Path) -> None:
    sizes = [(8, 8), (9, 8), (8, 8)]
    jobs = [{"x": floats(1, 3, *size, seed=at)} for at, size in enumerate(sizes)]

    assert count_runs(load_model(tmp_path, image()), tmp_path, jobs) == 2


@pytest.mark.parametrize(
    ("build", "jobs", "runs"),
    [
        (table, [{"ids": np.array([[0, 4]])}, {"ids": np.array([[3, 1], [2, 2]])}], 1),
        (words, [{"x": np.array([["a", ""]], object)}, {"x": np.array([["é", "a"]], object)}], 1),
        (
            halves,
            [{"x": floats(n, 4, seed=n).astype(np.float16)} for n in (1, 2, 3)],
            1,
        ),
        (zoo.added, [{"a": floats(n, 2), "b": floats(n, 2, seed=n)} for n in (1, 3)], 1),
        (over_time, [{"x": floats(n, 576, seed=n)} for n in (2, 3)], 2),
        (zoo.running_sum, [{"x": floats(n, 2)} for n in (2, 3)], 2),
        (zoo.minus_mean, [{"x": floats(n, 2)} for n in (2, 3)], 2),
        (nearly_unmixed, [{"x": floats(n, 2)} for n in (2, 3)], 2),
        (zoo.sorted_rows, [{"x": floats(n, 2)} for n in (2, 3)], 2),
        (zoo.positive_rows, [{"x": floats(n, 2)} for n in (2, 3)], 2),
        (zoo.recurrent, [{"x": floats(n, 1, 3)} for n in (2, 3)], 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_only_what_is_proved_shares_a_run(
    tmp_path: Path, build: Callable[[], onnx.ModelProto], jobs: list[Feeds], runs: int
) -> None:
    engine = load_model(tmp_path, build())

    assert count_runs(engine, tmp_path, jobs) == runs, engine.signature.batching


@pytest.mark.parametrize("declared", [[2], [1, 2], []])
def test_an_output_is_described_as_it_was_seen_where_the_file_declares_another_shape(
    tmp_path: Path, declared: list[int]
) -> None:
    """A scalar with rows in dimension 0 was an error to the client, which then showed no model."""
    node = helper.make_node(
        "LinearClassifier",
        ["x"],
        ["label", "p"],
        domain="ai.onnx.ml",
        classlabels_ints=[0, 1],
        coefficients=[1.0, 0.0, 0.0, 1.0],
        intercepts=[0.0, 0.0],
    )
    label = zoo.tensor("label", [1], INT64)
    model = zoo.model([node], [zoo.tensor("x", ["b", 2])], [label, zoo.tensor("p", declared)])

    signature = load_model(tmp_path, model).signature

    assert signature.batched, signature.batching
    seen_label, seen = signature.outputs
    assert seen_label.shape == (None,)
    assert seen.shape is not None
    assert len(seen.shape) == 2
    assert not isinstance(seen.shape[0], int)


def test_a_job_of_no_rows_is_answered_and_stays_alone(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.mlp([4, 3]))
    plan = engine.plan
    assert plan is not None

    assert batching.run_key({"x": floats(0, 4)}, plan) is None
    assert engine.run({"x": floats(0, 4)}, Stop())[0].shape == (0, 3)


def test_the_wanted_outputs_decide_which_jobs_share_a_run(tmp_path: Path) -> None:
    engine = load_model(tmp_path, stateful(), 'outputs = ["stateN", "output"]')
    job = {"input": floats(1, 4), "state": floats(2, 1, 4), "sr": np.array(8)}

    _, (everything,) = run_jobs(engine, [job])
    _, (single,) = run_jobs(engine, [job], outputs=("output",))
    _, (text,) = run_jobs(engine, [job], answer="json")

    assert list(packing.unpack(everything)) == ["stateN", "output"]
    assert list(packing.unpack(single)) == ["output"]
    assert results.render_packed(everything) == text
    wanted: list[dict[str, Any]] = [{}, {"outputs": ("output",)}, {"answer": "json"}, {}]
    claim = [new_claimed_job(at, job, **requested) for at, requested in enumerate(wanted)]
    assert run_claimed(engine, claim) == (3, [everything, single, text, everything])


def test_batches_are_bounded_as_model_toml_says(tmp_path: Path) -> None:
    jobs: list[Feeds] = [{"x": floats(2, 4, seed=at)} for at in range(5)]
    by_jobs = load_model(tmp_path / "jobs", zoo.mlp([4, 3]), "[batching]\nmax_jobs = 2")
    by_rows = load_model(tmp_path / "rows", zoo.mlp([4, 3]), "[batching]\nmax_rows = 8")

    assert count_runs(by_jobs, tmp_path / "jobs", jobs) == 3
    assert count_runs(by_rows, tmp_path / "rows", jobs) == 2


def test_model_toml_forces_the_axis(tmp_path: Path) -> None:
    shape = ("time", "streams")
    engine = load_model(tmp_path / "1", zoo.unary("Tanh", shape), "[batching]\naxis = 1")

    assert (engine.signature.input_axes, engine.signature.output_axes) == ((1,), (1,))
    assert "batching.axis = 3, but dimension 3 of `x`" in load_error(
        tmp_path / "3", zoo.unary("Tanh", shape), "[batching]\naxis = 3"
    )


def test_jobs_of_different_lengths_share_a_run_where_model_toml_says_so(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.unary("Tanh", ("batch", "length")), "[batching]\npad = true")
    jobs = [{"x": floats(1, n, seed=n)} for n in (2, 5, 3)]

    assert count_runs(engine, tmp_path, jobs) == 1
    assert "filled up with zeros" in engine.signature.batching


def test_a_model_that_takes_none_of_the_probes_runs_alone_and_says_why(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    model = zoo.model(
        [helper.make_node("Add", ["x", "offset"], ["ids"]), node],
        [zoo.tensor("x", ["batch"], INT64)],
        [zoo.tensor("y", ["batch", 2])],
        {"table": floats(5, 2), "offset": np.array(-1000)},
    )
    without_example = load_model(tmp_path / "a", model)
    shown = load_model(tmp_path / "b", model, "example = [1000, 1004]")

    assert without_example.signature.batching.startswith("off: no probe row could be run: ")
    assert shown.signature.batched, shown.signature.batching


# --- what goes in and comes out ----------------------------------------------------------------


def test_bfloat16_goes_in_and_comes_out(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.identity(TensorProto.BFLOAT16))
    jobs: list[Feeds] = [{"x": floats(n, 2, seed=n).astype(ml_dtypes.bfloat16)} for n in (1, 2)]

    runs, bodies = run_jobs(engine, jobs)

    assert runs == 1
    for job, body in zip(jobs, bodies, strict=True):
        np.testing.assert_array_equal(packing.unpack(body)["y"], job["x"])
    row = np.array([[1.5, np.nan]], ml_dtypes.bfloat16)
    text = render_result(engine.run({"x": row}, Stop()), engine.signature)
    assert msgspec.json.decode(text)["outputs"][0]["data"] == [1.5, "NaN"]


def test_an_input_that_the_graph_has_a_value_for_may_be_left_out(tmp_path: Path) -> None:
    model = zoo.model(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        [zoo.tensor("x", ["b", 2]), zoo.tensor("c", [2])],
        [zoo.tensor("y", ["b", 2])],
        {"c": np.array([1, 2], np.float32)},
    )
    engine = load_model(tmp_path, model)
    x = floats(1, 2)

    assert engine.signature.inputs[1] == TensorSpec("c", "FP32", (2,), optional=True)
    assert engine.signature.batched, engine.signature.batching
    zeros = np.zeros(2, np.float32)
    assert engine.run({"x": x}, Stop())[0].tolist() == (x + np.array([1, 2], np.float32)).tolist()
    np.testing.assert_array_equal(engine.run({"x": x, "c": zeros}, Stop())[0], x)


def test_an_optional_tensor_may_be_left_out(tmp_path: Path) -> None:
    tensor = helper.make_tensor_type_proto(FLOAT, ["b", 2])
    given = helper.make_graph(
        [
            helper.make_node("OptionalGetElement", ["o"], ["g"]),
            helper.make_node("Add", ["x", "g"], ["y1"]),
        ],
        "given",
        [],
        [zoo.tensor("y1", ["b", 2])],
    )
    absent = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y2"])], "absent", [], [zoo.tensor("y2", ["b", 2])]
    )
    nodes = [
        helper.make_node("OptionalHasElement", ["o"], ["has"]),
        helper.make_node("If", ["has"], ["y"], then_branch=given, else_branch=absent),
    ]
    option = helper.make_value_info("o", helper.make_optional_type_proto(tensor))
    engine = load_model(
        tmp_path,
        zoo.model(nodes, [zoo.tensor("x", ["b", 2]), option], [zoo.tensor("y", ["b", 2])]),
    )
    x = floats(2, 2)

    assert engine.signature.inputs[1].optional
    np.testing.assert_array_equal(engine.run({"x": x}, Stop())[0], x)
    np.testing.assert_array_equal(engine.run({"x": x, "o": x}, Stop())[0], x + x)


def zipmap(**classes: Any) -> onnx.ModelProto:
    """Scores as maps, as scikit-learn's converter makes them by default; for strings also the
    class."""
    (key,) = classes
    kind = INT64 if key == "int64s" else STRING
    nodes = [
        helper.make_node(
            "ZipMap", ["x"], ["p"], domain="ai.onnx.ml", **{f"classlabels_{key}": classes[key]}
        ),
        helper.make_node("ArgMax", ["x"], ["top"], axis=1, keepdims=0),
        helper.make_node(
            "LabelEncoder",
            ["top"],
            ["label"],
            domain="ai.onnx.ml",
            keys_int64s=range(len(classes[key])),
            **{f"values_{key}": classes[key]},
        ),
    ]
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(kind, helper.make_tensor_type_proto(FLOAT, []))
    )
    return zoo.model(
        nodes if kind == STRING else nodes[:1],
        [zoo.tensor("x", ["batch", len(classes[key])])],
        [
            *([zoo.tensor("label", ["batch"], STRING)] if kind == STRING else []),
            helper.make_value_info("p", maps),
        ],
    )


def test_maps_of_different_classes_are_refused_with_what_to_keep(tmp_path: Path) -> None:
    made = zipmap(int64s=[1, 2])
    other = zipmap(int64s=[3, 4]).graph
    other.node[0].output[0] = other.output[0].name = "q"
    made.graph.node.append(other.node[0])
    made.graph.output.append(other.output[0])

    assert "`p` and `q` have scores of different classes; keep one" in load_error(
        tmp_path / "a", made
    )
    engine = load_model(tmp_path / "b", made, 'outputs = ["q"]')
    assert engine.signature.labels == ("3", "4")


def test_maps_of_scores_become_a_matrix_and_their_keys_the_labels(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zipmap(strings=["cat", "dog", "eel"]))
    jobs: list[Feeds] = [
        {"x": np.array([[0.25, 0.5, 0.25]], np.float32)},
        {"x": np.array([[0.75, 0.0, 0.25], [0.0, 0.0, 1.0]], np.float32)},
    ]

    runs, bodies = run_jobs(engine, jobs, answer="json")

    assert engine.signature.labels == ("cat", "dog", "eel")
    assert engine.signature.outputs[1] == TensorSpec("p", "FP32", (None, 3))
    assert runs == 1
    assert msgspec.json.decode(bodies[0]) == {
        "prediction": 1,
        "class_name": "dog",
        "probabilities": [0.25, 0.5, 0.25],
    }
    assert [row["class_name"] for row in msgspec.json.decode(bodies[1])] == ["cat", "eel"]


def test_numbers_as_keys_are_the_labels_unless_model_toml_has_better(tmp_path: Path) -> None:
    plain = load_model(tmp_path / "plain", zipmap(int64s=[10, 20]))
    named = load_model(tmp_path / "named", zipmap(int64s=[10, 20]), 'labels = ["ten", "twenty"]')
    x = np.array([[0.25, 0.75]], np.float32)

    for engine, name in ((plain, "20"), (named, "twenty")):
        text = render_result(engine.run({"x": x}, Stop()), engine.signature)
        assert (engine.signature.keys, msgspec.json.decode(text)["class_name"]) == ((10, 20), name)


def test_logits_are_shown_as_their_softmax(tmp_path: Path) -> None:
    toml = 'labels = ["a", "b"]\nscores = "logits"'
    engine = load_model(tmp_path, zoo.identity(FLOAT), toml)

    for logits, expected in (([1000.0, 1000.0], [0.5, 0.5]), ([-1e30, 1e30], [0.0, 1.0])):
        outputs = engine.run({"x": np.array([logits], np.float32)}, Stop())
        answer = msgspec.json.decode(render_result(outputs, engine.signature))
        assert answer["probabilities"] == expected


@pytest.mark.parametrize(
    ("operator", "kind", "why"),
    [
        (
            helper.make_node("SplitToSequence", ["x"], ["y"], axis=0),
            helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None)),
            "a list of tensors (seq(tensor(float))), which cannot be served; let the graph join",
        ),
        (
            helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT4),
            helper.make_tensor_type_proto(TensorProto.INT4, ["b", 2]),
            "of type int4, which neither JSON nor numpy has; Cast it to INT8 in the graph",
        ),
        (
            helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E5M2),
            helper.make_tensor_type_proto(TensorProto.FLOAT8E5M2, ["b", 2]),
            "of type float8e5m2, which neither JSON nor numpy has; Cast it to FLOAT16 in the",
        ),
        (
            helper.make_node("Optional", ["x"], ["y"]),
            helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, ["b", 2])),
            "a value that may be missing (optional(tensor(float))), which cannot be served; let",
        ),
    ],
)
def test_what_is_no_tensor_is_refused_in_words(
    tmp_path: Path, operator: onnx.NodeProto, kind: onnx.TypeProto, why: str
) -> None:
    model = zoo.model([operator], [zoo.tensor("x", ["b", 2])], [helper.make_value_info("y", kind)])
    model.opset_import[0].version = 21

    assert f"`y` is {why}" in load_error(tmp_path, model)


def test_the_refusal_of_a_list_names_the_other_outputs(tmp_path: Path) -> None:
    """As in scikit-learn's MultiOutputClassifier, which has labels beside the list."""
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["probabilities"], axis=0),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    outputs = [helper.make_value_info("probabilities", kind), zoo.tensor("y", ["b", 2])]
    model = zoo.model(nodes, [zoo.tensor("x", ["b", 2])], outputs)

    assert "or keep other outputs with `outputs` in model.toml" in load_error(tmp_path, model)
    assert load_model(tmp_path / "kept", model, 'outputs = ["y"]').signature.batched


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"opset": 999}, r"^ONNX Runtime only .* or export it for opset \d+ of ai.onnx$"),
        ({"ir": 99}, r"^Unsupported model IR version: 99.* save the file again with `ir_version"),
        ({"opset": 1}, r"^Could not find .* this onnxruntime has no Tanh of that opset"),
        ({"domain": "my.ops"}, "name the library that has the operator Tanh as session.custom_ops"),
    ],
    ids=str,
)
def test_what_onnx_runtime_cannot_load_is_refused_with_what_to_do(
    tmp_path: Path, changed: dict[str, Any], remedy: str
) -> None:
    model = zoo.unary("Tanh", ("b", 2))
    model.opset_import[0].version = changed.get("opset", 17)
    model.ir_version = changed.get("ir", 8)
    if "domain" in changed:
        model.graph.node[0].domain = changed["domain"]
        model.opset_import.append(helper.make_opsetid(changed["domain"], 1))

    _, _, reason = load_error(tmp_path, model).partition("ONNX Runtime cannot load it: ")

    assert re.search(remedy, reason), reason


FLOATS = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
SMALL = helper.make_tensor_type_proto(TensorProto.UINT4, ["b", 2])


@pytest.mark.parametrize(
    ("operator", "kind", "why"),
    [
        (
            helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0),
            FLOATS,
            "a list of tensors (seq(tensor(float))), which no request can carry; let the graph "
            "take one tensor",
        ),
        (
            helper.make_node("OptionalHasElement", ["x"], ["y"]),
            helper.make_optional_type_proto(FLOATS),
            "a value that may be missing and is no tensor (optional(seq(tensor(float)))), which no "
            "request can carry; let the graph take a tensor",
        ),
        (
            helper.make_node("Cast", ["x"], ["y"], to=FLOAT),
            SMALL,
            "of type uint4, which neither JSON nor numpy has; let the graph take UINT8 and Cast it",
        ),
    ],
)
def test_an_input_that_no_request_can_carry_is_refused_in_words(
    tmp_path: Path, operator: onnx.NodeProto, kind: onnx.TypeProto, why: str
) -> None:
    elem_type = TensorProto.BOOL if operator.op_type == "OptionalHasElement" else FLOAT
    output = zoo.tensor("y", None, elem_type)
    model = zoo.model([operator], [helper.make_value_info("x", kind)], [output])
    model.opset_import[0].version = 21
    model.ir_version = 10

    assert f"`x` is {why}" in load_error(tmp_path, model)


def test_examples_of_several_inputs_are_checked_by_name(tmp_path: Path) -> None:
    right = "[example]\na = [[1, 2]]\nb = [[3, 4]]"
    signature = load_model(tmp_path / "right", zoo.added(), right).signature
    missing = load_error(tmp_path / "missing", zoo.added(), "[example]\na = [[1, 2]]")
    wrong = load_error(tmp_path / "wrong", zoo.added(), right.replace("3", '"c"'))
    unknown = load_error(tmp_path / "unknown", zoo.added(), right + "\nc = 1")

    assert signature.example_inputs == {"a": [[1, 2]], "b": [[3, 4]]}
    assert missing.endswith("example: `b` is missing")
    assert "example.b: " in wrong
    assert unknown.endswith("example: `c` is not one of a, b")


# --- sessions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        (
            'providers = ["CUDAExecutionProvider"]',
            "this onnxruntime has no CUDAExecutionProvider, only",
        ),
        ("devices = [0, 1]", "session.devices needs one of CUDAExecutionProvider"),
        ('custom_ops = "ops.so"', "is native code; set ALLOW_CUSTOM_OPS=true"),
    ],
)
def test_a_session_is_as_configured_or_refused(tmp_path: Path, session: str, reason: str) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine has a CUDA provider")
    assert reason in load_error(tmp_path, zoo.mlp([4, 3]), f"[session]\n{session}")


@pytest.mark.parametrize("wanted", ["../../ops.so", "/etc/passwd", "none.so"])
def test_custom_operators_come_from_the_model_s_own_folder(tmp_path: Path, wanted: str) -> None:
    zoo.place(tmp_path, "m", zoo.mlp([4, 3]), toml=f'[session]\ncustom_ops = "{wanted}"')
    (file,) = scan(tmp_path)

    with pytest.raises(ModelRefused, match="is no file in the model's own folder"):
        Engine.load(file, intra_op_threads=1, allow_custom_ops=True)


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_the_graph_is_optimized_as_configured(tmp_path: Path, level: str) -> None:
    toml = f'[session]\ngraph_optimization = "{level}"\nintra_op_threads = 2'
    engine = load_model(tmp_path, zoo.mlp([4, 3]), toml)

    assert engine.run({"x": floats(1, 4)}, Stop())[0].shape == (1, 3)


def external(location: str) -> onnx.ModelProto:
    """`y = x + w` where `w` is in a file of its own that a branch names."""
    weight = TensorProto(name="w", data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y1"])], "then", [], [zoo.tensor("y1", ["b", 2])]
    )
    then.initializer.append(weight)
    otherwise = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y2"])], "else", [], [zoo.tensor("y2", ["b", 2])]
    )
    node = helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=otherwise)
    model = zoo.model([node], [zoo.tensor("x", ["b", 2])], [zoo.tensor("y", ["b", 2])])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    return model


def test_weights_are_read_from_the_model_s_own_folder_only(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    for location in (str(tmp_path / "secret"), "../../../secret"):
        folder = tmp_path / f"by{len(location)}"
        assert "is no plain path" in load_error(folder, external(location))
    for link, reason in ((os.symlink, "is a link that leads out"), (os.link, "is a hard link")):
        folder = tmp_path / link.__name__
        path = zoo.place(folder, "m", external("w.bin"))
        link(tmp_path / "secret", path.parent / "w.bin")
        (file,) = scan(folder)
        with pytest.raises(ModelRefused, match=reason):
            Engine.load(file, intra_op_threads=1)


def test_runs_go_to_the_sessions_in_turn(tmp_path: Path) -> None:
    paths = []
    for at in (1, 2):
        node = helper.make_node("Add", ["x", "which"], ["y"])
        weights = {"which": np.array(at, np.float32)}
        model = zoo.model([node], [zoo.tensor("x", ["n"])], [zoo.tensor("y", ["n"])], weights)
        paths.append(zoo.place(tmp_path, f"m{at}", model))
    sessions = [
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in paths
    ]
    runner = Runner(sessions, ["y"])

    answers = [runner.run({"x": np.zeros(1, np.float32)}, Stop())[0].item() for _ in range(4)]

    assert answers == [1, 2, 1, 2]


def test_half_a_surrogate_pair_is_the_input_s_fault(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.identity(STRING))

    with pytest.raises(ModelFailed, match="half a surrogate pair"):
        engine.run({"x": np.array([["\ud800", ""]], object)}, Stop())
    with_nul = np.array([["\0", "é\0"]], object)
    assert engine.run({"x": with_nul}, Stop())[0].tolist() == with_nul.tolist()


@pytest.mark.soak
def test_scikit_learn_s_own_export_is_served_with_its_labels(tmp_path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate([floats(20, 3), floats(20, 3) + np.float32(3)])
    names = np.array(["zebra"] * 20 + ["ant"] * 20)
    fitted = LogisticRegression().fit(x, names)
    engine = load_model(tmp_path, to_onnx(fitted, x[:1]))

    _, (body,) = run_jobs(engine, [{"X": x[[0, 39]]}], answer="json")

    rows = msgspec.json.decode(body)
    assert [row["class_name"] for row in rows] == ["zebra", "ant"]
    assert [row["prediction"] for row in rows] == [1, 0]
    np.testing.assert_allclose(
        [row["probabilities"] for row in rows], fitted.predict_proba(x[[0, 39]]), rtol=1e-4
    )
    assert engine.signature.batched, engine.signature.batching


def test_each_input_is_probed_with_numbers_like_its_own_example(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["big", "offset"], ["index"]),
        helper.make_node("Gather", ["table", "index"], ["a"]),
        helper.make_node("Gather", ["table", "small"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    model = zoo.model(
        nodes,
        [zoo.tensor("big", ["batch"], INT64), zoo.tensor("small", ["batch"], INT64)],
        [zoo.tensor("y", ["batch", 2])],
        {"table": floats(5, 2), "offset": np.array(-1000)},
    )
    engine = load_model(tmp_path, model, "[example]\nbig = [1000, 1004]\nsmall = [0, 4]")

    assert engine.signature.batched, engine.signature.batching


@pytest.mark.soak
def test_a_table_of_numbers_and_categories_is_batched_by_the_rows_of_its_example(
    tmp_path: Path,
) -> None:
    import pandas
    from skl2onnx import to_onnx
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "age": rng.uniform(18, 80, 60).astype(np.float32),
            "plan": rng.choice(["basic", "pro", "max"], 60),
            "region": rng.choice([10, 20, 30], 60),
        }
    )
    columns = ColumnTransformer(
        [
            ("n", StandardScaler(), ["age"]),
            ("p", OneHotEncoder(), ["plan"]),
            ("r", OneHotEncoder(), ["region"]),
        ]
    )
    fitted = make_pipeline(columns, LogisticRegression()).fit(frame, rng.integers(0, 2, 60))
    rows = 'age = [[30], [40]]\nplan = [["pro"], ["max"]]\nregion = [[10], [30]]'
    engine = load_model(
        tmp_path, to_onnx(fitted, frame[:1], options={"zipmap": False}), f"[example]\n{rows}"
    )
    jobs: list[Feeds] = [
        {name: frame[[name]].to_numpy()[at : at + 2] for name in frame.columns} for at in (0, 2, 4)
    ]

    assert engine.signature.batched, engine.signature.batching
    assert count_runs(engine, tmp_path, jobs) == 1


@pytest.mark.parametrize("width", [256, 512])
def test_windows_of_sound_are_among_the_sizes_that_are_tried(tmp_path: Path, width: int) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = zoo.model(
        [node],
        [zoo.tensor("x", [None, None])],
        [zoo.tensor("y", [None, 2])],
        {"w": floats(width, 2)},
    )

    assert load_model(tmp_path, model).signature.batched


def test_ids_are_tried_up_to_the_last_row_of_their_table(tmp_path: Path) -> None:
    """High ids change the answers of all rows of the run, small ids do not."""
    table = np.linspace(0, 1, 500, dtype=np.float32)[:, None]
    nodes = [
        helper.make_node("Cast", ["ids"], ["rows"], to=INT64),
        helper.make_node("Gather", ["table", "rows"], ["x"]),
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["above"]),
        helper.make_node("Where", ["above", "x", "squared"], ["y"]),
    ]
    nodes.insert(2, helper.make_node("Mul", ["x", "x"], ["squared"]))
    model = zoo.model(
        nodes,
        [zoo.tensor("ids", ["batch"], TensorProto.INT32)],
        [zoo.tensor("y", ["batch", 1])],
        {"table": table, "limit": np.array(0.5, np.float32)},
    )
    jobs = [{"ids": np.array([at], np.int32)} for at in (3, 450)]

    assert count_runs(load_model(tmp_path, model), tmp_path, jobs) == 2


def test_an_example_may_have_the_same_number_in_all_its_rows(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["year"], ["number"], to=FLOAT),
        helper.make_node("Add", ["x", "number"], ["y"]),
    ]
    inputs = [zoo.tensor("x", ["b", 1]), zoo.tensor("year", ["b", 1], INT64)]
    model = zoo.model(nodes, inputs, [zoo.tensor("y", ["b", 1])])
    engine = load_model(tmp_path, model, "[example]\nx = [[1], [2]]\nyear = [[2024], [2024]]")

    assert engine.signature.batched, engine.signature.batching


@pytest.mark.parametrize("rows", ["[nan, 1.0]", "[nan, nan]", "[1.0, inf], [nan, 2.0]"])
def test_an_example_may_have_gaps(rows: str, tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.mlp([2, 2]), f'example = [{rows}]\nlabels = ["a", "b"]')

    assert engine.signature.batched, engine.signature.batching
    assert engine.signature.score_output == "y"


def test_two_versions_never_share_a_run(tmp_path: Path) -> None:
    zoo.place(tmp_path / "one", "m", zoo.adds(1))
    zoo.place(tmp_path / "two", "m", zoo.adds(2))
    engines = {
        version: Engine.load(scan(tmp_path / name)[0], intra_op_threads=1)
        for version, name in (("1", "one"), ("2", "two"))
    }
    (name,) = [spec.name for spec in engines["1"].signature.inputs]
    feeds = {name: np.zeros((1, 1), np.float32)}
    jobs = [new_claimed_job(at, feeds, version=str(1 + at % 2)) for at in range(6)]

    prepared = execution.prepare(jobs, lambda requested: engines[requested[1] or ""], "m")

    assert [len(batch.jobs) for batch in prepared.batches] == [3, 3]
    for batch in prepared.batches:
        added = 1.0 if batch.engine is engines["1"] else 2.0
        for body in execution.run(batch, Stop()):
            (answer,) = packing.unpack(body).values()
            assert answer.tolist() == [[added]]

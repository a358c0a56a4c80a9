"""Results are valid JSON with the outputs of the model, to the last bit."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.errors import ModelFailed
from asyncinfer.models.batching import BatchPlan
from asyncinfer.models.results import render_results
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import DTYPES, Array, TensorSpec
from tests.models.single_result import render_result

LABELS = ("setosa", "versicolor")
PREDICTIONS = np.array([1, 0, 1])
SCORES = np.array([[0.25, 0.75], [0.5, 0.5], [0.125, 0.875]], np.float32)


def signature(*outputs: tuple[str, str], labels: tuple[str, ...] = LABELS) -> Signature:
    specs = tuple(TensorSpec(name, datatype, ("batch",)) for name, datatype in outputs)
    scores = next((name for name, datatype in outputs if datatype == "FP32" and labels), "")
    given = next((name for name, datatype in outputs if datatype == "INT64" and labels), "")
    return Signature(
        "iris",
        "1",
        "",
        (TensorSpec("x", "FP32", ("batch",)),),
        specs,
        labels,
        score_output=scores,
        class_output=given,
    )


def strict(text: bytes) -> Any:
    """Decodes standard JSON, which has no NaN."""

    def reject(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=reject)


def rendered(outputs: Sequence[Array], row_counts: Sequence[int], model: Signature) -> list[bytes]:
    jobs = [{"x": np.zeros(count, np.float32)} for count in row_counts]
    return list(render_results(outputs, jobs, model, BatchPlan({"x": 0}, (0,) * len(outputs))))


CLASSIFIER = signature(("label", "INT64"), ("probabilities", "FP32"))


def test_one_row_of_a_labelled_classifier_is_an_object() -> None:
    assert strict(render_result([PREDICTIONS[:1], SCORES[:1]], CLASSIFIER)) == {
        "prediction": 1,
        "class_name": "versicolor",
        "probabilities": [0.25, 0.75],
    }


def test_several_rows_are_a_list_with_an_entry_for_each() -> None:
    rows = strict(render_result([PREDICTIONS, SCORES], CLASSIFIER))

    assert [row["class_name"] for row in rows] == ["versicolor", "setosa", "versicolor"]
    assert [row["probabilities"] for row in rows] == SCORES.tolist()


def test_without_a_predicted_number_the_largest_score_decides() -> None:
    rows = strict(render_result([SCORES], signature(("scores", "FP32"))))

    assert [row["prediction"] for row in rows] == [1, 0, 1]


def test_an_undeclared_class_means_the_one_with_the_highest_score() -> None:
    for number in (2, -1):
        row = strict(render_result([np.array([number]), SCORES[:1]], CLASSIFIER))

        assert (row["prediction"], row["class_name"]) == (1, "versicolor")


WITH_GAPS = [
    ([-np.inf, np.nan, 0.0], 2),
    ([np.nan, -np.inf, np.nan], 1),
    ([np.nan, 0.25, 0.5], 2),
    ([np.nan, np.nan, np.nan], None),
]
SCORED = msgspec.structs.replace(
    signature(("label", "INT64"), ("scores", "FP32")), labels=("a", "b", "c"), class_output=""
)


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
@pytest.mark.parametrize(("row", "column"), WITH_GAPS)
def test_a_nan_score_is_never_the_class(
    row: list[float], column: int | None, datatype: str
) -> None:
    outputs = [np.array([0, 0]), np.array([row, [0, 1, 0]]).astype(DTYPES[datatype])]

    first, second = strict(render_result(outputs, SCORED))

    assert first["prediction"] == column
    assert first["class_name"] == (None if column is None else "abc"[column])
    assert second["class_name"] == "b"


@pytest.mark.parametrize(("row", "column"), [WITH_GAPS[0], WITH_GAPS[3], ([0.5, 0.25, np.nan], 1)])
def test_the_class_of_the_model_is_not_used_if_its_score_is_nan(
    row: list[float], column: int | None
) -> None:
    model = msgspec.structs.replace(SCORED, class_output="label")

    found = strict(render_result([np.array([1]), np.array([row])], model))

    assert found["prediction"] == column


def test_logits_with_a_nan_have_no_class() -> None:
    model = msgspec.structs.replace(SCORED, scores="logits", class_output="label")

    rows = strict(render_result([np.array([0, 0]), np.array([[1, np.nan, 0], [1, 2, 0]])], model))

    assert rows[0] == {"prediction": None, "class_name": None, "probabilities": ["NaN"] * 3}
    assert rows[1]["class_name"] == "a"


@pytest.mark.parametrize(
    ("values", "given", "columns"),
    [
        ((1, 2, 3), np.array([3, 1, 2, 9], np.int32), [2, 0, 1, 1]),
        ((10, None, 30), np.array([[30], [10], [20], [10]], np.int16), [2, 0, 1, 0]),
        ((-5, 0, 7), np.array([7, 0, -5, 0]), [2, 1, 0, 1]),
        ((7, -5, 2**64 - 1), np.array([2**64 - 1, 7, 5, 7], np.uint64), [2, 0, 1, 0]),
        ((), np.array([2, 0, 200, 1], np.uint8), [2, 0, 1, 1]),
        (("x", "y", "z"), np.array(["z", "x", "a", "y"], object), [2, 0, 1, 1]),
        ((1, 0, None), np.array([True, False, True, False]), [0, 1, 0, 1]),
    ],
)
def test_class_values_of_any_type_are_mapped_to_their_columns(
    values: tuple[int | str | None, ...], given: Array, columns: list[int]
) -> None:
    model = msgspec.structs.replace(SCORED, class_output="label", class_values=values)
    scores = np.array([[0.25, 0.5, 0.25]] * 4, np.float32)

    rows = strict(render_result([given, scores], model))

    assert [row["prediction"] for row in rows] == columns
    assert [row["class_name"] for row in rows] == ["abc"[column] for column in columns]


def test_every_other_model_returns_its_tensors() -> None:
    words = np.array([["a", "é"]], dtype=object)
    outputs = [np.array([[1.5, 2.0]], np.float32), words, np.array(True)]
    model = signature(("y", "FP32"), ("words", "BYTES"), ("flag", "BOOL"), labels=())

    assert strict(render_result(outputs, model)) == {
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]},
            {"name": "words", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "é"]},
            {"name": "flag", "datatype": "BOOL", "shape": [], "data": [True]},
        ]
    }


def test_with_labels_that_match_no_output_the_result_is_tensors() -> None:
    three_wide = np.zeros((1, 3), np.float32)

    assert "outputs" in strict(render_result([three_wide], signature(("y", "FP32"))))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_and_infinities_are_strings(dtype: type[np.generic]) -> None:
    nonfinite = np.array([[np.nan, np.inf], [-np.inf, 1.0]]).astype(dtype)
    as_strings = ["NaN", "Infinity", "-Infinity", 1.0]

    tensors = strict(render_result([nonfinite], signature(("y", "FP32"), labels=())))
    rows = strict(render_result([nonfinite], signature(("y", "FP32"))))
    scalar = strict(render_result([nonfinite[0, 0, ...]], signature(("y", "FP32"), labels=())))

    assert tensors["outputs"][0]["data"] == as_strings
    assert [row["probabilities"] for row in rows] == [as_strings[:2], as_strings[2:]]
    assert scalar["outputs"][0]["data"] == ["NaN"]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_a_result_is_the_same_alone_and_in_a_batch(
    row_counts: list[int], labelled: bool, nonfinite: bool
) -> None:
    rows = sum(row_counts)
    scores = np.random.default_rng(0).random((rows, 2), np.float32)
    scores[0, 0] = np.nan if nonfinite else 0.5
    outputs = [scores.argmax(axis=1), scores]
    model = msgspec.structs.replace(CLASSIFIER, labels=LABELS if labelled else ())

    together = rendered(outputs, row_counts, model)

    starts = np.cumsum([0, *row_counts])
    assert together == [
        render_result([output[start : start + count] for output in outputs], model)
        for start, count in zip(starts, row_counts, strict=False)
    ]


@pytest.mark.parametrize("row_shape", [(), (3,), (2, 2), (0,), (30_000,)])
@pytest.mark.parametrize("datatype", DTYPES)
def test_tensors_are_the_same_alone_and_in_a_batch(
    datatype: str, row_shape: tuple[int, ...]
) -> None:
    counts = [1, 2, 1]
    numbers = np.random.default_rng(0).integers(0, 2, (sum(counts), *row_shape))
    output = numbers.astype(str).astype(object) if datatype == "BYTES" else numbers
    output = output.astype(DTYPES[datatype])
    model = signature(("y", datatype), labels=())

    together = rendered([output], counts, model)

    parts = np.split(output, np.cumsum(counts)[:-1])
    assert together == [render_result([part], model) for part in parts]


def test_outputs_with_a_missing_row_are_an_error() -> None:
    for model in (CLASSIFIER, msgspec.structs.replace(CLASSIFIER, labels=())):
        with pytest.raises(ModelFailed):
            rendered([PREDICTIONS, SCORES], [2, 2], model)

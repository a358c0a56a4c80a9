"""Rows of several jobs are stacked into one run, and its outputs are split into jobs again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.errors import ModelFailed
from asyncinfer.models import batching
from asyncinfer.models.batching import BatchPlan
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Array, Dim, Feeds, TensorSpec

FIRST = BatchPlan({"x": 0}, (0, 0))


def spec(*shape: Dim, name: str = "x", datatype: str = "FP32") -> TensorSpec:
    return TensorSpec(name, datatype, shape)


def rows(*values: float) -> Array:
    return np.array([[value] for value in values], np.float32)


def jobs_of(*counts: int) -> list[Feeds]:
    return [{"x": np.zeros((count, 1), np.float32)} for count in counts]


# --- stack and split ---------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.sampled_from(["float32", "int64", "bool", "object"]),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(0, 2),
)
def test_what_was_stacked_is_split_into_the_same_pieces(
    row_counts: list[int], dtype: str, row_shape: list[int], axis: int
) -> None:
    axis = min(axis, len(row_shape))
    shape = [*row_shape[:axis], sum(row_counts), *row_shape[axis:]]
    values = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    jobs = np.split(values, np.cumsum(row_counts)[:-1], axis=axis)
    feeds: list[Feeds] = [{"x": job} for job in jobs]
    plan = BatchPlan({"x": axis}, (axis,))

    stacked = batching.stack(feeds, plan)["x"]
    pieces = batching.split([stacked], feeds, plan)

    np.testing.assert_array_equal(stacked, values)
    assert stacked.dtype == values.dtype
    for job, (output,) in zip(jobs, pieces, strict=True):
        np.testing.assert_array_equal(output, job)


def test_an_output_with_another_number_of_rows_is_not_split() -> None:
    for output in (rows(1, 2), np.array(1.0)):
        with pytest.raises(ModelFailed, match="for 3 rows of input"):
            batching.split([rows(1, 2, 3), output], jobs_of(2, 1), FIRST)


def test_a_job_that_ran_alone_gets_the_whole_outputs() -> None:
    outputs = [rows(1, 2, 3), np.array(1.0)]

    assert batching.split(outputs, jobs_of(2), FIRST) == [outputs]


def test_jobs_share_a_run_only_with_one_datatype_and_row_shape() -> None:
    def key(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> object:
        return batching.run_key({"x": np.zeros(shape, dtype)}, FIRST)

    assert key((1, 4)) == key((7, 4))
    assert key((1, 4)) != key((1, 5))
    assert key((1, 4)) != key((1, 4), np.float64)


def test_an_input_that_is_not_stacked_must_be_equal_to_the_last_byte() -> None:
    plan = BatchPlan({"x": 1, "rate": None, "word": None}, (1,))

    def key(rate: float, word: str, given: bool = True) -> object:
        feeds: dict[str, Array] = {"x": np.zeros((2, 1, 3)), "rate": np.array(rate)}
        if given:
            feeds["word"] = np.array([word], dtype=object)
        return batching.run_key(feeds, plan)

    assert key(1.0, "a") == key(1.0, "a")
    assert len({key(1.0, "a"), key(2.0, "a"), key(1.0, "b"), key(1.0, "a", False)}) == 4
    assert key(0.0, "a") != key(-0.0, "a")


def test_a_job_without_elements_or_with_different_numbers_of_rows_runs_alone() -> None:
    plan = BatchPlan({"a": 0, "b": 0}, (0,))
    one_row, two_rows, no_rows = np.zeros((1, 2)), np.zeros((2, 2)), np.zeros((0, 2))

    assert batching.run_key({"a": one_row, "b": one_row}, plan) is not None
    assert batching.run_key({"a": one_row, "b": two_rows}, plan) is None
    assert batching.run_key({"a": no_rows, "b": no_rows}, plan) is None


def test_jobs_of_different_lengths_are_padded_and_cut_if_the_signature_says_so() -> None:
    signature = Signature(
        "m",
        "1",
        "",
        (spec("batch", "length"), spec("batch", "length", name="mask", datatype="INT64")),
        (spec("batch", "length", 2), spec("batch", name="sum")),
        batched=True,
        pad=True,
    )
    plan = batching.batch_plan(signature)
    assert plan is not None
    jobs: list[Feeds] = [
        {"x": np.ones((n, wide), np.float32), "mask": np.ones((n, wide), np.int64)}
        for n, wide in ((1, 3), (2, 5))
    ]

    stacked = batching.stack(jobs, plan)
    doubled = np.stack([stacked["x"], stacked["x"]], axis=2)
    pieces = batching.split([doubled, stacked["x"].sum(axis=1)], jobs, plan)

    assert len({batching.run_key(job, plan) for job in jobs}) == 1
    assert stacked["mask"].tolist()[0] == [1, 1, 1, 0, 0]
    assert [[output.shape for output in outputs] for outputs in pieces] == [
        [(1, 3, 2), (1,)],
        [(2, 5, 2), (2,)],
    ]


# --- which axes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "candidates"),
    [
        ([("batch", 2)], [(0,)]),
        ([(None, 2)], [(0,)]),
        ([("batch", 2), (None, 2)], [(0, 0), (0, None)]),
        ([("batch", 512), (2, "batch", 128), ()], [(0, 1, None), (0, None, None)]),
        ([("n", 2), ("m", 2)], [(0, 0), (0, None), (None, 0)]),
        ([(None, None), (2, None, 128), ()], [(0, 1, None), (0, None, None)]),
        ([("batch", "seq"), (1, "seq")], [(0, None)]),
        ([(1, 3, "height", "width")], []),
        ([("n", "n")], [(0,)]),
        ([()], []),
    ],
)
def test_candidate_axes_follow_from_dimension_names(
    shapes: list[tuple[Dim, ...]], candidates: list[tuple[int | None, ...]]
) -> None:
    inputs = [spec(*shape, name=f"x{at}") for at, shape in enumerate(shapes)]

    assert batching.candidate_axes(inputs) == candidates


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (spec("batch", 2), None),
        (spec(1, 2), "the first dimension of `x` is fixed at 1"),
        (spec(), "`x` is a scalar"),
        (TensorSpec("x", "FP32", None), "`x` may have any number of dimensions"),
    ],
)
def test_a_fixed_or_missing_first_dimension_rules_batching_out(
    tensor: TensorSpec, reason: str | None
) -> None:
    obstacle = batching.find_obstacle([tensor])

    assert (obstacle and obstacle.description) == reason

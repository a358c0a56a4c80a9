"""Rows of several jobs go into one run and come back to their own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer import batching
from asyncinfer.batching import Probe
from asyncinfer.errors import ModelFailed
from asyncinfer.tensors import Array, Dim, TensorSpec

BATCH = TensorSpec("x", "FP32", ("batch", 2))


def spec(*shape: Dim, datatype: str = "FP32") -> TensorSpec:
    return TensorSpec("x", datatype, shape)


def rows(*values: float) -> Array:
    return np.array([[value] for value in values], np.float32)


# --- stack and split ---------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.sampled_from(["float32", "int64", "bool", "object"]),
    st.lists(st.integers(1, 3), max_size=2),
)
def test_what_was_stacked_is_split_into_the_same_pieces(
    row_counts: list[int], dtype: str, row_shape: list[int]
) -> None:
    size = sum(row_counts) * int(np.prod(row_shape))
    values = np.arange(size).astype(dtype).reshape(-1, *row_shape)
    jobs = [values[start:end] for start, end in batching.spans(row_counts)]

    stacked = batching.stack([{"x": job} for job in jobs])["x"]
    pieces = batching.split([stacked, stacked[:, ...]], row_counts)

    np.testing.assert_array_equal(stacked, values)
    assert stacked.dtype == values.dtype
    for job, outputs in zip(jobs, pieces, strict=True):
        for output in outputs:
            np.testing.assert_array_equal(output, job)


def test_an_output_with_another_number_of_rows_is_not_split() -> None:
    for output in (rows(1, 2), np.array(1.0)):
        with pytest.raises(ModelFailed, match="for 3 rows of input"):
            batching.split([rows(1, 2, 3), output], [2, 1])


def test_a_job_that_ran_alone_gets_all_there_is() -> None:
    outputs = [rows(1, 2, 3), np.array(1.0)]

    assert batching.split(outputs, [2]) == [outputs]


def test_jobs_share_a_run_only_with_one_datatype_and_row_shape() -> None:
    def key(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> object:
        return batching.run_key({"x": np.zeros(shape, dtype)})

    assert key((1, 4)) == key((7, 4))
    assert key((1, 4)) != key((1, 5))
    assert key((1, 4)) != key((1, 4), np.float64)


# --- may rows be stacked -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (spec("batch", 2), ""),
        (spec(None, 2), ""),
        (spec(1, 2), "the first dimension of `x` is fixed at 1"),
        (spec(), "`x` is a scalar"),
    ],
)
def test_a_fixed_or_missing_first_dimension_rules_batching_out(
    tensor: TensorSpec, reason: str
) -> None:
    assert batching.obstacle([BATCH, tensor], [BATCH]) == reason
    assert batching.obstacle([BATCH], [tensor]) == reason


def test_first_dimensions_of_different_names_are_in_doubt() -> None:
    assert batching.doubt([spec("batch", 2), spec(None, 2)], [spec("batch")]) == ""
    assert "(batch, n)" in batching.doubt([spec("batch", 2)], [spec("n", 2)])


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "INT64", "UINT8", "BOOL", "BYTES"])
def test_probe_rows_fit_the_model_and_are_always_the_same(datatype: str) -> None:
    tensor = spec("batch", 3, "w", datatype=datatype)

    first, again = (list(batching.probe_feeds([tensor], None)) for _ in range(2))

    for feeds, same in zip(first, again, strict=True):
        assert feeds["x"].shape == (batching.PROBE_ROWS, 3, 8)
        np.testing.assert_array_equal(feeds["x"], same["x"])


def test_probe_rows_lie_on_both_sides_of_zero() -> None:
    _, wide = batching.probe_feeds([spec("batch", 5)], None)

    assert (np.sign(wide["x"]).sum(axis=0) == 0).all()


def test_an_example_adds_its_sizes_and_its_magnitude() -> None:
    example = np.array([[100, 200, 300]], np.float32)

    *_, like_example = batching.probe_feeds([spec("batch", "w")], example)

    assert like_example["x"].shape == (batching.PROBE_ROWS, 3)
    assert like_example["x"].min() >= 100
    assert like_example["x"].max() <= 300


def test_equal_answers_alone_and_together_turn_batching_on() -> None:
    probe = Probe([[rows(1)], [rows(2)]], [rows(1, 2.00001)])

    assert batching.judge([probe], [BATCH]).batched


@pytest.mark.parametrize(
    ("together", "reason"),
    [
        (rows(1, 2.1), "off: `x` gives a row another answer when other rows are beside it"),
        (rows(2, 1), "off: `x` gives a row another answer when other rows are beside it"),
        (rows(1, np.nan), "off: `x` gives a row another answer when other rows are beside it"),
        (rows(1), "off: `x` has another number of rows than the input"),
        (np.zeros((2, 2)), "off: `x` changes its shape with the number of rows"),
    ],
)
def test_any_difference_turns_batching_off(together: Array, reason: str) -> None:
    good = Probe([[rows(1)], [rows(2)]], [rows(1, 2)])
    bad = Probe([[rows(1)], [rows(2)]], [together])

    verdict = batching.judge([good, bad], [BATCH])

    assert (verdict.batched, verdict.reason) == (False, reason)


def test_rows_that_all_get_one_answer_prove_nothing() -> None:
    verdict = batching.judge([Probe([[rows(1)], [rows(1)]], [rows(1, 1)])], [BATCH])

    assert not verdict.batched
    assert "proves nothing" in verdict.reason


def test_whole_numbers_and_strings_must_be_exactly_equal() -> None:
    for values in ([100_000, 100_001], ["a", "b"]):
        dtype = object if isinstance(values[0], str) else np.int64
        one, other = np.array(values, dtype).reshape(2, 1, 1)

        assert batching.judge([Probe([[one], [other]], [np.array([one[0], other[0]])])], [BATCH])
        assert not batching.judge(
            [Probe([[one], [other]], [np.array([one[0], one[0]])])], [BATCH]
        ).batched

"""Checks of named tensors: fitting ones are accepted, and every error of others is listed."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.errors import InputError, InvalidInput
from asyncinfer.models.signature import Signature, read_signature
from asyncinfer.models.validation import check_data, check_inputs
from asyncinfer.tensors.datatypes import DTYPES, Array, Feeds, TensorSpec

STATE = Signature(
    "vad",
    "1",
    "",
    (
        TensorSpec("audio", "FP32", ("batch", "samples")),
        TensorSpec("state", "FP32", (2, "batch", 128), optional=True),
        TensorSpec("rate", "INT64", (), optional=True),
    ),
    (TensorSpec("speech", "FP32", ("batch", 1)),),
    max_rows=3,
)


def audio(rows: int = 1, samples: int = 4) -> Array:
    return np.zeros((rows, samples), np.float32)


def faults_of(feeds: Feeds, model: Signature = STATE) -> dict[str, str]:
    with pytest.raises(InvalidInput) as raised:
        check_inputs(feeds, model)
    return {fault.pointer: fault.detail for fault in raised.value.faults}


def test_inputs_come_in_the_order_of_the_signature_and_optional_ones_may_be_absent() -> None:
    feeds = {"rate": np.array(16_000), "audio": audio()}

    assert list(check_inputs(feeds, STATE)) == ["audio", "rate"]
    assert list(check_inputs({"audio": audio()}, STATE)) == ["audio"]


def test_data_is_for_the_only_required_input() -> None:
    assert check_data(b"[[1, 2], [3, 4]]", STATE).shape == (2, 2)


def test_dynamic_dimensions_may_be_zero_and_fixed_ones_may_not() -> None:
    assert check_inputs({"audio": audio(0, 0)}, STATE)["audio"].shape == (0, 0)

    found = faults_of({"audio": audio(), "state": np.zeros((0, 1, 128), np.float32)})

    assert found == {"/inputs/1/shape/0": "0, `state` takes 2: shape [2, batch, 128]"}


def test_an_empty_tensor_has_no_larger_sizes_than_one_with_elements_could_have() -> None:
    """A model makes tensors of a size, such as positions, though no byte was sent for it."""
    limit = 4 << 20
    past = Signature(
        "decoder",
        "1",
        "",
        (TensorSpec("past", "FP32", ("batch", 32, "past", 128)), TensorSpec("any", "FP32", None)),
        (),
    )
    fits = {
        "past": np.zeros((1000, 32, 0, 128), np.float32),
        "any": np.zeros((0, 2048, 2048), np.float32),
    }

    assert check_inputs(fits, past) == fits
    assert check_inputs({"audio": audio(0, limit)}, STATE)
    assert faults_of({"audio": audio(0, limit + 1)}) == {
        "/inputs/0/shape": "[0, 4194305] has no elements; its sizes but 0 may multiply to 4194304 "
        "at most"
    }
    too_large = np.zeros((2049, 0, 2048), np.float32)
    assert list(faults_of({**fits, "any": too_large}, past)) == ["/inputs/1/shape"]


def test_a_missing_input_is_named_with_its_datatype_and_shape() -> None:
    assert faults_of({}) == {
        "/inputs": "`audio` is missing: vad takes it as FP32 of shape [batch, samples]"
    }


def test_a_scalar_is_a_tensor_without_dimensions() -> None:
    found = faults_of({"audio": audio(), "rate": np.array([16_000])})

    assert found == {"/inputs/1/shape": "1 dimension, `rate` has 0: shape []"}


def test_rows_are_limited_if_the_first_dimension_is_dynamic() -> None:
    assert faults_of({"audio": audio(4)}) == {
        "/inputs/0/shape/0": "4 rows, vad takes at most 3 in one job"
    }


def test_one_symbol_has_one_size_in_all_inputs() -> None:
    found = faults_of({"state": np.zeros((2, 2, 128), np.float32), "audio": audio(3)})

    assert found == {"/inputs/1/shape/0": "`batch` is 3 here and 2 in `state`; they must be equal"}


def test_a_boolean_that_is_neither_true_nor_false_is_rejected() -> None:
    model = Signature("b", "1", "", (TensorSpec("x", "BOOL", ("n",)),), ())
    booleans = np.frombuffer(b"\x00\x01\x02", np.bool_)

    assert faults_of({"x": booleans}, model) == {"/inputs/0": "`x` is BOOL, whose bytes are 0 or 1"}
    assert check_inputs({"x": booleans[:2]}, model)["x"].tolist() == [False, True]


ARRAYS = st.builds(
    lambda datatype, shape: np.zeros(shape, DTYPES[datatype]),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
)


@given(st.dictionaries(st.sampled_from(["audio", "state", "rate", "audi"]), ARRAYS))
def test_any_arrays_are_accepted_unchanged_or_rejected_with_errors(feeds: dict[str, Any]) -> None:
    outcome = inputs_or_errors(feeds)

    if isinstance(outcome, tuple):
        assert outcome
        assert all(fault.pointer.startswith("/inputs") for fault in outcome)
    else:
        assert outcome == feeds
        assert outcome["audio"].ndim == 2


def inputs_or_errors(feeds: Feeds) -> Feeds | tuple[InputError, ...]:
    try:
        return check_inputs(feeds, STATE)
    except InvalidInput as error:
        return error.faults


ANY = Signature(
    "any", "1", "", (TensorSpec("x", "FP32", None),), (TensorSpec("y", "FP32", None),), max_rows=3
)


@pytest.mark.parametrize("shape", [(), (5,), (2, 2), (1,) * 32])
def test_an_input_of_any_rank_takes_every_shape(shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.float32)

    assert check_inputs({"x": array}, ANY)["x"] is array
    assert check_data(msgspec.json.encode(array.tolist()), ANY).shape == shape


@pytest.mark.parametrize(
    ("data", "pointer", "detail"),
    [
        (b"[[1],2]", "/data/1", "a whole number, expected an array of numbers"),
        (b"[[1],[1,2]]", "/data/1", "row 1 has 2 numbers, any takes equal sizes, here 1"),
        (b"[" * 33 + b"1" + b"]" * 33, "/data", "it is nested deeper than 32 arrays"),
        (b"[[1,true],[1,2],[3,4],[5,6]]", "/data/0/1", "true, expected a number"),
    ],
)
def test_an_error_of_an_input_of_any_rank_has_its_place(
    data: bytes, pointer: str, detail: str
) -> None:
    with pytest.raises(InvalidInput) as raised:
        check_data(data, ANY)
    assert list(raised.value.faults) == [InputError(pointer, detail)]


def test_more_dimensions_than_a_tensor_may_have_are_rejected() -> None:
    assert faults_of({"x": np.ones((1,) * 33, np.float32)}, ANY) == {
        "/inputs/0/shape": "33 dimensions, `x` has at most 32"
    }


def test_an_announced_signature_may_leave_the_rank_open() -> None:
    assert read_signature(msgspec.json.encode(ANY)) == ANY

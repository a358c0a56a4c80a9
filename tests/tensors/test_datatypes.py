"""JSON decodes to exactly the tensor that it describes, or is rejected."""

import json
import math
import re
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.tensors import datatypes
from asyncinfer.tensors.datatypes import DTYPES, RANGES, TensorSpec

NUMERIC = sorted(datatypes.RANGES)


@pytest.mark.parametrize("datatype", NUMERIC)
def test_the_ends_of_every_numeric_datatype_are_accepted(datatype: str) -> None:
    dtype = np.dtype(datatypes.DTYPES[datatype])
    info = np.iinfo(dtype) if dtype.kind in "iu" else ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    ends = np.array([info.min, info.max], dtype).tolist()

    array = datatypes.decode(msgspec.json.encode(ends), TensorSpec("x", datatype, (None,)))

    assert array.dtype == dtype
    assert array.tolist() == ends


@pytest.mark.parametrize("datatype", sorted(set(NUMERIC) - datatypes.FLOATS))
def test_whole_numbers_beyond_the_ends_are_rejected(datatype: str) -> None:
    low, high = datatypes.RANGES[datatype]
    for beyond in (low - 1, high + 1):
        with pytest.raises((ValueError, OverflowError)):
            datatypes.decode(b"[%d]" % beyond, TensorSpec("x", datatype, (None,)))


@pytest.mark.parametrize(
    ("datatype", "beyond"), [("FP16", b"[65520]"), ("FP32", b"[1e39]"), ("FP64", b"[1.8e308]")]
)
def test_numbers_that_would_become_infinite_are_rejected(datatype: str, beyond: bytes) -> None:
    for text in (beyond, beyond.replace(b"[", b"[-")):
        with pytest.raises(ValueError, match="element 0: Expected"):
            datatypes.decode(text, TensorSpec("x", datatype, (None,)))


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32"])
def test_accepted_numbers_never_become_infinite_and_rejected_ones_would(datatype: str) -> None:
    dtype = datatypes.DTYPES[datatype]
    for end in datatypes.RANGES[datatype]:
        with np.errstate(over="ignore"):
            inside, outside = np.array([end, np.nextafter(end, 2 * end)]).astype(dtype)

        assert np.isfinite(inside)
        assert np.isinf(outside)


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False))))
def test_float32_numbers_survive_json(rows: list[list[float]]) -> None:
    spec = TensorSpec("x", "FP32", (None,))
    for row in rows:
        array = datatypes.decode(msgspec.json.encode(row), spec)

        assert array.tolist() == row


@pytest.mark.parametrize(
    ("datatype", "json", "expected"),
    [
        ("BOOL", b"[true,false]", [True, False]),
        ("BYTES", '["","é","a\\u0000b"]'.encode(), ["", "é", "a\0b"]),
        ("INT64", b"[-1,7]", [-1, 7]),
        ("FP32", b"[1,-0.5]", [1.0, -0.5]),
    ],
)
def test_every_kind_of_element_is_read(datatype: str, json: bytes, expected: list[object]) -> None:
    array = datatypes.decode(json, TensorSpec("x", datatype, (None,)))

    assert array.tolist() == expected


@pytest.mark.parametrize("padding", [b"", b" " * 2000], ids=["short", "long"])
@pytest.mark.parametrize("datatype", sorted(datatypes.FLOATS))
def test_floats_may_be_nan_infinite_or_null(datatype: str, padding: bytes) -> None:
    """NaN and infinities as results write them, and null as other JSON writers do."""
    text = b'[["NaN",1.5,null],["Infinity" , "-Infinity",-0.0]]' + padding

    array = datatypes.decode(text, TensorSpec("x", datatype, ("n", 3)))

    assert array.dtype == datatypes.DTYPES[datatype]
    expected = [[math.nan, 1.5, math.nan], [math.inf, -math.inf, -0.0]]
    np.testing.assert_array_equal(array.astype(np.float64), expected)
    for scalar in (b"null", b' "NaN" '):
        assert np.isnan(datatypes.decode(scalar, TensorSpec("x", datatype, ())))


@pytest.mark.parametrize("datatype", sorted(set(datatypes.DTYPES) - datatypes.FLOATS))
def test_other_datatypes_may_not_be_nan_infinite_or_null(datatype: str) -> None:
    spec = TensorSpec("x", datatype, (None,))
    with pytest.raises(ValueError, match="element 0: Expected"):
        datatypes.decode(b"[null]", spec)
    if datatype == "BYTES":
        assert datatypes.decode(b'["NaN","null"]', spec).tolist() == ["NaN", "null"]
    else:
        with pytest.raises(ValueError, match="element 0: Expected"):
            datatypes.decode(b'["NaN"]', spec)


@pytest.mark.parametrize(
    "text",
    [
        *(b"1null", b"null1", b"nullnull", b"-null", b"nul", b'"null"', b"NaN", b'"NaN', b'"NaN"1'),
        *(b'"nan"', b'" NaN"', b'"inf"', b'"+Infinity"', b'"1.5"', b'["NaN"]', b'"a"NaN"b"'),
        b'"\\"NaN\\""',
    ],
)
@pytest.mark.parametrize("padding", [b"", b" " * 2000], ids=["short", "long"])
def test_a_word_that_is_only_part_of_an_element_is_not_a_missing_value(
    text: bytes, padding: bytes
) -> None:
    """A zero replaces a missing value during decoding; it must not form a number with the
    characters beside it."""
    for whole in (b"[%b,null]" % text, b"[null,%b]" % text):
        with pytest.raises(ValueError):  # noqa: PT011
            datatypes.decode(whole + padding, TensorSpec("x", "FP32", (None,)))


def test_missing_values_in_a_text_of_many_pieces_keep_their_places() -> None:
    rows: list[list[float | str | None]] = [[index / 8, 1, 2, 3] for index in range(10_000)]
    rows[7][1], rows[5_000][0], rows[9_999][3] = None, "-Infinity", "NaN"

    read = datatypes.decode(msgspec.json.encode(rows), TensorSpec("x", "FP32", ("n", 4)))

    assert np.argwhere(np.isnan(read)).tolist() == [[7, 1], [9_999, 3]]
    assert np.argwhere(np.isinf(read)).tolist() == [[5_000, 0]]
    is_finite = np.isfinite(read)
    expected = np.array([[0 if isinstance(x, str | None) else x for x in row] for row in rows])
    np.testing.assert_array_equal(read[is_finite], expected.astype(np.float32)[is_finite])


def test_any_rank_is_read() -> None:
    for rank in range(6):
        json = b"[" * rank + b"7" + b"]" * rank

        array = datatypes.decode(json, TensorSpec("x", "INT32", (1,) * rank))

        assert array.shape == (1,) * rank
        assert array.item() == 7


@pytest.mark.parametrize(
    ("json", "shape"),
    [
        (b"7", ()),
        (b" [ [1, 2] ,[3, 4] ]", (2, 2)),
        (b"[" * 32 + b"1" + b"]" * 32, (1,) * 32),
        (b"[%b]" % b",".join([b"[1.5]"] * 1000), (1000, 1)),
    ],
)
def test_for_an_input_of_any_rank_the_text_determines_the_rank(
    json: bytes, shape: tuple[int, ...]
) -> None:
    spec = TensorSpec("x", "FP32", None)

    array = datatypes.decode(json, spec)

    assert array.shape == shape
    assert datatypes.shape_fits(shape, spec)


def test_a_text_is_not_read_deeper_than_a_tensor_may_be() -> None:
    with pytest.raises(ValueError, match="deeper than 32"):
        datatypes.decode(b"[" * 33 + b"1" + b"]" * 33, TensorSpec("x", "FP32", None))


@pytest.mark.parametrize(
    ("shape", "declared", "fit"),
    [
        ((2, 4), ("batch", 4), True),
        ((2, 3), ("batch", 4), False),
        ((2, 4, 1), ("batch", 4), False),
        ((0, 4), ("batch", 4), False),
        ((2, 2), ("n", "n"), True),
        ((2, 3), ("n", "n"), False),
        ((2, 3), (None, None), True),
        ((), (), True),
    ],
)
def test_whether_a_shape_fits_the_declared_one(
    shape: tuple[int, ...], declared: tuple[int | str | None, ...], fit: bool
) -> None:
    assert datatypes.shape_fits(shape, TensorSpec("x", "FP32", declared)) is fit


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_a_long_matrix_is_read_to_the_last_bit(datatype: str) -> None:
    """A long text is decoded by another method."""
    random = np.random.default_rng(0)
    rows = (random.standard_normal((9, 100)) * 10.0 ** random.integers(-9, 4, (9, 100))).tolist()
    spec = TensorSpec("x", datatype, ("batch", 100))
    read = datatypes.decode(msgspec.json.encode(rows), spec)
    assert read.dtype == datatypes.DTYPES[datatype]
    assert np.array_equal(read, np.array(rows, dtype=datatypes.DTYPES[datatype]))


@st.composite
def nearly_arrays(draw: st.DrawFn) -> tuple[bytes, TensorSpec]:
    """The text of an array, often damaged in one place, and the spec that it is decoded with."""
    datatype = draw(st.sampled_from(NUMERIC))
    low, high = datatypes.RANGES[datatype]
    if datatype in datatypes.FLOATS:
        element: st.SearchStrategy[Any] = st.floats(low, high, allow_nan=False)
    else:
        element = st.integers(int(low), int(high))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    rank = len(shape) + draw(st.sampled_from((0, 0, 0, 1, -1)))

    def nested(sizes: list[int]) -> object:
        return [nested(sizes[1:]) for _ in range(sizes[0])] if sizes else draw(element)

    separators = draw(st.sampled_from(((",", ":"), (" ,\n", ":"), (", ", ":"))))
    text = json.dumps(nested(shape), separators=separators).encode()
    at = draw(st.integers(0, len(text)))
    pieces = (b"", b"[", b"]", b",", b" ", b"1", b"-", b"e", b".", b'"', b"null", b"[1]", b"],[")
    damage = draw(st.sampled_from((*pieces, b'"NaN"', b'"-Infinity"')))
    return text[:at] + damage + text[at + draw(st.integers(0, 2)) :], TensorSpec(
        "x", datatype, (None,) * max(1, rank)
    )


@given(nearly_arrays())
def test_a_long_text_is_read_or_rejected_like_a_short_one(
    case: tuple[bytes, TensorSpec],
) -> None:
    """Long texts of numbers are decoded without their nesting, which only determines the shape."""
    text, spec = case
    outcomes = []
    for padding in (b"", b" " * 2000):
        try:
            array = datatypes.decode(text + padding, spec)
            outcomes.append((array.shape, array.dtype, array.tobytes()))
        except (ValueError, OverflowError):
            outcomes.append(((0,), np.dtype(object), b""))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("datatype", NUMERIC)
def test_a_text_of_many_pieces_is_read_to_the_last_element(datatype: str) -> None:
    numbers = [index % 100 for index in range(100_000)]
    rows = [[numbers[start : start + 50]] for start in range(0, len(numbers), 50)]

    read = datatypes.decode(msgspec.json.encode(rows), TensorSpec("x", datatype, (None, 1, 50)))

    assert read.shape == (2000, 1, 50)
    assert read.ravel().tolist() == numbers


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        (b"true]]", "element 99999 is not a number"),
        (b"1e39]]", "element 99999: Expected a number from -3.4"),
        (b"1],[1]]", "its arrays are not of equal lengths and depths"),
    ],
)
def test_the_place_of_an_error_is_named_in_a_long_text_too(last: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        datatypes.decode(b"[[" + b"1," * 99_999 + last, TensorSpec("x", "FP32", (None, None)))


@pytest.mark.parametrize("datatype", sorted(DTYPES))
def test_no_message_on_an_element_speaks_python(datatype: str) -> None:
    messages = []
    for before in (b"", b"1," * 99_999 if datatype in RANGES else b'"a",' * 99_999):
        for last in (b"1e400", b"9" * 30, b"-1.5", b"{}", b"[]", b'"a"', b"true"):
            try:
                datatypes.decode(b"[%b%b]" % (before, last), TensorSpec("x", datatype, (None,)))
            except ValueError as error:
                messages.append(str(error))
    assert messages
    assert not [text for text in messages if re.search(r"`|Python|\b(int|float|str|bool)\b", text)]


@pytest.mark.parametrize("text", [b"[[1,2],[1]]", b"[[],[1]]", b"[]", b"[[]]"])
def test_a_long_text_that_is_not_a_matrix_is_rejected_like_a_short_one(text: bytes) -> None:
    spec = TensorSpec("x", "FP32", ("batch", 2))
    outcomes = []
    for padding in (b"", b" " * 2000):
        try:
            outcomes.append(str(datatypes.decode(text + padding, spec).shape))
        except ValueError:
            outcomes.append("rejected")
    assert outcomes[0] == outcomes[1]

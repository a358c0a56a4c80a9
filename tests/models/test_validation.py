"""The model folder is read tolerantly, and inputs are checked strictly."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.errors import InputError, InvalidInput, ModelRefused
from asyncinfer.models import config
from asyncinfer.models.folder import (
    default_model,
    find_model_dir,
    is_valid_name,
    scan,
    served_versions,
)
from asyncinfer.models.signature import Signature
from asyncinfer.models.validation import check_data, check_uniform_data
from asyncinfer.tensors.datatypes import Array, Dim, TensorSpec
from asyncinfer.tensors.json_errors import MAX_LISTED_ERRORS


def signature(
    shape: tuple[Dim, ...] = ("batch", 4), datatype: str = "FP32", max_rows: int = 1000
) -> Signature:
    tensor = TensorSpec("x", datatype, shape)
    return Signature("iris", "1", "", (tensor,), (tensor,), max_rows=max_rows)


def faults_of(data: bytes, model: Signature) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as raised:
        check_data(data, model)
    return [(fault.pointer, fault.detail) for fault in raised.value.faults]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# --- the folder --------------------------------------------------------------------------------


def test_every_version_of_each_model_is_found_the_one_to_serve_first(tmp_path: Path) -> None:
    touch(tmp_path, "iris/2/model.onnx", "iris/10/model.onnx", "iris/_old/model.onnx")
    touch(tmp_path, "iris/11/notes.txt", "bare.onnx", "README.md")
    touch(tmp_path, ".hidden/1/model.onnx", "empty/notes.txt")

    found = [(file.model, file.version, file.display_path) for file in scan(tmp_path)]

    assert found == [
        ("bare", "1", "bare.onnx"),
        ("iris", "10", "iris/10/model.onnx"),
        ("iris", "2", "iris/2/model.onnx"),
    ]
    touch(tmp_path, "iris/model.toml")
    (tmp_path / "iris/model.toml").write_text("default_version = 2")
    served = served_versions(scan(tmp_path))
    assert served["iris"].version == "2"


def test_a_folder_wins_over_a_single_file_of_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "iris/1/model.onnx", "iris.onnx")

    file, other = scan(tmp_path)

    assert (file.display_path, file.problem) == ("iris/1/model.onnx", "")
    assert served_versions([file, other]) == {"iris": file}
    assert other.problem.startswith("iris.onnx: is not served, since iris/1/model.onnx has its")


def test_model_toml_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "iris/1/model.onnx")
    (tmp_path / "iris/model.toml").write_text(
        'labels = ["a", "b"]\ndescription = "d"\nexample = [[1, 2.5]]\n'
        "[batching]\nenabled = false\n[limits]\ntimeout_seconds = 2\nmax_rows_per_job = 5\n"
    )

    (file,) = scan(tmp_path)

    assert file.config.labels == ("a", "b")
    assert file.config.description == "d"
    assert file.config.example == [[1, 2.5]]
    assert file.config.batching.enabled is False
    assert file.config.limits.timeout_seconds == 2.0
    assert file.config.limits.max_rows_per_job == 5


def test_a_broken_model_does_not_affect_others_and_has_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, "good/1/model.onnx", "my model/1/model.onnx", "stats.onnx", "flat/m.onnx")
    touch(tmp_path, "typo/1/model.onnx")
    (tmp_path / "typo/model.toml").write_text("lables = []")

    problems = {file.model: file.problem for file in scan(tmp_path)}

    assert problems["good"] == ""
    assert "1 to 64 letters" in problems["my model"]
    assert "is not `stats`" in problems["stats"]
    assert problems["flat"] == "flat/m.onnx: has no version folder: move it to flat/1/model.onnx"
    assert problems["typo"].startswith("typo/model.toml: unknown key `lables`")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("m/v1/model.onnx", "m/v1: is not a version: rename v1 to 1"),
        ("m/01/model.onnx", "m/01: is not a version: rename 01 to 1"),
        ("m/v2/model.onnx", "m/v2: is not a version: rename v2 to a whole number, or to _v2"),
        ("m/new/model.onnx", "m/new: is not a version: rename new to a whole number, or to _new"),
        ("m/_new/model.onnx", None),
        ("m/notes/read.me", None),
    ],
)
def test_a_version_that_is_not_a_number_is_reported(
    tmp_path: Path, path: str, problem: str | None
) -> None:
    touch(tmp_path, "m/2/model.onnx", path)

    first, *others = scan(tmp_path)

    assert (first.version, first.problem) == ("2", "")
    assert [file.problem for file in others] == ([problem] if problem else [])
    assert served_versions([first, *others]) == {"m": first}


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (b"lables = []", "m.toml: unknown key `lables`; the nearest known one is `labels`"),
        (
            b"[batching]\nenable = true",
            "m.toml: unknown key `batching.enable`; the nearest known one is `batching.enabled`",
        ),
        (
            b"[limits]\ntimeout = 1",
            "m.toml: unknown key `limits.timeout`; "
            "the nearest known one is `limits.timeout_seconds`",
        ),
        (b"labels = [1]", "m.toml: key `labels.0`: Expected a string, got a number."),
        (b"batching = true", "m.toml: key `batching`: Expected a table, got true or false."),
        (
            b'scores = "logit"',
            "m.toml: key `scores`: Expected `logits` or `probabilities`, got `logit`.",
        ),
        (
            b"classes = [1.5]",
            "m.toml: key `classes.0`: Expected a whole number or a string, got a "
            "number with a decimal point.",
        ),
        (
            b"[limits]\nmax_rows_per_job = 0",
            "m.toml: key `limits.max_rows_per_job`: Expected a whole number of 1 or more.",
        ),
        (b"labels = ", "m.toml: Invalid value (at end of document)"),
    ],
)
def test_a_wrong_model_toml_names_file_and_key(toml: bytes, message: str) -> None:
    with pytest.raises(ModelRefused) as raised:
        config.read_config(toml, "m.toml")

    assert raised.value.detail == message


def test_a_model_toml_that_is_not_utf_8_is_rejected() -> None:
    with pytest.raises(ModelRefused, match=r"m\.toml: is not UTF-8 \(byte 0xff in line 1\)"):
        config.read_config(b"\xff", "m.toml")


@pytest.mark.parametrize("name", ["iris", "0", "a.b-c_D", "x" * 64])
def test_a_valid_name_is_accepted(name: str) -> None:
    assert is_valid_name(name)


@pytest.mark.parametrize(
    "name", ["", "stats", ".x", "-x", "a/b", "a b", "x" * 65, "é", "a\n", "{n}", "a:b"]
)
def test_a_name_that_could_mean_something_else_is_rejected(name: str) -> None:
    assert not is_valid_name(name)


def test_the_explicit_folder_comes_before_the_local_one_before_the_shipped_one(
    tmp_path: Path,
) -> None:
    package = tmp_path / "repository/asyncinfer"
    package.mkdir(parents=True)
    explicit_dir = tmp_path / "elsewhere"

    def found(explicit: Path | None = None) -> Path:
        return find_model_dir(explicit, cwd=tmp_path, package=package)

    assert found() == tmp_path / "repository/model"
    (package / "_models").mkdir()
    assert found() == package / "_models"
    (tmp_path / "model").mkdir()
    assert found() == tmp_path / "model"
    assert found(explicit_dir) == explicit_dir


@pytest.mark.parametrize(
    ("explicit", "names", "default"),
    [
        ("b", ["a", "b", "iris"], "b"),
        (None, ["a", "iris"], "iris"),
        (None, ["a"], "a"),
        (None, ["a", "b"], None),
        (None, [], None),
    ],
)
def test_the_default_model_is_the_one_set_or_iris_or_the_only_one(
    explicit: str | None, names: list[str], default: str | None
) -> None:
    assert default_model(explicit, names) == default


def test_a_signature_survives_its_announcement() -> None:
    announced = msgspec.structs.replace(
        signature(("batch", 3, None)), labels=("a", "b"), example=[[[1.5]]], batched=True
    )

    read = msgspec.json.decode(msgspec.json.encode(announced), type=Signature)

    assert read == announced


# --- input -------------------------------------------------------------------------------------


def test_rows_become_the_array_that_the_model_takes() -> None:
    array = check_data(b"[[5.1,3.5,1.4,0.2],[1,2,3,4]]", signature())

    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.array([[5.1, 3.5, 1.4, 0.2], [1, 2, 3, 4]], np.float32))


def test_data_may_come_as_a_piece_of_a_larger_message() -> None:
    (raw,) = msgspec.json.decode(b"[[[1,2,3,4]]]", type=list[msgspec.Raw])

    assert check_data(raw, signature()).shape == (1, 4)


FLOATS_DO = 'only FP16, BF16, FP32 and FP64 take null and "NaN"'
NO_NUMBER = 'a string, expected a number, or "NaN", "Infinity", "-Infinity"'
BEYOND_FP32 = "beyond the range of FP32, -3.40282e+38 to 3.40282e+38"
BARE = (
    "NaN or Infinity, expected a number; JSON has neither, write "
    '"NaN", "Infinity", "-Infinity" or null'
)


@pytest.mark.parametrize(
    ("data", "pointer", "detail"),
    [
        ("[[1,2,3,4],[1,2,3,4,5]]", "/data/1", "row 1 has 5 numbers, iris takes 4"),
        ("[[1]]", "/data/0", "row 0 has 1 number, iris takes 4"),
        ("[[]]", "/data/0", "row 0 has 0 numbers, iris takes 4"),
        ("[]", "/data", "0 rows, iris takes at least 1"),
        (
            "[1,2,3,4]",
            "/data",
            "1 dimension, iris takes 2: shape [batch, 4]; one row? [[1, ...]]",
        ),
        ("[1e400]", "/data", "1 dimension, iris takes 2: shape [batch, 4]"),
        ("5", "/data", "a whole number, expected an array of rows"),
        ("null", "/data", "null, expected an array of rows"),
        ('{"a":1}', "/data", "an object, expected an array of rows"),
        ("[[1,2,3,4],7]", "/data/1", "a whole number, expected an array of 4 numbers"),
        ('[{"a":1}]', "/data/0", "an object, expected an array of 4 numbers"),
        ('[[1,2,3,"4"]]', "/data/0/3", NO_NUMBER),
        ('[["NaN",2,null,"nan"]]', "/data/0/3", NO_NUMBER),
        ('[[1,"inf",3,4]]', "/data/0/1", NO_NUMBER),
        ('[[1,2,3,"null"]]', "/data/0/3", NO_NUMBER),
        ("[[null,2,3,1e39]]", "/data/0/3", BEYOND_FP32),
        ("[[1,true,3,4]]", "/data/0/1", "true, expected a number"),
        ("[[false,2,3,4]]", "/data/0/0", "false, expected a number"),
        ("[[1,[2],3,4]]", "/data/0/1", "an array, expected a number"),
        ("[[1,{},3,4]]", "/data/0/1", "an object, expected a number"),
        ("[[1,NaN,3,4]]", "/data/0/1", BARE),
        ("[[1,-Infinity,3,4]]", "/data/0/1", BARE),
        ("[[1e400,2,3,4]]", "/data/0/0", BEYOND_FP32),
        ("[[-1e400,2,3,4]]", "/data/0/0", BEYOND_FP32),
        ("[[1e39,2,3,4]]", "/data/0/0", BEYOND_FP32),
        (f"[[1,{'9' * 5000},3,4]]", "/data/0/1", BEYOND_FP32),
        (f"[[1,{'9' * 60},3,4]]", "/data/0/1", BEYOND_FP32),
        ("[[1,2,3,4]", "/data", "not valid JSON: Expecting ',' delimiter at character 10"),
        ("[[1,2,3,4]] x", "/data", "not valid JSON: Extra data at character 12"),
        ("", "/data", "not valid JSON: Expecting value at character 0"),
        (
            "\ufeff[[1,2,3,4]]",
            "/data",
            "begins with a byte order mark; send UTF-8 without one",
        ),
    ],
)
def test_an_error_names_the_place_and_what_is_expected(
    data: str, pointer: str, detail: str
) -> None:
    assert faults_of(data.encode(), signature()) == [(pointer, detail)]


@pytest.mark.parametrize(
    ("model", "data", "pointer", "detail"),
    [
        (signature(("n",), "INT64"), "[1.5]", "/data/0", "a number with a decimal point"),
        (signature(("n",), "INT64"), "[true]", "/data/0", "true, expected a whole number"),
        (signature(("n",), "INT64"), f"[{2**63}]", "/data/0", "beyond the range of INT64"),
        (signature(("n",), "INT64"), "[1e400]", "/data/0", "beyond the range of INT64"),
        (signature(("n",), "UINT64"), f"[{2**64}]", "/data/0", "beyond the range of UINT64"),
        (signature(("n",), "UINT64"), "[-1]", "/data/0", "beyond the range of UINT64"),
        (signature(("n",), "INT8"), "[-129]", "/data/0", "beyond the range of INT8, -128 to 127"),
        (
            signature(("n",), "FP16"),
            "[65520]",
            "/data/0",
            "beyond the range of FP16, -65504 to 65504",
        ),
        (signature(("n",), "FP64"), "[1e400]", "/data/0", "beyond the range of FP64"),
        (signature(("n",), "BOOL"), "[1]", "/data/0", "a whole number, expected true or false"),
        (signature(("n",), "BYTES"), "[1]", "/data/0", "a whole number, expected a string"),
        (signature(("n",), "BYTES"), "[NaN]", "/data/0", "NaN or Infinity, expected a string"),
        (signature(("n",), "BYTES"), "[null]", "/data/0", f"null, expected a string; {FLOATS_DO}"),
        (signature(("n",), "BYTES"), '["NaN", null]', "/data/1", "null, expected a string; only"),
        (signature(("n",), "BOOL"), "[null]", "/data/0", f"true or false; {FLOATS_DO}"),
        (signature(("n",), "BOOL"), '["NaN"]', "/data/0", '"NaN", expected true or false; only'),
        (signature(("n",), "INT64"), "[null]", "/data/0", f"a whole number; {FLOATS_DO}"),
        (signature(("n",), "UINT8"), '["-Infinity"]', "/data/0", f"a whole number; {FLOATS_DO}"),
        (signature(("n",), "INT32"), "[NaN]", "/data/0", f"a whole number; {FLOATS_DO}"),
        (signature(("n",), "INT64"), '["x"]', "/data/0", "a string, expected a whole number"),
        (signature(("n",), "BYTES"), '["\\ud800"]', "/data", "cannot be read: "),
        (signature(("n", 2), "BYTES"), '[["a"],["b","c"]]', "/data/0", "row 0 has 1 string,"),
        (signature(("n", "w")), "[[1,2],[1]]", "/data/1", "takes equal sizes, here 2"),
        (signature(("n", "n")), "[[1,2,3]]", "/data/0", "takes equal sizes, here 1"),
        (signature((2, 1)), "[[1]]", "/data", "1 row, iris takes 2"),
        (signature(("n", 1, 2)), "[[[1,2]],[[1]]]", "/data/1/0", "1 number, iris takes 2"),
        (signature(("n", 2, 2)), "[[[1,2]]]", "/data/0", "row 0 has 1 array, iris takes 2"),
        (signature(()), "[1]", "/data", "an array, expected a number"),
    ],
)
def test_errors_are_found_for_every_datatype_and_rank(
    model: Signature, data: str, pointer: str, detail: str
) -> None:
    ((found_pointer, found_detail),) = faults_of(data.encode(), model)

    assert found_pointer == pointer
    assert detail in found_detail


def test_text_that_is_not_utf_8_is_rejected() -> None:
    for model in (signature(), signature(("n",), "BYTES")):
        assert faults_of(b'["\xff"]', model) == [("/data", "not UTF-8 at byte 2")]


def test_all_errors_are_listed_at_once() -> None:
    assert faults_of(b'[[1,"x",3,4],[1,2,3],[true,2,3,1e39],[1,2,3,4]]', signature()) == [
        ("/data/0/1", NO_NUMBER),
        ("/data/1", "row 1 has 3 numbers, iris takes 4"),
        ("/data/2/0", "true, expected a number"),
        ("/data/2/3", BEYOND_FP32),
    ]


def test_the_detail_has_the_first_error_and_the_number_of_others() -> None:
    with pytest.raises(InvalidInput) as raised:
        check_data(b'[["x",true,3,4]]', signature())

    assert raised.value.detail == f"/data/0/0: {NO_NUMBER} (and 1 more)"


def test_a_long_list_of_errors_is_cut_and_says_so() -> None:
    some = faults_of(b"[[" + b"true," * 99 + b"true]]", signature())
    many = faults_of(b"[[" + b"true," * 99_999 + b"true]]", signature())

    assert len(some) == len(many) == MAX_LISTED_ERRORS + 1
    assert some[-1] == ("/data", "81 more errors are not listed")
    assert many[-1] == ("/data", "at least 980 more errors are not listed")


def test_only_the_beginning_of_a_long_text_is_searched_for_errors() -> None:
    """The search costs 40 times as much as decoding, so a small mistake would be expensive."""
    sound = b"[1,2,3,4],"
    early = faults_of(b"[[1,2,3]," + sound * 900 * 10 + b"[1,2]]", signature(max_rows=10_000))
    late = faults_of(b"[" + sound * 900 * 10 + b"[1,true,3,4]]", signature(max_rows=10_000))

    assert early == [("/data/0", "row 0 has 3 numbers, iris takes 4")]
    assert late == [("/data", "cannot be read: element 36001 is not a number")]


def test_too_many_rows_are_counted_in_a_long_text_too() -> None:
    row = b"[1,2,3,4]"
    for text in (b"[" + b",".join([row] * 20_000) + b"]", b"[" + b",".join([row] * 20_000) + b"7]"):
        assert faults_of(text, signature()) == [
            ("/data", "20000 rows, iris takes at most 1000 in one job")
        ]


def test_a_long_text_of_another_shape_is_rejected_with_its_shape() -> None:
    wide = b"[" + b",".join([b"[1,2,3,4,5]"] * 9_000) + b"]"
    few = b"[" + b",".join([b"[1,2,3,4]"] * 9_000) + b"]"

    assert faults_of(wide, signature(max_rows=10_000))[0] == (
        "/data/0",
        "row 0 has 5 numbers, iris takes 4",
    )
    assert faults_of(few, signature((10_000, 4))) == [
        ("/data", "its shape is [9000, 4], iris takes shape [10000, 4]")
    ]


def test_errors_do_not_repeat_the_input() -> None:
    shown = faults_of(b'[["secret",2,3,12345678901e39],[{"secret":1}]]', signature())

    assert "secret" not in str(shown)
    assert "12345" not in str(shown)


@pytest.mark.parametrize("shape", [("n",), ("n", 4), ("n", 1, 1, 1), (1,) * 30])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
@pytest.mark.parametrize("close", [b"", b"]" * 1_000_000])
def test_a_million_brackets_are_an_ordinary_error(
    shape: tuple[Dim, ...], datatype: str, close: bytes
) -> None:
    ((pointer, detail),) = faults_of(b"[" * 1_000_000 + close, signature(shape, datatype))

    assert pointer == "/data"
    assert detail.startswith("nested too deep, iris takes shape [")


def test_rows_are_accepted_up_to_the_limit_and_not_beyond() -> None:
    model = signature(("batch", 1), max_rows=3)

    assert check_data(b"[[1],[2],[3]]", model).shape == (3, 1)
    assert faults_of(b"[[1],[2],[3],[4]]", model) == [
        ("/data", "4 rows, iris takes at most 3 in one job")
    ]


def test_the_row_limit_does_not_apply_to_a_fixed_first_dimension() -> None:
    assert check_data(b"[1,2,3]", signature((3,), max_rows=1)).shape == (3,)


def test_a_model_with_two_inputs_takes_no_data() -> None:
    tensor = TensorSpec("a", "FP32", ("n",))
    model = Signature("two", "1", "", (tensor, TensorSpec("b", "FP32", ("n",))), (tensor,))

    assert faults_of(b"[1]", model) == [
        (
            "/data",
            "two takes 2 inputs (a, b), `data` is one; send "
            '`"inputs": [{"name", "shape", "datatype", "data"}]`',
        )
    ]


def test_a_model_without_inputs_takes_no_data() -> None:
    with pytest.raises(InvalidInput) as raised:
        check_data(b"[1]", Signature("none", "1", "", (), ()))

    assert raised.value.faults == (InputError("/data", "none takes no input"),)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=3)
    | st.sampled_from(["NaN", "Infinity", "-Infinity"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
)
SPECS = st.builds(
    signature,
    st.lists(st.sampled_from([1, 2, "n", "m", None]), max_size=3).map(tuple),
    st.sampled_from(["FP32", "FP16", "INT8", "UINT64", "BOOL", "BYTES"]),
)


def array_or_errors(data: bytes, model: Signature) -> Array | tuple[InputError, ...]:
    try:
        return check_data(data, model)
    except InvalidInput as error:
        return error.faults


@given(JSON, SPECS)
def test_any_json_is_accepted_completely_or_rejected_with_errors(
    value: object, model: Signature
) -> None:
    outcome = array_or_errors(msgspec.json.encode(value), model)

    if isinstance(outcome, tuple):
        assert outcome
        assert all(fault.pointer.startswith("/data") for fault in outcome)
        assert not outcome[0].detail.startswith("cannot be read")
    else:
        # numpy converts null, "NaN" and "Infinity" to the same floats.
        expected = np.array(value, dtype=outcome.dtype)
        assert outcome.shape == expected.shape
        np.testing.assert_array_equal(outcome, expected)


@given(st.binary(max_size=40) | st.text('[]{},:.-+eE0123456789" \\uNaInfty', max_size=40))
def test_any_bytes_are_accepted_or_rejected(data: bytes | str) -> None:
    text = data.encode() if isinstance(data, str) else data
    for datatype in ("FP32", "BYTES", "INT64"):
        outcome = array_or_errors(text, signature(("n", "m"), datatype))

        assert len(outcome) > 0


# --- many inputs at once -----------------------------------------------------------------------

_TEXTS = st.one_of(
    st.lists(st.lists(st.floats(width=32) | st.integers(-9, 9), min_size=3, max_size=5)).map(
        lambda rows: msgspec.json.encode(rows)
    ),
    st.sampled_from([b"", b"[]", b"[[]]", b"null", b'[["x",1,2,3]]', b"[[1,2,3,1e39]]", b"[1,2]"]),
    st.sampled_from([b'[["NaN",1,"-Infinity",null]]', b'[[1,2,3,4],["Infinity",1,2,3]]']),
)


@given(st.lists(_TEXTS, min_size=1, max_size=4), st.lists(st.integers(1, 4), max_size=4))
def test_inputs_decoded_together_equal_those_decoded_one_by_one(
    unusual: list[bytes], row_counts: list[int]
) -> None:
    fine = [msgspec.json.encode([[0.5, 1, -2, 3e3]] * count) for count in row_counts]

    for texts in ([*fine, *unusual], [*fine, b"[[1,2,3,4]]"]):
        together = check_uniform_data(texts, signature(max_rows=3))
        if together is None:
            continue
        for text, array in zip(texts, together, strict=True):
            alone = check_data(text, signature(max_rows=3))
            assert alone.dtype == array.dtype
            np.testing.assert_array_equal(alone, array)


@pytest.mark.parametrize("beside", [b"[[5,6,7,8],[9,8,7,6]]", b'[["NaN",null,"Infinity",1]]'])
def test_small_inputs_that_fit_are_decoded_together(beside: bytes) -> None:
    assert check_uniform_data([b"[[1,2,3,4]]", beside], signature()) is not None


def test_inputs_are_not_decoded_together_if_one_does_not_fit() -> None:
    for bad in (b"[[1,2,3]]", b"[]", b"[[1,2,3,4]],[[1,2,3,4]]", b"[[1,2,3,true]]", b"["):
        assert check_uniform_data([b"[[1,2,3,4]]", bad], signature()) is None

"""NaN, infinities and missing values: in inputs, results and files."""

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asyncinfer.client import (
    AsyncClient,
    CannotSend,
    Client,
    InvalidInput,
    Model,
    SlowMapWarning,
    TensorInfo,
)
from asyncinfer.client._encoding import named_arrays, tensor_bytes
from asyncinfer.tensors.datatypes import Array
from asyncinfer.testing import Running
from tests.cli.command_line import run_command

NAN: Final = math.nan
INF: Final = math.inf


def sent(value: Any, datatype: str) -> Array:
    """The array that is sent for an input of a model with one input."""
    spec = TensorInfo("x", datatype, ("batch", None))
    model = Model(model="m", version="1", inputs=(spec,), outputs=())
    return named_arrays(value, model)["x"]


# --- inputs ------------------------------------------------------------------------------------

ROWS: Final = [[NAN, 1.0, 2.0], [3.0, INF, -INF]]
WAYS: Final[dict[str, Any]] = {
    "lists": ROWS,
    "None in a list": [[None, 1.0, 2.0], [3.0, INF, -INF]],
    "words in a list": [["NaN", 1, 2], [3, "Infinity", "-Infinity"]],
    "words in a list of a dict": {"x": [["NaN", 1, 2], [3, "Infinity", "-Infinity"]]},
    "an array": np.array(ROWS),
    "a list of arrays": [np.array(row, np.float32) for row in ROWS],
    "a masked array": np.ma.masked_equal([[7.0, 1, 2], ROWS[1]], 7),
    "a frame of pandas": pd.DataFrame(ROWS),
    "a frame of polars": pl.DataFrame(ROWS, orient="row"),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_input_with_missing_values_arrives_unchanged(client: Client, way: str) -> None:
    np.testing.assert_array_equal(
        client.predict(WAYS[way], "doubled"), [[NAN, 2, 4], [6, INF, -INF]]
    )


MASKED: Final = np.ma.masked_equal([[7.0, 1, 2]] * 3, 7)
MAPPED: Final[dict[str, Any]] = {
    "an array": MASKED,
    "a dict of arrays": {"x": MASKED},
    "masked rows": list(MASKED),
    "lists": [[None, 1, 2]] * 3,
    "records": [{"x": ["NaN", 1, 2]}, {"x": [None, 1.0, 2]}, {"x": [NAN, 1, 2]}],
}


@pytest.mark.parametrize("form", MAPPED)
def test_rows_with_missing_values_are_mapped(client: Client, form: str) -> None:
    found = list(client.map(MAPPED[form], "doubled", progress=False))

    np.testing.assert_array_equal(found, [[NAN, 2, 4]] * 3)


def test_a_long_list_with_missing_values_is_read_to_its_end(client: Client) -> None:
    rows: list[list[float | None]] = [[number / 8, 1.0, 2.0] for number in range(10_000)]
    rows[0][2] = rows[9_999][1] = None

    found = client.predict(rows, "doubled")

    expected = np.array(rows, np.float32)
    np.testing.assert_array_equal(found, expected + expected)


def test_a_row_with_missing_values_does_not_change_others_of_its_run(client: Client) -> None:
    client.pause("doubled")
    rows: list[list[Any]] = [[number, 0.1, None if number % 3 else 0.2] for number in range(30)]
    jobs = [client.submit([row], "doubled") for row in rows]
    client.resume("doubled")

    found = [job.result()[0].tolist() for job in jobs]

    expected = np.array(rows, np.float32)
    np.testing.assert_array_equal(found, expected + expected)


FOR_FLOATS: Final[dict[str, tuple[Any, list[list[float]]]]] = {
    "bool beside float": (pd.DataFrame({"a": [0.5], "b": [True]}), [[0.5, 1]]),
    "bool alone": (pd.DataFrame({"a": [True, False]}), [[1], [0]]),
    "Int64": (
        pd.DataFrame({"a": pd.array([5, None], dtype="Int64"), "b": [1.5, 2]}),
        [[5, 1.5], [NAN, 2]],
    ),
    "Float64": (pd.DataFrame({"a": pd.array([0.5, None], dtype="Float64")}), [[0.5], [NAN]]),
    "boolean": (
        pd.DataFrame({"a": pd.array([True, None], dtype="boolean"), "b": [1, 2]}),
        [[1, 1], [NAN, 2]],
    ),
    "None in an object column": (pd.DataFrame({"a": [1.5, None]}, dtype=object), [[1.5], [NAN]]),
    "Decimal": (pd.DataFrame({"a": [Decimal("0.5"), None], "b": [1, 2]}), [[0.5, 1], [NAN, 2]]),
    "polars": (pl.DataFrame({"a": [True, None], "b": [0.5, None]}), [[1, 0.5], [NAN, NAN]]),
    "polars, bool alone": (pl.DataFrame({"a": [True, None]}), [[1], [NAN]]),
    "an array of bool": (np.array([[True, False]]), [[1, 0]]),
    "masked": (np.ma.masked_array([[1, 2]], [[True, False]]), [[NAN, 2]]),
    "a mask of nothing": (np.ma.masked_array([[1, 2]], [[False, False]]), [[1, 2]]),
    "words": ([["NaN", "-Infinity"]], [[NAN, -INF]]),
    "None in a list": ([[None, 1.5]], [[NAN, 1.5]]),
}


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
@pytest.mark.parametrize("case", FOR_FLOATS)
def test_floats_take_booleans_and_missing_values(case: str, datatype: str) -> None:
    value, expected = FOR_FLOATS[case]

    np.testing.assert_array_equal(sent(value, datatype).astype(np.float64), expected)


WITH_MISSING: Final[dict[str, tuple[Any, str]]] = {
    "Int64": (pd.DataFrame({"a": pd.array([5, None], dtype="Int64"), "b": [1, 2]}), "is <NA>"),
    "pandas": (pd.DataFrame({"a": [5, None]}), "is NaN"),
    "polars": (pl.DataFrame({"a": [5, None]}), "is None"),
    "masked": (np.ma.masked_array([[1, 2]], [[True, False]]), "is masked"),
    "None in a list": ([[None, 1]], "is None"),
    "an array": (np.array([[NAN, 1.0]]), "is NaN"),
}


@pytest.mark.parametrize("datatype", ["INT64", "UINT8"])
@pytest.mark.parametrize("case", WITH_MISSING)
def test_integers_have_no_missing_values_and_the_error_has_the_remedy(
    case: str, datatype: str
) -> None:
    value, is_missing = WITH_MISSING[case]

    with pytest.raises(
        CannotSend, match=f"{is_missing} in places, and `x` takes {datatype}.*fillna"
    ):
        sent(value, datatype)


def test_a_missing_integer_is_refused_at_its_place(client: Client) -> None:
    with pytest.raises(InvalidInput) as refused:
        client.predict([[1, 2], [3, None]], "int64")

    (fault,) = refused.value.faults
    assert (fault.pointer, fault.detail.partition(";")[0]) == (
        "/data/1/1",
        "null, expected a whole number",
    )


def test_numbers_among_strings_do_not_become_strings() -> None:
    for value in ([["a", NAN]], [["a", 1]], pd.DataFrame({"a": ["a", None], "b": ["c", "d"]})):
        strings = sent(value, "BYTES")
        with pytest.raises(CannotSend, match="where a string is needed"):
            tensor_bytes("x", strings)


def test_a_string_that_reads_like_nan_stays_a_string(client: Client) -> None:
    words = [["NaN", "null"]]
    for value in (words, np.array(words)):
        assert client.predict(value, "bytes").tolist() == words
    assert client.submit(words, "bytes", answer="json").result().tolist() == words


def test_half_precision_has_nan_and_infinities(client: Client) -> None:
    for value in ([[None, INF]], np.array([[NAN, INF]])):
        found = client.predict(value, "bf16").astype(np.float64)
        np.testing.assert_array_equal(found, [[NAN, INF]])


# --- results -----------------------------------------------------------------------------------

FLOWERS: Final = [[NAN, 1.0, 2.0, 3.0], [5.1, 3.5, 1.4, 0.2]]


def _are_numbers(rows: Sequence[dict[str, Any]]) -> bool:
    shares = [share for row in rows for share in row["probabilities"]]
    return all(type(share) is float for share in shares) and math.isnan(shares[0])


def test_a_score_that_is_nan_is_a_number(client: Client) -> None:
    assert _are_numbers([client.predict(FLOWERS[:1])])
    assert _are_numbers(client.predict(FLOWERS))
    assert _are_numbers(client.predict(np.array(FLOWERS)))
    assert _are_numbers(list(client.map(FLOWERS, progress=False)))
    assert _are_numbers(list(client.map(FLOWERS, batch=1, progress=False)))

    job = client.submit(FLOWERS, group="missing")
    assert _are_numbers(job.result())
    assert _are_numbers(client.job(job.id).result())
    (again,) = client.jobs(group="missing")
    assert _are_numbers(again.result())

    framed = client.map_frame(pd.DataFrame(FLOWERS), progress=False)
    assert framed["probability"].dtype == np.float64
    assert framed["probability"].isna().tolist() == [True, False]


async def test_a_nan_score_is_a_number_in_the_asynchronous_client(aclient: AsyncClient) -> None:
    assert _are_numbers(await aclient.predict(FLOWERS))
    assert _are_numbers(await (await aclient.submit(FLOWERS)))
    assert _are_numbers([row async for row in aclient.map(FLOWERS, progress=False)])


# --- files -------------------------------------------------------------------------------------


def _tables(folder: Path) -> dict[str, tuple[str, ...]]:
    """The same rows as files, and the arguments that go with each."""
    (folder / "empty.csv").write_text("a,b,c\n1.5,,2\n3,inf,-Infinity\n")
    (folder / "named.csv").write_text("a,b,c\n1.5,NA,2\n3,Infinity,-inf\n")
    (folder / "nan.csv").write_text("1.5, nan,2\n3,inf,-inf\n")
    (folder / "rows.ndjson").write_text('[1.5, null, 2]\n[3, "Infinity", "-Infinity"]\n')
    (folder / "records.jsonl").write_text(
        '{"a": 1.5, "b": "NaN", "c": 2}\n{"a": 3, "b": "Infinity", "c": "-Infinity"}\n'
    )
    (folder / "inputs.jsonl").write_text(
        '{"x": [1.5, "NaN", 2]}\n{"x": [3, "Infinity", "-Infinity"]}\n'
    )
    (folder / "rows.json").write_text('[[1.5, "NaN", 2], [3, "Infinity", "-Infinity"]]')
    np.save(folder / "rows.npy", [[1.5, NAN, 2], [3, INF, -INF]])
    columns: dict[str, Any] = {"a": [1.5, 3], "b": [None, INF], "c": [2, -INF]}
    pq.write_table(pa.table(columns), folder / "null.parquet")
    pd.DataFrame({**columns, "b": [NAN, INF]}).to_parquet(folder / "frame.parquet")
    return {path.name: (str(path),) for path in folder.iterdir()}


@pytest.mark.parametrize("to", ["json", "ndjson", "csv", "parquet"])
def test_a_file_with_missing_values_is_scored_and_written(
    running: Running, tmp_path: Path, to: str
) -> None:
    (tmp_path / "in").mkdir()
    for name, words in _tables(tmp_path / "in").items():
        out = tmp_path / f"{name}.{to}"
        ran = run_command(
            "predict", *words, "--model", "doubled", "--url", running.url, "-o", str(out)
        )
        assert ran.code == 0, (name, ran.err)
        assert _written(out) == [["3.0", "nan", "4.0"], ["6.0", "inf", "-inf"]], name


def _written(path: Path) -> list[list[str]]:
    """The numbers of a file of results; checks that JSON has NaN only as a string."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path)["y"].to_pylist()
    elif path.suffix == ".csv":
        rows = [line.split(",")[1:4] for line in path.read_text().splitlines()[1:]]
        assert rows[0][1] == "NaN"
    else:
        text = path.read_text()
        whole = text if path.suffix == ".json" else f"[{','.join(text.splitlines())}]"
        rows = [row["y"] for row in json.loads(whole, parse_constant=pytest.fail)]
        assert rows[0][1] == "NaN"
    return [[str(float(number)) for number in row] for row in rows]


def test_a_row_with_nan_may_be_typed(running: Running) -> None:
    ran = run_command("predict", "1.5", "NaN", "2", "--model", "doubled", "--url", running.url)

    assert ran.rows == [{"row": 1, "y": [3.0, "NaN", 4.0]}]


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.csv", "1,2\n,2\n"), ("rows.ndjson", "[1,2]\n[null,2]\n")],
)
def test_a_missing_cell_is_not_an_integer(
    running: Running, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)

    ran = run_command("predict", str(tmp_path / name), "--model", "int64", "--url", running.url)

    assert ran.code == 1
    assert ran.rows[0] == {"row": 1, "y": [1, 2]}
    assert "row 2: value at 0: null, expected a whole number; only FP16" in ran.err


def test_nan_as_python_writes_it_is_refused_as_json(running: Running, tmp_path: Path) -> None:
    (tmp_path / "rows.ndjson").write_text("[NaN, 1, 2]\n[1, 2, 3]\n")

    ran = run_command(
        "predict", str(tmp_path / "rows.ndjson"), "-m", "doubled", "--url", running.url
    )

    assert [row.get("y") for row in ran.rows] == [None, [2.0, 4.0, 6.0]]
    assert 'a number that JSON does not have is "NaN" or null' in ran.err


# --- slow maps ---------------------------------------------------------------------------------

MANY: Final = np.ones((65, 2), np.float32)


@pytest.mark.soak
def test_a_map_over_a_model_that_does_not_batch_warns_once_why_it_is_slow(client: Client) -> None:
    """Over a model that batches, or over few rows, it does not warn: warnings are errors here."""
    list(client.map(MANY[:64], "mean", progress=False))
    list(client.map(np.ones((65, 3)), "doubled", progress=False))

    with pytest.warns(SlowMapWarning, match="mean runs each row alone.* off: ") as warned:
        list(client.map(MANY.tolist(), "mean", progress=False))
    with pytest.warns(SlowMapWarning) as of_a_frame:
        client.map_frame(pd.DataFrame(MANY), model="mean", progress=False)

    assert [warning.filename for warning in (*warned, *of_a_frame)] == [__file__] * 2


async def test_an_asynchronous_map_warns_too(aclient: AsyncClient) -> None:
    with pytest.warns(SlowMapWarning, match="mean runs each row alone") as warned:
        assert len([row async for row in aclient.map(MANY, "mean", progress=False)]) == 65

    assert [warning.filename for warning in warned] == [__file__]


def test_at_the_command_line_the_warning_is_one_line(running: Running, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("1,2\n" * 65)

    ran = run_command(
        "predict", str(tmp_path / "rows.csv"), "--model", "mean", "--url", running.url
    )

    assert ran.code == 0
    (line,) = [line for line in ran.err.splitlines() if "alone" in line]
    assert line.startswith("asyncinfer: mean runs each row alone, so many rows take long.")

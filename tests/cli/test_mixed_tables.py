"""Tables of numbers and strings, for models with an input for each column."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from asyncinfer.cli.predict import readers
from asyncinfer.cli.predict.tables import ReadOptions, Row
from asyncinfer.testing import service
from tests import zoo
from tests.cli.command_line import run_command

CUSTOMERS = [(7, 30.0, 2.5, "pro"), (8, 61.0, None, "2"), (9, 18.0, 4.0, "free")]
RECORDS = [dict(zip(("id", "age", "calls", "plan"), row, strict=True)) for row in CUSTOMERS]


def read(path: Path, *columns: str) -> list[Row]:
    options = ReadOptions(
        source=str(path),
        columns=columns,
        inputs={"age": 2, "calls": 2, "plan": 2},
        text_inputs=frozenset({"plan"}),
        single_inputs=frozenset({"age", "calls", "plan"}),
    )
    return list(readers.rows(options))


def files(folder: Path) -> list[Path]:
    """Files of the same customers in each format, with a column that is no input of the model."""
    cells = [",".join("" if cell is None else str(cell) for cell in row) for row in CUSTOMERS]
    (folder / "rows.csv").write_text("\n".join(["id,age,calls,plan", *cells]))
    (folder / "rows.ndjson").write_text("\n".join(map(json.dumps, RECORDS)))
    (folder / "rows.json").write_text(json.dumps(RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "rows.parquet")
    return sorted(folder.glob("rows.*"))


def test_columns_are_read_as_the_inputs_of_their_names_in_every_form(tmp_path: Path) -> None:
    expected = [
        {"age": [age], "calls": [calls], "plan": [plan]} for _, age, calls, plan in CUSTOMERS
    ]
    for path in files(tmp_path):
        assert [row.value for row in read(path)] == expected, path.name


def test_selected_columns_are_read_in_the_same_way(tmp_path: Path) -> None:
    files(tmp_path)
    rows = read(tmp_path / "rows.csv", "plan", "2")
    assert rows[0].value == {"plan": ["pro"], "age": [30.0]}


def test_a_cell_that_is_no_number_is_reported_with_its_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("plan,age,calls\npro,old,1\n")
    (row,) = read(tmp_path / "rows.csv")
    assert "line 2: column 'age': 'old' is no number" in row.problem


@pytest.fixture
def customers_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a service whose model returns the sum of the numbers, and the plan unchanged."""
    graph = zoo.model(
        [
            helper.make_node("Add", ["age", "calls"], ["total"]),
            helper.make_node("Identity", ["plan"], ["kept"]),
        ],
        [
            zoo.tensor("age", ["n", 1]),
            zoo.tensor("calls", ["n", 1]),
            zoo.tensor("plan", ["n", 1], TensorProto.STRING),
        ],
        [zoo.tensor("total", ["n", 1]), zoo.tensor("kept", ["n", 1], TensorProto.STRING)],
    )
    with service(graph) as running:
        monkeypatch.setenv("ASYNCINFER_URL", running.url)
        yield running.url


@pytest.mark.soak
def test_a_table_of_numbers_and_strings_is_scored_from_any_file_and_from_the_prompt(
    customers_url: str, tmp_path: Path
) -> None:
    expected = [(32.5, "pro"), ("NaN", "2"), (22.0, "free")]
    for path in files(tmp_path):
        ran = run_command("predict", str(path))
        assert (ran.code, ran.err) == (0, ""), path.name
        assert [(row["total"][0], row["kept"][0]) for row in ran.rows] == expected, path.name
    ran = run_command("predict", json.dumps(RECORDS[0]))
    assert [(row["total"][0], row["kept"][0]) for row in ran.rows] == expected[:1], ran.err
    (tmp_path / "short.csv").write_text("id,age\n1,30\n")
    assert "with a column" in run_command("predict", f"{tmp_path}/short.csv").err
    (tmp_path / "bad.ndjson").write_text(
        '{"age": "x", "calls": 1, "plan": "a"}\n{"calls": [1, 2], "age": 1, "plan": "a"}\n'
        '{"age": 1, "calls": 1}\n[1, 2, 3]\n'
    )
    assert run_command("predict", f"{tmp_path}/bad.ndjson").err.splitlines() == [
        "row 1: `age` has strings, model takes FP32",
        "row 2: `calls` has 2 numbers, model takes 1",
        "row 3: `plan` is missing: model takes it as BYTES of shape [n, 1]",
        "row 4: model takes several inputs; give a table with a column, or JSON objects with a "
        "key, for each of 'age', 'calls', 'plan'",
    ]

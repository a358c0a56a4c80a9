"""Classifiers of four libraries name the class that their own library predicts."""

import csv
import io
import json
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from msgspec import Struct
from onnx import helper

from asyncinfer.testing import Running, service
from tests import zoo
from tests.cli.command_line import run_command
from tests.sampling import soak_except
from tests.tools import missing

FOLDER: Final = Path(__file__).parents[1] / "data" / "classifiers"
MAX_BYTES: Final = 50_000


class LibraryAnswers(Struct, frozen=True):
    """The predictions of one model by its own library."""

    name: str
    names: list[str]
    """Names of the classes, by column; empty if results are tensors."""
    rows: npt.NDArray[np.float32]
    predictions: list[Any]
    columns: list[int]
    probabilities: npt.NDArray[np.float32]


def read_answers(folder: Path = FOLDER) -> dict[str, LibraryAnswers]:
    answers = np.load(folder / "answers.npz")
    found = {}
    for about in json.loads((folder / "models.json").read_text()):
        name = about["name"]
        predictions = answers[f"{name}_predictions"].tolist()
        columns = [about["classes"].index(value) for value in predictions]
        probabilities = answers[f"{name}_probabilities"]
        found[name] = LibraryAnswers(
            name, about["names"], answers["rows"], predictions, columns, probabilities
        )
    return found


ANSWERS: Final = read_answers()
for_every_model = pytest.mark.parametrize("name", soak_except(ANSWERS, 8))


def model_folder(folder: Path, made: Path = FOLDER) -> Path:
    for about in json.loads((made / "models.json").read_text()):
        path = folder / about["name"] / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes((made / f"{about['name']}.onnx").read_bytes())
        if about["labels"]:
            toml = path.parents[1] / "model.toml"
            toml.write_text(f"labels = {json.dumps(about['labels'])}\n")
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = model_folder(tmp_path_factory.mktemp("classifiers"))
    logarithm = zoo.model(
        [helper.make_node("Log", ["x"], ["p"])],
        [zoo.tensor("x", ["b", 2])],
        [zoo.tensor("p", ["b", 2])],
    )
    zoo.place(folder, "gaps", logarithm, toml='labels = ["a", "b"]')
    with service(folder) as running:
        yield running


def run_job(running: Running, model: str, body: dict[str, Any]) -> Any:
    """The result of one job."""
    with httpx2.Client(verify=False, timeout=60) as http:
        url = f"{running.url}/predict/{model}"
        answer = http.post(url, json=body, headers={"Prefer": "wait=30"}).json()
    assert answer["status"] == "completed", answer
    return answer["result"]


def assert_own_tensors(outputs: list[dict[str, Any]], expected: LibraryAnswers) -> None:
    """Asserts that one output has the library's own predictions, and another the scores."""
    classes = [
        output
        for output in outputs
        if output["data"] == expected.predictions and isinstance(output["data"][0], int | str)
    ]
    shape = list(expected.probabilities.shape)
    scores = [output for output in outputs if output["shape"] == shape]
    assert classes
    data = np.array(scores[0]["data"]).reshape(expected.probabilities.shape)
    np.testing.assert_allclose(data, expected.probabilities, atol=1e-5)


@for_every_model
def test_data_is_answered_with_the_class_of_the_library(running: Running, name: str) -> None:
    expected = ANSWERS[name]

    result = run_job(running, name, {"data": expected.rows.tolist()})

    if not expected.names:
        assert_own_tensors(result["outputs"], expected)
        return
    assert [row["prediction"] for row in result] == expected.columns
    names = [expected.names[column] for column in expected.columns]
    assert [row["class_name"] for row in result] == names
    probabilities = [row["probabilities"] for row in result]
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-5)


@for_every_model
def test_inputs_are_answered_with_the_model_s_own_values(running: Running, name: str) -> None:
    expected = ANSWERS[name]
    request_input = {
        "name": running.client.model(name).inputs[0].name,
        "datatype": "FP32",
        "shape": expected.rows.shape,
        "data": expected.rows.ravel().tolist(),
    }

    result = run_job(running, name, {"inputs": [request_input]})

    assert_own_tensors(result["outputs"], expected)


@for_every_model
@pytest.mark.filterwarnings("ignore::asyncinfer.client.SlowMapWarning")
def test_a_frame_is_given_the_class_and_its_probability(running: Running, name: str) -> None:
    expected = ANSWERS[name]
    frame = pd.DataFrame(expected.rows, columns=list("abcd"))

    found = running.client.map_frame(frame, model=name, progress=False)

    if not expected.names:
        assert found["label"].tolist() == expected.predictions
        return
    assert found["prediction"].tolist() == expected.columns
    names = [expected.names[column] for column in expected.columns]
    assert found["class_name"].tolist() == names
    probabilities = expected.probabilities[np.arange(len(names)), expected.columns]
    np.testing.assert_allclose(found["probability"], probabilities, atol=1e-5)


@for_every_model
def test_the_command_line_writes_the_class_and_its_probability(
    running: Running, name: str, tmp_path: Path
) -> None:
    expected = ANSWERS[name]
    path = tmp_path / "rows.csv"
    pd.DataFrame(expected.rows, columns=list("abcd")).to_csv(path, index=False)

    ran = run_command("predict", str(path), "--model", name, "--url", running.url, "--to", "csv")

    assert ran.code == 0, ran
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    if not expected.names:
        assert [int(row["label"]) for row in rows] == expected.predictions
        return
    assert [int(row["prediction"]) for row in rows] == expected.columns
    names = [expected.names[column] for column in expected.columns]
    assert [row["class_name"] for row in rows] == names
    probabilities = [float(row[f"probabilities_{row['prediction']}"]) for row in rows]
    of_class = expected.probabilities[np.arange(len(names)), expected.columns]
    np.testing.assert_allclose(probabilities, of_class, atol=1e-5)


# --- rows without a class ------------------------------------------------------------------------

GAPS: Final = pd.DataFrame({"a": [-1.0, -1.0, 4.0], "b": [-1.0, 2.0, -1.0]}).astype(np.float32)
"""Rows for the model `gaps`: the first gets no score, the others get one each."""


@pytest.mark.parametrize("frame", [GAPS, pl.from_pandas(GAPS)], ids=["pandas", "polars"])
def test_in_a_frame_a_row_without_a_score_has_no_class(running: Running, frame: Any) -> None:
    found = running.client.map_frame(frame, model="gaps", progress=False)

    classes = [None if value != value else value for value in found["prediction"].to_list()]
    assert classes == [None, 1, 0]
    names = found["class_name"].to_list()
    assert [name if isinstance(name, str) else None for name in names] == [None, "b", "a"]
    probabilities = np.array(found["probability"].to_list(), np.float64)
    np.testing.assert_allclose(probabilities, [np.nan, np.log(2), np.log(4)], rtol=1e-5)


@pytest.mark.parametrize("rows", [GAPS, GAPS[:1]], ids=["some", "none has one"])
def test_in_a_file_a_row_without_a_score_has_no_class(
    running: Running, rows: pd.DataFrame, tmp_path: Path
) -> None:
    given, written = tmp_path / "rows.csv", tmp_path / "results.parquet"
    rows.to_csv(given, index=False)
    command = ("predict", str(given), "--model", "gaps", "--url", running.url)

    text = run_command(*command, "--to", "csv")
    ran = run_command(*command, "-o", str(written))

    assert (text.code, ran.code) == (0, 0)
    assert text.out.splitlines()[1] == "1,,,NaN,NaN,"
    table = pq.read_table(written)
    assert (str(table.schema.field("prediction").type), table["prediction"][0].as_py()) == (
        "int64",
        None,
    )
    assert table["class_name"].to_pylist() == [None, "b", "a"][: len(rows)]
    assert np.isnan(table["probabilities"].to_pylist()[0]).all()


def test_there_are_25_classifiers_of_four_libraries_none_of_them_large() -> None:
    assert len(ANSWERS) >= 25
    for answers in ANSWERS.values():
        assert answers.rows.shape == (200, 4)
        assert (FOLDER / f"{answers.name}.onnx").stat().st_size < MAX_BYTES


@pytest.mark.by_hand
def test_the_script_makes_the_same_classifiers(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", with_pip=True)
    install = [str(python), "-m", "pip", "install", "-q", "-r", str(FOLDER / "requirements.txt")]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        missing(f"needs its libraries from a package index: {installed.stderr[-300:]}")
    made = tmp_path / "made"
    made.mkdir()

    subprocess.run([str(python), str(FOLDER / "make.py"), str(made)], check=True, cwd=tmp_path)

    fresh = read_answers(made)
    assert fresh.keys() == ANSWERS.keys()
    with service(model_folder(tmp_path / "models", made)) as running:
        for name, expected in ANSWERS.items():
            assert fresh[name].predictions == expected.predictions
            np.testing.assert_allclose(fresh[name].probabilities, expected.probabilities, atol=1e-5)
            test_data_is_answered_with_the_class_of_the_library(running, name)

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
from tests.cli.command_line import told

FOLDER: Final = Path(__file__).parents[1] / "data" / "classifiers"
LARGEST_BYTES: Final = 50_000


class Recorded(Struct, frozen=True):
    """What a model's own library answered."""

    name: str
    names: list[str]
    """Of the classes, by column; empty where results are tensors."""
    rows: npt.NDArray[np.float32]
    predictions: list[Any]
    columns: list[int]
    probabilities: npt.NDArray[np.float32]


def recorded(folder: Path = FOLDER) -> dict[str, Recorded]:
    answers = np.load(folder / "answers.npz")
    found = {}
    for about in json.loads((folder / "models.json").read_text()):
        name = about["name"]
        predictions = answers[f"{name}_predictions"].tolist()
        columns = [about["classes"].index(value) for value in predictions]
        probabilities = answers[f"{name}_probabilities"]
        found[name] = Recorded(
            name, about["names"], answers["rows"], predictions, columns, probabilities
        )
    return found


RECORDED: Final = recorded()
every = pytest.mark.parametrize("name", RECORDED)


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
    with service(folder) as it:
        yield it


def answered(running: Running, model: str, body: dict[str, Any]) -> Any:
    """The result of one job."""
    with httpx2.Client(verify=False, timeout=60) as http:
        url = f"{running.url}/predict/{model}"
        answer = http.post(url, json=body, headers={"Prefer": "wait=30"}).json()
    assert answer["status"] == "completed", answer
    return answer["result"]


def assert_own_tensors(outputs: list[dict[str, Any]], expected: Recorded) -> None:
    """An output has what the library predicts, in the library's own words, another the scores."""
    own = [
        one
        for one in outputs
        if one["data"] == expected.predictions and isinstance(one["data"][0], int | str)
    ]
    scores = [one for one in outputs if one["shape"] == list(expected.probabilities.shape)]
    assert own
    data = np.array(scores[0]["data"]).reshape(expected.probabilities.shape)
    np.testing.assert_allclose(data, expected.probabilities, atol=1e-5)


@every
def test_data_is_answered_with_the_class_of_the_library(running: Running, name: str) -> None:
    expected = RECORDED[name]

    result = answered(running, name, {"data": expected.rows.tolist()})

    if not expected.names:
        assert_own_tensors(result["outputs"], expected)
        return
    assert [row["prediction"] for row in result] == expected.columns
    names = [expected.names[column] for column in expected.columns]
    assert [row["class_name"] for row in result] == names
    shares = [row["probabilities"] for row in result]
    np.testing.assert_allclose(shares, expected.probabilities, atol=1e-5)


@every
def test_inputs_are_answered_with_the_model_s_own_values(running: Running, name: str) -> None:
    expected = RECORDED[name]
    given = {
        "name": running.client.model(name).inputs[0].name,
        "datatype": "FP32",
        "shape": expected.rows.shape,
        "data": expected.rows.ravel().tolist(),
    }

    result = answered(running, name, {"inputs": [given]})

    assert_own_tensors(result["outputs"], expected)


@every
@pytest.mark.filterwarnings("ignore::asyncinfer.client.SlowMapWarning")
def test_a_frame_is_given_the_class_and_its_probability(running: Running, name: str) -> None:
    expected = RECORDED[name]
    frame = pd.DataFrame(expected.rows, columns=list("abcd"))

    found = running.client.map_frame(frame, model=name, progress=False)

    if not expected.names:
        assert found["label"].tolist() == expected.predictions
        return
    assert found["prediction"].tolist() == expected.columns
    names = [expected.names[column] for column in expected.columns]
    assert found["class_name"].tolist() == names
    shares = expected.probabilities[np.arange(len(names)), expected.columns]
    np.testing.assert_allclose(found["probability"], shares, atol=1e-5)


@every
def test_the_command_line_writes_the_class_and_its_probability(
    running: Running, name: str, tmp_path: Path
) -> None:
    expected = RECORDED[name]
    path = tmp_path / "rows.csv"
    pd.DataFrame(expected.rows, columns=list("abcd")).to_csv(path, index=False)

    ran = told("predict", str(path), "--model", name, "--url", running.url, "--to", "csv")

    assert ran.code == 0, ran
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    if not expected.names:
        assert [int(row["label"]) for row in rows] == expected.predictions
        return
    assert [int(row["prediction"]) for row in rows] == expected.columns
    names = [expected.names[column] for column in expected.columns]
    assert [row["class_name"] for row in rows] == names
    shares = [float(row[f"probabilities_{row['prediction']}"]) for row in rows]
    of_class = expected.probabilities[np.arange(len(names)), expected.columns]
    np.testing.assert_allclose(shares, of_class, atol=1e-5)


# --- rows without a class ------------------------------------------------------------------------

GAPS: Final = pd.DataFrame({"a": [-1.0, -1.0, 4.0], "b": [-1.0, 2.0, -1.0]}).astype(np.float32)
"""Of the model `gaps` the first row has no score, the others one."""


@pytest.mark.parametrize("frame", [GAPS, pl.from_pandas(GAPS)], ids=["pandas", "polars"])
def test_in_a_frame_a_row_without_a_score_has_no_class(running: Running, frame: Any) -> None:
    found = running.client.map_frame(frame, model="gaps", progress=False)

    classes = [None if one != one else one for one in found["prediction"].to_list()]
    assert classes == [None, 1, 0]
    names = found["class_name"].to_list()
    assert [one if isinstance(one, str) else None for one in names] == [None, "b", "a"]
    shares = np.array(found["probability"].to_list(), np.float64)
    np.testing.assert_allclose(shares, [np.nan, np.log(2), np.log(4)], rtol=1e-5)


@pytest.mark.parametrize("rows", [GAPS, GAPS[:1]], ids=["some", "none has one"])
def test_in_a_file_a_row_without_a_score_has_no_class(
    running: Running, rows: pd.DataFrame, tmp_path: Path
) -> None:
    given, written = tmp_path / "rows.csv", tmp_path / "results.parquet"
    rows.to_csv(given, index=False)
    asked = ("predict", str(given), "--model", "gaps", "--url", running.url)

    text = told(*asked, "--to", "csv")
    ran = told(*asked, "-o", str(written))

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
    assert len(RECORDED) >= 25
    for one in RECORDED.values():
        assert one.rows.shape == (200, 4)
        assert (FOLDER / f"{one.name}.onnx").stat().st_size < LARGEST_BYTES


@pytest.mark.soak
def test_the_script_makes_the_same_classifiers(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", with_pip=True)
    install = [str(python), "-m", "pip", "install", "-q", "-r", str(FOLDER / "requirements.txt")]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"the package index did not give the libraries: {installed.stderr[-300:]}")
    made = tmp_path / "made"
    made.mkdir()

    subprocess.run([str(python), str(FOLDER / "make.py"), str(made)], check=True, cwd=tmp_path)

    fresh = recorded(made)
    assert fresh.keys() == RECORDED.keys()
    with service(model_folder(tmp_path / "models", made)) as running:
        for name, expected in RECORDED.items():
            assert fresh[name].predictions == expected.predictions
            np.testing.assert_allclose(fresh[name].probabilities, expected.probabilities, atol=1e-5)
            test_data_is_answered_with_the_class_of_the_library(running, name)

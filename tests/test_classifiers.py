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
import pytest
from msgspec import Struct

from asyncinfer.testing import Running, service

from .cli.told import told

FOLDER: Final = Path(__file__).parent / "data" / "classifiers"
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
    with service(model_folder(tmp_path_factory.mktemp("classifiers"))) as it:
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

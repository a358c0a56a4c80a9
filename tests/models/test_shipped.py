"""The two shipped models give the results of scikit-learn, and match their descriptions."""

from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from asyncinfer.engine import Engine, Stop
from asyncinfer.models.folder import scan
from asyncinfer.models.results import render_results
from asyncinfer.models.validation import check_data
from asyncinfer.tensors.datatypes import Array, Feeds, dims
from tests.models.single_result import render_result

ROOT = Path(__file__).parents[2]
NAMES = ("digits", "iris")


def fed(data: Array) -> Feeds:
    return {"input": data}


def shipped(name: str) -> Engine:
    files = {file.model: file for file in scan(ROOT / "model")}
    return Engine.load(files[name], intra_op_threads=1)


def reference(name: str) -> dict[str, Array]:
    with np.load(ROOT / "tests/data" / f"{name}.npz") as arrays:
        return dict(arrays)


def metadata(name: str) -> dict[str, str]:
    path = str(ROOT / "model" / name / "1/model.onnx")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    entries: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return entries


def test_the_reference_has_all_irises_and_the_held_out_digits() -> None:
    assert reference("iris")["inputs"].shape == (150, 4)
    assert reference("digits")["inputs"].shape == (360, 64)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_agrees_with_scikit_learn(name: str) -> None:
    engine, expected = shipped(name), reference(name)
    data = check_data(msgspec.json.encode(expected["inputs"].tolist()), engine.signature)

    rows = msgspec.json.decode(render_result(engine.run(fed(data), Stop()), engine.signature))

    assert [row["prediction"] for row in rows] == expected["labels"].tolist()
    names = [engine.signature.labels[row["prediction"]] for row in rows]
    assert [row["class_name"] for row in rows] == names
    probabilities = np.array([row["probabilities"] for row in rows])
    difference = probabilities - expected["probabilities"].astype(np.float64)
    assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_row_gets_the_same_answer_alone_and_in_a_batch(name: str) -> None:
    engine = shipped(name)
    data = reference(name)["inputs"].astype(np.float32)

    together = render_results(
        engine.run(fed(data), Stop()),
        [fed(row) for row in np.split(data, len(data))],
        engine.signature,
        engine.plan,
    )

    for row, result in enumerate(together):
        alone = render_result(engine.run(fed(data[row : row + 1]), Stop()), engine.signature)
        mine, theirs = msgspec.json.decode(alone), msgspec.json.decode(result)
        assert mine["prediction"] == theirs["prediction"]
        np.testing.assert_allclose(mine["probabilities"], theirs["probabilities"], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_has_a_dynamic_batch_labels_and_an_example_that_works(name: str) -> None:
    engine = shipped(name)
    signature = engine.signature

    assert signature.batched, signature.batching
    assert {dims(spec)[0] for spec in (*signature.inputs, *signature.outputs)} == {"batch"}
    data = check_data(msgspec.json.encode(signature.example), signature)
    result = msgspec.json.decode(render_result(engine.run(fed(data), Stop()), signature))
    assert result["class_name"] == signature.labels[0]


def test_the_accuracy_for_digits_is_that_in_the_metadata() -> None:
    expected = reference("digits")
    correct = int((expected["labels"] == expected["digits"]).sum())

    assert metadata("digits")["held_out_accuracy"] == f"{correct / 360:.4f} ({correct} of 360)"


@pytest.mark.parametrize("name", NAMES)
def test_the_description_has_the_measured_accuracy(name: str) -> None:
    share = metadata(name)["held_out_accuracy"].partition("(")[2].rstrip(")")

    assert share in shipped(name).signature.description

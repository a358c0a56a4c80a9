"""Text models that need a locale: served where it is installed, else refused with what to do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from asyncinfer.engine import Engine, Stop
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import scan
from tests import zoo
from tests.process import REPOSITORY

TEXTS = ["Good morning", "good night", "BAD manners", "bad day", "Very GOOD day"]


def lowercase_model(**locale: str) -> onnx.ModelProto:
    """A model that makes strings lower case, as a text vectorizer does first."""
    node = helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="LOWER", **locale)
    inputs = [helper.make_tensor_value_info("x", TensorProto.STRING, [None])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.STRING, [None])]
    return zoo.model([node], inputs, outputs, {})


def load(folder: Path) -> Engine:
    (file,) = scan(folder)
    return Engine.load(file, intra_op_threads=1)


def test_a_missing_locale_is_refused_once_with_the_command_that_installs_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    zoo.place(tmp_path, "m", lowercase_model(locale="xx_YY.UTF-8"))

    with pytest.raises(ModelRefused) as refused:
        load(tmp_path)

    assert refused.value.detail == (
        "m/1/model.onnx: ONNX Runtime cannot load it: it asks for the locale xx_YY.UTF-8, which is "
        "not installed here. Install it (apt-get install -y locales && localedef -i xx_YY -f UTF-8 "
        "xx_YY.UTF-8) and start the worker again, or export the model with "
        'options={id(vectorizer): {"locale": "C.UTF-8"}}'
    )
    assert capfd.readouterr() == ("", "")


def test_the_export_option_that_the_refusal_names_makes_a_text_model_load(tmp_path: Path) -> None:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import StringTensorType
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer()
    pipeline: Any = make_pipeline(vectorizer, LogisticRegression()).fit(TEXTS, [1, 1, 0, 0, 1])
    options = {id(vectorizer): {"locale": "C.UTF-8"}, id(pipeline): {"zipmap": False}}
    inputs = [("text", StringTensorType([None]))]
    zoo.place(tmp_path, "m", to_onnx(pipeline, initial_types=inputs, options=options))

    engine = load(tmp_path)

    outputs = engine.run({"text": np.array(TEXTS, object)}, Stop())
    scores: Any = next(array for array in outputs if array.dtype == np.float32)
    np.testing.assert_allclose(scores, pipeline.predict_proba(TEXTS), atol=1e-6)


@pytest.mark.soak
@pytest.mark.system("localedef")
def test_the_command_that_the_refusal_names_makes_a_text_model_load(tmp_path: Path) -> None:
    zoo.place(tmp_path / "models", "m", lowercase_model())
    (tmp_path / "usr" / "lib" / "locale").mkdir(parents=True)
    command = ["localedef", "--no-archive", f"--prefix={tmp_path}", "-i", "en_US", "-f", "UTF-8"]
    subprocess.run([*command, "en_US.UTF-8"], check=True)
    code = (
        "import sys; from pathlib import Path; from tests.engine.test_locale import load; "
        "print(load(Path(sys.argv[1])).signature.model)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "models")],
        env={**os.environ, "LOCPATH": str(tmp_path / "usr" / "lib" / "locale")},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )

    assert (ended.returncode, ended.stdout) == (0, "m\n"), ended.stderr

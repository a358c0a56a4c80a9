"""Makes classifiers of four libraries as ONNX files, and records the libraries' own results.

    pip install -r tests/data/classifiers/requirements.txt
    python tests/data/classifiers/make.py [FOLDER]

Writes NAME.onnx for each of `classifiers()`, `answers.npz` with 200 rows and each library's
predictions and probabilities for them, and `models.json`.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from catboost import CatBoostClassifier
from lightgbm import LGBMClassifier
from onnx import TensorProto, helper
from onnxmltools.convert import convert_lightgbm, convert_xgboost
from onnxmltools.convert.common.data_types import FloatTensorType as LibraryFloats
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.calibration import CalibratedClassifierCV
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from xgboost import XGBClassifier

COLUMNS: Final = 4
ROWS: Final = 200
MAX_BYTES: Final = 50_000
OPSETS: Final = {"": 18, "ai.onnx.ml": 3}
MIN_LEAD: Final = 1e-3
"""The least difference of a row's two highest probabilities, since a converter rounds to FP32."""

MEANS: Final = (
    *((0.2, 30, 20_000, -5), (0.7, 45, 35_000, 5)),
    *((0.4, 60, 60_000, -1), (0.9, 25, 45_000, 12)),
)
"""The mean share, age, income and temperature of each of four kinds of rows."""

LOW_MID_HIGH: Final = ["low", "mid", "high"]


class Classifier(NamedTuple):
    """A classifier of a library, and how it is exported and served."""

    name: str
    model: Any
    classes: Sequence[Any]
    labels: Sequence[str] = ()
    """The labels in model.toml."""
    zipmap: bool = False
    change: Callable[[Any], None] | None = None
    """A change of the graph after the export."""
    differs: bool = False
    """Whether the library's own prediction is not always the class of the highest probability."""


def classifiers() -> list[Classifier]:
    return [
        Classifier("lr_binary", scaled(LogisticRegression()), [0, 1], zipmap=True),
        Classifier("lr_binary_named", scaled(LogisticRegression()), [0, 1], ["no", "yes"]),
        Classifier("lr_from_one", scaled(LogisticRegression()), [1, 2, 3], LOW_MID_HIGH),
        Classifier("lr_words", scaled(LogisticRegression()), ["cat", "dog", "eel"], LOW_MID_HIGH),
        Classifier("lr_words_zipmap", scaled(LogisticRegression()), ["b", "a"], zipmap=True),
        Classifier("lr_bool", scaled(LogisticRegression()), [False, True], ["no", "yes"]),
        Classifier(
            "lr_threshold",
            threshold(),
            [-1, 1],
            ["ok", "bad"],
            False,
            add_threshold_label,
            differs=True,
        ),
        Classifier("forest_gaps", forest(), [10, 20, 55, 30], ["a", "b", "c", "d"]),
        Classifier("forest_negative", forest(), [-1, 0, 1], zipmap=True),
        Classifier("bagged_flags", bagged(), [7, 3], ["three", "seven"], change=add_flag_outputs),
        Classifier("tree_flags", tree(), [-1, 1], ["out", "in"], change=add_flag_outputs),
        Classifier(
            "knn_indices",
            scaled(KNeighborsClassifier(4)),
            [2, 4, 8],
            LOW_MID_HIGH,
            change=add_index_output,
        ),
        Classifier("bayes_words", scaled(GaussianNB()), ["no", "yes", "?"], zipmap=True),
        Classifier("qda_across", scaled(qda()), [1, 2, 3], LOW_MID_HIGH),
        Classifier("mlp_renamed", scaled(mlp()), [1, 2, 3], LOW_MID_HIGH, change=rename_outputs),
        Classifier("svc_from_one", svc(), [1, 2, 3], LOW_MID_HIGH, differs=True),
        Classifier("svc_zipmap", svc(), [-3, 5, 9], LOW_MID_HIGH, zipmap=True, differs=True),
        Classifier(
            "calibrated", scaled(calibrated()), [5, 6, 7], LOW_MID_HIGH, change=add_count_output
        ),
        Classifier("one_vs_rest", scaled(one_vs_rest()), [-2, 4, 0], LOW_MID_HIGH, zipmap=True),
        Classifier("lgbm_binary", lgbm(), [0, 1], zipmap=True),
        Classifier("lgbm_from_one", lgbm(), [1, 2, 3], LOW_MID_HIGH),
        Classifier("lgbm_words", lgbm(), ["x", "z", "y"], ["X", "Y", "Z"], change=reverse_outputs),
        Classifier("lgbm_negative", lgbm(), [-7, 9], ["minus", "plus"], zipmap=True),
        Classifier("xgb_plain", xgb(), [0, 1, 2]),
        Classifier("xgb_named", xgb(), [0, 1], ["no", "yes"], change=reverse_outputs),
        Classifier("xgb_counted", xgb(), [0, 1, 2], LOW_MID_HIGH, change=add_count_output),
        Classifier("catboost_binary", catboost(), [0, 1]),
        Classifier("catboost_from_one", catboost(), [1, 2, 3], LOW_MID_HIGH),
        Classifier("catboost_words", catboost(), ["no", "yes"], change=add_count_output),
    ]


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    x, kinds = samples(900)
    rows = samples(1000, seed=1)[0]
    answers: dict[str, Any] = {}
    descriptions = []
    fitted = [(classifier, fit(classifier, x, kinds)) for classifier in classifiers()]
    unambiguous = np.all([is_unambiguous(model, rows) for _, model in fitted], axis=0)
    rows = answers["rows"] = rows[unambiguous][:ROWS]
    for classifier, model in fitted:
        predictions, probabilities = predict(model, rows)
        differing = int((model.classes_[probabilities.argmax(axis=1)] != predictions).sum())
        assert len(rows) == ROWS, len(rows)
        assert (differing > 2) == classifier.differs, (classifier.name, differing)
        assert len(set(predictions)) == len(classifier.classes), (classifier.name, set(predictions))
        content = export(classifier, model, x).SerializeToString()
        assert len(content) < MAX_BYTES, (classifier.name, len(content))
        (folder / f"{classifier.name}.onnx").write_bytes(content)
        answers[f"{classifier.name}_predictions"] = predictions
        answers[f"{classifier.name}_probabilities"] = probabilities.astype(np.float32)
        descriptions.append(description(classifier, model.classes_.tolist()))
    np.savez_compressed(folder / "answers.npz", **answers)
    lines = ",\n".join(map(json.dumps, descriptions))
    (folder / "models.json").write_text(f"[\n{lines}\n]\n")


def description(classifier: Classifier, classes: list[Any]) -> dict[str, Any]:
    own_maps = classifier.zipmap or classifier.name.startswith("catboost")
    names = list(classifier.labels) or ([str(value) for value in classes] if own_maps else [])
    return {
        "name": classifier.name,
        "classes": classes,
        "labels": list(classifier.labels),
        "names": names,
    }


def samples(count: int, seed: int = 0) -> tuple[Any, Any]:
    """Random rows, and the kind of each: 0 to 3."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, count)
    rows = np.array(MEANS)[kinds] + rng.normal(size=(count, COLUMNS)) * [0.2, 11, 9000, 6]
    return rows.astype(np.float32), kinds


# --- models ------------------------------------------------------------------------------------


def scaled(model: Any) -> Any:
    return make_pipeline(StandardScaler(), model)


def threshold() -> Any:
    """Predicts class 1 only if its probability is at least 0.8."""
    return FixedThresholdClassifier(scaled(LogisticRegression()), threshold=0.8)


def forest() -> Any:
    return RandomForestClassifier(5, max_depth=4, random_state=0)


def tree() -> Any:
    return DecisionTreeClassifier(max_depth=5, min_samples_leaf=3, random_state=0)


def bagged() -> Any:
    return scaled(BaggingClassifier(LogisticRegression(), n_estimators=2, random_state=0))


def qda() -> Any:
    """A classifier whose labels have the shape [1, rows] after the conversion."""
    return QuadraticDiscriminantAnalysis()


def mlp() -> Any:
    return MLPClassifier((5,), max_iter=300, random_state=0)


def svc() -> Any:
    """A classifier whose probabilities are fitted separately from its predictions."""
    return scaled(SVC(C=0.3, probability=True, random_state=0))


def calibrated() -> Any:
    return CalibratedClassifierCV(LinearSVC(random_state=0), cv=2)


def one_vs_rest() -> Any:
    return OneVsRestClassifier(LogisticRegression())


def lgbm() -> Any:
    return LGBMClassifier(
        n_estimators=4, num_leaves=5, random_state=0, n_jobs=1, deterministic=True, verbose=-1
    )


def xgb() -> Any:
    return XGBClassifier(n_estimators=4, max_depth=3, random_state=0, n_jobs=1)


def catboost() -> Any:
    return CatBoostClassifier(
        iterations=4, depth=3, random_seed=0, thread_count=1, verbose=0, allow_writing_files=False
    )


def fit(classifier: Classifier, x: Any, kinds: Any) -> Any:
    """Trains on as many kinds as there are classes; a support vector machine on few rows."""
    targets = np.array(sorted(classifier.classes))[kinds % len(classifier.classes)]
    few = 120 if classifier.name.startswith(("svc", "knn")) else len(x)
    return classifier.model.fit(x[:few], targets[:few])


def predict(model: Any, rows: Any) -> tuple[Any, Any]:
    predictions = np.asarray(model.predict(rows)).reshape(-1)
    return np.array(predictions.tolist()), np.asarray(model.predict_proba(rows))


def is_unambiguous(model: Any, rows: Any) -> Any:
    """The rows whose class does not depend on rounding."""
    probabilities = np.sort(np.asarray(model.predict_proba(rows)), axis=1)
    unambiguous = probabilities[:, -1] - probabilities[:, -2] > MIN_LEAD
    if isinstance(model, FixedThresholdClassifier):
        unambiguous &= np.abs(probabilities[:, -1] - model.threshold) > MIN_LEAD
    return unambiguous


# --- export ------------------------------------------------------------------------------------


def export(classifier: Classifier, model: Any, x: Any) -> Any:
    model = convert(classifier, model, x)
    if classifier.change:
        classifier.change(model)
    if not any(opset.domain == "" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("", 15))
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model


def convert(classifier: Classifier, model: Any, x: Any) -> Any:
    theirs = [("x", LibraryFloats([None, COLUMNS]))]
    if isinstance(model, LGBMClassifier):
        return convert_lightgbm(model, None, theirs, target_opset=15, zipmap=classifier.zipmap)
    if isinstance(model, XGBClassifier):
        return convert_xgboost(model, None, theirs, target_opset=15)
    if isinstance(model, CatBoostClassifier):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            model.save_model(str(path), format="onnx")
            return onnx.load(path)
    if isinstance(model, FixedThresholdClassifier):
        model = model.estimator_
    ours = [("x", FloatTensorType([None, COLUMNS]))]
    zipmap = {"zipmap": classifier.zipmap}
    return to_onnx(model, initial_types=ours, options=zipmap, target_opset=OPSETS)


def add_threshold_label(model: Any) -> None:
    """Adds the label of the classifier with a threshold, which no converter supports."""
    graph = model.graph
    probabilities = graph.output[1].name
    constants = {"at": np.array(0.8, np.float32), "second": np.array([1]), "own": np.array([-1, 1])}
    for name, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    graph.node.extend(
        [
            helper.make_node("Gather", [probabilities, "second"], ["share"], axis=1),
            helper.make_node("GreaterOrEqual", ["share", "at"], ["over"]),
            helper.make_node("Cast", ["over"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["own", "place"], ["decision"]),
        ]
    )
    del graph.output[0]
    graph.output.append(tensor("decision", [None, 1], TensorProto.INT64))
    rename(model, "decision", "label")


def reverse_outputs(model: Any) -> None:
    """Puts the probabilities before the label."""
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(reversed(outputs))


def add_flag_outputs(model: Any) -> None:
    """Adds a flag and a count before the outputs of the model."""
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "columns"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    x = graph.input[0].name
    graph.node.extend(
        [
            helper.make_node("Less", [x, "nothing"], ["below"]),
            helper.make_node("Cast", ["below"], ["ones"], to=TensorProto.INT64),
            helper.make_node("ReduceSum", ["ones", "columns"], ["below_zero"], keepdims=0),
            helper.make_node("Cast", ["below_zero"], ["is_cold"], to=TensorProto.BOOL),
        ]
    )
    outputs = list(graph.output)
    del graph.output[:]
    graph.output.append(tensor("is_cold", [None], TensorProto.BOOL))
    graph.output.append(tensor("below_zero", [None], TensorProto.INT64))
    graph.output.extend(outputs)


def add_count_output(model: Any) -> None:
    """Adds a count of 0 to 2, an INT32 of shape [rows, 1], before the outputs of the model."""
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 3]), "which"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "along"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    graph.node.extend(
        [
            helper.make_node("Gather", [graph.input[0].name, "which"], ["two"], axis=1),
            helper.make_node("Greater", ["two", "half"], ["over_half"]),
            helper.make_node("Cast", ["over_half"], ["each"], to=TensorProto.INT32),
            helper.make_node("ReduceSum", ["each", "along"], ["n"], keepdims=1),
        ]
    )
    outputs = list(graph.output)
    del graph.output[:]
    graph.output.append(tensor("n", [None, 1], TensorProto.INT32))
    graph.output.extend(outputs)


def add_index_output(model: Any) -> None:
    """Adds the index of the largest column as the first output."""
    model.graph.node.append(
        helper.make_node("ArgMax", [model.graph.input[0].name], ["largest"], axis=1, keepdims=0)
    )
    model.graph.output.insert(0, tensor("largest", [None], TensorProto.INT64))


def rename_outputs(model: Any) -> None:
    """Renames the outputs to names without a meaning."""
    rename(model, "label", "y0")
    rename(model, "probabilities", "y1")
    add_index_output(model)


def rename(model: Any, old: str, new: str) -> None:
    graph = model.graph
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        inside = [f"{new}_inside" if name == new else name for name in node.output]
        node.output[:] = [new if name == old else name for name in inside]
    for output in graph.output:
        output.name = new if output.name == old else output.name


def tensor(name: str, shape: Sequence[int | None], kind: int) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

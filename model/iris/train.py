"""Makes `1/model.onnx`: logistic regression on Fisher's iris data (scikit-learn, skl2onnx).

    python model/iris/train.py

Also writes what scikit-learn answers for all 150 rows to `tests/data/iris.npz`.
"""

import sys
from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HERE = Path(__file__).parent
REFERENCE = HERE.parents[1] / "tests" / "data" / "iris.npz"


def main() -> None:
    x, y = load_iris(return_X_y=True)
    x_train, x_held_out, y_train, y_held_out = train_test_split(
        x, y, test_size=30, stratify=y, random_state=0
    )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=10.0))
    classifier.fit(x_train, y_train)
    correct = int((classifier.predict(x_held_out) == y_held_out).sum())
    accuracy = f"{correct / len(y_held_out):.4f} ({correct} of {len(y_held_out)})"

    save(classifier, accuracy)
    np.savez_compressed(
        REFERENCE,
        inputs=x.astype(np.float32),
        labels=classifier.predict(x).astype(np.int64),
        probabilities=classifier.predict_proba(x),
    )
    sys.stdout.write(f"iris: held-out accuracy {accuracy}\n")


def save(classifier: object, accuracy: str) -> None:
    """Writes the classifier as ONNX, its accuracy on held-out rows in the metadata."""
    model = to_onnx(
        classifier,
        name="iris",
        initial_types=[("input", FloatTensorType([None, 4]))],
        options={"zipmap": False},
        target_opset={"": 18, "ai.onnx.ml": 3},
    )
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "batch"
    model.metadata_props.add(key="held_out_accuracy", value=accuracy)
    (HERE / "1").mkdir(exist_ok=True)
    (HERE / "1" / "model.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()

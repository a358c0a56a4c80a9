"""Makes `1/model.onnx`: a small neural network on scikit-learn's 8x8 handwritten digits.

    python model/digits/train.py

Also writes what scikit-learn answers for the 360 held-out digits to `tests/data/digits.npz`.
"""

import sys
from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

HERE = Path(__file__).parent
REFERENCE = HERE.parents[1] / "tests" / "data" / "digits.npz"


def main() -> None:
    x, y = load_digits(return_X_y=True)
    x_train, x_held_out, y_train, y_held_out = train_test_split(
        x, y, test_size=360, stratify=y, random_state=0
    )
    # The scaler is part of the graph, so that a request carries the raw pixels, 0 to 16.
    classifier = make_pipeline(
        MinMaxScaler(), MLPClassifier((128,), alpha=0.01, max_iter=400, random_state=0)
    )
    classifier.fit(x_train, y_train)
    predicted = classifier.predict(x_held_out)
    correct = int((predicted == y_held_out).sum())
    accuracy = f"{correct / len(y_held_out):.4f} ({correct} of {len(y_held_out)})"

    save(classifier, accuracy)
    np.savez_compressed(
        REFERENCE,
        inputs=x_held_out.astype(np.uint8),
        digits=y_held_out.astype(np.int64),
        labels=predicted.astype(np.int64),
        probabilities=classifier.predict_proba(x_held_out),
    )
    sys.stdout.write(f"digits: held-out accuracy {accuracy}\n")


def save(classifier: object, accuracy: str) -> None:
    """Writes the classifier as ONNX, its accuracy on held-out digits in the metadata."""
    model = to_onnx(
        classifier,
        name="digits",
        initial_types=[("input", FloatTensorType([None, 64]))],
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

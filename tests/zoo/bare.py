"""What ONNX Runtime alone answers: the truth that everything served is held against."""

import ctypes
from pathlib import Path
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from asyncinfer.tensors.datatypes import Array, Feeds

Answers: TypeAlias = dict[str, Array]

_TOLERANCES: Final = {"float16": 1e-2, "bfloat16": 1e-1, "float32": 1e-5, "float64": 1e-10}
_LOG_NOTHING: Final = 4
_BFLOAT16: Final = "tensor(bfloat16)"


class Bare:
    """A session of one thread; knows nothing of asyncinfer."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = _LOG_NOTHING
        self._session: Any = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = self._session.get_outputs()

    def run(self, feeds: Feeds) -> Answers | None:
        """Every output by its name; None where the model refuses the input."""
        options = ort.RunOptions()
        options.log_severity_level = _LOG_NOTHING
        try:
            outputs = self._run(feeds, options)
        except Exception:  # ONNX Runtime's exceptions have no base of their own
            return None
        names = [output.name for output in self._outputs]
        return {
            name: _matrix(output) if isinstance(output, list) else output
            for name, output in zip(names, outputs, strict=True)
        }

    def _run(self, feeds: Feeds, options: ort.RunOptions) -> list[Any]:
        if all(output.type != _BFLOAT16 for output in self._outputs):
            outputs: list[Any] = self._session.run(None, feeds, options)
            return outputs
        values = {name: _ort_value(array) for name, array in feeds.items()}
        return list(map(_array, self._session.run_with_ort_values(None, values, options)))


def assert_equal(served: Answers, bare: Answers, *, exactly: bool) -> None:
    """The same names, datatypes, shapes and values; not `exactly` allows another order of sums."""
    assert list(served) == list(bare)
    for name, expected in bare.items():
        actual = served[name]
        assert actual.dtype == expected.dtype, name
        assert actual.shape == expected.shape, name
        tolerance = 0.0 if exactly else _TOLERANCES.get(str(expected.dtype), 0.0)
        if not tolerance:
            np.testing.assert_array_equal(actual, expected, err_msg=name)
            continue
        wide, other = actual.astype(np.float64), expected.astype(np.float64)
        scale = np.abs(other[np.isfinite(other)]).max(initial=1.0)
        np.testing.assert_allclose(
            wide, other, rtol=tolerance, atol=tolerance * scale, err_msg=name
        )


def _matrix(maps: list[dict[Any, float]]) -> Array:
    """A sequence of maps from label to probability as a row each, in the order of the labels."""
    rows = [[one[label] for label in sorted(one)] for one in maps]
    return np.array(rows, np.float32)


def _ort_value(array: Array) -> Any:
    if array.dtype != ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array.view(np.uint16), TensorProto.BFLOAT16
    )


def _array(value: Any) -> Array:
    if value.data_type() != _BFLOAT16:
        array: Array = value.numpy()
        return array
    shape = value.shape()
    # Numpy has no bfloat16 of its own, so ONNX Runtime hands out no array of it.
    content = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape)))
    return np.frombuffer(content, ml_dtypes.bfloat16).reshape(shape)

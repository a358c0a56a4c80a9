"""What a model gave, as the JSON that is stored for a job and shown to people.

JSON has no NaN and no infinities; they are the strings "NaN", "Infinity" and "-Infinity", as in
ProtoJSON. (msgspec would write null in their place, which means something else.)
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from asyncinfer import batching, payloads
from asyncinfer.models import Signature
from asyncinfer.tensors import Array, datatype_of

_encode = msgspec.json.Encoder().encode


class ClassResult(Struct, frozen=True):
    """One row of a labelled classifier."""

    prediction: int
    class_name: str | None
    """None where the model predicts a number that no label is for."""
    probabilities: list[Any]


class TensorResult(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]
    """Flat, row-major."""


class TensorsResult(Struct, frozen=True):
    """What every other model gives."""

    outputs: list[TensorResult]


def render_result(outputs: Sequence[Array], signature: Signature) -> bytes:
    """One job's result: of a labelled classifier an object per row, else all outputs."""
    return render_results(outputs, [1], signature)[0]


def render_results(
    outputs: Sequence[Array], row_counts: Sequence[int], signature: Signature
) -> list[bytes]:
    """The results of all jobs of one run, from the outputs of their stacked rows.

    A run of one job is that job's, however many rows came out. Raises ModelFailed where an
    output of a shared run has not a row for each row of the input.
    """
    if len(row_counts) > 1:
        batching.check_rows(outputs, row_counts)
    rows = _class_rows(outputs, signature)
    if rows is None:
        plain = [_plain(output) for output in outputs]
        return [_encode_tensors(job, signature) for job in batching.split(plain, row_counts)]
    if len(row_counts) == 1:
        return [_encode_rows(rows)]
    return [_encode_rows(rows[start:end]) for start, end in batching.spans(row_counts)]


def render_stored(payload: bytes) -> bytes:
    """Outputs that were stored packed, as JSON; raises DamagedPayload."""
    found = payloads.unpack(payload)
    tensors = [
        TensorResult(name, datatype_of(array), array.shape, _flat(array))
        for name, array in found.items()
    ]
    return _encode(TensorsResult(tensors))


def _flat(array: Array) -> list[Any]:
    # Python's lists know no bfloat16.
    wide = array.astype(np.float32) if datatype_of(array) == "BF16" else array
    flat: list[Any] = _plain(wide).ravel().tolist()
    return flat


def _class_rows(outputs: Sequence[Array], signature: Signature) -> list[ClassResult] | None:
    labels = signature.labels
    scores = next((output for output in outputs if _is_scores(output, len(labels))), None)
    if scores is None:
        return None
    given = (output for output in outputs if _is_prediction(output, len(scores)))
    predictions = next(given, scores.argmax(axis=1)).tolist()
    return [
        ClassResult(number, labels[number] if 0 <= number < len(labels) else None, row)
        for number, row in zip(predictions, _plain(scores).tolist(), strict=True)
    ]


def _is_scores(output: Array, label_count: int) -> bool:
    is_matrix = output.ndim == 2 and output.dtype.kind == "f"
    return is_matrix and label_count > 0 and output.shape[1] == label_count


def _is_prediction(output: Array, row_count: int) -> bool:
    return output.dtype == np.int64 and output.shape == (row_count,)


def _encode_rows(rows: list[ClassResult]) -> bytes:
    return _encode(rows[0] if len(rows) == 1 else rows)


def _encode_tensors(outputs: Sequence[Array], signature: Signature) -> bytes:
    tensors = [
        TensorResult(spec.name, spec.datatype, output.shape, output.ravel().tolist())
        for spec, output in zip(signature.outputs, outputs, strict=True)
    ]
    return _encode(TensorsResult(tensors))


def _plain(output: Array) -> Array:
    """`output` with a string for everything that JSON has no number for."""
    if output.dtype.kind != "f" or np.isfinite(output).all():
        return output
    plain = output.astype(object)
    plain[np.isnan(output)] = "NaN"
    plain[output == np.inf] = "Infinity"
    plain[output == -np.inf] = "-Infinity"
    return plain

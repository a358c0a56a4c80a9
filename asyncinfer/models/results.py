"""Results: the outputs of a run as the JSON, or the packed tensors, that are stored for a job.

JSON has no NaN and no infinities; they are the strings "NaN", "Infinity" and "-Infinity", as in
ProtoJSON. (msgspec would write null instead, which means something else.)
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from asyncinfer.errors import ModelFailed
from asyncinfer.models import batching
from asyncinfer.models.batching import BatchPlan
from asyncinfer.models.signature import Signature
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import DTYPES, Array, Feeds, datatype_of

_MAX_CONVERTED_NUMBERS: Final = 65536
"""How many numbers of an output are converted at once: as Python objects they take eight times the
memory."""

Columns: TypeAlias = npt.NDArray[np.int64]
"""The column of the class in each row of scores: shape `(rows,)`."""

_encode = msgspec.json.Encoder().encode


class ClassResult(Struct, frozen=True):
    """One row of a labelled classifier."""

    prediction: int | None
    """The column of the class in the scores, even if the model numbers its classes otherwise."""
    class_name: str | None
    """None if all scores are NaN; then `prediction` is None too."""
    probabilities: list[Any]


class TensorResult(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]
    """Flat, row-major."""


class TensorsResult(Struct, frozen=True):
    """The result of every other model."""

    outputs: list[TensorResult]


def render_results(
    outputs: Sequence[Array],
    jobs: Sequence[Feeds],
    signature: Signature,
    plan: BatchPlan | None,
    *,
    answer: str = "json",
    output_names: Sequence[str] = (),
) -> Iterator[bytes]:
    """Yields the results of all jobs of one run, in their order, as bytes to store.

    For a labelled classifier a result is an object per row (without a list if there is one row),
    else all outputs.
    `outputs` has the arrays of the run, one per output of the signature, such as `(rows of all
    jobs, *dims)`; `jobs` has the inputs of each job before they were stacked. `answer` is "json" or
    "tensors". `output_names` lists the outputs to return, empty for all; with names, even a
    labelled classifier returns tensors. The outputs of a run with one job are returned whole.
    Raises ModelFailed if `output_names` has an unknown name, or if the rows of an output of a
    shared run are not as many as those of the inputs.
    """
    if answer == "tensors":
        for job_outputs in batching.split(outputs, jobs, plan):
            yield packing.pack(dict(_wanted_outputs(job_outputs, signature, output_names)))
        return
    rows = None if output_names else _class_rows(outputs, signature)
    if rows is None:
        yield from _render_tensors(outputs, jobs, signature, plan, output_names)
    elif len(jobs) == 1 or plan is None:
        yield _encode_rows(rows)
    else:
        for start, end in batching.row_spans(outputs, jobs, plan):
            yield _encode_rows(rows[start:end])


def render_packed(payload: bytes) -> bytes:
    """The JSON of a result that is stored as packed tensors, always that of named outputs.

    These are the same bytes that the worker stores for a job that requests JSON of a model without
    labels. Raises DamagedPayload.
    """
    return _encode_tensors(list(packing.unpack(payload).items()))


def _render_tensors(
    outputs: Sequence[Array],
    jobs: Sequence[Feeds],
    signature: Signature,
    plan: BatchPlan | None,
    wanted: Sequence[str],
) -> Iterator[bytes]:
    """The JSON of the wanted outputs of each job, in the order of `jobs`; raises ModelFailed."""
    if plan is None or len(jobs) == 1 or not _is_convertible_at_once(outputs, plan):
        for job_outputs in batching.split(outputs, jobs, plan):
            yield _encode_tensors(_wanted_outputs(job_outputs, signature, wanted))
        return
    # Converting all rows to lists at once takes a fifth of the time of converting job by job.
    spans = batching.row_spans(outputs, jobs, plan)
    converted = []
    for name, output in _wanted_outputs(outputs, signature, wanted):
        rows = _plain(output).reshape(len(output), -1).tolist()
        converted.append((name, datatype_of(output), output.shape[1:], rows))
    for start, end in spans:
        tensors = [
            TensorResult(name, datatype, (end - start, *dims), list(chain(*rows[start:end])))
            for name, datatype, dims, rows in converted
        ]
        yield _encode(TensorsResult(tensors))


def _is_convertible_at_once(outputs: Sequence[Array], plan: BatchPlan) -> bool:
    """Whether all outputs are small, have their rows along axis 0, and are not padded."""
    if any(axis != 0 for axis in plan.outputs) or plan.unpad:
        return False
    return all(output.ndim and 0 < output.size <= _MAX_CONVERTED_NUMBERS for output in outputs)


def _wanted_outputs(
    outputs: Sequence[Array], signature: Signature, wanted: Sequence[str]
) -> list[tuple[str, Array]]:
    """The outputs that are `wanted` by name, in that order, with their names; all if none is.

    Raises ModelFailed for a name that no output has.
    """
    names = [spec.name for spec in signature.outputs]
    if not wanted:
        return list(zip(names, outputs, strict=True))
    try:
        return [(name, outputs[names.index(name)]) for name in wanted]
    except ValueError as error:
        raise ModelFailed(f"an output was requested that is not {', '.join(names)}") from error


def _class_rows(outputs: Sequence[Array], signature: Signature) -> list[ClassResult] | None:
    """A result per row of a labelled classifier, for the rows of all jobs.

    None if the model is not one, or if its scores are not `(rows, labels)` in this run.
    """
    labels = signature.labels
    scores = _output(signature.score_output, outputs, signature)
    if scores is None or scores.ndim != 2 or scores.shape[1] != len(labels):
        return None
    if scores.dtype == DTYPES["BF16"]:
        scores = scores.astype(np.float32)
    shown = softmax(scores) if signature.scores == "logits" else scores
    plain = _plain(shown)
    is_finite = plain.dtype != object
    highest = scores.argmax(axis=1) if is_finite else highest_columns(scores)
    classes = _output(signature.class_output, outputs, signature)
    found = _class_columns(highest, classes, signature)
    columns = found if is_finite else _without_nan(found, highest, np.isnan(shown))
    return [
        ClassResult(column, None if column is None else labels[column], row)
        for column, row in zip(columns, plain.tolist(), strict=True)
    ]


def _output(name: str, outputs: Sequence[Array], signature: Signature) -> Array | None:
    """The array of the output of this name; None if there is none, as for an empty name."""
    for spec, output in zip(signature.outputs, outputs, strict=True):
        if spec.name == name:
            return output
    return None


def _class_columns(highest: Columns, classes: Array | None, signature: Signature) -> list[int]:
    """The column of each row's class: that of its value in `classes`, else of its highest score.

    `highest` has the column of each row's highest score. `classes` is None or ignored if it does
    not have one value per row.
    """
    fallback: list[int] = highest.tolist()
    if classes is None or classes.size != len(fallback):
        return fallback
    columns = _columns_by_value(signature.class_values, len(signature.labels))
    return [
        columns.get(value, column)
        for value, column in zip(classes.reshape(-1).tolist(), fallback, strict=True)
    ]


@lru_cache(maxsize=1024)
def _columns_by_value(
    values: tuple[int | str | None, ...], width: int
) -> Mapping[int | str | None, int]:
    """By value of the class output, the column that it stands for; no values stand for themselves.

    `width` is the number of columns.
    """
    pairs = zip(values or range(width), range(width), strict=True)
    return {value: column for value, column in pairs if value is not None}


def _without_nan(
    columns: Sequence[int], highest: Columns, is_nan: npt.NDArray[np.bool_]
) -> list[int | None]:
    """The columns, with the highest one for a class whose score is NaN; None if all are NaN.

    `columns` has the class of each row, `highest` the column of its highest score, and `is_nan`, of
    the shape `(rows, classes)`, where scores are NaN.
    """
    rows = np.arange(len(columns))
    known = np.where(is_nan[rows, columns], highest, columns)
    are_nan = is_nan[rows, known].tolist()
    return [None if nan else column for column, nan in zip(known.tolist(), are_nan, strict=True)]


def highest_columns(scores: Array) -> Columns:
    """The column of each row's highest score, the first of equal ones; NaN is ignored.

    `scores` has the shape `(rows, classes)`, the result `(rows,)`.
    """
    columns: Columns = scores.argmax(axis=1)
    rows = np.arange(len(scores))
    # numpy counts NaN as the highest.
    if not np.isnan(scores[rows, columns]).any():
        return columns
    missing = np.isnan(scores)
    columns = np.where(missing, -np.inf, scores).argmax(axis=1)
    # A row of NaN and -Infinity is now all -Infinity, so argmax may have found a NaN.
    wrong = missing[rows, columns]
    columns[wrong] = (~missing[wrong]).argmax(axis=1)
    return columns


def softmax(logits: Array) -> Array:
    """The softmax along axis 1, in the dtype of `logits`; computed in float64.

    It never overflows; only NaN gives NaN.
    """
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        powers = np.exp(np.where(wide == top, 0.0, wide - top))
    shares: Array = (powers / powers.sum(axis=1, keepdims=True)).astype(logits.dtype)
    return shares


def _encode_rows(rows: list[ClassResult]) -> bytes:
    """JSON of the rows; of a single row its object without a list."""
    return _encode(rows[0] if len(rows) == 1 else rows)


def _encode_tensors(outputs: Sequence[tuple[str, Array]]) -> bytes:
    """JSON of named outputs, with flat, row-major data."""
    tensors = [
        TensorResult(name, datatype_of(output), output.shape, _plain(output).ravel().tolist())
        for name, output in outputs
    ]
    return _encode(TensorsResult(tensors))


def _plain(output: Array) -> Array:
    """`output` with a string for each value that is not a number in JSON.

    An array of objects then; else an array of numbers, float32 for bfloat16.
    """
    if output.dtype == DTYPES["BF16"]:
        output = output.astype(np.float32)
    if output.dtype.kind != "f" or np.isfinite(output).all():
        return output
    plain = output.astype(object)
    plain[np.isnan(output)] = "NaN"
    plain[output == np.inf] = "Infinity"
    plain[output == -np.inf] = "-Infinity"
    return plain

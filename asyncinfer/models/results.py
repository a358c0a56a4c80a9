"""What a model gave, as the JSON that is stored for a job and shown to people.

JSON has no NaN and no infinities; they are the strings "NaN", "Infinity" and "-Infinity", as in
ProtoJSON. (msgspec would write null in their place, which means something else.)
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from asyncinfer.errors import ModelFailed
from asyncinfer.models import batching
from asyncinfer.models.batching import Plan
from asyncinfer.models.signature import Signature
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import DTYPES, Array, Feeds, datatype_of

_FEW_NUMBERS: Final = 65536
"""Of a run's output: as Python's they take eight times the memory."""

Columns: TypeAlias = npt.NDArray[np.int64]
"""Places of classes among the scores, one for each row."""

_encode = msgspec.json.Encoder().encode


class ClassResult(Struct, frozen=True):
    """One row of a labelled classifier."""

    prediction: int | None
    """The column of the class among the scores, whatever number the model has for it."""
    class_name: str | None
    """None, as `prediction`, where all scores are NaN."""
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


class _Rows(Struct, frozen=True):
    """An output of many jobs, a list for each of its rows."""

    name: str
    datatype: str
    row_shape: tuple[int, ...]
    rows: list[list[Any]]

    @classmethod
    def of(cls, name: str, output: Array) -> "_Rows":
        rows = _plain(output).reshape(len(output), -1).tolist()
        return cls(name, datatype_of(output), output.shape[1:], rows)

    def between(self, start: int, end: int) -> TensorResult:
        data = list(itertools.chain.from_iterable(self.rows[start:end]))
        return TensorResult(self.name, self.datatype, (end - start, *self.row_shape), data)


def render_result(outputs: Sequence[Array], signature: Signature) -> bytes:
    """One job's result: of a labelled classifier an object per row, else all outputs."""
    return render_results(outputs, [{}], signature, None)[0]


def render_results(
    outputs: Sequence[Array],
    jobs: Sequence[Feeds],
    signature: Signature,
    plan: Plan | None,
    *,
    answer: str = "json",
    wanted: Sequence[str] = (),
) -> list[bytes]:
    """The results of all jobs of one run, from the outputs of their stacked rows.

    `answer` is "json" or "tensors"; `wanted` names outputs, and none means all: who names some
    gets tensors, of a labelled classifier too. A run of one job is that job's, however many rows
    came out. Raises ModelFailed where an output of a shared run has not a row for each row of
    the input.
    """
    if answer == "tensors":
        return [
            packing.pack(dict(_named(job, signature, wanted)))
            for job in batching.split(outputs, jobs, plan)
        ]
    rows = None if wanted else _class_rows(outputs, signature)
    if rows is None:
        return _render_tensors(outputs, jobs, signature, plan, wanted)
    if len(jobs) == 1 or plan is None:
        return [_encode_rows(rows)]
    counts = [batching.rows_of(feeds, plan) for feeds in jobs]
    batching.check_rows(outputs, sum(counts), plan.outputs)
    return [_encode_rows(rows[start:end]) for start, end in batching.spans(counts)]


def render_stored(payload: bytes) -> bytes:
    """The JSON of a result that is stored as packed tensors; raises DamagedPayload.

    The very bytes that the worker would have stored had JSON been asked for.
    """
    return _encode_tensors(list(packing.unpack(payload).items()))


def _render_tensors(
    outputs: Sequence[Array],
    jobs: Sequence[Feeds],
    signature: Signature,
    plan: Plan | None,
    wanted: Sequence[str],
) -> list[bytes]:
    if plan is None or len(jobs) == 1 or not _are_rows_of_few_numbers(outputs, plan):
        return [
            _encode_tensors(_named(job, signature, wanted))
            for job in batching.split(outputs, jobs, plan)
        ]
    # All rows made lists at once, for a fifth of what it takes job by job.
    counts = [batching.rows_of(feeds, plan) for feeds in jobs]
    batching.check_rows(outputs, sum(counts), plan.outputs)
    tensors = [_Rows.of(name, output) for name, output in _named(outputs, signature, wanted)]
    return [
        _encode(TensorsResult([one.between(start, end) for one in tensors]))
        for start, end in batching.spans(counts)
    ]


def _are_rows_of_few_numbers(outputs: Sequence[Array], plan: Plan) -> bool:
    if any(axis != 0 for axis in plan.outputs) or plan.unpad:
        return False
    return all(output.ndim and 0 < output.size <= _FEW_NUMBERS for output in outputs)


def _named(
    outputs: Sequence[Array], signature: Signature, wanted: Sequence[str]
) -> list[tuple[str, Array]]:
    """The wanted outputs in the order asked for, else all in the signature's."""
    names = [spec.name for spec in signature.outputs]
    if not wanted:
        return list(zip(names, outputs, strict=True))
    try:
        return [(name, outputs[names.index(name)]) for name in wanted]
    except ValueError as error:
        raise ModelFailed(f"an output was asked for that is not {', '.join(names)}") from error


def _class_rows(outputs: Sequence[Array], signature: Signature) -> list[ClassResult] | None:
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
    given = _output(signature.class_output, outputs, signature)
    found = _class_columns(highest, given, signature)
    columns = found if is_finite else _where_known(found, highest, np.isnan(shown))
    return [
        ClassResult(column, None if column is None else labels[column], row)
        for column, row in zip(columns, plain.tolist(), strict=True)
    ]


def _output(name: str, outputs: Sequence[Array], signature: Signature) -> Array | None:
    for spec, output in zip(signature.outputs, outputs, strict=True):
        if spec.name == name:
            return output
    return None


def _class_columns(highest: Columns, given: Array | None, signature: Signature) -> list[int]:
    """The column of each row's class: the one that its own value means, else that of its highest
    score."""
    otherwise: list[int] = highest.tolist()
    if given is None or given.size != len(otherwise):
        return otherwise
    columns = _columns_by_value(signature.class_values, len(signature.labels))
    return [
        columns.get(value, column)
        for value, column in zip(given.reshape(-1).tolist(), otherwise, strict=True)
    ]


@lru_cache(maxsize=1024)
def _columns_by_value(
    values: tuple[int | str | None, ...], width: int
) -> Mapping[int | str | None, int]:
    pairs = zip(values or range(width), range(width), strict=True)
    return {value: column for value, column in pairs if value is not None}


def _where_known(
    columns: Sequence[int], highest: Columns, missing: npt.NDArray[np.bool_]
) -> list[int | None]:
    """The columns of the classes, of a row whose own is NaN the highest, else None."""
    rows = np.arange(len(columns))
    known = np.where(missing[rows, columns], highest, columns)
    gone = missing[rows, known].tolist()
    return [None if it else column for column, it in zip(known.tolist(), gone, strict=True)]


def highest_columns(scores: Array) -> Columns:
    """The column of each row's highest score, the first of equal ones; NaN is none."""
    columns: Columns = scores.argmax(axis=1)
    rows = np.arange(len(scores))
    # numpy takes a NaN for the highest.
    if not np.isnan(scores[rows, columns]).any():
        return columns
    missing = np.isnan(scores)
    columns = np.where(missing, -np.inf, scores).argmax(axis=1)
    # -Infinity beside NaN: both are -Infinity by now.
    unsure = missing[rows, columns]
    columns[unsure] = (~missing[unsure]).argmax(axis=1)
    return columns


def softmax(logits: Array) -> Array:
    """Along axis 1, computed in float64; never overflows, and only NaN gives NaN."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        powers = np.exp(np.where(wide == top, 0.0, wide - top))
    shares: Array = (powers / powers.sum(axis=1, keepdims=True)).astype(logits.dtype)
    return shares


def _encode_rows(rows: list[ClassResult]) -> bytes:
    return _encode(rows[0] if len(rows) == 1 else rows)


def _encode_tensors(outputs: Sequence[tuple[str, Array]]) -> bytes:
    tensors = [
        TensorResult(name, datatype_of(output), output.shape, _plain(output).ravel().tolist())
        for name, output in outputs
    ]
    return _encode(TensorsResult(tensors))


def _is_float(output: Array) -> bool:
    return output.dtype.kind == "f" or output.dtype == DTYPES["BF16"]


def _plain(output: Array) -> Array:
    """`output` with a string for everything that JSON has no number for."""
    if not _is_float(output):
        return output
    if output.dtype == DTYPES["BF16"]:
        output = output.astype(np.float32)
    if np.isfinite(output).all():
        return output
    plain = output.astype(object)
    plain[np.isnan(output)] = "NaN"
    plain[output == np.inf] = "Infinity"
    plain[output == -np.inf] = "-Infinity"
    return plain

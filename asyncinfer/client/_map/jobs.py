"""The jobs of a map: how rows are packed into jobs, and how each row gets its result or error."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from asyncinfer.client._decoding import decode_result
from asyncinfer.client._encoding import data_input, is_json_value
from asyncinfer.client._errors import (
    CannotSend,
    job_failed_error,
    problem_error,
    reject_unreadable_result,
)
from asyncinfer.client._flows import operations, submitting, waiting
from asyncinfer.client._flows.jobs import retry_job
from asyncinfer.client._flows.models import cached_model
from asyncinfer.client._flows.submitting import NewJob
from asyncinfer.client._flows.views import View
from asyncinfer.client._map import ndjson
from asyncinfer.client._map.ndjson import MAX_LINES
from asyncinfer.client._map.rows import (
    RowBlock,
    rank_of,
    rows_at,
    single_row_blocks,
    split_in_half,
    without,
)
from asyncinfer.client._models import Model, TensorInfo
from asyncinfer.client._protocol import Flow, Request
from asyncinfer.client._requests import RemoteServer, fetch, path_part
from asyncinfer.errors import (
    AsyncinferError,
    BodyTooLarge,
    GroupNotFound,
    IdempotencyConflict,
    InvalidInput,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    JobNotRetryable,
)

OnError = Literal["raise", "return"]

_MAX_ROWS: Final = 256
"""The most rows of one job with batch="auto": larger jobs hardly save requests, and here a bad row
does not hold up many."""
_RESUMABLE_SECONDS: Final = 24 * 3600
"""How long a map whose group has a name can be resumed without running its finished jobs again, if
the server keeps jobs for so long."""
_UNREAD_SECONDS: Final = 3600
"""How long the jobs of any other map are kept, which nothing reads once the map has ended: the time
that a caller may take between two results."""
_CANCEL_SECONDS: Final = 5.0
"""How long the server may be silent about a cancel: whoever leaves a map waits for it."""
_QUEUE_FULL_SECONDS: Final = 600.0
"""How long a full queue is awaited."""
_ONE_ROW_FAILURES: Final = frozenset(
    {"model_failed", "timeout", "out_of_memory", "result_too_large", "worker_lost"}
)
"""Failures of a whole job that one of its rows may have caused."""


class MapOptions(Struct, frozen=True, kw_only=True):
    """The arguments of a map."""

    model: str | None
    batch: int | Literal["auto"]
    in_flight: int
    progress: bool
    on_error: OnError
    group: str
    is_named: bool
    """The caller named the group, which may have jobs already."""
    webhook: str | Mapping[str, Any] | None
    """That of the group, which is closed with it once all rows are done."""
    options: Mapping[str, Any]
    """Those of each job, the group among them."""


class MapPlan(Struct, frozen=True, kw_only=True):
    """How the rows of one map become jobs."""

    model: Model
    model_name: str | None
    """The name that was given, None for the default model."""
    options: Mapping[str, Any]
    group: str
    rows_are_inputs: bool
    """Each row is an input as `predict` takes it, with an axis of its own for rows."""
    max_rows_per_job: int
    max_rows_per_block: int
    """The most rows of one request: in one job, or a job each as lines."""
    is_resumed: bool
    """The group had jobs before."""


def make_plan(server: RemoteServer, first: Any, wanted: MapOptions) -> Flow[MapPlan]:
    """A plan from the first row, the arguments and the server's description of the model.

    A group that the caller named is looked up on the server. Raises ModelNotFound and other errors
    of these requests.
    """
    model = yield from cached_model(server, wanted.model)
    rows_are_inputs = _is_input(first, model)
    shares_jobs = _shares_jobs(model, first) and not rows_are_inputs
    rows_per_job = _rows_per_job(model, wanted.batch) if shares_jobs else 1
    kept_seconds = _RESUMABLE_SECONDS if wanted.is_named else _UNREAD_SECONDS
    goes_as_lines = rows_per_job == 1 and is_json_value(first)
    return MapPlan(
        model=model,
        model_name=wanted.model,
        options={"ttl_seconds": min(kept_seconds, model.max_ttl_seconds), **wanted.options},
        group=wanted.group,
        rows_are_inputs=rows_are_inputs,
        max_rows_per_job=rows_per_job,
        max_rows_per_block=MAX_LINES if goes_as_lines else rows_per_job,
        is_resumed=wanted.is_named and (yield from _group_exists(server, wanted.group)),
    )


def run_block(server: RemoteServer, plan: MapPlan, block: RowBlock) -> Flow[list[Any]]:
    """Runs the rows of a block and returns for each, in order, its result or its AsyncinferError.

    A row of a block that fails is run again with fewer others until it is clear which one is at
    fault. Raises an error that concerns all rows, such as ConnectionFailed or ModelNotFound.
    """
    if plan.max_rows_per_job == 1 and len(block) > 1:
        return (yield from _run_single_rows(server, plan, block))
    try:
        value = yield from _result_of_job(server, plan, block)
    except InvalidInput as error:
        return (yield from _run_without_bad_rows(server, plan, block, error))
    except (BodyTooLarge, CannotSend) as error:
        return (yield from _run_halves(server, plan, block, error))
    except JobCancelled as error:
        return [error] * len(block)
    except JobFailed as error:
        if error.job_error[0] not in _ONE_ROW_FAILURES:
            return [error] * len(block)
        return (yield from _run_halves(server, plan, block, error))
    return rows_of_result(value, plan, len(block))


def close(server: RemoteServer, wanted: MapOptions) -> Flow[AsyncinferError | None]:
    """Closes the group of a map with its webhook; returns why it could not, since the results that
    are left to give come first."""
    try:
        yield from operations.close_group(server, wanted.group, wanted.webhook)
    except AsyncinferError as error:
        return error
    return None


def cancel(server: RemoteServer, group: str) -> Flow[bool]:
    """Cancels the unfinished jobs of a map, with one retry; returns whether the server answered.

    Raises no AsyncinferError of the answer: if it fails, the jobs go on and end by themselves.
    """
    once = msgspec.structs.replace(server, retries=1)
    path = f"/group/{path_part(group)}"
    request = Request(method="DELETE", path=path, timeout_seconds=_CANCEL_SECONDS)
    try:
        yield from fetch(once, request)
    except AsyncinferError:
        return False
    # There may be no such group yet, which is an answer too.
    return True


# --- a job for each row ------------------------------------------------------------------------


def _run_single_rows(server: RemoteServer, plan: MapPlan, block: RowBlock) -> Flow[list[Any]]:
    """Runs a job for each row, as lines of one request if possible; returns as `run_block`.

    A row whose line has no final answer is run again by itself.
    """
    rows = list(single_row_blocks(block))
    lines = [ndjson.line_of(_new_job(plan, row)) for row in rows] if server.accepts_ndjson else []
    sendable = [line for line in lines if line is not None]
    answers = None
    if len(sendable) == len(rows):
        answers = yield from ndjson.submit_lines(
            server, plan.model_name, sendable, _QUEUE_FULL_SECONDS
        )
    results: list[Any] = []
    for row, answer in zip(rows, answers or [{}] * len(rows), strict=True):
        results += _result_of_line(plan, answer) or (yield from run_block(server, plan, row))
    return results


def _result_of_line(plan: MapPlan, answer: ndjson.Answer) -> list[Any]:
    """A list of the one result or error in an answer; empty if the row has to be run by itself."""
    if answer.get("code") == InvalidInput.code:
        return [problem_error(answer, None)]
    if answer.get("status") == "completed":
        return rows_of_result(decode_result(answer.get("result")), plan, 1)
    if answer.get("status") == "failed":
        return [job_failed_error(answer.get("error") or {}, answer["job_id"])]
    return []


# --- one job -----------------------------------------------------------------------------------


def _result_of_job(server: RemoteServer, plan: MapPlan, block: RowBlock) -> Flow[Any]:
    """The decoded result of a block's job, which an earlier map of this group may have submitted.

    A job that was cancelled then is retried, and one that is gone is submitted again. Raises
    JobFailed, JobCancelled, InvalidInput and what submitting raises; IdempotencyConflict says which
    rows differ.
    """
    job = _new_job(plan, block)
    try:
        return (yield from submitting.predict(server, job, math.inf))
    except JobCancelled as error:
        if not plan.is_resumed:
            raise
        return (yield from _retry_cancelled(server, job, str(error.job_id)))
    except (JobExpired, JobNotFound):
        return (yield from _resubmit(server, job))
    except IdempotencyConflict as error:
        raise IdempotencyConflict(
            f"Rows {block.numbers[0]} to {block.numbers[-1]} of group {plan.group!r} were other "
            "rows, or had other options, when it was first used. Map the same rows in the same "
            "order to go on with it, or give another group=.",
            job_id=error.job_id,
        ) from error


def _new_job(plan: MapPlan, block: RowBlock) -> NewJob:
    """The job of a block; its key is the same whenever the same rows of the group are mapped."""
    return NewJob(
        value=_input_of(plan, block),
        model=plan.model_name,
        options=plan.options,
        key=_key(plan, block),
        queue_full_seconds=_QUEUE_FULL_SECONDS,
    )


def _retry_cancelled(server: RemoteServer, job: NewJob, job_id: str) -> Flow[Any]:
    """Retries a job that an interrupted map had cancelled, and returns its result.

    Submits it anew if it cannot be retried.
    """
    try:
        yield from retry_job(server, job_id)
    except (JobNotRetryable, JobExpired, JobNotFound):
        return (yield from _resubmit(server, job))
    view: View = {"job_id": job_id, "status": "pending"}
    return (yield from waiting.result(server, view, math.inf))


def _resubmit(server: RemoteServer, job: NewJob) -> Flow[Any]:
    """Submits a job under another key, since its own names one that is gone; returns the result."""
    job = msgspec.structs.replace(job, key=f"{job.key}:anew")
    return (yield from submitting.predict(server, job, math.inf))


def _key(plan: MapPlan, block: RowBlock) -> str:
    """The Idempotency-Key of a block: the same for the same rows of a group at any time."""
    first, last = block.numbers[0], block.numbers[-1]
    key = f"{plan.group}:{first}-{last}"
    if last - first + 1 == len(block):
        return key
    numbers = hashlib.sha256(",".join(map(str, block.numbers)).encode()).hexdigest()[:16]
    return f"{key}:{numbers}"


# --- rows that cannot be run with others ---------------------------------------------------------


def _run_without_bad_rows(
    server: RemoteServer, plan: MapPlan, block: RowBlock, error: InvalidInput
) -> Flow[list[Any]]:
    """Gives the rows that `error` names their errors, and runs the others without them.

    Returns as `run_block`. If it names no row, every row has this error.
    """
    errors = _errors_by_place(error, len(block)) if len(block) > 1 else {}
    if not errors:
        # It names no single rows: all have a shape or datatype that is not the model's.
        return [error] * len(block)
    rest = without(block, errors)
    results = iter((yield from run_block(server, plan, rest)) if len(rest) else ())
    return [errors[place] if place in errors else next(results) for place in range(len(block))]


def _errors_by_place(error: InvalidInput, count: int) -> dict[int, InvalidInput]:
    """By place in the block, from 0, the error of each row that a pointer of `error` names.

    `/data/17/2` is in the row at place 17. Empty if any pointer names no row of the `count`.
    """
    faults_by_place: dict[int, list[Any]] = {}
    for fault in error.faults:
        _, _, rest = fault.pointer.partition("/data/")
        place = rest.partition("/")[0]
        if not place.isdecimal() or int(place) >= count:
            return {}
        faults_by_place.setdefault(int(place), []).append(fault)
    return {
        place: InvalidInput("; ".join(fault.detail for fault in faults), faults=faults)
        for place, faults in faults_by_place.items()
    }


def _run_halves(
    server: RemoteServer, plan: MapPlan, block: RowBlock, error: AsyncinferError
) -> Flow[list[Any]]:
    """Runs a block in two halves, and so on, until the row that causes the error is alone.

    Returns as `run_block`; a block of one row has `error`.
    """
    if len(block) == 1:
        return [error]
    results: list[Any] = []
    for half in split_in_half(block):
        results += yield from run_block(server, plan, half)
    return results


# --- rows <-> inputs and results ----------------------------------------------------------------


def rows_of_result(value: Any, plan: MapPlan, count: int) -> list[Any]:
    """A job's decoded result, row by row; raises NotAsyncinfer unless it has `count` rows."""
    with reject_unreadable_result():
        rows = _rows_of_result(value, plan, count)
        if len(rows) != count:
            raise ValueError(f"{len(rows)} rows of {count}")
        return rows


def _rows_of_result(value: Any, plan: MapPlan, count: int) -> list[Any]:
    """A list with an element per row: a dict for a labelled row, an array, or a dict of arrays.

    Its length is not checked.
    """
    if plan.rows_are_inputs:
        return [value]
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and "prediction" in value:
        return [value]
    names = [spec.name for spec in plan.model.outputs]
    arrays = value if isinstance(value, dict) else {names[0]: value}
    rows = [
        {name: _row_of_output(plan, name, array, place) for name, array in arrays.items()}
        for place in range(count)
    ]
    return rows if isinstance(value, dict) else [next(iter(row.values())) for row in rows]


def _row_of_output(plan: MapPlan, name: str, array: Any, place: int) -> Any:
    """The part of an output that is of the row at `place`; all of it if no axis counts rows."""
    axis = _row_axis(plan.model, name)
    if axis is None or axis >= array.ndim or array.shape[axis] <= place:
        return array
    return array[place] if axis == 0 else array.take(place, axis=axis)


def described_row_shape(model: Model, spec: TensorInfo) -> tuple[int, ...] | None:
    """The shape of an output for one row, as the model's description tells it; None if it does
    not."""
    if spec.shape is None:
        return None
    axis = _row_axis(model, spec.name)
    sizes = [size for place, size in enumerate(spec.shape) if place != axis]
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if len(known) == len(sizes) else None


def _row_axis(model: Model, name: str) -> int | None:
    """The axis of an output that counts the rows of the input; None if no axis does."""
    for place, spec in enumerate(model.outputs):
        if spec.name == name and place < len(model.output_axes):
            return model.output_axes[place]
        if spec.name == name and spec.shape:
            first = (model.inputs[0].shape or ())[:1]
            return 0 if spec.shape[0] is not None and spec.shape[:1] == first else None
    return None


def _input_of(plan: MapPlan, block: RowBlock) -> Any:
    """The input of a block's job, as `predict` takes it."""
    if plan.rows_are_inputs:
        return rows_at(block.rows, 0)
    rows = _join_rows(block.rows)
    axes = {
        spec.name: axis
        for spec, axis in zip(plan.model.inputs, plan.model.input_axes, strict=False)
    }
    if all(axis == 0 for axis in axes.values()):
        return rows
    if isinstance(rows, dict):
        return {name: _move_row_axis(values, axes.get(name, 0)) for name, values in rows.items()}
    return _move_row_axis(rows, axes[data_input(plan.model).name])


def _join_rows(rows: Any) -> Any:
    """A list of rows as one input `(rows, *dims)`, or a dict of them; lists of lists unchanged."""
    if not isinstance(rows, list):
        return rows
    if isinstance(rows[0], Mapping):
        return {name: _stack([row[name] for row in rows]) for name in rows[0]}
    return _stack(rows) if hasattr(rows[0], "__array__") else rows


def _move_row_axis(rows: Any, axis: int | None) -> Any:
    """`(rows, *dims)` with its rows along another axis.

    None: the input has no axis of rows, so that a job has one row. Raises CannotSend for several.
    """
    import numpy as np

    array = np.asanyarray(rows)
    if axis is None and len(array) > 1:
        raise CannotSend("Rows with an input that has no axis of rows cannot share a job.")
    return array[0] if axis is None else np.moveaxis(array, 0, axis)


def _stack(rows: list[Any]) -> Any:
    """Rows of the shape `(*dims)` as an array `(rows, *dims)`; raises CannotSend."""
    import numpy as np

    try:
        arrays = [np.asanyarray(row) for row in rows]
        if any(array.dtype.kind == "U" for array in arrays):
            # Numpy would convert numbers beside strings to strings.
            arrays = [np.asarray(row, dtype=object) for row in rows]
        is_masked = any(isinstance(array, np.ma.MaskedArray) for array in arrays)
        return (np.ma.stack if is_masked else np.stack)(arrays)
    except ValueError as error:
        raise CannotSend(f"Rows do not fit together: {error}.") from error


def _is_input(first: Any, model: Model) -> bool:
    """Whether a row has as many axes as an input, so that it is one by itself.

    Raises CannotSend if the model takes several inputs and the row is no dict.
    """
    if isinstance(first, Mapping):
        ranks = {spec.name: len(spec.shape) for spec in model.inputs if spec.shape}
        return all(rank_of(value) >= ranks[name] for name, value in first.items() if name in ranks)
    return rank_of(first) >= (data_input(model).rank or 0)


def _shares_jobs(model: Model, first: Any) -> bool:
    """Whether several rows may go in one job.

    An optional input without an axis of rows does not matter if rows are no dicts, which alone can
    have it.
    """
    axes = {spec.name: axis for spec, axis in zip(model.inputs, model.input_axes, strict=False)}
    given = axes if isinstance(first, Mapping) else {data_input(model).name}
    return model.batched and all(axes.get(name, 0) is not None for name in given)


def _group_exists(server: RemoteServer, group: str) -> Flow[bool]:
    """Whether the server still keeps a group of this name."""
    try:
        yield from operations.group(server, group)
    except GroupNotFound:
        return False
    return True


def _rows_per_job(model: Model, batch: int | Literal["auto"]) -> int:
    """The most rows of one job.

    Independent of measured times, since a map that is resumed must make the same jobs.
    """
    if batch == "auto":
        return max(1, min(_MAX_ROWS, model.max_rows))
    return min(batch, model.max_rows)

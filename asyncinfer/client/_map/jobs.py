"""Many rows through one model: how they are packed into jobs, and what becomes of each row."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from asyncinfer.client import _flows
from asyncinfer.client._decoding import result_of
from asyncinfer.client._encoding import data_input, is_plain
from asyncinfer.client._errors import CannotSend, job_failed, problem_error, strange_refused
from asyncinfer.client._flows import Submission, View
from asyncinfer.client._map import ndjson
from asyncinfer.client._map.ndjson import MOST_LINES
from asyncinfer.client._map.rows import Block, halves, rank_of, row_at, singles, without
from asyncinfer.client._models import Model
from asyncinfer.client._protocol import Flow
from asyncinfer.client._requests import Server
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

_MOST_ROWS: Final = 256
"""Of one job: fewer requests than that hardly cost, and a bad row does not hold up many."""
_KEPT_SECONDS: Final = 24 * 3600
"""So long a map can be taken up again without running what it has."""
_FULL_SECONDS: Final = 600.0
"""How long a full queue is waited for."""
_SPLIT: Final = frozenset(
    {"model_failed", "timeout", "out_of_memory", "result_too_large", "worker_lost"}
)
"""Failures that one row may have caused for all of its job."""


class Plan(Struct, frozen=True, kw_only=True):
    """How the rows of one map go."""

    model: Model
    asked_model: str | None
    options: Mapping[str, Any]
    group: str
    whole: bool
    """A row is an input as `predict` takes it, with an axis of its own for rows."""
    batch: int
    """The most rows of a job."""
    block: int
    """The most rows that are asked for together: in one job, or a job each in one request."""
    taken_up: bool
    """The group had jobs before."""


def plan(
    server: Server,
    first: Any,
    name: str | None,
    batch: int | Literal["auto"],
    options: Mapping[str, Any],
    *,
    is_named: bool,
) -> Flow[Plan]:
    """By the first row, and by what the server says of the model."""
    model = yield from _flows.known_model(server, name)
    whole = _is_whole(first, model)
    group = options["group"]
    rows_a_job = _batch(model, batch) if _is_packed(model) and not whole else 1
    return Plan(
        model=model,
        asked_model=name,
        options={"ttl_seconds": _KEPT_SECONDS, **options},
        group=group,
        whole=whole,
        batch=rows_a_job,
        block=MOST_LINES if rows_a_job == 1 and is_plain(first) else rows_a_job,
        taken_up=is_named and (yield from _exists(server, group)),
    )


def run(server: Server, plan: Plan, block: Block) -> Flow[list[Any]]:
    """For each row of a block its result, or the error that it has instead."""
    if plan.batch == 1 and len(block) > 1:
        return (yield from _one_by_one(server, plan, block))
    try:
        value = yield from _settled(server, plan, block)
    except InvalidInput as error:
        return (yield from _refused(server, plan, block, error))
    except (BodyTooLarge, CannotSend) as error:
        return (yield from _split(server, plan, block, error))
    except JobCancelled as error:
        return [error] * len(block)
    except JobFailed as error:
        if error.job_error[0] not in _SPLIT:
            return [error] * len(block)
        return (yield from _split(server, plan, block, error))
    return rows_of(value, plan, len(block))


def cancel(server: Server, group: str) -> Flow[None]:
    """Whatever of a map still waits or runs. Tried once: its jobs end by themselves, too."""
    once = msgspec.structs.replace(server, retries=1)
    try:
        yield from _flows.cancel_group(once, group)
    except AsyncinferError:
        # Who leaves wants to leave; there may be no such group yet, or no server.
        return


# --- a job for each row ------------------------------------------------------------------------


def _one_by_one(server: Server, plan: Plan, block: Block) -> Flow[list[Any]]:
    """In one request, as lines, where that is possible; what is not settled so goes alone."""
    blocks = list(singles(block))
    texts = [ndjson.text_of(_submission(plan, one)) for one in blocks] if server.takes_lines else []
    lines = [text for text in texts if text is not None]
    answers = None
    if len(lines) == len(blocks):
        answers = yield from ndjson.ask_lines(server, plan.asked_model, lines, _FULL_SECONDS)
    results: list[Any] = []
    for one, answer in zip(blocks, answers or [{}] * len(blocks), strict=True):
        results += _told(plan, answer) or (yield from run(server, plan, one))
    return results


def _told(plan: Plan, answer: ndjson.Answer) -> list[Any]:
    """The result that a line tells; none where there is more to be done about its row."""
    if answer.get("code") == InvalidInput.code:
        return [problem_error(answer, None)]
    if answer.get("status") == "completed":
        return rows_of(result_of(answer.get("result")), plan, 1)
    if answer.get("status") == "failed":
        return [job_failed(answer.get("error") or {}, answer["job_id"])]
    return []


# --- one job -----------------------------------------------------------------------------------


def _settled(server: Server, plan: Plan, block: Block) -> Flow[Any]:
    """The result of the job of a block, one that an earlier map made included."""
    asked = _submission(plan, block)
    try:
        return (yield from _flows.predict(server, asked, math.inf))
    except JobCancelled as error:
        if not plan.taken_up:
            raise
        return (yield from _again(server, asked, str(error.job_id)))
    except (JobExpired, JobNotFound):
        return (yield from _anew(server, asked))
    except IdempotencyConflict as error:
        raise IdempotencyConflict(
            f"Rows {block.numbers[0]} to {block.numbers[-1]} of group {plan.group!r} were other "
            "rows, or had other options, when it was first used. Map the same rows in the same "
            "order to go on with it, or give another group=.",
            job_id=error.job_id,
        ) from error


def _submission(plan: Plan, block: Block) -> Submission:
    return Submission(
        value=_value(plan, block),
        model=plan.asked_model,
        options=plan.options,
        key=_key(plan, block),
        patience_seconds=_FULL_SECONDS,
    )


def _again(server: Server, asked: Submission, job_id: str) -> Flow[Any]:
    """A job that an interrupted map had cancelled."""
    try:
        yield from _flows.retry_job(server, job_id)
    except (JobNotRetryable, JobExpired, JobNotFound):
        return (yield from _anew(server, asked))
    view: View = {"job_id": job_id, "status": "pending"}
    return (yield from _flows.result(server, view, math.inf))


def _anew(server: Server, asked: Submission) -> Flow[Any]:
    """Its key names a job that is gone."""
    asked = msgspec.structs.replace(asked, key=f"{asked.key}:anew")
    return (yield from _flows.predict(server, asked, math.inf))


def _key(plan: Plan, block: Block) -> str:
    """The same for the same rows, whoever asks and whenever."""
    first, last = block.numbers[0], block.numbers[-1]
    key = f"{plan.group}:{first}-{last}"
    if last - first + 1 == len(block):
        return key
    gaps = hashlib.sha256(",".join(map(str, block.numbers)).encode()).hexdigest()[:16]
    return f"{key}:{gaps}"


# --- rows that cannot go with others -------------------------------------------------------------


def _refused(server: Server, plan: Plan, block: Block, error: InvalidInput) -> Flow[list[Any]]:
    """Rows that a refusal names have it; the others are sent again without them."""
    by_place = _by_place(error, len(block)) if len(block) > 1 else {}
    if not by_place:
        # It says nothing of single rows: it is their shape or datatype, which all have.
        return [error] * len(block)
    rest = without(block, by_place)
    results = iter((yield from run(server, plan, rest)) if len(rest) else ())
    return [by_place[at] if at in by_place else next(results) for at in range(len(block))]


def _by_place(error: InvalidInput, count: int) -> dict[int, InvalidInput]:
    """An error of its own for each row that is named: `/data/17/2` is in the row at 17."""
    found: dict[int, list[Any]] = {}
    for fault in error.faults:
        _, _, rest = fault.pointer.partition("/data/")
        place = rest.partition("/")[0]
        if not place.isdecimal() or int(place) >= count:
            return {}
        found.setdefault(int(place), []).append(fault)
    return {
        place: InvalidInput("; ".join(one.detail for one in faults), faults=faults)
        for place, faults in found.items()
    }


def _split(server: Server, plan: Plan, block: Block, error: AsyncinferError) -> Flow[list[Any]]:
    """In halves, until the culprit is alone."""
    if len(block) == 1:
        return [error]
    results: list[Any] = []
    for half in halves(block):
        results += yield from run(server, plan, half)
    return results


# --- rows <-> inputs and results ----------------------------------------------------------------


def rows_of(value: Any, plan: Plan, count: int) -> list[Any]:
    """A job's result, row by row."""
    with strange_refused("A result"):
        rows = _rows_of(value, plan, count)
        if len(rows) != count:
            raise ValueError(f"{len(rows)} rows of {count}")
        return rows


def _rows_of(value: Any, plan: Plan, count: int) -> list[Any]:
    if plan.whole:
        return [value]
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and "prediction" in value:
        return [value]
    names = [spec.name for spec in plan.model.outputs]
    arrays = value if isinstance(value, dict) else {names[0]: value}
    rows = [
        {name: _row(plan, name, one, at) for name, one in arrays.items()} for at in range(count)
    ]
    return rows if isinstance(value, dict) else [next(iter(row.values())) for row in rows]


def _row(plan: Plan, name: str, array: Any, at: int) -> Any:
    axis = _row_axis(plan.model, name)
    if axis is None or axis >= array.ndim or array.shape[axis] <= at:
        return array
    return array[at] if axis == 0 else array.take(at, axis=axis)


def _row_axis(model: Model, name: str) -> int | None:
    """Which axis of an output counts the rows of the input, if one does."""
    for place, spec in enumerate(model.outputs):
        if spec.name == name and model.batched and place < len(model.output_axes):
            return model.output_axes[place]
        if spec.name == name and spec.shape:
            first = (model.inputs[0].shape or ())[:1]
            return 0 if spec.shape[0] is not None and spec.shape[:1] == first else None
    return None


def _value(plan: Plan, block: Block) -> Any:
    """What `predict` would be given for these rows."""
    if plan.whole:
        return row_at(block.rows, 0)
    rows = _together(block.rows)
    axes = {
        spec.name: axis
        for spec, axis in zip(plan.model.inputs, plan.model.input_axes, strict=False)
    }
    if all(axis == 0 for axis in axes.values()):
        return rows
    if isinstance(rows, dict):
        return {name: _along(one, axes.get(name, 0)) for name, one in rows.items()}
    return _along(rows, axes[data_input(plan.model).name])


def _together(rows: Any) -> Any:
    """Rows that came one by one as one input, its first axis counting them."""
    if not isinstance(rows, list):
        return rows
    if isinstance(rows[0], Mapping):
        return {name: _stacked([row[name] for row in rows]) for name in rows[0]}
    return _stacked(rows) if hasattr(rows[0], "__array__") else rows


def _along(rows: Any, axis: int | None) -> Any:
    """The same with its rows along another axis; None: the input has none, all rows share it."""
    import numpy as np

    array = np.asanyarray(rows)
    return array[0] if axis is None else np.moveaxis(array, 0, axis)


def _stacked(rows: list[Any]) -> Any:
    import numpy as np

    try:
        arrays = [np.asanyarray(row) for row in rows]
        if any(one.dtype.kind == "U" for one in arrays):
            # Numpy would make text of the numbers beside text.
            arrays = [np.asarray(row, dtype=object) for row in rows]
        is_masked = any(isinstance(one, np.ma.MaskedArray) for one in arrays)
        return (np.ma.stack if is_masked else np.stack)(arrays)
    except ValueError as error:
        raise CannotSend(f"Rows do not fit together: {error}.") from error


def _is_whole(first: Any, model: Model) -> bool:
    if isinstance(first, Mapping):
        ranks = {spec.name: len(spec.shape) for spec in model.inputs if spec.shape}
        return all(rank_of(one) >= ranks[name] for name, one in first.items() if name in ranks)
    return rank_of(first) >= (data_input(model).rank or 0)


def _is_packed(model: Model) -> bool:
    return model.batched and None not in model.input_axes


def _exists(server: Server, group: str) -> Flow[bool]:
    try:
        yield from _flows.group(server, group)
    except GroupNotFound:
        return False
    return True


def _batch(model: Model, asked: int | Literal["auto"]) -> int:
    """Not by measured times: a map that is taken up again must make the same jobs."""
    if asked == "auto":
        return max(1, min(_MOST_ROWS, model.max_rows))
    if not isinstance(asked, int) or asked < 1:
        raise CannotSend(f'batch={asked!r} is neither "auto" nor a number of rows of at least 1.')
    return min(asked, model.max_rows)

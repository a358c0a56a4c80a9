"""Stored jobs as the structs that answers show."""

from typing import Final
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Raw, UnsetType

from asyncinfer.jobs import TERMINAL, JobError, Priority, Record, Status, created_ms, started_ms
from asyncinfer.models.results import render_packed
from asyncinfer.repository.inspect.log import StatusChange
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.schemas.operations import public_worker_name
from asyncinfer.schemas.responses import AcceptedJob, Job, WaitingFor, to_datetime
from asyncinfer.tensors import packing
from asyncinfer.untrusted import decoding

_read_error = decoding.lenient_decoder(msgspec.json.Decoder(JobError).decode)
_decode_raw = msgspec.json.Decoder(Raw).decode


WaitingForField = WaitingFor | UnsetType | None
"""Why a job waits, or None if nothing is wrong; UNSET for a job that has ended."""


def accepted_view(job_id: str, status: Status, waiting_for: WaitingForField) -> AcceptedJob:
    """The body of a 202: the job's id, status and path, and why it waits."""
    return AcceptedJob(job_id, status, url_of(job_id), waiting_for)


_NOT_SHOWN: Final = "Only its own tenant is shown the message, which may repeat its data."


def job_view(
    stored: StoredJob, default_model: str | None, waiting_for: WaitingForField = UNSET
) -> Job:
    """The whole job with its result, which is None (`null`) until it is completed. An external job
    belongs to the default model; `waiting_for` is shown as it is given, UNSET leaves it out."""
    view = summary_view(stored, default_model, waiting_for)
    return msgspec.structs.replace(view, result=result_text(stored))


def summary_view(
    stored: StoredJob, default_model: str | None, waiting_for: WaitingForField = UNSET
) -> Job:
    """The job without its result. An external job, which has no record, belongs to the default
    model; that may be None if it is not known. `waiting_for` is as for `job_view`."""
    record = stored.record
    return Job(
        job_id=stored.job_id,
        status=stored.status,
        result=UNSET,
        error=error_of(stored),
        model=stored.model or default_model or UNSET,
        version=version_of(record),
        sha256=(record and record.ran_sha256) or UNSET,
        group=stored.group or UNSET,
        priority=priority_of(record),
        worker=public_worker_name(record.worker) if record and record.worker else UNSET,
        round=record.round if record else UNSET,
        request_id=(record and record.request_id) or UNSET,
        created_at=to_datetime(record.created_ms if record else created_ms(stored.job_id)),
        started_at=to_datetime(started_ms(record) if record else None),
        finished_at=to_datetime(stored.ended_ms),
        waiting_for=waiting_for,
    )


def operator_view(
    stored: StoredJob, default_model: str | None, waiting_for: WaitingForField = UNSET
) -> Job:
    """The job as an operator sees it: with its tenant, but without any data that the tenant sent or
    received."""
    view = summary_view(stored, default_model, waiting_for)
    error = view.error
    return msgspec.structs.replace(
        view,
        tenant=stored.tenant,
        error=error if isinstance(error, UnsetType) else JobError(error.code, _NOT_SHOWN),
    )


def change_view(
    change: StatusChange,
    stored: StoredJob | None,
    default_model: str | None,
    waiting_for: WaitingForField,
) -> Job:
    """The job as it was when it reached the change's status, which it may have left since. `stored`
    is the job as it was read after the change, None if it was deleted; `waiting_for` is that of
    `stored`."""
    if stored and stored.status == change.status:
        return summary_view(stored, default_model, waiting_for)
    waiting_for_then = UNSET if change.status in TERMINAL else None
    if stored is None:
        return Job(
            job_id=change.job_id, status=change.status, result=UNSET, waiting_for=waiting_for_then
        )
    return Job(
        job_id=change.job_id,
        status=change.status,
        result=UNSET,
        model=stored.model or default_model or UNSET,
        group=stored.group or UNSET,
        priority=priority_of(stored.record),
        waiting_for=waiting_for_then,
    )


def priority_of(record: Record | None) -> Priority | UnsetType:
    """The priority to show; UNSET for `normal`, also without a record."""
    return (
        UNSET if record is None or record.options.priority == "normal" else record.options.priority
    )


def version_of(record: Record | None) -> str | UnsetType:
    """The version that ran, else the requested one; UNSET if neither is known."""
    return (record and (record.ran_version or record.version)) or UNSET


def url_of(job_id: str) -> str:
    """The path of a job; an id with other characters than letters and digits is quoted."""
    return f"/job/{job_id if job_id.isalnum() and job_id.isascii() else quote(job_id, safe='')}"


def result_text(stored: StoredJob) -> Raw | None:
    """The result as JSON, whether it is stored as JSON or packed; None unless the job is completed
    and has one. Never raises: a damaged result becomes a JSON string."""
    if stored.status != "completed" or stored.result is None:
        return None
    if packing.is_packed(stored.result):
        return _rendered(stored.result)
    return _as_json(stored.result)


def _rendered(packed: bytes) -> Raw:
    """The JSON of packed tensors; damaged ones become a JSON string."""
    try:
        return Raw(render_packed(packed))
    except packing.DamagedPayload:
        return _as_json(packed)


def _as_json(text: bytes) -> Raw:
    """The text itself if it is JSON, else as a JSON string: anyone may write anything to Redis."""
    try:
        if not text.isascii():
            text.decode()
        return _decode_raw(text)
    except decoding.DECODE_ERRORS:
        return Raw(msgspec.json.encode(decoding.text(text)))


def error_of(stored: StoredJob) -> JobError | UnsetType:
    """The error of a failed job, with the code `unknown` if it cannot be read; else UNSET."""
    if stored.status != "failed":
        return UNSET
    stored_error = stored.error or b""
    return _read_error(stored_error) or JobError("unknown", decoding.text(stored_error))

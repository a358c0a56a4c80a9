"""What becomes of a checked input: a job, or what its client is told instead."""

import hashlib
import time
from typing import Final

import msgspec

from asyncinfer import jobs
from asyncinfer.api.inputs.request_input import Input
from asyncinfer.api.views import url_of
from asyncinfer.api.wait_reasons import Reasons
from asyncinfer.errors import (
    IdempotencyConflict,
    QueueFull,
    RedisRefused,
    RedisUnavailable,
    RequestError,
    StorageFull,
)
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.submissions import NewJob, Submitted
from asyncinfer.schemas.responses import WaitingFor

_FULL_RETRY_SECONDS: Final = 5


def new_job(tenant: str, queue: str, asked: Input, key: str | None) -> NewJob:
    now_ms = time.time_ns() // 1_000_000
    record = jobs.Record(
        schema=jobs.SCHEMA,
        queue=queue,
        model=asked.signature.model,
        tenant=tenant,
        created_ms=now_ms,
        version=asked.options.version,
        payload=asked.payload,
        options=asked.options,
        answer=asked.answer,
        outputs=asked.outputs,
    )
    job = NewJob(jobs.new_id(now_ms), queue, asked.content, record)
    if key is None:
        return job
    return msgspec.structs.replace(
        job,
        idempotency=_digest(tenant.encode(), key.encode()),
        fingerprint=_digest(*asked.meaning()),
    )


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def explained(error: RequestError, job: NewJob) -> RequestError:
    """The error of a submit, with what can be done about it."""
    if isinstance(error, RedisRefused):
        return type(error)(
            f"{error.detail} The job may have been accepted in part: look at "
            f"{url_of(job.job_id)}, or send it again with the same Idempotency-Key once that is "
            "done.",
            retry_after_seconds=error.retry_after_seconds,
            job_id=job.job_id,
        )
    if isinstance(error, RedisUnavailable) and error.job_id:
        return RedisUnavailable(
            "Redis did not answer in time, so the job may or may not have been accepted. Look at "
            f"{url_of(job.job_id)}, or send it again with the same Idempotency-Key.",
            retry_after_seconds=error.retry_after_seconds,
            job_id=job.job_id,
        )
    if isinstance(error, StorageFull):
        # Refused whole: there is no job to name.
        return StorageFull(error.detail, retry_after_seconds=_FULL_RETRY_SECONDS)
    return error


def queue_full(policy: Policy, reason: WaitingFor | None) -> QueueFull:
    """With the reason why nothing leaves the queue, where there is one: more workers would mend no
    pause."""
    remedy = "Retry later, start more workers, or raise MAX_QUEUE or MAX_QUEUE_BYTES."
    return QueueFull(
        f"The model's queue holds all it may ({policy.max_queue} jobs, {policy.max_queue_bytes} "
        f"bytes). {reason.message if reason else remedy}",
        retry_after_seconds=_FULL_RETRY_SECONDS,
    )


def refusal_of(
    submitted: Submitted, job: NewJob, policy: Policy, reasons: Reasons
) -> RequestError | None:
    """Why a job was not taken in; None where it was, now or earlier."""
    if submitted.verdict == "full":
        return queue_full(policy, reasons.of_queue(job.record))
    if submitted.verdict == "dup" and submitted.fingerprint != job.fingerprint:
        return IdempotencyConflict(
            f"This Idempotency-Key belongs to job {submitted.job_id}, which had another model, "
            "other options or other data. Use a new key for a new request.",
            job_id=submitted.job_id,
        )
    return None

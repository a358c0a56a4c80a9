"""Finding the job of a request, and the errors when there is none to act on."""

import time
from typing import Any, Final

from asyncinfer import jobs
from asyncinfer.api.http.messages import Request
from asyncinfer.api.inputs.new_job import queue_full
from asyncinfer.api.services import Services
from asyncinfer.api.views import (
    owner_of,
)
from asyncinfer.errors import (
    JobExpired,
    JobNotFound,
    JobNotRetryable,
    RequestError,
)
from asyncinfer.repository.stored_jobs import Stored

RETRYABLE: Final = frozenset({"failed", "cancelled"})


def absent(services: Services, job_id: str) -> RequestError:
    """What to say of a job that is not there, or not the caller's: which, must not show."""
    made_ms = jobs.created_ms(job_id)
    ttl_seconds = services.config.policy.job_ttl_seconds
    if made_ms is not None and made_ms + ttl_seconds * 1000 < time.time() * 1000:
        return JobExpired(
            f"Jobs are kept for {ttl_seconds} s after they end (JOB_TTL), and this one was made "
            "earlier than that. Submit its input again."
        )
    return JobNotFound("There is no job with this id.")


async def find_job(services: Services, request: Request[Any]) -> Stored:
    """The job that the path names, if it is the caller's, or of a tenant that is asked about."""
    job_id = request.path("id") or ""
    stored = await services.submissions.read(job_id) if jobs.is_id(job_id) else None
    if stored is None or not is_meant(request, stored):
        raise absent(services, job_id)
    return stored


def is_meant(request: Request[Any], stored: Stored) -> bool:
    return request.reach.tenant in (None, owner_of(stored))


def not_retried(services: Services, stored: Stored, verdict: str) -> RequestError:
    """What to say of a job that a retry left as it was."""
    if verdict == "absent":
        return absent(services, stored.job_id)
    if verdict == "full":
        reason = services.reasons.of_queue(stored.record) if stored.record else None
        return queue_full(services.config.policy, reason)
    if verdict == "changed" or (verdict == "not_retryable" and stored.status in RETRYABLE):
        return JobNotRetryable(
            "The job kept changing meanwhile; look at it and try again.", job_id=stored.job_id
        )
    if verdict == "later":
        return JobNotRetryable(
            "The job was written by a later release of asyncinfer; retry it through an API of "
            "that release, or submit its input again.",
            job_id=stored.job_id,
        )
    if verdict == "no_input":
        return JobNotRetryable(
            "The job's input is no longer stored; submit it again.", job_id=stored.job_id
        )
    return JobNotRetryable(
        f"The job is {stored.status}; only one that failed or was cancelled can be retried.",
        job_id=stored.job_id,
    )

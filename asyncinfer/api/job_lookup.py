"""The job that a request names, and the errors if there is none to act on."""

from typing import Any, Final

from asyncinfer import jobs
from asyncinfer.api.http.messages import Request
from asyncinfer.api.inputs.new_job import queue_full_error, webhooks_full_error
from asyncinfer.api.services import Services
from asyncinfer.errors import JobExpired, JobNotFound, JobNotRetryable, RequestError
from asyncinfer.repository.stored_jobs import StoredJob

RETRYABLE: Final = frozenset({"failed", "cancelled"})


def job_absent_error(services: Services, job_id: str) -> RequestError:
    """Returns the error for a job that does not exist or is not the caller's, and does not show
    which: JobExpired if its id is older than JOB_TTL, else JobNotFound."""
    created_ms = jobs.created_ms(job_id)
    ttl_seconds = services.config.policy.job_ttl_seconds
    if created_ms is not None and created_ms + ttl_seconds * 1000 < jobs.now_ms():
        return JobExpired(
            f"Jobs are kept for {ttl_seconds} s after they end (JOB_TTL), and this one was created "
            "before that. Submit its input again."
        )
    return JobNotFound("There is no job with this id.")


async def find_job(services: Services, request: Request[Any]) -> StoredJob:
    """Returns the job that the path names, with its result. Raises JobExpired or JobNotFound if it
    does not exist or belongs to a tenant that the request is not about, and RedisUnavailable."""
    job_id = request.path("id") or ""
    stored = await services.submissions.read(job_id) if jobs.is_id(job_id) else None
    if stored is None or not is_in_reach(request, stored):
        raise job_absent_error(services, job_id)
    return stored


def is_in_reach(request: Request[Any], stored: StoredJob) -> bool:
    """Whether the job belongs to the tenant that the request is about, which may be all tenants."""
    return request.reach.tenant in (None, stored.tenant)


def not_retried_error(services: Services, stored: StoredJob, verdict: str) -> RequestError:
    """Returns the error for a job that was not retried. `stored` is the job as it was read before,
    `verdict` the reason from the script, any but `ok`."""
    if verdict == "absent":
        return job_absent_error(services, stored.job_id)
    if verdict == "full":
        reason = services.wait_reasons.of_queue(stored.record) if stored.record else None
        room_seconds = services.queue_looks.room_seconds(stored.record)
        return queue_full_error(services.config.policy, reason, room_seconds)
    if verdict == "webhooks_full":
        return webhooks_full_error(services.config.policy)
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

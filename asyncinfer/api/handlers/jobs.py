"""The routes to read, list, cancel and retry jobs."""

from typing import Any, Final

import msgspec

from asyncinfer import jobs
from asyncinfer.api.audit import audited
from asyncinfer.api.http.messages import Header, Reply, Request, json_reply
from asyncinfer.api.job_lookup import find_job, job_absent_error, not_retried_error
from asyncinfer.api.live.wait import while_client_stays
from asyncinfer.api.queue_looks import whole_seconds
from asyncinfer.api.services import Services
from asyncinfer.api.views import (
    WaitingForField,
    accepted_view,
    job_view,
    operator_view,
    summary_view,
    url_of,
)
from asyncinfer.errors import JobFinished, JobNotFinished
from asyncinfer.repository.inspect.listing import Page
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.stored_jobs import StoredJob, next_round
from asyncinfer.schemas.requests import (
    CancelJobQuery,
    ClearJobsQuery,
    JobQuery,
    JobsQuery,
    RetryQuery,
    WaitQuery,
)
from asyncinfer.schemas.responses import Job, JobList, Position

_RETRY_SECONDS: Final = 1
"""The Retry-After of a job that runs, or whose end is not known."""

_CANCEL_WAIT_SECONDS: Final = 1.0
"""A cancelled run stops before its next kernel, usually within this time."""


async def read_job(services: Services, request: Request[WaitQuery]) -> Reply:
    """A job's state and result, and where it is while it waits.

    With `wait`, replies when the job has ended, after those seconds, or when the API stops. An
    operator who acts across tenants gets no result. Raises JobNotFound, JobExpired,
    RedisUnavailable, and Unauthorized or Forbidden if the key is revoked during the wait.
    """
    if request.query.wait:
        request.note_wait()
    async with audited(services, request, "read", {"job_id": request.path("id")}) as audit:
        stored = await find_job(services, request)
        if request.query.wait and not stored.has_ended:
            stored = await _wait(services, request, stored, request.query.wait)
        audit.count = 1
    if request.query.wait or stored.has_ended:
        return _job_reply(services, request, 200, stored)
    return await _place_reply(services, request, stored)


async def _place_reply(services: Services, request: Request[Any], stored: StoredJob) -> Reply:
    """The reply that shows an unfinished job, and where it is if it waits. Retry-After is the time
    until it has probably ended."""
    reason = services.wait_reasons.of(stored)
    seen = await services.queue_looks.of(stored, reason or None)
    view = _view(services, request, stored, services.wait_reasons.of_seen(reason, seen))
    if stored.status == "pending":
        view = msgspec.structs.replace(
            view,
            position=seen.position and Position(seen.position.ahead, seen.position.is_about),
            eta_seconds=None if seen.eta_seconds is None else round(seen.eta_seconds, 3),
        )
    return json_reply(200, view, _retry_after(whole_seconds(seen.eta_seconds)))


async def list_jobs(services: Services, request: Request[JobsQuery]) -> Reply:
    """The caller's jobs, newest first.

    One page without results, which may be short, and the cursor of the next, None at the end.
    Raises InvalidQuery for an invalid cursor, and RedisUnavailable.
    """
    query = request.query
    async with audited(services, request, "list", criteria_of(query)) as audit:
        page = await _page(services, request)
        audit.count = len(page.jobs)
    default = services.catalog.default_model
    view = operator_view if request.reach.across else summary_view
    views = [view(job, default, services.wait_reasons.of(job)) for job in page.jobs]
    return json_reply(200, JobList(views, page.cursor))


def criteria_of(query: JobsQuery | ClearJobsQuery | RetryQuery) -> dict[str, object]:
    """The query's filter by name, None for what it does not name; for the audit log."""
    return {name: getattr(query, name) for name in ("status", "model", "group", "dead")}


async def _page(services: Services, request: Request[JobsQuery]) -> Page:
    """The page of jobs that the query requests; raises InvalidQuery for an invalid cursor."""
    query, tenant, group = request.query, request.reach.tenant, request.query.group
    limit, cursor = query.limit, query.cursor
    wanted = Filter(
        tenant=tenant,
        statuses=frozenset([query.status]) if query.status else None,
        model=query.model,
        group=group,
        request_id=query.request_id,
        dead=query.dead,
    )
    if query.dead:
        return await services.dead_letters.jobs(wanted, limit=limit, cursor=cursor)
    if group is None or tenant is None:
        # A group without tenant is found by a filter: each tenant has its own list of a group.
        return await services.inspection.jobs(wanted, limit=limit, cursor=cursor)
    return await services.groups.jobs(tenant, group, wanted, limit=limit, cursor=cursor)


async def cancel_job(services: Services, request: Request[CancelJobQuery]) -> Reply:
    """Cancels a job, waiting or running; with `purge=true`, deletes one that has ended.

    Replies 202 if a running job has not stopped within a second, else 200 with the job, a deleted
    one as it was. Raises JobFinished or JobNotFinished, JobNotFound, JobExpired or
    RedisUnavailable.
    """
    purge, job_id = request.query.purge, request.path("id")
    verb = "purge" if purge else "cancel"
    async with audited(services, request, verb, {"job_id": job_id}) as audit:
        stored = await find_job(services, request)
        if purge:
            await _delete(services, stored)
        else:
            stored = await _cancel(services, request, stored)
        audit.count = 1
    return _job_reply(services, request, 200 if purge or stored.has_ended else 202, stored)


async def _cancel(
    services: Services, request: Request[CancelJobQuery], stored: StoredJob
) -> StoredJob:
    """Cancels the job and waits a second at most for a running one to stop. Returns the job as it
    is then, which may still be running. Raises JobFinished if it has ended otherwise, JobExpired or
    JobNotFound if it is gone."""
    if stored.has_ended:
        raise _already_finished_error(stored)
    verdict = await services.operations.cancel(stored)
    if verdict == "absent":
        raise job_absent_error(services, stored.job_id)
    if verdict == "stopping":
        stored = await _wait(services, request, stored, _CANCEL_WAIT_SECONDS)
    elif latest := await services.submissions.read(stored.job_id):
        stored = latest
    elif verdict == "cancelled":
        # Another call has purged the job at once.
        stored = msgspec.structs.replace(stored, status="cancelled")
    else:
        raise job_absent_error(services, stored.job_id)
    if verdict == "finished" or (stored.has_ended and stored.status != "cancelled"):
        raise _already_finished_error(stored)
    return stored


async def _delete(services: Services, stored: StoredJob) -> None:
    """Deletes a job with its data; one that is already gone counts as deleted. Raises
    JobNotFinished unless it has ended."""
    # The answer shows the job as it was read, so it must have ended by then. A job that is absent
    # now may have been deleted by this very call, if the first reply was lost.
    if not stored.has_ended or await services.operations.forget(stored) == "unfinished":
        raise JobNotFinished(
            "Only a job that has ended can be deleted; cancel it first, without `purge`.",
            job_id=stored.job_id,
        )


async def retry_job(services: Services, request: Request[JobQuery]) -> Reply:
    """Runs a failed or cancelled job again, under the same id.

    Replies 202. Raises JobNotRetryable, QueueFull, StorageFull, RedisUnavailable, JobNotFound or
    JobExpired.
    """
    async with audited(services, request, "retry", {"job_id": request.path("id")}) as audit:
        stored = await find_job(services, request)
        now_ms = jobs.now_ms()
        verdicts = await services.operations.retry_all([stored], now_ms)
        verdict = verdicts[stored.job_id]
        if verdict != "ok":
            raise not_retried_error(services, stored, verdict)
        audit.count = 1
    location = (b"location", url_of(stored.job_id).encode())
    view = accepted_view(stored.job_id, "pending", _waiting_for_again(services, stored, now_ms))
    return json_reply(202, view, location)


def _waiting_for_again(services: Services, stored: StoredJob, now_ms: int) -> WaitingForField:
    """Why the job waits in the round that was just opened; `stored` is the job as it was before."""
    record = stored.record and next_round(stored.record, now_ms)
    retried = msgspec.structs.replace(stored, status="pending", record=record)
    return services.wait_reasons.of(retried)


async def _wait(
    services: Services, request: Request[Any], stored: StoredJob, seconds: float
) -> StoredJob:
    """The job once it has ended, or as it is after `seconds`, when the API stops or the client has
    disconnected. Raises JobExpired or JobNotFound if it was deleted meanwhile, Unauthorized or
    Forbidden if its key is revoked, and RedisUnavailable."""
    latest = await while_client_stays(request, services.inbox.wait(stored, seconds))
    return latest or await find_job(services, request)


def _job_reply(services: Services, request: Request[Any], status: int, stored: StoredJob) -> Reply:
    """The reply that shows the job, without its result if the request acts across tenants;
    Retry-After while it has not ended."""
    view = _view(services, request, stored, services.wait_reasons.of(stored))
    if stored.has_ended:
        return json_reply(status, view)
    return json_reply(status, view, _retry_after(_RETRY_SECONDS))


def _view(
    services: Services, request: Request[Any], stored: StoredJob, waiting_for: WaitingForField
) -> Job:
    """The job as its tenant sees it, or an operator across tenants."""
    view_of = operator_view if request.reach.across else job_view
    return view_of(stored, services.catalog.default_model, waiting_for)


def _retry_after(seconds: int) -> Header:
    return (b"retry-after", b"%d" % seconds)


def _already_finished_error(stored: StoredJob) -> JobFinished:
    """Makes the error for cancelling a job that has ended."""
    return JobFinished(
        f"The job is already {stored.status}; only a waiting or running job can be cancelled.",
        job_id=stored.job_id,
    )

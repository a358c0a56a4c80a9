"""The routes about a job that is there: read, list, cancel, retry."""

import time
from typing import Any, Final

import msgspec

from asyncinfer import jobs
from asyncinfer.api.audit import audited
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.job_lookup import absent, find_job, not_retried
from asyncinfer.api.live.wait import while_client_stays
from asyncinfer.api.services import Services
from asyncinfer.api.views import (
    Waiting,
    accepted_view,
    ended,
    job_view,
    operator_view,
    summary_view,
    url_of,
)
from asyncinfer.errors import (
    JobFinished,
    JobNotFinished,
)
from asyncinfer.repository.inspect.listing import Page
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.stored_jobs import Stored, next_round
from asyncinfer.schemas.requests import (
    ClearQuery,
    EndQuery,
    JobsQuery,
    OneQuery,
    RetryQuery,
    WaitQuery,
)
from asyncinfer.schemas.responses import JobList

_RETRY_AFTER: Final = (b"retry-after", b"1")
_CANCEL_WAIT_SECONDS: Final = 1.0
"""A run stops at its next kernel, most often within this."""


async def read_job(services: Services, request: Request[WaitQuery]) -> Reply:
    """A job's state and result."""
    with audited(request, "read", {"job_id": request.path("id")}) as audit:
        stored = await find_job(services, request)
        if request.query.wait and not ended(stored):
            stored = await _wait(services, request, stored, request.query.wait)
        audit.count = 1
    return _job_reply(services, request, 200, stored)


async def list_jobs(services: Services, request: Request[JobsQuery]) -> Reply:
    """The caller's jobs, newest first."""
    query = request.query
    with audited(request, "list", chosen_by(query)) as audit:
        page = await _page(services, request)
        audit.count = len(page.jobs)
    default = services.catalog.default_model
    view = operator_view if request.reach.across else summary_view
    views = [view(job, default, services.reasons.of(job)) for job in page.jobs]
    return json_reply(200, JobList(views, page.cursor))


def chosen_by(query: JobsQuery | ClearQuery | RetryQuery) -> dict[str, object]:
    """The filter, for the log."""
    return {name: getattr(query, name) for name in ("status", "model", "group", "dead")}


async def _page(services: Services, request: Request[JobsQuery]) -> Page:
    query, tenant = request.query, request.reach.tenant
    if query.dead:
        wanted = Filter(
            tenant=tenant,
            statuses=frozenset([query.status] if query.status else jobs.STATUSES),
            model=query.model,
            group=query.group,
            dead=True,
        )
        return await services.dead_letters.jobs(wanted, limit=query.limit, cursor=query.cursor)
    about: dict[str, Any] = {
        name: getattr(query, name) for name in ("status", "model", "limit", "cursor")
    }
    if query.group is None or tenant is None:
        # A group's own list is kept by tenant.
        return await services.inspection.jobs(tenant=tenant, group=query.group, **about)
    return await services.groups.jobs(tenant, query.group, **about)


async def cancel_job(services: Services, request: Request[EndQuery]) -> Reply:
    """Cancels a job, waiting or running; with `purge=true`, deletes one that has ended."""
    purge, job_id = request.query.purge, request.path("id")
    with audited(request, "purge" if purge else "cancel", {"job_id": job_id}) as audit:
        stored = await find_job(services, request)
        if purge:
            await _forget(services, stored)
        else:
            stored = await _cancel(services, request, stored)
        audit.count = 1
    return _job_reply(services, request, 200 if purge or ended(stored) else 202, stored)


async def _cancel(services: Services, request: Request[EndQuery], stored: Stored) -> Stored:
    if ended(stored):
        raise _finished(stored)
    verdict = await services.operations.cancel(stored)
    if verdict == "absent":
        raise absent(services, stored.job_id)
    if verdict == "stopping":
        stored = await _wait(services, request, stored, _CANCEL_WAIT_SECONDS)
    elif latest := await services.submissions.read(stored.job_id):
        stored = latest
    elif verdict == "cancelled":
        # Purged at once by another call.
        stored = msgspec.structs.replace(stored, status="cancelled")
    else:
        raise absent(services, stored.job_id)
    if verdict == "finished" or (ended(stored) and stored.status != "cancelled"):
        raise _finished(stored)
    return stored


async def _forget(services: Services, stored: Stored) -> None:
    # The answer shows the job as it was read, so it must have ended by then. A job that is absent
    # now may have been deleted by this very call, its first reply lost.
    if not ended(stored) or await services.operations.forget(stored) == "unfinished":
        raise JobNotFinished(
            "Only a job that has ended can be deleted; cancel it first, without `purge`.",
            job_id=stored.job_id,
        )


async def retry_job(services: Services, request: Request[OneQuery]) -> Reply:
    """Runs a failed or cancelled job again, under the same id."""
    with audited(request, "retry", {"job_id": request.path("id")}) as audit:
        stored = await find_job(services, request)
        now_ms = time.time_ns() // 1_000_000
        verdicts = await services.operations.retry_all([stored], now_ms)
        verdict = verdicts[stored.job_id]
        if verdict != "ok":
            raise not_retried(services, stored, verdict)
        audit.count = 1
    location = (b"location", url_of(stored.job_id).encode())
    view = accepted_view(stored.job_id, "pending", _waits_again(services, stored, now_ms))
    return json_reply(202, view, location)


def _waits_again(services: Services, stored: Stored, now_ms: int) -> Waiting:
    record = stored.record and next_round(stored.record, now_ms)
    again = msgspec.structs.replace(stored, status="pending", record=record)
    return services.reasons.of(again)


async def _wait(
    services: Services, request: Request[Any], stored: Stored, seconds: float
) -> Stored:
    """The job once it has ended, or as it is when time is out or the API stops."""
    latest = await while_client_stays(request, services.inbox.wait(stored, seconds))
    if latest is None:
        raise absent(services, stored.job_id)
    return latest


def _job_reply(services: Services, request: Request[Any], status: int, stored: Stored) -> Reply:
    show = operator_view if request.reach.across else job_view
    view = show(stored, services.catalog.default_model, services.reasons.of(stored))
    return json_reply(status, view) if ended(stored) else json_reply(status, view, _RETRY_AFTER)


def _finished(stored: Stored) -> JobFinished:
    return JobFinished(
        f"The job is already {stored.status}; only one that waits or runs can be cancelled.",
        job_id=stored.job_id,
    )

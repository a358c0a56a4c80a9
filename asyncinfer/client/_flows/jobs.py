"""Reading jobs, and acting on them: one, several by their ids, or all that match."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from asyncinfer import jobs
from asyncinfer.client._answers import ClearedJobs, RefusedJob, RetriedJobs
from asyncinfer.client._flows.views import View, check_view
from asyncinfer.client._protocol import Flow, Request, T
from asyncinfer.client._requests import (
    RemoteServer,
    call,
    convert,
    fetch_json,
    get,
    path_part,
    query_text,
)
from asyncinfer.client._timeline import Timeline
from asyncinfer.errors import JobFinished, JobNotRetryable, RequestError
from asyncinfer.schemas.webhook_views import JobWebhook

MARGIN_SECONDS: Final = 15.0
"""How long an answer may take beyond the time that the server was told to wait."""
_PAGE_SIZE: Final = 1000
_STATUSES_OF_ALL_JOBS: Final = frozenset({401, 403, 503})
"""These concern the key or the server, and so all jobs."""


_Page = TypeVar("_Page", ClearedJobs, RetriedJobs)


class _JobPage(Struct, frozen=True):
    jobs: list[View]
    cursor: str | None = None


# --- one job -----------------------------------------------------------------------------------


def read_job(
    server: RemoteServer, job_id: str, wait_seconds: float = 0, tenant: str | None = None
) -> Flow[View]:
    """The view of a job as soon as it has ended, or as it is after `wait_seconds`.

    `tenant` names the tenant of a job that an operator reads. Raises JobNotFound and JobExpired.
    """
    wait = f"{wait_seconds:g}" if wait_seconds else None
    request = Request(
        method="GET",
        path=_job_path(job_id) + query_text({"wait": wait, "tenant": tenant}),
        timeout_seconds=wait_seconds + MARGIN_SECONDS,
    )
    return check_view(server, (yield from fetch_json(server, request)))


def read_timeline(server: RemoteServer, job_id: str, tenant: str | None = None) -> Flow[Timeline]:
    """What has happened to a job; raises JobNotFound and JobExpired."""
    answer = yield from get(server, f"{_job_path(job_id)}/timeline", tenant=tenant)
    return convert(server, answer, Timeline)


def cancel_job(server: RemoteServer, job_id: str, tenant: str | None = None) -> Flow[View]:
    """Cancels a job, and returns its view: cancelled, or still stopping. Raises JobFinished.

    If the first answer was lost and the retried cancel finds the job cancelled, that is success.
    """
    try:
        answer = yield from call(server, "DELETE", _job_path(job_id), {"tenant": tenant})
        return check_view(server, answer)
    except JobFinished as error:
        view = yield from read_job(server, job_id, tenant=tenant)
        if view["status"] != "cancelled":
            raise error from None
        return view


def retry_job(server: RemoteServer, job_id: str, tenant: str | None = None) -> Flow[View]:
    """Retries a job, and returns its view; raises JobNotRetryable for one that has not failed.

    A cancelled job can be retried too. If the first answer was lost and the second try finds the
    job retried, that is success.
    """
    try:
        answer = yield from call(server, "POST", f"{_job_path(job_id)}/retry", {"tenant": tenant})
        view = check_view(server, answer)
    except JobNotRetryable as error:
        view = yield from read_job(server, job_id, tenant=tenant)
        if view["status"] in jobs.TERMINAL or view.get("round", 1) == 1:
            raise error from None
    return {**view, "tenant": tenant} if tenant else view


def purge_job(server: RemoteServer, job_id: str, tenant: str | None = None) -> Flow[None]:
    """Deletes a job that has ended; raises JobNotFinished, JobNotFound and JobExpired."""
    yield from call(server, "DELETE", _job_path(job_id), {"purge": True, "tenant": tenant})


def read_webhook(server: RemoteServer, job_id: str, tenant: str | None) -> Flow[JobWebhook]:
    """The webhook of a job with its deliveries; raises WebhookNotFound, JobNotFound, JobExpired."""
    answer = yield from get(server, f"{_job_path(job_id)}/webhook", tenant=tenant)
    return convert(server, answer, JobWebhook)


def redeliver_webhook(
    server: RemoteServer, job_id: str, event: str | None, tenant: str | None
) -> Flow[JobWebhook]:
    """Starts a delivery of a job's webhook anew; raises as `read_webhook`, and WebhooksFull."""
    path = f"{_job_path(job_id)}/webhook/redeliver"
    answer = yield from call(server, "POST", path, {"event": event, "tenant": tenant})
    return convert(server, answer, JobWebhook)


def _job_path(job_id: str) -> str:
    """The path of a job; raises InvalidInput if it can be no id."""
    return f"/job/{path_part(job_id)}"


# --- many jobs ---------------------------------------------------------------------------------


def list_jobs(server: RemoteServer, limit: int, query: Mapping[str, Any]) -> Flow[list[View]]:
    """The views of jobs that match the query, the newest first, at most `limit`; no results."""
    views: list[View] = []
    cursor: str | None = None
    while len(views) < limit:
        answer = yield from get(
            server, "/jobs", **query, limit=min(_PAGE_SIZE, limit - len(views)), cursor=cursor
        )
        page = convert(server, answer, _JobPage)
        views += [check_view(server, view) for view in page.jobs]
        cursor = page.cursor
        if not cursor:
            break
    return views


def cancel_jobs(
    server: RemoteServer, ids: Sequence[str] | None, query: Mapping[str, Any]
) -> Flow[ClearedJobs]:
    """Cancels the jobs of `ids`, or all that match the query if `ids` is None.

    With `ids` only the query's `tenant` counts.
    """
    if ids is None:
        return (yield from _clear_all(server, query))
    views, refused = yield from _for_each(
        ids, lambda job_id: cancel_job(server, job_id, query["tenant"])
    )
    cancelled = sum(view["status"] == "cancelled" for view in views)
    return ClearedJobs(cancelled=cancelled, stopping=len(views) - cancelled, refused=refused)


def purge_jobs(
    server: RemoteServer, ids: Sequence[str] | None, query: Mapping[str, Any]
) -> Flow[ClearedJobs]:
    """Deletes the jobs of `ids`, or all that match the query; else as `cancel_jobs`."""
    if ids is None:
        return (yield from _clear_all(server, {**query, "purge": True}))
    purged, refused = yield from _for_each(
        ids, lambda job_id: purge_job(server, job_id, query["tenant"])
    )
    return ClearedJobs(cancelled=0, purged=len(purged), refused=refused)


def retry_jobs(
    server: RemoteServer, ids: Sequence[str] | None, query: Mapping[str, Any]
) -> Flow[RetriedJobs]:
    """Retries the jobs of `ids`, at most 1,000 a request, or all that match; as `cancel_jobs`."""
    if ids is None:
        pages = yield from _pages(server, "POST", "/jobs/retry", query, RetriedJobs)
    else:
        pages, listed = [], list(map(str, ids))
        for start in range(0, len(listed), _PAGE_SIZE):
            body = {"job_ids": listed[start : start + _PAGE_SIZE]}
            tenant = {"tenant": query["tenant"]}
            answer = yield from call(server, "POST", "/jobs/retry", tenant, body)
            pages.append(convert(server, answer, RetriedJobs))
    return RetriedJobs(
        retried=tuple(itertools.chain.from_iterable(page.retried for page in pages)),
        refused=tuple(itertools.chain.from_iterable(page.refused for page in pages)),
    )


def _clear_all(server: RemoteServer, query: Mapping[str, Any]) -> Flow[ClearedJobs]:
    """Cancels or deletes all jobs that match."""
    pages = yield from _pages(server, "DELETE", "/jobs", query, ClearedJobs)
    return ClearedJobs(
        cancelled=sum(page.cancelled for page in pages),
        stopping=sum(page.stopping for page in pages),
        purged=sum(page.purged for page in pages),
    )


def _pages(
    server: RemoteServer, method: str, path: str, query: Mapping[str, Any], kind: type[_Page]
) -> Flow[list[_Page]]:
    """The answers to a request that is repeated while the server has `more` to do.

    It also ends when a request has changed nothing.
    """
    pages: list[_Page] = []
    while True:
        answer = yield from call(server, method, path, query)
        pages.append(convert(server, answer, kind))
        if not (answer.get("more") and any(msgspec.structs.astuple(pages[-1]))):
            return pages


def _for_each(
    ids: Sequence[str], act: Callable[[str], Flow[T]]
) -> Flow[tuple[list[T], tuple[RefusedJob, ...]]]:
    """Acts on each job; returns what `act` does for those that it succeeds with, and the others.

    Raises an error that concerns all of them.
    """
    done: list[T] = []
    refused: list[RefusedJob] = []
    for job_id in ids:
        try:
            done.append((yield from act(job_id)))
        except RequestError as error:
            if error.status in _STATUSES_OF_ALL_JOBS:
                raise
            refused.append(RefusedJob(job_id, error.code, error.detail))
    return done, tuple(refused)

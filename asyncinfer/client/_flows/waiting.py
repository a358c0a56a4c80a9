"""Waiting for jobs, and the reason why they do not run."""

import time
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer import jobs
from asyncinfer.client._errors import WaitTimeout, retry_reason
from asyncinfer.client._flows.jobs import cancel_job, read_job
from asyncinfer.client._flows.views import JobView, View, has_outcome, outcome
from asyncinfer.client._protocol import Flow, Lost, Request, exchange
from asyncinfer.client._requests import (
    RETRYABLE_STATUSES,
    RemoteServer,
    convert,
    decode_json,
    query_text,
    with_client_headers,
)
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.errors import JobFinished

MAX_WAIT_SECONDS: Final = 30
"""The longest wait of one request; proxies cut silent connections, often after 60 s."""
_REASON_JOBS: Final = 32
"""Jobs that a request for a reason reads: mostly more than a map has in flight."""
_REASON_TIMEOUT_SECONDS: Final = 2.0
"""A request for the reason of a wait must not delay the awaited result."""


class _JobList(Struct, frozen=True):
    jobs: list[JobView]


def wait(
    server: RemoteServer, view: View, until: float, *, cancel_on_timeout: bool = False
) -> Flow[View]:
    """The view of a job once it has ended, with its result; at once if `view` shows that.

    Past `until`, on the monotonic clock, raises WaitTimeout, and cancels the job first if
    requested. Raises JobNotFound and JobExpired.
    """
    until = min(until, server.until)
    left = until - time.monotonic()
    while not has_outcome(view):
        seconds = round(min(MAX_WAIT_SECONDS, max(left, 0)), 3)
        view = yield from read_job(server, view["job_id"], seconds, view.get("tenant"))
        left = until - time.monotonic()
        if left <= 0 and view["status"] not in jobs.TERMINAL:
            return (yield from _time_out(server, view, cancel=cancel_on_timeout))
    return view


def result(
    server: RemoteServer, view: View, until: float, *, cancel_on_timeout: bool = False
) -> Flow[Any]:
    """Waits as `wait` does, and returns or raises as `outcome` does."""
    return outcome((yield from wait(server, view, until, cancel_on_timeout=cancel_on_timeout)))


def deadline(server: RemoteServer, timeout: float | None) -> float:
    """The end of a wait on the monotonic clock; not later than the client's own deadline.

    `timeout` is in seconds; None stands for the client's own timeout.
    """
    seconds = server.timeout_seconds if timeout is None else timeout
    return min(time.monotonic() + seconds, server.until)


def _time_out(server: RemoteServer, view: View, *, cancel: bool) -> Flow[View]:
    """Raises WaitTimeout, after a cancel if requested; returns the view if it has just ended."""
    job_id, what_now = view["job_id"], "it goes on: client.job(id) finds it again"
    if cancel:
        try:
            view = yield from cancel_job(server, job_id, view.get("tenant"))
        except JobFinished:
            return (yield from read_job(server, job_id, tenant=view.get("tenant")))
        what_now = "it was cancelled"
    reason = msgspec.convert(view, JobView).waiting_for
    why = f": {reason.message.rstrip('.')}" if reason else ""
    hint = "" if reason else ", or check whether there are workers: client.health()"
    raise WaitTimeout(
        f"Job {job_id} has not ended in time ({view['status']}{why}); {what_now}. Give a longer "
        f"timeout={hint}.",
        job_id=job_id,
        waiting_for=reason,
    )


def why_waiting(server: RemoteServer, group: str) -> Flow[WaitingFor | None]:
    """Why jobs of a group make no progress, from its newest ones that have not ended.

    None if nothing is wrong, or if it cannot be known. Sent once, without retries, for at most 2 s.
    A server that does not answer, or not now, is a reason too.
    """
    newest = yield from _list_once(server, group=group, limit=_REASON_JOBS)
    if isinstance(newest, list) and all(job.has_ended for job in newest):
        # Those of a map that was resumed may be older; finding them costs more.
        newest = yield from _list_once(server, group=group, status="pending", limit=1)
    if not isinstance(newest, list):
        return newest
    reasons = [job.waiting_for for job in newest if not job.has_ended]
    return next(filter(None, reasons), None)


def _list_once(server: RemoteServer, **query: Any) -> Flow[list[JobView] | WaitingFor | None]:
    """Jobs, or the reason why there is no answer; None if the server refuses to list them."""
    left = server.until - time.monotonic()
    request = Request(
        method="GET",
        path=f"/jobs{query_text(query)}",
        timeout_seconds=max(1.0, min(_REASON_TIMEOUT_SECONDS, left)),
    )
    reply = yield from exchange(with_client_headers(server, request))
    if isinstance(reply, Lost) or reply.status in RETRYABLE_STATUSES:
        return retry_reason(reply, server.url)
    if reply.status >= 400:
        # If anything is wrong, the request that waits raises it.
        return None
    return convert(server, decode_json(server, reply), _JobList).jobs

"""The routes for operators: queues, workers, and retries or cancels of many jobs at once."""

from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from asyncinfer import jobs
from asyncinfer.api.audit import audited
from asyncinfer.api.handlers.jobs import criteria_of
from asyncinfer.api.http.body import read_body
from asyncinfer.api.http.json_text import parse_problem
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.api.inputs.envelope import reject_input, reject_repeated_names
from asyncinfer.api.job_lookup import RETRYABLE, is_in_reach, job_absent_error, not_retried_error
from asyncinfer.api.services import Services
from asyncinfer.errors import InvalidJSON, InvalidQuery, RequestError
from asyncinfer.repository.inspect.selection import Filter, SelectedJobs
from asyncinfer.repository.stored_jobs import read_jobs_in
from asyncinfer.schemas.operations import QueueList, WorkerList, public_worker_name
from asyncinfer.schemas.requests import (
    MAX_JOBS_PER_CALL,
    ClearJobsQuery,
    NoQuery,
    RetryQuery,
    RetryRequest,
)
from asyncinfer.schemas.responses import ClearResult, RetryRefusal, RetryResult

_UNFINISHED: Final = frozenset({"pending", "processing"})

_decode_retry = msgspec.json.Decoder(RetryRequest).decode


async def list_queues(services: Services, request: Request[NoQuery]) -> Reply:
    """Every model's queue: its waiting and running jobs, throughput and workers."""
    return json_reply(200, QueueList(await services.statistics.queues()))


async def list_workers(services: Services, request: Request[NoQuery]) -> Reply:
    """The living workers and their state."""
    workers = await services.statistics.workers()
    shown = [
        msgspec.structs.replace(worker, worker=public_worker_name(worker.worker))
        for worker in workers
    ]
    return json_reply(200, WorkerList(shown))


async def retry_jobs(services: Services, request: Request[RetryQuery]) -> Reply:
    """Runs many failed or cancelled jobs again: those named in the body, or those of a filter.

    Replies with the ids that were retried, a reason for each other one, and whether the filter has
    more than the 1,000 jobs of one call. Raises InvalidQuery if neither names any, InvalidInput,
    InvalidJSON, RedisUnavailable, and as `read_body` does.
    """
    body = (await read_body(request, services.config)).content.strip()
    job_ids = _job_ids(body, request.query) if body else []
    job_filter = None if body else _retryable(request)
    criteria = {**criteria_of(request.query), "job_ids": len(job_ids)}
    refused: list[RetryRefusal] = []
    async with audited(services, request, "retry", criteria, of_many=True) as audit:
        if job_filter is None:
            selected, refused = await _jobs_by_id(services, request, job_ids)
        else:
            selected = await services.selection.jobs(job_filter, MAX_JOBS_PER_CALL)
        verdicts = await services.operations.retry_all(selected.jobs, jobs.now_ms())
        retried = [job_id for job_id, verdict in verdicts.items() if verdict == "ok"]
        audit.count = len(retried)
    refused += [
        _refusal(job.job_id, not_retried_error(services, job, verdicts[job.job_id]))
        for job in selected.jobs
        if verdicts[job.job_id] != "ok"
    ]
    return json_reply(200, RetryResult(retried, refused, selected.has_more))


async def clear_jobs(services: Services, request: Request[ClearJobsQuery]) -> Reply:
    """Cancels many waiting or running jobs; with `purge=true`, deletes many that have ended.

    Replies with how many were cancelled, are being stopped and were deleted, and whether the filter
    has more than the 1,000 jobs of one call. Raises InvalidQuery without a filter, or for a status
    that does not go with the act.
    """
    job_filter = _to_purge(request) if request.query.purge else _to_cancel(request)
    verb = "purge" if request.query.purge else "cancel"
    criteria = criteria_of(request.query)
    async with audited(services, request, verb, criteria, of_many=True) as audit:
        selected = await services.selection.jobs(job_filter, MAX_JOBS_PER_CALL)
        if request.query.purge:
            purged = await services.operations.forget_all(selected.jobs)
            cleared = ClearResult(0, 0, purged, selected.has_more)
        else:
            done = await services.operations.cancel_all(selected.jobs)
            cleared = ClearResult(done.ended, done.stopping, 0, selected.has_more)
        audit.count = cleared.cancelled + cleared.stopping + cleared.purged
    return json_reply(200, cleared)


# --- filters -------------------------------------------------------------------------------


def _retryable(request: Request[RetryQuery]) -> Filter:
    """The filter of the query, for failed and cancelled jobs if it names no status. Raises
    InvalidQuery if the query names no jobs."""
    query = request.query
    if not (query.status or query.model or query.group or query.dead):
        raise InvalidQuery(
            'Name the jobs to run again: in a body `{"job_ids": [...]}`, or with at least one of '
            "`status=failed`, `status=cancelled`, `model=`, `group=` and `dead=true`."
        )
    return _filter(request, [query.status] if query.status else RETRYABLE)


def _to_cancel(request: Request[ClearJobsQuery]) -> Filter:
    """The filter of the query, for unfinished jobs if it names no status. Raises InvalidQuery if
    the query names no jobs, or ended ones."""
    query = request.query
    _require_criterion(query)
    if query.dead or query.status not in (None, *_UNFINISHED):
        raise InvalidQuery(
            f"Jobs that are {'dead letters' if query.dead else query.status} have ended, so there "
            "is nothing to cancel; add `purge=true` to delete them with their data."
        )
    return _filter(request, [query.status] if query.status else _UNFINISHED)


def _to_purge(request: Request[ClearJobsQuery]) -> Filter:
    """The filter of the query, for all ended jobs if it names no status. Raises InvalidQuery if the
    query names no jobs, or unfinished ones."""
    query = request.query
    _require_criterion(query)
    if query.status in _UNFINISHED:
        raise InvalidQuery(
            f"A {query.status} job cannot be purged, only one that has ended; cancel such jobs "
            "first, without `purge`."
        )
    ended = jobs.TERMINAL if query.status in (None, "ended") else [query.status]
    return _filter(request, ended)


def _require_criterion(query: ClearJobsQuery) -> None:
    """Raises InvalidQuery if the query names no jobs at all."""
    if not (query.status or query.model or query.group or query.dead):
        raise InvalidQuery(
            "Name the jobs with at least one of `status=`, `model=`, `group=` and `dead=true`: "
            "`status` is pending or processing to cancel, and with `purge=true` completed, failed, "
            "cancelled or ended (any of these three)."
        )


def _filter(request: Request[Any], statuses: Iterable[str | None]) -> Filter:
    """The query's filter with these statuses in place of its own, of the tenant or tenants that the
    request is about."""
    query = request.query
    return Filter(
        tenant=request.reach.tenant,
        statuses=frozenset(status for status in statuses if status),
        model=query.model,
        group=query.group,
        dead=query.dead,
    )


# --- jobs by id ----------------------------------------------------------------------------


def _job_ids(body: bytes, query: RetryQuery) -> list[str]:
    """The ids in the body, without repetitions, as they are: they may name no job. Raises
    InvalidQuery if the query names jobs too, InvalidJSON or InvalidInput."""
    if query != RetryQuery(tenant=query.tenant):
        raise InvalidQuery(
            "A body names the jobs, so the query may have no other parameter than `tenant`; send "
            "either a body or a query."
        )
    body = body.removeprefix(BOM_UTF8)
    try:
        job_ids = list(dict.fromkeys(_decode_retry(body).job_ids))
        reject_repeated_names(body)
        return job_ids
    except msgspec.ValidationError as error:
        reject_input(fault_of(error, RetryRequest), error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJSON(
            f"The body is not JSON: {parse_problem(error, body)}. "
            'Send `{"job_ids": [...]}`, or a query instead.'
        ) from error


async def _jobs_by_id(
    services: Services, request: Request[RetryQuery], job_ids: Sequence[str]
) -> tuple[SelectedJobs, list[RetryRefusal]]:
    """Returns the jobs with these ids that the request may see, without results and errors, and a
    refusal for each of the others."""
    known = [job_id for job_id in job_ids if jobs.is_id(job_id)]
    states = await read_jobs_in(services.store, known, jobs.STATUSES)
    found = {job.job_id: job for job in states if is_in_reach(request, job)}
    refused = [
        _refusal(job_id, job_absent_error(services, job_id))
        for job_id in job_ids
        if job_id not in found
    ]
    return SelectedJobs(tuple(found.values()), has_more=False), refused


def _refusal(job_id: str, error: RequestError) -> RetryRefusal:
    return RetryRefusal(job_id, error.code, error.detail)

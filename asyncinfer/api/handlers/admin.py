"""The routes for operators: queues, workers, and retries or cancels of many jobs at once."""

import time
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

import msgspec

from asyncinfer import jobs
from asyncinfer.api.audit import audited
from asyncinfer.api.handlers.jobs import criteria_of
from asyncinfer.api.http.body import read_body
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.api.inputs.envelope import reject_input
from asyncinfer.api.job_lookup import RETRYABLE, is_in_reach, job_absent_error, not_retried_error
from asyncinfer.api.services import Services
from asyncinfer.errors import InvalidJSON, InvalidQuery
from asyncinfer.repository.inspect.selection import Filter, Selected
from asyncinfer.repository.stored_jobs import Stored, read_states
from asyncinfer.schemas.operations import QueueList, WorkerList, shown_worker
from asyncinfer.schemas.requests import (
    MOST_JOBS_A_CALL,
    ClearQuery,
    NoQuery,
    RetryQuery,
    RetryRequest,
)
from asyncinfer.schemas.responses import Cleared, Refused, Retried

_UNFINISHED: Final = frozenset({"pending", "processing"})

_decode_retry = msgspec.json.Decoder(RetryRequest).decode


async def list_queues(services: Services, request: Request[NoQuery]) -> Reply:
    """Every model's queue: its waiting and running jobs, throughput and workers."""
    return json_reply(200, QueueList(await services.observation.queues()))


async def list_workers(services: Services, request: Request[NoQuery]) -> Reply:
    """The living workers and their state."""
    workers = await services.observation.workers()
    shown = [
        msgspec.structs.replace(worker, worker=shown_worker(worker.worker)) for worker in workers
    ]
    return json_reply(200, WorkerList(shown))


async def retry_jobs(services: Services, request: Request[RetryQuery]) -> Reply:
    """Runs many failed or cancelled jobs again: those named in the body, or those of a filter."""
    body = (await read_body(request, services.config)).content.strip()
    job_ids = _job_ids(body, request.query) if body else []
    job_filter = None if body else _retryable(request)
    criteria = {**criteria_of(request.query), "job_ids": len(job_ids)}
    refused: list[Refused] = []
    with audited(request, "retry", criteria) as audit:
        if job_filter is None:
            selected, refused = await _jobs_by_id(services, request, job_ids)
        else:
            selected = await services.selection.jobs(job_filter, MOST_JOBS_A_CALL)
        verdicts = await services.operations.retry_all(selected.jobs, time.time_ns() // 1_000_000)
        retried = [job_id for job_id, verdict in verdicts.items() if verdict == "ok"]
        audit.count = len(retried)
    refused += [
        _refused_job(services, job, verdicts[job.job_id])
        for job in selected.jobs
        if verdicts[job.job_id] != "ok"
    ]
    return json_reply(200, Retried(retried, refused, selected.more))


async def clear_jobs(services: Services, request: Request[ClearQuery]) -> Reply:
    """Cancels many waiting or running jobs; with `purge=true`, deletes many that have ended."""
    job_filter = _to_purge(request) if request.query.purge else _to_cancel(request)
    verb = "purge" if request.query.purge else "cancel"
    with audited(request, verb, criteria_of(request.query)) as audit:
        selected = await services.selection.jobs(job_filter, MOST_JOBS_A_CALL)
        if request.query.purge:
            purged = await services.operations.forget_all(selected.jobs)
            cleared = Cleared(0, 0, purged, selected.more)
        else:
            done = await services.operations.cancel_all(selected.jobs)
            cleared = Cleared(done.ended, done.asked, 0, selected.more)
        audit.count = cleared.cancelled + cleared.stopping + cleared.purged
    return json_reply(200, cleared)


# --- filters -------------------------------------------------------------------------------


def _retryable(request: Request[RetryQuery]) -> Filter:
    query = request.query
    if not (query.status or query.model or query.group or query.dead):
        raise InvalidQuery(
            'Name the jobs to run again: in a body `{"job_ids": [...]}`, or with at least one of '
            "`status=failed`, `status=cancelled`, `model=`, `group=` and `dead=true`."
        )
    return _filter(request, [query.status] if query.status else RETRYABLE)


def _to_cancel(request: Request[ClearQuery]) -> Filter:
    query = request.query
    _require_criterion(query)
    if query.dead or query.status not in (None, *_UNFINISHED):
        raise InvalidQuery(
            f"Jobs that are {'dead letters' if query.dead else query.status} have ended, so there "
            "is nothing to cancel; add `purge=true` to delete them with their data."
        )
    return _filter(request, [query.status] if query.status else _UNFINISHED)


def _to_purge(request: Request[ClearQuery]) -> Filter:
    query = request.query
    _require_criterion(query)
    if query.status in _UNFINISHED:
        raise InvalidQuery(
            f"A {query.status} job cannot be purged, only one that has ended; cancel such jobs "
            "first, without `purge`."
        )
    ended = jobs.TERMINAL if query.status in (None, "ended") else [query.status]
    return _filter(request, ended)


def _require_criterion(query: ClearQuery) -> None:
    if not (query.status or query.model or query.group or query.dead):
        raise InvalidQuery(
            "Name the jobs with at least one of `status=`, `model=`, `group=` and `dead=true`: "
            "`status` is pending or processing to cancel, and with `purge=true` completed, failed, "
            "cancelled or ended (any of these three)."
        )


def _filter(request: Request[Any], statuses: Iterable[str | None]) -> Filter:
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
    """The ids in the body, without repetitions; raises InvalidQuery, InvalidJSON or
    InvalidInput."""
    if query != RetryQuery(tenant=query.tenant):
        raise InvalidQuery(
            "A body names the jobs, so the query may have no other parameter than `tenant`; send "
            "either a body or a query."
        )
    try:
        return list(dict.fromkeys(_decode_retry(body.removeprefix(BOM_UTF8)).job_ids))
    except msgspec.ValidationError as error:
        reject_input(fault_of(error, RetryRequest), error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _reject_json(error)


def _reject_json(error: Exception) -> NoReturn:
    raise InvalidJSON(
        f'The body is not JSON ({error}); send `{{"job_ids": [...]}}`, or a query instead.'
    ) from error


async def _jobs_by_id(
    services: Services, request: Request[RetryQuery], job_ids: Sequence[str]
) -> tuple[Selected, list[Refused]]:
    """The jobs with these ids that the request may see, and a refusal for each of the others."""
    known = [job_id for job_id in job_ids if jobs.is_id(job_id)]
    states = await read_states(services.store, known, jobs.STATUSES)
    found = {job.job_id: job for job in states if is_in_reach(request, job)}
    refused = [_absent_job(services, job_id) for job_id in job_ids if job_id not in found]
    return Selected(tuple(found.values()), more=False), refused


def _absent_job(services: Services, job_id: str) -> Refused:
    error = job_absent_error(services, job_id)
    return Refused(job_id, error.code, error.detail)


def _refused_job(services: Services, job: Stored, verdict: str) -> Refused:
    error = not_retried_error(services, job, verdict)
    return Refused(job.job_id, error.code, error.detail)

"""The routes of who keeps it running: queues and workers seen, and many jobs acted on at once."""

import time
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

import msgspec

from asyncinfer import jobs
from asyncinfer.api.audit import audited
from asyncinfer.api.handlers.jobs import chosen_by
from asyncinfer.api.http.body import read_body
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.api.inputs.envelope import refuse
from asyncinfer.api.job_lookup import RETRYABLE, absent, is_meant, not_retried
from asyncinfer.api.services import Services
from asyncinfer.errors import InvalidJSON, InvalidQuery
from asyncinfer.repository.inspect.filter import Filter
from asyncinfer.repository.inspect.selection import Selected
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
    """Every model's queue: what waits, runs and moves, and who works on it."""
    return json_reply(200, QueueList(await services.observation.queues()))


async def list_workers(services: Services, request: Request[NoQuery]) -> Reply:
    """The living workers, and what each says of itself."""
    found = await services.observation.workers()
    shown = [msgspec.structs.replace(one, worker=shown_worker(one.worker)) for one in found]
    return json_reply(200, WorkerList(shown))


async def retry_jobs(services: Services, request: Request[RetryQuery]) -> Reply:
    """Runs many failed or cancelled jobs again: those named, or those that a filter means."""
    body = (await read_body(request, services.config)).content.strip()
    job_ids = _job_ids(body, request.query) if body else []
    wanted = None if body else _retryable(request)
    chosen = {**chosen_by(request.query), "job_ids": len(job_ids)}
    refused: list[Refused] = []
    with audited(request, "retry", chosen) as audit:
        if wanted is None:
            selected, refused = await _named(services, request, job_ids)
        else:
            selected = await services.selection.jobs(wanted, MOST_JOBS_A_CALL)
        verdicts = await services.operation.retry(selected.jobs, time.time_ns() // 1_000_000)
        retried = [job_id for job_id, verdict in verdicts.items() if verdict == "ok"]
        audit.count = len(retried)
    refused += [
        _refused(services, job, verdicts[job.job_id])
        for job in selected.jobs
        if verdicts[job.job_id] != "ok"
    ]
    return json_reply(200, Retried(retried, refused, selected.more))


async def clear_jobs(services: Services, request: Request[ClearQuery]) -> Reply:
    """Cancels many jobs that wait or run; with `purge=true`, deletes many that have ended."""
    wanted = _to_purge(request) if request.query.purge else _to_cancel(request)
    verb = "purge" if request.query.purge else "cancel"
    with audited(request, verb, chosen_by(request.query)) as audit:
        selected = await services.selection.jobs(wanted, MOST_JOBS_A_CALL)
        if request.query.purge:
            purged = await services.operation.forget(selected.jobs)
            cleared = Cleared(0, 0, purged, selected.more)
        else:
            done = await services.operation.cancel(selected.jobs)
            cleared = Cleared(done.ended, done.asked, 0, selected.more)
        audit.count = cleared.cancelled + cleared.stopping + cleared.purged
    return json_reply(200, cleared)


# --- which jobs ----------------------------------------------------------------------------


def _retryable(request: Request[RetryQuery]) -> Filter:
    query = request.query
    if not (query.status or query.model or query.group or query.dead):
        raise InvalidQuery(
            'Say which jobs run again: a body `{"job_ids": [...]}`, or at least one of '
            "`status=failed`, `status=cancelled`, `model=`, `group=` and `dead=true`."
        )
    return _filter(request, [query.status] if query.status else RETRYABLE)


def _to_cancel(request: Request[ClearQuery]) -> Filter:
    query = request.query
    _check_some(query)
    if query.dead or query.status not in (None, *_UNFINISHED):
        raise InvalidQuery(
            f"Jobs that are {'dead letters' if query.dead else query.status} have ended, so there "
            "is nothing to cancel; add `purge=true` to delete them with their data."
        )
    return _filter(request, [query.status] if query.status else _UNFINISHED)


def _to_purge(request: Request[ClearQuery]) -> Filter:
    query = request.query
    _check_some(query)
    if query.status in _UNFINISHED:
        raise InvalidQuery(
            f"A job that is {query.status} cannot be purged, only one that has ended; cancel such "
            "jobs first, without `purge`."
        )
    ended = jobs.TERMINAL if query.status in (None, "ended") else [query.status]
    return _filter(request, ended)


def _check_some(query: ClearQuery) -> None:
    if not (query.status or query.model or query.group or query.dead):
        raise InvalidQuery(
            "Say which jobs, with at least one of `status=`, `model=`, `group=` and `dead=true`: "
            "`status` is pending or processing to cancel, and with `purge=true` completed, failed, "
            "cancelled or ended (any of these three)."
        )


def _filter(request: Request[Any], statuses: Iterable[str | None]) -> Filter:
    query = request.query
    return Filter(
        tenant=request.reach.tenant,
        statuses=frozenset(one for one in statuses if one),
        model=query.model,
        group=query.group,
        dead=query.dead,
    )


# --- jobs by name --------------------------------------------------------------------------


def _job_ids(body: bytes, query: RetryQuery) -> list[str]:
    if query != RetryQuery(tenant=query.tenant):
        raise InvalidQuery(
            "A body names the jobs, so the query must have nothing but `tenant`; send either of "
            "the two."
        )
    try:
        return list(dict.fromkeys(_decode_retry(body.removeprefix(BOM_UTF8)).job_ids))
    except msgspec.ValidationError as error:
        refuse(fault_of(error, RetryRequest), error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _refuse_json(error)


def _refuse_json(error: Exception) -> NoReturn:
    raise InvalidJSON(
        f'The body is not JSON ({error}); send `{{"job_ids": [...]}}`, or a query instead.'
    ) from error


async def _named(
    services: Services, request: Request[RetryQuery], job_ids: Sequence[str]
) -> tuple[Selected, list[Refused]]:
    """The caller's among them, and what to say of the others."""
    known = [job_id for job_id in job_ids if jobs.is_id(job_id)]
    states = await read_states(services.store, known, jobs.STATUSES)
    found = {job.job_id: job for job in states if is_meant(request, job)}
    refused = [_absent(services, job_id) for job_id in job_ids if job_id not in found]
    return Selected(tuple(found.values()), more=False), refused


def _absent(services: Services, job_id: str) -> Refused:
    error = absent(services, job_id)
    return Refused(job_id, error.code, error.detail)


def _refused(services: Services, job: Stored, verdict: str) -> Refused:
    error = not_retried(services, job, verdict)
    return Refused(job.job_id, error.code, error.detail)

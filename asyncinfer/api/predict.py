"""POST /predict: an input becomes a job."""

import hashlib
import re
import time
from typing import Any, Final

import msgspec

from asyncinfer import jobs
from asyncinfer.api.exchange import Reply, Request, json_reply
from asyncinfer.api.inputs import Input, read_input
from asyncinfer.api.jobs import absent
from asyncinfer.api.results import Form, result_reply, wanted_form
from asyncinfer.api.services import Services
from asyncinfer.api.views import accepted_view, ended, job_view, url_of
from asyncinfer.api.waiting import while_client_stays
from asyncinfer.errors import (
    IdempotencyConflict,
    InvalidHeader,
    NotAcceptable,
    QueueFull,
    RedisUnavailable,
    StorageFull,
)
from asyncinfer.repository.submit import NewJob, Stored, Submitted
from asyncinfer.schemas import MAX_WAIT_SECONDS, AskedOptions

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_FULL_RETRY_SECONDS: Final = 5


async def predict(services: Services, request: Request[AskedOptions]) -> Reply:
    """Stores an input as a job of a model."""
    wait_seconds = preferred_wait(request)
    key = idempotency_key(request)
    served = await services.catalog.find(request.path("model"))
    # Nothing here holds the body on: a large one would be in memory twice while its job waits.
    job = _new_job(
        request.tenant, served.queue, await read_input(request, services.config, served), key
    )
    if wait_seconds is None:
        return await _submitted_reply(services, await _submit(services, job))
    form = _form(request, job)
    stored, job_id = await _submit_and_wait(services, request, job, wait_seconds)
    return _waited_reply(services, stored, job_id, wait_seconds, form)


def preferred_wait(request: Request[Any]) -> int | None:
    """N of `Prefer: wait=N` (RFC 7240); None when there is none. The first one counts."""
    for line in request.header_lines(b"prefer"):
        for preference in line.split(","):
            name, _, value = preference.partition(";")[0].partition("=")
            if name.strip().lower() == "wait":
                return _wait_seconds(value.strip().strip('"'))
    return None


def idempotency_key(request: Request[Any]) -> str | None:
    key = request.header(b"idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidHeader("Idempotency-Key takes 1 to 255 visible ASCII characters.")
    return key


def _wait_seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > MAX_WAIT_SECONDS:
        raise InvalidHeader(
            f"Prefer: wait takes whole seconds from 0 to {MAX_WAIT_SECONDS}. For a longer wait "
            "ask GET /job/{id}?wait= again."
        )
    return int(text)


def _form(request: Request[Any], job: NewJob) -> Form:
    """What to answer a wait with: the job as JSON, or its result in a binary form."""
    form = wanted_form(request.header(b"accept")) or "json"
    if form != "json" and job.record.answer == "json":
        raise NotAcceptable(
            "The result of `data` is JSON; submit `inputs` to have binary tensors, or ask with "
            "`Accept: application/json`."
        )
    return form


def _new_job(tenant: str, queue: str, asked: Input, key: str | None) -> NewJob:
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


async def _submit(services: Services, job: NewJob) -> Submitted:
    try:
        submitted = await services.submissions.submit(job)
    except RedisUnavailable as error:
        raise RedisUnavailable(
            "Redis did not answer in time, so the job may or may not have been accepted. Look at "
            f"{url_of(job.job_id)}, or send it again with the same Idempotency-Key.",
            retry_after_seconds=error.retry_after_seconds,
            job_id=job.job_id,
        ) from error
    except StorageFull as error:
        # Refused whole: there is no job to name.
        raise StorageFull(error.detail, retry_after_seconds=_FULL_RETRY_SECONDS) from error
    if submitted.verdict == "full":
        raise _queue_full(services)
    if submitted.verdict == "dup" and submitted.fingerprint != job.fingerprint:
        raise IdempotencyConflict(
            f"This Idempotency-Key belongs to job {submitted.job_id}, which had another model, "
            "other options or other data. Use a new key for a new request.",
            job_id=submitted.job_id,
        )
    return submitted


def _queue_full(services: Services) -> QueueFull:
    policy = services.config.policy
    return QueueFull(
        f"The model's queue holds all it may ({policy.max_queue} jobs, {policy.max_queue_bytes} "
        "bytes). Retry later, start more workers, or raise MAX_QUEUE or MAX_QUEUE_BYTES.",
        retry_after_seconds=_FULL_RETRY_SECONDS,
    )


async def _submitted_reply(services: Services, submitted: Submitted) -> Reply:
    status: jobs.Status = "pending"
    if submitted.verdict == "dup":
        status = (await _earlier(services, submitted.job_id)).status
    return _accepted_reply(submitted.job_id, status)


async def _submit_and_wait(
    services: Services, request: Request[Any], job: NewJob, seconds: int
) -> tuple[Stored | None, str]:
    """The job as it is after at most `seconds`, and its id; None when that is not known."""
    with services.inbox.expect(job.job_id) as ticket:
        job = msgspec.structs.replace(job, inbox=services.inbox.name)
        submitted = await _submit(services, job)
        if submitted.verdict == "dup":
            earlier = await _earlier(services, submitted.job_id)
            waiting = services.inbox.wait(earlier, seconds)
        elif stored := await ticket.soon(seconds):
            return stored, submitted.job_id
        else:
            waiting = ticket.wait(seconds)
        try:
            stored = await while_client_stays(request, waiting)
        except RedisUnavailable:
            # The job is accepted whatever becomes of the wait, and its client must know its id.
            stored = None
    return stored, submitted.job_id


async def _earlier(services: Services, job_id: str) -> Stored:
    """The job that an Idempotency-Key stands for."""
    stored = await services.submissions.read(job_id)
    if stored is None:
        raise absent(services, job_id)
    return stored


def _waited_reply(
    services: Services, stored: Stored | None, job_id: str, seconds: int, form: Form
) -> Reply:
    applied = (b"preference-applied", b"wait=%d" % seconds)
    if stored is None or not ended(stored):
        return _accepted_reply(job_id, stored.status if stored else "pending", applied)
    location = (b"location", url_of(job_id).encode())
    if form != "json":
        return result_reply(stored, form, None, location, applied)
    return json_reply(200, job_view(stored, services.catalog.default_model), location, applied)


def _accepted_reply(job_id: str, status: jobs.Status, *headers: tuple[bytes, bytes]) -> Reply:
    location = (b"location", url_of(job_id).encode())
    return json_reply(202, accepted_view(job_id, status), location, *headers)

"""POST /predict: submits an input as a job."""

from functools import partial
from typing import Any

from msgspec.structs import replace

from asyncinfer import jobs
from asyncinfer.api.bulk.reader import predict_lines
from asyncinfer.api.group_closing import close_group, group_to_close
from asyncinfer.api.handlers.results import ResultForm, requested_form, result_reply
from asyncinfer.api.http.body import is_bulk
from asyncinfer.api.http.byte_budget import SMALL_BODY_BYTES
from asyncinfer.api.http.messages import Header, Reply, Request, Stream, json_reply
from asyncinfer.api.http.server_span import in_server_span
from asyncinfer.api.inputs.envelope import IDEMPOTENCY_KEY
from asyncinfer.api.inputs.new_job import (
    explain_submit_error,
    job_head,
    job_of,
    refused_submit_error,
)
from asyncinfer.api.inputs.request_input import options_of, read_and_parse
from asyncinfer.api.job_lookup import job_absent_error
from asyncinfer.api.live.inbox import Ticket
from asyncinfer.api.live.wait import preferred_wait, while_client_stays
from asyncinfer.api.services import Services
from asyncinfer.api.views import accepted_view, job_view, url_of
from asyncinfer.errors import (
    Forbidden,
    InvalidHeader,
    NotAcceptable,
    RedisUnavailable,
    RequestError,
    StorageFull,
    Unauthorized,
)
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.repository.submissions import NewJob, SubmitReply, with_job_id
from asyncinfer.schemas.requests import SubmitQuery
from asyncinfer.telemetry.trace_context import sampled_context


async def predict(services: Services, request: Request[SubmitQuery]) -> Reply | Stream:
    """Submits an input as a job of a model, or many inputs as jobs, one per line.

    Replies 202 with the job's id, or with `Prefer: wait=N` 200 with the job if it ends in time and
    there is room for a large result; NDJSON is answered with a stream of lines. Raises the errors
    that the route table lists.
    """
    tracing = services.config.tracing
    if tracing is None:
        request.trace = sampled_context(request.headers)
        return await _predict(services, request)
    return await in_server_span(tracing, request, partial(_predict, services, request))


async def _predict(services: Services, request: Request[SubmitQuery]) -> Reply | Stream:
    """`predict` within its span, if it has one."""
    if is_bulk(request.headers.get(b"content-type")):
        return await predict_lines(services, request)
    wait_seconds = preferred_wait(request)
    key = idempotency_key(request)
    served = await services.catalog.find(request.path("model"))
    max_ttl_seconds = services.config.max_ttl_seconds
    options = options_of(request.query)
    head = job_head(request, options, served, key, max_ttl_seconds, services.webhook_checks)
    # No local variable keeps the body: a large one would be in memory twice while its job waits.
    job = await read_and_parse(request, services.config, services.long_reads, partial(job_of, head))
    if closes_group := request.query.close:
        group_to_close(job.record.options)
    if wait_seconds is None:
        submitted = await _submit(services, job, closes_group=closes_group)
        return await _submitted_reply(services, job, submitted)
    form = _requested_form(request, job)
    record = job.record
    with services.inbox.expect(job.job_id) as ticket:
        watched_job = replace(job, inbox=services.inbox.name)
        submitted = await _submit(services, watched_job, closes_group=closes_group)
        # The body is stored, and would else be in memory for as long as its client waits.
        del job, watched_job
        request.release_body()
        stored = await _wait(services, request, submitted, ticket, wait_seconds)
    applied = (b"preference-applied", b"wait=%d" % wait_seconds)
    if stored and stored.has_ended:
        reply = _ended_reply(services, stored, form, applied)
        if len(reply.body) <= SMALL_BODY_BYTES:
            return reply
        if reservation := request.downloads.try_reserve(len(reply.body)):
            return replace(reply, reservation=reservation)
        # The client reads the job by its id; that request waits for room without the result.
    status = stored.status if stored else "pending"
    record = (stored and stored.record) or record
    return accepted_reply(services, submitted.job_id, status, record, applied)


def idempotency_key(request: Request[Any]) -> str | None:
    """The Idempotency-Key header, None without one; raises InvalidHeader if it is malformed."""
    key = request.header(b"idempotency-key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidHeader("Idempotency-Key takes 1 to 255 visible ASCII characters.")
    return key


def _requested_form(request: Request[Any], job: NewJob) -> ResultForm:
    """The form of the answer after a wait: the job as JSON, or its result in a binary form. Raises
    NotAcceptable if the job's result will be JSON only. An `Accept` that allows no form means
    JSON."""
    form = requested_form(request.header(b"accept")) or "json"
    if form != "json" and job.record.answer == "json":
        raise NotAcceptable(
            "The result of `data` is JSON; submit `inputs` to get binary tensors, or use "
            "`Accept: application/json`."
        )
    return form


async def _submit(services: Services, job: NewJob, *, closes_group: bool) -> SubmitReply:
    """Submits the job, then closes its group if it `closes_group`; raises why it was not accepted
    (GroupClosed, QueueFull, StorageFull, IdempotencyConflict or RedisUnavailable), or with its id
    why the group was not closed. The result names the earlier job if this is a repetition."""
    try:
        submitted = await services.submissions.submit(job)
    except (RedisUnavailable, StorageFull) as error:
        raise explain_submit_error(error, job) from error
    if refusal := refused_submit_error(
        submitted, job, services.config.policy, services.wait_reasons, services.queue_looks
    ):
        raise refusal
    if closes_group:
        group = group_to_close(job.record.options)
        try:
            await close_group(services, job.record.tenant, group)
        except RequestError as error:
            raise with_job_id(error, submitted.job_id) from error
    return submitted


async def _submitted_reply(services: Services, job: NewJob, submitted: SubmitReply) -> Reply:
    """The 202 of a job that was just submitted, or of the earlier one that it repeats, as that is
    now. Raises JobNotFound or JobExpired if that one is gone."""
    status: jobs.Status = "pending"
    record = job.record
    if submitted.verdict == "dup":
        existing = await _existing_job(services, submitted.job_id)
        status, record = existing.status, existing.record or record
    return accepted_reply(services, submitted.job_id, status, record)


async def _wait(
    services: Services,
    request: Request[Any],
    submitted: SubmitReply,
    ticket: Ticket,
    seconds: int,
) -> StoredJob | None:
    """Returns the submitted job, or the earlier one that it repeats, as it is when it has ended or
    after `seconds`. None if the client has disconnected or Redis fails. Raises Unauthorized or
    Forbidden with the job's id if the key is revoked; for a repetition also JobNotFound or
    JobExpired."""
    ticket.was_stored = True
    if submitted.verdict == "dup":
        existing = await _existing_job(services, submitted.job_id)
        waiting = services.inbox.wait(existing, seconds)
    elif stored := await ticket.wait_briefly(seconds):
        return stored
    else:
        waiting = ticket.wait(seconds)
    try:
        return await while_client_stays(request, waiting)
    except RedisUnavailable:
        # The job was accepted even if the wait fails, and the client needs its id.
        return None
    except (Unauthorized, Forbidden) as error:
        raise with_job_id(error, submitted.job_id) from None


async def _existing_job(services: Services, job_id: str) -> StoredJob:
    """The job that was submitted earlier with this Idempotency-Key; raises JobNotFound or
    JobExpired if it is gone."""
    stored = await services.submissions.read(job_id)
    if stored is None:
        raise job_absent_error(services, job_id)
    return stored


def _ended_reply(services: Services, stored: StoredJob, form: ResultForm, applied: Header) -> Reply:
    """The 200 of a job that has ended: the whole job as JSON, or its result alone in a binary form,
    which raises as `result_reply` does."""
    location = (b"location", url_of(stored.job_id).encode())
    if form != "json":
        return result_reply(stored, form, None, location, applied)
    return json_reply(200, job_view(stored, services.catalog.default_model), location, applied)


def accepted_reply(
    services: Services, job_id: str, status: jobs.Status, record: jobs.Record, *headers: Header
) -> Reply:
    """The 202 of a job; `record` says why it waits, and when it will have ended."""
    location = (b"location", url_of(job_id).encode())
    view = accepted_view(job_id, status, services.wait_reasons.of_record(record, status))
    if status in jobs.TERMINAL:
        return json_reply(202, view, location, *headers)
    seconds = services.queue_looks.submit_seconds(record) if status == "pending" else 1
    return json_reply(202, view, location, (b"retry-after", b"%d" % seconds), *headers)

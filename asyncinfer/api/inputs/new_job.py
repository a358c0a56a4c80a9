"""The job of a checked input, and the errors if it cannot be submitted."""

import hashlib
from typing import Final

import msgspec
from msgspec import Struct

from asyncinfer import jobs
from asyncinfer.api.catalog import Served
from asyncinfer.api.http.body import Body
from asyncinfer.api.http.messages import Request
from asyncinfer.api.inputs.request_input import Input, check_query_options, input_of
from asyncinfer.api.queue_looks import QueueLooks
from asyncinfer.api.views import url_of
from asyncinfer.api.wait_reasons import WaitReasons
from asyncinfer.errors import (
    GroupClosed,
    IdempotencyConflict,
    KeptFull,
    QueueFull,
    RedisRefused,
    RedisUnavailable,
    RequestError,
    StorageFull,
    WebhooksFull,
)
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.submissions import NewJob, SubmitReply, with_job_id
from asyncinfer.schemas.requests import RequestOptions, SubmitQuery
from asyncinfer.schemas.responses import WaitingFor
from asyncinfer.webhooks.checks import WebhookChecks

_STORAGE_FULL_RETRY_SECONDS: Final = 5
_WEBHOOKS_FULL_RETRY_SECONDS: Final = 5
"""The same for all: room comes when a receiver answers 2xx, and no one knows which will. When the
next try is due says nothing, since most tries fail where so many are to be delivered."""
_KEPT_FULL_RETRY_SECONDS: Final = 30
"""Half a minute: kept bytes are counted by the minute in which they expire."""


class JobHead(Struct, frozen=True):
    """What the head of a request says of its job, checked."""

    tenant: str
    served: Served
    options: RequestOptions
    """Those of the query."""
    key: str | None
    """The client's Idempotency-Key."""
    request_id: str
    trace: jobs.TraceContext | None
    """The span that submits the job."""
    max_ttl_seconds: int
    webhook_checks: WebhookChecks


def job_head(
    request: Request[SubmitQuery],
    options: RequestOptions,
    served: Served,
    key: str | None,
    max_ttl_seconds: int,
    webhook_checks: WebhookChecks,
) -> JobHead:
    """Checks the options of the query; raises InvalidQuery as `check_query_options`."""
    check_query_options(options, max_ttl_seconds)
    return JobHead(
        request.tenant,
        served,
        options,
        key,
        request.request_id,
        request.trace,
        max_ttl_seconds,
        webhook_checks,
    )


def job_of(head: JobHead, body: Body) -> NewJob:
    """The job of a request whose body was read; stores nothing. Raises a RequestError if the input
    does not fit the model. Takes milliseconds for a long body."""
    checked = input_of(body, head.options, head.served, head.max_ttl_seconds)
    check_webhook(head.webhook_checks, head.tenant, checked.options)
    return new_job(
        head.tenant,
        head.served.queue,
        checked,
        head.key,
        request_id=head.request_id,
        trace=head.trace,
    )


def check_webhook(webhook_checks: WebhookChecks, tenant: str, options: jobs.Options) -> None:
    """Raises WebhookRefused if the options have a webhook whose URL is not allowed, or that needs a
    secret which its tenant does not have for its host."""
    if options.webhook:
        webhook_checks.check(options.webhook.url, tenant)


def new_job(
    tenant: str,
    queue: str,
    checked: Input,
    key: str | None,
    *,
    request_id: str,
    trace: jobs.TraceContext | None,
) -> NewJob:
    """Makes a job with a new id, created now; stores nothing. `key` is the client's
    Idempotency-Key, which is kept as a digest with the tenant; `trace` is the span that submits
    it."""
    now_ms = jobs.now_ms()
    record = jobs.Record(
        schema=jobs.SCHEMA,
        queue=queue,
        model=checked.signature.model,
        tenant=tenant,
        created_ms=now_ms,
        version=checked.options.version,
        payload=checked.payload,
        options=checked.options,
        answer=checked.answer,
        outputs=checked.outputs,
        request_id=request_id,
        idempotency_digest="" if key is None else _digest(tenant.encode(), key.encode()),
        trace=trace,
    )
    job = NewJob(jobs.new_id(now_ms), queue, checked.content, record)
    if key is None:
        return job
    return msgspec.structs.replace(job, fingerprint=_digest(*checked.fingerprint_parts()))


def _digest(*parts: bytes) -> str:
    """The SHA-256 of the parts in hex digits, with zero bytes between them."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def explain_submit_error(error: RequestError, job: NewJob) -> RequestError:
    """A copy of the error of a submit, with a message that says what the client can do."""
    if isinstance(error, RedisRefused) and error.job_id:
        return type(error)(
            f"{error.detail} The job may have been accepted in part: look at "
            f"{url_of(job.job_id)}, or send it again with the same Idempotency-Key once that is "
            "fixed.",
            retry_after_seconds=error.retry_after_seconds,
            job_id=job.job_id,
        )
    if isinstance(error, RedisUnavailable) and error.job_id:
        return RedisUnavailable(
            "Redis did not answer in time, so the job may or may not have been accepted. Look at "
            f"{url_of(job.job_id)}, or send it again with the same Idempotency-Key.",
            retry_after_seconds=error.retry_after_seconds,
            job_id=job.job_id,
        )
    if isinstance(error, StorageFull):
        # Without a job id: nothing of the job was stored.
        return StorageFull(error.detail, retry_after_seconds=_STORAGE_FULL_RETRY_SECONDS)
    # A copy: as the cause of itself it would keep the job in memory, as a cycle.
    return with_job_id(error, error.job_id)


def queue_full_error(policy: Policy, reason: WaitingFor | None, room_seconds: int) -> QueueFull:
    """Makes the error for a full queue. It says why nothing leaves the queue, if that is known
    (`reason`), since more workers would not help against a pause. `room_seconds` is when to try
    again."""
    remedy = "Retry later, start more workers, or raise MAX_QUEUE or MAX_QUEUE_BYTES."
    return QueueFull(
        f"The model's queue is full ({policy.max_queue} jobs, {policy.max_queue_bytes} "
        f"bytes). {reason.message if reason else remedy}",
        retry_after_seconds=room_seconds,
    )


def group_closed_error(group: str | None) -> GroupClosed:
    """Makes the error for a job of a closed group."""
    return GroupClosed(
        f"The group {group} is closed and takes no more jobs. Submit the job to another group; a "
        "failed job of this one may be retried by its id."
    )


def kept_full_error(policy: Policy) -> KeptFull:
    """Makes the error for a queue whose ended jobs keep as much as they may."""
    return KeptFull(
        f"Ended jobs of the model's queue keep {policy.max_kept_bytes} bytes of results and inputs "
        "until they expire, and may keep no more. Delete jobs that are no longer needed (DELETE "
        "/jobs?purge=true&status=ended) and submit with a lower ttl_seconds, or ask the operator "
        "for a lower JOB_TTL and FAILED_TTL, or a higher MAX_KEPT_BYTES.",
        retry_after_seconds=_KEPT_FULL_RETRY_SECONDS,
    )


def webhooks_full_error(policy: Policy) -> WebhooksFull:
    """Makes the error for a queue that has as many webhooks to deliver as it may."""
    return WebhooksFull(
        f"The model's queue has {policy.max_webhooks} webhooks, or {policy.max_webhook_bytes} "
        "bytes of them, to tell once their jobs have ended. Retry later or submit without a "
        "webhook, or ask the operator which receivers fail (asyncinfer webhooks), or for a higher "
        "MAX_WEBHOOKS or MAX_WEBHOOK_BYTES.",
        retry_after_seconds=_WEBHOOKS_FULL_RETRY_SECONDS,
    )


def refused_submit_error(
    submitted: SubmitReply,
    job: NewJob,
    policy: Policy,
    wait_reasons: WaitReasons,
    queue_looks: QueueLooks,
) -> RequestError | None:
    """Returns why a job was not accepted: GroupClosed, QueueFull, KeptFull, WebhooksFull or
    IdempotencyConflict; None if it was accepted, now or earlier."""
    if submitted.verdict == "closed":
        return group_closed_error(job.record.options.group)
    if submitted.verdict == "webhooks_full":
        return webhooks_full_error(policy)
    if submitted.verdict == "kept_full":
        return kept_full_error(policy)
    if submitted.verdict == "full":
        room_seconds = queue_looks.room_seconds(job.record)
        return queue_full_error(policy, wait_reasons.of_queue(job.record), room_seconds)
    if submitted.verdict == "dup" and submitted.fingerprint != job.fingerprint:
        return IdempotencyConflict(
            f"This Idempotency-Key belongs to job {submitted.job_id}, which had another model, "
            "other options or other data. Use a new key for a new request.",
            job_id=submitted.job_id,
        )
    return None

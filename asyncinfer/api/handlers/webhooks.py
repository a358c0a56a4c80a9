"""The routes to see the deliveries of webhooks, and to start them anew."""

from collections.abc import Iterable
from typing import Any, NoReturn
from urllib.parse import urlsplit

from asyncinfer import jobs
from asyncinfer.api.audit import audited
from asyncinfer.api.group_lookup import group_not_found_error, group_of
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.inputs.new_job import webhooks_full_error
from asyncinfer.api.job_lookup import find_job
from asyncinfer.api.services import Services
from asyncinfer.errors import InvalidQuery, WebhookNotFound
from asyncinfer.repository.deliveries import Attempt
from asyncinfer.repository.inspect.webhooks import (
    DeliveryFilter,
    FoundDelivery,
    HostDeliveries,
    host_of,
)
from asyncinfer.repository.outbox import Restart, StoredDelivery
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.schemas.requests import (
    MAX_JOBS_PER_CALL,
    JobQuery,
    NoQuery,
    RedeliverJobQuery,
    RedeliverQuery,
    WebhooksQuery,
)
from asyncinfer.schemas.webhook_views import (
    GroupWebhook,
    JobWebhook,
    RedeliverResult,
    WebhookAttempt,
    WebhookDelivery,
    WebhookHost,
    WebhookList,
)
from asyncinfer.untrusted import decoding


async def read_webhook(services: Services, request: Request[JobQuery]) -> Reply:
    """What became of a job's webhook: its deliveries, with their attempts and the next one.

    Raises WebhookNotFound for a job without one, JobNotFound, JobExpired or RedisUnavailable.
    """
    async with audited(services, request, "read", {"job_id": request.path("id")}) as audit:
        stored = await find_job(services, request)
        view = await _job_webhook(services, request, stored)
        audit.count = 1
    return json_reply(200, view)


async def redeliver_webhook(services: Services, request: Request[RedeliverJobQuery]) -> Reply:
    """Starts the tries of a job's last delivery anew, or of the last one of an event: it is due at
    once.

    Replies 202 with the webhook. Raises WebhookNotFound if there is none, WebhooksFull,
    JobNotFound, JobExpired or RedisUnavailable.
    """
    async with audited(services, request, "redeliver", {"job_id": request.path("id")}) as audit:
        stored = await find_job(services, request)
        verdict = await services.outbox.redeliver(stored, request.query.event, now_ms=jobs.now_ms())
        if verdict == "webhooks_full":
            raise webhooks_full_error(services.config.policy)
        if verdict == "absent":
            _raise_absent(stored)
        view = await _job_webhook(services, request, stored)
        audit.count = 1
    return json_reply(202, view)


async def read_group_webhook(services: Services, request: Request[NoQuery]) -> Reply:
    """What became of a group's webhook: its delivery, with its attempts and the next one.

    Raises WebhookNotFound for a group without one, GroupNotFound or RedisUnavailable.
    """
    return json_reply(200, await _group_webhook(services, request))


async def redeliver_group_webhook(services: Services, request: Request[NoQuery]) -> Reply:
    """Starts the tries of a group's delivery anew: it is due at once.

    Replies 202 with the webhook. Raises WebhookNotFound if there is none, WebhooksFull,
    GroupNotFound or RedisUnavailable.
    """
    await _group_webhook(services, request)
    verdict = await services.closed_groups.redeliver(
        request.tenant, group_of(request), now_ms=jobs.now_ms()
    )
    if verdict == "webhooks_full":
        raise webhooks_full_error(services.config.policy)
    if verdict == "absent":
        raise WebhookNotFound(
            "The group has jobs that have not ended, so its webhook is not delivered yet."
        )
    return json_reply(202, await _group_webhook(services, request))


async def list_webhooks(services: Services, request: Request[WebhooksQuery]) -> Reply:
    """The hosts that the caller's webhooks go to, those with most failures first, in pages.

    Raises InvalidQuery for what is no cursor, and RedisUnavailable.
    """
    async with audited(services, request, "list", {}):
        found = await services.webhook_inspection.hosts(request.reach.tenant, request.query.cursor)
    return json_reply(200, WebhookList([_host(one) for one in found.hosts], found.cursor))


async def redeliver_webhooks(services: Services, request: Request[RedeliverQuery]) -> Reply:
    """Starts many deliveries anew: those that a filter selects of the ones that were given up, or
    whose last try failed.

    Replies with how many, and a cursor while there may be others. Raises InvalidQuery without a
    filter or for what is no cursor, and RedisUnavailable.
    """
    query = request.query
    if not (query.host or query.model or query.given_up):
        raise InvalidQuery(
            "Name the deliveries with at least one of `host=`, `model=` and `given_up=true`."
        )
    criteria = {"host": query.host, "model": query.model, "given_up": query.given_up}
    wanted = DeliveryFilter(
        tenant=request.reach.tenant,
        host=query.host and query.host.lower(),
        model=query.model,
        only_given_up=query.given_up,
    )
    async with audited(services, request, "redeliver", criteria, of_many=True) as audit:
        found = await services.webhook_inspection.failing(wanted, MAX_JOBS_PER_CALL, query.cursor)
        verdicts = await _redeliver_all(services, found.deliveries)
        audit.count = verdicts.count("ok")
    refused = verdicts.count("webhooks_full")
    return json_reply(200, RedeliverResult(audit.count, refused, found.cursor))


async def _redeliver_all(services: Services, found: Iterable[FoundDelivery]) -> list[str]:
    now_ms = jobs.now_ms()
    by_queue: dict[str, list[Restart]] = {}
    for one in found:
        restart = Restart(one.member, one.target, one.packed_state)
        by_queue.setdefault(one.queue, []).append(restart)
    verdicts: list[str] = []
    for queue, restarts in by_queue.items():
        verdicts += await services.outbox.redeliver_all(queue, restarts, now_ms=now_ms)
    return verdicts


async def _job_webhook(services: Services, request: Request[Any], stored: StoredJob) -> JobWebhook:
    """The webhook of a job; without the parts of its URL that may be secret if the request acts
    across tenants. Raises WebhookNotFound for a job without one."""
    webhook = stored.webhook
    if webhook is None:
        _raise_absent(stored)
    kept = await services.outbox.state_of(stored)
    url = webhook.url
    return JobWebhook(
        job_id=stored.job_id,
        url=_origin(url) if request.reach.across else url,
        events=list(webhook.events),
        deliveries=[_delivery(one) for one in kept.deliveries],
    )


async def _group_webhook(services: Services, request: Request[NoQuery]) -> GroupWebhook:
    """The webhook of a group. Raises GroupNotFound, or WebhookNotFound for a group without one."""
    group = group_of(request)
    kept = await services.closed_groups.webhook(request.tenant, group)
    if kept is None:
        raise group_not_found_error()
    if kept.target is None:
        raise WebhookNotFound(
            "The group was not closed with a webhook; POST /group/{group}/close may give it one."
        )
    deliveries = [_delivery(one) for one in kept.deliveries]
    return GroupWebhook(group=group, url=kept.target.url, deliveries=deliveries)


def _raise_absent(stored: StoredJob) -> NoReturn:
    """Raises WebhookNotFound."""
    detail = (
        "The job was submitted without a webhook."
        if stored.webhook is None
        else "No end of the job that its webhook is told of has occurred, or is remembered."
    )
    raise WebhookNotFound(detail, job_id=stored.job_id)


def _origin(url: str) -> str | None:
    """Scheme and host of a URL; None if it has none."""
    host = host_of(url)
    try:
        return f"{urlsplit(url).scheme}://{host}"
    except ValueError:
        return None


def _delivery(stored: StoredDelivery) -> WebhookDelivery:
    state = stored.state
    is_open = stored.due_ms is not None
    return WebhookDelivery(
        webhook_id=stored.member.webhook_id,
        round=stored.member.round,
        event=stored.member.event,
        status="pending" if is_open else state.outcome or "given_up",
        tries=state.tries,
        next_at=decoding.time(stored.due_ms),
        attempts=[_attempt(one) for one in state.attempts],
    )


def _attempt(one: Attempt) -> WebhookAttempt:
    return WebhookAttempt(
        at=decoding.time(one.at_ms),
        status=one.status or None,
        error=one.error or None,
        seconds=one.duration_ms / 1000,
    )


def _host(found: HostDeliveries) -> WebhookHost:
    last = found.last_attempt
    return WebhookHost(
        host=found.host,
        pending=found.open,
        failing=found.failing,
        given_up=found.given_up,
        last_status=(last and last.status) or None,
        last_error=(last and last.error) or None,
        last_at=decoding.time(last.at_ms if last else None),
        next_at=decoding.time(found.next_ms),
    )

"""Groups, and the operation of the service."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from asyncinfer.client._answers import (
    AuditLog,
    ClearedJobs,
    GroupView,
    Health,
    PausedState,
    RedeliveredWebhooks,
)
from asyncinfer.client._protocol import Flow
from asyncinfer.client._requests import RemoteServer, call, convert, get, path_part
from asyncinfer.schemas.operations import (
    AuditEntry,
    AuditList,
    Queue,
    QueueList,
    Worker,
    WorkerList,
)
from asyncinfer.schemas.webhook_views import GroupWebhook, RedeliverResult, WebhookHost, WebhookList

_PAGE_SIZE: Final = 1000
_MAX_PAGES: Final = 1000
"""The most pages of webhooks that are read, each of some 10,000 deliveries."""
_NEVER: Final = datetime.fromtimestamp(0, UTC)


def group(server: RemoteServer, name: str) -> Flow[dict[str, Any]]:
    """The view of a group, which was found to be a GroupView; raises GroupNotFound."""
    view: dict[str, Any] = yield from get(server, f"/group/{path_part(name)}")
    convert(server, view, GroupView)
    return view


def cancel_group(server: RemoteServer, name: str) -> Flow[ClearedJobs]:
    """Cancels the unfinished jobs of a group."""
    answer = yield from call(server, "DELETE", f"/group/{path_part(name)}", {})
    return convert(server, answer, ClearedJobs)


def close_group(
    server: RemoteServer, name: str, webhook: str | Mapping[str, Any] | None = None
) -> Flow[None]:
    """Closes a group, so that it takes no more jobs; raises GroupNotFound, or with a webhook the
    error with which the server refuses that."""
    given = {"url": webhook} if isinstance(webhook, str) else webhook
    body = None if given is None else {"webhook": dict(given)}
    yield from call(server, "POST", f"/group/{path_part(name)}/close", {}, body)


def group_webhook(server: RemoteServer, name: str) -> Flow[GroupWebhook]:
    """The webhook of a group with its delivery; raises WebhookNotFound and GroupNotFound."""
    answer = yield from get(server, f"/group/{path_part(name)}/webhook")
    return convert(server, answer, GroupWebhook)


def redeliver_group_webhook(server: RemoteServer, name: str) -> Flow[GroupWebhook]:
    """Starts the delivery of a webhook anew; raises as `group_webhook`, and WebhooksFull."""
    answer = yield from call(server, "POST", f"/group/{path_part(name)}/webhook/redeliver", {})
    return convert(server, answer, GroupWebhook)


def health(server: RemoteServer) -> Flow[Health]:
    """The state of the server; raises RedisUnavailable."""
    return convert(server, (yield from get(server, "/health")), Health)


def queues(server: RemoteServer) -> Flow[list[Queue]]:
    """The queues of all models."""
    return convert(server, (yield from get(server, "/queues")), QueueList).queues


def workers(server: RemoteServer) -> Flow[list[Worker]]:
    """The living workers."""
    return convert(server, (yield from get(server, "/workers")), WorkerList).workers


def audit(server: RemoteServer, limit: int, query: Mapping[str, Any]) -> Flow[AuditLog]:
    """The entries of the audit log that match the query, the newest first, at most `limit`."""
    entries: list[AuditEntry] = []
    unreadable = 0
    cursor: str | None = None
    while len(entries) < limit:
        size = min(_PAGE_SIZE, limit - len(entries))
        answer = yield from get(server, "/audit", **query, limit=size, cursor=cursor)
        page = convert(server, answer, AuditList)
        entries += page.entries
        unreadable += page.unreadable
        cursor = page.cursor
        if not cursor:
            break
    return AuditLog(entries=tuple(entries), unreadable=unreadable)


def webhooks(server: RemoteServer, tenant: str | None) -> Flow[list[WebhookHost]]:
    """The hosts that webhooks go to, those with most failures first."""
    hosts: dict[str, WebhookHost] = {}
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        answer = yield from get(server, "/webhooks", tenant=tenant, cursor=cursor)
        page = convert(server, answer, WebhookList)
        for one in page.hosts:
            hosts[one.host] = _sum_up(hosts[one.host], one) if one.host in hosts else one
        cursor = page.cursor
        if not cursor:
            break
    return sorted(
        hosts.values(), key=lambda one: (-one.failing - one.given_up, -one.pending, one.host)
    )


def _sum_up(first: WebhookHost, second: WebhookHost) -> WebhookHost:
    """A host of which two pages each have a part of the deliveries."""
    last = max((first, second), key=lambda one: one.last_at or _NEVER)
    nexts = [one.next_at for one in (first, second) if one.next_at]
    return msgspec.structs.replace(
        last,
        pending=first.pending + second.pending,
        failing=first.failing + second.failing,
        given_up=first.given_up + second.given_up,
        next_at=min(nexts, default=None),
    )


def redeliver_webhooks(server: RemoteServer, query: Mapping[str, Any]) -> Flow[RedeliveredWebhooks]:
    """Starts the deliveries that match the query anew, some 1,000 a request: one pass through all,
    so that one which fails at once is not started again and again."""
    redelivered = refused = 0
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        answer = yield from call(server, "POST", "/webhooks/redeliver", {**query, "cursor": cursor})
        page = convert(server, answer, RedeliverResult)
        redelivered += page.redelivered
        refused += page.refused
        cursor = page.cursor
        if not cursor:
            break
    return RedeliveredWebhooks(redelivered=redelivered, refused=refused)


def set_paused(server: RemoteServer, name: str, paused: bool) -> Flow[PausedState]:
    """Pauses a model, or resumes it. Raises ModelNotFound."""
    verb = "pause" if paused else "resume"
    answer = yield from call(server, "POST", f"/models/{path_part(name)}/{verb}", {})
    return convert(server, answer, PausedState)


def cancel_queue(server: RemoteServer, name: str) -> Flow[ClearedJobs]:
    """Cancels the waiting jobs of a model, of all tenants. Raises ModelNotFound."""
    answer = yield from call(server, "POST", f"/models/{path_part(name)}/cancel", {})
    return convert(server, answer, ClearedJobs)

"""The routes about groups of jobs: progress and cancelling."""

from codecs import BOM_UTF8
from typing import Final

import msgspec

from asyncinfer.api import group_closing
from asyncinfer.api.audit import audited
from asyncinfer.api.group_lookup import group_not_found_error, group_of
from asyncinfer.api.http.body import read_body
from asyncinfer.api.http.json_text import parse_problem
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.api.inputs.envelope import check_metadata, reject_input, reject_repeated_members
from asyncinfer.api.queue_looks import RUNS_ON
from asyncinfer.api.services import Services
from asyncinfer.errors import BodyTooLarge, InvalidJSON
from asyncinfer.jobs import now_ms
from asyncinfer.repository.deliveries import Target
from asyncinfer.repository.inspect.groups import GroupTally
from asyncinfer.schemas.requests import CloseGroupRequest, NoQuery
from asyncinfer.schemas.responses import (
    Group,
    GroupCancelResult,
    GroupCloseResult,
    GroupCounts,
    to_datetime,
)

_NO_JOBS: Final = GroupTally(jobs=0, by_status={}, first_failed=[], created_ms=None)
_MAX_CLOSE_BYTES: Final = 64 << 10
"""More than any webhook needs, and read in a moment."""

_decode_close = msgspec.json.Decoder(CloseGroupRequest).decode


async def read_group(services: Services, request: Request[NoQuery]) -> Reply:
    """How many jobs of a group have each status, and when all will probably have ended.

    Raises GroupNotFound or RedisUnavailable.
    """
    group = group_of(request)
    counted = await services.groups.count(request.tenant, group)
    if counted is None:
        raise group_not_found_error()
    return json_reply(200, await group_view(services, group, counted))


async def close_group(services: Services, request: Request[NoQuery]) -> Reply:
    """Lets no more jobs join a group; a webhook in the body is delivered once all have ended.

    Does nothing if it is closed already, unless it had no webhook. Raises GroupNotFound,
    GroupClosed for another webhook, TooManyGroups, WebhooksFull, WebhookRefused, InvalidInput,
    InvalidJSON, RedisUnavailable, and as `read_body` does.
    """
    group = group_of(request)
    body = (await read_body(request, services.config)).content.strip()
    target = _target(body, request.tenant) if body else None
    if target:
        services.webhook_checks.check(target.url, request.tenant)
    await group_closing.close_group(services, request.tenant, group, target)
    return json_reply(200, GroupCloseResult(group))


def _target(body: bytes, tenant: str) -> Target | None:
    """Where the webhook in the body goes, None without one; its URL is not checked. Raises
    BodyTooLarge, InvalidInput or InvalidJSON."""
    if len(body) > _MAX_CLOSE_BYTES:
        raise BodyTooLarge(f"The body to close a group may have {_MAX_CLOSE_BYTES} bytes.")
    body = body.removeprefix(BOM_UTF8)
    try:
        webhook = _decode_close(body).webhook
        reject_repeated_members(body)
    except msgspec.ValidationError as error:
        reject_input(fault_of(error, CloseGroupRequest), error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJSON(
            f"The body is not JSON: {parse_problem(error, body)}. "
            'Send `{"webhook": {"url": "https://..."}}`, or nothing.'
        ) from error
    if webhook is None:
        return None
    check_metadata(webhook.metadata, "/webhook/metadata")
    return Target(webhook.url, tenant, metadata=webhook.metadata)


async def cancel_group(services: Services, request: Request[NoQuery]) -> Reply:
    """Cancels all waiting and running jobs of a group.

    Replies with how many were cancelled and how many are being stopped. Raises GroupNotFound or
    RedisUnavailable.
    """
    group = request.path("group")
    async with audited(services, request, "cancel", {"group": group}, of_many=True) as audit:
        group = group_of(request)
        done = await services.groups.cancel(request.tenant, group)
        if done is None:
            raise group_not_found_error()
        audit.count = done.ended + done.stopping
    return json_reply(200, GroupCancelResult(group, done.ended, done.stopping))


async def group_view(services: Services, group: str, counted: GroupTally | None) -> Group:
    """The group with its counts; an unknown group (None) has zeros. `progress` is the ended share,
    from 0 to 1."""
    counted = counted or _NO_JOBS
    by_status = {name: counted.by_status.get(name, 0) for name in GroupCounts.__struct_fields__}
    by_status["expired"] = counted.expired
    done = counted.jobs - counted.unfinished
    return Group(
        group=group,
        jobs=counted.jobs,
        counts=GroupCounts(**by_status),
        progress=done / counted.jobs if counted.jobs else 0.0,
        eta_seconds=await _eta_seconds(services, counted),
        created_at=to_datetime(counted.created_ms) or None,
        first_failed=counted.first_failed,
        closed=counted.is_closed,
        ended_at=to_datetime(counted.ended_ms) or None,
    )


async def _eta_seconds(services: Services, counted: GroupTally) -> float | None:
    """Seconds until all jobs have ended, as the look at its queue tells of the last one that waits,
    else at the pace of the group; None if that is not known, and while nothing runs."""
    last = counted.last_waiting
    if last and last.status == "pending":
        reason = services.wait_reasons.of(last) or None
        seen = await services.queue_looks.of(last, reason)
        if seen.eta_seconds is not None:
            return round(seen.eta_seconds, 3)
        if seen.position and (seen.stall or (reason and reason.code not in RUNS_ON)):
            return None
    return _eta_by_pace(counted, now_ms())


def _eta_by_pace(counted: GroupTally, now_ms: float) -> float | None:
    """Seconds until all jobs have ended, at the average pace since the first job was created: 0 if
    all have ended, None while none has or there are none. `now_ms` is Unix time."""
    done = counted.jobs - counted.unfinished
    if not counted.unfinished:
        return 0.0 if counted.jobs else None
    if not done or counted.created_ms is None:
        return None
    return round(max(0.0, now_ms - counted.created_ms) / 1000 / done * counted.unfinished, 3)

"""The routes about groups of jobs: progress and cancelling."""

import re
from typing import Any, Final

from asyncinfer.api.audit import audited
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.errors import GroupNotFound
from asyncinfer.jobs import GROUP_PATTERN, now_ms
from asyncinfer.repository.inspect.groups import GroupTally
from asyncinfer.schemas.requests import NoQuery
from asyncinfer.schemas.responses import Group, GroupCancelResult, GroupCounts, to_datetime

_NO_JOBS: Final = GroupTally(jobs=0, by_status={}, first_failed=[], created_ms=None)
_name = re.compile(GROUP_PATTERN)


async def read_group(services: Services, request: Request[NoQuery]) -> Reply:
    """How many jobs of a group have each status, and when all will probably have ended.

    Raises GroupNotFound or RedisUnavailable.
    """
    group = _group(request)
    counted = await services.groups.count(request.tenant, group)
    if counted is None:
        raise _not_found_error()
    return json_reply(200, group_view(group, counted))


async def cancel_group(services: Services, request: Request[NoQuery]) -> Reply:
    """Cancels all waiting and running jobs of a group.

    Replies with how many were cancelled and how many are being stopped. Raises GroupNotFound or
    RedisUnavailable.
    """
    group = request.path("group")
    async with audited(services, request, "cancel", {"group": group}, of_many=True) as audit:
        group = _group(request)
        done = await services.groups.cancel(request.tenant, group)
        if done is None:
            raise _not_found_error()
        audit.count = done.ended + done.stopping
    return json_reply(200, GroupCancelResult(group, done.ended, done.stopping))


def group_view(group: str, counted: GroupTally | None) -> Group:
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
        eta_seconds=eta_seconds(counted, now_ms()),
        created_at=to_datetime(counted.created_ms) or None,
        first_failed=counted.first_failed,
    )


def eta_seconds(counted: GroupTally, now_ms: float) -> float | None:
    """Seconds until all jobs have ended, at the average pace since the first job was created: 0 if
    all have ended, None while none has or there are none. `now_ms` is Unix time."""
    done = counted.jobs - counted.unfinished
    if not counted.unfinished:
        return 0.0 if counted.jobs else None
    if not done or counted.created_ms is None:
        return None
    return round(max(0.0, now_ms - counted.created_ms) / 1000 / done * counted.unfinished, 3)


def _group(request: Request[Any]) -> str:
    """The group in the path; raises GroupNotFound if no group can have such a name."""
    group = request.path("group") or ""
    if not _name.fullmatch(group):
        raise _not_found_error()
    return group


def _not_found_error() -> GroupNotFound:
    return GroupNotFound(
        "There is no group of this name; a group is created when a job is submitted with "
        "`options.group`, and kept for 7 days after its last submit."
    )

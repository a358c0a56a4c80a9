"""Closed groups: they take no more jobs, and those with a webhook are followed until all ended."""

import asyncio
import logging
import random
from datetime import UTC, datetime
from typing import Any, Final, Literal, cast

import msgspec
from msgspec import Struct

from asyncinfer.errors import RedisUnavailable, StorageFull
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import Member, Target, delivered_round, read_target
from asyncinfer.repository.outbox import Outbox, RedeliverVerdict, StoredDelivery
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.scripts import Script, script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.schemas.webhooks import EndedCounts, EndedGroup, GroupEvent
from asyncinfer.untrusted import decoding

MAX_CLOSING: Final = 10_000
"""Closed groups that are followed at a time."""
LOOK_SECONDS: Final = 1.0
"""How long after a look a group whose next job has not ended is looked at again, and each process
asks whether any group is due."""
_GROUPS_PER_CALL: Final = 100
_JOBS_PER_CALL: Final = 1000
"""Bounds of one script call, so that it occupies the server for a millisecond at most."""
_KEPT_SECONDS: Final = 7 * 24 * 3600
"""How long a delivery is kept once it is done: as the group itself."""

_ID_PREFIX: Final = "group"
"""Of what stands for a group's digest where deliveries have the id of a job."""

_DAMAGED_TIME: Final = datetime.fromtimestamp(0, UTC)

CloseVerdict = Literal["closed", "absent", "other", "full", "tenant_full", "webhooks_full"]

_limited_log = LimitedLog(logging.getLogger(__name__))


class CountedGroup(Struct, frozen=True, kw_only=True):
    """A closed group whose jobs have all ended, as Redis holds it."""

    digest: str
    closed_ms: str
    name: str
    target: Target | None
    """Where its webhook goes; None if another program has damaged it."""
    ended_ms: int
    """When it was first found that all have ended: the same in each call."""
    counts: EndedCounts

    @property
    def delivery(self) -> Member:
        """The name of its delivery in the outbox. The round tells this close from a later one of
        the same name."""
        round_number = delivered_round(decoding.whole_number(self.closed_ms.encode()) or 0)
        return Member(_ID_PREFIX + self.digest, round_number, "ended")


class GroupWebhook(Struct, frozen=True):
    """What Redis has of a group's webhook."""

    target: Target | None
    """None: the group has none."""
    deliveries: tuple[StoredDelivery, ...]


class ClosedGroups:
    """Closes groups, and follows those with a webhook."""

    def __init__(self, store: Store, *, max_closing: int = MAX_CLOSING) -> None:
        self._store = store
        self._max_closing = max_closing
        self._outbox = Outbox(store)

    async def close(self, tenant: str, name: str, target: Target | None = None) -> CloseVerdict:
        """Lets no more jobs join a group; once all have ended, its webhook goes to `target`, unless
        that is None. Raises as `Store.call` does.

        `closed`: now or before. `absent`: there is no such group. `other`: it was closed with
        another target. `full`: as many groups are followed as may be. `tenant_full`: the tenant
        has as many of them as are left for all. `webhooks_full`: there is no room for another
        webhook.
        """
        arguments = {
            "digest": keys.group_digest(tenant, name),
            "max_closing": self._max_closing,
            "tenant": tenant,
            "name": name,
            "webhook": target.text if target else "",
            "bytes": target.reserved_bytes if target else 0,
            **self._store.policy.webhook_arguments(),
        }
        reply = await self._call(script("close_group"), arguments)
        return cast(CloseVerdict, reply.decode())

    async def is_closed(self, tenant: str, name: str) -> bool:
        """Whether a group takes no more jobs. Raises RedisUnavailable."""
        closed = keys.closed_group(self._store.queue_name, tenant, name)
        return bool(await self._store.command("EXISTS", closed))

    async def webhook(self, tenant: str, name: str) -> GroupWebhook | None:
        """What became of the webhook of a group so far; None if there is no such group. Raises
        RedisUnavailable."""
        queue = self._store.queue_name
        closed = keys.closed_group(queue, tenant, name)
        target = read_target(await self._store.read("HGET", closed, "webhook", otherwise=None))
        if target is None and not await self._store.command(
            "EXISTS", closed, keys.group(queue, tenant, name)
        ):
            return None
        kept = await self._outbox.state_in(queue, _delivered_id(tenant, name))
        return GroupWebhook(target, kept.deliveries)

    async def redeliver(self, tenant: str, name: str, *, now_ms: int) -> RedeliverVerdict:
        """Starts the tries of the delivery of a group's webhook anew, as `Outbox.redeliver` does
        those of a job."""
        delivered_id = _delivered_id(tenant, name)
        return await self._outbox.redeliver_in(self._store.queue_name, delivered_id, now_ms=now_ms)

    async def count_ended(self) -> tuple[list[CountedGroup], bool]:
        """Counts on in the groups that are due, at most 1,000 jobs. Returns the groups whose jobs
        have all ended, which `end` then ends, and whether more can be counted at once."""
        reply = await self._call(
            script("count_ended"),
            {
                "max_groups": _GROUPS_PER_CALL,
                "max_jobs": _JOBS_PER_CALL,
                "look_ms": int(LOOK_SECONDS * 1000),
            },
        )
        return [_parse_counted(*fields) for fields in reply[1:]], bool(reply[0])

    async def end(self, group: CountedGroup) -> bool:
        """Puts the webhook of a group into the outbox and notes that the group has ended; whether
        this call noted it, and no other before. A delivery that is there already is not made
        again, so a process may die between the two."""
        if group.target is not None:
            body = _body_of(group, group.target)
            queue = self._store.queue_name
            await self._outbox.add(queue, group.delivery, group.target, body, _KEPT_SECONDS)
        arguments = {
            "digest": group.digest,
            "closed_ms": group.closed_ms,
            "ended_ms": group.ended_ms,
        }
        return bool(await self._call(script("end_group"), arguments))

    async def _call(self, verb: Script, arguments: dict[str, Any]) -> Any:
        return await self._store.call(verb, [self._store.queue_name], [encode_args(arguments)])

    async def follow(self) -> int:
        """Counts in all groups that are due, and ends those whose jobs have all ended; returns how
        many it ended. Raises as `Store.call` does."""
        count, has_more = 0, True
        while has_more:
            ended, has_more = await self.count_ended()
            for group in ended:
                count += await self.end(group)
        return count


async def follow_closed_groups(store: Store) -> None:
    """Follows closed groups until it is cancelled. However many processes run it, each group ends
    once, and goes on with the others when one dies."""
    groups = ClosedGroups(store)
    while True:
        await asyncio.sleep(LOOK_SECONDS * random.uniform(0.5, 1.5))
        try:
            await groups.follow()
        except RedisUnavailable as error:
            log_refused(_limited_log, "Following closed groups", error)
        except StorageFull:
            continue
        except Exception as error:
            # Redis holds data that anyone may write; no content may end the task that all rely on.
            _limited_log.unexpected("Following closed groups failed.", error)


def _delivered_id(tenant: str, name: str) -> str:
    """What stands for a group where deliveries have the id of a job."""
    return _ID_PREFIX + keys.group_digest(tenant, name)


def _parse_counted(
    digest: bytes,
    closed_ms: bytes,
    name: bytes,
    webhook: bytes,
    ended_ms: int,
    *counts: int,
) -> CountedGroup:
    return CountedGroup(
        digest=decoding.text(digest),
        closed_ms=decoding.text(closed_ms),
        name=decoding.text(name),
        target=read_target(webhook),
        ended_ms=ended_ms,
        counts=EndedCounts(**dict(zip(EndedCounts.__struct_fields__, counts, strict=True))),
    )


def _body_of(group: CountedGroup, target: Target) -> bytes:
    """The body of the group's webhook, as JSON."""
    ended_at = decoding.time(group.ended_ms) or _DAMAGED_TIME
    closed_ms = decoding.whole_number(group.closed_ms.encode())
    counts = group.counts
    event = GroupEvent(
        timestamp=ended_at,
        data=EndedGroup(
            group=group.name,
            jobs=sum(msgspec.structs.astuple(counts)),
            counts=counts,
            closed_at=decoding.time(closed_ms) or ended_at,
            ended_at=ended_at,
        ),
        metadata=target.metadata,
    )
    return msgspec.json.encode(event)

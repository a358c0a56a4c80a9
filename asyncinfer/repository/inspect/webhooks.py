"""Webhooks that are to be told or were given up: by host, and those that a filter selects."""

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from asyncinfer.jobs import id_bytes
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import (
    Attempt,
    DeliveryState,
    Member,
    Target,
    parse_member,
    read_state,
    read_target,
)
from asyncinfer.repository.store import Store
from asyncinfer.untrusted import decoding

_PAGE_SIZE: Final = 200
MAX_LOOKS: Final = 10_000
"""How many deliveries a call looks at, of all queues together."""

_MAX_HOSTS: Final = 1000
_UNKNOWN_HOST: Final = "-"


class DeliveryFilter(Struct, frozen=True, kw_only=True):
    """Which deliveries; None for any."""

    tenant: str | None
    host: str | None = None
    model: str | None = None
    only_given_up: bool = False

    def matches(self, found: "FoundDelivery") -> bool:
        target = found.target
        return (
            self.tenant in (None, target.tenant)
            and self.host in (None, found.host)
            and self.model in (None, target.model)
            and not (self.only_given_up and found.due_ms is not None)
        )


class FoundDelivery(Struct, frozen=True):
    """A delivery that is to come or was given up."""

    queue: str
    member: Member
    target: Target
    state: DeliveryState
    packed_state: bytes
    due_ms: int | None
    """When it is due, or the lease of its sender ends; None: it was given up."""

    @property
    def host(self) -> str:
        return host_of(self.target.url)

    @property
    def is_failing(self) -> bool:
        """Whether it was given up, or its last try failed."""
        return self.due_ms is None or self.state.tries > 0


class FoundDeliveries(Struct, frozen=True):
    """Deliveries that match a filter."""

    deliveries: tuple[FoundDelivery, ...]
    has_more: bool
    """There may be others: only so many were looked at."""


class HostDeliveries(Struct, frozen=True):
    """What is to be told to a host, or was not."""

    host: str
    open: int
    """Deliveries to come."""
    failing: int
    """Those of them whose last try failed."""
    given_up: int
    last_attempt: Attempt | None
    """The newest of all of them."""
    next_ms: int | None
    """When the first of those to come is due."""


class HostList(Struct, frozen=True):
    hosts: tuple[HostDeliveries, ...]
    """Those with most failures first."""
    has_more: bool


def host_of(url: str) -> str:
    """The host of a URL with its port, if it has one; `-` if it has none."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower() or _UNKNOWN_HOST
    except ValueError:
        return _UNKNOWN_HOST


class WebhookInspection:
    """Reads the outboxes of all queues, with a bounded number of short calls."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def hosts(self, tenant: str | None) -> HostList:
        """The hosts that webhooks of a tenant (None: of all) go to; raises RedisUnavailable."""
        found = await self.deliveries(DeliveryFilter(tenant=tenant), MAX_LOOKS)
        by_host: dict[str, list[FoundDelivery]] = {}
        for delivery in found.deliveries:
            by_host.setdefault(delivery.host, []).append(delivery)
        hosts = [_sum_up(host, deliveries) for host, deliveries in by_host.items()]
        hosts.sort(key=lambda one: (-one.failing - one.given_up, -one.open, one.host))
        has_more = found.has_more or len(hosts) > _MAX_HOSTS
        return HostList(tuple(hosts[:_MAX_HOSTS]), has_more)

    async def deliveries(
        self, wanted: DeliveryFilter, limit: int, *, only_failing: bool = False
    ) -> FoundDeliveries:
        """At most `limit` deliveries that match, of the first 10,000 that Redis has: those given up
        before those to come. Raises RedisUnavailable."""
        found: list[FoundDelivery] = []
        looked_at = 0
        async for page in self._pages():
            for delivery in page:
                looked_at += 1
                if delivery is None or not wanted.matches(delivery):
                    continue
                if only_failing and not delivery.is_failing:
                    continue
                if len(found) == limit:
                    return FoundDeliveries(tuple(found), has_more=True)
                found.append(delivery)
            if looked_at >= MAX_LOOKS:
                return FoundDeliveries(tuple(found), has_more=True)
        return FoundDeliveries(tuple(found), has_more=False)

    async def _pages(self) -> AsyncIterator[list[FoundDelivery | None]]:
        """Pages of all deliveries; None for one that cannot be read."""
        queues = await self._store.queues()
        for is_open, table in ((False, keys.undelivered), (True, keys.outbox)):
            for queue in queues:
                start = 0
                while names := await self._names(table(queue), start):
                    yield await self._read(queue, names, is_open=is_open)
                    start += len(names)
                    if len(names) < _PAGE_SIZE:
                        break

    async def _names(self, table: str, start: int) -> list[tuple[bytes, bytes]]:
        last = start + _PAGE_SIZE - 1
        flat = await self._store.read("ZRANGE", table, start, last, "WITHSCORES", otherwise=())
        return list(zip(flat[::2], flat[1::2], strict=True))

    async def _read(
        self, queue: str, names: Sequence[tuple[bytes, bytes]], *, is_open: bool
    ) -> list[FoundDelivery | None]:
        members = [(parse_member(name), decoding.finite(score)) for name, score in names]
        known = [(member, score) for member, score in members if member]
        if not known:
            return [None] * len(names)
        replies = await self._store.transaction(
            *(
                ("HMGET", id_bytes(keys.webhook(queue, member.job_id)), "target", member.field)
                for member, _ in known
            )
        )
        found: list[FoundDelivery | None] = [None] * (len(names) - len(known))
        for (member, score), (target, state) in zip(known, replies, strict=True):
            where = read_target(target)
            due_ms = int(score or 0) if is_open else None
            if where is None:
                found.append(None)
                continue
            found.append(
                FoundDelivery(queue, member, where, read_state(state), state or b"", due_ms)
            )
        return found


def _sum_up(host: str, deliveries: Iterable[FoundDelivery]) -> HostDeliveries:
    is_open = [one for one in deliveries if one.due_ms is not None]
    attempts = [one.state.attempts[-1] for one in deliveries if one.state.attempts]
    return HostDeliveries(
        host=host,
        open=len(is_open),
        failing=sum(one.is_failing for one in is_open),
        given_up=sum(one.due_ms is None for one in deliveries),
        last_attempt=max(attempts, key=lambda one: one.at_ms, default=None),
        next_ms=min((one.due_ms for one in is_open if one.due_ms is not None), default=None),
    )

"""Deliveries that are to come or were given up: by host, and those that a filter selects."""

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
from asyncinfer.repository.inspect.cursors import encode_cursor, parse_cursor
from asyncinfer.repository.store import Store
from asyncinfer.untrusted import decoding

_PAGE_SIZE: Final = 200
_MAX_LOOKS: Final = 10_000
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
    cursor: str | None
    """Where the next call goes on; None if there are no others."""


class HostDeliveries(Struct, frozen=True):
    """The deliveries to a host that are to come or were given up."""

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
    """Those with most failures first. One with deliveries behind the cursor is in the next list,
    too."""
    cursor: str | None
    """Where the next call goes on; None if there are no others."""


class _Place(Struct, frozen=True, array_like=True):
    """Where a walk through all deliveries goes on: those given up of all queues come first."""

    is_open: bool
    queue: str
    scan: int
    """Of ZSCAN, which leaves out no delivery that is there all the time, however due times
    change."""

    def __post_init__(self) -> None:
        if not 0 <= self.scan < 1 << 64:
            raise ValueError("no cursor of ZSCAN")

    @property
    def cursor(self) -> str:
        return encode_cursor(self)


def host_of(url: str) -> str:
    """The host of a URL with its port, if it has one; `-` if it has none."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower() or _UNKNOWN_HOST
    except ValueError:
        return _UNKNOWN_HOST


class WebhookInspection:
    """Reads the outboxes of all queues, with a bounded number of short calls."""

    def __init__(self, store: Store, *, max_looks: int = _MAX_LOOKS) -> None:
        self._store = store
        self._max_looks = max_looks

    async def hosts(self, tenant: str | None, after: str | None = None) -> HostList:
        """The hosts that webhooks of a tenant (None: of all) go to, from a cursor on; raises
        RedisUnavailable, and InvalidQuery for what is no cursor."""
        by_host: dict[str, list[FoundDelivery]] = {}
        place = None
        async for page, place in self._walk(DeliveryFilter(tenant=tenant), after):  # noqa: B007
            for delivery in page:
                by_host.setdefault(delivery.host, []).append(delivery)
            if len(by_host) >= _MAX_HOSTS:
                break
        hosts = [_sum_up(host, deliveries) for host, deliveries in by_host.items()]
        hosts.sort(key=lambda one: (-one.failing - one.given_up, -one.open, one.host))
        return HostList(tuple(hosts), place.cursor if place else None)

    async def failing(
        self, wanted: DeliveryFilter, limit: int, after: str | None = None
    ) -> FoundDeliveries:
        """Deliveries that match and were given up or whose last try failed, from a cursor on; some
        more than `limit` at the most. Raises RedisUnavailable, and InvalidQuery for what is no
        cursor."""
        found: list[FoundDelivery] = []
        place = None
        async for page, place in self._walk(wanted, after):  # noqa: B007
            found += (delivery for delivery in page if delivery.is_failing)
            if len(found) >= limit:
                break
        return FoundDeliveries(tuple(found), place.cursor if place else None)

    async def _walk(
        self, wanted: DeliveryFilter, after: str | None
    ) -> AsyncIterator[tuple[list[FoundDelivery], _Place | None]]:
        """Pages of the deliveries that match, each with the place behind it (None at the end),
        until so many were looked at."""
        queues = await self._store.queues()
        start = parse_cursor(after, _Place) or _Place(False, "", 0)
        kinds = (False,) if wanted.only_given_up else (False, True)
        tables = [(is_open, queue) for is_open in kinds for queue in queues]
        tables = [table for table in tables if table >= (start.is_open, start.queue)]
        looked_at = 0
        for (is_open, queue), following in zip(tables, [*tables[1:], None], strict=True):
            scan = start.scan if (is_open, queue) == (start.is_open, start.queue) else 0
            seen: set[bytes] = set()
            while True:
                scan, names = await self._names(queue, scan, is_open=is_open)
                names = {name: score for name, score in names.items() if name not in seen}
                seen |= names.keys()
                found = await self._read(queue, list(names.items()), is_open=is_open)
                looked_at += len(names)
                place = (
                    _Place(is_open, queue, scan) if scan else following and _Place(*following, 0)
                )
                yield [one for one in found if wanted.matches(one)], place
                if looked_at >= self._max_looks:
                    return
                if not scan:
                    break

    async def _names(
        self, queue: str, scan: int, *, is_open: bool
    ) -> tuple[int, dict[bytes, float]]:
        """A page of names of deliveries, each with its time, and where the next one begins."""
        table = keys.outbox(queue) if is_open else keys.undelivered(queue)
        reply = await self._store.read("ZSCAN", table, scan, "COUNT", _PAGE_SIZE, otherwise=(0, ()))
        return int(reply[0]), dict(reply[1])

    async def _read(
        self, queue: str, names: Sequence[tuple[bytes, float]], *, is_open: bool
    ) -> list[FoundDelivery]:
        """The deliveries of these names and times; without those that cannot be read."""
        members = [(parse_member(name), decoding.finite(score)) for name, score in names]
        known = [(member, score) for member, score in members if member]
        if not known:
            return []
        replies = await self._store.transaction(
            *(
                ("HMGET", id_bytes(keys.webhook(queue, member.job_id)), "target", member.field)
                for member, _ in known
            )
        )
        found: list[FoundDelivery] = []
        for (member, score), (target, state) in zip(known, replies, strict=True):
            if where := read_target(target):
                due_ms = int(score or 0) if is_open else None
                state = state or b""
                found.append(FoundDelivery(queue, member, where, read_state(state), state, due_ms))
        return found


def _sum_up(host: str, deliveries: Iterable[FoundDelivery]) -> HostDeliveries:
    to_come = [one for one in deliveries if one.due_ms is not None]
    attempts = [one.state.attempts[-1] for one in deliveries if one.state.attempts]
    return HostDeliveries(
        host=host,
        open=len(to_come),
        failing=sum(one.is_failing for one in to_come),
        given_up=sum(one.due_ms is None for one in deliveries),
        last_attempt=max(attempts, key=lambda one: one.at_ms, default=None),
        next_ms=min((one.due_ms for one in to_come if one.due_ms is not None), default=None),
    )

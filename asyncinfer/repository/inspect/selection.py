"""Which jobs a filter means: waiting ones from their lists, ended ones from the log."""

import random
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final

from msgspec import Struct

from asyncinfer.jobs import DEFAULT_TENANT, STATUSES, TERMINAL
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import appearing
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored, read_states
from asyncinfer.untrusted import decoding

_PAGE: Final = 1000
_ENTRIES_A_PAGE: Final = 100
_MOST_LOOKED_AT: Final = 500_000


class Filter(Struct, frozen=True, kw_only=True):
    """Which jobs are meant; None where anything will do."""

    tenant: str | None
    statuses: frozenset[str] | None = None
    model: str | None = None
    group: str | None = None
    dead: bool = False
    """Only dead letters."""

    @classmethod
    def of(
        cls, tenant: str | None, status: str | None, model: str | None, group: str | None = None
    ) -> "Filter":
        statuses = None if status is None else frozenset([status])
        return cls(tenant=tenant, statuses=statuses, model=model, group=group)

    def matches(self, job: Stored, default_model: str | None) -> bool:
        record = job.record
        owner = record.tenant if record else DEFAULT_TENANT
        model = record.model if record else default_model
        group = record.options.group if record else None
        return (
            (self.statuses is None or job.status in self.statuses)
            and self.tenant in (None, owner)
            and self.model in (None, model)
            and self.group in (None, group)
        )


class Selected(Struct, frozen=True):
    """Jobs as they were, without their results; `more`: some may be left."""

    jobs: tuple[Stored, ...]
    more: bool


class Selection:
    """Finds jobs to act on."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def jobs(self, wanted: Filter, most: int) -> Selected:
        """At most so many, in no order that counts. What a queue may hold bounds the look:
        MAX_QUEUE ids that wait, and those of its log."""
        default = await self._store.default_model()
        found: dict[str, Stored] = {}
        looked = 0
        for queue in await self._queues(wanted.model, default):
            async for ids in _pages(_sources(self._store, queue, wanted)):
                looked += len(ids)
                for job in await read_states(self._store, ids, _statuses(wanted)):
                    if wanted.matches(job, default):
                        found[job.job_id] = job
                if len(found) > most or looked >= _MOST_LOOKED_AT:
                    return Selected(tuple(found.values())[:most], more=True)
        return Selected(tuple(found.values()), more=False)

    async def _queues(self, model: str | None, default: str | None) -> list[str]:
        if model is not None:
            return [keys.queue(self._store.n, model, default)]
        queues = await self._store.queues()
        # Calls that are repeated until nothing is left must not always look at the same ones.
        random.shuffle(queues)
        return queues


def _statuses(wanted: Filter) -> frozenset[str]:
    return frozenset(STATUSES) if wanted.statuses is None else wanted.statuses


async def _pages(sources: Iterator[AsyncIterator[list[str]]]) -> AsyncIterator[list[str]]:
    for source in sources:
        async for page in source:
            yield page


def _sources(store: Store, queue: str, wanted: Filter) -> Iterator[AsyncIterator[list[str]]]:
    """Pages of ids among which all are that are wanted."""
    if wanted.dead:
        yield _ranked(store, keys.dead(queue))
        return
    statuses = _statuses(wanted)
    if "pending" in statuses:
        yield from (_listed(store, waiting) for waiting in keys.waiting(queue))
        yield _ranked(store, keys.delayed(queue))
    if "processing" in statuses:
        yield _running(store, queue)
    if statuses & TERMINAL:
        yield _logged(store, queue)


async def _listed(store: Store, name: str) -> AsyncIterator[list[str]]:
    """From the head: what is served meanwhile leaves at the other end, so that none is missed."""
    start = 0
    while page := await store.look("LRANGE", name, start, start + _PAGE - 1, otherwise=()):
        yield _texts(page)
        start += len(page)


async def _ranked(store: Store, name: str) -> AsyncIterator[list[str]]:
    start = 0
    while page := await store.look("ZRANGE", name, start, start + _PAGE - 1, otherwise=()):
        yield _texts(page)
        start += len(page)


async def _running(store: Store, queue: str) -> AsyncIterator[list[str]]:
    cursor = 0
    while True:
        scan = ("HSCAN", keys.running(queue), cursor, "COUNT", _PAGE)
        reply = await store.look(*scan, otherwise=(0, ()))
        cursor = int(reply[0])
        if reply[1]:
            yield _texts(reply[1])
        if cursor == 0:
            return


async def _logged(store: Store, queue: str) -> AsyncIterator[list[str]]:
    """Every job that the log knows, newest first."""
    gathered: list[str] = []
    last = "+"
    while True:
        page: list[tuple[bytes, dict[bytes, bytes]]] = await store.look(
            *("XREVRANGE", keys.log(queue), last, "-", "COUNT", _ENTRIES_A_PAGE), otherwise=[]
        )
        for _, fields in page:
            gathered += appearing(fields)
        if len(page) < _ENTRIES_A_PAGE:
            break
        last = f"({page[-1][0].decode()}"
        while len(gathered) >= _PAGE:
            yield gathered[:_PAGE]
            gathered = gathered[_PAGE:]
    for start in range(0, len(gathered), _PAGE):
        yield gathered[start : start + _PAGE]


def _texts(ids: Iterable[bytes]) -> list[str]:
    """Without a stranger's that are not text, which no answer could name."""
    return [text for one in ids if (text := decoding.name(one))]

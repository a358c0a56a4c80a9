"""The listing of jobs by the log, live workers and the health of the queues."""

import heapq
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Final

from msgspec import Meta, Struct

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.inspect.cursors import encode_cursor, parse_cursor
from asyncinfer.repository.inspect.log import entry_order, first_ids
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, read_summaries
from asyncinfer.untrusted import decoding

_ENTRIES_PER_PAGE: Final = 100
_MAX_IDS_PER_CALL: Final = 1000
_MAX_JOBS_READ: Final = 20_000
_MAX_WORKERS: Final = 1000
"""The bound of the announcements that an API reads each second."""


class Page(Struct, frozen=True):
    """A page of jobs, newest first; `cursor` gives the next page, None: there is none."""

    jobs: tuple[StoredJob, ...]
    cursor: str | None


class Health(Struct, frozen=True):
    """The server, the number of waiting jobs by queue, and the number of live workers."""

    server: str
    queues: dict[str, int]
    workers: int


class LiveWorkers(Struct, frozen=True, kw_only=True):
    """The live workers and the paused queues."""

    workers: dict[str, bytes]
    """{worker id: announcement as JSON}."""
    paused: frozenset[str]
    """The paused queues."""
    is_complete: bool
    """All live workers were read."""


_Number = Annotated[int, Meta(ge=0)]
_EntryId = tuple[_Number, _Number]
"""The ms and the number of a log entry."""


class _ListingCursor(Struct, frozen=True, array_like=True):
    """Where a listing stopped: a log entry, and how many of its jobs are listed."""

    entry: _EntryId
    queue: str
    listed: _Number


class Inspection:
    """Reads jobs, workers and queues; changes nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._announcements = Announcements(store)

    async def jobs(
        self,
        *,
        tenant: str | None,
        status: str | None = None,
        model: str | None = None,
        group: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """The jobs of a tenant, or of all tenants (None), newest first, from the log; raises
        InvalidQuery for a bad cursor.

        A page may have fewer jobs than `limit` and still a cursor: a call looks at 20,000 jobs at
        most.
        """
        default = await self._store.default_model()
        queues = await self._queues(model, default)
        wanted = Filter.of(tenant, status, model, group)
        found: list[StoredJob] = []
        read_count = 0
        async for places, ids in self._batches(queues, parse_cursor(cursor, _ListingCursor), limit):
            stored = await read_summaries(self._store, ids)
            for place, job in zip(places, stored, strict=True):
                read_count += 1
                if job and wanted.matches(job, default):
                    found.append(job)
                if len(found) == limit or read_count == _MAX_JOBS_READ:
                    return Page(tuple(found), encode_cursor(place))
        return Page(tuple(found), None)

    async def _batches(
        self, queues: Sequence[str], place: _ListingCursor | None, first_size: int
    ) -> AsyncIterator[tuple[list[_ListingCursor], list[str]]]:
        """Batches of the jobs in the logs, newest first, and the place of each job. Each batch is
        twice as large as the one before: with a call for each log entry, a listing whose jobs had
        mostly expired took 4,900 calls."""
        places: list[_ListingCursor] = []
        ids: list[str] = []
        size = first_size
        async for entry, queue, start, entry_ids in self._merged_entries(queues, place):
            places += [
                _ListingCursor(entry, queue, start + n) for n in range(1, len(entry_ids) + 1)
            ]
            ids += entry_ids
            if len(ids) >= size:
                yield places, ids
                places, ids, size = [], [], min(2 * size, _MAX_IDS_PER_CALL)
        if ids:
            yield places, ids

    async def _queues(self, model: str | None, default: str | None) -> list[str]:
        if model is not None:
            return [keys.queue(self._store.queue_name, model, default)]
        return await self._store.queues()

    async def _merged_entries(
        self, queues: Sequence[str], place: _ListingCursor | None
    ) -> AsyncIterator[tuple[_EntryId, str, int, list[str]]]:
        """Log entries of all queues, newest first: (entry id, queue, jobs that are listed already,
        ids of the others)."""
        heads = []
        for queue in queues:
            source = self._entries(queue, place)
            if first := await anext(source, None):
                heads.append((_newest_first(first[0], queue), first, queue, source))
        heapq.heapify(heads)
        while heads:
            _, (entry, ids), queue, source = heads[0]
            listed = place.listed if place and (entry, queue) == (place.entry, place.queue) else 0
            yield entry, queue, listed, ids[listed:]
            if following := await anext(source, None):
                heapq.heapreplace(
                    heads, (_newest_first(following[0], queue), following, queue, source)
                )
            else:
                heapq.heappop(heads)

    async def _entries(
        self, queue: str, place: _ListingCursor | None
    ) -> AsyncIterator[tuple[_EntryId, list[str]]]:
        """The log entries of a queue in which jobs first appear, newest first, each with its ids,
        the newest job first."""
        end = "+"
        if place:
            ms, number = place.entry
            end = f"{'' if queue >= place.queue else '('}{ms}-{number}"
        while True:
            page = await self._store.read(
                *("XREVRANGE", keys.log(queue), end, "-", "COUNT", _ENTRIES_PER_PAGE), otherwise=()
            )
            for entry_id, fields in page:
                if ids := first_ids(fields):
                    yield entry_order(entry_id), ids
            if len(page) < _ENTRIES_PER_PAGE:
                return
            end = f"({page[-1][0].decode()}"

    async def live_workers(self, queues: Sequence[str]) -> LiveWorkers:
        """Reads the live workers, and which of `queues` are paused, with two commands."""
        n = self._store.queue_name
        newest_first = ("ZREVRANGE", keys.workers(n), 0, _MAX_WORKERS)
        reply = await self._store.read(*newest_first, otherwise=())
        ids = [name for raw in reply[:_MAX_WORKERS] if (name := decoding.name(raw)) is not None]
        names = [*(keys.worker(n, worker_id) for worker_id in ids), *map(keys.paused, queues)]
        values = await self._store.command("MGET", *names) if names else []
        bodies, flags = values[: len(ids)], values[len(ids) :]
        return LiveWorkers(
            workers={name: body for name, body in zip(ids, bodies, strict=True) if body},
            paused=frozenset(q for q, flag in zip(queues, flags, strict=True) if flag is not None),
            is_complete=len(reply) <= _MAX_WORKERS,
        )

    async def paused(self, queues: Sequence[str]) -> list[bool]:
        """Whether each queue is paused: its jobs are accepted and not run."""
        if not queues:
            return []
        flags = await self._store.command("MGET", *map(keys.paused, queues))
        return [flag is not None for flag in flags]

    async def health(self) -> Health:
        """Leaves out a queue without waiting jobs whose model is not announced any more.

        Raises ServerRefused as `Store.check_server` does, and RedisUnavailable.
        """
        server = await self._store.check_server()
        announced = await self._announcements.read_queues(await self._store.default_model())
        queues = {}
        for queue in await self._store.queues():
            high, normal, low = [
                await self._store.read("LLEN", name, otherwise=0) for name in keys.waiting(queue)
            ]
            if (waiting := high + normal + low) or queue in announced:
                queues[queue] = waiting
        return Health(server, queues, len(await self._announcements.read_workers()))


def _newest_first(entry: _EntryId, queue: str) -> tuple[int, int, str]:
    ms, number = entry
    return -ms, -number, queue

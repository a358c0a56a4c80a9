"""The listing of jobs by the log, live workers and the health of the queues."""

import heapq
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Final, TypeVar

from msgspec import Meta, Struct

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.inspect.cursors import encode_cursor, parse_cursor
from asyncinfer.repository.inspect.log import entry_order, first_ids
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, read_summaries
from asyncinfer.untrusted import decoding

T = TypeVar("T")

_MEMBERS_PER_CALL: Final = 200
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


_Entry = tuple[_EntryId, str, list[str]]
"""A log entry in which jobs first appear: its id, queue and the ids of these jobs, the newest
first."""


class _ListingCursor(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a listing stopped: a log entry, and how many of its jobs are listed."""

    entry: _EntryId
    queue: str
    listed: _Number


class Inspection:
    """Reads jobs, workers and queues; changes nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._announcements = Announcements(store)

    async def jobs(self, wanted: Filter, *, limit: int = 100, cursor: str | None = None) -> Page:
        """The jobs that match, newest first, from the log; raises InvalidQuery for a bad cursor.

        A page may have fewer jobs than `limit` and still a cursor: a call looks at 20,000 jobs at
        most.
        """
        default = await self._store.default_model()
        queues = await self._store.queues_of(wanted.model, default)
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
        sources = [self._entries(queue, place) for queue in queues]
        async for entry, queue, entry_ids in merge_sorted(sources, _newest_first):
            listed = place.listed if place and (entry, queue) == (place.entry, place.queue) else 0
            ids += entry_ids[listed:]
            places += [
                _ListingCursor(entry, queue, n) for n in range(listed + 1, len(entry_ids) + 1)
            ]
            if len(ids) >= size:
                yield places, ids
                places, ids, size = [], [], min(2 * size, _MAX_IDS_PER_CALL)
        if ids:
            yield places, ids

    async def _entries(self, queue: str, place: _ListingCursor | None) -> AsyncIterator[_Entry]:
        """The log entries of a queue in which jobs first appear, newest first."""
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
                    yield entry_order(entry_id), queue, ids
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


def _newest_first(entry: _Entry) -> tuple[int, int, str]:
    (ms, number), queue, _ = entry
    return -ms, -number, queue


async def newest_members(
    store: Store, name: str, highest: str
) -> AsyncIterator[tuple[bytes, bytes]]:
    """The members of a sorted set with their scores, from `highest` (as ZRANGE BYSCORE takes it)
    downwards; none if the key has another type."""
    skipped = 0
    while True:
        page = await store.read(
            *("ZRANGE", name, highest, "-inf", "BYSCORE", "REV"),
            *("LIMIT", skipped, _MEMBERS_PER_CALL, "WITHSCORES"),
            otherwise=(),
        )
        for pair in zip(page[::2], page[1::2], strict=True):
            yield pair
        if len(page) < 2 * _MEMBERS_PER_CALL:
            return
        skipped += _MEMBERS_PER_CALL


async def merge_sorted(
    sources: Sequence[AsyncIterator[T]], key: Callable[[T], Any]
) -> AsyncIterator[T]:
    """The items of all sources in the order of `key`, in which each source has its own. Reads only
    one item of a source ahead."""
    heads = [
        (key(first), index, first)
        for index, source in enumerate(sources)
        if (first := await anext(source, None)) is not None
    ]
    heapq.heapify(heads)
    while heads:
        _, index, item = heads[0]
        yield item
        if (following := await anext(sources[index], None)) is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, (key(following), index, following))

"""What people ask of the queue: which jobs, which models, how it is."""

import heapq
import re
from collections.abc import AsyncIterator, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.errors import InvalidQuery
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.inspect.cursors import decode_cursor, encode_cursor
from asyncinfer.repository.inspect.log import appearing
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored, read_summaries
from asyncinfer.untrusted import decoding

_ENTRIES_A_PAGE: Final = 100
_MOST_IDS_A_CALL: Final = 1000
_MOST_LOOKED_AT: Final = 20_000
_MOST_WORKERS: Final = 1000
"""Whose announcements an API reads each second."""


class Page(Struct, frozen=True):
    """Jobs, newest first; `cursor` continues after the last, None at the end."""

    jobs: tuple[Stored, ...]
    cursor: str | None


class Health(Struct, frozen=True):
    """The server, how many jobs wait in each queue, and how many workers live."""

    server: str
    queues: dict[str, int]
    workers: int


class Workforce(Struct, frozen=True, kw_only=True):
    """Who works, and which queues nobody may work on."""

    workers: dict[str, bytes]
    """By worker, what it says as JSON."""
    paused: frozenset[str]
    is_whole: bool
    """There are no more workers than were read."""


class _Place(Struct, frozen=True, array_like=True):
    """Where a listing stopped: a log entry, and how many of its jobs were passed."""

    entry: str
    queue: str
    passed: int


class Inspection:
    """The questions people ask; none of them changes anything."""

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
        """A tenant's jobs, or everybody's, newest first, from the log; raises InvalidQuery for a
        bad cursor.

        A listing looks at a bounded number of jobs: with a rare filter a page may come back
        short, with a cursor to go on.
        """
        default = await self._store.default_model()
        queues = await self._queues(model, default)
        wanted = Filter.of(tenant, status, model, group)
        found: list[Stored] = []
        looked = 0
        async for places, ids in self._listed(queues, _place(cursor), limit):
            stored = await read_summaries(self._store, ids)
            for place, job in zip(places, stored, strict=True):
                looked += 1
                if job and wanted.matches(job, default):
                    found.append(job)
                if len(found) == limit or looked == _MOST_LOOKED_AT:
                    return Page(tuple(found), encode_cursor(place))
        return Page(tuple(found), None)

    async def _listed(
        self, queues: Sequence[str], place: _Place | None, first: int
    ) -> AsyncIterator[tuple[list[_Place], list[str]]]:
        """Jobs of the logs, newest first, and where each is: `first` of them, and as long as there
        is cause to go on twice as many each time. Where most jobs have expired, one call for each
        entry of a log was 4,900 calls for one listing."""
        places: list[_Place] = []
        ids: list[str] = []
        most = first
        async for entry, queue, start, named in self._logged(queues, place):
            places += [_Place(entry, queue, start + n) for n in range(1, len(named) + 1)]
            ids += named
            if len(ids) >= most:
                yield places, ids
                places, ids, most = [], [], min(2 * most, _MOST_IDS_A_CALL)
        if ids:
            yield places, ids

    async def _queues(self, model: str | None, default: str | None) -> list[str]:
        if model is not None:
            return [keys.queue(self._store.n, model, default)]
        return await self._store.queues()

    async def _logged(
        self, queues: Sequence[str], place: _Place | None
    ) -> AsyncIterator[tuple[str, str, int, list[str]]]:
        """Log entries of all queues, newest first: (entry id, queue, jobs passed, ids)."""
        heads = []
        for queue in queues:
            source = self._entries(queue, place)
            if first := await anext(source, None):
                heads.append((_newest_first(first[0], queue), first, queue, source))
        heapq.heapify(heads)
        while heads:
            _, (entry, ids), queue, source = heads[0]
            passed = place.passed if place and (entry, queue) == (place.entry, place.queue) else 0
            yield entry, queue, passed, ids[passed:]
            if following := await anext(source, None):
                heapq.heapreplace(
                    heads, (_newest_first(following[0], queue), following, queue, source)
                )
            else:
                heapq.heappop(heads)

    async def _entries(
        self, queue: str, place: _Place | None
    ) -> AsyncIterator[tuple[str, list[str]]]:
        """A queue's log backwards, only where jobs first appear, newest job first."""
        end = "+"
        if place:
            end = place.entry if queue >= place.queue else f"({place.entry}"
        while True:
            page = await self._store.look(
                *("XREVRANGE", keys.log(queue), end, "-", "COUNT", _ENTRIES_A_PAGE), otherwise=()
            )
            for entry_id, fields in page:
                if ids := appearing(fields):
                    yield entry_id.decode(), ids
            if len(page) < _ENTRIES_A_PAGE:
                return
            end = f"({page[-1][0].decode()}"

    async def workforce(self, queues: Sequence[str]) -> Workforce:
        """The living workers, and which of `queues` are paused: two commands."""
        n = self._store.n
        newest_first = ("ZREVRANGE", keys.workers(n), 0, _MOST_WORKERS)
        found = await self._store.look(*newest_first, otherwise=())
        ids = [name for one in found[:_MOST_WORKERS] if (name := decoding.name(one)) is not None]
        names = [*(keys.worker(n, one) for one in ids), *map(keys.paused, queues)]
        values = await self._store.command("MGET", *names) if names else []
        bodies, flags = values[: len(ids)], values[len(ids) :]
        return Workforce(
            workers={one: body for one, body in zip(ids, bodies, strict=True) if body},
            paused=frozenset(q for q, flag in zip(queues, flags, strict=True) if flag is not None),
            is_whole=len(found) <= _MOST_WORKERS,
        )

    async def paused(self, queues: Sequence[str]) -> list[bool]:
        """Of each queue, whether its jobs are taken in but not run."""
        if not queues:
            return []
        found = await self._store.command("MGET", *map(keys.paused, queues))
        return [one is not None for one in found]

    async def health(self) -> Health:
        server = await self._store.check_server()
        queues = {}
        for queue in await self._store.queues():
            high, normal, low = [
                await self._store.look("LLEN", name, otherwise=0) for name in keys.waiting(queue)
            ]
            queues[queue] = high + normal + low
        return Health(server, queues, len(await self._announcements.workers()))


def _newest_first(entry: str, queue: str) -> tuple[int, int, str]:
    ms, _, seq = entry.partition("-")
    return -int(ms), -int(seq), queue


_ENTRY: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_MOST_PART: Final = (1 << 64) - 1


def _place(cursor: str | None) -> _Place | None:
    if cursor is None:
        return None
    try:
        place = decode_cursor(cursor, _Place)
        if not _ENTRY.fullmatch(place.entry) or place.passed < 0:
            raise ValueError(place)
        if any(int(part) > _MOST_PART for part in place.entry.split("-")):
            raise ValueError(place)
    except ValueError as error:
        raise InvalidQuery(
            "`cursor` is not one that GET /jobs gave; leave it out to start at the newest job."
        ) from error
    return place

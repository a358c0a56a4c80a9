"""The selection of jobs by a filter: waiting jobs from their lists, ended ones from the log."""

import random
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final

from msgspec import Struct

from asyncinfer.jobs import STATUSES, TERMINAL
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import first_ids
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, read_jobs_in
from asyncinfer.untrusted import decoding

_PAGE_SIZE: Final = 1000
_ENTRIES_PER_PAGE: Final = 100
_MAX_JOBS_READ: Final = 500_000


class Filter(Struct, frozen=True, kw_only=True):
    """A filter of jobs; None matches every job."""

    tenant: str | None
    statuses: frozenset[str] | None = None
    model: str | None = None
    group: str | None = None
    request_id: str | None = None
    """That of the request which submitted the job."""
    dead: bool = False
    """Only dead letters match."""

    def matches(self, job: StoredJob, default_model: str | None) -> bool:
        return (
            (self.statuses is None or job.status in self.statuses)
            and self.tenant in (None, job.tenant)
            and self.model in (None, job.model or default_model)
            and self.group in (None, job.group)
            and self.request_id in (None, job.record and job.record.request_id)
        )


class SelectedJobs(Struct, frozen=True):
    """Jobs as they were when read, without their results."""

    jobs: tuple[StoredJob, ...]
    has_more: bool
    """More jobs may match."""


class Selection:
    """Finds the jobs that an operation is for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def jobs(self, wanted: Filter, limit: int) -> SelectedJobs:
        """At most `limit` jobs that match, in no defined order. The reading is bounded by what a
        queue can hold, MAX_QUEUE waiting jobs and those in its log, and by 500,000 jobs."""
        default = await self._store.default_model()
        found: dict[str, StoredJob] = {}
        read_count = 0
        queues = await self._store.queues_of(wanted.model, default)
        # A call that is repeated until no job is left must not always read the same queues first.
        random.shuffle(queues)
        for queue in queues:
            async for ids in _pages(_sources(self._store, queue, wanted)):
                read_count += len(ids)
                for job in await read_jobs_in(self._store, ids, _statuses(wanted)):
                    if wanted.matches(job, default):
                        found[job.job_id] = job
                if len(found) > limit or read_count >= _MAX_JOBS_READ:
                    return SelectedJobs(tuple(found.values())[:limit], has_more=True)
        return SelectedJobs(tuple(found.values()), has_more=False)


def _statuses(wanted: Filter) -> frozenset[str]:
    return frozenset(STATUSES) if wanted.statuses is None else wanted.statuses


async def _pages(sources: Iterator[AsyncIterator[list[str]]]) -> AsyncIterator[list[str]]:
    for source in sources:
        async for page in source:
            yield page


def _sources(store: Store, queue: str, wanted: Filter) -> Iterator[AsyncIterator[list[str]]]:
    """Iterators over pages of ids that together contain all matching jobs, and others."""
    if wanted.dead:
        yield _pages_of(store, "ZRANGE", keys.dead(queue))
        return
    statuses = _statuses(wanted)
    if "pending" in statuses:
        yield from (_pages_of(store, "LRANGE", waiting) for waiting in keys.waiting(queue))
        yield _pages_of(store, "ZRANGE", keys.delayed(queue))
    if "processing" in statuses:
        yield _running_pages(store, queue)
    if statuses & TERMINAL:
        yield _log_pages(store, queue)


async def _pages_of(store: Store, command: str, name: str) -> AsyncIterator[list[str]]:
    """Reads a list (LRANGE) or sorted set (ZRANGE) from its head. Jobs leave a list at the other
    end, so that none is missed."""
    start = 0
    while page := await store.read(command, name, start, start + _PAGE_SIZE - 1, otherwise=()):
        yield _decode_ids(page)
        start += len(page)


async def _running_pages(store: Store, queue: str) -> AsyncIterator[list[str]]:
    cursor = 0
    while True:
        scan = ("HSCAN", keys.running(queue), cursor, "COUNT", _PAGE_SIZE)
        reply = await store.read(*scan, otherwise=(0, ()))
        cursor = int(reply[0])
        if reply[1]:
            yield _decode_ids(reply[1])
        if cursor == 0:
            return


async def _log_pages(store: Store, queue: str) -> AsyncIterator[list[str]]:
    """Every job in the log, newest first."""
    ids: list[str] = []
    last = "+"
    while True:
        page: list[tuple[bytes, dict[bytes, bytes]]] = await store.read(
            *("XREVRANGE", keys.log(queue), last, "-", "COUNT", _ENTRIES_PER_PAGE), otherwise=[]
        )
        for _, fields in page:
            ids += first_ids(fields)
        if len(page) < _ENTRIES_PER_PAGE:
            break
        last = f"({page[-1][0].decode()}"
        while len(ids) >= _PAGE_SIZE:
            yield ids[:_PAGE_SIZE]
            ids = ids[_PAGE_SIZE:]
    for start in range(0, len(ids), _PAGE_SIZE):
        yield ids[start : start + _PAGE_SIZE]


def _decode_ids(ids: Iterable[bytes]) -> list[str]:
    """Decodes ids, without external ids that are not text: no response could name them."""
    return [text for raw_id in ids if (text := decoding.name(raw_id))]

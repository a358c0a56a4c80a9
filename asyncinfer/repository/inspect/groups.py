"""Groups: jobs that share a name are counted, listed and cancelled together."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Final

from msgspec import Meta, Struct

from asyncinfer.errors import RequestError
from asyncinfer.jobs import TERMINAL, created_ms
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.cursors import encode_cursor, parse_cursor
from asyncinfer.repository.inspect.listing import Page
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.operations import CancelCounts, Operations
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, read_summaries
from asyncinfer.untrusted import decoding

_IDS_PER_PAGE: Final = 1000
_LISTED_PER_PAGE: Final = 200
_MAX_JOBS_READ: Final = 20_000
_MAX_FAILED_IDS: Final = 10


class GroupTally(Struct, frozen=True, kw_only=True):
    """The counts of a group's jobs."""

    jobs: int
    by_status: dict[str, int]
    """Only jobs that are still kept."""
    first_failed: list[str]
    """Ids of the failed jobs that were submitted first; at most 10."""
    created_ms: int | None
    """When its first job was submitted."""
    is_closed: bool = False
    """It takes no more jobs."""
    ended_ms: int | None = None
    """When all jobs of a closed group with a webhook had ended."""
    last_waiting: StoredJob | None = None
    """Of its jobs that wait, the one that was submitted last."""

    @property
    def expired(self) -> int:
        """The number of jobs that ended so long ago that they are no longer kept."""
        return self.jobs - sum(self.by_status.values())

    @property
    def unfinished(self) -> int:
        """The number of jobs that have not ended."""
        return sum(n for status, n in self.by_status.items() if status not in TERMINAL)


class _GroupCursor(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a listing stopped: a job and its index in the list."""

    index: Annotated[int, Meta(ge=0, lt=1 << 32)]
    job_id: str


class _SharedCount:
    """The counts of one group that are requested at the same time."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0
        """How many callers use this object."""
        self.begun = 0
        """How many counts have begun."""
        self.finished = 0
        """The number of the count that finished last, with `counts` or `error`."""
        self.counts: GroupTally | None = None
        self.error: Exception | None = None


class Groups:
    """Counts, lists and cancels the jobs of a group; `submit` maintains the group's list."""

    def __init__(self, store: Store, operations: Operations) -> None:
        self._store = store
        self._operations = operations
        self._shared_counts: dict[tuple[str, str], _SharedCount] = {}

    async def count(self, tenant: str, group: str) -> GroupTally | None:
        """Counts the jobs; None if there is no such group. Callers that arrive during a count share
        the next one, which begins after it: 200 streams of one group counted its jobs 200 times a
        second, and Redis had no time for anything else."""
        shared = self._shared_counts.setdefault((tenant, group), _SharedCount())
        begun_before = shared.begun
        shared.waiting += 1
        try:
            async with shared.lock:
                if shared.finished <= begun_before:
                    await self._update(shared, tenant, group)
        finally:
            shared.waiting -= 1
            if not shared.waiting:
                del self._shared_counts[tenant, group]
        if shared.error:
            raise shared.error
        return shared.counts

    async def _update(self, shared: _SharedCount, tenant: str, group: str) -> None:
        shared.begun += 1
        try:
            shared.counts, shared.error = await self._count(tenant, group), None
        except RequestError as error:
            shared.error = error
        shared.finished = shared.begun

    async def _count(self, tenant: str, group: str) -> GroupTally | None:
        """Counts with two commands for each thousand jobs, and two more."""
        is_closed, ended_ms = await self._closed_state(tenant, group)
        total, first, failed, pending = 0, None, list[str](), list[str]()
        counter: Counter[bytes | None] = Counter()
        async for ids, statuses in self._pages(tenant, group):
            first = first or ids[0]
            total += len(ids)
            counter.update(statuses)
            pending = _with_status(ids, statuses, b"pending")[-1:] or pending
            if len(failed) < _MAX_FAILED_IDS and b"failed" in statuses:
                failed += _with_status(ids, statuses, b"failed")
        if first is None:
            return None
        return GroupTally(
            jobs=total,
            by_status={decoding.text(status): n for status, n in counter.items() if status},
            first_failed=failed[:_MAX_FAILED_IDS],
            created_ms=created_ms(first),
            is_closed=is_closed,
            ended_ms=ended_ms,
            last_waiting=next(iter(await read_summaries(self._store, pending)), None),
        )

    async def _closed_state(self, tenant: str, group: str) -> tuple[bool, int | None]:
        """Whether a group is closed, and when it ended, if that is known. It is read before the
        jobs, so that a group which has ended is not shown with jobs that have not."""
        name = keys.closed_group(self._store.queue_name, tenant, group)
        closed, ended = await self._store.read(
            "HMGET", name, "closed_ms", "ended_ms", otherwise=(None, None)
        )
        return closed is not None, decoding.whole_number(ended or b"")

    async def cancel(self, tenant: str, group: str) -> CancelCounts | None:
        """Cancels the waiting jobs and has the running ones stopped; None if there is no such
        group."""
        total = None
        async for ids, statuses in self._pages(tenant, group):
            unfinished = _with_status(ids, statuses, b"pending", b"processing")
            jobs = [job for job in await read_summaries(self._store, unfinished) if job]
            part = await self._operations.cancel_all(jobs)
            before = total or CancelCounts(0, 0)
            total = CancelCounts(before.ended + part.ended, before.stopping + part.stopping)
        return total

    async def _pages(
        self, tenant: str, group: str
    ) -> AsyncIterator[tuple[list[str], list[bytes | None]]]:
        """Pages of all ids, the first submitted first, and of the statuses of their jobs."""
        name = keys.group(self._store.queue_name, tenant, group)
        start = 0
        while ids := await self._range(name, start, start + _IDS_PER_PAGE - 1):
            yield ids, await self._store.command("MGET", *map(keys.status, ids))
            if len(ids) < _IDS_PER_PAGE:
                return
            start += _IDS_PER_PAGE

    async def _range(self, name: str, first: int, last: int) -> list[str]:
        """Ids of the list. One that is not UTF-8 becomes some text that is the id of no job."""
        reply = await self._store.read("LRANGE", name, first, last, otherwise=())
        return [decoding.text(raw_id) for raw_id in reply]

    # --- listing -----------------------------------------------------------------------------

    async def jobs(
        self,
        tenant: str,
        group: str,
        wanted: Filter,
        *,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """The jobs of a group that match, newest first; raises InvalidQuery for a bad cursor. A
        page may have fewer jobs than `limit` and still a cursor: a call looks at 20,000 jobs at
        most."""
        name = keys.group(self._store.queue_name, tenant, group)
        end = await self._end(name, cursor)
        found: list[StoredJob] = []
        for _ in range(_MAX_JOBS_READ // _LISTED_PER_PAGE):
            if end <= 0:
                break
            start = max(0, end - _LISTED_PER_PAGE)
            ids = await self._range(name, start, end - 1)
            stored = await read_summaries(self._store, ids)
            for index, job in reversed(list(enumerate(stored, start))):
                if job and wanted.matches(job, None):
                    found.append(job)
                if len(found) == limit:
                    return Page(
                        tuple(found), encode_cursor(_GroupCursor(index, ids[index - start]))
                    )
            end = start
            last = ids[0] if ids else ""
        return Page(tuple(found), encode_cursor(_GroupCursor(end, last)) if end > 0 else None)

    async def _end(self, name: str, cursor: str | None) -> int:
        """The number of jobs from the start of the list that are still to be listed."""
        place = parse_cursor(cursor, _GroupCursor)
        if place is None:
            return int(await self._store.read("LLEN", name, otherwise=0))
        if await self._range(name, place.index, place.index) == [place.job_id]:
            return place.index
        # The list has been trimmed since.
        find = ("LPOS", name, place.job_id, "RANK", -1)
        index = await self._store.read(*find, otherwise=None)
        return 0 if index is None else int(index)


def _with_status(ids: Sequence[str], statuses: Sequence[bytes | None], *wanted: bytes) -> list[str]:
    return [job_id for job_id, status in zip(ids, statuses, strict=True) if status in wanted]

"""Jobs that share a name: counted, listed, cancelled together."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.errors import InvalidQuery, RequestError
from asyncinfer.jobs import TERMINAL, created_ms
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.cursors import decode_cursor, encode_cursor
from asyncinfer.repository.inspect.listing import Page
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.operations import Cancelled, Operations
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored, read_summaries
from asyncinfer.untrusted import decoding

_IDS_A_PAGE: Final = 1000
_LISTED_A_PAGE: Final = 200
_MOST_LOOKED_AT: Final = 20_000
_FAILED_NAMED: Final = 10


class Counted(Struct, frozen=True, kw_only=True):
    """How the jobs of a group are; `by_status` has those that are still kept."""

    jobs: int
    by_status: dict[str, int]
    first_failed: list[str]
    created_ms: int | None
    """When its first job was made."""

    @property
    def expired(self) -> int:
        """Jobs that ended so long ago that they are no longer kept."""
        return self.jobs - sum(self.by_status.values())

    @property
    def left(self) -> int:
        """Jobs that have not ended."""
        return sum(n for status, n in self.by_status.items() if status not in TERMINAL)


class _Spot(Struct, frozen=True, array_like=True):
    """Where a listing stopped: a job, and where in the list it was."""

    index: int
    job_id: str


class _Counting:
    """The counts of one group that are asked for at the same time."""

    def __init__(self) -> None:
        self.one_at_a_time = asyncio.Lock()
        self.askers = 0
        self.begun = 0
        """How many counts have begun."""
        self.finished = 0
        """Which of them was the last to finish; it gave `counted`, or failed with `error`."""
        self.counted: Counted | None = None
        self.error: Exception | None = None


class Groups:
    """What is asked of a tenant's group; its list is kept by `submit`."""

    def __init__(self, store: Store, operations: Operations) -> None:
        self._store = store
        self._operations = operations
        self._countings: dict[tuple[str, str], _Counting] = {}

    async def count(self, tenant: str, group: str) -> Counted | None:
        """None when there is no such group. Whoever asks while a count is under way shares the
        next, which begins after that: 200 streams of one group counted its jobs 200 times a
        second, and Redis had no time for anything else."""
        counting = self._countings.setdefault((tenant, group), _Counting())
        asked_after = counting.begun
        counting.askers += 1
        try:
            async with counting.one_at_a_time:
                if counting.finished <= asked_after:
                    await self._count_into(counting, tenant, group)
        finally:
            counting.askers -= 1
            if not counting.askers:
                del self._countings[tenant, group]
        if counting.error:
            raise counting.error
        return counting.counted

    async def _count_into(self, counting: _Counting, tenant: str, group: str) -> None:
        counting.begun += 1
        try:
            counting.counted, counting.error = await self._count(tenant, group), None
        except RequestError as error:
            counting.error = error
        counting.finished = counting.begun

    async def _count(self, tenant: str, group: str) -> Counted | None:
        """One command for a thousand jobs."""
        total, first, failed = 0, None, list[str]()
        statuses: Counter[bytes | None] = Counter()
        async for ids, found in self._pages(tenant, group):
            first = first or ids[0]
            total += len(ids)
            statuses.update(found)
            if len(failed) < _FAILED_NAMED and b"failed" in found:
                failed += _where(ids, found, b"failed")
        if first is None:
            return None
        return Counted(
            jobs=total,
            by_status={decoding.text(one): n for one, n in statuses.items() if one},
            first_failed=failed[:_FAILED_NAMED],
            created_ms=created_ms(first),
        )

    async def cancel(self, tenant: str, group: str) -> Cancelled | None:
        """Ends all that waits and asks for the end of what runs; None when there is no such
        group."""
        done = None
        async for ids, found in self._pages(tenant, group):
            unfinished = _where(ids, found, b"pending", b"processing")
            jobs = [job for job in await read_summaries(self._store, unfinished) if job]
            part = await self._operations.cancel_all(jobs)
            before = done or Cancelled(0, 0)
            done = Cancelled(before.ended + part.ended, before.asked + part.asked)
        return done

    async def _pages(
        self, tenant: str, group: str
    ) -> AsyncIterator[tuple[list[str], list[bytes | None]]]:
        """All ids, the first submitted first, each with its job's status."""
        name = keys.group(self._store.n, tenant, group)
        start = 0
        while ids := await self._range(name, start, start + _IDS_A_PAGE - 1):
            yield ids, await self._store.command("MGET", *map(keys.status, ids))
            if len(ids) < _IDS_A_PAGE:
                return
            start += _IDS_A_PAGE

    async def _range(self, name: str, first: int, last: int) -> list[str]:
        """An id that is not UTF-8 is none of ours: it comes back changed, as that of no job."""
        found = await self._store.look("LRANGE", name, first, last, otherwise=())
        return [decoding.text(one) for one in found]

    # --- listing -----------------------------------------------------------------------------

    async def jobs(
        self,
        tenant: str,
        group: str,
        *,
        status: str | None = None,
        model: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """Newest first; raises InvalidQuery for a bad cursor. It looks at a bounded number of
        jobs: with a rare filter a page may come back short, with a cursor to go on."""
        name = keys.group(self._store.n, tenant, group)
        end = await self._end(name, cursor)
        wanted = Filter.of(tenant, status, model)
        found: list[Stored] = []
        for _ in range(_MOST_LOOKED_AT // _LISTED_A_PAGE):
            if end <= 0:
                break
            start = max(0, end - _LISTED_A_PAGE)
            ids = await self._range(name, start, end - 1)
            stored = await read_summaries(self._store, ids)
            for index, job in reversed(list(enumerate(stored, start))):
                if job and wanted.matches(job, None):
                    found.append(job)
                if len(found) == limit:
                    return Page(tuple(found), encode_cursor(_Spot(index, ids[index - start])))
            end = start
            last = ids[0] if ids else ""
        return Page(tuple(found), encode_cursor(_Spot(end, last)) if end > 0 else None)

    async def _end(self, name: str, cursor: str | None) -> int:
        """How many of the list's jobs are still to be listed."""
        if cursor is None:
            return int(await self._store.look("LLEN", name, otherwise=0))
        spot = _spot(cursor)
        if await self._range(name, spot.index, spot.index) == [spot.job_id]:
            return spot.index
        # The list has been cut meanwhile.
        find = ("LPOS", name, spot.job_id, "RANK", -1)
        found = await self._store.look(*find, otherwise=None)
        return 0 if found is None else int(found)


def _where(ids: Sequence[str], found: Sequence[bytes | None], *statuses: bytes) -> list[str]:
    return [job_id for job_id, status in zip(ids, found, strict=True) if status in statuses]


def _spot(cursor: str) -> _Spot:
    try:
        spot = decode_cursor(cursor, _Spot)
        if not 0 <= spot.index < 1 << 32:
            raise ValueError(spot)
    except ValueError as error:
        raise InvalidQuery(
            "`cursor` is not one that GET /jobs gave for a group; leave it out to start at the "
            "newest job."
        ) from error
    return spot

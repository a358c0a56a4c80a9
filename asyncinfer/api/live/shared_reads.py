"""What one API process has read of the logs, for all its followers."""

import asyncio
import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Container, Iterable, Sequence
from typing import Final, cast

from msgspec import Struct

from asyncinfer.repository.inspect.log import Log, LogPage, Place, StatusChange
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, read_summaries

MAX_ERROR_BYTES: Final = 64 << 10
"""Bound on the errors in one batch of changes, which waits in memory for a slow client. A single
longer error, since anyone may write one into Redis, is not cached for other followers."""

CHANGES_A_PAGE: Final = 500

_MAX_CACHED_CHANGES: Final = 4096
_MAX_PAGES: Final = 16
_MAX_OWNERS: Final = 100_000
_OWNERS_A_CALL: Final = 500


class Topic(Struct, frozen=True):
    """The jobs that are followed: one job, or all of a tenant's jobs with this group and queue."""

    tenant: str
    job_id: str | None = None
    group: str | None = None
    queue: str | None = None


class JobChange(Struct, eq=False):
    """A change and its job as it was soon after, or None if the job was deleted. All followers get
    the same object, which is equal only to itself."""

    change: StatusChange
    stored: StoredJob | None
    text: bytes = b""
    """The event's lines, encoded for the first client and kept for the others."""

    @property
    def error_bytes(self) -> int:
        """The size of the job's error; 0 without one."""
        return len(self.stored.error) if self.stored and self.stored.error else 0


class SharedReads:
    """How far the reader of the logs is, and what it and the followers have read lately, so that it
    is read once for all of them."""

    def __init__(self, store: Store) -> None:
        self.log = Log(store)
        self.started = asyncio.Event()
        """Set once the reader has a place in every queue and passes on all later changes."""
        self.base_ms = 0
        """Older changes have been passed on, in every queue."""
        self.last_ids: dict[str, bytes] = {}
        """By queue, the id of the last entry that was read; empty while there are no followers."""
        self._store = store
        self._owners = _Owners(store)
        self._job_changes: OrderedDict[StatusChange, JobChange] = OrderedDict()
        self._pages: OrderedDict[tuple[str, Place, int], LogPage] = OrderedDict()
        self._turns = asyncio.Lock()

    def clear(self) -> None:
        """Drops what was read, and the places of the reader, which has to start anew."""
        self.started.clear()
        self.last_ids.clear()
        self._job_changes.clear()
        self._pages.clear()

    def forget_pages(self) -> None:
        """Has pages of the logs read again."""
        self._pages.clear()

    @contextlib.asynccontextmanager
    async def turn(self, seconds: float | None = None) -> AsyncIterator[None]:
        """Lets one follower work at a time, after everything else that waits in the event loop:
        200 streams that took 5,000 changes at once kept requests from being answered. Raises
        TimeoutError if the turn does not come within `seconds`."""
        async with asyncio.timeout(seconds):
            await self._turns.acquire()
        try:
            await asyncio.sleep(0)
            yield
        finally:
            self._turns.release()

    async def with_jobs(self, changes: Sequence[StatusChange]) -> list[JobChange]:
        """The changes with their jobs, in the same order; the jobs are read once for all followers.
        Call it only while holding a `turn`. Raises RedisUnavailable."""
        cached = [self._job_changes.get(change) for change in changes]
        if None not in cached:
            return cast(list[JobChange], cached)
        known = {job_change.change: job_change for job_change in cached if job_change}
        unknown = [change for change in changes if change not in known]
        ids = list({change.job_id: None for change in unknown})
        stored = dict(zip(ids, await read_summaries(self._store, ids), strict=True))
        for change in unknown:
            known[change] = job_change = JobChange(change, stored[change.job_id])
            if job_change.error_bytes <= MAX_ERROR_BYTES:
                self._job_changes[change] = job_change
        while len(self._job_changes) > _MAX_CACHED_CHANGES:
            self._job_changes.popitem(last=False)
        return [known[change] for change in changes]

    async def page(self, queue: str, start: Place, entries: int) -> LogPage:
        """A page of a log of at most `entries` entries; raises LogTrimmed or RedisUnavailable.
        Pages are cached, since many followers start from the same place after an outage; but not a
        last page: a follower gets the changes after it from the reader, which passes on only what
        comes after the follower has joined."""
        key = (queue, start, entries)
        if page := self._pages.get(key):
            return page
        page = await self.log.page(queue, start, entries, CHANGES_A_PAGE)
        if page.has_more:
            self._pages[key] = page
        if len(self._pages) > _MAX_PAGES:
            self._pages.popitem(last=False)
        return page

    async def changes_of(self, topic: Topic, changes: Sequence[StatusChange]) -> list[StatusChange]:
        """The changes that belong to the topic, in their order; those of deleted jobs belong only
        to a topic of one job. Raises RedisUnavailable."""
        if topic.job_id is not None:
            return [change for change in changes if change.job_id == topic.job_id]
        owners = await self._owners.of([change.job_id for change in changes])
        return [
            change
            for change in changes
            if _includes(topic, owners.get(change.job_id), change.queue)
        ]

    async def by_topic(
        self, queue: str, changes: Sequence[StatusChange], followed: Container[Topic]
    ) -> dict[Topic, Sequence[StatusChange]]:
        """The changes of each topic in `followed`, in their order; topics of one job are left out.
        Raises RedisUnavailable."""
        owners = await self._owners.of([change.job_id for change in changes])
        by_owner = defaultdict(list)
        for change in changes:
            by_owner[owners.get(change.job_id)].append(change)
        by_topic: dict[Topic, list[StatusChange]] = {}
        for owner, owner_changes in by_owner.items():
            for topic in _topics(owner, queue):
                if topic in followed:
                    by_topic.setdefault(topic, []).extend(owner_changes)
        # One log entry may hold several groups of a tenant, and the tenant's topic has them all.
        return {
            topic: sorted(topic_changes, key=lambda change: change.place)
            for topic, topic_changes in by_topic.items()
        }


class _Owners:
    """A cache of the tenants and groups of jobs, neither of which ever changes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[str, str | None]] = {}

    async def of(self, job_ids: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """Each job's (tenant, group) by its id, group None without one; jobs that were deleted
        before they were first read are left out. Raises RedisUnavailable."""
        unknown = [job_id for job_id in dict.fromkeys(job_ids) if job_id not in self._known]
        if len(self._known) + len(unknown) > _MAX_OWNERS:
            self._known.clear()
            unknown = list(dict.fromkeys(job_ids))
        for start in range(0, len(unknown), _OWNERS_A_CALL):
            part = unknown[start : start + _OWNERS_A_CALL]
            for job_id, stored in zip(part, await read_summaries(self._store, part), strict=True):
                if stored:
                    self._known[job_id] = stored.tenant, stored.group
        return {job_id: self._known[job_id] for job_id in job_ids if job_id in self._known}


def _includes(topic: Topic, owner: tuple[str, str | None] | None, queue: str) -> bool:
    """Whether a job of this owner (None: it is not known) and queue belongs to the topic, which
    must not be one job's."""
    if owner is None or owner[0] != topic.tenant:
        return False
    return topic.group in (None, owner[1]) and topic.queue in (None, queue)


def _topics(owner: tuple[str, str | None] | None, queue: str) -> Iterable[Topic]:
    """Every topic that a job of this owner and queue belongs to, except its own; none if the owner
    is not known (None)."""
    if owner is None:
        return
    tenant, group = owner
    yield Topic(tenant)
    yield Topic(tenant, queue=queue)
    if group is not None:
        yield Topic(tenant, group=group)
        yield Topic(tenant, group=group, queue=queue)

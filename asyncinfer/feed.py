"""How one API process tells many clients of changes: one reader of the logs, many followers."""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Final, TypeVar

from msgspec import Struct

from asyncinfer import keys
from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import DEFAULT_TENANT
from asyncinfer.limited_log import LimitedLog
from asyncinfer.positions import Position
from asyncinfer.repository.log import Change, Log, Place, changes_in
from asyncinfer.repository.store import Store
from asyncinfer.repository.submit import Stored, read_summaries
from asyncinfer.repository.upkeep import Upkeep

_log = LimitedLog(logging.getLogger(__name__))

_READ_SECONDS: Final = 1.0
"""Also how soon a queue is followed that no job was in before."""
_ENTRIES_A_READ: Final = 50
_SLACK_MS: Final = 5000
_MOST_KEPT: Final = 10_000
"""Changes that wait for one client; one that is slower reads the log at its own pace."""
_CHANGES_AT_ONCE: Final = 100
_MOST_OWNERS: Final = 100_000
_OWNERS_A_CALL: Final = 500


class Topic(Struct, frozen=True):
    """Which jobs are followed: one, or all of a tenant's that fit."""

    tenant: str
    job_id: str | None = None
    group: str | None = None
    queue: str | None = None


class News(Struct, frozen=True):
    """A change, and its job as it is by now; None when that is no longer kept."""

    change: Change
    stored: Stored | None


class Feed:
    """Reads the logs of all queues while somebody follows them."""

    def __init__(self, store: Store) -> None:
        self.log = Log(store)
        self.store = store
        self.started = asyncio.Event()
        """The reader has its place in every queue: what comes from now on is passed on."""
        self.base_ms = 0
        """Whatever is older, in any queue, has been passed on."""
        self._ends: dict[str, bytes] = {}
        self._upkeep = Upkeep(store)
        self._owners = _Owners(store)
        self._blocking = store.blocking()
        self._of_jobs: dict[str, set[Follower]] = {}
        self._of_many: dict[Topic, set[Follower]] = {}
        self._wanted = asyncio.Event()
        self._closing = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Reads until closed."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._read())

    async def close(self) -> None:
        """Ends `run`, and tells every follower that it is over."""
        self._closing.set()
        self._wanted.set()
        for follower in self._followers():
            follower.close()
        await self._blocking.close()

    @property
    def queues(self) -> Iterable[str]:
        return list(self._ends)

    @property
    def count(self) -> int:
        return len(self._followers())

    @contextlib.contextmanager
    def follow(
        self, topic: Topic, position: Position, gone: Callable[[], Awaitable[None]]
    ) -> Iterator["Follower"]:
        """A follower until it is closed, which it is once `gone` returns: the client has left."""
        follower = Follower(self, topic, position)
        self._add(follower)
        self._wanted.set()
        watch = None
        if self._tasks is None or self._closing.is_set():
            follower.close()
        else:
            watch = self._tasks.create_task(_close_once(gone, follower))
        try:
            yield follower
        finally:
            self._remove(follower)
            if watch:
                watch.cancel()

    async def only(self, topic: Topic, changes: Sequence[Change]) -> list[Change]:
        """Those that are about the topic."""
        if topic.job_id is not None:
            return [one for one in changes if one.job_id == topic.job_id]
        owners = await self._owners.of([one.job_id for one in changes])
        return [one for one in changes if topic in _topics(owners.get(one.job_id), one.queue)]

    # --- who follows what --------------------------------------------------------------------

    def _followers(self) -> list["Follower"]:
        return list(chain(*self._of_jobs.values(), *self._of_many.values()))

    def _add(self, follower: "Follower") -> None:
        topic = follower.topic
        if topic.job_id is not None:
            self._of_jobs.setdefault(topic.job_id, set()).add(follower)
        else:
            self._of_many.setdefault(topic, set()).add(follower)

    def _remove(self, follower: "Follower") -> None:
        topic = follower.topic
        if topic.job_id is not None:
            _drop(self._of_jobs, topic.job_id, follower)
        else:
            _drop(self._of_many, topic, follower)

    # --- the reader --------------------------------------------------------------------------

    async def _read(self) -> None:
        looked_at = 0.0
        while not self._closing.is_set():
            if not (self._of_jobs or self._of_many):
                await self._rest()
                continue
            try:
                if not self.started.is_set() or time.monotonic() - looked_at > _READ_SECONDS:
                    looked_at = time.monotonic()
                    await self._find_queues()
                await self._read_on()
            except RedisUnavailable as error:
                if not self._closing.is_set():
                    _log.warning(f"Events: {error.detail}")
                    self._let_all_catch_up()
                    await _pause(self._closing, random.uniform(0.1, 0.5))
            except Exception as error:
                # Redis holds what anyone may write; no content may end the one reader.
                _log.unexpected("The logs of the queues could not be followed.", error)
                self._let_all_catch_up()
                await _pause(self._closing, _READ_SECONDS)

    async def _rest(self) -> None:
        """Nobody follows. Whoever does next begins anew."""
        self.started.clear()
        self._ends.clear()
        self._wanted.clear()
        await self._wanted.wait()

    async def _find_queues(self) -> None:
        """Queues that are new while we read are read whole; else only what comes from now on."""
        if replaced := await self.log.replaced(self._ends):
            # Redis is another one, and its clock is behind: followers learn of the gap.
            for queue in replaced:
                self._ends[queue] = await self.log.last(queue)
            self.base_ms = 0
            self._let_all_catch_up()
        for queue in await self._upkeep.queues():
            if queue not in self._ends:
                new = self.started.is_set()
                self._ends[queue] = b"0-0" if new else await self.log.last(queue)
        if not self.started.is_set():
            self.started.set()
            for follower in self._followers():
                follower.wake()

    async def _read_on(self) -> None:
        streams = {keys.log(queue): queue for queue in self._ends}
        places = {name: self._ends[queue] for name, queue in streams.items()}
        entries = await self._blocking.read(places, _READ_SECONDS, _ENTRIES_A_READ)
        counts = dict.fromkeys(streams, 0)
        newest_ms = 0
        for name, entry_id, fields in entries:
            counts[name] += 1
            changes = changes_in(streams[name], entry_id, fields)
            await self._pass_on(streams[name], changes)
            self._ends[streams[name]] = entry_id
            newest_ms = max(newest_ms, int(entry_id.partition(b"-")[0]))
        # Else the others are ahead of a queue of which there is more to read.
        if max(counts.values(), default=0) < _ENTRIES_A_READ:
            # An entry of the future is no sign that the other logs have been read as far.
            newest_ms = min(newest_ms, time.time_ns() // 1_000_000)
            self.base_ms = max(self.base_ms, newest_ms - _SLACK_MS)

    async def _pass_on(self, queue: str, changes: Sequence[Change]) -> None:
        for change in changes:
            for follower in self._of_jobs.get(change.job_id, ()):
                follower.push(change)
        if not self._of_many:
            return
        owners = await self._owners.of([one.job_id for one in changes])
        for change in changes:
            for topic in _topics(owners.get(change.job_id), queue):
                for follower in self._of_many.get(topic, ()):
                    follower.push(change)

    def _let_all_catch_up(self) -> None:
        """What was missed meanwhile may be gone from the logs; each looks for itself."""
        for follower in self._followers():
            follower.fall_behind()


class Follower:
    """One client's view of the changes: first those in the log since its position, then what
    the reader passes on. One that falls behind goes back to the log."""

    def __init__(self, feed: Feed, topic: Topic, position: Position) -> None:
        self.closed = False
        self._feed = feed
        self.topic = topic
        self._changed = asyncio.Event()
        self._live: deque[Change] = deque()
        self.begin_at(position)

    def begin_at(self, position: Position) -> None:
        self._base_ms = position.base_ms
        self._told = dict(position.told)
        self._read: dict[str, Place] = {}
        """How far this was read; `_told` is how far the client was told."""
        self._taken: list[Change] = []
        self._behind: dict[str, Place] = {}
        self._fallen = True
        self._live.clear()

    async def more(self, seconds: float) -> list[News]:
        """What comes next; empty when nothing did within `seconds`, or this was closed. Raises
        LogTrimmed when changes are lost, and RedisUnavailable, after which it can go on."""
        if not self._taken:
            self._taken = await self._take(seconds)
        stored = await read_summaries(self._feed.store, [one.job_id for one in self._taken])
        news = [News(*one) for one in zip(self._taken, stored, strict=True)]
        self._taken = []
        return news

    def tell(self, change: Change, ended: int = 0) -> Position:
        """The position of a client that is told this too."""
        self._told[change.queue] = change.after
        return self.position(ended)

    def position(self, ended: int = 0) -> Position:
        return Position(self._base_ms, dict(self._told), ended)

    @property
    def caught_up(self) -> bool:
        return not (self._fallen or self._behind or self._live or self._taken)

    async def pause(self, seconds: float) -> None:
        """At most so long; a follower that is closed does not pause."""
        if not self.closed:
            self._changed.clear()
            await _pause(self._changed, seconds)

    def close(self) -> None:
        self.closed = True
        self.wake()

    # --- the reader's side -------------------------------------------------------------------

    def wake(self) -> None:
        self._changed.set()

    def push(self, change: Change) -> None:
        if self._fallen:
            return
        self._live.append(change)
        if len(self._live) > _MOST_KEPT:
            self.fall_behind()
        self.wake()

    def fall_behind(self) -> None:
        """Drops what has come: it is in the log."""
        self._fallen = True
        self._live.clear()
        self.wake()

    # --- the client's side -------------------------------------------------------------------

    async def _take(self, seconds: float) -> list[Change]:
        if self._fallen:
            if not self._feed.started.is_set():
                await self.pause(seconds)
                return []
            self._fallen = False
            self._behind = {queue: self._place(queue) for queue in self._queues()}
        if self._behind:
            return await self._catch_up()
        if not self._live:
            self._settle()
            await self.pause(seconds)
        return self._drain()

    def _queues(self) -> Iterable[str]:
        return self._feed.queues if self.topic.queue is None else [self.topic.queue]

    def _place(self, queue: str) -> Place:
        begin = (self._base_ms, 0, 0)
        return max(begin, self._told.get(queue, begin), self._read.get(queue, begin))

    async def _catch_up(self) -> list[Change]:
        queue, start = next(iter(self._behind.items()))
        page = await self._feed.log.page(queue, start)
        found = await self._feed.only(self.topic, page.changes)
        self._read[queue] = page.end
        if page.more:
            self._behind[queue] = page.end
        else:
            self._behind.pop(queue, None)
        return found

    def _drain(self) -> list[Change]:
        drained: list[Change] = []
        while self._live and len(drained) < _CHANGES_AT_ONCE:
            change = self._live.popleft()
            if change.place >= self._place(change.queue):
                self._read[change.queue] = change.after
                drained.append(change)
        return drained

    def _settle(self) -> None:
        """All that the reader has passed on is told: the position need not name older places."""
        self._base_ms = max(self._base_ms, self._feed.base_ms)
        self._told = {queue: at for queue, at in self._told.items() if at[0] >= self._base_ms}
        self._read = {queue: at for queue, at in self._read.items() if at[0] >= self._base_ms}


class _Owners:
    """Whose jobs are, and of which group: neither ever changes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[str, str | None]] = {}

    async def of(self, job_ids: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """By id (tenant, group); without those that are no longer kept."""
        unknown = [one for one in dict.fromkeys(job_ids) if one not in self._known]
        if len(self._known) + len(unknown) > _MOST_OWNERS:
            self._known.clear()
            unknown = list(dict.fromkeys(job_ids))
        for start in range(0, len(unknown), _OWNERS_A_CALL):
            part = unknown[start : start + _OWNERS_A_CALL]
            for job_id, stored in zip(part, await read_summaries(self._store, part), strict=True):
                if stored:
                    self._known[job_id] = _owner(stored)
        return {one: self._known[one] for one in job_ids if one in self._known}


def _owner(stored: Stored) -> tuple[str, str | None]:
    record = stored.record
    return (record.tenant, record.options.group) if record else (DEFAULT_TENANT, None)


def _topics(owner: tuple[str, str | None] | None, queue: str) -> Iterable[Topic]:
    """Every topic that a job is part of, but its own."""
    if owner is None:
        return
    tenant, group = owner
    yield Topic(tenant)
    yield Topic(tenant, queue=queue)
    if group is not None:
        yield Topic(tenant, group=group)
        yield Topic(tenant, group=group, queue=queue)


_Key = TypeVar("_Key", str, Topic)


def _drop(index: dict[_Key, set[Follower]], key: _Key, follower: Follower) -> None:
    index[key].discard(follower)
    if not index[key]:
        del index[key]


async def _close_once(gone: Callable[[], Awaitable[None]], follower: Follower) -> None:
    await gone()
    follower.close()


async def _pause(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

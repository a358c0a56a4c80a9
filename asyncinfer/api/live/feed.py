"""How one API process tells many clients of changes: one reader of the logs, many followers."""

import asyncio
import contextlib
import logging
import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from itertools import chain
from typing import Final, cast

from msgspec import Struct

from asyncinfer.api.live.position import Position
from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import DEFAULT_TENANT
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import Change, Log, LogPage, Place, changes_in
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored, read_summaries

_log = LimitedLog(logging.getLogger(__name__))

_READ_SECONDS: Final = 1.0
"""Also how soon a queue is followed that no job was in before."""
_ENTRIES_A_READ: Final = 50
_SLACK_MS: Final = 5000
_BASE_STEP_MS: Final = 1000
"""Followers that are as far drop the same places from their positions, so that what they are sent
is encoded once for all of them."""

_MOST_KEPT: Final = 10_000
"""Changes kept of one topic for followers whose clients are slow. A follower that is further behind
reads the log at its own pace."""

_CHANGES_AT_ONCE: Final = 256
"""As many as one submit writes to the log: followers take a burst at the pace it is read at."""

_MOST_NEWS: Final = 4096
_MOST_ERROR_BYTES: Final = 64 << 10
"""Of the news that are taken at once, since they wait in memory for a slow client; and an error
that is longer, as anyone may write one into Redis, is not kept for other followers."""

_MOST_PAGES: Final = 16
_FIRST_ENTRIES: Final = 16
_MOST_ENTRIES: Final = 200
_CHANGES_A_PAGE: Final = 500
_TURN_SECONDS: Final = 5.0
"""How long a follower waits for its turn before it shows its client that the stream lives."""

_MOST_OWNERS: Final = 100_000
_OWNERS_A_CALL: Final = 500


class Topic(Struct, frozen=True):
    """Which jobs are followed: one, or all of a tenant's that fit."""

    tenant: str
    job_id: str | None = None
    group: str | None = None
    queue: str | None = None


class News(Struct, eq=False):
    """A change, and its job as it was soon after; None when that is no longer kept. All followers
    are given the same object, which is equal to no other."""

    change: Change
    stored: Stored | None
    text: bytes = b""
    """The change as clients are sent it; encoded for the first of them and kept for the others."""

    @property
    def error_bytes(self) -> int:
        return len(self.stored.error) if self.stored and self.stored.error else 0


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
        self._owners = _Owners(store)
        self._blocking = store.blocking()
        self._of_jobs: dict[str, _Channel] = {}
        self._of_many: dict[Topic, _Channel] = {}
        self._news: OrderedDict[Change, News] = OrderedDict()
        self._pages: OrderedDict[tuple[str, Place, int], LogPage] = OrderedDict()
        self._turns = asyncio.Lock()
        self._unsure = False
        """Whether the log may have been cut beyond the place that the reader is at."""
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
        channel = self._channel(topic)
        follower = Follower(self, topic, position, channel)
        channel.followers.add(follower)
        self._wanted.set()
        watch = None
        if self._tasks is None or self._closing.is_set():
            follower.close()
        else:
            watch = self._tasks.create_task(_close_once(gone, follower))
        try:
            yield follower
        finally:
            self._remove(follower, channel)
            if watch:
                watch.cancel()

    @contextlib.asynccontextmanager
    async def turn(self, seconds: float | None = None) -> AsyncIterator[None]:
        """One follower works at a time, and each lets all that waits in the event loop go first:
        200 streams that took 5,000 changes at once kept requests from being answered. Raises
        TimeoutError when there is no turn within `seconds`."""
        async with asyncio.timeout(seconds):
            await self._turns.acquire()
        try:
            await asyncio.sleep(0)
            yield
        finally:
            self._turns.release()

    async def news(self, changes: Sequence[Change]) -> list[News]:
        """The changes with their jobs, which are read once for all followers; in a turn only."""
        found = [self._news.get(one) for one in changes]
        if None not in found:
            return cast(list[News], found)
        known = {one.change: one for one in found if one}
        unknown = [one for one in changes if one not in known]
        ids = list({one.job_id: None for one in unknown})
        stored = dict(zip(ids, await read_summaries(self.store, ids), strict=True))
        for one in unknown:
            known[one] = news = News(one, stored[one.job_id])
            if news.error_bytes <= _MOST_ERROR_BYTES:
                self._news[one] = news
        while len(self._news) > _MOST_NEWS:
            self._news.popitem(last=False)
        return [known[one] for one in changes]

    async def page(self, queue: str, start: Place, entries: int) -> LogPage:
        """A page of a log. Many followers begin at the same place after an outage; the last page is
        read by each, since what comes after it must be passed on to that one."""
        asked = (queue, start, entries)
        if page := self._pages.get(asked):
            return page
        page = await self.log.page(queue, start, entries, _CHANGES_A_PAGE)
        if page.more:
            self._pages[asked] = page
        if len(self._pages) > _MOST_PAGES:
            self._pages.popitem(last=False)
        return page

    async def only(self, topic: Topic, changes: Sequence[Change]) -> list[Change]:
        """Those that are about the topic."""
        if topic.job_id is not None:
            return [one for one in changes if one.job_id == topic.job_id]
        owners = await self._owners.of([one.job_id for one in changes])
        return [one for one in changes if _fits(topic, owners.get(one.job_id), one.queue)]

    # --- who follows what --------------------------------------------------------------------

    def _followers(self) -> list["Follower"]:
        channels = chain(self._of_jobs.values(), self._of_many.values())
        return list(chain.from_iterable(channel.followers for channel in channels))

    def _channel(self, topic: Topic) -> "_Channel":
        if topic.job_id is not None:
            return self._of_jobs.setdefault(topic.job_id, _Channel())
        return self._of_many.setdefault(topic, _Channel())

    def _remove(self, follower: "Follower", channel: "_Channel") -> None:
        channel.followers.discard(follower)
        if channel.followers:
            return
        topic = follower.topic
        if topic.job_id is not None:
            self._of_jobs.pop(topic.job_id, None)
        else:
            self._of_many.pop(topic, None)

    # --- the reader --------------------------------------------------------------------------

    async def _read(self) -> None:
        looked_at = 0.0
        while not self._closing.is_set():
            if not (self._of_jobs or self._of_many):
                await self._rest()
                continue
            try:
                if self._unsure:
                    await self._make_sure()
                    looked_at = 0.0
                if not self.started.is_set() or time.monotonic() - looked_at > _READ_SECONDS:
                    looked_at = time.monotonic()
                    await self._find_queues()
                await self._read_on()
            except RedisUnavailable as error:
                if not self._closing.is_set():
                    _log.warning(f"Events: {error.detail}")
                    self._unsure = True
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
        self._news.clear()
        self._pages.clear()
        self._unsure = False
        self._wanted.clear()
        await self._wanted.wait()

    async def _make_sure(self) -> None:
        """After an outage the reader goes on where it was, unless a log was cut beyond that. When
        all followers read the logs anew after one slow reply, the next replies were slow too."""
        for queue, end in self._ends.items():
            if not await self.log.reaches(queue, end):
                self._let_all_catch_up()
                break
        self._unsure = False

    async def _find_queues(self) -> None:
        """Queues that are new while we read are read whole; else only what comes from now on."""
        if replaced := await self.log.replaced(self._ends):
            # Redis is another one, and its clock is behind: followers learn of the gap.
            for queue in replaced:
                self._ends[queue] = await self.log.last(queue)
            self.base_ms = 0
            self._let_all_catch_up()
        for queue in await self.store.queues():
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
            async with self.turn():
                await self._pass_on(streams[name], changes_in(streams[name], entry_id, fields))
            self._ends[streams[name]] = entry_id
            newest_ms = max(newest_ms, int(entry_id.partition(b"-")[0]))
        # Else the others are ahead of a queue of which there is more to read.
        if max(counts.values(), default=0) < _ENTRIES_A_READ:
            # An entry of the future is no sign that the other logs have been read as far.
            newest_ms = min(newest_ms, time.time_ns() // 1_000_000) - _SLACK_MS
            self.base_ms = max(self.base_ms, newest_ms - newest_ms % _BASE_STEP_MS)

    async def _pass_on(self, queue: str, changes: Sequence[Change]) -> None:
        many = await self._by_topic(queue, changes) if self._of_many else {}
        for change in changes:
            if channel := self._of_jobs.get(change.job_id):
                channel.push([change])
        for topic, about in many.items():
            if channel := self._of_many.get(topic):
                channel.push(about)

    async def _by_topic(
        self, queue: str, changes: Sequence[Change]
    ) -> dict[Topic, Sequence[Change]]:
        """The changes of each topic that somebody follows, in their order."""
        owners = await self._owners.of([one.job_id for one in changes])
        by_owner = defaultdict(list)
        for change in changes:
            by_owner[owners.get(change.job_id)].append(change)
        found: dict[Topic, list[Change]] = {}
        for owner, theirs in by_owner.items():
            for topic in _topics(owner, queue):
                if topic in self._of_many:
                    found.setdefault(topic, []).extend(theirs)
        # Several groups of a tenant are in one entry, and its own topic has all of them.
        return {topic: sorted(about, key=_place_of) for topic, about in found.items()}

    def _let_all_catch_up(self) -> None:
        """What was missed meanwhile may be gone from the logs; each looks for itself."""
        self._pages.clear()
        for follower in self._followers():
            follower.fall_behind()


class _Channel:
    """What was last passed on of one topic, kept once for all who follow it."""

    def __init__(self) -> None:
        self.followers: set[Follower] = set()
        self._changes: list[Change] = []
        self._first = 0
        """The number of the oldest change kept; each later one has the next number."""

    @property
    def end(self) -> int:
        return self._first + len(self._changes)

    def push(self, changes: Sequence[Change]) -> None:
        self._changes += changes
        needed = [one.at for one in self.followers if one.at is not None]
        first = max(min(needed, default=self.end), self.end - _MOST_KEPT)
        del self._changes[: first - self._first]
        self._first = first
        for follower in self.followers:
            follower.wake()

    def take(self, start: int, count: int) -> list[Change] | None:
        """Some changes from this number on; None where it is kept no longer."""
        index = start - self._first
        return self._changes[index : index + count] if index >= 0 else None


class Follower:
    """One client's view of the changes: first those in the log since its position, then what
    the reader passes on. One that falls behind goes back to the log."""

    def __init__(self, feed: Feed, topic: Topic, position: Position, channel: _Channel) -> None:
        self.closed = False
        self._feed = feed
        self.topic = topic
        self._channel = channel
        self.at: int | None = None
        """The number of the change in the channel that comes next; None while it reads the log."""
        self._changed = asyncio.Event()
        self.begin_at(position)

    def begin_at(self, position: Position) -> None:
        self._base_ms = position.base_ms
        self._told = _from(position.base_ms, position.told)
        self._read = dict(self._told)
        """How far this was read; `_told` is how far the client was told."""
        self._taken: list[Change] = []
        self._behind: dict[str, Place] = {}
        self._entries = _FIRST_ENTRIES
        self.at = None

    async def more(self, seconds: float) -> list[News]:
        """What comes next; empty when nothing did within `seconds`, or this was closed. Raises
        LogTrimmed when changes are lost, and RedisUnavailable, after which it can go on."""
        if self._idle():
            if self.caught_up:
                self._settle()
            await self.pause(seconds)
        if self._idle():
            return []
        try:
            async with self._feed.turn(_TURN_SECONDS):
                return await self._next_news()
        except TimeoutError:
            return []

    def tell_all(self, news: Sequence[News]) -> None:
        for one in news:
            self._told[one.change.queue] = one.change.after

    def tell(self, change: Change, ended: int = 0) -> Position:
        """The position of a client that is told this too."""
        self._told[change.queue] = change.after
        return self.position(ended)

    def position(self, ended: int = 0) -> Position:
        return Position(self._base_ms, dict(self._told), ended)

    @property
    def caught_up(self) -> bool:
        waits = self._taken or self._behind
        return self.at is not None and not waits and self.at >= self._channel.end

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

    def fall_behind(self) -> None:
        """Leaves what has come: it is in the log."""
        self.at = None
        self.wake()

    # --- the client's side -------------------------------------------------------------------

    def _idle(self) -> bool:
        return self.caught_up or not (self._taken or self._feed.started.is_set())

    async def _next_news(self) -> list[News]:
        if not self._taken:
            self._taken = await self._take()
        part = self._taken[:_CHANGES_AT_ONCE]
        news = _bounded(await self._feed.news(part))
        del self._taken[: len(news)]
        return news

    async def _take(self) -> list[Change]:
        if self.at is None:
            self.at = self._channel.end
            self._behind = {queue: self._place(queue) for queue in self._queues()}
        if self._behind:
            return await self._catch_up()
        return self._drain()

    def _queues(self) -> Iterable[str]:
        return self._feed.queues if self.topic.queue is None else [self.topic.queue]

    def _place(self, queue: str) -> Place:
        return self._read.get(queue, (self._base_ms, 0, 0))

    async def _catch_up(self) -> list[Change]:
        queue, start = next(iter(self._behind.items()))
        page = await self._feed.page(queue, start, self._entries)
        found = await self._feed.only(self.topic, page.changes)
        # Entries have one job or hundreds: the next page is to have as many changes as are shown.
        wanted = self._entries * _CHANGES_A_PAGE // max(1, len(page.changes))
        self._entries = max(1, min(wanted, _MOST_ENTRIES))
        self._read[queue] = page.end
        if page.more:
            self._behind[queue] = page.end
        else:
            self._behind.pop(queue, None)
        return found

    def _drain(self) -> list[Change]:
        assert self.at is not None
        part = self._channel.take(self.at, _CHANGES_AT_ONCE)
        if part is None:
            self.fall_behind()
            return []
        self.at += len(part)
        drained: list[Change] = []
        begin, read = (self._base_ms, 0, 0), self._read
        for change in part:
            # What was passed on while this read the log is in both.
            if change.place >= read.get(change.queue, begin):
                read[change.queue] = change.after
                drained.append(change)
        return drained

    def _settle(self) -> None:
        """All that the reader has passed on is told: the position need not name older places."""
        self._base_ms = max(self._base_ms, self._feed.base_ms)
        self._told = _from(self._base_ms, self._told)
        self._read = _from(self._base_ms, self._read)


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


def _fits(topic: Topic, owner: tuple[str, str | None] | None, queue: str) -> bool:
    """Whether a job of this owner and queue is part of the topic, which is not one job's."""
    if owner is None or owner[0] != topic.tenant:
        return False
    return topic.group in (None, owner[1]) and topic.queue in (None, queue)


def _bounded(news: list[News]) -> list[News]:
    """The first of them that are not too large together; at least one."""
    size = 0
    for index, one in enumerate(news):
        size += one.error_bytes
        if size > _MOST_ERROR_BYTES and index:
            return news[:index]
    return news


def _place_of(change: Change) -> Place:
    return change.place


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


def _from(base_ms: int, places: Mapping[str, Place]) -> dict[str, Place]:
    """The places that are not before the base."""
    return {queue: at for queue, at in places.items() if at[0] >= base_ms}


async def _close_once(gone: Callable[[], Awaitable[None]], follower: Follower) -> None:
    await gone()
    follower.close()


async def _pause(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

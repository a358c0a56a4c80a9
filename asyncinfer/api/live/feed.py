"""The change feed of one API process: one reader of the logs, and many followers."""

import asyncio
import contextlib
import logging
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
from asyncinfer.jobs import now_ms
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import Log, LogPage, Place, StatusChange, parse_changes
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, read_summaries
from asyncinfer.timeouts import pause_before_retry, set_within

_log = LimitedLog(logging.getLogger(__name__))

_READ_SECONDS: Final = 1.0
"""Also how soon a new queue is followed."""
_ENTRIES_A_READ: Final = 50
_SLACK_MS: Final = 5000
_BASE_STEP_MS: Final = 1000
"""The base moves in steps, so that followers that have read equally far drop the same places from
their positions and share encoded events."""

_MAX_KEPT: Final = 10_000
"""Changes kept of one topic for followers whose clients are slow. A follower that is further behind
reads the log at its own pace."""

_CHANGES_AT_ONCE: Final = 256
"""As many as one submit writes to the log: followers take a burst as fast as it is read."""

_MAX_CACHED_CHANGES: Final = 4096
_MAX_ERROR_BYTES: Final = 64 << 10
"""Bound on the errors in one batch of changes, which waits in memory for a slow client. A single
longer error, since anyone may write one into Redis, is not cached for other followers."""

_MAX_PAGES: Final = 16
_FIRST_ENTRIES: Final = 16
_MAX_ENTRIES: Final = 200
_CHANGES_A_PAGE: Final = 500
_TURN_SECONDS: Final = 5.0
"""How long a follower waits for its turn before it sends its client a sign of life."""

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


class Feed:
    """Reads the logs of all queues while there are followers, and passes the changes on to them.
    One object for each API process."""

    def __init__(self, store: Store) -> None:
        self.log = Log(store)
        self.store = store
        self.started = asyncio.Event()
        """Set once the reader has a place in every queue and passes on all later changes."""
        self.base_ms = 0
        """Older changes have been passed on, in every queue."""
        self._last_ids: dict[str, bytes] = {}
        """By queue, the id of the last entry that was read."""
        self._owners = _Owners(store)
        self._blocking = store.blocking_connection()
        self._job_channels: dict[str, _Channel] = {}
        self._topic_channels: dict[Topic, _Channel] = {}
        self._job_changes: OrderedDict[StatusChange, JobChange] = OrderedDict()
        self._pages: OrderedDict[tuple[str, Place, int], LogPage] = OrderedDict()
        self._turns = asyncio.Lock()
        self._log_may_be_cut = False
        """Whether a log may have been trimmed beyond the reader's place."""
        self._has_followers = asyncio.Event()
        self._closing = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Reads until closed; logs errors and goes on. Followers that join before it has begun are
        closed."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._read())

    async def close(self) -> None:
        """Ends `run`, and closes every follower; later followers are closed from the start."""
        self._closing.set()
        self._has_followers.set()
        for follower in self._followers():
            follower.close()
        await self._blocking.close()

    @property
    def queues(self) -> Iterable[str]:
        """The queues whose logs are read now; empty while there are no followers."""
        return list(self._last_ids)

    @property
    def count(self) -> int:
        """How many followers there are."""
        return len(self._followers())

    @contextlib.contextmanager
    def follow(
        self, topic: Topic, position: Position, gone: Callable[[], Awaitable[None]]
    ) -> Iterator["Follower"]:
        """Yields a follower of the topic from this position. It is closed once `gone` returns,
        which means that the client has disconnected, or when the feed closes."""
        channel = self._channel(topic)
        follower = Follower(self, topic, position, channel)
        channel.followers.add(follower)
        self._has_followers.set()
        watch = None
        if self._tasks is None or self._closing.is_set():
            follower.close()
        else:
            watch = self._tasks.create_task(_close_after(gone, follower))
        try:
            yield follower
        finally:
            self._remove(follower, channel)
            if watch:
                watch.cancel()

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
        stored = dict(zip(ids, await read_summaries(self.store, ids), strict=True))
        for change in unknown:
            known[change] = job_change = JobChange(change, stored[change.job_id])
            if job_change.error_bytes <= _MAX_ERROR_BYTES:
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
        page = await self.log.page(queue, start, entries, _CHANGES_A_PAGE)
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

    # --- followers and channels --------------------------------------------------------------

    def _followers(self) -> list["Follower"]:
        """All followers, of all topics."""
        channels = chain(self._job_channels.values(), self._topic_channels.values())
        return list(chain.from_iterable(channel.followers for channel in channels))

    def _channel(self, topic: Topic) -> "_Channel":
        """The channel of the topic, made if it has no follower yet. All topics of one job share
        one."""
        if topic.job_id is not None:
            return self._job_channels.setdefault(topic.job_id, _Channel())
        return self._topic_channels.setdefault(topic, _Channel())

    def _remove(self, follower: "Follower", channel: "_Channel") -> None:
        """Removes the follower, and the channel if it was its last."""
        channel.followers.discard(follower)
        if channel.followers:
            return
        topic = follower.topic
        if topic.job_id is not None:
            self._job_channels.pop(topic.job_id, None)
        else:
            self._topic_channels.pop(topic, None)

    # --- the reader --------------------------------------------------------------------------

    async def _read(self) -> None:
        """Reads the logs and passes the changes on until closed; logs errors and goes on."""
        queues_found_at = 0.0
        while not self._closing.is_set():
            if not (self._job_channels or self._topic_channels):
                await self._wait_for_followers()
                continue
            try:
                if self._log_may_be_cut:
                    await self._check_whether_cut()
                    queues_found_at = 0.0
                if not self.started.is_set() or time.monotonic() - queues_found_at > _READ_SECONDS:
                    queues_found_at = time.monotonic()
                    await self._find_queues()
                await self._read_next_entries()
            except RedisUnavailable as error:
                if not self._closing.is_set():
                    _log.warning(f"Events: {error.detail}")
                    self._log_may_be_cut = True
                    await pause_before_retry(self._closing)
            except Exception as error:
                # Anyone may write anything into Redis; no content may end the only reader.
                _log.unexpected("The logs of the queues could not be followed.", error)
                self._return_all_to_log()
                await set_within(self._closing, _READ_SECONDS)

    async def _wait_for_followers(self) -> None:
        """Drops all state while there are no followers, and returns when there is one."""
        self.started.clear()
        self._last_ids.clear()
        self._job_changes.clear()
        self._pages.clear()
        self._log_may_be_cut = False
        self._has_followers.clear()
        await self._has_followers.wait()

    async def _check_whether_cut(self) -> None:
        """Call after an outage. Lets the reader continue where it was, unless a log was trimmed
        beyond that place: then all followers read the logs themselves. When they did so after each
        slow reply, the next replies were slow too. Raises RedisUnavailable."""
        for queue, end in self._last_ids.items():
            if not await self.log.has_all_after(queue, end):
                self._return_all_to_log()
                break
        self._log_may_be_cut = False

    async def _find_queues(self) -> None:
        """Finds new queues. A queue that appears while the reader runs is read from its start; the
        first queues are read from now on, and `started` is set. Raises RedisUnavailable."""
        if replaced := await self.log.find_replaced(self._last_ids):
            # Redis was replaced by a server whose clock is behind: followers report a gap.
            for queue in replaced:
                self._last_ids[queue] = await self.log.last_entry_id(queue)
            self.base_ms = 0
            self._return_all_to_log()
        for queue in await self.store.queues():
            if queue not in self._last_ids:
                new = self.started.is_set()
                self._last_ids[queue] = b"0-0" if new else await self.log.last_entry_id(queue)
        if not self.started.is_set():
            self.started.set()
            for follower in self._followers():
                follower.wake()

    async def _read_next_entries(self) -> None:
        """Waits up to a second for new entries, passes them on, and moves the base. Raises
        RedisUnavailable."""
        streams = {keys.log(queue): queue for queue in self._last_ids}
        places = {name: self._last_ids[queue] for name, queue in streams.items()}
        entries = await self._blocking.read(places, _READ_SECONDS, _ENTRIES_A_READ)
        counts = dict.fromkeys(streams, 0)
        newest_ms = 0
        for name, entry_id, fields in entries:
            counts[name] += 1
            async with self.turn():
                await self._distribute(
                    streams[name], parse_changes(streams[name], entry_id, fields)
                )
            self._last_ids[streams[name]] = entry_id
            newest_ms = max(newest_ms, int(entry_id.partition(b"-")[0]))
        # A full page means that this queue has more entries, possibly older than those of others.
        if max(counts.values(), default=0) < _ENTRIES_A_READ:
            # An entry with a future time does not mean that the other logs were read that far.
            newest_ms = min(newest_ms, now_ms()) - _SLACK_MS
            self.base_ms = max(self.base_ms, newest_ms - newest_ms % _BASE_STEP_MS)

    async def _distribute(self, queue: str, changes: Sequence[StatusChange]) -> None:
        """Pushes the changes of one log entry into the channels of the topics that they belong
        to."""
        by_topic = await self._by_topic(queue, changes) if self._topic_channels else {}
        for change in changes:
            if channel := self._job_channels.get(change.job_id):
                channel.push([change])
        for topic, topic_changes in by_topic.items():
            if channel := self._topic_channels.get(topic):
                channel.push(topic_changes)

    async def _by_topic(
        self, queue: str, changes: Sequence[StatusChange]
    ) -> dict[Topic, Sequence[StatusChange]]:
        """The changes of each followed topic, in their order; topics of one job are left out."""
        owners = await self._owners.of([change.job_id for change in changes])
        by_owner = defaultdict(list)
        for change in changes:
            by_owner[owners.get(change.job_id)].append(change)
        by_topic: dict[Topic, list[StatusChange]] = {}
        for owner, owner_changes in by_owner.items():
            for topic in _topics(owner, queue):
                if topic in self._topic_channels:
                    by_topic.setdefault(topic, []).extend(owner_changes)
        # One log entry may hold several groups of a tenant, and the tenant's topic has them all.
        return {
            topic: sorted(topic_changes, key=_place_of) for topic, topic_changes in by_topic.items()
        }

    def _return_all_to_log(self) -> None:
        """Makes all followers read the logs, since the reader may have missed changes."""
        self._pages.clear()
        for follower in self._followers():
            follower.return_to_log()


class _Channel:
    """The latest changes of one topic, kept once for all its followers."""

    def __init__(self) -> None:
        self.followers: set[Follower] = set()
        self._changes: list[StatusChange] = []
        self._first = 0
        """The number of the oldest change kept; later changes are numbered consecutively."""

    @property
    def end(self) -> int:
        """The number that the next change will get."""
        return self._first + len(self._changes)

    def push(self, changes: Sequence[StatusChange]) -> None:
        """Adds changes and wakes the followers; drops changes that no follower needs, and all but
        the last 10,000. A follower that needs a dropped one returns to the log."""
        self._changes += changes
        next_numbers = [
            follower.next_number for follower in self.followers if follower.next_number is not None
        ]
        first = max(min(next_numbers, default=self.end), self.end - _MAX_KEPT)
        del self._changes[: first - self._first]
        self._first = first
        for follower in self.followers:
            follower.wake()

    def take(self, start: int, count: int) -> list[StatusChange] | None:
        """Up to `count` changes from the number `start` on, empty if there are no newer ones; None
        if that one is no longer kept. Removes nothing."""
        index = start - self._first
        return self._changes[index : index + count] if index >= 0 else None


class Follower:
    """One client's view of the changes: first those in the log since its position, then those that
    the reader passes on. A follower that is too slow for these reads the log again. `Feed.follow`
    makes one for each stream."""

    def __init__(self, feed: Feed, topic: Topic, position: Position, channel: _Channel) -> None:
        self.closed = False
        self._feed = feed
        self.topic = topic
        self._channel = channel
        self.next_number: int | None = None
        """The number of the next change in the channel; None while it reads the log."""
        self._woken = asyncio.Event()
        self.begin_at(position)

    def begin_at(self, position: Position) -> None:
        """Drops all pending changes and reads the log again from this position, which replaces what
        was acknowledged."""
        self._base_ms = position.base_ms
        self._acknowledged = _places_from(position.base_ms, position.acknowledged)
        self._read_upto = dict(self._acknowledged)
        """How far the follower has read; `_acknowledged` is how far its client was sent changes."""
        self._pending: list[StatusChange] = []
        self._backlog: dict[str, Place] = {}
        self._entries = _FIRST_ENTRIES
        self.next_number = None

    async def next_changes(self, seconds: float) -> list[JobChange]:
        """The next changes, at most 256; empty if there are none within `seconds`, the turn does
        not come in 5 s, or the follower was closed. Raises LogTrimmed if changes are lost, and
        RedisUnavailable, after which the call may be repeated."""
        if self._is_idle():
            if self.caught_up:
                self._advance_base()
            await self.pause(seconds)
        if self._is_idle():
            return []
        try:
            async with self._feed.turn(_TURN_SECONDS):
                return await self._next_changes()
        except TimeoutError:
            return []

    def acknowledge_all(self, job_changes: Sequence[JobChange]) -> None:
        """Records that the client is sent these changes."""
        for job_change in job_changes:
            self._acknowledged[job_change.change.queue] = job_change.change.after

    def acknowledge(self, change: StatusChange, ended: int = 0) -> Position:
        """Records that the client is sent this change; returns its position after it, with `ended`
        as in Position."""
        self._acknowledged[change.queue] = change.after
        return self.position(ended)

    def position(self, ended: int = 0) -> Position:
        """Where another stream continues after the acknowledged changes. `ended` is as in
        Position."""
        return Position(self._base_ms, dict(self._acknowledged), ended)

    @property
    def caught_up(self) -> bool:
        """Whether all changes that the reader has passed on were returned by `more`. False while
        the log is read."""
        if self._pending or self._backlog or self.next_number is None:
            return False
        return self.next_number >= self._channel.end

    async def pause(self, seconds: float) -> None:
        """Waits until the follower is woken, at most `seconds`; not at all once it is closed."""
        if not self.closed:
            self._woken.clear()
            await set_within(self._woken, seconds)

    def close(self) -> None:
        """Ends the follower for good: sets `closed` and wakes it."""
        self.closed = True
        self.wake()

    # --- the reader's side -------------------------------------------------------------------

    def wake(self) -> None:
        """Ends a `pause` that is in progress."""
        self._woken.set()

    def return_to_log(self) -> None:
        """Leaves the channel: the follower reads its next changes from the log, from where it has
        read to. Also wakes it."""
        self.next_number = None
        self.wake()

    # --- the client's side -------------------------------------------------------------------

    def _is_idle(self) -> bool:
        """Whether there is nothing to read: all changes were returned, or the reader has not
        started and no change is pending."""
        return self.caught_up or not (self._pending or self._feed.started.is_set())

    async def _next_changes(self) -> list[JobChange]:
        """The next changes with their jobs; call it while holding a turn. May be empty while others
        follow. If it raises, no change is lost."""
        if not self._pending:
            self._pending = await self._read_more()
        part = self._pending[:_CHANGES_AT_ONCE]
        job_changes = _bounded(await self._feed.with_jobs(part))
        del self._pending[: len(job_changes)]
        return job_changes

    async def _read_more(self) -> list[StatusChange]:
        """The next changes of the topic, from the log or the channel; may be empty while others
        follow. Raises LogTrimmed or RedisUnavailable."""
        if self.next_number is None:
            self.next_number = self._channel.end
            self._backlog = {queue: self._read_place(queue) for queue in self._queues()}
        if self._backlog:
            return await self._catch_up()
        return self._take_from_channel()

    def _queues(self) -> Iterable[str]:
        """The queues whose logs have the topic's changes."""
        return self._feed.queues if self.topic.queue is None else [self.topic.queue]

    def _read_place(self, queue: str) -> Place:
        """How far the follower has read the queue's log."""
        return self._read_upto.get(queue, (self._base_ms, 0, 0))

    async def _catch_up(self) -> list[StatusChange]:
        """Reads one page of one queue's log; returns its changes of the topic, which may be
        none."""
        queue, start = next(iter(self._backlog.items()))
        page = await self._feed.page(queue, start, self._entries)
        changes = await self._feed.changes_of(self.topic, page.changes)
        # An entry may have one job or hundreds: size the next page for _CHANGES_A_PAGE changes.
        wanted = self._entries * _CHANGES_A_PAGE // max(1, len(page.changes))
        self._entries = max(1, min(wanted, _MAX_ENTRIES))
        self._read_upto[queue] = page.end
        if page.has_more:
            self._backlog[queue] = page.end
        else:
            self._backlog.pop(queue, None)
        return changes

    def _take_from_channel(self) -> list[StatusChange]:
        """The next changes of the channel that were not read from the log before. Returns to the
        log if the channel no longer has them."""
        assert self.next_number is not None
        part = self._channel.take(self.next_number, _CHANGES_AT_ONCE)
        if part is None:
            self.return_to_log()
            return []
        self.next_number += len(part)
        unread: list[StatusChange] = []
        begin, read = (self._base_ms, 0, 0), self._read_upto
        for change in part:
            # A change that was passed on while the follower read the log is in both.
            if change.place >= read.get(change.queue, begin):
                read[change.queue] = change.after
                unread.append(change)
        return unread

    def _advance_base(self) -> None:
        """Shortens the position; call it once its client was sent all changes that the reader
        passed on."""
        self._base_ms = max(self._base_ms, self._feed.base_ms)
        self._acknowledged = _places_from(self._base_ms, self._acknowledged)
        self._read_upto = _places_from(self._base_ms, self._read_upto)


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


def _bounded(job_changes: list[JobChange]) -> list[JobChange]:
    """The first changes whose errors fit into the limit together; at least one change."""
    size = 0
    for index, job_change in enumerate(job_changes):
        size += job_change.error_bytes
        if size > _MAX_ERROR_BYTES and index:
            return job_changes[:index]
    return job_changes


def _place_of(change: StatusChange) -> Place:
    return change.place


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


def _places_from(base_ms: int, places: Mapping[str, Place]) -> dict[str, Place]:
    """The places that are not before the base."""
    return {queue: place for queue, place in places.items() if place[0] >= base_ms}


async def _close_after(gone: Callable[[], Awaitable[None]], follower: Follower) -> None:
    """Closes the follower when `gone` returns."""
    await gone()
    follower.close()

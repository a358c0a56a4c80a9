"""The change feed of one API process: one reader of the logs, and many followers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import chain
from typing import Final

from asyncinfer.api.live.follower import Channel, Follower
from asyncinfer.api.live.position import Position
from asyncinfer.api.live.shared_reads import SharedReads, Topic
from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import now_ms
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import StatusChange, parse_changes
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store
from asyncinfer.timeouts import pause_before_retry, set_within

_log = LimitedLog(logging.getLogger(__name__))

_READ_SECONDS: Final = 1.0
"""Also how soon a new queue is followed."""
_ENTRIES_A_READ: Final = 50
_SLACK_MS: Final = 5000
_BASE_STEP_MS: Final = 1000
"""The base moves in steps, so that followers that have read equally far drop the same places from
their positions and share encoded events."""


class Feed:
    """Reads the logs of all queues while there are followers, and passes the changes on to them.
    One object for each API process."""

    def __init__(self, store: Store) -> None:
        self.reads = SharedReads(store)
        self._store = store
        self._blocking = store.blocking_connection()
        self._job_channels: dict[str, Channel] = {}
        self._topic_channels: dict[Topic, Channel] = {}
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
    def count(self) -> int:
        """How many followers there are."""
        return len(self._followers())

    @contextlib.contextmanager
    def follow(
        self, topic: Topic, position: Position, gone: Callable[[], Awaitable[None]]
    ) -> Iterator[Follower]:
        """Yields a follower of the topic from this position. It is closed once `gone` returns,
        which means that the client has disconnected, or when the feed closes."""
        channel = self._channel(topic)
        follower = Follower(self.reads, topic, position, channel)
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

    # --- followers and channels --------------------------------------------------------------

    def _followers(self) -> list[Follower]:
        """All followers, of all topics."""
        channels = chain(self._job_channels.values(), self._topic_channels.values())
        return list(chain.from_iterable(channel.followers for channel in channels))

    def _channel(self, topic: Topic) -> Channel:
        """The channel of the topic, made if it has no follower yet. All topics of one job share
        one."""
        if topic.job_id is not None:
            return self._job_channels.setdefault(topic.job_id, Channel())
        return self._topic_channels.setdefault(topic, Channel())

    def _remove(self, follower: Follower, channel: Channel) -> None:
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
                now = time.monotonic()
                if not self.reads.started.is_set() or now - queues_found_at > _READ_SECONDS:
                    queues_found_at = now
                    await self._find_queues()
                await self._read_next_entries()
            except RedisUnavailable as error:
                if not self._closing.is_set():
                    log_refused(_log, "Events", error)
                    self._log_may_be_cut = True
                    await pause_before_retry(self._closing)
            except Exception as error:
                # Anyone may write anything into Redis; no content may end the only reader.
                _log.unexpected("The logs of the queues could not be followed.", error)
                self._return_all_to_log()
                await set_within(self._closing, _READ_SECONDS)

    async def _wait_for_followers(self) -> None:
        """Drops all state while there are no followers, and returns when there is one."""
        self.reads.clear()
        self._log_may_be_cut = False
        self._has_followers.clear()
        await self._has_followers.wait()

    async def _check_whether_cut(self) -> None:
        """Call after an outage. Lets the reader continue where it was, unless a log was trimmed
        beyond that place: then all followers read the logs themselves. When they did so after each
        slow reply, the next replies were slow too. Raises RedisUnavailable."""
        for queue, end in self.reads.last_ids.items():
            if not await self.reads.log.has_all_after(queue, end):
                self._return_all_to_log()
                break
        self._log_may_be_cut = False

    async def _find_queues(self) -> None:
        """Finds new queues. A queue that appears while the reader runs is read from its start; the
        first queues are read from now on, and `started` is set. Raises RedisUnavailable."""
        reads = self.reads
        if replaced := await reads.log.find_replaced(reads.last_ids):
            # Redis was replaced by a server whose clock is behind: followers report a gap.
            for queue in replaced:
                reads.last_ids[queue] = await reads.log.last_entry_id(queue)
            reads.base_ms = 0
            self._return_all_to_log()
        for queue in await self._store.queues():
            if queue not in reads.last_ids:
                new = reads.started.is_set()
                reads.last_ids[queue] = b"0-0" if new else await reads.log.last_entry_id(queue)
        if not reads.started.is_set():
            reads.started.set()
            for follower in self._followers():
                follower.wake()

    async def _read_next_entries(self) -> None:
        """Waits up to a second for new entries, passes them on, and moves the base. Raises
        RedisUnavailable."""
        streams = {keys.log(queue): queue for queue in self.reads.last_ids}
        places = {name: self.reads.last_ids[queue] for name, queue in streams.items()}
        entries = await self._blocking.read(places, _READ_SECONDS, _ENTRIES_A_READ)
        counts = dict.fromkeys(streams, 0)
        newest_ms = 0
        for name, entry_id, fields in entries:
            counts[name] += 1
            async with self.reads.turn():
                await self._distribute(
                    streams[name], parse_changes(streams[name], entry_id, fields)
                )
            self.reads.last_ids[streams[name]] = entry_id
            newest_ms = max(newest_ms, int(entry_id.partition(b"-")[0]))
        # A full page means that this queue has more entries, possibly older than those of others.
        if max(counts.values(), default=0) < _ENTRIES_A_READ:
            # An entry with a future time does not mean that the other logs were read that far.
            newest_ms = min(newest_ms, now_ms()) - _SLACK_MS
            self.reads.base_ms = max(self.reads.base_ms, newest_ms - newest_ms % _BASE_STEP_MS)

    async def _distribute(self, queue: str, changes: Sequence[StatusChange]) -> None:
        """Pushes the changes of one log entry into the channels of the topics that they belong
        to."""
        by_topic = {}
        if self._topic_channels:
            by_topic = await self.reads.by_topic(queue, changes, self._topic_channels)
        for change in changes:
            if channel := self._job_channels.get(change.job_id):
                channel.push([change])
        for topic, topic_changes in by_topic.items():
            if channel := self._topic_channels.get(topic):
                channel.push(topic_changes)

    def _return_all_to_log(self) -> None:
        """Makes all followers read the logs, since the reader may have missed changes."""
        self.reads.forget_pages()
        for follower in self._followers():
            follower.return_to_log()


async def _close_after(gone: Callable[[], Awaitable[None]], follower: Follower) -> None:
    """Closes the follower when `gone` returns."""
    await gone()
    follower.close()

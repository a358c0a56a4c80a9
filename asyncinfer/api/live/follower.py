"""A follower: one client's view of the changes, from the log or from the channel of its topic."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from asyncinfer.api.live.position import Position
from asyncinfer.api.live.shared_reads import (
    CHANGES_A_PAGE,
    MAX_ERROR_BYTES,
    JobChange,
    SharedReads,
    Topic,
)
from asyncinfer.repository.inspect.log import Place, StatusChange
from asyncinfer.timeouts import set_within

_MAX_KEPT: Final = 10_000
"""Changes kept of one topic for followers whose clients are slow. A follower that is further behind
reads the log at its own pace."""

_CHANGES_AT_ONCE: Final = 256
"""As many as one submit writes to the log: followers take a burst as fast as it is read."""

_FIRST_ENTRIES: Final = 16
_MAX_ENTRIES: Final = 200
_TURN_SECONDS: Final = 5.0
"""How long a follower waits for its turn before it sends its client a sign of life."""


class Channel:
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

    def __init__(
        self, reads: SharedReads, topic: Topic, position: Position, channel: Channel
    ) -> None:
        self.closed = False
        self._reads = reads
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
            async with self._reads.turn(_TURN_SECONDS):
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
        """Whether all changes that the reader has passed on were returned. False while the log is
        read."""
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
        return self.caught_up or not (self._pending or self._reads.started.is_set())

    async def _next_changes(self) -> list[JobChange]:
        """The next changes with their jobs; call it while holding a turn. May be empty while others
        follow. If it raises, no change is lost."""
        if not self._pending:
            self._pending = await self._read_more()
        part = self._pending[:_CHANGES_AT_ONCE]
        job_changes = _bounded(await self._reads.with_jobs(part))
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
        return list(self._reads.last_ids) if self.topic.queue is None else [self.topic.queue]

    def _read_place(self, queue: str) -> Place:
        """How far the follower has read the queue's log."""
        return self._read_upto.get(queue, (self._base_ms, 0, 0))

    async def _catch_up(self) -> list[StatusChange]:
        """Reads one page of one queue's log; returns its changes of the topic, which may be
        none."""
        queue, start = next(iter(self._backlog.items()))
        page = await self._reads.page(queue, start, self._entries)
        changes = await self._reads.changes_of(self.topic, page.changes)
        # An entry may have one job or hundreds: size the next page for CHANGES_A_PAGE changes.
        wanted = self._entries * CHANGES_A_PAGE // max(1, len(page.changes))
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
        self._base_ms = max(self._base_ms, self._reads.base_ms)
        self._acknowledged = _places_from(self._base_ms, self._acknowledged)
        self._read_upto = _places_from(self._base_ms, self._read_upto)


def _bounded(job_changes: list[JobChange]) -> list[JobChange]:
    """The first changes whose errors fit into the limit together; at least one change."""
    size = 0
    for index, job_change in enumerate(job_changes):
        size += job_change.error_bytes
        if size > MAX_ERROR_BYTES and index:
            return job_changes[:index]
    return job_changes


def _places_from(base_ms: int, places: Mapping[str, Place]) -> dict[str, Place]:
    """The places that are not before the base."""
    return {queue: place for queue, place in places.items() if place[0] >= base_ms}

"""The routes that go on telling of changes, as server-sent events (WHATWG HTML, 9.2)."""

import random
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Final, Protocol

from msgspec import Struct

from asyncinfer import jobs
from asyncinfer.api.handlers.groups import group_view
from asyncinfer.api.http.messages import Reply, Request, Stream
from asyncinfer.api.job_lookup import find_job
from asyncinfer.api.live.event_text import event
from asyncinfer.api.live.feed import Follower, News, Topic
from asyncinfer.api.live.position import Position, decode_position
from asyncinfer.api.services import Services
from asyncinfer.api.views import ended, summary_view
from asyncinfer.errors import RedisUnavailable, TooManyStreams
from asyncinfer.jobs import Status
from asyncinfer.repository.inspect.log import LogTrimmed
from asyncinfer.repository.stored_jobs import Stored, queue_of, read_summaries
from asyncinfer.schemas.requests import EventsQuery, JobEventsQuery
from asyncinfer.schemas.responses import Group, Job, JobList

_OPENING: Final = b"retry: 1000\n\n"
_COMMENT: Final = b":\n\n"
_AWAY_SECONDS: Final = 0.5
_RETRY_AFTER_SECONDS: Final = 5
_LOOK_SECONDS: Final = 5.0
_SNAPSHOT_JOBS: Final = 100
_HEADERS: Final = ((b"x-accel-buffering", b"no"),)
"""Else nginx would collect events before it passes them on."""


class Missed(Struct, frozen=True):
    """The data of a `gap`."""

    detail: str = "Changes were missed, since the log no longer has them; a snapshot follows."


async def follow_job(services: Services, request: Request[JobEventsQuery]) -> Reply | Stream:
    """Tells of a job's changes until it has ended."""
    stored = await find_job(services, request)
    position = _asked_position(request)
    if position and position.ended and ended(stored) and position.ended == _round(stored):
        # All has been told, and this is how to keep an EventSource from asking again.
        return Reply(204, b"")
    queue = queue_of(services.store, stored)
    topic = Topic(request.tenant, job_id=stored.job_id, queue=queue)
    return _stream(services, request, JobStory(services, topic, queue), position)


async def follow_jobs(services: Services, request: Request[EventsQuery]) -> Reply | Stream:
    """Tells of changes of the caller's jobs, those of a group or of a model, as they come."""
    query = request.query
    queue = (await services.catalog.find(query.model)).queue if query.model is not None else None
    position = _asked_position(request)
    # Whether Redis is there is better said by a status than by silence.
    await services.store.time_ms()
    topic = Topic(request.tenant, group=query.group, queue=queue)
    if query.group is None:
        return _stream(services, request, ManyStory(services, topic, query.model), position)
    done = position is not None and position.ended > 0
    return _stream(services, request, GroupStory(services, topic, query.group, done), position)


class Story(Protocol):
    """What one client is told, from its beginning or from where it left off."""

    topic: Topic
    over: bool

    def due_seconds(self, follower: Follower) -> float:
        """After how long there is something to tell though no news come."""

    async def begin(self, follower: Follower) -> bytes:
        """The snapshot; what the follower brings comes after it."""

    async def go_on(self, follower: Follower, news: list[News]) -> bytes:
        """What is to be said of the news, or of there being none."""


def _stream(
    services: Services, request: Request[Any], story: Story, position: Position | None
) -> Stream:
    if services.feed.count >= services.config.max_streams:
        raise TooManyStreams(
            f"This server sends {services.config.max_streams} event streams already. Close those "
            "you do not read, follow a group instead of its jobs, or start more API processes.",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        )
    chunks = _chunks(services, request, story, position)
    return Stream(chunks, b"text/event-stream", headers=_HEADERS)


async def _chunks(
    services: Services, request: Request[Any], story: Story, position: Position | None
) -> AsyncGenerator[bytes, None]:
    heartbeat_seconds = services.config.heartbeat_seconds
    begun = position is not None
    gone = partial(_client_gone, request)
    with services.feed.follow(story.topic, position or Position(0), gone) as follower:
        yield _OPENING
        sent_at = time.monotonic()
        while not (follower.closed or story.over):
            due = min(story.due_seconds(follower), sent_at + heartbeat_seconds - time.monotonic())
            chunk = b""
            try:
                if not begun:
                    chunk = await story.begin(follower)
                    begun = True
                else:
                    chunk = await story.go_on(follower, await follower.more(max(due, 0.0)))
            except LogTrimmed:
                chunk, begun = event("gap", Missed()), False
            except RedisUnavailable:
                await follower.pause(_AWAY_SECONDS * random.uniform(0.5, 1.5))
            if not chunk and time.monotonic() - sent_at >= heartbeat_seconds:
                chunk = _COMMENT
            if chunk:
                yield chunk
                sent_at = time.monotonic()
                # Sends nothing, and returns once the client has taken enough of the chunk: nothing
                # is read and encoded for one that does not read.
                yield b""


async def _client_gone(request: Request[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _asked_position(request: Request[Any]) -> Position | None:
    """An EventSource that connects again sends the header, beside the query it began with."""
    text = request.header(b"last-event-id") or request.query.last_event_id
    return decode_position(text) if text else None


def _summary(services: Services, stored: Stored) -> Job:
    return summary_view(stored, services.catalog.default_model, services.reasons.of(stored))


def _round(stored: Stored) -> int:
    return stored.record.round if stored.record else 1


# --- one job ---------------------------------------------------------------------------------


class JobStory:
    """Ends with the job."""

    def __init__(self, services: Services, topic: Topic, queue: str) -> None:
        assert topic.job_id is not None
        self.topic = topic
        self.over = False
        self._services = services
        self._job_id = topic.job_id
        self._queue = queue
        self._look_at = 0.0
        """When the job itself is looked at again: no log tells of one that is gone."""
        self._saw_end = True
        """That it has ended may be told without the log, which had time to tell it."""

    def due_seconds(self, follower: Follower) -> float:
        return self._look_at - time.monotonic() if follower.caught_up else float("inf")

    async def begin(self, follower: Follower) -> bytes:
        """The job and the log as they were at one moment: nothing is told twice, or never."""
        stored, place = await self._services.feed.log.moment(self._queue, self._job_id)
        position = Position(place[0], {self._queue: place})
        follower.begin_at(position)
        self._look_again()
        self._saw_end = False
        if stored is None:
            self.over = True
            return b""
        view = _summary(self._services, stored)
        return event("snapshot", view, position) + self._end(stored, follower)

    async def go_on(self, follower: Follower, news: list[News]) -> bytes:
        told = b""
        for one in news:
            told += self._tell(one, follower)
            if self.over:
                return told
        if not news and follower.caught_up and time.monotonic() >= self._look_at:
            # Its end may be older than the position: that of a snapshot of the ended job.
            (stored,) = await read_summaries(self._services.store, [self._job_id])
            self._look_again()
            self.over = stored is None
            if stored and self._saw_end:
                told += self._end(stored, follower)
            self._saw_end = stored is not None and ended(stored)
        return told

    def _look_again(self) -> None:
        self._look_at = time.monotonic() + _LOOK_SECONDS * random.uniform(0.8, 1.2)

    def _tell(self, news: News, follower: Follower) -> bytes:
        status = news.change.status
        self.over = status in jobs.TERMINAL
        same = news.stored is not None and news.stored.status == status
        last = _round(news.stored) if self.over and same and news.stored else 0
        return self._services.event_texts.one(news, follower, last)

    def _end(self, stored: Stored, follower: Follower) -> bytes:
        if not ended(stored):
            return b""
        self.over = True
        view = _summary(self._services, stored)
        return event(stored.status, view, follower.position(_round(stored)))


# --- many jobs -------------------------------------------------------------------------------


class ManyStory:
    """A tenant's jobs, all or a model's; goes on until the client leaves."""

    def __init__(self, services: Services, topic: Topic, model: str | None) -> None:
        self.topic = topic
        self.over = False
        self._services = services
        self._model = model

    def due_seconds(self, follower: Follower) -> float:
        return float("inf")

    async def begin(self, follower: Follower) -> bytes:
        follower.begin_at(Position(await self._services.store.time_ms()))
        # All streams begin anew when a log was cut under them.
        async with self._services.feed.turn():
            page = await self._services.inspection.jobs(
                tenant=self.topic.tenant, model=self._model, limit=_SNAPSHOT_JOBS
            )
        view = JobList([_summary(self._services, job) for job in page.jobs], page.cursor)
        return event("snapshot", view, follower.position())

    async def go_on(self, follower: Follower, news: list[News]) -> bytes:
        return self._services.event_texts.many(news, follower)


# --- a group ---------------------------------------------------------------------------------

_PROGRESS_SECONDS: Final = 1.0
_COUNTING_SHARE: Final = 10
"""Counting takes at most one part in so many of the time, however large the group."""


class GroupStory:
    """A group's jobs and how far they are; goes on until the client leaves."""

    def __init__(self, services: Services, topic: Topic, group: str, done: bool) -> None:
        self.topic = topic
        self.over = False
        self._services = services
        self._group = group
        self._changed = not done
        """Something was told, or may have been, that was not counted."""
        self._left: int | None = None
        """Jobs that have not ended, as far as is known."""
        self._done: Group | None = None
        """To be told once all has been told that was counted."""
        self._soonest = self._regular = 0.0
        """When the next count may be, if it may be the last; and when otherwise."""

    def due_seconds(self, follower: Follower) -> float:
        if not (self._changed and follower.caught_up):
            return float("inf")
        at = self._soonest if self._left is not None and self._left <= 0 else self._regular
        return at - time.monotonic()

    async def begin(self, follower: Follower) -> bytes:
        follower.begin_at(Position(await self._services.store.time_ms()))
        view = await self._count(follower)
        self._counted()
        return event("snapshot", view, follower.position())

    async def go_on(self, follower: Follower, news: list[News]) -> bytes:
        told = self._services.event_texts.many(news, follower)
        self._note([one.change.status for one in news])
        if self._done and follower.caught_up:
            told += event("done", self._done, follower.position(ended=1))
            self._done = None
        elif self.due_seconds(follower) <= 0:
            told += await self._progress(follower)
        return told

    def _note(self, statuses: list[Status]) -> None:
        ends = sum(status in jobs.TERMINAL for status in statuses)
        if self._left is not None:
            self._left -= ends
        if ends < len(statuses):
            self._done = None
        # Ends that come while `done` is held back were counted.
        if statuses and self._done is None:
            self._changed = True

    async def _progress(self, follower: Follower) -> bytes:
        """What was told already is not to be lost with a count that fails."""
        try:
            view = await self._count(follower)
        except RedisUnavailable:
            self._soonest = self._regular = time.monotonic() + _PROGRESS_SECONDS
            return b""
        if self._done or time.monotonic() < self._regular:
            # `done` says it all; or this was not the last count after all.
            self._changed = self._done is None
            return b""
        self._counted()
        return event("progress", view, follower.position())

    def _counted(self) -> None:
        self._changed = False
        self._regular = max(self._soonest, time.monotonic() + _PROGRESS_SECONDS)

    async def _count(self, follower: Follower) -> Group:
        started_at = time.monotonic()
        counted = await self._services.groups.count(self.topic.tenant, self._group)
        now = time.monotonic()
        self._soonest = now + _COUNTING_SHARE * (now - started_at)
        self._left = counted.left if counted else None
        view = group_view(self._group, counted)
        if counted and not counted.left:
            self._done = view
            # The end of every job that was counted is in the log by now.
            follower.fall_behind()
        return view

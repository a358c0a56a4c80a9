"""What event streams show: one job, many jobs, or a group."""

import random
import time
from typing import Final, Protocol

from asyncinfer import jobs
from asyncinfer.api.handlers.groups import group_view
from asyncinfer.api.live.event_text import encode_event
from asyncinfer.api.live.follower import Follower
from asyncinfer.api.live.position import Position
from asyncinfer.api.live.shared_reads import JobChange, Topic
from asyncinfer.api.services import Services
from asyncinfer.api.views import summary_view
from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import Status
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.stored_jobs import StoredJob, read_summaries
from asyncinfer.schemas.responses import Group, Job, JobList

_CHECK_SECONDS: Final = 5.0
_SNAPSHOT_JOBS: Final = 100


class EventSource(Protocol):
    """The events for one client, from the beginning or from where it left off. The stream ends once
    `is_over`."""

    topic: Topic
    is_over: bool

    def due_seconds(self, follower: Follower) -> float:
        """The seconds after which `next_events` has something to do even without changes: negative
        if it is overdue, infinite if it never has."""

    async def snapshot(self, follower: Follower) -> bytes:
        """The snapshot event, empty if there is nothing to show; the follower continues with the
        changes after it. Raises RedisUnavailable."""

    async def next_events(self, follower: Follower, job_changes: list[JobChange]) -> bytes:
        """The events for these changes, or those that are due without any; may be empty. The
        changes are acknowledged to the follower. Raises RedisUnavailable only without changes."""


def _summary(services: Services, stored: StoredJob) -> Job:
    """The job without its result, with why it waits."""
    return summary_view(stored, services.catalog.default_model, services.wait_reasons.of(stored))


# --- one job ---------------------------------------------------------------------------------


class JobEventSource:
    """The events of one job; over once the job has ended or was deleted."""

    def __init__(self, services: Services, topic: Topic, queue: str) -> None:
        assert topic.job_id is not None
        self.topic = topic
        self.is_over = False
        self._services = services
        self._job_id = topic.job_id
        self._queue = queue
        self._check_at = 0.0
        """When to read the job itself again: no log says that a job was deleted."""
        self._saw_end = True
        """Whether the last check found that the job has ended. The next check then sends the end
        without the log, which had time to report it."""

    def due_seconds(self, follower: Follower) -> float:
        """The seconds until the job itself is read again; infinite while changes remain to be
        sent."""
        return self._check_at - time.monotonic() if follower.caught_up else float("inf")

    async def snapshot(self, follower: Follower) -> bytes:
        """Reads the job and the log's end at one moment: no change is lost or sent twice. The event
        of the end follows the snapshot of an ended job; empty if the job is gone."""
        log = self._services.feed.reads.log
        stored, place = await log.read_job_and_place(self._queue, self._job_id)
        position = Position(place[0], {self._queue: place})
        follower.begin_at(position)
        self._schedule_check()
        self._saw_end = False
        if stored is None:
            self.is_over = True
            return b""
        view = _summary(self._services, stored)
        return encode_event("snapshot", view, position) + self._encode_end(stored, follower)

    async def next_events(self, follower: Follower, job_changes: list[JobChange]) -> bytes:
        """The events for these changes, up to the first end. Without changes, reads the job when a
        check is due, and sends an end that the log did not report."""
        events = b""
        for job_change in job_changes:
            events += self._encode_change(job_change, follower)
            if self.is_over:
                return events
        if not job_changes and follower.caught_up and time.monotonic() >= self._check_at:
            # The end may be before the position, if that comes from a snapshot of the ended job.
            (stored,) = await read_summaries(self._services.store, [self._job_id])
            self._schedule_check()
            self.is_over = stored is None
            if stored and self._saw_end:
                events += self._encode_end(stored, follower)
            self._saw_end = stored is not None and stored.has_ended
        return events

    def _schedule_check(self) -> None:
        """Makes the next check due in 4 to 6 s."""
        self._check_at = time.monotonic() + _CHECK_SECONDS * random.uniform(0.8, 1.2)

    def _encode_change(self, job_change: JobChange, follower: Follower) -> bytes:
        """The change as an event, after which the source is over if it is an end."""
        status, stored = job_change.change.status, job_change.stored
        self.is_over = status in jobs.TERMINAL
        ended_round = 0
        if self.is_over and stored is not None and stored.status == status:
            ended_round = stored.round
        return self._services.event_texts.encode(job_change, follower, ended_round)

    def _encode_end(self, stored: StoredJob, follower: Follower) -> bytes:
        """The event of the job's end, after which the source is over; empty if the job has not
        ended."""
        if not stored.has_ended:
            return b""
        self.is_over = True
        view = _summary(self._services, stored)
        return encode_event(stored.status, view, follower.position(stored.round))


# --- many jobs -------------------------------------------------------------------------------


class JobsEventSource:
    """The events of a tenant's jobs, all or those of a model; goes on until the client leaves."""

    def __init__(self, services: Services, topic: Topic, model: str | None) -> None:
        self.topic = topic
        self.is_over = False
        self._services = services
        self._model = model

    def due_seconds(self, follower: Follower) -> float:
        return float("inf")

    async def snapshot(self, follower: Follower) -> bytes:
        """The newest 100 jobs, with a cursor for more. The follower begins before they are read, so
        that no change is lost; one may be in the snapshot and also follow it."""
        follower.begin_at(Position(await self._services.store.time_ms()))
        # When a log was trimmed, all streams take a new snapshot at once.
        async with self._services.feed.reads.turn():
            page = await self._services.inspection.jobs(
                Filter(tenant=self.topic.tenant, model=self._model), limit=_SNAPSHOT_JOBS
            )
        view = JobList([_summary(self._services, job) for job in page.jobs], page.cursor)
        return encode_event("snapshot", view, follower.position())

    async def next_events(self, follower: Follower, job_changes: list[JobChange]) -> bytes:
        """The events for these changes; reads nothing."""
        return self._services.event_texts.encode_all(job_changes, follower)


# --- a group ---------------------------------------------------------------------------------

_PROGRESS_SECONDS: Final = 1.0
_COUNTING_SHARE: Final = 10
"""Counting takes at most a tenth of the time, however large the group."""


class GroupEventSource:
    """The events of a group's jobs and its progress; goes on until the client leaves."""

    def __init__(self, services: Services, topic: Topic, group: str, done: bool) -> None:
        """`done` says that the client has already been sent the group's `done`."""
        self.topic = topic
        self.is_over = False
        self._services = services
        self._group = group
        self._dirty = not done
        """Whether changes were sent, or may have been, since the last count."""
        self._unfinished: int | None = None
        """Unfinished jobs: those of the last count, less the ends sent since. None if unknown."""
        self._final_view: Group | None = None
        """The `done` event's data, held back until all changes that were counted are sent."""
        self._earliest_count_at = self._next_count_at = 0.0
        """The earliest time of the next count: the first if all jobs seem to have ended."""

    def due_seconds(self, follower: Follower) -> float:
        """The seconds until the next count, negative if it is overdue; infinite while nothing has
        changed since the last one, or changes remain to be sent."""
        if not (self._dirty and follower.caught_up):
            return float("inf")
        all_ended = self._unfinished is not None and self._unfinished <= 0
        count_at = self._earliest_count_at if all_ended else self._next_count_at
        return count_at - time.monotonic()

    async def snapshot(self, follower: Follower) -> bytes:
        """The group's counts; those of an unknown group are zeros."""
        follower.begin_at(Position(await self._services.store.time_ms()))
        view = await self._count(follower)
        self._note_count_sent()
        return encode_event("snapshot", view, follower.position())

    async def next_events(self, follower: Follower, job_changes: list[JobChange]) -> bytes:
        """The events for these changes, then `done` if all jobs had ended when they were counted
        and all their changes are sent, or `progress` if a count is due. Never raises
        RedisUnavailable."""
        events = self._services.event_texts.encode_all(job_changes, follower)
        self._note([job_change.change.status for job_change in job_changes])
        if self._final_view and follower.caught_up:
            events += encode_event("done", self._final_view, follower.position(ended=1))
            self._final_view = None
        elif self.due_seconds(follower) <= 0:
            events += await self._progress(follower)
        return events

    def _note(self, statuses: list[Status]) -> None:
        """Adjusts the number of unfinished jobs by these changes, and whether a count is due."""
        ends = sum(status in jobs.TERMINAL for status in statuses)
        if self._unfinished is not None:
            self._unfinished -= ends
        if ends < len(statuses):
            self._final_view = None
        # Ends that arrive while `done` is held back were already counted.
        if statuses and self._final_view is None:
            self._dirty = True

    async def _progress(self, follower: Follower) -> bytes:
        """The `progress` event; empty if `done` will follow or jobs are still running when all
        seemed to have ended. Does not raise if Redis is away, since the events that were encoded
        before must not be lost."""
        try:
            view = await self._count(follower)
        except RedisUnavailable:
            self._earliest_count_at = self._next_count_at = time.monotonic() + _PROGRESS_SECONDS
            return b""
        if self._final_view or time.monotonic() < self._next_count_at:
            # `done` will follow, or some jobs have not ended after all.
            self._dirty = self._final_view is None
            return b""
        self._note_count_sent()
        return encode_event("progress", view, follower.position())

    def _note_count_sent(self) -> None:
        """Records that the client has the last count; the next is sent a second later at the
        earliest, and only after changes."""
        self._dirty = False
        self._next_count_at = max(self._earliest_count_at, time.monotonic() + _PROGRESS_SECONDS)

    async def _count(self, follower: Follower) -> Group:
        """Counts the group; schedules the next count, and `done` if all jobs have ended. Raises
        RedisUnavailable."""
        started_at = time.monotonic()
        counted = await self._services.groups.count(self.topic.tenant, self._group)
        now = time.monotonic()
        self._earliest_count_at = now + _COUNTING_SHARE * (now - started_at)
        self._unfinished = counted.unfinished if counted else None
        view = await group_view(self._services, self._group, counted)
        if counted and not counted.unfinished:
            self._final_view = view
            # The log now has the end of every job that was counted.
            follower.return_to_log()
        return view

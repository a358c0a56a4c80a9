"""A look at one queue: where its waiting jobs are, and how fast they move on."""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.jobs import Priority, Record, id_text, read_record, record_seq
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import WorkerAnnouncement
from asyncinfer.repository.inspect.log import decode_ids
from asyncinfer.repository.inspect.queue_load import (
    QueueDepth,
    QueueLoad,
    combine_load,
    parse_depth,
    parse_pace,
    waits_since_ms,
)
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import StoredJob

MAX_EXACT: Final = 1000
"""A position is exact if fewer jobs are ahead: so many ids are read at the serving end of a
list."""

_POINTS: Final = 16
_HANDED_BACK: Final = 256
_LOG_ENTRIES: Final = 100

_WINDOW_MS: Final = 30_000
_MIN_WINDOW_MS: Final = 2_000
_MIN_RUNS: Final = 8
_ENOUGH_RUNS: Final = 16
"""A rate is measured over the last 16 runs and 2 s at least, and over no more than that needs,
since the number of workers may just have changed. With fewer than 8 runs in 30 s there is none."""

_PRIORITIES: Final[tuple[Priority, ...]] = ("high", "normal", "low")
"""In the order served. That every 16th round of claims begins with the low ones is left out."""


class Position(Struct, frozen=True):
    """How many jobs are served before a waiting one, and whether that is an estimate."""

    ahead: int
    is_about: bool


class Loss(Struct, frozen=True):
    """A job whose worker is lost: it did not renew the job's lease when it should have."""

    deliveries: int
    """How many workers were lost with the job before."""
    seconds: float
    """In at most so many the job is put back."""


class _Point(Struct, frozen=True):
    """A job behind the front of a list: its place from the serving end, and its record."""

    place: int
    seq: int
    since_ms: int
    """When it began to wait."""


class _List(Struct, frozen=True):
    """The waiting jobs of one priority."""

    length: int
    """With stale entries."""
    places: Mapping[str, int]
    """By id the places of the jobs at the serving end, the next one's 0; without stale entries."""
    points: tuple[_Point, ...]
    deliveries: Mapping[str, int]
    """By id the lost deliveries of jobs among the next ones; only those that have any."""

    def without_stale(self, place: float, waiting: int) -> float:
        """A place behind the front, less the stale entries ahead of it: those of the front, and a
        share of the others. `waiting` is the number of jobs in the list."""
        stale_in_front = MAX_EXACT - len(self.places)
        stale_behind = max(0, self.length - waiting - stale_in_front)
        share = (place - MAX_EXACT) / max(1, self.length - MAX_EXACT)
        return place - stale_in_front - share * stale_behind


class QueueLook(Struct, frozen=True, kw_only=True):
    """What was seen of a queue at one moment. It answers for all of its jobs."""

    now_ms: int
    depth: QueueDepth
    pace: float | None
    seq: int
    """How many jobs the queue ever had."""
    lists: tuple[_List, ...]
    ended: tuple[tuple[int, int], ...]
    """When jobs ended lately, in ms by the server's clock, and how many; the newest first."""
    losses: Mapping[str, Loss]
    """By id, the running jobs whose worker is lost."""

    def load(self, model: str, workers: Sequence[WorkerAnnouncement]) -> QueueLoad:
        """The load of the queue, which is that of `model`, with these workers."""
        return msgspec.structs.replace(
            combine_load(model, self.depth, workers, self.pace),
            lost=len(self.losses),
            lost_seconds=min((loss.seconds for loss in self.losses.values()), default=0.0),
        )

    def position(self, stored: StoredJob) -> Position | None:
        """How many jobs are ahead of a waiting one; None if it is in no list, as a delayed one."""
        priority = stored.record.options.priority if stored.record else "normal"
        index = _PRIORITIES.index(priority)
        ahead = sum(self.depth.waiting[:index])
        listed = self.lists[index]
        place = listed.places.get(stored.job_id)
        if place is not None:
            return Position(ahead + place, ahead + place >= MAX_EXACT)
        if stored.record is None:
            return None
        place = self._estimate(listed, self.depth.waiting[index], stored.record, stored.meta)
        return None if place is None else Position(ahead + place, is_about=True)

    @property
    def stalled_seconds(self) -> float:
        """For how long jobs have waited without any that runs or ends; 0 if one runs, or none
        waits. The jobs of lost workers do not run."""
        if self.depth.running > len(self.losses) or self.depth.oldest_age_seconds is None:
            return 0.0
        last_end_ms = self.ended[0][0] if self.ended else 0
        return max(0.0, min(self.depth.oldest_age_seconds, (self.now_ms - last_end_ms) / 1000))

    def deliveries(self, job_id: str) -> int:
        """How many workers were lost with a waiting job that is among the next in turn."""
        return max((listed.deliveries.get(job_id, 0) for listed in self.lists), default=0)

    def jobs_per_second(self, waits_since_ms: int) -> float | None:
        """The rate at which jobs have ended lately, at the end of runs; None if too few have.

        Only the time counts in which a job waited, so that no slot was without work: since the job
        that waits longest began to, or the one that waits since `waits_since_ms`.
        """
        oldest_seconds = self.depth.oldest_age_seconds or 0.0
        busy_since_ms = min(waits_since_ms, self.now_ms - int(oldest_seconds * 1000))
        return _rate(self.now_ms, max(busy_since_ms, self.now_ms - _WINDOW_MS), self.ended)

    def _estimate(self, listed: _List, waiting: int, record: Record, meta: bytes) -> int | None:
        """The place in its list of a job that is not at the serving end, without stale entries;
        None if it is in no list. `waiting` is the number of jobs in the list."""
        since_ms, seq = waits_since_ms(record), _seq(meta)
        if record.options.delay_seconds and since_ms > self.now_ms:
            return None
        joined_late = bool(record.options.delay_seconds) or record.round > 1
        later = since_ms > self.now_ms if joined_late else seq > self.seq
        if later:
            # It has come since the look, at the end of the list.
            return waiting + (0 if joined_late else seq - self.seq - 1)
        if not listed.points:
            return None
        # A job that was delayed or retried has an old number, and its place by the time.
        place = (
            _interpolated(listed.points, since_ms, lambda point: point.since_ms)
            if joined_late
            else _interpolated(listed.points, seq, lambda point: point.seq)
        )
        return round(listed.without_stale(place, waiting))


async def look_at(store: Store, queue: str, model: str) -> QueueLook:
    """Looks at the queue of a model, with one call. Raises as `Store.call` does."""
    policy = store.policy
    args = {
        "front_jobs": MAX_EXACT,
        "points": _POINTS,
        "handed_back": _HANDED_BACK,
        "log_entries": _LOG_ENTRIES,
        # It is renewed every third of a lease.
        "overdue_ms": policy.lease_ms // 2,
    }
    names = [queue, keys.pace(store.queue_name, model)]
    reply = await store.call(script("look"), names, [encode_args(args)])
    now_ms, seq, pace, depth, hold_ms, lists, ended, overdue = reply
    # A sweep comes after up to one and a half of its intervals.
    sweep_ms = 3 * policy.tick_ms // 2
    return QueueLook(
        now_ms=now_ms,
        depth=parse_depth(now_ms, *depth),
        pace=parse_pace(pace),
        seq=seq,
        lists=tuple(_parse_list(*parts) for parts in lists),
        ended=tuple(_pairs(ended)),
        losses={
            id_text(job_id): Loss(deliveries, (max(ends_ms - now_ms, hold_ms) + sweep_ms) / 1000)
            for job_id, ends_ms, deliveries in zip(
                overdue[::3], overdue[1::3], overdue[2::3], strict=True
            )
        },
    )


def _parse_list(length: int, front: bytes, points: Any, handed_back: Any) -> _List:
    return _List(
        length,
        places={job_id: place for place, job_id in enumerate(decode_ids(front)) if job_id},
        points=tuple(_parse_points(points)),
        deliveries={id_text(job_id): count for job_id, count in _pairs(handed_back)},
    )


def _parse_points(points: Any) -> Iterator[_Point]:
    """The points that lie in the order of their jobs' numbers: a job that was delayed, retried or
    put back has an old one."""
    last_seq = -1
    for place, meta in _pairs(points):
        record, seq = read_record(meta), _seq(meta)
        if record and seq > last_seq and record.round == 1 and not record.options.delay_seconds:
            yield _Point(place, seq, waits_since_ms(record))
            last_seq = seq


def _pairs(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _seq(meta: bytes) -> int:
    """Which job of its queue it is."""
    return int.from_bytes(record_seq(meta))


def _interpolated(points: Sequence[_Point], value: int, key: Callable[[_Point], int]) -> float:
    """The place of a job between two points by its number or time; at least that of the first
    point, and beyond the last one that of the last."""
    after = bisect.bisect_left(points, value, key=key)
    if after == 0:
        return points[0].place
    if after == len(points):
        return points[-1].place
    low, high = points[after - 1], points[after]
    # Clocks of several APIs may disagree, so that times are not quite in order.
    span = max(1, key(high) - key(low))
    return low.place + min(1.0, (value - key(low)) / span) * (high.place - low.place)


def _rate(now_ms: int, since_ms: int, ended: Sequence[tuple[int, int]]) -> float | None:
    """How many jobs ended in a second, from the end of one run until now; None with fewer than 8
    runs after that. `ended` has the newest first; what is older than `since_ms` does not count."""
    rate, jobs = None, 0
    for runs, (at_ms, count) in enumerate(ended):
        seen_ms = now_ms - at_ms
        if at_ms < since_ms or (runs > _ENOUGH_RUNS and seen_ms > _MIN_WINDOW_MS):
            break
        if runs >= _MIN_RUNS and seen_ms > 0:
            rate = 1000 * jobs / seen_ms
        jobs += count
    return rate

"""Statistics: the throughput of each queue, and what each worker does."""

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.jobs import Record
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import (
    WorkerAnnouncement,
    decode_worker_announcement,
)
from asyncinfer.repository.inspect.overview import read_loads
from asyncinfer.repository.inspect.queue_load import (
    QueueLoad,
    readable_records,
    waits_since_ms,
)
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.schemas.operations import Queue, QueueWebhooks, WaitingJobs, Worker, percentiles
from asyncinfer.untrusted import decoding

_WINDOW_MS: Final = 60_000
_ENTRIES_PER_CALL: Final = 1000
_MAX_ENTRIES: Final = 2000
_ALL_ENTRIES: Final = 16_000
"""The bound of entries read of all logs together; each queue has its share, but at least 100."""

_MIN_ENTRIES: Final = 100
_MAX_JOBS_COUNTED: Final = 20_000
_MAX_SAMPLES: Final = 200
_ALL_SAMPLES: Final = 8_000


class _Tally(Struct, frozen=True):
    """The counts of a queue's recent changes."""

    window_ms: int
    submitted: int
    completed: int
    failed: int
    ended: tuple[Record, ...]
    """The records of the jobs that ended last."""

    def per_second(self, count: int) -> float:
        return count * 1000 / self.window_ms


class Statistics:
    """Reads statistics with a bounded number of short calls."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def queues(self) -> list[Queue]:
        """The statistics of the queues that `read_loads` finds, by name."""
        found = (await read_loads(self._store)).queues
        tallies = await self._tallies([one.queue for one in found])
        return [
            _queue(one.queue, one.model, one.load, tally)
            for one, tally in zip(found, tallies, strict=True)
        ]

    async def workers(self) -> list[Worker]:
        """The live workers, by id."""
        store = self._store
        now_ms = await store.time_ms()
        with_times = ("ZRANGE", keys.workers(store.queue_name), 0, -1, "WITHSCORES")
        reply = await store.read(*with_times, otherwise=())
        last_seen = _last_seen(reply[::2], reply[1::2])
        if not last_seen:
            return []
        bodies = await store.command(
            "MGET", *(keys.worker(store.queue_name, name) for name in last_seen)
        )
        return [
            _worker(name, decode_worker_announcement(body), now_ms, last_seen[name])
            for name, body in sorted(zip(last_seen, bodies, strict=True))
            if body
        ]

    async def _tallies(self, queues: Sequence[str]) -> list[_Tally]:
        entries = _share(_ALL_ENTRIES, len(queues), _MIN_ENTRIES, _MAX_ENTRIES)
        args = encode_args(
            {
                "window_ms": _WINDOW_MS,
                "max_entries": entries,
                "max_jobs": _MAX_JOBS_COUNTED,
                "max_samples": _share(_ALL_SAMPLES, len(queues), 10, _MAX_SAMPLES),
            }
        )
        at_once = max(1, _ENTRIES_PER_CALL // entries)
        tallies: list[_Tally] = []
        for start in range(0, len(queues), at_once):
            reply = await self._store.call(script("tally"), queues[start : start + at_once], [args])
            tallies += [_parse_tally(*parts) if parts else _EMPTY_TALLY for parts in reply]
        return tallies


def _parse_tally(
    window_ms: int, submitted: int, completed: int, failed: int, metas: Sequence[bytes]
) -> _Tally:
    return _Tally(window_ms, submitted, completed, failed, tuple(readable_records(metas)))


_EMPTY_TALLY: Final = _Tally(_WINDOW_MS, 0, 0, 0, ())


def _last_seen(names: Sequence[bytes], times: Sequence[bytes]) -> dict[str, float]:
    """{worker id: when it announced itself last, in s}; without unreadable entries."""
    pairs = [
        (decoding.name(name), decoding.finite(at)) for name, at in zip(names, times, strict=True)
    ]
    return {name: at for name, at in pairs if name is not None and at is not None}


def _share(total: int, parts: int, minimum: int, maximum: int) -> int:
    return max(minimum, min(maximum, total // max(1, parts)))


def _queue(queue: str, model: str | None, load: QueueLoad, tally: _Tally) -> Queue:
    depth = load.depth
    return Queue(
        model=model,
        queue=queue,
        paused=depth.paused,
        waiting=WaitingJobs(*depth.waiting),
        delayed=depth.delayed,
        running=depth.running,
        dead=depth.dead,
        oldest_age_seconds=depth.oldest_age_seconds,
        webhooks=QueueWebhooks(
            depth.webhooks.reserved,
            depth.webhooks.reserved_bytes,
            depth.webhooks.open,
            depth.webhooks.due,
            depth.webhooks.oldest_due_seconds,
            depth.webhooks.given_up,
        ),
        workers=load.workers,
        slots=load.slots,
        starved=int(load.is_starved),
        seconds_per_job=load.seconds_per_job,
        backlog_seconds=load.backlog_seconds,
        window_seconds=tally.window_ms / 1000,
        submitted_per_second=tally.per_second(tally.submitted),
        completed_per_second=tally.per_second(tally.completed),
        failed_per_second=tally.per_second(tally.failed),
        wait_seconds=percentiles(list(_wait_times(tally.ended))),
        run_seconds=percentiles(list(_run_times(tally.ended))),
    )


def _wait_times(records: Sequence[Record]) -> Iterator[float]:
    """How long jobs waited, in seconds; never negative, though the clocks of two machines may
    differ by more than that."""
    for record in records:
        if record.started_ms is not None:
            yield max(0, record.started_ms - waits_since_ms(record)) / 1000


def _run_times(records: Sequence[Record]) -> Iterator[float]:
    for record in records:
        if record.started_ms is not None and record.finished_ms is not None:
            yield max(0, record.finished_ms - record.started_ms) / 1000


def _worker(name: str, announced: WorkerAnnouncement, now_ms: int, seen_at: float) -> Worker:
    started_at = decoding.time(announced.started_ms)
    return Worker(
        worker=name,
        state=announced.state,
        host=announced.host,
        pid=announced.pid,
        slots=announced.concurrency,
        busy=announced.busy,
        isolating=announced.isolating,
        started_at=started_at,
        uptime_seconds=(
            None if started_at is None else max(0.0, now_ms / 1000 - started_at.timestamp())
        ),
        heard_seconds=max(0.0, now_ms / 1000 - seen_at),
        jobs_done=announced.jobs_done,
        models=list(announced.models),
        versions=announced.versions,
        served=announced.served,
        loaded=list(announced.loaded),
        problems=announced.problems,
        seconds_per_job=announced.seconds_per_job,
        run_times=announced.run_times,
    )

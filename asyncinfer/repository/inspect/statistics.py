"""What people watch: how each queue moves, and what each worker does."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.jobs import Record
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import WorkerSays, worker_says
from asyncinfer.repository.inspect.queue_load import (
    Load,
    gauge,
    load_of,
    records_of,
    waits_since_ms,
    workers_and_paces,
)
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.schemas.operations import Percentiles, Queue, WaitingJobs, Worker
from asyncinfer.untrusted import decoding

_WINDOW_MS: Final = 60_000
_ENTRIES_A_CALL: Final = 1000
_MOST_ENTRIES: Final = 2000
_ALL_ENTRIES: Final = 16_000
"""Of all logs together; each queue has its share, and at least one page of its log."""

_FEWEST_ENTRIES: Final = 100
_JOBS_COUNTED: Final = 20_000
_MOST_SAMPLES: Final = 200
_ALL_SAMPLES: Final = 8_000


class _Tally(Struct, frozen=True):
    """What moved in a queue lately."""

    window_ms: int
    submitted: int
    completed: int
    failed: int
    ended: tuple[Record, ...]
    """Of jobs that ended last."""

    def per_second(self, count: int) -> float:
        return count * 1000 / self.window_ms


class Observation:
    """The questions of who watches; each costs a bounded number of short calls."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def queues(self) -> list[Queue]:
        """Every queue there is, by name."""
        store = self._store
        queues = await self._store.queues()
        default = await store.default_model()
        models = [keys.model_of(store.n, queue, default) for queue in queues]
        gauged = await gauge(store, queues)
        workers, paces = await workers_and_paces(
            store, gauged.worker_ids, [model or "" for model in models]
        )
        tallies = await self._tallies(queues)
        return [
            _queue(queue, model, load_of(model or "", one, workers, pace), tally)
            for queue, model, one, pace, tally in zip(
                queues, models, gauged.gauges, paces, tallies, strict=True
            )
            if one is not None
        ]

    async def workers(self) -> list[Worker]:
        """The living workers, by id."""
        store = self._store
        now_ms = await store.time_ms()
        seen = ("ZRANGE", keys.workers(store.n), 0, -1, "WITHSCORES")
        found = await store.look(*seen, otherwise=())
        heard = _heard(found[::2], found[1::2])
        if not heard:
            return []
        bodies = await store.command("MGET", *(keys.worker(store.n, one) for one in heard))
        return [
            _worker(name, worker_says(body), now_ms, heard[name])
            for name, body in sorted(zip(heard, bodies, strict=True))
            if body
        ]

    async def _tallies(self, queues: Sequence[str]) -> list[_Tally]:
        entries = _share(_ALL_ENTRIES, len(queues), _FEWEST_ENTRIES, _MOST_ENTRIES)
        args = encode_args(
            {
                "window_ms": _WINDOW_MS,
                "max_entries": entries,
                "max_jobs": _JOBS_COUNTED,
                "max_samples": _share(_ALL_SAMPLES, len(queues), 10, _MOST_SAMPLES),
            }
        )
        at_once = max(1, _ENTRIES_A_CALL // entries)
        found: list[_Tally] = []
        for start in range(0, len(queues), at_once):
            reply = await self._store.call(script("tally"), queues[start : start + at_once], [args])
            found += [_tally(*one) if one else _NOTHING_MOVED for one in reply]
        return found


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """By nearest rank: each is one of the values; None of none."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return Percentiles(
        *(ordered[math.ceil(share * len(ordered)) - 1] for share in (0.50, 0.95, 0.99))
    )


def _tally(
    window_ms: int, submitted: int, completed: int, failed: int, metas: Sequence[bytes]
) -> _Tally:
    return _Tally(window_ms, submitted, completed, failed, tuple(records_of(metas)))


_NOTHING_MOVED: Final = _Tally(_WINDOW_MS, 0, 0, 0, ())


def _heard(names: Sequence[bytes], times: Sequence[bytes]) -> dict[str, float]:
    """By worker, when it was heard of; without those that are certainly none of ours."""
    pairs = [
        (decoding.name(one), decoding.finite(at)) for one, at in zip(names, times, strict=True)
    ]
    return {name: at for name, at in pairs if name is not None and at is not None}


def _share(total: int, among: int, least: int, most: int) -> int:
    return max(least, min(most, total // max(1, among)))


def _queue(queue: str, model: str | None, load: Load, tally: _Tally) -> Queue:
    gauge = load.gauge
    return Queue(
        model=model,
        queue=queue,
        paused=gauge.paused,
        waiting=WaitingJobs(*gauge.waiting),
        delayed=gauge.delayed,
        running=gauge.running,
        dead=gauge.dead,
        oldest_age_seconds=gauge.oldest_age_seconds,
        workers=load.workers,
        slots=load.slots,
        starved=int(load.is_starved),
        seconds_per_job=load.seconds_per_job,
        backlog_seconds=load.backlog_seconds,
        window_seconds=tally.window_ms / 1000,
        submitted_per_second=tally.per_second(tally.submitted),
        completed_per_second=tally.per_second(tally.completed),
        failed_per_second=tally.per_second(tally.failed),
        wait_seconds=percentiles(list(_waits(tally.ended))),
        run_seconds=percentiles(list(_runs(tally.ended))),
    )


def _waits(records: Sequence[Record]) -> Iterator[float]:
    """Two machines' clocks may differ by more than a job waited."""
    for record in records:
        if record.started_ms is not None:
            yield max(0, record.started_ms - waits_since_ms(record)) / 1000


def _runs(records: Sequence[Record]) -> Iterator[float]:
    for record in records:
        if record.started_ms is not None and record.finished_ms is not None:
            yield max(0, record.finished_ms - record.started_ms) / 1000


def _worker(name: str, says: WorkerSays, now_ms: int, heard_at: float) -> Worker:
    started_at = decoding.time(says.started_ms)
    return Worker(
        worker=name,
        state=says.state,
        host=says.host,
        pid=says.pid,
        slots=says.concurrency,
        busy=says.busy,
        started_at=started_at,
        uptime_seconds=(
            None if started_at is None else max(0.0, now_ms / 1000 - started_at.timestamp())
        ),
        heard_seconds=max(0.0, now_ms / 1000 - heard_at),
        jobs_done=says.jobs_done,
        models=list(says.models),
        versions=says.versions,
        served=says.served,
        loaded=list(says.loaded),
        problems=says.problems,
        seconds_per_job=says.seconds_per_job,
        run_times=says.run_times,
    )

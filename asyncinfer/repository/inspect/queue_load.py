"""How much waits for models, and who works on it: what autoscalers and people ask."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from asyncinfer.jobs import Record, read_record
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import WorkerSays, models_to_come, worker_says
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.untrusted import decoding

_QUEUES_A_CALL: Final = 40


class Gauge(Struct, frozen=True, kw_only=True):
    """What is in a queue."""

    waiting: tuple[int, int, int]
    """High, normal, low; without those that have ended and are still in a list."""
    delayed: int
    running: int
    dead: int
    paused: bool
    oldest_age_seconds: float | None
    """Of the job that waits longest; None when none waits, or none that says since when."""


class Gauged(Struct, frozen=True):
    """Of each queue what is in it, and the ids of the workers heard of lately."""

    now_ms: int
    gauges: tuple[Gauge | None, ...]
    """None of a queue with a key of another type."""
    worker_ids: tuple[str, ...]


class Load(Struct, frozen=True, kw_only=True):
    """A model's queue, and the living workers that claim from it."""

    gauge: Gauge
    workers: int
    slots: int
    is_loading: bool
    """A living worker has yet to load the model."""
    seconds_per_job: float | None
    """Of slot time, as measured; None before the model's first run."""

    @property
    def waiting_jobs(self) -> int:
        return sum(self.gauge.waiting)

    @property
    def due_jobs(self) -> int:
        """Nothing is due while the queue is paused."""
        return 0 if self.gauge.paused else self.waiting_jobs

    @property
    def is_starved(self) -> bool:
        """Jobs are due, and no living worker has the model or loads it."""
        return self.due_jobs > 0 and self.workers == 0 and not self.is_loading

    @property
    def backlog_seconds(self) -> float | None:
        """Nothing is no work, however long a job would take."""
        if self.due_jobs == 0:
            return 0.0
        return None if self.seconds_per_job is None else self.due_jobs * self.seconds_per_job


async def load(store: Store, model: str, queue: str) -> Load:
    """Two round trips, whatever waits; raises RedisRefused for a queue with a damaged key."""
    gauged = await gauge(store, [queue])
    found = gauged.gauges[0]
    if found is None:
        # An autoscaler that was told 0 would take the workers away.
        raise await store.damage([queue])
    workers, paces = await workers_and_paces(store, gauged.worker_ids, [model])
    return load_of(model, found, workers, paces[0])


async def starved(store: Store, queues: Sequence[str]) -> list[str]:
    """The models of those queues whose jobs are due and have no living worker."""
    if not queues:
        return []
    default = await store.default_model()
    models = [keys.model_of(store.n, queue, default) or "" for queue in queues]
    gauged = await gauge(store, queues)
    workers, _ = await workers_and_paces(store, gauged.worker_ids, [])
    return sorted(
        model
        for model, found in zip(models, gauged.gauges, strict=True)
        if model and found and load_of(model, found, workers, None).is_starved
    )


async def gauge(store: Store, queues: Sequence[str]) -> Gauged:
    """What is in each queue, some tens of queues a call."""
    gauges: list[Gauge | None] = []
    now_ms, ids = 0, []
    for start in range(0, len(queues), _QUEUES_A_CALL):
        part = queues[start : start + _QUEUES_A_CALL]
        now_ms, ids, found = await store.call(
            script("gauge"), [keys.workers(store.n), *part], [encode_args({})]
        )
        gauges += [one and _gauge(now_ms, *one) for one in found]
    names = (decoding.name(one) for one in ids or ())
    return Gauged(now_ms, tuple(gauges), tuple(one for one in names if one is not None))


async def workers_and_paces(
    store: Store, worker_ids: Sequence[str], models: Sequence[str]
) -> tuple[list[WorkerSays], list[float | None]]:
    """What living workers say, and what each model's jobs took when last one ran."""
    names = [keys.pace(store.n, model) for model in models]
    names += [keys.worker(store.n, one) for one in worker_ids]
    if not names:
        return [], []
    found = await store.command("MGET", *names)
    paces = [_pace(one) for one in found[: len(models)]]
    return [worker_says(body) for body in found[len(models) :] if body], paces


def load_of(model: str, gauge: Gauge, workers: Sequence[WorkerSays], pace: float | None) -> Load:
    having = [one for one in workers if model in one.models]
    ready = [one for one in having if one.state == "ready"]
    return Load(
        gauge=gauge,
        workers=len(ready),
        slots=sum(one.concurrency for one in ready),
        is_loading=any(model in models_to_come(one) for one in workers),
        seconds_per_job=_mean_pace(having, model) or pace,
    )


def waits_since_ms(record: Record) -> int:
    """A delay that was asked for is no waiting."""
    return record.created_ms + int(record.options.delay_seconds * 1000)


def records_of(metas: Sequence[bytes]) -> Iterator[Record]:
    """Those that can be read."""
    return filter(None, map(read_record, metas))


def _gauge(
    now_ms: int, waiting: Any, delayed: int, running: int, dead: int, paused: int, metas: Any
) -> Gauge:
    return Gauge(
        waiting=tuple(waiting),
        delayed=delayed,
        running=running,
        dead=dead,
        paused=bool(paused),
        oldest_age_seconds=_oldest_age_seconds(now_ms, metas),
    )


def _pace(stored: bytes | None) -> float | None:
    pace = decoding.finite(stored)
    return pace if pace is not None and pace >= 0 else None


def _mean_pace(workers: Sequence[WorkerSays], model: str) -> float | None:
    """Weighed by slots: that is how the queue is shared out."""
    measured = [one for one in workers if one.concurrency and model in one.seconds_per_job]
    slots = sum(one.concurrency for one in measured)
    total = sum(one.concurrency * one.seconds_per_job[model] for one in measured)
    return total / slots if slots else None


def _oldest_age_seconds(now_ms: int, metas: Sequence[bytes]) -> float | None:
    ages = [now_ms - waits_since_ms(record) for record in records_of(metas)]
    return max(0.0, max(ages) / 1000) if ages else None

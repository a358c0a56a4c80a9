"""The load of queues: how many jobs wait, and which live workers claim them."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from asyncinfer.jobs import Record, read_record
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import (
    WorkerAnnouncement,
    decode_worker_announcement,
    upcoming_models,
)
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.untrusted import decoding

_QUEUES_PER_CALL: Final = 40


class WebhookCounts(Struct, frozen=True):
    """How many webhooks a queue has to deliver."""

    reserved: int = 0
    """Unfinished jobs with a webhook, and deliveries to come."""
    reserved_bytes: int = 0
    open: int = 0
    """Deliveries to come."""
    due: int = 0
    oldest_due_seconds: float | None = None
    """How long the oldest due one has been due; None if none is."""
    given_up: int = 0
    """Deliveries that were given up lately."""


_NO_WEBHOOKS: Final = WebhookCounts()


class QueueDepth(Struct, frozen=True, kw_only=True):
    """The numbers of jobs in a queue."""

    waiting: tuple[int, int, int]
    """Of high, normal and low priority; without ended jobs that are still in a list."""
    delayed: int
    running: int
    dead: int
    paused: bool
    oldest_age_seconds: float | None
    """Of the job that waits longest; None if none waits, or if only external jobs do."""
    webhooks: WebhookCounts = _NO_WEBHOOKS

    @property
    def is_at_rest(self) -> bool:
        """Whether the queue has no jobs, not even dead letters, no webhook to deliver, and is
        not paused."""
        has_jobs = any(self.waiting) or self.delayed or self.running or self.dead
        return not (has_jobs or self.webhooks.open or self.paused)


class QueueDepths(Struct, frozen=True):
    """The depths of queues, and the ids of the workers that announced themselves lately."""

    depths: tuple[QueueDepth | None, ...]
    """None for a queue with a key of the wrong type."""
    worker_ids: tuple[str, ...]


class QueueLoad(Struct, frozen=True, kw_only=True):
    """The queue of a model, and the live workers that claim from it."""

    depth: QueueDepth
    workers: int
    """How many are ready and have the model."""
    slots: int
    """The slots of those workers."""
    is_loading: bool
    """A live worker is loading the model."""
    seconds_per_job: float | None
    """The measured slot time of a job; None before the model's first run."""
    lost: int = 0
    """Jobs in `depth.running` that nobody runs: their worker is lost."""
    lost_seconds: float = 0.0
    """In how many seconds the first of those is put back, ahead of all that wait."""

    @property
    def waiting_jobs(self) -> int:
        return sum(self.depth.waiting)

    @property
    def due_jobs(self) -> int:
        """The waiting jobs; 0 while the queue is paused."""
        return 0 if self.depth.paused else self.waiting_jobs

    @property
    def is_starved(self) -> bool:
        """Whether jobs are due and no live worker has the model or loads it."""
        return self.due_jobs > 0 and self.workers == 0 and not self.is_loading

    @property
    def backlog_seconds(self) -> float | None:
        """The slot time of the due jobs: 0 without any; None if the time of a job is unknown."""
        if self.due_jobs == 0:
            return 0.0
        return None if self.seconds_per_job is None else self.due_jobs * self.seconds_per_job

    def jobs_per_second(self, measured: float | None = None) -> float | None:
        """The rate at which jobs end while some wait: as it was measured lately, else that of the
        slots by the measured slot time. None if neither is known, and while nothing runs: without
        slots, and if the queue is paused."""
        if self.depth.paused or not self.slots:
            return None
        if measured is None and self.seconds_per_job:
            return self.slots / self.seconds_per_job
        return measured

    def seconds_to_end(self, jobs_ahead: int, measured: float | None = None) -> float | None:
        """An estimate of the seconds until a job has ended that waits behind so many; None without
        a rate, which is that of `jobs_per_second`.

        It has ended when those ahead of it, those that run and it itself have, of which half a job
        is done on average; and it takes its own slot time at least. Those of a lost worker count
        only if they are put back before that.
        """
        rate = self.jobs_per_second(measured)
        if not rate:
            return None
        jobs = jobs_ahead + self.depth.running + 0.5
        if (jobs - self.lost) / rate < self.lost_seconds:
            jobs -= self.lost
        return max(jobs / rate, self.seconds_per_job or 0.0)


async def read_load(store: Store, model: str, queue: str) -> QueueLoad:
    """Reads the load of a model in two round trips. Raises WrongKeyType for a queue with a damaged
    key: an autoscaler that reads 0 would remove the workers."""
    read = await read_depths(store, [queue])
    depth = read.depths[0]
    if depth is None:
        raise await store.wrong_keys_error([queue])
    workers, paces = await workers_and_paces(store, read.worker_ids, [model])
    return combine_load(model, depth, workers, paces[0])


async def read_starved_models(store: Store, queues: Sequence[str]) -> list[str]:
    """The models of those queues that have due jobs and no live worker, by name."""
    if not queues:
        return []
    default = await store.default_model()
    models = [keys.model_of(store.queue_name, queue, default) or "" for queue in queues]
    read = await read_depths(store, queues)
    workers, _ = await workers_and_paces(store, read.worker_ids, [])
    return sorted(
        model
        for model, depth in zip(models, read.depths, strict=True)
        if model and depth and combine_load(model, depth, workers, None).is_starved
    )


async def read_depths(store: Store, queues: Sequence[str]) -> QueueDepths:
    """Reads the depths of queues, 40 queues a call."""
    depths: list[QueueDepth | None] = []
    raw_ids: Sequence[bytes] | None = None
    for start in range(0, len(queues), _QUEUES_PER_CALL):
        part = queues[start : start + _QUEUES_PER_CALL]
        now_ms, raw_ids, replies = await store.call(
            script("gauge"), [keys.workers(store.queue_name), *part], [encode_args({})]
        )
        depths += [reply and parse_depth(now_ms, *reply) for reply in replies]
    worker_ids = (decoding.name(raw_id) for raw_id in raw_ids or ())
    return QueueDepths(tuple(depths), tuple(name for name in worker_ids if name is not None))


async def workers_and_paces(
    store: Store, worker_ids: Sequence[str], models: Sequence[str]
) -> tuple[list[WorkerAnnouncement], list[float | None]]:
    """The announcements of live workers, and each model's pace: the slot time that its jobs took
    when one ran last, None if unknown."""
    names = [keys.pace(store.queue_name, model) for model in models]
    names += [keys.worker(store.queue_name, worker_id) for worker_id in worker_ids]
    if not names:
        return [], []
    values = await store.command("MGET", *names)
    paces = [parse_pace(value) for value in values[: len(models)]]
    return [decode_worker_announcement(body) for body in values[len(models) :] if body], paces


def combine_load(
    model: str, depth: QueueDepth, workers: Sequence[WorkerAnnouncement], pace: float | None
) -> QueueLoad:
    """The load of a model; `pace` counts only if no worker announces one."""
    serving = [worker for worker in workers if model in worker.models]
    ready = [worker for worker in serving if worker.state == "ready"]
    return QueueLoad(
        depth=depth,
        workers=len(ready),
        slots=sum(worker.concurrency for worker in ready),
        is_loading=any(model in upcoming_models(worker) for worker in workers),
        seconds_per_job=_mean_pace(serving, model) or pace,
    )


def parse_depth(
    now_ms: int,
    waiting: Any,
    delayed: int,
    running: int,
    dead: int,
    paused: int,
    metas: Any,
    webhooks: Any = None,
) -> QueueDepth:
    """The depth in the reply of a script, at `now_ms` of the server's clock."""
    return QueueDepth(
        waiting=tuple(waiting),
        delayed=delayed,
        running=running,
        dead=dead,
        paused=bool(paused),
        oldest_age_seconds=_oldest_age_seconds(now_ms, metas),
        webhooks=_parse_webhooks(now_ms, *webhooks) if webhooks else _NO_WEBHOOKS,
    )


def _parse_webhooks(
    now_ms: int,
    reserved: int,
    reserved_bytes: bytes | None,
    total: int,
    due: int,
    first_due_ms: bytes | None,
    given_up: int,
) -> WebhookCounts:
    first_ms = decoding.finite(first_due_ms) if due else None
    return WebhookCounts(
        reserved,
        decoding.whole_number(reserved_bytes or b"") or 0,
        total,
        due,
        None if first_ms is None else max(0.0, (now_ms - first_ms) / 1000),
        given_up,
    )


def parse_pace(stored: bytes | None) -> float | None:
    """The stored slot time of a job in seconds; None if it is missing or no such number."""
    pace = decoding.finite(stored)
    return pace if pace is not None and pace >= 0 else None


def waits_since_ms(record: Record) -> int:
    """When a job began to wait: a requested delay is no waiting."""
    delay_seconds = record.options.delay_seconds
    return record.created_ms + int(delay_seconds * 1000) if delay_seconds else record.created_ms


def readable_records(metas: Sequence[bytes]) -> Iterator[Record]:
    """Decodes records and leaves out unreadable ones."""
    return filter(None, map(read_record, metas))


def _mean_pace(workers: Sequence[WorkerAnnouncement], model: str) -> float | None:
    """The mean slot time of a job, weighed by slots as the queue is divided among them."""
    measured = [
        worker for worker in workers if worker.concurrency and model in worker.seconds_per_job
    ]
    slots = sum(worker.concurrency for worker in measured)
    total = sum(worker.concurrency * worker.seconds_per_job[model] for worker in measured)
    return total / slots if slots else None


def _oldest_age_seconds(now_ms: int, metas: Sequence[bytes]) -> float | None:
    ages = [now_ms - waits_since_ms(record) for record in readable_records(metas)]
    return max(0.0, max(ages) / 1000) if ages else None

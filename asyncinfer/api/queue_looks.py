"""Where waiting jobs are, by looks at their queues that all requests of an API share."""

import asyncio
import logging
import time
from collections.abc import Callable
from math import ceil
from typing import Final

from msgspec import Struct, field

from asyncinfer.api.worker_snapshot import WorkerSnapshot
from asyncinfer.errors import RedisUnavailable, StorageFull
from asyncinfer.jobs import Priority, Record
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.inspect.queue_load import QueueLoad, waits_since_ms
from asyncinfer.repository.inspect.queue_look import Loss, Position, QueueLook, look_at
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, queue_of
from asyncinfer.schemas.responses import WaitingFor

MAX_RETRY_SECONDS: Final = 60
"""The longest Retry-After: an estimate may be too long, as when workers are started."""

_LOOK_SECONDS: Final = 1.0
_MAX_AGE_SECONDS: Final = 5.0
"""A submit is answered from a look of at most this age, and does not wait for a newer one."""

_STALL_SECONDS: Final = 2.0
"""An idle worker takes a job in a moment, or within BRPOP_TIMEOUT if a doorbell token is lost. A
queue whose jobs have waited for longer, and of which none runs, waits for its workers' slots."""

_MAX_QUEUES: Final = 100
"""The bound of looks that are kept: one has up to 3,000 ids."""

_NO_ROOM_SECONDS: Final = 5
"""The Retry-After of a full queue of which no rate is known."""

_MAX_ROOM_SECONDS: Final = 15
"""The longest Retry-After of a full queue: a client that gives up after a minute tries several
times."""

_ROOM_SHARE: Final = 0.01
"""A full queue is worth another try once it has room for a hundredth of its jobs: those that are
left keep its workers busy until clients come back."""

RUNS_ON: Final = frozenset({"retry", "storage_full"})
"""Codes of reasons that do not keep other jobs of the queue from running."""

_log = LimitedLog(logging.getLogger(__name__))


class Stall(Struct, frozen=True):
    """Workers have the model of a queue, and take no job of it."""

    seconds: float
    """For how long jobs have waited and none has run."""
    workers: int
    isolating: int
    """Those of them that run one job alone."""


class Whereabouts(Struct, frozen=True):
    """Where an unfinished job is; None for what does not apply or is not known."""

    position: Position | None = None
    """Of a waiting job."""
    eta_seconds: float | None = None
    """An estimate of the seconds until a waiting job has ended."""
    deliveries: int = 0
    """How many workers were lost with a waiting job that is next in turn."""
    stall: Stall | None = None
    """Of a waiting job whose queue is served by workers that have no free slot."""
    loss: Loss | None = None
    """Of a running job whose worker is lost."""


class _Seen(Struct):
    """The last look at a queue, and what follows from it for all jobs."""

    look: QueueLook | None = None
    """None before the first look, and if that has failed."""
    load: QueueLoad | None = None
    """With the workers that were known then; None without a look."""
    taken_at: float = -_MAX_AGE_SECONDS
    """By `time.monotonic`."""
    submit_seconds: dict[Priority, int] = {}
    """By priority, the Retry-After of a job that is submitted now."""
    room_seconds: int = _NO_ROOM_SECONDS
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class QueueLooks:
    """Looks at each queue at most once a second, and only if somebody asks. `run` must be
    running."""

    def __init__(
        self, store: Store, snapshot: WorkerSnapshot, default_model: Callable[[], str | None]
    ) -> None:
        """`default_model` returns the present default model, None if it is not known."""
        self._store = store
        self._snapshot = snapshot
        self._default_model = default_model
        self._seen: dict[tuple[str, str], _Seen] = {}
        """By queue and model."""
        self._wanted: set[tuple[str, str]] = set()
        self._is_wanted = asyncio.Event()

    async def run(self) -> None:
        """Takes the looks that submits have asked for; runs until it is cancelled. Without submits
        it does nothing."""
        while True:
            await self._is_wanted.wait()
            # Who reads the job that was just submitted takes a look that has it.
            await asyncio.sleep(_LOOK_SECONDS)
            self._is_wanted.clear()
            wanted, self._wanted = self._wanted, set()
            for queue, model in wanted:
                await self._fresh(queue, model)

    async def of(self, stored: StoredJob, reason: WaitingFor | None) -> Whereabouts:
        """Where an unfinished job is, seen at most a second ago. `reason` is why it waits beside
        its turn, None if nothing is wrong. Raises nothing: a queue that cannot be read is
        unknown."""
        queue, model = self._place_of(stored)
        seen = await self._fresh(queue, model)
        look, load = seen.look, seen.load
        if look is None or load is None:
            return Whereabouts()
        if stored.status != "pending":
            return Whereabouts(loss=look.losses.get(stored.job_id))
        position, eta_seconds = look.position(stored), None
        runs_on = reason is None or reason.code in RUNS_ON
        stall = self._stall(look, load, model) if position and runs_on else None
        if position and runs_on and not stall:
            since_ms = waits_since_ms(stored.record) if stored.record else look.now_ms
            rate = look.jobs_per_second(since_ms)
            eta_seconds = load.seconds_to_end(position.ahead, rate)
            if eta_seconds is not None:
                # It counts from the look.
                eta_seconds = max(0.0, eta_seconds - (time.monotonic() - seen.taken_at))
        return Whereabouts(position, eta_seconds, look.deliveries(stored.job_id), stall)

    def _stall(self, look: QueueLook, load: QueueLoad, model: str) -> Stall | None:
        """Why no job of a queue runs though workers have its model; None if one does."""
        seconds = look.stalled_seconds
        if seconds < _STALL_SECONDS or not load.workers:
            return None
        isolating = [
            worker
            for worker in self._snapshot.workers.values()
            if worker.isolating and worker.state == "ready" and model in worker.models
        ]
        return Stall(seconds, load.workers, min(len(isolating), load.workers))

    def submit_seconds(self, record: Record) -> int:
        """The Retry-After of a job that was just submitted, in whole seconds: how long until it has
        ended, from 1, also if that is not known, to 60. Waits for nothing."""
        seen = self._last(record)
        return seen.submit_seconds.get(record.options.priority, 1) if seen else 1

    def room_seconds(self, record: Record | None) -> int:
        """The Retry-After of a submit that a full queue refused, in whole seconds from 1 to 15: how
        long until it has room for a hundredth of its jobs; 5 if that is not known. Waits for
        nothing."""
        seen = self._last(record) if record else None
        return seen.room_seconds if seen else _NO_ROOM_SECONDS

    def _last(self, record: Record) -> _Seen | None:
        """The last look at the queue of a record, None without one of the last seconds. Has another
        one taken, if that is due."""
        key = (record.queue, record.model)
        seen = self._seen.get(key)
        age_seconds = time.monotonic() - seen.taken_at if seen else _MAX_AGE_SECONDS
        if age_seconds >= _LOOK_SECONDS and len(self._wanted) < _MAX_QUEUES:
            self._wanted.add(key)
            self._is_wanted.set()
        return seen if age_seconds < _MAX_AGE_SECONDS else None

    async def _fresh(self, queue: str, model: str) -> _Seen:
        """What was seen of a queue in the last second, else by a new look. However many ask at
        once, one look is taken."""
        key = (queue, model)
        seen = self._seen.get(key)
        if seen is None:
            while len(self._seen) >= _MAX_QUEUES:
                del self._seen[next(iter(self._seen))]
            seen = self._seen[key] = _Seen()
        if time.monotonic() - seen.taken_at >= _LOOK_SECONDS:
            async with seen.lock:
                if time.monotonic() - seen.taken_at >= _LOOK_SECONDS:
                    await self._take(seen, queue, model)
        return seen

    async def _take(self, seen: _Seen, queue: str, model: str) -> None:
        """Takes a look. One that fails is not repeated sooner than another."""
        try:
            seen.look = await look_at(self._store, queue, model)
        except (RedisUnavailable, StorageFull):
            seen.look = None
        except Exception as error:
            # Anyone may write anything into Redis; a job must be shown all the same.
            _log.unexpected("A look at a queue failed.", error)
            seen.look = None
        # Not its begin: those who wait for a slow Redis must not each take another one after it.
        seen.taken_at = time.monotonic()
        seen.load, seen.submit_seconds, seen.room_seconds = None, {}, _NO_ROOM_SECONDS
        if seen.look:
            seen.load = seen.look.load(model, tuple(self._snapshot.workers.values()))
            measured = seen.look.jobs_per_second(seen.look.now_ms)
            seen.submit_seconds = _submit_seconds(seen.load, measured)
            seen.room_seconds = _room_seconds(seen.load, measured)

    def _place_of(self, stored: StoredJob) -> tuple[str, str]:
        """The queue and the model of a job; an external one is of the default model."""
        return queue_of(self._store, stored), stored.model or self._default_model() or ""


def _submit_seconds(load: QueueLoad, measured: float | None) -> dict[Priority, int]:
    """By priority, the Retry-After of a job that is behind all that wait now."""
    high, normal, _ = load.depth.waiting
    ahead: dict[Priority, int] = {"high": high, "normal": high + normal, "low": load.waiting_jobs}
    return {
        priority: whole_seconds(load.seconds_to_end(jobs, measured))
        for priority, jobs in ahead.items()
    }


def _room_seconds(load: QueueLoad, measured: float | None) -> int:
    """The Retry-After of a full queue."""
    rate = load.jobs_per_second(measured)
    if not rate:
        return _NO_ROOM_SECONDS
    return min(whole_seconds(load.waiting_jobs * _ROOM_SHARE / rate), _MAX_ROOM_SECONDS)


def whole_seconds(seconds: float | None) -> int:
    """A Retry-After: the seconds rounded up, from 1, also if they are not known, to 60."""
    return 1 if seconds is None else max(1, min(ceil(seconds), MAX_RETRY_SECONDS))

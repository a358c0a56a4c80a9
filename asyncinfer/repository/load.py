"""What an autoscaler asks: how much waits for a model, and who works on it."""

from collections.abc import Iterator, Sequence

import msgspec
from msgspec import Struct

from asyncinfer import keys
from asyncinfer.jobs import Record, decode_record
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args


class Load(Struct, frozen=True, kw_only=True):
    """A model's queue, and the living workers that claim from it."""

    waiting_jobs: int
    """Without those that have ended and are still in a list, and without delayed ones."""
    running_jobs: int
    paused: bool
    oldest_age_seconds: float | None
    """Of the job that waits longest; None when none waits, or none that says since when."""
    workers: int
    slots: int
    seconds_per_job: float | None
    """Of slot time, as measured; None before the model's first run."""


class _Worker(Struct, frozen=True):
    """What a worker says of itself; the older the release, the less."""

    concurrency: int = 0
    models: tuple[str, ...] = ()
    state: str = ""
    seconds_per_job: dict[str, float] = {}


_decode_worker = msgspec.json.Decoder(_Worker).decode


async def load(store: Store, model: str, queue: str) -> Load:
    """Two round trips, whatever waits."""
    names = [queue, keys.workers(store.n)]
    now_ms, waiting, running, paused, records, ids = await store.call(
        script("gauge"), names, [encode_args({})]
    )
    workers, pace = await _workers_and_pace(store, model, ids)
    ready = [one for one in workers if one.state == "ready"]
    return Load(
        waiting_jobs=waiting,
        running_jobs=running,
        paused=bool(paused),
        oldest_age_seconds=_oldest_age_seconds(now_ms, records),
        workers=len(ready),
        slots=sum(one.concurrency for one in ready),
        seconds_per_job=_mean_pace(workers, model) or pace,
    )


async def _workers_and_pace(
    store: Store, model: str, ids: Sequence[bytes]
) -> tuple[list[_Worker], float | None]:
    """The living workers that have the model, and what its jobs took when last one ran."""
    names = [keys.worker(store.n, one.decode()) for one in ids]
    bodies = await store.command("MGET", keys.pace(store.n, model), *names)
    pace = None if bodies[0] is None else float(bodies[0])
    return [one for one in _readable(bodies[1:]) if model in one.models], pace


def _readable(bodies: Sequence[bytes | None]) -> Iterator[_Worker]:
    for body in bodies:
        try:
            if body:
                yield _decode_worker(body)
        except msgspec.DecodeError:
            continue


def _mean_pace(workers: Sequence[_Worker], model: str) -> float | None:
    """Weighed by slots: that is how the queue is shared out."""
    measured = [one for one in workers if one.concurrency and model in one.seconds_per_job]
    slots = sum(one.concurrency for one in measured)
    total = sum(one.concurrency * one.seconds_per_job[model] for one in measured)
    return total / slots if slots else None


def _oldest_age_seconds(now_ms: int, metas: Sequence[bytes]) -> float | None:
    ages = [now_ms - _waits_since_ms(record) for record in _records(metas)]
    return max(0.0, max(ages) / 1000) if ages else None


def _records(metas: Sequence[bytes]) -> Iterator[Record]:
    for meta in metas:
        try:
            yield decode_record(meta)
        except msgspec.DecodeError:
            continue


def _waits_since_ms(record: Record) -> int:
    """A delay that was asked for is no waiting."""
    return record.created_ms + int(record.options.delay_seconds * 1000)

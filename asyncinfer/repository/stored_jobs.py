"""Jobs as they lie in Redis: status, record, result or error."""

from collections.abc import Collection, Iterator, Sequence
from typing import Final, cast

import msgspec
from msgspec import Struct

from asyncinfer.jobs import (
    Record,
    Status,
    id_text,
    read_record,
)
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.untrusted import decoding

_MOST_ROUNDS: Final = (1 << 63) - 2
"""So that the next round's number fits in a record, whatever this one says."""


class Stored(Struct, frozen=True):
    """A job as read; `result` and `error` are JSON text, `record` is None for a stranger's."""

    job_id: str
    status: Status
    result: bytes | None
    error: bytes | None
    record: Record | None
    meta: bytes = b""


def noticed(fields: dict[bytes, bytes]) -> Iterator[tuple[str, Stored | None]]:
    """What an entry of an inbox tells: ids of ended jobs and, of small ones, all of the job."""
    for key, status in fields.items():
        if key.startswith(b"\1"):
            continue
        told = fields.get(b"\1" + key)
        yield id_text(key), _told(key, status, told) if told else None


def _told(key: bytes, status: bytes, told: bytes) -> Stored | None:
    size, _, rest = told.partition(b" ")
    length = decoding.whole_number(size)
    if length is None:
        return None
    body, meta = rest[:length], rest[length:]
    result, error = (body, None) if status == b"completed" else (None, body)
    stored = stored_of(id_text(key), status, result, error, meta)
    return stored if stored and stored.record else None


async def read_jobs(store: Store, job_ids: Sequence[str]) -> list[Stored | None]:
    """Jobs as they are now, None for each that is absent or whose record is unreadable."""
    if not job_ids:
        return []
    names = [
        name
        for job_id in job_ids
        for name in (
            keys.status(job_id),
            keys.result(job_id),
            keys.error(job_id),
            keys.meta(job_id),
        )
    ]
    reply = await store.command("MGET", *names)
    return [stored_of(job_id, *reply[4 * i : 4 * i + 4]) for i, job_id in enumerate(job_ids)]


async def read_states(
    store: Store, job_ids: Sequence[str], statuses: Collection[str]
) -> list[Stored]:
    """Those in one of the states, without result and error; what is in another costs little."""
    if not job_ids:
        return []
    found = await store.command("MGET", *map(keys.status, job_ids))
    wanted = [
        (job_id, status)
        for job_id, status in zip(job_ids, found, strict=True)
        if status and decoding.text(status) in statuses
    ]
    if not wanted:
        return []
    metas = await store.command("MGET", *(keys.meta(job_id) for job_id, _ in wanted))
    jobs = (
        stored_of(job_id, status, None, None, meta)
        for (job_id, status), meta in zip(wanted, metas, strict=True)
    )
    return [job for job in jobs if job]


async def read_summaries(store: Store, job_ids: Sequence[str]) -> list[Stored | None]:
    """`read_jobs` without the results, which may be large."""
    if not job_ids:
        return []
    reply = await store.command("MGET", *(name for one in job_ids for name in summary_keys(one)))
    return [summary_of(job_id, reply[3 * i : 3 * i + 3]) for i, job_id in enumerate(job_ids)]


def summary_keys(job_id: str) -> tuple[str, str, str]:
    return keys.status(job_id), keys.error(job_id), keys.meta(job_id)


def summary_of(job_id: str, values: Sequence[bytes | None]) -> Stored | None:
    """A job without its result, of what `summary_keys` hold."""
    status, error, meta = values
    return stored_of(job_id, status, None, error, meta)


def queue_of(store: Store, stored: Stored) -> str:
    return stored.record.queue if stored.record else store.n


def next_round(record: Record, now_ms: int) -> Record:
    return msgspec.structs.replace(
        record,
        round=min(record.round, _MOST_ROUNDS) + 1,
        created_ms=now_ms,
        errors=0,
        started_ms=None,
        finished_ms=None,
        worker=None,
        claim=None,
        ran_version=None,
        ran_sha256=None,
    )


def stored_of(
    job_id: str,
    status: bytes | None,
    result: bytes | None,
    error: bytes | None,
    meta: bytes | None,
) -> Stored | None:
    if status is None:
        return None
    record = read_record(meta) if meta else None
    if meta and record is None:
        # Nobody can say whose it is, so nobody may read it.
        return None
    return Stored(job_id, status_of(status), result, error, record, meta or b"")


def status_of(status: bytes) -> Status:
    """A stranger's may be any bytes."""
    return cast(Status, decoding.text(status))

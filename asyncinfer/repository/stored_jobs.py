"""Stored jobs: reading status, record, result and error of jobs from Redis."""

from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Final, cast

import msgspec
from msgspec import Meta, Struct

from asyncinfer.jobs import (
    DEFAULT_TENANT,
    TERMINAL,
    Record,
    Status,
    Webhook,
    finished_ms,
    id_text,
    read_record,
)
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.untrusted import decoding

_MAX_ROUND: Final = (1 << 63) - 2
"""The bound of a stored round number, so that the next one still fits in a record."""


class EndByScript(Struct, frozen=True):
    """What the error of a job that a script ended holds besides code and message: when that was, in
    ms since 1970 by the server's clock, and its lost deliveries as in its facts."""

    at_ms: Annotated[int, Meta(ge=0, le=decoding.MAX_TIME_MS)] = 0
    lost: tuple[str, ...] = ()


_NO_END: Final = EndByScript()
_read_end = decoding.lenient_decoder(msgspec.json.Decoder(EndByScript).decode)


class StoredJob(Struct, frozen=True):
    """A job as read from Redis. `result` and `error` are JSON; `record` is None for an external
    job."""

    job_id: str
    status: Status
    result: bytes | None
    error: bytes | None
    record: Record | None
    meta: bytes = b""

    @property
    def tenant(self) -> str:
        """Whose job it is; an external job is the default tenant's."""
        return self.record.tenant if self.record else DEFAULT_TENANT

    @property
    def model(self) -> str | None:
        """None for an external job, which is one of the default model."""
        return self.record.model if self.record else None

    @property
    def group(self) -> str | None:
        return self.record.options.group if self.record else None

    @property
    def idempotency_digest(self) -> str:
        """That of the Idempotency-Key that it was submitted with; empty without one."""
        return self.record.idempotency_digest if self.record else ""

    @property
    def webhook(self) -> Webhook | None:
        return self.record.options.webhook if self.record else None

    @property
    def round(self) -> int:
        """The number of the job's round, from 1; each retry begins another."""
        return self.record.round if self.record else 1

    @property
    def has_ended(self) -> bool:
        """Whether the job is completed, failed or cancelled."""
        return self.status in TERMINAL

    @property
    def end_by_script(self) -> EndByScript:
        """How a script ended it; empty where none did, or that is not known."""
        return (self.has_ended and self.error and _read_end(self.error)) or _NO_END

    @property
    def ended_ms(self) -> int | None:
        """When it ended, in ms since 1970: by the server's clock, in records of earlier releases by
        the worker's. None if it has not, or that is not known, as of most external jobs."""
        by_worker = self.record and finished_ms(self.record)
        return by_worker or self.end_by_script.at_ms or None


def parse_inbox_entry(fields: dict[bytes, bytes]) -> Iterator[tuple[str, StoredJob | None]]:
    """Parses an inbox entry: the id of each ended job and the job itself, or None for a large job,
    which is not in the entry."""
    for key, status in fields.items():
        if key.startswith(b"\1"):
            continue
        content = fields.get(b"\1" + key)
        yield id_text(key), _parse_inbox_job(key, status, content) if content else None


def _parse_inbox_job(key: bytes, status: bytes, content: bytes) -> StoredJob | None:
    """`content` is the length of result or error, a space, that body and the record."""
    size, _, rest = content.partition(b" ")
    length = decoding.whole_number(size)
    if length is None:
        return None
    body, meta = rest[:length], rest[length:]
    result, error = (body, None) if status == b"completed" else (None, body)
    stored = parse_job(id_text(key), status, result, error, meta)
    return stored if stored and stored.record else None


async def read_jobs(store: Store, job_ids: Sequence[str]) -> list[StoredJob | None]:
    """Reads jobs in one call; None for each that is absent or whose record is unreadable."""
    if not job_ids:
        return []
    key_makers = (keys.status, keys.result, keys.error, keys.meta)
    names = [key(job_id) for job_id in job_ids for key in key_makers]
    reply = await store.command("MGET", *names, is_large=True)
    return [parse_job(job_id, *reply[4 * i : 4 * i + 4]) for i, job_id in enumerate(job_ids)]


async def read_jobs_in(
    store: Store, job_ids: Sequence[str], statuses: Collection[str]
) -> list[StoredJob]:
    """Reads the jobs that have one of the statuses, without result and error; a job in another
    status costs little."""
    if not job_ids:
        return []
    reply = await store.command("MGET", *map(keys.status, job_ids))
    matching = [
        (job_id, status)
        for job_id, status in zip(job_ids, reply, strict=True)
        if status and decoding.text(status) in statuses
    ]
    if not matching:
        return []
    metas = await store.command("MGET", *(keys.meta(job_id) for job_id, _ in matching))
    jobs = (
        parse_job(job_id, status, None, None, meta)
        for (job_id, status), meta in zip(matching, metas, strict=True)
    )
    return [job for job in jobs if job]


async def read_summaries(store: Store, job_ids: Sequence[str]) -> list[StoredJob | None]:
    """As `read_jobs`, without the results, which may be large."""
    if not job_ids:
        return []
    names = [name for job_id in job_ids for name in summary_keys(job_id)]
    reply = await store.command("MGET", *names)
    return [parse_summary(job_id, reply[3 * i : 3 * i + 3]) for i, job_id in enumerate(job_ids)]


def summary_keys(job_id: str) -> tuple[str, str, str]:
    return keys.status(job_id), keys.error(job_id), keys.meta(job_id)


def parse_summary(job_id: str, values: Sequence[bytes | None]) -> StoredJob | None:
    """Parses the values of `summary_keys` as a job without its result."""
    status, error, meta = values
    return parse_job(job_id, status, None, error, meta)


def queue_of(store: Store, stored: StoredJob) -> str:
    """The queue in the job's record; the default queue for an external job."""
    return stored.record.queue if stored.record else store.queue_name


def next_round(record: Record, now_ms: int) -> Record:
    """The record of a job that is retried: as submitted at `now_ms`, in a new round."""
    return msgspec.structs.replace(
        record,
        round=min(record.round, _MAX_ROUND) + 1,
        created_ms=now_ms,
        errors=0,
        started_ms=None,
        finished_ms=None,
        worker=None,
        claim=None,
        ran_version=None,
        ran_sha256=None,
        delivery=None,
        past_deliveries=(),
        handed_back=0,
    )


def parse_job(
    job_id: str, status: bytes | None, result: bytes | None, error: bytes | None, meta: bytes | None
) -> StoredJob | None:
    """None for an absent job and for one whose record is unreadable."""
    if status is None:
        return None
    record = read_record(meta) if meta else None
    if meta and record is None:
        # Its tenant is unknown, so that nobody may read it.
        return None
    return StoredJob(job_id, decode_status(status), result, error, record, meta or b"")


def decode_status(status: bytes) -> Status:
    """The status of an external job may be any bytes; they become some text."""
    return cast(Status, decoding.text(status))

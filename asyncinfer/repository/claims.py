"""Claiming and finishing jobs: the calls of a worker."""

import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final, Literal, cast

import msgspec
from msgspec import Struct

from asyncinfer.jobs import (
    Facts,
    JobError,
    Outcome,
    Record,
    decode_facts,
    id_bytes,
    id_text,
    is_later,
    read_record,
)
from asyncinfer.repository import keys
from asyncinfer.repository.failed_jobs import FailedJobs, read_failed_jobs
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.untrusted import decoding

MAX_QUEUES_PER_CLAIM: Final = 8
_MAX_JOBS_PER_CALL: Final = 256
MAX_BYTES_PER_CALL: Final = 1 << 20
"""Of results; a call of a single job may be larger."""
_MAX_CLAIM_BYTES: Final = 2 << 20
_MIN_TOKEN_BYTES: Final = 65
"""One more than the default of `hash-max-listpack-value` in Redis and Valkey."""

FinishVerdict = Literal[
    "completed", "failed", "cancelled", "retry", "dead", "released", "suspect", "stale", "already"
]
"""What a finish did with a job. `stale`: the claim does not hold the job any more, so that its
outcome was discarded. `already`: an earlier try of the same call has stored this outcome."""


class ClaimedJob(Struct, frozen=True):
    """A claimed job; `record` is None for an external job and for an unreadable record.

    The record of a later release cannot be read here: `later_schema` is its version then, else 0.
    """

    job_id: str
    data: bytes
    meta: bytes
    record: Record | None
    facts: Facts
    later_schema: int = 0


class Claim(Struct, frozen=True, dict=True):
    """Jobs of one queue under one lease."""

    queue: str
    token: str
    flat: Sequence[bytes | None]
    """Id, input, meta and facts of each job, one after another, as in the reply."""
    claimed_ms: int
    """When it was made, by the server's clock; of a call that was sent again when that came."""

    @property
    def count(self) -> int:
        """The number of jobs, without decoding them."""
        return len(self.flat) // 4

    @cached_property
    def jobs(self) -> tuple[ClaimedJob, ...]:
        """The jobs, decoded on first use and so not while other calls wait for the reply."""
        flat = iter(self.flat)
        return tuple([_parse_job(*parts) for parts in zip(flat, flat, flat, flat, strict=True)])

    @cached_property
    def idempotency_digests(self) -> dict[str, str]:
        """Those of the jobs that were submitted with an Idempotency-Key, by id; mostly none."""
        return {
            job.job_id: job.record.idempotency_digest
            for job in self.jobs
            if job.record and job.record.idempotency_digest
        }

    @cached_property
    def exclusive(self) -> bool:
        """Whether its process may hold nothing beside it: a redelivered job or a suspect."""
        if self.count > 1:
            return False
        facts = decode_facts(self.flat[3])
        return bool(facts.deliveries or facts.suspect)


class ClaimRequest(Struct, frozen=True):
    """What to claim. A request sent again with the same token, after a lost reply, claims no second
    batch."""

    queues: tuple[str, ...]
    token: str
    is_holding: bool
    """This process holds another claim, so that a job that must run alone is not given to it."""
    max_jobs: int
    low_first: bool = False
    """Jobs of low priority come before the others."""
    max_jobs_of: dict[str, int] = {}
    """By queue of which fewer than `max_jobs` are claimed at a time, how many: one where jobs
    cannot share a run, few where their results are large."""

    def limit(self, queue: str) -> int:
        """The most jobs of a claim of this queue."""
        return self.max_jobs_of.get(queue, self.max_jobs)


class ClaimReply(Struct, frozen=True):
    """The reply to a request."""

    claim: Claim | None
    is_blocked: bool = False
    """The next job must run alone, and this process holds another claim."""
    failed: tuple[FailedJobs, ...] = ()
    """By queue, the jobs that could not be claimed and so failed."""


class JobOutcome(Struct, frozen=True):
    """The outcome of a job."""

    job_id: str
    outcome: Outcome
    body: bytes = b""
    """The result or the error as JSON."""
    meta: bytes = b""
    """The record with its prefix."""
    delay_ms: int = 0
    """How long a job to retry is delayed."""


class QueueConsumer:
    """Claims jobs for one worker and stores their outcomes."""

    def __init__(self, store: Store, worker_id: str) -> None:
        self._store = store
        self._worker_id = worker_id

    def new_token(self) -> str:
        """A new claim token: the worker's id and random digits.

        The token has at least 65 bytes so that the server stores the hash of running jobs as a
        table: with shorter values it keeps one list and searches it from its start, which took
        17 µs a job with 256 running, and 10 % of Redis's CPU time while a queue was drained.
        """
        missing = _MIN_TOKEN_BYTES - len(self._worker_id) - 1
        return f"{self._worker_id}:{secrets.token_hex(max(8, (missing + 1) // 2))}"

    async def has_work(self, queues: Sequence[str]) -> bool:
        """Whether a job waits in any of the queues: one EXISTS over all their lists."""
        names = [name for queue in queues for name in keys.waiting(queue)]
        return bool(await self._store.command("EXISTS", *names))

    async def claim(self, request: ClaimRequest) -> ClaimReply:
        """Claims jobs of the first queue that has some; raises RedisUnavailable."""
        args = encode_args(await self._claim_args(request))
        return self._parse_claim_reply(
            await self._store.call(script("claim"), request.queues, [args]), request.token
        )

    async def finish(
        self,
        claim: Claim,
        finished: Sequence[JobOutcome],
        *,
        last: bool,
        following: ClaimRequest | None = None,
    ) -> tuple[list[FinishVerdict], ClaimReply]:
        """Stores outcomes of jobs of `claim` in as few calls as the bounds allow, and claims jobs
        for the `following` request in the last one. `last`: no job of the claim is unfinished any
        more.

        Returns a verdict for each outcome and the reply to `following`. Raises RedisUnavailable;
        then the same arguments may be sent again, no matter what the first call did.
        """
        *parts, last_part = _split_into_calls(finished)
        verdicts: list[FinishVerdict] = []
        for part in parts:
            verdicts += (await self._finish(claim, part, last=False, following=None))[0]
        ended, claimed = await self._finish(claim, last_part, last=last, following=following)
        return verdicts + ended, claimed

    async def _finish(
        self,
        claim: Claim,
        part: Sequence[JobOutcome],
        *,
        last: bool,
        following: ClaimRequest | None,
    ) -> tuple[list[FinishVerdict], ClaimReply]:
        header: dict[str, Any] = {**self._store.policy.end_arguments(), "token": claim.token}
        header["is_last"] = last
        if digests := claim.idempotency_digests:
            header["digests"] = [digests.get(job.job_id) for job in part]
        names = [claim.queue]
        if following:
            header["next"] = await self._claim_args(following)
            names += following.queues
        args: list[Any] = [encode_args(header)]
        for job in part:
            args += (id_bytes(job.job_id), job.outcome, job.body, job.meta, job.delay_ms)
        reply = await self._store.call(script("finish"), names, args)
        verdicts = [cast(FinishVerdict, decoding.text(verdict)) for verdict in reply[0]]
        if "stale" in verdicts:
            verdicts = await self._recognise_own_finishes(claim, part, verdicts)
        if following and len(reply) > 1:
            return verdicts, self._parse_claim_reply(reply[1], following.token)
        return verdicts, ClaimReply(None)

    async def _recognise_own_finishes(
        self, claim: Claim, finished: Sequence[JobOutcome], verdicts: list[FinishVerdict]
    ) -> list[FinishVerdict]:
        """Turns `stale` into `already` for outcomes that are stored: a repeated call gets `stale`
        for its own work."""
        stale = [job for job, verdict in zip(finished, verdicts, strict=True) if verdict == "stale"]
        key_makers = (keys.status, keys.meta, keys.result, keys.error)
        names = [id_bytes(key_of(job.job_id)) for job in stale for key_of in key_makers]
        values = iter(await self._store.command("MGET", *names, is_large=True))
        states = zip(values, values, values, values, strict=True)
        own_ids = {
            job.job_id
            for job, state in zip(stale, states, strict=True)
            if _is_stored(job, claim.token, *state)
        }
        return [
            "already" if verdict == "stale" and job.job_id in own_ids else verdict
            for job, verdict in zip(finished, verdicts, strict=True)
        ]

    async def _claim_args(self, request: ClaimRequest) -> dict[str, Any]:
        return {
            **self._store.policy.end_arguments(),
            "token": request.token,
            "lease_ms": self._store.policy.lease_ms,
            "not_after_ms": await self._store.not_after_ms(),
            "is_holding": request.is_holding,
            "max_jobs": min(request.max_jobs, _MAX_JOBS_PER_CALL),
            "max_bytes": _MAX_CLAIM_BYTES,
            "low_first": request.low_first,
            "max_jobs_of": request.max_jobs_of,
        }

    def _parse_claim_reply(self, reply: Any, token: str) -> ClaimReply:
        server_ms, queue, blocked, failures, *flat = reply
        self._store.note_server_time(server_ms)
        claim = Claim(queue.decode(), token, flat, server_ms) if flat else None
        failed = tuple(map(read_failed_jobs, failures)) if failures else ()
        return ClaimReply(claim, bool(blocked), failed)


def _split_into_calls(finished: Sequence[JobOutcome]) -> Iterator[list[JobOutcome]]:
    """Splits outcomes into parts of a bounded number of jobs and bytes; at least one part."""
    part: list[JobOutcome] = []
    size = 0
    for job in finished:
        size += len(job.body)
        if part and (len(part) == _MAX_JOBS_PER_CALL or size > MAX_BYTES_PER_CALL):
            yield part
            part, size = [], len(job.body)
        part.append(job)
    yield part


def _parse_job(
    job_id: bytes | None, data: bytes | None, meta: bytes | None, facts: bytes | None
) -> ClaimedJob:
    record, later_schema = read_record(meta), 0
    if record and is_later(record):
        later_schema, record = record.schema, None
    return ClaimedJob(
        id_text(job_id or b""), data or b"", meta or b"", record, decode_facts(facts), later_schema
    )


def _is_stored(
    job: JobOutcome,
    token: str,
    status: bytes | None,
    meta: bytes | None,
    result: bytes | None,
    error: bytes | None,
) -> bool:
    """Whether a job's stored state is the outcome that the claim of `token` sent: an ended job's
    record names the claim, and one that was given back waits with the record that was sent."""
    if job.outcome in ("retry", "released", "suspect"):
        return status == b"pending" and (meta or b"") == job.meta
    if meta:
        record = read_record(meta)
        return record is not None and record.claim == token
    return job.body != b"" and job.body in (result, error)


def error_body(code: str, message: str) -> bytes:
    """The JSON of `job:{id}:error`."""
    return msgspec.json.encode(JobError(code, message))

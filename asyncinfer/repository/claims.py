"""What a worker does to jobs: wait, claim, finish, and renew from a thread."""

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
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Packed, Store, encode_args
from asyncinfer.untrusted import decoding

MOST_QUEUES_A_CLAIM: Final = 8
_MOST_JOBS: Final = 256
_MOST_BYTES: Final = 1 << 20
_CLAIM_BYTES: Final = 2 << 20
_TABLE_BYTES: Final = 65
"""One more than `hash-max-listpack-value`, whose default is the same in Redis and Valkey."""

Verdict = Literal[
    "completed",
    "failed",
    "cancelled",
    "retry",
    "dead",
    "released",
    "suspect",
    "stale",
    "already",
]


class ClaimedJob(Struct, frozen=True):
    """A job as claimed; `record` is None for a stranger's or for one that cannot be read.

    That of a later release is not to be read here: `later_schema` is its version then, else 0.
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
    """As the reply has them: id, input, meta and facts of each."""

    @property
    def count(self) -> int:
        """How many jobs; they need not be read for it."""
        return len(self.flat) // 4

    @cached_property
    def jobs(self) -> tuple[ClaimedJob, ...]:
        """Read when first looked at, and not while others wait to call."""
        flat = iter(self.flat)
        return tuple([_claimed_job(*four) for four in zip(flat, flat, flat, flat, strict=True)])

    @cached_property
    def exclusive(self) -> bool:
        """Whether its process may hold nothing beside it: a redelivered job or a suspect."""
        if self.count > 1:
            return False
        facts = decode_facts(self.flat[3])
        return bool(facts.deliveries or facts.suspect)


class ClaimRequest(Struct, frozen=True):
    """What to claim. Sent again after a lost reply with the same token, it takes nothing twice."""

    queues: tuple[str, ...]
    token: str
    held: bool
    max_jobs: int
    low_first: bool = False
    unshared: tuple[str, ...] = ()
    """Queues of models whose jobs cannot share a run: one job at a time, the rest for others."""


class Claimed(Struct, frozen=True):
    """The answer to a request; `blocked`: a job is next that must run alone, and this process
    holds another claim."""

    claim: Claim | None
    blocked: bool = False


class Finished(Struct, frozen=True):
    """What became of a job: result or error JSON, the record with its prefix, a delay."""

    job_id: str
    outcome: Outcome
    body: bytes = b""
    meta: bytes = b""
    delay_ms: int = 0


class PackedOutcomes(Struct, frozen=True):
    """What one call can store, packed before it has its turn to be made."""

    finished: Sequence[Finished]
    args: Packed


def packed_outcomes(finished: Sequence[Finished]) -> list[PackedOutcomes]:
    """One at least, since that a claim is done may come alone."""
    return [PackedOutcomes(part, _packed(part)) for part in _parts(finished)]


class Runs:
    """The worker's verbs."""

    def __init__(self, store: Store, worker_id: str) -> None:
        self._store = store
        self._worker_id = worker_id

    def new_token(self) -> str:
        """The worker and something random.

        So long that the hash of what runs is kept as a table: below 65 bytes a server keeps it as
        one list that it searches from its start, which took it 17 µs a job with 256 running.
        """
        missing = _TABLE_BYTES - len(self._worker_id) - 1
        return f"{self._worker_id}:{secrets.token_hex(max(8, (missing + 1) // 2))}"

    async def has_work(self, queues: Sequence[str]) -> bool:
        """One EXISTS over all lists; a worker of few queues claims at once instead."""
        names = [name for queue in queues for name in keys.waiting(queue)]
        return bool(await self._store.command("EXISTS", *names))

    async def claim(self, request: ClaimRequest) -> Claimed:
        args = encode_args(await self._claim_args(request))
        return self._claimed(
            await self._store.call(script("claim"), request.queues, [args]), request.token
        )

    async def finish(
        self,
        claim: Claim,
        finished: Sequence[Finished],
        *,
        last: bool,
        following: ClaimRequest | None = None,
    ) -> tuple[list[Verdict], Claimed]:
        """`finish_packed` for outcomes that are not packed yet."""
        outcomes = packed_outcomes(finished)
        return await self.finish_packed(claim, outcomes, last=last, following=following)

    async def finish_packed(
        self,
        claim: Claim,
        outcomes: Sequence[PackedOutcomes],
        *,
        last: bool,
        following: ClaimRequest | None = None,
    ) -> tuple[list[Verdict], Claimed]:
        """Stores what became of jobs of `claim`; `last` when none of it is open any more.

        The following claim rides on the last call. Raises RedisUnavailable; the same arguments
        may be sent again, whatever was done the first time.
        """
        verdicts: list[Verdict] = []
        for part in outcomes[:-1]:
            verdicts += (await self._finish(claim, part, last=False, following=None))[0]
        ended, claimed = await self._finish(claim, outcomes[-1], last=last, following=following)
        return verdicts + ended, claimed

    async def _finish(
        self,
        claim: Claim,
        part: PackedOutcomes,
        *,
        last: bool,
        following: ClaimRequest | None,
    ) -> tuple[list[Verdict], Claimed]:
        header: dict[str, Any] = {**self._store.policy.ending(), "token": claim.token}
        header["is_last"] = last
        names = [claim.queue]
        if following:
            header["next"] = await self._claim_args(following)
            names += following.queues
        reply = await self._store.call(script("finish"), names, [encode_args(header)], part.args)
        verdicts = [cast(Verdict, decoding.text(verdict)) for verdict in reply[0]]
        if "stale" in verdicts:
            verdicts = await self._told_apart(claim, part.finished, verdicts)
        if following and len(reply) > 1:
            return verdicts, self._claimed(reply[1], following.token)
        return verdicts, Claimed(None)

    async def _told_apart(
        self, claim: Claim, finished: Sequence[Finished], verdicts: list[Verdict]
    ) -> list[Verdict]:
        """A retried call answers stale for its own work: the record says whose it is."""
        stale = [one for one, verdict in zip(finished, verdicts, strict=True) if verdict == "stale"]
        names = [
            name
            for one in stale
            for name in (
                id_bytes(keys.meta(one.job_id)),
                id_bytes(keys.result(one.job_id)),
                id_bytes(keys.error(one.job_id)),
            )
        ]
        reply = iter(await self._store.command("MGET", *names))
        mine = {one.job_id for one in stale if _holds(one, claim.token, *_three(reply))}
        return [
            "already" if verdict == "stale" and one.job_id in mine else verdict
            for one, verdict in zip(finished, verdicts, strict=True)
        ]

    async def _claim_args(self, request: ClaimRequest) -> dict[str, Any]:
        return {
            **self._store.policy.ending(),
            "token": request.token,
            "lease_ms": self._store.policy.lease_ms,
            "not_after_ms": await self._store.not_after_ms(),
            "is_holding": request.held,
            "max_jobs": min(request.max_jobs, _MOST_JOBS),
            "max_bytes": _CLAIM_BYTES,
            "low_first": request.low_first,
            "one_at_a_time": dict.fromkeys(request.unshared, True),
        }

    def _claimed(self, reply: Any, token: str) -> Claimed:
        server_ms, queue, blocked, *flat = reply
        self._store.saw_server_time(server_ms)
        if not flat:
            return Claimed(None, bool(blocked))
        return Claimed(Claim(queue.decode(), token, flat), bool(blocked))


def _packed(finished: Sequence[Finished]) -> Packed:
    args: list[Any] = []
    for one in finished:
        args += (id_bytes(one.job_id), one.outcome, one.body, one.meta, one.delay_ms)
    return Packed.of(args)


def _parts(finished: Sequence[Finished]) -> Iterator[list[Finished]]:
    """Script calls bounded in jobs and bytes."""
    part: list[Finished] = []
    size = 0
    for one in finished:
        size += len(one.body)
        if part and (len(part) == _MOST_JOBS or size > _MOST_BYTES):
            yield part
            part, size = [], len(one.body)
        part.append(one)
    yield part


def _claimed_job(
    job_id: bytes | None, data: bytes | None, meta: bytes | None, facts: bytes | None
) -> ClaimedJob:
    record, later_schema = read_record(meta), 0
    if record and is_later(record):
        later_schema, record = record.schema, None
    return ClaimedJob(
        id_text(job_id or b""),
        data or b"",
        meta or b"",
        record,
        decode_facts(facts),
        later_schema,
    )


def _three(reply: Iterator[bytes | None]) -> tuple[bytes | None, bytes | None, bytes | None]:
    return next(reply), next(reply), next(reply)


def _holds(
    one: Finished, token: str, meta: bytes | None, result: bytes | None, error: bytes | None
) -> bool:
    if meta:
        record = read_record(meta)
        return record is not None and record.claim == token
    return one.body != b"" and one.body in (result, error)


def error_body(code: str, message: str) -> bytes:
    """The JSON of `job:{id}:error`."""
    return msgspec.json.encode(JobError(code, message))

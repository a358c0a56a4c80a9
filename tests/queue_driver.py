"""A driver of one queue for tests: it submits, claims, finishes and sweeps, and reads Redis."""

import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

import msgspec
import redis

from asyncinfer.jobs import (
    SCHEMA,
    Facts,
    Options,
    Outcome,
    Record,
    decode_facts,
    encode_record,
    new_id,
    record_seq,
)
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.claims import (
    Claim,
    ClaimedJob,
    ClaimReply,
    ClaimRequest,
    JobOutcome,
    QueueConsumer,
)
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.maintenance import Maintenance, SweepCounts
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.repository.submissions import NewJob, Submissions, SubmitReply

Q = "predict_queue"
DATA = b"[[1,2,3,4]]"
RESULT = b'{"prediction":0}'
ERROR = b'{"code":"model_failed","message":"no"}'


def new_job(
    data: bytes = DATA,
    *,
    queue: str = Q,
    tenant: str = "default",
    inbox: str = "",
    key: str = "",
    fingerprint: str = "f",
    job_id: str = "",
    **options: Any,
) -> NewJob:
    now_ms = time.time_ns() // 1_000_000
    model = queue.partition(":")[2] or "iris"
    record = Record(
        SCHEMA, queue, model, tenant, now_ms, options=Options(**options), idempotency_digest=key
    )
    return NewJob(job_id or new_id(now_ms), queue, data, record, inbox, fingerprint)


def ids_of(jobs: Iterable[NewJob | ClaimedJob | StoredJob]) -> list[str]:
    return [job.job_id for job in jobs]


def _meta_of_ended_job(job: ClaimedJob, token: str) -> bytes:
    """The record as a worker writes it: with the claim that ended the job."""
    if job.record is None:
        return b""
    now_ms = time.time_ns() // 1_000_000
    record = msgspec.structs.replace(job.record, claim=token, started_ms=now_ms, finished_ms=now_ms)
    return encode_record(record, record_seq(job.meta))


def outcome_of(
    job: ClaimedJob, token: str, outcome: Outcome, *, body: bytes | None = None, delay_ms: int = 0
) -> JobOutcome:
    default = {"completed": RESULT, "failed": ERROR, "dead": ERROR}.get(outcome, b"")
    ends = outcome in ("completed", "failed", "cancelled", "dead")
    meta = _meta_of_ended_job(job, token) if ends else job.meta
    return JobOutcome(job.job_id, outcome, default if body is None else body, meta, delay_ms)


class QueueDriver:
    """What an API, a worker, an operator and an external producer do with one queue."""

    def __init__(self, store: Store, server: redis.Redis) -> None:
        self.store = store
        # redis-py types every reply as a union of all that RESP can say.
        self.redis: Any = server
        self.submissions = Submissions(store)
        self.consumer = QueueConsumer(store, "driver")
        self.announcements = Announcements(store)
        self.maintenance = Maintenance(store)
        self.operations = Operations(store)
        self.inspection = Inspection(store)

    def change_policy(self, **changes: Any) -> Policy:
        """Changes the store's policy from now on; returns the new one."""
        self.store.policy = msgspec.structs.replace(self.store.policy, **changes)
        return self.store.policy

    # --- what an API does ------------------------------------------------------------------

    async def submit(self, *jobs: NewJob) -> list[str]:
        """Returns the verdict of each job."""
        return [submitted.verdict for submitted in await self.submit_jobs(*jobs)]

    async def submit_jobs(self, *jobs: NewJob) -> list[SubmitReply]:
        return await self.submissions.submit_many(jobs[0].queue, jobs)

    async def submit_many(self, count: int, **about: Any) -> list[str]:
        """Submits `count` equal jobs; returns their ids in the order of submission."""
        jobs = [new_job(**about) for _ in range(count)]
        assert set(await self.submit(*jobs)) == {"ok"}
        return ids_of(jobs)

    async def submit_one(self, **about: Any) -> str:
        return (await self.submit_many(1, **about))[0]

    async def read(self, job_id: str) -> StoredJob:
        stored = await self.submissions.read(job_id)
        assert stored is not None, f"job {job_id} is absent"
        return stored

    async def cancel(self, job_id: str) -> str:
        return await self.operations.cancel(await self.read(job_id))

    async def cancel_in_one_call(self, *job_ids: str, queue: str = Q) -> list[str]:
        args: list[Any] = [encode_args(self.store.policy.end_arguments())]
        for job_id in job_ids:
            args += (job_id, b"")
        return [
            verdict.decode() for verdict in await self.store.call(script("cancel"), [queue], args)
        ]

    async def retry(self, job_id: str) -> str:
        return await self.operations.retry(await self.read(job_id), 1)

    # --- what a worker does ----------------------------------------------------------------

    async def claim(
        self,
        max_jobs: int = 100,
        *,
        token: str = "",
        held: bool = False,
        low_first: bool = False,
        queues: Sequence[str] = (Q,),
    ) -> ClaimReply:
        token = token or self.consumer.new_token()
        return await self.consumer.claim(
            ClaimRequest(tuple(queues), token, held, max_jobs, low_first)
        )

    async def claim_jobs(self, max_jobs: int = 100, **options: Any) -> Claim:
        """Claims jobs; fails the test if there is none."""
        claim = (await self.claim(max_jobs, **options)).claim
        assert claim is not None, "nothing to claim"
        return claim

    async def finish(
        self,
        claim: Claim,
        outcome: Outcome = "completed",
        *,
        only: Sequence[str] | None = None,
        last: bool = True,
        following: ClaimRequest | None = None,
        **options: Any,
    ) -> tuple[list[str], ClaimReply]:
        """Returns the verdict of each job, and the claim that was requested by `following`."""
        finished = [
            outcome_of(job, claim.token, outcome, **options)
            for job in claim.jobs
            if only is None or job.job_id in only
        ]
        verdicts, claimed = await self.consumer.finish(
            claim, finished, last=last, following=following
        )
        return [str(verdict) for verdict in verdicts], claimed

    async def finish_for_verdicts(
        self, claim: Claim, outcome: Outcome = "completed", **options: Any
    ) -> list[str]:
        """Finishes the claim; returns the verdict of each job."""
        return (await self.finish(claim, outcome, **options))[0]

    async def run_all(self, outcome: Outcome = "completed") -> list[str]:
        """Claims and finishes until no job waits; returns the ids in the order of their claims."""
        served: list[str] = []
        while claim := (await self.claim()).claim:
            await self.finish(claim, outcome)
            served += ids_of(claim.jobs)
        return served

    # --- recovery, and the passing of time -------------------------------------------------

    async def sweep(self) -> SweepCounts:
        """Sweeps as if it were due: the gate is open, and the last sweep has just been."""
        for queue in await self.store.queues():
            self.redis.delete(keys.reap_gate(queue), keys.hold(queue))
            self.redis.set(keys.swept(queue), self.now_ms())
        return await self.maintenance.sweep()

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def expire_leases(self, *tokens: str, queue: str = Q) -> None:
        """Makes leases expire, all or those of `tokens`; their order stays as it is."""
        leases = self.redis.zrange(keys.leases(queue), 0, -1)
        for rank, token in enumerate(leases):
            if not tokens or token.decode() in tokens:
                self.redis.zadd(keys.leases(queue), {token: rank + 1})

    def make_due(self, table: str, *job_ids: str) -> None:
        """Moves times in `delayed` or `deadlines` into the past; their order stays as it is."""
        for rank, member in enumerate(self.redis.zrange(table, 0, -1)):
            if not job_ids or member.decode() in job_ids:
                self.redis.zadd(table, {member: rank + 1})

    async def commands_of(self, work: Awaitable[object]) -> dict[str, int]:
        """How often Redis ran each command during `work`, also inside scripts."""
        self.redis.config_resetstat()
        await work
        found = self.redis.info("commandstats")
        ours = {name.removeprefix("cmdstat_"): item["calls"] for name, item in found.items()}
        # The store may still be opening its connections for large calls.
        others = ("client", "config", "info")
        return {name: count for name, count in ours.items() if not name.startswith(others)}

    # --- what an external producer does ----------------------------------------------------

    def add_external_job(
        self, job_id: str | bytes, data: bytes | None = DATA, *, status: bytes | None = b"pending"
    ) -> None:
        """Adds a job as a ten-line script does: SET data, SET status, LPUSH."""
        name = job_id.encode() if isinstance(job_id, str) else job_id
        if data is not None:
            self.redis.set(b"job:%b:data" % name, data)
        if status is not None:
            self.redis.set(b"job:%b:status" % name, status)
        self.redis.lpush(Q, name)

    # --- what Redis stores -----------------------------------------------------------------

    def waiting_ids(self, queue: str = Q) -> list[str]:
        """Ids of the waiting jobs, in the order in which they are claimed."""
        return [
            job_id.decode("utf-8", "surrogateescape")
            for name in keys.waiting(queue)
            for job_id in reversed(self.redis.lrange(name, 0, -1))
        ]

    def status(self, job_id: str) -> str | None:
        status = self.redis.get(keys.status(job_id))
        return None if status is None else str(status.decode())

    def statuses(self, job_ids: Iterable[str]) -> set[str | None]:
        return {self.status(job_id) for job_id in job_ids}

    def error_code(self, job_id: str) -> str:
        return str(msgspec.json.decode(self.redis.get(keys.error(job_id)) or b"{}")["code"])

    def facts(self, job_id: str, queue: str = Q) -> Facts:
        return decode_facts(self.redis.hget(keys.facts(queue), job_id))

    def counter(self, name: str) -> int:
        return int(self.redis.get(name) or 0)

    def count_stale_entries(self) -> int:
        return int(self.redis.scard(keys.stale_entries(Q)))

    def ttls(self, job_id: str) -> dict[str, int]:
        """The TTL in seconds of each key of a job that exists; -1 is no TTL."""
        words = ("data", "status", "result", "error", "meta")
        ttls = {word: int(self.redis.ttl(f"job:{job_id}:{word}")) for word in words}
        return {word: seconds for word, seconds in ttls.items() if seconds != -2}

"""The hands of a test: they submit, work and sweep, and look at what Redis holds."""

import time
from collections.abc import Iterable, Sequence
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
from asyncinfer.repository.claims import Claim, Claimed, ClaimedJob, ClaimRequest, Finished, Runs
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.maintenance import Maintenance, Swept
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import Stored
from asyncinfer.repository.submissions import NewJob, Submissions, Submitted

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
    record = Record(SCHEMA, queue, model, tenant, now_ms, options=Options(**options))
    return NewJob(job_id or new_id(now_ms), queue, data, record, inbox, key, fingerprint)


def ids_of(jobs: Iterable[NewJob | ClaimedJob | Stored]) -> list[str]:
    return [job.job_id for job in jobs]


def ended_meta(job: ClaimedJob, token: str) -> bytes:
    """The record as a worker leaves it: with the claim that ended the job."""
    if job.record is None:
        return b""
    record = msgspec.structs.replace(job.record, claim=token)
    return encode_record(record, record_seq(job.meta))


def outcome_of(
    job: ClaimedJob, token: str, outcome: Outcome, *, body: bytes | None = None, delay_ms: int = 0
) -> Finished:
    default = {"completed": RESULT, "failed": ERROR, "dead": ERROR}.get(outcome, b"")
    ends = outcome in ("completed", "failed", "cancelled", "dead")
    meta = ended_meta(job, token) if ends else job.meta
    return Finished(job.job_id, outcome, default if body is None else body, meta, delay_ms)


class Hands:
    """An API's, a worker's and an operator's, on one queue."""

    def __init__(self, store: Store, server: redis.Redis) -> None:
        self.store = store
        # redis-py types every reply as a union of all that RESP can say.
        self.redis: Any = server
        self.submissions = Submissions(store)
        self.runs = Runs(store, "hand")
        self.announcements = Announcements(store)
        self.maintenance = Maintenance(store)
        self.operations = Operations(store)
        self.inspection = Inspection(store)

    def policy(self, **changes: Any) -> Policy:
        self.store.policy = msgspec.structs.replace(self.store.policy, **changes)
        return self.store.policy

    # --- the API's -------------------------------------------------------------------------

    async def submit(self, *jobs: NewJob) -> list[str]:
        return [one.verdict for one in await self.submitted(*jobs)]

    async def submitted(self, *jobs: NewJob) -> list[Submitted]:
        return await self.submissions.submit_many(jobs[0].queue, jobs)

    async def some(self, count: int, **about: Any) -> list[str]:
        """Submits `count` alike; their ids, the first first."""
        jobs = [new_job(**about) for _ in range(count)]
        assert set(await self.submit(*jobs)) == {"ok"}
        return ids_of(jobs)

    async def one(self, **about: Any) -> str:
        return (await self.some(1, **about))[0]

    async def read(self, job_id: str) -> Stored:
        stored = await self.submissions.read(job_id)
        assert stored is not None, f"job {job_id} is absent"
        return stored

    async def cancel(self, job_id: str) -> str:
        return await self.operations.cancel(await self.read(job_id))

    async def cancel_in_one_call(self, *job_ids: str, queue: str = Q) -> list[str]:
        args: list[Any] = [encode_args(self.store.policy.ending())]
        for job_id in job_ids:
            args += (job_id, b"")
        return [one.decode() for one in await self.store.call(script("cancel"), [queue], args)]

    async def retry(self, job_id: str) -> str:
        return await self.operations.retry(await self.read(job_id), 1)

    # --- a worker's ------------------------------------------------------------------------

    async def claim(
        self,
        max_jobs: int = 100,
        *,
        token: str = "",
        held: bool = False,
        low_first: bool = False,
        queues: Sequence[str] = (Q,),
    ) -> Claimed:
        token = token or self.runs.new_token()
        return await self.runs.claim(ClaimRequest(tuple(queues), token, held, max_jobs, low_first))

    async def take(self, max_jobs: int = 100, **how: Any) -> Claim:
        claim = (await self.claim(max_jobs, **how)).claim
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
        **how: Any,
    ) -> tuple[list[str], Claimed]:
        finished = [
            outcome_of(job, claim.token, outcome, **how)
            for job in claim.jobs
            if only is None or job.job_id in only
        ]
        verdicts, claimed = await self.runs.finish(claim, finished, last=last, following=following)
        return [str(verdict) for verdict in verdicts], claimed

    async def ended(self, claim: Claim, outcome: Outcome = "completed", **how: Any) -> list[str]:
        return (await self.finish(claim, outcome, **how))[0]

    async def run_all(self, outcome: Outcome = "completed") -> list[str]:
        """Claims and finishes until nothing waits; the ids in the order they were served."""
        served: list[str] = []
        while claim := (await self.claim()).claim:
            await self.finish(claim, outcome)
            served += ids_of(claim.jobs)
        return served

    # --- everybody's -----------------------------------------------------------------------

    async def sweep(self) -> Swept:
        """A sweep at its time: the gate is open, and the last one was just before."""
        for queue in await self.store.queues():
            self.redis.delete(keys.reap_gate(queue), keys.hold(queue))
            self.redis.set(keys.swept(queue), self.now_ms())
        return await self.maintenance.sweep()

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def let_leases_end(self, *tokens: str, queue: str = Q) -> None:
        """As if their workers had not renewed for long; the order of the leases stays."""
        leases = self.redis.zrange(keys.leases(queue), 0, -1)
        for rank, token in enumerate(leases):
            if not tokens or token.decode() in tokens:
                self.redis.zadd(keys.leases(queue), {token: rank + 1})

    def let_come_due(self, table: str, *job_ids: str) -> None:
        """Makes times in `delayed` or `deadlines` pass, in their order."""
        for rank, one in enumerate(self.redis.zrange(table, 0, -1)):
            if not job_ids or one.decode() in job_ids:
                self.redis.zadd(table, {one: rank + 1})

    # --- a stranger's ----------------------------------------------------------------------

    def stranger(
        self, job_id: str | bytes, data: bytes | None = DATA, *, status: bytes | None = b"pending"
    ) -> None:
        """What a ten-line script does: SET data, SET status, LPUSH."""
        name = job_id.encode() if isinstance(job_id, str) else job_id
        if data is not None:
            self.redis.set(b"job:%b:data" % name, data)
        if status is not None:
            self.redis.set(b"job:%b:status" % name, status)
        self.redis.lpush(Q, name)

    # --- what Redis holds ------------------------------------------------------------------

    def waiting(self, queue: str = Q) -> list[str]:
        """Ids in the lists, in the order they are served."""
        return [
            one.decode("utf-8", "surrogateescape")
            for name in keys.waiting(queue)
            for one in reversed(self.redis.lrange(name, 0, -1))
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

    def ghosts(self) -> int:
        return int(self.redis.scard(keys.stale_entries(Q)))

    def ttls(self, job_id: str) -> dict[str, int]:
        """Seconds left of each key of a job that exists; -1 for ever."""
        words = ("data", "status", "result", "error", "meta")
        found = {word: int(self.redis.ttl(f"job:{job_id}:{word}")) for word in words}
        return {word: seconds for word, seconds in found.items() if seconds != -2}

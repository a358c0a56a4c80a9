"""Random interleavings of every verb, retried calls included, against a real server.

After each step the whole state is read and checked: every job is in exactly one place,
each round has one terminal state, only the owner of a job ends it, and every bound holds.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asyncinfer.jobs import TERMINAL, Facts, Outcome, decode_facts, decode_record
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimReply, ClaimRequest, JobOutcome
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob
from tests.faults.harness import assert_at_rest
from tests.queue_driver import Q, QueueDriver, new_job, outcome_of
from tests.restricted_user import without_commands

T = TypeVar("T")

QUEUES = (Q, f"{Q}:digits")
INBOX = keys.inbox(Q, "api")
MAX_QUEUE = 12
WORKERS = 3
OUTCOMES: tuple[Outcome, ...] = (
    *("completed", "failed", "cancelled", "dead", "retry", "released", "suspect"),
)

_LOOK = """
local seen = {}
for i, id in ipairs(ARGV) do
  local function key(word) return 'job:' .. id .. ':' .. word end
  local ttls = {}
  for j, word in ipairs({'data', 'status', 'result', 'error', 'meta'}) do
    ttls[j] = redis.call('TTL', key(word))
  end
  seen[i] = { redis.call('GET', key('status')), redis.call('GET', key('result')),
    redis.call('GET', key('error')), redis.call('GET', key('meta')),
    redis.call('STRLEN', key('data')), ttls,
    redis.call('PEXPIRETIME', key('status')) }
end
return seen
"""


class JobView(msgspec.Struct, frozen=True):
    """A job as stored in Redis."""

    status: str | None
    result: bytes | None
    error: bytes | None
    meta: bytes | None
    size: int
    ttls: tuple[int, ...]
    """The TTLs of data, status, result, error, meta: -2 for an absent key, -1 for no TTL."""
    expires_ms: int
    """When its status expires, in ms; negative for never."""

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def kept_bytes(self) -> int:
        """What is counted of it once it has ended: its input, result and error."""
        size = self.size + len(self.result or b"") + len(self.error or b"")
        return size if self.ended and size >= 1024 else 0

    @property
    def minute(self) -> int:
        """The minute in which its status expires."""
        return self.expires_ms // 60_000


class QueueView(msgspec.Struct, frozen=True):
    """A queue as stored in Redis; lists in the order in which they are served."""

    lists: tuple[list[str], list[str], list[str]]
    delayed: list[str]
    running: dict[str, str]
    leases: set[str]
    claims: dict[str, list[str]]
    facts: dict[str, Facts]
    deadlines: list[str]
    stale_entries: int
    bytes: int
    kept: dict[int, int]
    """{minute in which they expire: bytes that ended jobs keep}."""
    bytes_kept: int
    wake: int
    paused: bool
    idempotency: dict[str, tuple[str, int]]
    """{idempotency key: the id that it names, when it expires in ms}."""

    @property
    def waiting(self) -> list[str]:
        return [job_id for ids in self.lists for job_id in ids]

    @property
    def room(self) -> int:
        return MAX_QUEUE - (len(self.waiting) + len(self.delayed) - self.stale_entries)


class View(msgspec.Struct, frozen=True):
    jobs: dict[str, JobView]
    queues: dict[str, QueueView]


class Held(msgspec.Struct):
    """A claim as its worker sees it, with the jobs that it has not finished yet."""

    worker: int
    claim: Claim
    request: ClaimRequest
    open: list[str]
    sent: list[tuple[list[JobOutcome], bool, ClaimRequest | None]] = msgspec.field(
        default_factory=list
    )
    let_go: bool = False


class World:
    """The event loop, the store and the client of all runs of the machine."""

    def __init__(self, url: str, client: redis.Redis) -> None:
        policy = Policy(lease_seconds=60, reap_seconds=2, max_queue=MAX_QUEUE, max_dead_letters=3)
        self.runner = asyncio.Runner()
        self.redis: Any = client
        self._opened = Store.open(url, queue_name=Q, policy=policy, name="machine")
        self.store = self.runner.run(self._opened.__aenter__())
        self.renewals = Leases(self.store)
        self.hands = QueueDriver(self.store, client)

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def close(self) -> None:
        self.renewals.close()
        self.runner.run(self._opened.__aexit__(None, None, None))
        self.runner.close()


def texts(names: Sequence[bytes]) -> list[str]:
    return [name.decode() for name in names]


class Machine(RuleBasedStateMachine):
    """Workers, APIs, external producers and the passing of time, interleaved."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.hands = world.hands
        self.redis = world.redis
        self.redis.flushall()
        self.made = 0
        self.ids: list[str] = []
        self.lists: dict[str, int] = {}
        """{job id: the list it belongs into}, without external jobs."""
        self.external_ids: set[str] = set()
        self.doubled: set[str] = set()
        """Ids that an external producer pushed a second time."""
        self.held: list[Held] = []
        self.blocked: set[int] = set()
        self.results: dict[str, bytes] = {}
        """{job id: the result that the accepted finish wrote}."""
        self.reopened: set[str] = set()
        self.forgotten: set[str] = set()
        self.watched: set[str] = set()
        self.stray_pushes = 0
        self.put_back = 0
        self.inputs_lost = False
        self.lost_bytes = Counter[tuple[str, int]]()
        """{(queue, minute): bytes that are still counted of ended jobs whose input was lost}."""
        self.last = self.view()

    # --- reading the state -----------------------------------------------------------------

    def view(self) -> View:
        jobs = self.redis.eval(_LOOK, 0, *self.ids) if self.ids else []
        return View(
            {job_id: job_view(*values) for job_id, values in zip(self.ids, jobs, strict=True)},
            {queue: self.queue_view(queue) for queue in QUEUES},
        )

    def queue_view(self, queue: str) -> QueueView:
        pipeline = self.redis.pipeline(transaction=False)
        for name in keys.waiting(queue):
            pipeline.lrange(name, 0, -1)
        for name in (keys.delayed(queue), keys.leases(queue), keys.deadlines(queue)):
            pipeline.zrange(name, 0, -1)
        pipeline.hgetall(keys.running(queue)).hgetall(keys.facts(queue))
        pipeline.scard(keys.stale_entries(queue)).get(keys.bytes_waiting(queue))
        pipeline.hgetall(keys.kept(queue)).get(keys.bytes_kept(queue))
        pipeline.llen(keys.wake(queue)).exists(keys.paused(queue))
        pipeline.keys(keys.claim(queue, "*")).keys(keys.idempotency(queue, "*"))
        (
            *lists,
            delayed,
            leases,
            deadlines,
            running,
            facts,
            stale_entries,
            size,
            kept,
            bytes_kept,
            wake,
            paused,
            claims,
            idempotency,
        ) = pipeline.execute()
        high, normal, low = (texts(ids)[::-1] for ids in lists)
        prefix = len(keys.claim(queue, ""))
        return QueueView(
            (high, normal, low),
            sorted(texts(delayed)),
            {job_id.decode(): token.decode() for job_id, token in running.items()},
            set(texts(leases)),
            {
                name.decode()[prefix:]: msgspec.msgpack.decode(self.redis.get(name), type=list[str])
                for name in claims
            },
            {job_id.decode(): decode_facts(packed) for job_id, packed in facts.items()},
            sorted(texts(deadlines)),
            stale_entries,
            int(size or 0),
            {int(minute): int(count) for minute, count in kept.items() if int(count)},
            int(bytes_kept or 0),
            wake,
            bool(paused),
            {name.decode(): self.idempotency_view(name) for name in idempotency},
        )

    def idempotency_view(self, name: bytes) -> tuple[str, int]:
        return self.redis.get(name).split()[0].decode(), self.redis.pexpiretime(name)

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.world.do(call)

    def queue_of(self, job_id: str) -> str:
        meta = self.last.jobs[job_id].meta
        return decode_record(meta).queue if meta else Q

    def some_id(self, which: int) -> str:
        return self.ids[which % len(self.ids)]

    def unchanged(self, what: str) -> None:
        assert self.view() == self.last, f"{what} changed something"

    # --- APIs ------------------------------------------------------------------------------

    @initialize()
    def open_inbox(self) -> None:
        self.redis.xadd(INBOX, {"open": "1"})

    @rule(
        queue=st.sampled_from(QUEUES),
        requests=st.lists(
            st.fixed_dictionaries(
                {
                    "priority": st.sampled_from(["normal", "normal", "high", "low"]),
                    "delay_seconds": st.sampled_from([0, 0, 3600]),
                    "start_within_seconds": st.sampled_from([None, None, 3600]),
                    "finish_within_seconds": st.sampled_from([None, None, 7200]),
                    "ttl_seconds": st.sampled_from([None, None, 77]),
                    "inbox": st.sampled_from(["", INBOX]),
                    "key": st.sampled_from(["", "", "k1", "k2"]),
                    "data": st.sampled_from([b"1", b"22", b"3" * 1500]),
                }
            ),
            min_size=1,
            max_size=5,
        ),
        repeat=st.booleans(),
    )
    def submit(self, queue: str, requests: list[dict[str, Any]], repeat: bool) -> None:
        self.submit_all([self.job(queue=queue, **about) for about in requests], repeat)

    @rule(
        queue=st.sampled_from(QUEUES),
        priority=st.sampled_from(["normal", "high", "low"]),
        start_within_seconds=st.sampled_from([None, 3600]),
    )
    def flood(self, queue: str, **about: Any) -> None:
        """Submits more jobs than the queue takes."""
        self.submit_all([self.job(queue=queue, **about) for _ in range(MAX_QUEUE + 1)], False)

    def job(self, **about: Any) -> NewJob:
        """A job whose id is the same in every run, since Redis orders ties by the id."""
        self.made += 1
        return new_job(job_id=f"{self.made:04}", **about)

    def submit_all(self, jobs: list[NewJob], repeat: bool) -> None:
        queue = jobs[0].queue
        sent = jobs + jobs[:1] if repeat else jobs
        replies = self.do(self.hands.submit_jobs(*sent))
        accepted = [job for job, reply in zip(sent, replies, strict=True) if reply.verdict == "ok"]
        verdicts = [reply.verdict for reply in replies]
        room = self.last.queues[queue].room
        assert len(accepted) <= max(0, room)
        assert "full" not in verdicts or len(accepted) == max(0, room)
        if repeat:
            assert verdicts[-1] != "ok" or verdicts[0] == "full"
        digests = (job.record.idempotency_digest for job in accepted)
        used = [digest for digest in digests if digest]
        assert len(used) == len(set(used))
        known = {*self.ids, *(job.job_id for job in accepted)}
        assert all(reply.job_id in known for reply in replies if reply.verdict == "dup")
        for job in accepted:
            self.ids.append(job.job_id)
            priority = job.record.options.priority
            self.lists[job.job_id] = ("high", "normal", "low").index(priority)
            if job.inbox:
                self.watched.add(job.job_id)

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 99))
    def submit_again(self, which: int) -> None:
        job_id = self.some_id(which)
        job = new_job(job_id=job_id, queue=self.queue_of(job_id))
        known = self.last.jobs[job_id].status is not None
        verdict = self.do(self.hands.submit(job))[0]
        if known:
            assert verdict == "exists"
            self.unchanged("a submit of a known id")
        elif verdict == "ok":
            # An external id without a status, which is submitted through the API now.
            self.lists[job_id] = 1
            self.doubled.add(job_id)

    @precondition(lambda self: self.ids)
    @rule(which=st.lists(st.integers(0, 99), min_size=1, max_size=3))
    def watch(self, which: list[int]) -> None:
        for job_id in {self.some_id(index) for index in which}:
            queue = self.queue_of(job_id)
            reply = self.do(self.hands.submissions.watch(queue, INBOX, [job_id]))[0]
            before = self.last.jobs[job_id]
            assert (reply is None) == (before.status is None)
            if reply and not before.ended:
                self.watched.add(job_id)
            elif reply:
                assert (reply.status, reply.result) == (before.status, before.result)

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        job_id = self.some_id(which)
        before = self.last.jobs[job_id]
        if before.status is None:
            return
        verdict = self.do(self.hands.cancel(job_id))
        expected = {"pending": "cancelled", "processing": "stopping", "cancelled": "cancelled"}
        assert verdict == expected.get(str(before.status), "finished")
        if before.ended:
            self.unchanged("cancelling an ended job")

    @precondition(lambda self: any(len(queue.waiting) > 10 for queue in self.last.queues.values()))
    @rule()
    def cancel_all_in_one_call(self) -> None:
        """Cancels more jobs at once than are searched for in the lists: the others stay there as
        stale entries."""
        for name, queue in self.last.queues.items():
            ids = [job_id for job_id in self.ids if self.queue_of(job_id) == name]
            if len(queue.waiting) > 10:
                self.do(self.hands.cancel_in_one_call(*ids, queue=name))

    @precondition(lambda self: any(job.ended for job in self.last.jobs.values()))
    @rule(which=st.integers(0, 99), again=st.booleans())
    def retry(self, which: int, again: bool) -> None:
        ended = [job_id for job_id, job in self.last.jobs.items() if job.ended]
        listed = {job_id for queue in self.last.queues.values() for job_id in queue.waiting}
        stale = [job_id for job_id in ended if job_id in listed]
        ended = stale or ended
        job_id = ended[which % len(ended)]
        before, room = self.last.jobs[job_id], self.last.queues[self.queue_of(job_id)].room
        stored = self.do(self.hands.read(job_id))
        verdict = self.do(self.hands.operations.retry(stored, 1))
        assert verdict == retry_verdict(before, room)
        if verdict != "ok":
            return self.unchanged("a refused retry")
        self.reopened.add(job_id)
        self.watched.discard(job_id)
        if again:
            expected = "changed" if before.meta else "not_retryable"
            assert self.do(self.hands.operations.retry(stored, 1)) == expected
        return None

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 99), likely=st.booleans(), again=st.booleans())
    def forget(self, which: int, likely: bool, again: bool) -> None:
        ended = [job_id for job_id, job in self.last.jobs.items() if job.ended]
        job_id = ended[which % len(ended)] if likely and ended else self.some_id(which)
        before = self.last.jobs[job_id]
        if before.status is None:
            return
        stored = self.do(self.hands.read(job_id))
        verdict = self.do(self.hands.operations.forget(stored))
        assert verdict == ("forgotten" if before.ended else "unfinished")
        if not before.ended:
            return self.unchanged("a forget of an unfinished job")
        assert set(self.view().jobs[job_id].ttls) == {-2}
        self.reopened.add(job_id)
        self.watched.discard(job_id)
        self.forgotten.add(job_id)
        if again:
            assert self.do(self.hands.operations.forget(stored)) == "absent"
            assert self.do(self.hands.operations.retry(stored, 1)) == "absent"
        return None

    # --- external producers ----------------------------------------------------------------

    @rule(status=st.sampled_from([b"pending", None]))
    def external_submit(self, status: bytes | None) -> None:
        job_id = f"theirs{len(self.ids)}"
        self.hands.add_external_job(job_id, status=status)
        self.ids.append(job_id)
        self.external_ids.add(job_id)
        self.stray_pushes += 1

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 99), times=st.integers(1, 2))
    def external_push_again(self, which: int, times: int) -> None:
        job_id = self.some_id(which)
        if self.queue_of(job_id) != Q:
            return
        self.redis.lpush(Q, *[job_id] * times)
        self.doubled.add(job_id)
        self.stray_pushes += times

    @rule(junk=st.sampled_from(["", "a\nb", "x" * 200, "nobody"]))
    def external_push_of_junk(self, junk: str) -> None:
        self.redis.lpush(Q, junk)
        self.stray_pushes += 1

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 99))
    def input_is_lost(self, which: int) -> None:
        job_id = self.some_id(which)
        self.redis.delete(keys.data(job_id))
        self.inputs_lost = True
        before, after = self.last.jobs[job_id], self.view().jobs[job_id]
        lost = before.kept_bytes - after.kept_bytes
        self.lost_bytes[self.queue_of(job_id), before.minute] += lost

    # --- workers ---------------------------------------------------------------------------

    def may_claim(self, worker: int) -> bool:
        mine = [held for held in self.held if held.worker == worker and not held.let_go]
        if not mine:
            self.blocked.discard(worker)
        return worker not in self.blocked and not any(held.claim.exclusive for held in mine)

    def request(self, worker: int, max_jobs: int, low_first: bool, turn: bool) -> ClaimRequest:
        holds = any(held.worker == worker and not held.let_go for held in self.held)
        queues = QUEUES[::-1] if turn else QUEUES
        return ClaimRequest(queues, self.hands.consumer.new_token(), holds, max_jobs, low_first)

    def took(self, worker: int, request: ClaimRequest, claimed: ClaimReply) -> None:
        """Notes a claim, and checks that no other claim holds its jobs."""
        if claimed.is_blocked:
            self.blocked.add(worker)
        if claimed.claim is None:
            return
        claim, ids = claimed.claim, [job.job_id for job in claimed.claim.jobs]
        before = self.last.queues[claim.queue]
        assert len(ids) == len(set(ids)) <= request.max_jobs
        assert not before.paused
        assert not set(ids) & set(before.running)
        assert all(not self.last.jobs[job_id].ended for job_id in ids)
        alone = [job for job in claim.jobs if job.facts.deliveries or job.facts.suspect]
        assert not alone or (len(ids) == 1 and not request.is_holding)
        self.check_order(before, ids, request)
        self.held.append(Held(worker, claim, request, ids))

    def check_order(self, before: QueueView, ids: list[str], request: ClaimRequest) -> None:
        lists = before.lists[::-1] if request.low_first else before.lists
        if request.low_first:
            lists = (before.lists[2], before.lists[1], before.lists[0])
        queued = [job_id for ids in lists for job_id in ids]
        assert ids == sorted(ids, key=queued.index)

    @precondition(lambda self: self.has_work())
    @rule(
        worker=st.integers(0, WORKERS - 1),
        max_jobs=st.integers(1, 4),
        low_first=st.booleans(),
        turn=st.booleans(),
    )
    def claim(self, worker: int, max_jobs: int, low_first: bool, turn: bool) -> None:
        if not self.may_claim(worker):
            return
        request = self.request(worker, max_jobs, low_first, turn)
        self.took(worker, request, self.do(self.hands.consumer.claim(request)))

    @precondition(lambda self: self.has_work())
    @rule(worker=st.integers(0, WORKERS - 1), turn=st.booleans())
    def claim_some(self, worker: int, turn: bool) -> None:
        self.claim(worker, 3, False, turn)

    @precondition(lambda self: self.has_work())
    @rule(worker=st.integers(0, WORKERS - 1), turn=st.booleans(), outcome=st.sampled_from(OUTCOMES))
    def serve(self, worker: int, turn: bool, outcome: Outcome) -> None:
        """Claims and finishes, with nothing in between."""
        before = len(self.held)
        self.claim(worker, 4, False, turn)
        if len(self.held) > before:
            self.last = self.view()
            opened = [held for held in self.held if held.open].index(self.held[before])
            self.finish(opened, [outcome] * 4, 0, False, True)

    @precondition(lambda self: self.has_work())
    @rule(worker=st.integers(0, WORKERS - 1), turn=st.booleans())
    def lose(self, worker: int, turn: bool) -> None:
        """Claims with a worker that freezes at once, and sweeps after its lease has ended."""
        before = len(self.held)
        self.claim(worker, 2, False, turn)
        if len(self.held) > before:
            self.let_lease_end(self.held[before])
            self.reap()

    def has_work(self) -> bool:
        return any(queue.waiting and not queue.paused for queue in self.last.queues.values())

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), late=st.booleans())
    def claim_again(self, which: int, late: bool) -> None:
        begun = [] if late else [held for held in self.held if held.open and held.sent]
        held = (begun or self.held)[which % len(begun or self.held)]
        alive = held.claim.token in self.last.queues[held.claim.queue].claims
        if late or not alive:
            # A duplicate that the network delayed until after its deadline.
            self.world.store.note_server_time(self.hands.now_ms() - 3_600_000)
        claimed = self.do(self.hands.consumer.claim(held.request))
        owned = [
            job_id
            for job_id in (job.job_id for job in held.claim.jobs)
            if self.last.queues[held.claim.queue].running.get(job_id) == held.claim.token
        ]
        ids = [job.job_id for job in claimed.claim.jobs] if claimed.claim else []
        assert ids == (owned if alive else [])
        self.unchanged("a claim sent again")

    @precondition(lambda self: any(held.open for held in self.held))
    @rule(
        which=st.integers(0, 99),
        outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=4, max_size=4),
        part=st.integers(0, 4),
        delayed=st.booleans(),
        go_on=st.booleans(),
    )
    def finish(
        self, which: int, outcomes: list[Outcome], part: int, delayed: bool, go_on: bool
    ) -> None:
        open_ones = [held for held in self.held if held.open]
        held = open_ones[which % len(open_ones)]
        jobs = [job for job in held.claim.jobs if job.job_id in held.open][: part or None]
        finished = [
            outcome_of(
                job,
                held.claim.token,
                outcome,
                body=b"" if outcome in ("cancelled", "retry", "released", "suspect") else body_of(),
                delay_ms=3_600_000 if delayed and outcome in ("retry", "released") else 0,
            )
            for job, outcome in zip(jobs, outcomes, strict=False)
        ]
        held.open = [job for job in held.open if job not in {job.job_id for job in jobs}]
        last = not held.open
        held.let_go = held.let_go or last
        following = None
        if last and go_on and self.may_claim(held.worker):
            following = self.request(held.worker, 2, False, False)
        held.sent.append((finished, last, following))
        self.send(held, finished, last, following)

    def send(
        self,
        held: Held,
        finished: list[JobOutcome],
        last: bool,
        following: ClaimRequest | None,
    ) -> None:
        """Finishes jobs and checks each verdict."""
        before = self.last.queues[held.claim.queue]
        verdicts, claimed = self.do(
            self.hands.consumer.finish(held.claim, finished, last=last, following=following)
        )
        for job, verdict in zip(finished, verdicts, strict=True):
            if before.running.get(job.job_id) != held.claim.token:
                assert verdict in ("stale", "already")
            elif before.facts.get(job.job_id, Facts()).cancel_requested:
                assert verdict == "cancelled"
            else:
                assert verdict == job.outcome
                if verdict == "completed":
                    self.results[job.job_id] = job.body
            self.put_back += verdict in ("retry", "released", "suspect")
        if following:
            # The call may claim again the jobs that it has just released.
            self.last = self.view()
            self.last = msgspec.structs.replace(self.last, queues=self.before_next(claimed))
            self.took(held.worker, following, claimed)

    def before_next(self, claimed: ClaimReply) -> dict[str, QueueView]:
        """The queues as the claim within a finish found them."""
        queues = dict(self.last.queues)
        if claimed.claim:
            queue = queues[claimed.claim.queue]
            ids = [job.job_id for job in claimed.claim.jobs]
            running = {
                job_id: token for job_id, token in queue.running.items() if job_id not in ids
            }
            queues[claimed.claim.queue] = msgspec.structs.replace(
                queue, running=running, lists=(ids, [], [])
            )
        return queues

    @precondition(lambda self: any(held.sent for held in self.held))
    @rule(which=st.integers(0, 99), call=st.integers(0, 9))
    def finish_again(self, which: int, call: int) -> None:
        sent = [held for held in self.held if held.sent]
        held = sent[which % len(sent)]
        finished, last, _ = held.sent[call % len(held.sent)]
        verdicts, _ = self.do(self.hands.consumer.finish(held.claim, finished, last=last))
        assert set(verdicts) <= {"already", "stale"}
        self.unchanged("a finish sent again")

    @precondition(lambda self: any(held.open for held in self.held))
    @rule(worker=st.integers(0, WORKERS - 1))
    def renew(self, worker: int) -> None:
        tokens: dict[str, list[str]] = {}
        for held in self.held:
            if held.worker == worker and not held.let_go:
                tokens.setdefault(held.claim.queue, []).append(held.claim.token)
        if not tokens:
            return
        renewal = self.world.renewals.renew(tokens)
        leased = {token for queue in self.last.queues.values() for token in queue.leases}
        everything = {token for mine in tokens.values() for token in mine}
        assert set(renewal.lost) == everything - leased
        self.unchanged("renewing")

    def let_lease_end(self, held: Held) -> None:
        end = self.held.index(held) + 1
        self.redis.zadd(keys.leases(held.claim.queue), {held.claim.token: end}, xx=True)

    @precondition(lambda self: any(held.open for held in self.held))
    @rule(worker=st.integers(0, WORKERS - 1))
    def worker_freezes(self, worker: int) -> None:
        """Ends the leases of a worker, which may still wake up and finish."""
        for held in self.held:
            if held.worker == worker:
                self.let_lease_end(held)

    @precondition(lambda self: any(held.open for held in self.held))
    @rule(worker=st.integers(0, WORKERS - 1))
    def worker_dies(self, worker: int) -> None:
        self.worker_freezes(worker)
        for held in self.held:
            if held.worker == worker:
                held.open, held.let_go = [], True

    # --- time and operators ----------------------------------------------------------------

    @precondition(lambda self: any(queue.delayed for queue in self.last.queues.values()))
    @rule()
    def delays_pass(self) -> None:
        for name, queue in self.last.queues.items():
            for due, job_id in enumerate(queue.delayed, 1):
                self.redis.zadd(keys.delayed(name), {job_id: due})

    @precondition(lambda self: any(queue.deadlines for queue in self.last.queues.values()))
    @rule(queue=st.sampled_from(QUEUES), which=st.integers(0, 99))
    def a_deadline_passes(self, queue: str, which: int) -> None:
        ids = self.last.queues[queue].deadlines
        if not ids:
            return
        job_id = ids[which % len(ids)]
        self.hands.make_due(keys.deadlines(queue), job_id)
        facts = self.last.queues[queue].facts[job_id]
        past = msgspec.structs.replace(
            facts, **({"start_by_ms": 1} if facts.start_by_ms else {"finish_by_ms": 1})
        )
        self.redis.hset(keys.facts(queue), job_id, msgspec.msgpack.encode(past))

    @rule()
    def reap(self) -> None:
        self.put_back += self.do(self.hands.sweep()).put_back

    @rule()
    def reap_after_an_outage(self) -> None:
        for queue in QUEUES:
            self.redis.delete(keys.reap_gate(queue), keys.swept(queue))
        assert self.do(self.hands.maintenance.sweep()).put_back == 0
        after = self.view()
        for queue, before in self.last.queues.items():
            assert after.queues[queue].leases == before.leases

    @rule(queue=st.sampled_from(QUEUES), paused=st.sampled_from([True, False, False, False]))
    def pause(self, queue: str, paused: bool) -> None:
        changed = self.do(self.hands.operations.pause(queue, paused=paused))
        assert changed == (self.last.queues[queue].paused != paused)

    @precondition(lambda self: any(queue.paused for queue in self.last.queues.values()))
    @rule()
    def resume(self) -> None:
        for queue in QUEUES:
            self.do(self.hands.operations.pause(queue, paused=False))

    @precondition(lambda self: any(len(queue.waiting) > 8 for queue in self.last.queues.values()))
    @rule(queue=st.sampled_from(QUEUES))
    def purge(self, queue: str) -> None:
        ended = self.do(self.hands.operations.cancel_queue(queue))
        after = self.view()
        assert after.queues[queue].waiting == after.queues[queue].delayed == []
        assert ended == sum(
            job.status == "cancelled" and not self.last.jobs[job_id].ended
            for job_id, job in after.jobs.items()
        )

    # --- invariants ------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        view = self.view()
        for job_id in view.jobs:
            self.check_history(job_id, view.jobs[job_id])
            self.check_ttls(job_id, view.jobs[job_id])
            if job_id not in self.doubled:
                self.check_one_place(job_id, view)
        for name, queue in view.queues.items():
            self.check_claims(queue, view)
            self.check_counters(name, queue, view)
            self.check_idempotency(queue, view)
        self.check_notices(view)
        self.reopened.clear()
        self.last = view

    def check_history(self, job_id: str, now: JobView) -> None:
        """Each round has one terminal state and only the accepted result."""
        before = self.last.jobs.get(job_id)
        if before and before.ended and job_id not in self.reopened:
            kept = msgspec.structs.replace(before, ttls=(), size=0)
            assert msgspec.structs.replace(now, ttls=(), size=0) == kept
        was_requested = (
            before
            and self.last.queues[self.queue_of(job_id)].facts.get(job_id, Facts()).cancel_requested
        )
        assert not was_requested or now.status in ("processing", "cancelled", "failed")
        if now.status == "completed":
            assert now.result == self.results[job_id]
        else:
            assert now.result is None
        if now.status != "cancelled":  # then it has the time, if a script ended it
            assert (now.error is not None) == (now.status == "failed")

    def check_ttls(self, job_id: str, now: JobView) -> None:
        if now.ended:
            assert -1 not in now.ttls, f"{job_id} {now}"
        else:
            assert set(now.ttls) <= {-1, -2}, f"{job_id} {now}"

    def check_one_place(self, job_id: str, view: View) -> None:
        job = view.jobs[job_id]
        queue = view.queues[self.queue_of(job_id) if job_id in self.last.jobs else Q]
        if job.meta:
            queue = view.queues[decode_record(job.meta).queue]
        listed = queue.waiting.count(job_id)
        places = (listed, queue.delayed.count(job_id), int(job_id in queue.running))
        if job.status == "processing":
            assert places == (0, 0, 1), f"{job_id} {places}"
        elif job.status == "pending":
            assert sum(places) == 1, f"{job_id} {places}"
            assert places[2] == 0, f"{job_id} {places}"
        elif job.ended:
            assert places in ((0, 0, 0), (1, 0, 0)), f"{job_id} {places}"
        wrong = [ids for at, ids in enumerate(queue.lists) if at != self.lists.get(job_id, 1)]
        assert all(job_id not in ids for ids in wrong)

    def check_claims(self, queue: QueueView, view: View) -> None:
        assert set(queue.claims) == queue.leases
        for job_id, token in queue.running.items():
            assert job_id in queue.claims[token]
            assert view.jobs[job_id].status == "processing"
        for job_id in (*queue.facts, *queue.deadlines):
            assert not view.jobs[job_id].ended, (
                f"{job_id} has ended and still has facts or a deadline"
            )
        for facts in queue.facts.values():
            assert len(facts.inboxes) == len(set(facts.inboxes))

    def check_counters(self, name: str, queue: QueueView, view: View) -> None:
        entries = Counter(queue.waiting)
        gone = {job_id for job_id in self.forgotten if view.jobs[job_id].status is None}
        ended = sum(
            count
            for job_id, count in entries.items()
            if job_id in view.jobs and (view.jobs[job_id].ended or job_id in gone)
        )
        assert queue.stale_entries <= ended
        if not self.doubled:
            assert queue.stale_entries == ended
        size = sum(
            job.size
            for job in view.jobs.values()
            if job.status == "pending" and job.meta and decode_record(job.meta).queue == name
        )
        assert queue.bytes >= 0
        assert queue.bytes == size or self.inputs_lost, f"{queue.bytes} counted, {size} wait"
        self.check_kept_bytes(name, queue, view)
        assert queue.wake <= 64
        assert queue.room >= -self.put_back - self.stray_pushes
        assert self.redis.zcard(keys.dead(name)) <= 3

    def check_kept_bytes(self, name: str, queue: QueueView, view: View) -> None:
        """What is counted of ended jobs is what they keep, in the minute in which it expires."""
        stored = Counter[int]()
        for job in view.jobs.values():
            if (decode_record(job.meta).queue if job.meta else Q) == name:
                stored[job.minute] += job.kept_bytes
        for (queue_name, minute), lost in self.lost_bytes.items():
            stored[minute] += lost if queue_name == name else 0
        assert queue.bytes_kept == sum(queue.kept.values())
        assert queue.kept == +stored

    def check_idempotency(self, queue: QueueView, view: View) -> None:
        """A key expires with its job once that has ended, but where no script knew of the key; and
        else after a day."""
        a_day_ms = self.hands.store.policy.idempotency_seconds * 1000
        for job_id, expires_ms in queue.idempotency.values():
            job = view.jobs[job_id]
            assert job.status is not None, f"{job_id} was deleted without its key"
            is_long = 0 <= self.hands.now_ms() + a_day_ms - expires_ms < 600_000
            assert is_long or (job.ended and expires_ms == job.expires_ms), f"{job_id} {job}"
            if job.status == "completed":
                assert expires_ms == job.expires_ms, f"{job_id} {job}"

    def check_notices(self, view: View) -> None:
        ended = {job_id for job_id in self.watched if view.jobs[job_id].ended}
        if not ended:
            return
        notified = {
            (key.decode(), value.decode())
            for _, fields in self.redis.xrange(INBOX)
            for key, value in fields.items()
            if key and key[0] > 1
        }
        for job_id in ended:
            assert (job_id, view.jobs[job_id].status) in notified, (
                f"no inbox was notified of {job_id}"
            )
        self.watched -= ended

    # --- the end ---------------------------------------------------------------------------

    def teardown(self) -> None:
        """Runs all jobs that are left; then no key may be left over."""
        for queue in QUEUES:
            self.do(self.hands.operations.pause(queue, paused=False))
            self.hands.expire_leases(queue=queue)
        self.do(self.hands.sweep())
        for queue in QUEUES:
            self.hands.make_due(keys.delayed(queue))
        self.do(self.hands.sweep())
        while claim := self.do(self.hands.claim(4, queues=QUEUES)).claim:
            self.do(self.hands.finish(claim))
        self.do(self.hands.sweep())
        assert_at_rest(self.redis, *QUEUES)
        for job_id, job in self.view().jobs.items():
            absent = job.status is None and job_id in self.forgotten
            assert job.ended or absent or job_id in self.external_ids, f"{job_id} is {job.status}"
            assert job.ended or job.size == 0, f"{job_id} was never run"


def job_view(
    status: bytes | None,
    result: bytes | None,
    error: bytes | None,
    meta: bytes | None,
    size: int,
    ttls: list[int],
    expires_ms: int,
) -> JobView:
    text = None if status is None else status.decode()
    # The TTL of an ended job decreases; only whether there is one matters.
    seen_ttls = tuple(min(ttl, 0) for ttl in ttls)
    return JobView(text, result, error, meta, size, seen_ttls, expires_ms)


def retry_verdict(before: JobView, room: int) -> str:
    if before.status == "completed":
        return "not_retryable"
    if before.size == 0:
        return "no_input"
    return "full" if room < 1 else "ok"


_bodies: Iterator[int] = iter(range(1, 10**9))


def body_of() -> bytes:
    """A different body each time, so that a result shows which finish wrote it."""
    number = next(_bodies)
    return b'{"code":"x","message":"%d%b"}' % (number, b"." * (2000 if number % 3 else 0))


def run(url: str, server: redis.Redis, profile: settings) -> None:
    world = World(url, server)
    try:
        run_state_machine_as_test(partial(Machine, world), settings=profile)  # type: ignore[arg-type]
    finally:
        world.close()
        server.flushall()


_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
    "report_multiple_bugs": False,
}


def test_no_interleaving_breaks_the_protocol(redis_url: str, server: redis.Redis) -> None:
    run(redis_url, server, settings(max_examples=12, stateful_step_count=40, **_COMMON))


def test_no_interleaving_breaks_the_protocol_where_functions_are_refused(
    redis_url: str, server: redis.Redis
) -> None:
    with without_commands(server, redis_url, "fcall", "function") as url:
        run(url, server, settings(max_examples=6, stateful_step_count=40, **_COMMON))


@pytest.mark.soak
def test_no_interleaving_breaks_the_protocol_however_long(
    redis_url: str, server: redis.Redis
) -> None:
    run(redis_url, server, settings(max_examples=80, stateful_step_count=60, **_COMMON))

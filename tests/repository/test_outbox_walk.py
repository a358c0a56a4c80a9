"""Random walks of jobs with webhooks, each call sent twice at times: no end is told that did not
happen, none is left out, and what is reserved is what is there."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import pytest
import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from asyncinfer.jobs import TERMINAL, Outcome, Webhook, decode_record
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import Attempt
from asyncinfer.repository.deliveries import Outcome as DeliveryOutcome
from asyncinfer.repository.endpoint import Endpoint
from asyncinfer.repository.link import BeforeSend
from asyncinfer.repository.outbox import Outbox
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import Script
from asyncinfer.repository.store import Store
from tests.queue_driver import Q, QueueDriver, new_job

MAX_WEBHOOKS: Final = 5
LEASE_MS: Final = 60_000
ENDS: Final[tuple[Outcome, ...]] = (
    *("completed", "failed", "dead", "cancelled", "retry", "released", "suspect"),
)
NOTES: Final[tuple[DeliveryOutcome | None, ...]] = (None, "delivered", "gone", "given_up")
HOOKS: Final = (
    None,
    Webhook(url="https://a.example/"),
    Webhook(url="https://b.example/", metadata={"n": 1}),
    Webhook(url="https://c.example/", events=("failed",)),
    Webhook(url="https://d.example/", events=("completed", "cancelled")),
)


class Doubling(Store):
    """A store whose replies are lost at times, so that each call is sent again."""

    loses_replies = False

    async def call(
        self,
        verb: Script,
        names: Sequence[str],
        args: Sequence[Any],
        before_send: BeforeSend = lambda: None,
    ) -> Any:
        if self.loses_replies:
            await super().call(verb, names, args, before_send)
        return await super().call(verb, names, args, before_send)


class Walk:
    """One walk: what it does, and what it has seen of the ends of jobs."""

    def __init__(self, store: Doubling, server: redis.Redis) -> None:
        self.store = store
        self.hands = QueueDriver(store, server)
        self.outbox = Outbox(store)
        self.redis: Any = server
        self.job_ids: list[str] = []
        self.forgotten: set[str] = set()
        self.expected: set[str] = set()
        """Names of deliveries of ends that were seen and are wanted."""
        self.done: set[str] = set()
        self.at_ms = 0

    # --- steps -------------------------------------------------------------------------------

    async def submit(self, choice: int) -> None:
        hook = HOOKS[choice % len(HOOKS)]
        job = new_job(webhook=hook, priority="high" if choice % 2 else "normal")
        await self.hands.submit(job)
        self.job_ids.append(job.job_id)

    async def run(self, choice: int) -> None:
        if claim := (await self.hands.claim(2)).claim:
            await self.hands.finish(claim, ENDS[choice % len(ENDS)])

    async def lose(self, _: int) -> None:
        await self.hands.claim(2)
        self.hands.expire_leases()
        await self.hands.sweep()

    async def cancel(self, choice: int) -> None:
        if job_id := self.pick(choice):
            await self.hands.cancel(job_id)

    async def purge(self, _: int) -> None:
        await self.hands.operations.cancel_queue(Q)

    async def retry(self, choice: int) -> None:
        if job_id := self.pick(choice):
            await self.hands.retry(job_id)

    async def forget(self, choice: int) -> None:
        if job_id := self.pick(choice):
            verdict = await self.hands.operations.forget(await self.hands.read(job_id))
            if verdict != "unfinished":
                self.forgotten.add(job_id)

    async def lose_input(self, choice: int) -> None:
        if job_id := self.pick(choice):
            if self.hands.status(job_id) == "pending":
                self.redis.delete(keys.data(job_id))
            await self.hands.claim(1)
            self.hands.expire_leases()

    async def expire(self, choice: int) -> None:
        """The TTL of an ended job passes, and that of what is kept of its webhook."""
        job_id = self.pick(choice)
        if job_id and self.hands.status(job_id) in TERMINAL:
            self.redis.delete(*self.redis.keys(f"job:{job_id}:*"))
            webhook = keys.webhook(Q, job_id)
            if self.redis.ttl(webhook) > 0 and choice % 2:
                self.redis.delete(webhook)

    async def deliver(self, choice: int) -> None:
        taken = await self.outbox.take([Q], 1 + choice % 3, LEASE_MS)
        for delivery in taken:
            kept = await self.outbox.keep_body(delivery, b"{}" * 100, b"{}")
            assert kept is not None
            outcome = NOTES[choice % len(NOTES)]
            self.at_ms += 1
            await self.outbox.note(delivery, Attempt(self.at_ms, 500), 1, outcome)
            if outcome:
                self.done.add(delivery.member.name)

    async def die_while_sending(self, _: int) -> None:
        await self.outbox.take([Q], 2, LEASE_MS)
        self.hands.make_due(keys.outbox(Q))

    async def redeliver(self, choice: int) -> None:
        if job_id := self.pick(choice):
            self.at_ms += 1
            deliveries = (await self.outbox.state_in(Q, job_id)).deliveries
            verdict = await self.outbox.redeliver_in(Q, job_id, now_ms=self.at_ms)
            if verdict == "ok":
                self.done.discard(deliveries[-1].member.name)

    async def repair(self, _: int) -> None:
        before = self.redis.hlen(keys.webhooks(Q))
        self.redis.delete(keys.repair_gate(Q))
        await self.hands.maintenance.repair(600)
        assert self.redis.hlen(keys.webhooks(Q)) == before

    def pick(self, choice: int) -> str | None:
        there = [one for one in self.job_ids if self.hands.status(one) is not None]
        return there[choice % len(there)] if there else None

    STEPS: Final[tuple[Callable[["Walk", int], Coroutine[Any, Any, None]], ...]] = (
        *(submit, submit, run, run, lose, cancel, purge, retry, forget, lose_input, expire),
        *(deliver, deliver, die_while_sending, redeliver, repair),
    )

    # --- what holds after each step ----------------------------------------------------------

    def check(self) -> None:
        unfinished = self.note_ends()
        of_forgotten = {name for name in self.expected if name.rsplit("_", 2)[0] in self.forgotten}
        outbox = {name.decode() for name in self.redis.zrange(keys.outbox(Q), 0, -1)}
        assert outbox == self.expected - self.done - of_forgotten
        entries = self.redis.hgetall(keys.webhooks(Q))
        rounds = {name.rsplit("_", 1)[0] for name in outbox}
        assert {name.decode() for name in entries} == unfinished | rounds
        assert self.hands.counter(keys.webhook_bytes(Q)) == sum(map(int, entries.values()))
        # A body without a result has its room reserved, so that only retries share the bound.
        assert len(entries) <= MAX_WEBHOOKS
        if not entries:
            assert not self.redis.exists(keys.webhooks(Q), keys.webhook_bytes(Q))
        self.check_ttls(unfinished | rounds)

    def note_ends(self) -> set[str]:
        """Notes the ends of jobs since the last step; returns the rounds that have a webhook and
        are unfinished."""
        unfinished = set()
        for job_id in self.job_ids:
            status, meta = self.redis.mget(keys.status(job_id), keys.meta(job_id))
            record = decode_record(meta) if status else None
            if record is None or record.options.webhook is None:
                continue
            name = f"{job_id}_{record.round}"
            if status.decode() not in TERMINAL:
                unfinished.add(name)
            elif status.decode() in record.options.webhook.events:
                self.expected.add(f"{name}_{status.decode()}")
        return unfinished

    def check_ttls(self, awaited: set[str]) -> None:
        """What is kept of a webhook has no TTL just as long as something is to be told."""
        job_ids = {name.rsplit("_", 1)[0] for name in awaited}
        for key in self.redis.scan_iter(keys.webhook(Q, "*")):
            job_id = key.decode().rpartition(":")[2]
            assert (self.redis.ttl(key) == -1) == (job_id in job_ids), key


async def walk(url: str, server: redis.Redis, steps: Sequence[tuple[int, int, bool]]) -> None:
    server.flushall()
    policy = Policy(lease_seconds=30, reap_seconds=5, max_webhooks=MAX_WEBHOOKS)
    store = Doubling(Endpoint.parse(url), Q, policy, "test", 1.0)
    one = Walk(store, server)
    try:
        for step, choice, loses_replies in steps:
            store.loses_replies = loses_replies
            await Walk.STEPS[step](one, choice)
            store.loses_replies = False
            one.check()
    finally:
        await store.close()


STEPS = st.lists(
    st.tuples(st.integers(0, len(Walk.STEPS) - 1), st.integers(0, 11), st.booleans()),
    min_size=40,
    max_size=60,
)
QUIET: Final[dict[str, Any]] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def test_each_end_is_told_once_and_its_room_given_back(redis_url: str, server: redis.Redis) -> None:
    # A walk that fails is not shortened here, which takes minutes; the soak does it.
    @settings(max_examples=6, phases=(Phase.generate,), **QUIET)
    @given(STEPS)
    def run(steps: list[tuple[int, int, bool]]) -> None:
        asyncio.run(walk(redis_url, server, steps))

    run()


@pytest.mark.soak
def test_each_end_is_told_once_however_long_the_walk(redis_url: str, server: redis.Redis) -> None:
    @settings(max_examples=600, **QUIET)
    @given(STEPS)
    def run(steps: list[tuple[int, int, bool]]) -> None:
        asyncio.run(walk(redis_url, server, steps))

    run()

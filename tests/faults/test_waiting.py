"""Those who wait for a job's end, and what may happen to them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis

from asyncinfer.api.live.inbox import Inbox
from asyncinfer.jobs import Options
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimRequest, Finished, Runs
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored
from tests.faults.load_client import Customer

from .harness import assert_at_rest, eventually


@asynccontextmanager
async def open_inbox(store: Store, customer: Customer) -> AsyncIterator[Inbox]:
    inbox = Inbox(store, customer.submissions)
    async with asyncio.TaskGroup() as group:
        group.create_task(inbox.run())
        yield inbox
        await inbox.close()


async def _waiters(
    inbox: Inbox, customer: Customer, group: asyncio.TaskGroup
) -> list[asyncio.Task[Stored | None]]:
    stored = [one for one in await customer.read() if one]
    return [group.create_task(inbox.wait(one, 20)) for one in stored]


async def _all_signed_up(server: redis.Redis, customer: Customer) -> None:
    facts = keys.facts(customer.queue)
    await eventually(lambda: server.hlen(facts) == len(customer.acknowledged), "all signed up")


async def _claim(runs: Runs, customer: Customer, jobs: int) -> Claim | None:
    return (await runs.claim(ClaimRequest((customer.queue,), runs.new_token(), False, jobs))).claim


async def _run_all(store: Store, customer: Customer) -> None:
    runs = Runs(store, "w")
    while claim := (
        await runs.claim(ClaimRequest((customer.queue,), runs.new_token(), False, 7))
    ).claim:
        done = [Finished(job.job_id, "completed", b"{}", job.meta) for job in claim.jobs]
        await runs.finish(claim, done, last=True)


async def test_killed_inbox_connections_lose_no_wake_up(
    customer: Customer, store: Store, server: redis.Redis
) -> None:
    await customer.submit([1.0] * 200)
    async with open_inbox(store, customer) as inbox, asyncio.TaskGroup() as group:
        waiters = await _waiters(inbox, customer, group)
        await _all_signed_up(server, customer)
        killer = group.create_task(_kill_readers(server))
        await _run_all(store, customer)
        ended = [await one for one in waiters]
        killer.cancel()
    assert [one.status for one in ended if one] == ["completed"] * 200
    assert_at_rest(server, customer.queue)


async def _kill_readers(server: redis.Redis) -> None:
    while True:
        for one in server.client_list():
            if one["cmd"] == "xread":
                server.client_kill_filter(_id=one["id"])
        await asyncio.sleep(0.01)


async def test_cancel_expiry_and_a_lost_worker_wake_waiters_too(
    store: Store, server: redis.Redis
) -> None:
    customer, runs, maintenance = Customer(store), Runs(store, "w"), Maintenance(store)
    (lost,) = await customer.submit([1.0])
    claim = await _claim(runs, customer, 1)
    for _ in range(store.policy.max_deliveries - 1):
        assert claim
        await _lose(server, maintenance, customer, claim.token)
        claim = await _claim(runs, customer, 1)
    assert claim
    (cancelled,) = await customer.submit([1.0])
    (expired,) = await customer.submit([1.0], Options(start_within_seconds=0.2))
    async with open_inbox(store, customer) as inbox, asyncio.TaskGroup() as group:
        waiters = await _waiters(inbox, customer, group)
        await _all_signed_up(server, customer)
        (stored,) = await customer.read([cancelled])
        assert stored
        await customer.operations.cancel(stored)
        await _lose(server, maintenance, customer, claim.token)
        all_ended = asyncio.Event()
        group.create_task(_sweep_until(all_ended, maintenance))
        ended = {one.job_id: one for one in [await waiter for waiter in waiters] if one}
        all_ended.set()
    assert ended[cancelled].status == "cancelled"
    assert b"expired" in (ended[expired].error or b"")
    assert b"worker_lost" in (ended[lost].error or b"")
    await maintenance.sweep()
    assert await _claim(runs, customer, 9) is None
    assert_at_rest(server, customer.queue)


async def _lose(
    server: redis.Redis, maintenance: Maintenance, customer: Customer, token: str
) -> None:
    """The claim's lease has run out, and a sweep comes by that is not on its guard."""
    running = keys.running(customer.queue)
    server.zadd(keys.leases(customer.queue), {token: 1}, xx=True)

    async def taken() -> bool:
        await maintenance.sweep()
        return token.encode() not in server.hvals(running)

    await eventually(taken, "the claim is taken away")


async def _sweep_until(end: asyncio.Event, maintenance: Maintenance) -> None:
    # Told, not cancelled: a call may swallow that.
    while not end.is_set():
        await maintenance.sweep()
        await asyncio.sleep(0.02)


async def test_an_api_that_dies_leaves_no_key_without_a_bound(
    customer: Customer, store: Store, server: redis.Redis
) -> None:
    await customer.submit([1.0])
    async with asyncio.TaskGroup() as group:
        inbox = Inbox(store, customer.submissions)
        group.create_task(inbox.run())
        waiter = (await _waiters(inbox, customer, group))[0]
        await _all_signed_up(server, customer)
        await eventually(lambda: server.exists(inbox.name) == 1, "the inbox has its stream")
        assert 0 < server.ttl(inbox.name) <= 60
        # Redis hears no more of it than of a process that dies.
        waiter.cancel()
        await inbox.close()
    # Its stream runs out before the job ends.
    server.delete(inbox.name)
    await _run_all(store, customer)
    assert not server.exists(inbox.name)
    assert_at_rest(server, customer.queue)
    unbounded = [name for name in server.scan_iter("*inbox*") if server.ttl(name) == -1]
    assert not unbounded


async def test_a_look_before_the_submit_does_not_end_the_wait_for_it(
    customer: Customer, store: Store, server: redis.Redis
) -> None:
    """The inbox looks again at all that is waited for, also at a job still on its way in."""
    async with asyncio.TaskGroup() as group:
        inbox = Inbox(store, customer.submissions)
        job = customer.job(1.0, inbox=inbox.name)
        with inbox.expect(job.job_id) as ticket:
            group.create_task(inbox.run())  # begins with such a look
            await eventually(lambda: server.exists(inbox.name) == 1, "the inbox reads")
            await customer.submissions.read(job.job_id)
            await customer.submissions.submit_many(customer.queue, [job])
            waiter = group.create_task(ticket.wait(20))
            await _run_all(store, customer)
            ended = await waiter
            assert ended
            assert ended.status == "completed"
        await inbox.close()
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_a_wait_ends_when_its_job_is_gone_and_not_before_it_is_there(
    store: Store, server: redis.Redis
) -> None:
    customer = Customer(store)
    (gone,) = await customer.submit([1.0])
    async with open_inbox(store, customer) as inbox, asyncio.TaskGroup() as group:
        stored = (await customer.read([gone]))[0]
        assert stored
        wait = group.create_task(inbox.wait(stored, 60))
        await _all_signed_up(server, customer)
        to_come = customer.job(2.0)
        with inbox.expect(to_come.job_id) as ticket:
            server.flushall()
            assert await wait is None
            assert not ticket.ended.done()


@pytest.mark.soak
@pytest.mark.parametrize("comes_back", ["empty", "older"])
async def test_ends_are_heard_at_once_again_though_the_clock_of_redis_is_behind(
    comes_back: str, store: Store, server: redis.Redis
) -> None:
    customer = Customer(store)
    async with open_inbox(store, customer) as inbox, asyncio.TaskGroup() as group:
        await eventually(lambda: server.exists(inbox.name) == 1, "it has its stream")
        seconds, _ = server.time()
        (ended,) = await customer.submit([1.0])
        await _run_all(store, customer)
        with inbox.expect(ended) as ticket:
            server.xadd(inbox.name, {ended: "completed"}, id=f"{(seconds + 3600) * 1000}-0")
            assert await ticket.wait(1), "it reads that far"
        server.delete(inbox.name)
        if comes_back == "older":
            server.xadd(inbox.name, {"": "alive"}, id=f"{seconds * 1000}-0")
            server.expire(inbox.name, 60)

        async def is_heard_at_once() -> bool:
            customer.acknowledged.clear()
            await customer.submit([1.0])
            waiters = await _waiters(inbox, customer, group)
            await _all_signed_up(server, customer)
            began_at = time.monotonic()
            await _run_all(store, customer)
            assert await waiters[0]
            return time.monotonic() - began_at < 0.2

        await eventually(is_heard_at_once, "an end is heard at once", 30)


async def test_a_wait_that_is_too_short_gives_the_job_as_it_is(
    customer: Customer, store: Store, server: redis.Redis
) -> None:
    await customer.submit([1.0])
    async with open_inbox(store, customer) as inbox:
        (stored,) = await customer.read()
        assert stored
        now = await inbox.wait(stored, 0.05)
        assert now
        assert now.status == "pending"
    await _run_all(store, customer)
    assert_at_rest(server, customer.queue)


async def test_a_closing_api_answers_everyone_who_waits(
    customer: Customer, store: Store, server: redis.Redis
) -> None:
    await customer.submit([1.0] * 20)
    async with asyncio.TaskGroup() as group:
        async with open_inbox(store, customer) as inbox:
            waiters = await _waiters(inbox, customer, group)
            await _all_signed_up(server, customer)
        answers = [await one for one in waiters]
    assert [one.status for one in answers if one] == ["pending"] * 20
    await _run_all(store, customer)
    assert_at_rest(server, customer.queue)

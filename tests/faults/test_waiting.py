"""Waiting for the end of a job: lost connections, cancelled jobs, and APIs that end."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis

from asyncinfer.api.live.inbox import Inbox
from asyncinfer.jobs import Options
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob
from tests.faults.load_client import LoadClient

from .harness import assert_at_rest, eventually


@asynccontextmanager
async def open_inbox(store: Store, load_client: LoadClient) -> AsyncIterator[Inbox]:
    inbox = Inbox(store, load_client.submissions)
    async with asyncio.TaskGroup() as group:
        group.create_task(inbox.run())
        yield inbox
        await inbox.close()


async def _start_waiters(
    inbox: Inbox, load_client: LoadClient, group: asyncio.TaskGroup
) -> list[asyncio.Task[StoredJob | None]]:
    stored = [job for job in await load_client.read() if job]
    return [group.create_task(inbox.wait(job, 20)) for job in stored]


async def _wait_until_registered(server: redis.Redis, load_client: LoadClient) -> None:
    """Waits until the inbox is in the facts of every job."""
    facts = keys.facts(load_client.queue)
    await eventually(
        lambda: server.hlen(facts) == len(load_client.acknowledged), "all waiters are registered"
    )


async def _claim(runs: QueueConsumer, load_client: LoadClient, jobs: int) -> Claim | None:
    return (
        await runs.claim(ClaimRequest((load_client.queue,), runs.new_token(), False, jobs))
    ).claim


async def _run_all(store: Store, load_client: LoadClient) -> None:
    runs = QueueConsumer(store, "w")
    while claim := (
        await runs.claim(ClaimRequest((load_client.queue,), runs.new_token(), False, 7))
    ).claim:
        finished = [JobOutcome(job.job_id, "completed", b"{}", job.meta) for job in claim.jobs]
        await runs.finish(claim, finished, last=True)


@pytest.mark.soak
async def test_killed_inbox_connections_lose_no_wake_up(
    load_client: LoadClient, store: Store, server: redis.Redis
) -> None:
    await load_client.submit([1.0] * 200)
    async with open_inbox(store, load_client) as inbox, asyncio.TaskGroup() as group:
        waiters = await _start_waiters(inbox, load_client, group)
        await _wait_until_registered(server, load_client)
        killer = group.create_task(_kill_readers(server))
        await _run_all(store, load_client)
        ended = [await waiter for waiter in waiters]
        killer.cancel()
    assert [job.status for job in ended if job] == ["completed"] * 200
    assert_at_rest(server, load_client.queue)


async def _kill_readers(server: redis.Redis) -> None:
    while True:
        for connection in server.client_list():
            if connection["cmd"] == "xread":
                server.client_kill_filter(_id=connection["id"])
        await asyncio.sleep(0.01)


async def test_cancel_expiry_and_a_lost_worker_end_a_wait_too(
    store: Store, server: redis.Redis
) -> None:
    load_client, runs, maintenance = (
        LoadClient(store),
        QueueConsumer(store, "w"),
        Maintenance(store),
    )
    (lost,) = await load_client.submit([1.0])
    claim = await _claim(runs, load_client, 1)
    for _ in range(store.policy.max_deliveries - 1):
        assert claim
        await _expire(server, maintenance, load_client, claim.token)
        claim = await _claim(runs, load_client, 1)
    assert claim
    (cancelled,) = await load_client.submit([1.0])
    (expired,) = await load_client.submit([1.0], Options(start_within_seconds=0.2))
    async with open_inbox(store, load_client) as inbox, asyncio.TaskGroup() as group:
        waiters = await _start_waiters(inbox, load_client, group)
        await _wait_until_registered(server, load_client)
        (stored,) = await load_client.read([cancelled])
        assert stored
        await load_client.operations.cancel(stored)
        await _expire(server, maintenance, load_client, claim.token)
        all_have_ended = asyncio.Event()
        group.create_task(_sweep_until(all_have_ended, maintenance))
        ended = {job.job_id: job for job in [await waiter for waiter in waiters] if job}
        all_have_ended.set()
    assert ended[cancelled].status == "cancelled"
    assert b"expired" in (ended[expired].error or b"")
    assert b"worker_lost" in (ended[lost].error or b"")
    await maintenance.sweep()
    assert await _claim(runs, load_client, 9) is None
    assert_at_rest(server, load_client.queue)


async def _expire(
    server: redis.Redis, maintenance: Maintenance, load_client: LoadClient, token: str
) -> None:
    """Lets the claim's lease expire, and sweeps until its jobs are released."""
    running = keys.running(load_client.queue)
    server.zadd(keys.leases(load_client.queue), {token: 1}, xx=True)

    async def is_released() -> bool:
        await maintenance.sweep()
        return token.encode() not in server.hvals(running)

    await eventually(is_released, "the jobs of the claim are released")


async def _sweep_until(end: asyncio.Event, maintenance: Maintenance) -> None:
    # Ended by an event, since a call may swallow a cancellation.
    while not end.is_set():
        await maintenance.sweep()
        await asyncio.sleep(0.02)


async def test_an_api_that_dies_leaves_no_key_without_a_ttl(
    load_client: LoadClient, store: Store, server: redis.Redis
) -> None:
    await load_client.submit([1.0])
    async with asyncio.TaskGroup() as group:
        inbox = Inbox(store, load_client.submissions)
        group.create_task(inbox.run())
        (waiter,) = await _start_waiters(inbox, load_client, group)
        await _wait_until_registered(server, load_client)
        await eventually(lambda: server.exists(inbox.name) == 1, "the inbox has its stream")
        assert 0 < server.ttl(inbox.name) <= 60
        # To Redis this is the same as a process that dies.
        waiter.cancel()
        await inbox.close()
    # The stream expires before the job ends.
    server.delete(inbox.name)
    await _run_all(store, load_client)
    assert not server.exists(inbox.name)
    assert_at_rest(server, load_client.queue)
    unbounded = [name for name in server.scan_iter("*inbox*") if server.ttl(name) == -1]
    assert not unbounded


async def test_a_poll_before_the_submit_does_not_end_the_wait_for_the_job(
    load_client: LoadClient, store: Store, server: redis.Redis
) -> None:
    """The inbox polls all jobs that are waited for, also one that is not submitted yet."""
    async with asyncio.TaskGroup() as group:
        inbox = Inbox(store, load_client.submissions)
        job = load_client.new_job(1.0, inbox=inbox.name)
        with inbox.expect(job.job_id) as ticket:
            group.create_task(inbox.run())  # begins with such a poll
            await eventually(lambda: server.exists(inbox.name) == 1, "the inbox reads")
            await load_client.submissions.read(job.job_id)
            await load_client.submissions.submit_many(load_client.queue, [job])
            waiter = group.create_task(ticket.wait(20))
            await _run_all(store, load_client)
            ended = await waiter
            assert ended
            assert ended.status == "completed"
        await inbox.close()
    assert_at_rest(server, load_client.queue)


async def test_the_next_poll_ends_the_wait_for_a_job_that_is_gone(
    load_client: LoadClient, store: Store, server: redis.Redis
) -> None:
    await load_client.submit([1.0])
    async with asyncio.TaskGroup() as group:
        inbox = Inbox(store, load_client.submissions)
        (wait,) = await _start_waiters(inbox, load_client, group)
        await _wait_until_registered(server, load_client)
        server.flushall()
        group.create_task(inbox.run())  # begins with such a poll
        async with asyncio.timeout(5):
            assert await wait is None
        await inbox.close()


@pytest.mark.soak
async def test_a_wait_ends_when_its_job_is_gone_but_not_before_the_job_is_submitted(
    store: Store, server: redis.Redis
) -> None:
    load_client = LoadClient(store)
    (gone,) = await load_client.submit([1.0])
    async with open_inbox(store, load_client) as inbox, asyncio.TaskGroup() as group:
        stored = (await load_client.read([gone]))[0]
        assert stored
        wait = group.create_task(inbox.wait(stored, 60))
        await _wait_until_registered(server, load_client)
        not_submitted = load_client.new_job(2.0)
        with inbox.expect(not_submitted.job_id) as ticket:
            server.flushall()
            async with asyncio.timeout(30):
                assert await wait is None
            assert not ticket.ended_job.done()


@pytest.mark.soak
@pytest.mark.parametrize("restarts", ["empty", "with an older dump"])
async def test_a_wait_is_notified_at_once_again_though_the_clock_of_redis_is_behind(
    restarts: str, store: Store, server: redis.Redis
) -> None:
    load_client = LoadClient(store)
    async with open_inbox(store, load_client) as inbox, asyncio.TaskGroup() as group:
        await eventually(lambda: server.exists(inbox.name) == 1, "the inbox has its stream")
        seconds, _ = server.time()
        (ended,) = await load_client.submit([1.0])
        await _run_all(store, load_client)
        with inbox.expect(ended) as ticket:
            server.xadd(inbox.name, {ended: "completed"}, id=f"{(seconds + 3600) * 1000}-0")
            assert await ticket.wait(1), "the inbox has read this entry"
        server.delete(inbox.name)
        if restarts == "with an older dump":
            server.xadd(inbox.name, {"": "alive"}, id=f"{seconds * 1000}-0")
            server.expire(inbox.name, 60)

        async def is_notified_at_once() -> bool:
            load_client.acknowledged.clear()
            await load_client.submit([1.0])
            waiters = await _start_waiters(inbox, load_client, group)
            await _wait_until_registered(server, load_client)
            began_at = time.monotonic()
            await _run_all(store, load_client)
            assert await waiters[0]
            return time.monotonic() - began_at < 0.2

        await eventually(is_notified_at_once, "a wait is notified at once", 30)


async def test_a_wait_that_is_too_short_returns_the_job_as_it_is(
    load_client: LoadClient, store: Store, server: redis.Redis
) -> None:
    await load_client.submit([1.0])
    async with open_inbox(store, load_client) as inbox:
        (stored,) = await load_client.read()
        assert stored
        job = await inbox.wait(stored, 0.05)
        assert job
        assert job.status == "pending"
    await _run_all(store, load_client)
    assert_at_rest(server, load_client.queue)


async def test_a_closing_api_replies_to_all_waiting_clients(
    load_client: LoadClient, store: Store, server: redis.Redis
) -> None:
    await load_client.submit([1.0] * 20)
    async with asyncio.TaskGroup() as group:
        async with open_inbox(store, load_client) as inbox:
            waiters = await _start_waiters(inbox, load_client, group)
            await _wait_until_registered(server, load_client)
        jobs = [await waiter for waiter in waiters]
    assert [job.status for job in jobs if job] == ["pending"] * 20
    await _run_all(store, load_client)
    assert_at_rest(server, load_client.queue)

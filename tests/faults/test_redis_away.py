"""Redis that is killed, frozen, swallowed, full or forgets its scripts."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import redis

from asyncinfer.errors import RedisUnavailable, StorageFull
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claimed, ClaimRequest, Finished, Runs
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import Customer, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import DurableServer, OpenCrew, WorkerChild
from .proxy import proxied

POLICY = Policy(lease_seconds=2.0, reap_seconds=0.3, job_ttl_seconds=600)
BRISK = Policy(lease_seconds=0.6, reap_seconds=0.1, job_ttl_seconds=600)


@contextlib.asynccontextmanager
async def opened(
    url: str, policy: Policy = POLICY, call_seconds: float = 1.0
) -> AsyncIterator[Store]:
    async with Store.open(
        url, queue_name="predict_queue", policy=policy, name="test", call_seconds=call_seconds
    ) as store:
        yield store


async def test_what_was_acknowledged_survives_a_killed_server(
    crew: OpenCrew, durable: DurableServer
) -> None:
    async with opened(durable.url) as store:
        customer = Customer(store)
        with crew(
            redis_url=durable.url, policy=POLICY, worker=WorkerConfig(concurrency=2, max_batch=16)
        ) as workers:
            crewed = [workers.hire(), workers.hire()]
            await _ready(durable, crewed)
            async with asyncio.TaskGroup() as group:
                enough = asyncio.Event()
                group.create_task(_load_until(enough, customer))
                for _ in range(2):
                    seen = len(customer.acknowledged)
                    await eventually(_more_than(customer, seen + 100), "the load goes on", 20)
                    durable.kill()
                    durable.start()
                enough.set()
            before = len(customer.acknowledged)
            restarted_at = time.monotonic()
            await customer.submit([1.0])
            await customer.all_completed(60)
            consumed_seconds = time.monotonic() - restarted_at
            assert before > 200
            assert [await one.stop() for one in crewed] == [0, 0]
        client = redis.Redis.from_url(durable.url)
        assert_one_end_each(client, customer.queue)
        assert_at_rest(client, customer.queue)
        client.close()
    assert consumed_seconds < 20


async def _ready(durable: DurableServer, crewed: Sequence[WorkerChild]) -> None:
    client = redis.Redis.from_url(durable.url)
    await eventually(lambda: all(one.announced(client) for one in crewed), "they are ready")
    client.close()


def _more_than(customer: Customer, count: int) -> Callable[[], bool]:
    return lambda: len(customer.acknowledged) > count


async def _load_until(end: asyncio.Event, customer: Customer) -> None:
    chance = random.Random(3)
    # Told, not cancelled: a call may swallow that.
    while not end.is_set():
        await customer.submit_or_not([float(chance.randint(0, 8)) for _ in range(10)])
        await asyncio.sleep(0.02)


async def test_idle_workers_consume_again_within_5_s_of_a_restart(
    crew: OpenCrew, durable: DurableServer
) -> None:
    async with opened(durable.url) as store:
        customer = Customer(store)
        with crew(redis_url=durable.url, policy=POLICY) as workers:
            worker = workers.hire()
            await customer.submit([1.0])
            await customer.all_completed(5)
            durable.kill()
            durable.start()
            await customer.submit([2.0])
            await customer.all_completed(5)
            assert await worker.stop() == 0


async def _away(crew: OpenCrew, durable: DurableServer, policy: Policy, seconds: float) -> None:
    """Jobs run, one of them for longer than the outage; each is delivered once."""
    async with opened(durable.url, policy) as store:
        customer = Customer(store)
        with crew(
            redis_url=durable.url,
            policy=policy,
            worker=WorkerConfig(concurrency=1, prediction_timeout_seconds=120),
        ) as workers:
            crewed = [workers.hire() for _ in range(2)]
            client = redis.Redis.from_url(durable.url)
            for value in (500.0, 1000.0 * seconds + 1000):
                await customer.submit([value])
                running = len(customer.acknowledged)
                await eventually(_running(client, customer.queue, running), "each has one")
            durable.kill()
            await asyncio.sleep(seconds)  # the outage itself
            durable.start()
            # The run computes all the while: on a busy machine it takes thrice its time.
            await customer.all_completed(120)
            assert [await one.stop() for one in crewed] == [0, 0]
        for job_id in customer.acknowledged:
            assert transitions(client, customer.queue)[job_id]["processing"] == 1
        assert_at_rest(client, customer.queue)
        client.close()


def renewed(client: redis.Redis, queue: str) -> Callable[[], bool]:
    def lease_end() -> float:
        leases: Any = client.zrange(keys.leases(queue), 0, -1, withscores=True)
        return float(leases[0][1])

    before = lease_end()
    return lambda: lease_end() > before


def _running(client: redis.Redis, queue: str, count: int) -> Callable[[], bool]:
    return lambda: client.hlen(keys.running(queue)) == count


@pytest.mark.soak
async def test_no_living_workers_job_is_delivered_twice_after_an_outage(
    crew: OpenCrew, durable: DurableServer
) -> None:
    await _away(crew, durable, BRISK, 2.0)


@pytest.mark.soak
async def test_no_living_workers_job_is_delivered_twice_after_20_s_without_redis(
    crew: OpenCrew, durable: DurableServer
) -> None:
    await _away(crew, durable, POLICY, 20.0)


@pytest.mark.soak
async def test_a_frozen_server_takes_nobodys_jobs(crew: OpenCrew, durable: DurableServer) -> None:
    async with opened(durable.url, BRISK) as store:
        customer = Customer(store)
        with crew(
            redis_url=durable.url,
            policy=BRISK,
            worker=WorkerConfig(concurrency=1, prediction_timeout_seconds=60),
        ) as workers:
            crewed = [workers.hire() for _ in range(2)]
            client = redis.Redis.from_url(durable.url)
            await customer.submit([2000.0])
            await eventually(_running(client, customer.queue, 1), "it runs")
            durable.signal(signal.SIGSTOP)
            await asyncio.sleep(1.2)  # longer than a lease
            durable.signal(signal.SIGCONT)
            await customer.all_completed(30)
            assert [await one.stop() for one in crewed] == [0, 0]
        (job_id,) = customer.acknowledged
        assert transitions(client, customer.queue)[job_id]["processing"] == 1
        assert_at_rest(client, customer.queue)
        client.close()


@pytest.mark.parametrize("fault", ["refused", "black hole"])
async def test_a_submit_without_redis_is_refused_in_time_and_the_loop_lives(
    fault: str, redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy, opened(proxy.url, call_seconds=0.5) as store:
        customer = Customer(store)
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(customer.submissions.run())
            await customer.submissions.submit(customer.job(1.0))
            if fault == "refused":
                await proxy.down()
            else:
                proxy.black_hole()
            answered = asyncio.Event()
            gap = group.create_task(_longest_gap_seconds(answered))
            jobs = [customer.job(float(number)) for number in range(50)]
            asked_at = time.monotonic()
            answers = await asyncio.gather(
                *(customer.submissions.submit(job) for job in jobs), return_exceptions=True
            )
            seconds = time.monotonic() - asked_at
            answered.set()
            assert all(isinstance(one, RedisUnavailable) for one in answers)
            assert [one.job_id for one in answers] == [one.job_id for one in jobs]  # type: ignore[union-attr]
            assert seconds < 1.5
            assert await gap < 0.5
            sender.cancel()
    server.flushall()


async def _longest_gap_seconds(end: asyncio.Event) -> float:
    """How long the loop once did not come round."""
    last, longest = time.monotonic(), 0.0
    while not end.is_set():
        await asyncio.sleep(0.01)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.soak
async def test_a_result_that_could_not_be_stored_is_stored_when_redis_is_back(
    crew: OpenCrew, customer: Customer, redis_url: str, server: redis.Redis
) -> None:
    policy = BRISK
    async with proxied(redis_url) as proxy:
        with crew(redis_url=proxy.url, policy=policy) as workers:
            worker = workers.hire()
            (job_id,) = await customer.submit([800.0])
            await eventually(_running(server, customer.queue, 1), "it runs")
            # Renewed, so the worker has the claim's reply, and runs it.
            await eventually(renewed(server, customer.queue), "its lease is renewed")
            await proxy.down()
            await eventually(lambda: "Finishing:" in workers.log, "it cannot be stored")
            assert server.get(keys.status(job_id)) == b"processing"
            await proxy.up()
            await customer.all_completed()
            assert await worker.stop() == 0
    assert transitions(server, customer.queue)[job_id]["processing"] == 1
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_a_connection_that_swallows_everything_is_noticed_within_its_bound(
    redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy, opened(proxy.url) as store:
        runs, bell = Runs(store, "w"), Doorbell(store)
        request = ClaimRequest(("predict_queue",), runs.new_token(), False, 1)
        assert await runs.claim(request) == Claimed(None)
        assert await bell.wait(["predict_queue"], 0.05) is None
        proxy.black_hole()
        started_at = time.monotonic()
        with pytest.raises(RedisUnavailable):
            await runs.claim(request)
        assert time.monotonic() - started_at < store.call_seconds + 0.3
        started_at = time.monotonic()
        with pytest.raises(RedisUnavailable):
            await bell.wait(["predict_queue"], 0.2)
        assert time.monotonic() - started_at < 1.5
        proxy.restore()
        assert await runs.claim(request) == Claimed(None)
        await bell.close()


async def test_with_memory_full_submits_are_refused_and_running_jobs_finish(
    customer: Customer, server: redis.Redis, store: Store
) -> None:
    runs = Runs(store, "w")
    ids = await customer.submit([1.0, 2.0, 3.0])
    first = await runs.claim(ClaimRequest((customer.queue,), runs.new_token(), False, 1))
    assert first.claim
    server.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StorageFull):
            await customer.submit([4.0])
        job = first.claim.jobs[0]
        (verdict,), following = await runs.finish(
            first.claim,
            [Finished(job.job_id, "completed", b"{}", job.meta)],
            last=True,
            following=ClaimRequest((customer.queue,), runs.new_token(), False, 1),
        )
        assert verdict == "completed"
        assert following.claim
        (waiting,) = await customer.read(ids[2:])
        assert waiting
        assert await customer.operations.cancel(waiting) == "cancelled"
        job = following.claim.jobs[0]
        await runs.finish(
            following.claim, [Finished(job.job_id, "completed", b"{}", job.meta)], last=True
        )
    finally:
        server.config_set("maxmemory", "0")
    assert_at_rest(server, customer.queue)


async def test_a_worker_starts_with_memory_full_and_empties_the_queue(
    crew: OpenCrew, customer: Customer, server: redis.Redis, store: Store
) -> None:
    await store.claim_default_model("slow")
    await customer.submit([1.0, 2.0, 3.0])
    server.config_set("maxmemory", "1mb")
    try:
        with crew() as workers:
            worker = workers.hire()
            await customer.all_completed()
            assert await worker.stop() == 0
    finally:
        server.config_set("maxmemory", "0")
    assert_at_rest(server, customer.queue)


async def test_a_server_that_forgets_its_scripts_under_load_loses_nothing(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew() as workers:
        worker = workers.hire()
        for number in range(60):
            await customer.submit([float(number % 5)] * 5)
            server.script_flush()
        await customer.all_completed()
        assert await worker.stop() == 0
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def test_a_run_whose_claim_is_gone_from_redis_ends_quietly_and_stores_nothing(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew() as workers:
        worker = workers.hire()
        await customer.submit([800.0])
        await eventually(_running(server, customer.queue, 1), "it runs")
        server.flushall()
        customer.acknowledged.clear()
        await eventually(lambda: "results came too late" in workers.log, "the run has ended")
        assert list(server.scan_iter("job:*")) == []
        await customer.submit([1.0])
        await customer.all_completed(5)
        assert await worker.stop() == 0
        warnings = [line for line in workers.log.splitlines() if "lost" in line or "late" in line]
        assert len(warnings) <= 2, warnings
    assert_at_rest(server, customer.queue)

"""A Redis that is killed, frozen, unreachable or full, or that loses its scripts."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import redis

from asyncinfer.errors import RedisUnavailable, StorageFull
from asyncinfer.repository import keys
from asyncinfer.repository.claims import ClaimReply, ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import LoadClient, assert_one_end_each, transitions

from .harness import Halts, assert_at_rest, eventually, is_renewed
from .processes import DurableServer, OpenWorkers, WorkerChild
from .proxy import proxied

POLICY = Policy(lease_seconds=2.0, reap_seconds=0.3, job_ttl_seconds=600)
SHORT_TIMES = Policy(lease_seconds=0.6, reap_seconds=0.1, job_ttl_seconds=600)


@contextlib.asynccontextmanager
async def open_store(
    url: str, policy: Policy = POLICY, call_seconds: float = 1.0
) -> AsyncIterator[Store]:
    async with Store.open(
        url, queue_name="predict_queue", policy=policy, name="test", call_seconds=call_seconds
    ) as store:
        yield store


async def test_acknowledged_jobs_survive_a_killed_server(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    async with open_store(durable.url) as store:
        load_client = LoadClient(store)
        with open_workers(
            redis_url=durable.url, policy=POLICY, worker=WorkerConfig(concurrency=2, max_batch=16)
        ) as workers:
            started = [workers.start(), workers.start()]
            await _wait_until_ready(durable, started)
            async with asyncio.TaskGroup() as group:
                has_enough_jobs = asyncio.Event()
                group.create_task(_load_until(has_enough_jobs, load_client))
                for _ in range(2):
                    before = len(load_client.acknowledged)
                    await eventually(_more_than(load_client, before + 100), "the load goes on", 20)
                    durable.kill()
                    durable.start()
                has_enough_jobs.set()
            before = len(load_client.acknowledged)
            restarted_at = time.monotonic()
            await load_client.submit([1.0])
            await load_client.assert_all_completed(60)
            consumed_seconds = time.monotonic() - restarted_at
            assert before > 200
            assert [await worker.stop() for worker in started] == [0, 0]
        client = redis.Redis.from_url(durable.url)
        assert_one_end_each(client, load_client.queue)
        assert_at_rest(client, load_client.queue)
        client.close()
    assert consumed_seconds < 20


async def _wait_until_ready(durable: DurableServer, started: Sequence[WorkerChild]) -> None:
    client = redis.Redis.from_url(durable.url)
    await eventually(
        lambda: all(worker.is_announced(client) for worker in started), "they are ready"
    )
    client.close()


def _more_than(load_client: LoadClient, count: int) -> Callable[[], bool]:
    return lambda: len(load_client.acknowledged) > count


async def _load_until(end: asyncio.Event, load_client: LoadClient) -> None:
    chance = random.Random(3)
    # Ended by an event, since a call may swallow a cancellation.
    while not end.is_set():
        await load_client.try_submit([float(chance.randint(0, 8)) for _ in range(10)])
        await asyncio.sleep(0.02)


async def test_idle_workers_consume_again_within_5_s_of_a_restart(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    async with open_store(durable.url) as store:
        load_client = LoadClient(store)
        with open_workers(redis_url=durable.url, policy=POLICY) as workers:
            worker = workers.start()
            await load_client.submit([1.0])
            await load_client.assert_all_completed(5)
            durable.kill()
            durable.start()
            await load_client.submit([2.0])
            await load_client.assert_all_completed(5)
            assert await worker.stop() == 0


async def _assert_delivered_once(
    open_workers: OpenWorkers, durable: DurableServer, policy: Policy, outage_seconds: float
) -> None:
    """Asserts that jobs that run during an outage, one of them for longer, are delivered once."""
    async with open_store(durable.url, policy) as store:
        load_client = LoadClient(store)
        with open_workers(
            redis_url=durable.url,
            policy=policy,
            worker=WorkerConfig(concurrency=1, prediction_timeout_seconds=600),
        ) as workers:
            started = [workers.start() for _ in range(2)]
            client = redis.Redis.from_url(durable.url)
            for value in (500.0, 1000.0 * outage_seconds + 1000):
                await load_client.submit([value])
                running = len(load_client.acknowledged)
                await eventually(
                    _running(client, load_client.queue, running), "each worker has a job"
                )
            durable.kill()
            await asyncio.sleep(outage_seconds)
            durable.start()
            # The run computes all the time: on a busy machine it takes many times as long.
            await load_client.assert_all_completed(600)
            assert [await worker.stop() for worker in started] == [0, 0]
        for job_id in load_client.acknowledged:
            assert transitions(client, load_client.queue)[job_id]["processing"] == 1
        assert_at_rest(client, load_client.queue)
        client.close()


def _running(client: redis.Redis, queue: str, count: int) -> Callable[[], bool]:
    return lambda: client.hlen(keys.running(queue)) == count


@pytest.mark.soak
async def test_no_job_of_a_running_worker_is_delivered_twice_after_an_outage(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    await _assert_delivered_once(open_workers, durable, SHORT_TIMES, 2.0)


@pytest.mark.soak
async def test_no_job_of_a_running_worker_is_delivered_twice_after_20_s_without_redis(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    await _assert_delivered_once(open_workers, durable, POLICY, 20.0)


@pytest.mark.soak
async def test_after_a_freeze_of_redis_longer_than_a_lease_no_job_is_taken_from_its_worker(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    async with open_store(durable.url, SHORT_TIMES) as store:
        load_client = LoadClient(store)
        with open_workers(
            redis_url=durable.url,
            policy=SHORT_TIMES,
            worker=WorkerConfig(concurrency=1, prediction_timeout_seconds=60),
        ) as workers:
            started = [workers.start() for _ in range(2)]
            client = redis.Redis.from_url(durable.url)
            await load_client.submit([2000.0])
            await eventually(_running(client, load_client.queue, 1), "it runs")
            durable.signal(signal.SIGSTOP)
            await asyncio.sleep(1.2)  # longer than a lease
            durable.signal(signal.SIGCONT)
            await load_client.assert_all_completed(30)
            assert [await worker.stop() for worker in started] == [0, 0]
        (job_id,) = load_client.acknowledged
        assert transitions(client, load_client.queue)[job_id]["processing"] == 1
        assert_at_rest(client, load_client.queue)
        client.close()


@pytest.mark.parametrize("fault", ["refused", "black hole"])
async def test_a_submit_without_redis_is_refused_in_time_and_the_event_loop_is_not_blocked(
    fault: str, redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy, open_store(proxy.url, call_seconds=0.5) as store:
        load_client = LoadClient(store)
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(load_client.submissions.run())
            await load_client.submissions.submit(load_client.new_job(1.0))
            if fault == "refused":
                await proxy.down()
            else:
                proxy.black_hole()
            all_are_refused = asyncio.Event()
            gap = group.create_task(_longest_gap_seconds(all_are_refused))
            jobs = [load_client.new_job(float(number)) for number in range(50)]
            submitted_at = time.monotonic()
            with Halts() as halts:
                errors = await asyncio.gather(
                    *(load_client.submissions.submit(job) for job in jobs), return_exceptions=True
                )
            seconds = time.monotonic() - submitted_at - halts.seconds
            all_are_refused.set()
            refused = [error for error in errors if isinstance(error, RedisUnavailable)]
            assert len(refused) == len(jobs)
            for error, job in zip(refused, jobs, strict=True):
                # A connection that is refused may have been noticed before anything was sent.
                if "Nothing was stored" in error.detail and fault == "refused":
                    assert error.job_id is None
                else:
                    assert error.job_id == job.job_id
            assert seconds < 1.5
            assert await gap < 0.5 + halts.seconds
            sender.cancel()
    server.flushall()


async def _longest_gap_seconds(end: asyncio.Event) -> float:
    """The longest time in which the event loop did not run."""
    last, longest = time.monotonic(), 0.0
    while not end.is_set():
        await asyncio.sleep(0.01)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.soak
async def test_a_result_that_could_not_be_stored_is_stored_when_redis_is_back(
    open_workers: OpenWorkers, load_client: LoadClient, redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy:
        with open_workers(redis_url=proxy.url, policy=SHORT_TIMES) as workers:
            worker = workers.start()
            (job_id,) = await load_client.submit([800.0])
            await eventually(_running(server, load_client.queue, 1), "it runs")
            # A renewal shows that the worker has the claim's reply, and runs the job.
            await eventually(is_renewed(server, load_client.queue), "its lease is renewed")
            await proxy.down()
            await eventually(lambda: "Finishing 1 jobs waits" in workers.log, "it cannot be stored")
            assert server.get(keys.status(job_id)) == b"processing"
            await proxy.up()
            await load_client.assert_all_completed()
            assert await worker.stop() == 0
    assert transitions(server, load_client.queue)[job_id]["processing"] == 1
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_connection_without_replies_is_given_up_within_its_time_out(
    redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy, open_store(proxy.url) as store:
        runs, doorbell = QueueConsumer(store, "w"), Doorbell(store)
        request = ClaimRequest(("predict_queue",), runs.new_token(), False, 1)
        assert await runs.claim(request) == ClaimReply(None)
        assert await doorbell.wait(["predict_queue"], 0.05) is None
        proxy.black_hole()
        started_at = time.monotonic()
        with Halts() as halts, pytest.raises(RedisUnavailable):
            await runs.claim(request)
        assert time.monotonic() - started_at < store.call_seconds + 0.3 + halts.seconds
        started_at = time.monotonic()
        with Halts() as halts, pytest.raises(RedisUnavailable):
            await doorbell.wait(["predict_queue"], 0.2)
        assert time.monotonic() - started_at < 1.5 + halts.seconds
        proxy.restore()
        assert await runs.claim(request) == ClaimReply(None)
        await doorbell.close()


async def test_with_full_memory_submits_are_refused_and_running_jobs_finish(
    load_client: LoadClient, server: redis.Redis, store: Store
) -> None:
    runs = QueueConsumer(store, "w")
    ids = await load_client.submit([1.0, 2.0, 3.0])
    first = await runs.claim(ClaimRequest((load_client.queue,), runs.new_token(), False, 1))
    assert first.claim
    server.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StorageFull):
            await load_client.submit([4.0])
        job = first.claim.jobs[0]
        (verdict,), following = await runs.finish(
            first.claim,
            [JobOutcome(job.job_id, "completed", b"{}", job.meta)],
            last=True,
            following=ClaimRequest((load_client.queue,), runs.new_token(), False, 1),
        )
        assert verdict == "completed"
        assert following.claim
        (waiting,) = await load_client.read(ids[2:])
        assert waiting
        assert await load_client.operations.cancel(waiting) == "cancelled"
        job = following.claim.jobs[0]
        await runs.finish(
            following.claim, [JobOutcome(job.job_id, "completed", b"{}", job.meta)], last=True
        )
    finally:
        server.config_set("maxmemory", "0")
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_worker_starts_with_full_memory_and_empties_the_queue(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis, store: Store
) -> None:
    await store.claim_default_model("slow")
    await load_client.submit([1.0, 2.0, 3.0])
    server.config_set("maxmemory", "1mb")
    try:
        with open_workers() as workers:
            worker = workers.start()
            await load_client.assert_all_completed()
            assert await worker.stop() == 0
    finally:
        server.config_set("maxmemory", "0")
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_server_that_loses_its_scripts_under_load_loses_no_job(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers() as workers:
        worker = workers.start()
        for number in range(60):
            await load_client.submit([float(number % 5)] * 5)
            server.function_flush("SYNC")
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_run_whose_claim_is_gone_from_redis_stores_nothing_and_logs_two_lines_at_most(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers() as workers:
        worker = workers.start()
        await load_client.submit([800.0])
        await eventually(_running(server, load_client.queue, 1), "it runs")
        server.flushall()
        load_client.acknowledged.clear()
        await eventually(lambda: "results came too late" in workers.log, "the run has ended")
        assert list(server.scan_iter("job:*")) == []
        await load_client.submit([1.0])
        await load_client.assert_all_completed(5)
        assert await worker.stop() == 0
        warnings = [line for line in workers.log.splitlines() if "lost" in line or "late" in line]
        assert len(warnings) <= 2, warnings
    assert_at_rest(server, load_client.queue)

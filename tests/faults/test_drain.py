"""Workers that are told to stop: they drain, and no job is lost."""

import signal
from functools import partial

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import EXIT_HUNG, WorkerConfig
from tests import zoo
from tests.faults.load_client import LoadClient, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import DurableServer, OpenWorkers
from .proxy import proxied


async def test_an_idle_worker_stops_at_once(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(worker=WorkerConfig(concurrency=4, brpop_timeout_seconds=60)) as workers:
        worker = workers.start()
        await load_client.submit([1.0])
        await load_client.assert_all_completed()
        worker.signal(signal.SIGTERM)
        assert await worker.wait_for_exit(15) == 0
    assert not list(server.scan_iter(keys.worker("predict_queue", "*")))
    assert_at_rest(server, load_client.queue)


async def test_a_busy_worker_finishes_its_runs_and_claims_no_more_jobs(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(worker=WorkerConfig(concurrency=1, max_batch=2)) as workers:
        ids = await load_client.submit([400.0, 401.0, 1.0])
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 2, "two run")
        assert await worker.stop() == 0
        assert [server.get(keys.status(job_id)) for job_id in ids] == [
            b"completed",
            b"completed",
            b"pending",
        ]
        workers.start()
        await load_client.assert_all_completed()
        assert await workers.members[-1].stop() == 0
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_drain_that_takes_too_long_releases_its_jobs_without_counting_a_delivery(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    config = WorkerConfig(concurrency=1, prediction_timeout_seconds=600, drain_timeout_seconds=0.2)
    with open_workers(worker=config) as workers:
        (job_id,) = await load_client.submit([zoo.FOREVER])
        running = keys.running(load_client.queue)
        for _ in range(2):
            worker = workers.start()
            await eventually(lambda: server.hlen(running) == 1, "it runs")
            assert await worker.stop() == 0
            assert server.get(keys.status(job_id)) == b"pending"
            assert not server.exists(keys.facts(load_client.queue))
        (stored,) = await load_client.read([job_id])
        assert stored
        assert await load_client.operations.cancel(stored) == "cancelled"
    assert transitions(server, load_client.queue)[job_id]["processing"] == 2
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_drain_does_not_wait_for_a_kernel_that_cannot_be_stopped(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    load_client = LoadClient(store, "huge", "huge")
    config = WorkerConfig(
        concurrency=1,
        prediction_timeout_seconds=600,
        drain_timeout_seconds=0.2,
        hang_grace_seconds=0.2,
    )
    with open_workers(models=("huge",), worker=config) as workers:
        (job_id,) = await load_client.submit([20_000.0])
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 1, "it runs")
        assert await worker.stop() == EXIT_HUNG
        assert server.get(keys.status(job_id)) == b"pending"
        (stored,) = await load_client.read([job_id])
        assert stored
        await load_client.operations.cancel(stored)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_second_signal_ends_a_worker_at_once_and_loses_no_job(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers() as workers:
        await load_client.submit([700.0])
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 1, "it runs")
        worker.signal(signal.SIGTERM)
        await eventually(lambda: "Draining" in workers.log, "it drains")
        worker.signal(signal.SIGTERM)
        assert await worker.wait_for_exit(15) == 130
        workers.start()
        await load_client.assert_all_completed()
        assert await workers.members[-1].stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_after_an_interrupted_drain_no_further_run_of_a_claim_starts(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    config = WorkerConfig(concurrency=1, prediction_timeout_seconds=600, drain_timeout_seconds=0.2)
    with open_workers(worker=config) as workers:
        # These are too many rows for a shared run.
        ids = await load_client.submit([zoo.FOREVER] * 3, rows=2500)
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 3, "one runs")
        assert await worker.stop() == 0
    assert {server.get(keys.status(job_id)) for job_id in ids} == {b"pending"}
    for stored in await load_client.read():
        assert stored
        assert await load_client.operations.cancel(stored) == "cancelled"
    assert_at_rest(server, load_client.queue)


SHORT_DRAIN = WorkerConfig(concurrency=1, drain_timeout_seconds=0.2, hang_grace_seconds=0.2)


@pytest.mark.soak
async def test_jobs_whose_results_an_interrupted_drain_could_not_store_are_run_again(
    open_workers: OpenWorkers, load_client: LoadClient, redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy:
        proxy.swallow_requests_with(b'"data":[1.0]')
        with open_workers(redis_url=proxy.url, worker=SHORT_DRAIN) as workers:
            await load_client.submit([1.0, 2.0, 3.0])
            worker = workers.start()
            await eventually(lambda: proxy.requests_swallowed > 0, "the finish is on its way")
            assert await worker.stop() == EXIT_HUNG
    with open_workers() as workers:
        worker = workers.start()
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_the_jobs_of_a_worker_that_stops_while_redis_is_frozen_are_run_again(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    policy = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600)
    async with Store.open(
        durable.url, queue_name="predict_queue", policy=policy, name="test", call_seconds=1.0
    ) as store:
        load_client = LoadClient(store)
        client = redis.Redis.from_url(durable.url)
        with open_workers(redis_url=durable.url, worker=SHORT_DRAIN) as workers:
            await load_client.submit([100.0, 101.0])
            worker = workers.start()
            await eventually(lambda: client.hlen(keys.running(load_client.queue)) == 2, "they run")
            durable.signal(signal.SIGSTOP)
            worker.signal(signal.SIGTERM)
            await worker.wait_for_exit(5)
            durable.signal(signal.SIGCONT)
            worker = workers.start()
            # Redis may also have read what the first worker sent while it was frozen.
            await load_client.assert_all_completed()
            await eventually(
                lambda: workers.log.count("Serves slow.") == 2, "the second worker serves"
            )
            assert await worker.stop() == 0
        assert_one_end_each(client, load_client.queue)
        assert_at_rest(client, load_client.queue)
        client.close()


@pytest.mark.soak
@pytest.mark.traceback("a step raises an unexpected error")
async def test_a_worker_that_fails_exits_with_an_error_although_a_run_goes_on(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    config = WorkerConfig(concurrency=2, max_batch=1, prediction_timeout_seconds=600)
    with open_workers(worker=config) as workers:
        await load_client.submit([zoo.FOREVER, 1.0])
        assert await workers.start(fail_at="finishing").wait_for_exit(5) == 1
        assert "a bug at 'finishing'" in workers.log


@pytest.mark.soak
async def test_a_worker_stops_every_time_it_is_told_to(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    """redis-py may swallow a cancellation; a role that goes on would keep the process alive."""
    with open_workers() as workers:
        for number in range(6):
            worker = workers.start()
            await eventually(partial(worker.is_announced, server), "the worker is ready")
            await load_client.submit([float(number % 3)] * 5)
            worker.signal(signal.SIGTERM)
            assert await worker.wait_for_exit(15) == 0
        workers.start()
        await load_client.assert_all_completed()
    assert_one_end_each(server, load_client.queue)
